"""DeepSpeed's own check of an optimizer: a training at every ZeRO stage, all losses in one picture.

    python benchmarks/stages.py          # writes docs/stages.png and docs/stages.json

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
    """Train at every ZeRO stage and precision, and draw all loss curves."""
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
    common.save("stages", quick, report, draw(curves))


def draw(curves: dict[str, list[Row]]) -> Any:
    """All curves over each other, and how far each is from stage 0 of its precision."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    for number, (name, rows) in enumerate(curves.items()):
        reference = curves["stage 0, fp32" if name.endswith(", fp32") else "stage 0, bf16"]
        steps = [row[0] for row in rows]
        # Later lines are thinner, so that those below them show.
        width = 7 - 0.6 * number
        axes[0].plot(steps, [row[1] for row in rows], linewidth=width, alpha=0.8, label=name)
        apart = [max(abs(a[1] - b[1]), 1e-8) for a, b in zip(rows, reference, strict=True)]
        axes[1].semilogy(steps, apart, label=name)
    axes[0].set(xlabel="step", ylabel="training loss (nats a byte)", title="AdaFisher on 2 ranks")
    axes[1].set(xlabel="step", ylabel="|loss − loss at stage 0|", title="distance from stage 0 in the same precision")
    axes[0].legend(fontsize=8)
    for axis in axes:
        axis.grid(alpha=0.25)
    return figure


if __name__ == "__main__":
    common.start(main)
