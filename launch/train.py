"""Trains a byte-level transformer with DeepSpeed and AdaFisher, AdamW or Muon, on one rank or many.

    torchrun --nproc-per-node 2 launch/train.py --config configs/zero2.json

adafisher_dist is not imported: having it installed is enough for {"type": "AdaFisher"} in a
DeepSpeed config.
"""

from __future__ import annotations

import enum
import json
import logging
import shutil
import sys
from pathlib import Path
from typing import Annotated

import corpus as texts
import ranks
import typer
from corpus import Corpus
from ranks import Place
from report import Board, Log, draw_curves
from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape
from settings import Settings, UsageError, deepspeed_config
from trainer import Trainer, build, find_checkpoint, from_checkpoint
from typer import Option

ROOT = Path(__file__).resolve().parent.parent


class OptimizerName(str, enum.Enum):
    adafisher = "adafisher"
    adamw = "adamw"
    muon = "muon"


class Device(str, enum.Enum):
    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


def main(
    optimizer: Annotated[
        OptimizerName,
        Option(help="Written into the DeepSpeed config. muon: never clips; TORCHDYNAMO_DISABLE=1 on CPUs."),
    ] = OptimizerName.adafisher,
    config: Annotated[Path, Option(help="DeepSpeed's JSON.")] = ROOT / "configs" / "zero1.json",
    lr: Annotated[
        float | None,
        Option(
            min=0,
            help="Peak learning rate.  [default: the config's, or 0.01; 0.003 for adamw, 0.05 for muon's matrices]",
        ),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        Option("--set", metavar="NAME=VALUE", help="A parameter of the optimizer, as in damping=0.2; may be repeated."),
    ] = None,
    steps: Annotated[int, Option(min=1, help="Length of the run and of its schedule.")] = 200,
    batch_size: Annotated[
        int | None, Option(min=1, help="Sequences a rank and step.  [default: as in the config]")
    ] = None,
    global_batch: Annotated[int | None, Option(min=1, help="Sequences a step on all ranks, instead.")] = None,
    seq_len: Annotated[int, Option(min=1, help="Bytes in a sequence.")] = 128,
    width: Annotated[int, Option(min=1)] = 96,
    layers: Annotated[int, Option(min=1)] = 3,
    heads: Annotated[int, Option(min=1)] = 4,
    data: Annotated[
        Path | None,
        Option(help="A text file, or a folder of them.  [default: the sources of Python's standard library]"),
    ] = None,
    corpus_mb: Annotated[float, Option(min=0, help="Read at most so many 10⁶ bytes; a tenth is held out.")] = 8.0,
    seed: Annotated[int, Option(min=0)] = 0,
    warmup: Annotated[float, Option(min=0, max=1, help="Part of the steps; a cosine to 2 % follows.")] = 0.1,
    validate_every: Annotated[int | None, Option(min=1, help="Steps.  [default: a tenth of --steps]")] = None,
    log_every: Annotated[int, Option(min=1, help="Steps.")] = 5,
    save_every: Annotated[int | None, Option(min=1, help="Steps.  [default: only at the end]")] = None,
    held_out: Annotated[int, Option(min=1, help="Sequences to validate on.")] = 128,
    out: Annotated[Path | None, Option(help="Folder of this run.  [default: runs/OPTIMIZER-CONFIG]")] = None,
    overwrite: Annotated[bool, Option("--overwrite", help="Replace a run that is in that folder.")] = False,
    resume: Annotated[Path | None, Option(help="Go on from this run's checkpoint, on any ranks (AdaFisher).")] = None,
    restartable: Annotated[
        bool, Option("--restartable", help="Go on from the newest checkpoint in --out; begin where there is none.")
    ] = False,
    device: Annotated[Device, Option(help="GPUs where there are any, unless told.")] = Device.auto,
) -> None:
    """Train a byte-level transformer language model with DeepSpeed (configs: configs/README.md)."""
    settings = Settings(
        optimizer.value, config, lr, overrides or [], steps, batch_size, global_batch, seq_len, width, layers, heads,
        data, corpus_mb, seed, warmup, validate_every, log_every, save_every, held_out, out, overwrite, resume,
        restartable, device.value,
    )  # fmt: skip
    console = Console(quiet=ranks.rank() != 0, width=None if sys.stdout.isatty() else 120)
    try:
        run(settings, console)
    except Exception as error:
        # By name, since this script does not import adafisher_dist. Raised on all ranks alike, as
        # UsageError is.
        if not isinstance(error, UsageError) and type(error).__name__ != "UnsupportedLayoutError":
            raise
        if ranks.rank() == 0:
            Console(stderr=True).print("[bold red]error:[/]", escape(str(error)), highlight=False, soft_wrap=True)
        ranks.leave(2)
    ranks.leave(0)


def run(settings: Settings, console: Console) -> None:
    """Check everything on all ranks, train, and leave the run's files behind.

    Raises:
        UsageError: on all ranks alike.
    """
    logger = logging.getLogger("adafisher_dist")
    logger.setLevel(logging.INFO)
    logger.addHandler(RichHandler(console=console, show_path=False, show_time=False, show_level=False))
    place = ranks.start(settings.device)
    settings = ranks.gather(ranks.run_on_all_ranks(lambda: from_checkpoint(settings)))[0]  # as rank 0 sees the files
    config, corpus = ranks.run_on_all_ranks(lambda: _prepare(settings, place))
    if len(set(ranks.gather(corpus.digest))) > 1:
        raise UsageError("The ranks read different texts; give all machines the same files with --data.")
    console.print(
        f"{escape(corpus.source)}; {place.world_size} rank(s) on {place.device.type},"
        f" {config['train_batch_size']} sequences a step",
        highlight=False,
    )
    engine = build(settings, config)
    trainer = Trainer(engine, settings, config, corpus, place)
    if settings.resume:
        trainer.resume()
        if settings.restartable and trainer.step >= settings.steps:
            console.print(f"{settings.folder} is complete: {trainer.step} steps.", highlight=False, soft_wrap=True)
            return
    settings.folder.mkdir(parents=True, exist_ok=True)
    if settings.overwrite and not settings.continues_in_place and place.is_main:
        shutil.rmtree(settings.folder / "checkpoint", ignore_errors=True)  # else --resume could find the replaced run's
    after = trainer.step if settings.continues_in_place else None
    log = Log(settings.folder / "log.csv", after) if place.is_main else None
    with Board(console, config["optimizer"]["type"], settings.steps, trainer.step) as board:
        trainer.fit(board, log)
    if log:
        log.close()
    _finish(trainer, console)


def _prepare(settings: Settings, place: Place) -> tuple[dict, Corpus]:
    settings.check()
    config = deepspeed_config(settings, place.world_size)
    corpus = texts.load(settings.data, settings.corpus_mb, settings.seq_len)
    if settings.resume:
        find_checkpoint(settings, config, corpus, place)
    return config, corpus


def _finish(trainer: Trainer, console: Console) -> None:
    folder = trainer.settings.folder
    summary = trainer.summary()
    if trainer.place.is_main:
        folder.joinpath("summary.json").write_text(json.dumps(summary, indent=2) + "\n")
        draw_curves({summary["optimizer"]["type"]: folder / "log.csv"}, folder / "loss.png")
    checkpoint = trainer.save()  # last: with --restartable, a run that has it is complete
    console.print(
        f"Curve: {folder / 'loss.png'} · log: {folder / 'log.csv'} · checkpoint: {checkpoint}", soft_wrap=True
    )


if __name__ == "__main__":
    app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)
    app.command()(main)
    app()
