"""Trainings of one optimizer with given settings on the development bench, kept in trials.jsonl.

    python benchmarks/development/trial.py gpt64x20 prototype --lr 1e-2 2e-2 --seed 0 1 2 \
        --set a=0.5 polar=slab
    python benchmarks/development/trial.py --table gpt64x20

What is in the file is not trained again. Two trainings run at a time, of one thread each.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))

from optimizers import BUILDERS
from tasks import task_of
from trainings import Result, Run, carry_out, read, train, written

FILE = Path(__file__).parent / "trials.jsonl"


def one(run: Run) -> Result:
    return train(run, task_of(run.task))


def table(task: str) -> None:
    """Final losses by optimizer and settings: mean over seeds, standard error, number of seeds."""
    cells: dict[tuple[str, float, float], list[float]] = defaultdict(list)
    for run, result in read(FILE).items():
        if run.task == task:
            own = sorted(json.loads(run.settings).items())
            name = " ".join([run.optimizer, *(f"{key}={value}" for key, value in own)])
            cells[name, run.lr, run.wd].append(result.final)
    rows = []
    for (name, lr, wd), values in cells.items():
        error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 and max(values) < math.inf else 0.0
        rows.append((statistics.fmean(values), error, len(values), lr, wd, name))
    for mean, error, count, lr, wd, name in sorted(rows):
        print(f"{mean:.4f} ± {error:.4f} ({count})  lr {lr:g} wd {wd:g}  {name}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", nargs="?")
    parser.add_argument("optimizer", nargs="?", choices=BUILDERS)
    parser.add_argument("--lr", type=float, nargs="+", default=[1e-2])
    parser.add_argument("--wd", type=float, nargs="+", default=[0.1])
    parser.add_argument("--seed", type=int, nargs="+", default=[0])
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--table", metavar="TASK")
    given = parser.parse_args()
    if given.table:
        return table(given.table)
    if given.optimizer is None:
        parser.error("name a task and an optimizer")
    settings = written({name: _value(value) for name, _, value in (each.partition("=") for each in given.set)})
    steps = task_of(given.task).steps  # refuses one that there is not
    runs = [
        Run(given.task, given.optimizer, lr, wd, seed, settings)
        for seed, lr, wd in itertools.product(given.seed, given.lr, given.wd)
    ]
    print(f"{steps} steps; {sum(run in read(FILE) for run in runs)} of {len(runs)} trainings are there", flush=True)
    carry_out(lambda _: runs, FILE, one, given.workers)
    return None


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


if __name__ == "__main__":
    main()
