"""How fast AdaFisher trains beside AdamW, SGD, Muon and SOAP, on the small models of tasks.py.

    python benchmarks/convergence.py            # hours; goes on where it was stopped
    python benchmarks/convergence.py --report   # tables and figures alone, from finished trainings

Each optimizer is run over the same grid of learning rates, from the same weights, on the same
batches and schedule, and further where its best is at the edge of the grid. Finished trainings go
into docs/convergence.jsonl, what follows from them into docs/convergence.json,
convergence_tables.md, convergence.png and convergence_TASK.png.
"""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import common
import typer
from common import ROOT, Quick
from convergence_report import Curves, Report, draw, markdown, plain, show, task_report
from optimizers import BASE, Contender, contenders
from rich.progress import track
from tasks import Task, tasks
from trainings import Curve, Run, forget, read, written
from turns import step_to_adamw
from typer import Option
from workers import carry_out

Done = Mapping[Run, Curve]
Pair = tuple[str, str]  # a task and an optimizer


@dataclass(frozen=True, slots=True)
class Plan:
    """What is run.

    Attributes:
        tasks: names of the tasks, unless --task chooses.
        lrs: the base grid of learning rates, the smallest first, of tasks that have none of their
            own.
        seeds: of initial weights and batches, likewise.
        steps: of a training; None: the task's own.
        extensions: how often the grid may grow by a factor of two.
        folder: where everything is written.
    """

    tasks: tuple[str, ...]
    lrs: tuple[float, ...]
    seeds: tuple[int, ...]
    steps: int | None
    extensions: int
    folder: Path

    @property
    def file(self) -> Path:
        return self.folder / "convergence.jsonl"

    def base_lrs(self, task: str) -> tuple[float, ...]:
        return TASKS[task].lrs or self.lrs

    def seeds_of(self, task: str) -> tuple[int, ...]:
        return TASKS[task].seeds or self.seeds

    def run(self, pair: Pair, lr: float, seed: int) -> Run:
        task, optimizer = pair
        settings = written(CONTENDERS[optimizer].settings)
        return Run(task, optimizer, settings, lr, seed, self.steps or TASKS[task].steps)

    def has(self, run: Run, pairs: Collection[Pair]) -> bool:
        """Whether it is one of these pairs' trainings, with today's settings."""
        pair = run.task, run.optimizer
        return pair in pairs and run.seed in self.seeds_of(run.task) and run == self.run(pair, run.lr, run.seed)


TASKS: dict[str, Task] = tasks()
CONTENDERS: dict[str, Contender] = contenders()
LRS = (3e-4, 6e-4, 1.25e-3, 2.5e-3, 5e-3, 1e-2, 2e-2, 4e-2)
FULL = Plan(tuple(TASKS), LRS, (0, 1, 2), None, 6, ROOT / "docs")
QUICK = Plan(("autoencoder", "cnn"), (2.5e-3, 1e-2, 4e-2), (0,), 60, 0, ROOT / "runs" / "bench")


# ---- which trainings ----


def grid(base: Sequence[float], loss: Callable[[float], float | None], extensions: int) -> list[float]:
    """The base grid, and twice or half its edge while the best is there.

    Args:
        base: the smallest first.
        loss: of a learning rate; None while it is not known, and then the grid does not grow.
        extensions: how often it may grow.
    """
    lrs = list(base)
    for _ in range(extensions):
        losses = [loss(lr) for lr in lrs]
        known = [found for found in losses if found is not None]
        if len(known) < len(lrs):
            break
        best = known.index(min(known))  # the smallest rate, where all diverged
        if best == 0:
            lrs.insert(0, lrs[0] / 2)
        elif best == len(lrs) - 1:
            lrs.append(lrs[-1] * 2)
        else:
            break
    return lrs


def wanted(plan: Plan, pairs: Sequence[Pair], done: Done) -> list[Run]:
    """The trainings that are missing: those of the first seed come first, task by task."""
    missing: list[Run] = []
    for pair in pairs:

        def loss(lr: float, pair: Pair = pair) -> float | None:
            curves = [done.get(plan.run(pair, lr, seed)) for seed in plan.seeds_of(pair[0])]
            finals = [curve.final for curve in curves if curve is not None]
            return statistics.fmean(finals) if len(finals) == len(curves) else None

        lrs = grid(plan.base_lrs(pair[0]), loss, plan.extensions)
        runs = [plan.run(pair, lr, seed) for lr in lrs for seed in plan.seeds_of(pair[0])]
        missing += [run for run in runs if run not in done]
    return sorted(missing, key=lambda run: (run.seed, list(TASKS).index(run.task)))


def finished(plan: Plan, task: str, done: Done) -> dict[str, Curves]:
    """A task's trainings of this plan, by optimizer and learning rate."""
    by_name: dict[str, dict[float, list[Curve]]] = {}
    for name in CONTENDERS:
        for run, curve in done.items():
            if plan.has(run, [(task, name)]):
                by_name.setdefault(name, {}).setdefault(run.lr, []).append(curve)
    return by_name


def pairs_of(task_names: Sequence[str], names: Sequence[str]) -> list[Pair]:
    """Each task with the optimizers that are for it and can be built here."""
    return [
        (task, name)
        for task in task_names
        for name in names
        if CONTENDERS[name].missing is None and CONTENDERS[name].unfit(TASKS[task]) is None
    ]


# ---- times ----


