"""`make demo`: AdaFisher, AdamW and Muon on the same model and text, by 2 CPU ranks or all GPUs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from report import draw_curves, table
from rich.console import Console
from typer import Option

HERE = Path(__file__).resolve().parent
OPTIMIZERS = ("adafisher", "adamw", "muon")
SEQUENCES = 32  # a step


def main(
    steps: Annotated[int, Option(min=1)] = 200,
    config: Annotated[Path, Option(help="DeepSpeed's JSON.")] = HERE.parent / "configs" / "zero2.json",
    out: Annotated[Path, Option(help="Folder of the runs; earlier ones there are replaced.")] = Path("runs/demo"),
) -> None:
    """Train with AdaFisher, then with AdamW and Muon, each at its own good learning rate.

    The runs come one after the other: seconds of a machine that does other work too are not to be
    compared, so the picture has none.
    """
    console = Console(width=None if sys.stdout.isatty() else 120)
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    world_size = gpus or 2
    options = ["--steps", str(steps), "--config", str(config), "--global-batch", str(_multiple(SEQUENCES, world_size))]
    where = f"{gpus} GPU(s)" if gpus else "2 CPU ranks"
    runs = f"{len(OPTIMIZERS)} runs of {steps} steps on {where}, {config.name}"
    console.print(f"{runs}; on 2 CPU cores, about three minutes.")
    began = time.monotonic()
    for optimizer in OPTIMIZERS:
        command = ["--optimizer", optimizer, "--out", str(out / optimizer), "--overwrite", *options]
        if code := _torchrun(world_size, command, out / f"{optimizer}.err"):
            console.print(f"[bold red]{optimizer} failed[/] (exit code {code}); its messages:", highlight=False)
            print((out / f"{optimizer}.err").read_text()[-20000:])
            sys.exit(1)
    summaries = [json.loads((out / name / "summary.json").read_text()) for name in OPTIMIZERS]
    draw_curves(
        {
            f"{summary['optimizer']['type']}, lr {summary['optimizer']['params']['lr']:g}": out / name / "log.csv"
            for name, summary in zip(OPTIMIZERS, summaries, strict=True)
        },
        out / "loss.png",
    )
    model = "Byte-level transformer, {parameters:,} parameters, {tokens_a_step:,} bytes a step".format(**summaries[0])
    console.print(f"{model}; loss in nats a byte", highlight=False)
    console.print(table(summaries))
    end = f"Curves: {out / 'loss.png'} ({time.monotonic() - began:.0f} s in all)"
    console.print(end, soft_wrap=True, highlight=False)


def _torchrun(world_size: int, arguments: list[str], errors: Path) -> int:
    """Run launch/train.py on `world_size` local ranks; stdout to the console, stderr to a file."""
    errors.parent.mkdir(parents=True, exist_ok=True)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world_size)]
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    if not torch.cuda.is_available():
        # DeepSpeed compiles its Muon for each shape: minutes on a CPU, longer than the training.
        environment.setdefault("TORCHDYNAMO_DISABLE", "1")
    with errors.open("w") as file:
        command = [*launcher, str(HERE / "train.py"), *arguments]
        return subprocess.run(command, stderr=file, env=environment, check=False).returncode


def _multiple(at_least: int, of: int) -> int:
    return -(-at_least // of) * of


if __name__ == "__main__":
    typer.run(main)
