"""How long a training step takes with each optimizer of convergence.py, on its models.

    python benchmarks/convergence_times.py          # minutes, on a machine that does nothing else

The trainings themselves are timed too, but side by side, on days that are not alike; here all take
ten steps in turn, as often as SOAP refreshes where it does so every ten, and the fastest turn
counts: what else a machine does can only add to it. Small models take more turns, since theirs are
short beside what else goes on. Into docs/convergence_times.json.
"""

from __future__ import annotations

import json
import time

import common
import optimizers
from common import Quick
from convergence import CONTENDERS
from convergence_tasks import SIZES, task_of
from trainings import one_step

STEPS = 10
TURNS = {64: 16, 96: 5, 128: 3}  # by width


def milliseconds(width: int, turns: int) -> dict[str, float]:
    """By name, of the processor: a step of this width's model."""
    task = task_of(f"laws{width}x20")
    models = {name: task.build(0) for name in CONTENDERS}
    made = {
        name: optimizers.build(builder, models[name], 1e-3, 0.1, dict(settings))
        for name, (builder, settings, _) in CONTENDERS.items()
    }
    taken: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    for turn in range(turns + 1):  # the first is warm-up
        for name, model in models.items():
            began = time.process_time()
            for step in range(turn * STEPS, (turn + 1) * STEPS):
                one_step(task, model, made[name], 0, step)
            taken[name].append(1e3 * (time.process_time() - began) / STEPS)
    return {name: min(each[1:]) for name, each in taken.items()}


def main(quickly: Quick = False) -> None:
    """Time a step of each optimizer at each size."""
    found = {f"laws{width}": milliseconds(width, 1 if quickly else TURNS[width]) for width in SIZES}
    common.save("convergence_times", quickly, {"milliseconds": common.rounded(found)})
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    common.start(main)