def stored_ratios(plan: Plan, again: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Ratios of the last result, by task and optimizer.

    Only of optimizers whose settings have not changed since, and that are not trained `again`.
    """
    path = plan.folder / "convergence.json"
    last = json.loads(path.read_text()) if path.exists() else {}
    settings = last.get("settings", {})
    return {
        task: {
            name: ratio
            for name, ratio in by_name.items()
            if name in CONTENDERS and name not in again and settings.get(name) == CONTENDERS[name].settings
        }
        for task, by_name in last.get("training_step_to_adamw", {}).items()
    }


def add_ratios(ratios: dict[str, dict[str, Any]], pairs: Sequence[Pair], everything: bool) -> None:
    """Time the tasks of which an optimizer has not been timed, or all."""
    by_task: dict[str, list[str]] = {}
    for task, name in pairs:
        by_task.setdefault(task, [BASE]).append(name)
    due = [
        task for task, names in by_task.items() if everything or any(name not in ratios.get(task, {}) for name in names)
    ]
    for task in track(due, "Times", disable=not due):
        chosen = {name: CONTENDERS[name] for name in by_task[task]}
        ratios[task] = ratios.get(task, {}) | common.rounded(step_to_adamw(TASKS[task], chosen))


# ---- the command ----


def write(plan: Plan, done: Done, ratios: Mapping[str, Any], quick: bool, shown: Sequence[str]) -> None:
    """All files, of all that is there; the tables of some tasks on the console."""
    reports: dict[str, Report] = {}
    for task in TASKS:
        if curves := finished(plan, task, done):
            steps = plan.steps or TASKS[task].steps
            reports[task] = task_report(TASKS[task], steps, curves, plan.base_lrs(task), ratios.get(task, {}))
            reasons = {name: contender.unfit(TASKS[task]) for name, contender in CONTENDERS.items()}
            reports[task]["left_out"] = {name: reason for name, reason in reasons.items() if reason is not None}
            reports[task]["runs_missing"] = len(wanted(plan, pairs_of([task], list(CONTENDERS)), done))
    for task in shown:
        if task in reports:
            show(reports[task])
    result = {
        "note": 'Losses are validation losses; "inf": a training diverged; null: never, or not measured.',
        "learning_rates": plan.lrs,
        "seeds": plan.seeds,
        "settings": {name: contender.settings for name, contender in CONTENDERS.items()},
        "training_step_to_adamw": ratios,
        "tasks": plain(common.rounded(reports, 6)),
    }
    versions = {"pytorch_optimizer": version("pytorch_optimizer"), "scikit-learn": version("scikit-learn")}
    common.save("convergence", quick, result, draw(reports, ratios), **versions)
    for task, report in reports.items():
        draw({task: report}, ratios).savefig(plan.folder / f"convergence_{task}.png", dpi=120)
    command = "python benchmarks/convergence.py" + (" --quick" if quick else "")
    tables = plan.folder / "convergence_tables.md"
    tables.write_text(markdown(reports, command), encoding="utf-8")
    print(f"Written: {tables.relative_to(ROOT)} and convergence_TASK.png")


def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def check(option: str, given: Sequence[str], valid: Sequence[str]) -> None:
    for name in given:
        if name not in valid:
            raise typer.BadParameter(f"{name!r} is none of: {'; '.join(valid)}.", param_hint=option)


def main(
    quick: Quick = False,
    task: Annotated[list[str] | None, Option(metavar="NAME", help="Only this task; may be repeated.")] = None,
    optimizer: Annotated[list[str] | None, Option(metavar="NAME", help="Only this optimizer; may be repeated.")] = None,
    again: Annotated[
        list[str] | None, Option(metavar="NAME", help="Forget this optimizer's trainings and do them again.")
    ] = None,
    report: Annotated[bool, Option("--report", help="Train nothing: only the report of what is there.")] = False,
    time: Annotated[bool, Option("--time", help="Train nothing: measure all times anew, and report.")] = False,
    workers: Annotated[
        int | None, Option(min=1, help="Processes, of one thread each.  [default: the number of cores]")
    ] = None,
) -> None:
    """Train with all optimizers, or go on with it, and report."""
    plan = QUICK if quick else FULL
    check("--task", task or [], list(TASKS))
    check("--optimizer", optimizer or [], list(CONTENDERS))
    names, chosen = optimizer or list(CONTENDERS), task or list(plan.tasks)
    check("--again", again or [], names)
    if again and (report or time):
        raise typer.BadParameter("--report and --time train nothing; leave them out.", param_hint="--again")
    for name in names:
        if CONTENDERS[name].missing:
            print(f"{name} is left out: {CONTENDERS[name].missing}.")
    pairs = pairs_of(chosen, names)
    if again:
        count = forget(plan.file, lambda run: run.optimizer in again and run.task in chosen)
        print(f"{count} trainings are forgotten.")
    done = {run: curve for run, curve in read(plan.file).items() if plan.has(run, pairs)}
    ratios = stored_ratios(plan, again or [])
    try:
        if not report and not time:
            carry_out(lambda done: wanted(plan, pairs, done), done, plan.file, workers or cores())
        if not report:
            add_ratios(ratios, pairs, everything=time)
    except KeyboardInterrupt:
        print(f"Stopped. {len(done)} finished trainings are kept; the same command goes on from there.")
        raise typer.Exit(130) from None
    write(plan, read(plan.file), ratios, quick, chosen)


def cores() -> int:
    return len(os.sched_getaffinity(0))


if __name__ == "__main__":
    common.start(main)
