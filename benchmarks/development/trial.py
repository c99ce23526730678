"""Trainings of one optimizer with given settings on the development bench, kept in trials.jsonl.

    python benchmarks/development/trial.py gpt64x20 prototype --lr 1e-2 2e-2 --seed 0 1 2 \
        --set a=0.5 polar=slab
    python benchmarks/development/trial.py --table gpt64x20

What is in the file is not trained again. Two trainings run at a time, of one thread each.
"""

from __future__ import annotations

import argparse
import fcntl
import itertools
import json
import math
import statistics
import subprocess
import time
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import optimizers
import torch
from tasks import CLIP, Task, schedule, task_of

FILE = Path(__file__).parent / "trials.jsonl"
Run = dict[str, Any]


def train(run: Run) -> Run:
    """Train; returns the run with `losses` (held out, at each tenth) and CPU `seconds`."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    torch.manual_seed(run["seed"])
    task = task_of(run["task"])
    model = task.build(run["seed"])
    made = optimizers.build(run["optimizer"], model, run["lr"], run["wd"], run["settings"])
    rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in made]
    marks = {round(task.steps * i / 10) for i in range(1, 11)}
    losses: list[float | None] = []
    began = time.process_time()
    for step in range(task.steps):
        for optimizer, own in zip(made, rates, strict=True):
            optimizer.zero_grad()
            for group, rate in zip(optimizer.param_groups, own, strict=True):
                group["lr"] = rate * schedule(step, task.steps)
        loss = task.loss(model, run["seed"], step)
        if not math.isfinite(loss.item()):
            losses.append(None)
            break
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        for optimizer in made:
            optimizer.step()
        if step + 1 in marks:
            losses.append(validate(task, model))
    return {**run, "losses": losses, "commit": commit(), "seconds": round(time.process_time() - began, 1)}


@torch.no_grad()
def validate(task: Task, model: torch.nn.Module) -> float | None:
    model.eval()
    loss = task.validate(model)
    model.train()
    return round(loss, 5) if math.isfinite(loss) else None


def commit() -> str:
    """Of the code that trains, with a plus where it was changed since."""
    told = [
        subprocess.run(["git", *words], cwd=FILE.parent, capture_output=True, text=True, check=False).stdout.strip()
        for words in (("rev-parse", "--short", "HEAD"), ("status", "--porcelain", "--", ":/*.py"))
    ]
    return told[0] + ("+" if told[1] else "")


def key(run: Run) -> str:
    return json.dumps(
        {name: run[name] for name in ("task", "optimizer", "settings", "lr", "wd", "seed")}, sort_keys=True
    )


def read() -> dict[str, Run]:
    lines = FILE.read_text().splitlines() if FILE.exists() else []
    return {key(run): run for run in map(json.loads, lines)}


def append(run: Run) -> None:
    with FILE.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(json.dumps(run) + "\n")


def table(task: str) -> None:
    """Print final losses by optimizer and settings: mean over seeds, standard error, seed count."""
    cells: dict[str, dict[tuple[float, float], dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
    for run in read().values():
        if run["task"] == task:
            name = " ".join([run["optimizer"], *(f"{k}={v}" for k, v in sorted(run["settings"].items()))])
            final = run["losses"][-1] if run["losses"] and run["losses"][-1] is not None else math.inf
            cells[name][run["lr"], run["wd"]][run["seed"]] = final
    rows = []
    for name, cell in cells.items():
        for (lr, wd), by_seed in cell.items():
            values = list(by_seed.values())
            error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 and max(values) < math.inf else 0.0
            rows.append((statistics.fmean(values), error, len(values), lr, wd, name))
    for mean, error, count, lr, wd, name in sorted(rows):
        print(f"{mean:.4f} ± {error:.4f} ({count})  lr {lr:g} wd {wd:g}  {name}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", nargs="?")
    parser.add_argument("optimizer", nargs="?", choices=optimizers.BUILDERS)
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
    settings = {name: _value(value) for name, _, value in (each.partition("=") for each in given.set)}
    task = task_of(given.task)  # refuses one that there is not
    runs = [
        {"task": given.task, "optimizer": given.optimizer, "settings": settings, "lr": lr, "wd": wd, "seed": seed}
        for seed, lr, wd in itertools.product(given.seed, given.lr, given.wd)
    ]
    done = read()
    todo = [run for run in runs if key(run) not in done]
    print(f"{task.steps} steps; {len(runs) - len(todo)} of {len(runs)} trainings are there", flush=True)
    with ProcessPoolExecutor(given.workers, mp_context=get_context("spawn")) as pool:
        for future in as_completed([pool.submit(train, run) for run in todo]):
            append(run := future.result())
            print(
                f"{run['losses'][-1]}  lr {run['lr']:g} wd {run['wd']:g} seed {run['seed']}  {run['seconds']} s",
                flush=True,
            )
    return None


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


if __name__ == "__main__":
    main()
