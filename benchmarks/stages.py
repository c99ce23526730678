"""DeepSpeed's own check of an optimizer: a training at every ZeRO stage, and how losses differ.

    python benchmarks/stages.py          # writes docs/stages.svg and docs/stages.json

Every run is launch/train.py on 2 ranks with the same seed, text and batches; only the DeepSpeed
config differs.
"""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import common
import figures
from common import ROOT, Quick

STEPS, STEPS_QUICK = 120, 10

PRECISIONS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "bf16"}},
    "bf16, fp32 accumulation": {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}},
}
OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
RUNS: list[tuple[str, str, int, dict[str, Any]]] = [  # label, precision, stage, more of zero_optimization
    *((f"stage {stage}", "fp32", stage, {}) for stage in range(4)),
    ("stage 3, sub-groups, offload", "fp32", 3, {"sub_group_size": 50_000, **OFFLOAD}),
    *((f"stage {stage}", "bf16", stage, {}) for stage in range(4)),
    ("stage 1 (BF16_Optimizer)", "bf16, fp32 accumulation", 1, {}),
]
RUNS_QUICK = [RUNS[0], RUNS[2]]

Row = tuple[int, float, float | None]  # step, loss, held-out loss


def run(folder: Path, stage: int, precision: str, zero: dict[str, Any], steps: int) -> list[Row]:
    """Train; the rows of the log."""
    config = json.loads((ROOT / "configs" / f"zero{stage}.json").read_text()) | PRECISIONS[precision]
    config["zero_optimization"] |= zero
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    arguments = [
        "--config",
        str(folder / "config.json"),
        "--steps",
        str(steps),
        "--global-batch",
        "16",
        "--log-every",
        "1",
    ]
    command = [*launcher, str(ROOT / "launch" / "train.py"), *arguments, "--out", str(folder / "run")]
    done = subprocess.run(command, capture_output=True, text=True, env={"OMP_NUM_THREADS": "1", **os.environ})
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr[-5000:]}")
    with (folder / "run" / "log.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["loss"]]
    return [(int(row["step"]), float(row["loss"]), float(row["val_loss"]) if row["val_loss"] else None) for row in rows]


def main(quick: Quick = False) -> None:
    """Train at every ZeRO stage and precision, and draw how far losses are apart."""
    runs, steps = (RUNS_QUICK, STEPS_QUICK) if quick else (RUNS, STEPS)
    curves = {}
    with tempfile.TemporaryDirectory() as folder:
        for number, (label, precision, stage, zero) in enumerate(runs):
            rows = run(Path(folder) / str(number), stage, precision, zero, steps)
            curves[f"{label}, {precision}"] = rows
            print(f"{label}, {precision}: held-out loss {rows[-1][2]:.4f} after {rows[-1][0]} steps", flush=True)
    report = {"steps": steps, "ranks": 2, "runs": {}}
    for (_, precision, _, _), (name, rows) in zip(runs, curves.items(), strict=True):
        reference = curves["stage 0, fp32" if precision == "fp32" else "stage 0, bf16"]
        apart = max(abs(a[1] - b[1]) for a, b in zip(rows, reference, strict=True))
        early = max(abs(a[1] - b[1]) for a, b in zip(rows[:20], reference[:20], strict=True))
        report["runs"][name] = {
            "held_out": rows[-1][2],
            "largest_distance_from_stage_0": apart,
            "largest_distance_from_stage_0_in_20_steps": early,
        }
    print(json.dumps(report, indent=2))
    common.save("stages", quick, report, draw)


def draw(content: dict[str, Any]) -> Any:
    """How far each run's training loss is from stage 0's of its precision, at most."""
    figure, (axes,) = figures.panels([figures.height(len(content["runs"]))])
    rows = []
    for name, run in content["runs"].items():
        apart, colour = run["largest_distance_from_stage_0"], figures.OURS if "fp32" in name[-4:] else figures.THIRD
        label, words = name.replace("bf16, fp32 accumulation", "bf16, fp32 sums"), f"{apart:.1g}" if apart else "0"
        rows.append((label, max(apart, SMALLEST), f"{words}; ends at {run['held_out']:.4f}", colour))
    figures.bars(axes, rows, log=True)
    axes.set_title("Distance of the loss from stage 0's")
    axes.set(xlabel=f"largest |loss − loss at stage 0| in {content['steps']} steps, nats a byte", xlim=(SMALLEST, 0.1))
    figures.tell(
        figure,
        f"AdaFisher with the settings of configs/zero*.json, {content['ranks']} ranks; launch/train.py's GPT of 0.4 M"
        " parameters, the same text and batches in each run. At the right the held-out loss at the end; stage 0's"
        " loss in bf16 differs from that in fp32.",
        figures.machine(content),
    )
    return figure


SMALLEST = 3e-6  # log.csv has five digits: less is nothing


if __name__ == "__main__":
    common.start(main)
