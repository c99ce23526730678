"""How fast AdaFisher trains beside AdamW, Muon, NorMuon, SOAP, KL-SOAP, Kron and AdEMAMix.

    python benchmarks/convergence.py               # days; goes on where it was stopped
    python benchmarks/convergence.py --plan        # what is done, and what is still to do
    python benchmarks/convergence.py --report      # only the tables and figures of what is there
    python benchmarks/convergence.py --repeat laws64x20 AdaFisher 1

Each is tuned alike on the smallest model at 20 bytes a parameter, with a seed that is not reported:
learning rate, weight decay, the rate again where the decay is another, then two settings of its
own. What is best there is trained with fresh seeds on all tasks, most of which try other rates too.
Finished trainings go into docs/convergence.jsonl, what follows from them into
docs/convergence.json, two pictures, and the tables of convergence.md. How long steps take is
measured apart: convergence_times.py.
"""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Annotated, Any

import common
import convergence_report
import typer
from common import ROOT, Quick
from convergence_report import NEAR
from convergence_tasks import task_of
from trainings import Done, Result, Run, carry_out, read, train, written
from typer import Argument, Option

FILE = ROOT / "docs" / "convergence.jsonl"
TUNED_ON, TUNING_SEED = "laws64x20", 100
LRS = (2.5e-3, 5e-3, 1e-2, 2e-2)  # by twos, and further while the best is at the edge
WDS = (0.1, 0.01, 0.5)  # and further: ten times less, or twice as much
MOST_LRS, MOST_WDS = 7, 7

# By name: the builder, its fixed settings, and two more to try.
Trials = tuple[dict[str, Any], dict[str, Any]]
CONTENDERS: dict[str, tuple[str, dict[str, Any], Trials]] = {
    "AdamW": ("adamw", {}, ({"beta2": 0.99}, {"beta1": 0.95})),
    "AdaFisher": ("adafisher", {}, ({"fisher_decay": 0.99}, {"momentum": 0.95})),
    "AdaFisher without F": (
        "prototype", {"a": 0, "length": 1, "nesterov": 1, "own_tables": 1}, ({"momentum": 0.95}, {"rest": 0.5})
    ),
    "Muon": ("muon", {}, ({"rest": 0.5}, {"rest": 2.0})),
    "NorMuon": ("normuon", {}, ({"rest": 0.5}, {"rest": 2.0})),
    "SOAP": ("soap", {}, ({"beta2": 0.9}, {"beta2": 0.99})),
    "SOAP, every 10": ("soap", {"every": 10}, ({"beta2": 0.9}, {"beta2": 0.99})),
    "KL-SOAP": ("kl_soap", {}, ({"beta2": 0.9}, {"beta2": 0.99})),
    "Kron": ("kron", {}, ({"momentum": 0.95}, {"pre_conditioner_update_probability": 1.0})),
    # The weight of the slow average, and its β₃, grow over the whole training, as its authors do.
    "AdEMAMix": ("ademamix", {"beta3": 0.999, "t_alpha_beta3": 1320}, ({"alpha": 2.0}, {"beta2": 0.95})),
}  # fmt: skip
OURS, BASE = "AdaFisher", "AdamW"


@dataclass(frozen=True, slots=True)
class Cell:
    """A task, its seeds, and who is trained on it.

    Attributes:
        leaders: only AdaFisher, AdamW and the two best rivals of TUNED_ON.
        rates: parts of the best learning rate on the task `near`. Where there are several, the best
            is chosen with the tuning seed, among up to MOST_LRS where it is the largest or
            smallest.
        near: a task whose best rate is known, or three: the good rate of the first, changed with
            the number of steps as it changed from the third's to the second's (a power of it). So
            what was found is carried on, for everybody alike, where trials would take days. The
            good rate is the middle of those within NEAR of the best: which of them is the best one
            is largely chance.
        decays: whether the same rates are tried with the first of WDS too, where the best one of
            TUNED_ON is another.
        only: a name; None for all.
    """

    task: str
    seeds: int
    leaders: bool = True
    rates: tuple[float, ...] = (1.0,)
    near: tuple[str, ...] = (TUNED_ON,)
    decays: bool = False
    only: str | None = None


# Those that decide most come first. AdamW at more tokens is for its curve of loss by tokens.
CELLS = (
    Cell(TUNED_ON, 5, leaders=False),
    Cell("laws64x40", 3, rates=(1.0, 0.5), only=BASE),
    Cell("laws64x80", 3, rates=(1.0, 0.5)),
    Cell("laws64x160", 1, rates=(1.0, 0.5), only=BASE),
    Cell("tune64", 3, rates=(1.0, 0.3, 0.1), decays=True),
    Cell("lora64", 3, rates=(1.0, 0.3), decays=True),
    Cell("cnn", 3, rates=(1.0, 0.3), decays=True),
    Cell("vit", 3, rates=(1.0, 0.3), decays=True),
    Cell("laws64x20large", 3, rates=(1.0, 2.0)),
    Cell("laws96x20", 3, rates=(1.0, 0.5)),
    Cell("laws96x40", 1, near=("laws96x20", "laws64x40", TUNED_ON), only=BASE),
    Cell("laws96x80", 1, near=("laws96x20", "laws64x80", TUNED_ON)),
    Cell("laws96x160", 1, near=("laws96x20", "laws64x160", TUNED_ON), only=BASE),
    Cell("laws128x20", 2, near=("laws96x20", "laws96x20", TUNED_ON)),
    Cell("laws128x40", 1, near=("laws128x20", "laws64x40", TUNED_ON), only=BASE),
)
QUICK_TASKS = ("cnn", "vit")


# ---- what is trained ----


def tuning(name: str, done: Done) -> tuple[list[Run], Run | None]:
    """The trials of a name that are known to be wanted so far, and the best once all are done."""
    builder, fixed, trials = CONTENDERS[name]
    runs, best = of_rates([Run(TUNED_ON, builder, lr, WDS[0], TUNING_SEED, written(fixed)) for lr in LRS], done)
    if best is not None:
        more, best = of_decays([best, *(replace(best, wd=wd) for wd in WDS[1:])], done)
        runs += more[1:]
    if best is not None and best.wd != WDS[0]:  # where another rate may be best
        more, best = of_rates([replace(best, lr=best.lr * part) for part in (0.5, 1.0, 2.0)], done)
        runs += [run for run in more if run not in runs]
    if best is not None:
        runs += [replace(best, settings=written({**fixed, **own})) for own in trials]
        best = best_of(runs, done)
    return runs, best


def of_decays(runs: list[Run], done: Done) -> tuple[list[Run], Run | None]:
    """Trials that differ in their decay, more where the best is at an edge, and the best of all."""
    runs = list(runs)
    while (best := best_of(runs, done)) and len(runs) < MOST_WDS:
        decays = sorted(run.wd for run in runs)
        if best.wd not in (decays[0], decays[-1]):
            break
        runs.append(replace(best, wd=best.wd / 10 if best.wd == decays[0] else best.wd * 2))
    return runs, best


def of_rates(runs: list[Run], done: Done) -> tuple[list[Run], Run | None]:
    """Trials that differ in their rate, more where the best is at an edge, and the best of all."""
    factor, runs = max(runs[0].lr / runs[1].lr, runs[1].lr / runs[0].lr), list(runs)
    while (best := best_of(runs, done)) and len(runs) < MOST_LRS:
        rates = sorted(run.lr for run in runs)
        if best.lr not in (rates[0], rates[-1]):
            break
        runs.append(replace(best, lr=rates[0] / factor if best.lr == rates[0] else rates[-1] * factor))
    return runs, best


def tuned(done: Done) -> dict[str, tuple[list[Run], Run]]:
    """By name, where it is finished: its trials, and the best."""
    return {name: (runs, best) for name in CONTENDERS for runs, best in [tuning(name, done)] if best}


def best_of(runs: list[Run], done: Done) -> Run | None:
    """The one with the least final loss; None where one is still to be done."""
    return min(runs, key=lambda run: done[run].final) if all(run in done for run in runs) else None


def leaders(done: Done) -> list[str] | None:
    """AdaFisher, AdamW and the two best rivals by their fresh seeds; None until those are done."""
    means = {}
    for name in CONTENDERS:
        runs = final_runs(CELLS[0], name, done)[0]
        if not runs or any(run not in done for run in runs):
            return None
        means[name] = statistics.fmean(done[run].final for run in runs)
    rivals = [name for name in sorted(means, key=means.__getitem__) if name not in (BASE,) and OURS not in name]
    return [BASE, OURS, *rivals[:2]]


def final_runs(cell: Cell, name: str, done: Done) -> tuple[list[Run], list[Run]]:
    """A name's trainings of a cell with fresh seeds, and those that choose their settings.

    The former are none until the settings are known.
    """
    _, best = tuning(name, done)
    rate = rate_near(cell, name, done)
    if best is None or rate is None:
        return [], []
    first = [replace(best, task=cell.task, lr=rate * part) for part in cell.rates]
    tried, chosen = of_rates(first, done) if len(first) > 1 else ([], first[0])
    if chosen is not None and cell.decays and best.wd != WDS[0]:
        more, other = of_rates([replace(run, wd=WDS[0]) for run in tried], done)
        tried = [*tried, *more]
        chosen = best_of([chosen, other], done) if other else None
    return [replace(chosen, seed=seed) for seed in range(cell.seeds)] if chosen else [], tried


def rate_near(cell: Cell, name: str, done: Done) -> float | None:
    """The learning rate that `Cell.near` stands for, to three digits; None until it is known."""
    if len(cell.near) == 1:
        _, best = trials_on(cell.near[0], name, done)
        return best.lr if best else None
    rates = [rate for task in cell.near if (rate := good_rate(task, name, done)) is not None]
    if len(rates) < len(cell.near):
        return None
    first, longer, shorter = map(steps_of, cell.near)
    power = math.log(steps_of(cell.task) / first) / math.log(longer / shorter)
    return float(f"{rates[0] * (rates[1] / rates[2]) ** power:.3g}")


@cache
def steps_of(task: str) -> int:
    return task_of(task).steps


def good_rate(task: str, name: str, done: Done) -> float | None:
    """The geometric mean of the rates tried on a task that end within NEAR of the best one."""
    tried, best = trials_on(task, name, done)
    if best is None or not tried:
        return best.lr if best else None
    least = min(done[run].final for run in tried)
    return statistics.geometric_mean([run.lr for run in tried if done[run].final <= least + NEAR])


def trials_on(task: str, name: str, done: Done) -> tuple[list[Run], Run | None]:
    """The rates that a name has tried on a task, all else as on TUNED_ON; the best, once known."""
    runs, best = tuning(name, done)
    if task == TUNED_ON:
        return [run for run in runs if best and replace(run, lr=best.lr) == best], best
    runs, tried = final_runs(next(cell for cell in CELLS if cell.task == task), name, done)
    tried = [run for run in tried if best and run.wd == best.wd]
    return tried, best_of(tried, done) if tried else next(iter(runs), None)


def names_of(cell: Cell, done: Done) -> list[str]:
    if cell.only:
        return [cell.only]
    return (leaders(done) or []) if cell.leaders else list(CONTENDERS)


def wanted(done: Done) -> Iterator[Run]:
    """What is to be trained, as far as is known, in order."""
    for name in CONTENDERS:
        yield from tuning(name, done)[0]
    for cell in CELLS:
        for name in names_of(cell, done):
            runs, tried = final_runs(cell, name, done)
            yield from (*tried, *runs)


def quick(done: Done) -> Iterator[Run]:
    """Minutes: two names on the digits."""
    for task in QUICK_TASKS:
        for name in (BASE, OURS):
            yield Run(task, CONTENDERS[name][0], 3e-3)


def one(run: Run) -> Result:
    folder = ROOT / "runs" / "convergence" / "unfinished"
    return train(run, task_of(run.task), folder, reported=run.seed != TUNING_SEED)


# ---- the command ----


def main(
    cell: Annotated[
        list[str] | None, Argument(metavar="[TASK NAME SEED]", help="With --repeat: which training.")
    ] = None,
    quickly: Quick = False,
    plan: Annotated[bool, Option("--plan", help="Train nothing: what is done, and what is known to be left.")] = False,
    report: Annotated[bool, Option("--report", help="Train nothing: tables and figures of what is there.")] = False,
    repeat: Annotated[
        bool, Option("--repeat", help="Train one again, and print how far it is from the committed line.")
    ] = False,
    workers: Annotated[
        int | None, Option(min=1, help="Processes, of one thread each.  [default: the number of cores]")
    ] = None,
) -> None:
    """Train all there is to train, or go on with it, and report."""
    if repeat:
        return again(cell or [])
    file = ROOT / "runs" / "bench" / "convergence.jsonl" if quickly else FILE
    if plan:
        return print_plan(read(file))
    if not report:
        count = workers or len(os.sched_getaffinity(0))
        carry_out(quick if quickly else wanted, file, one, count)
        if quickly:
            return None
    done = read(FILE)
    return convergence_report.write(rows(done), tuned(done), done)


def again(cell: list[str]) -> None:
    """One training once more, beside its line in the file."""
    done = read(FILE)
    if len(cell) != 3 or cell[1] not in CONTENDERS or not cell[2].isdecimal():
        raise typer.BadParameter(f"give a task, a name ({'; '.join(CONTENDERS)}) and a seed", param_hint="--repeat")
    task, name, seed = cell[0], cell[1], int(cell[2])
    found = [
        run
        for each in CELLS
        if each.task == task
        for run in final_runs(each, name, done)[0]
        if run.seed == seed and run in done
    ]
    if not found:
        raise typer.BadParameter(f"{FILE.relative_to(ROOT)} has no such training", param_hint="--repeat")
    before, now = done[found[0]], one(found[0])
    print(f"{found[0]}: {now.final:.5f}; committed {before.final:.5f}, {now.final - before.final:+.5f} apart")


def print_plan(done: Done) -> None:
    known = list(dict.fromkeys(wanted(done)))
    for run in known:
        if run not in done:
            print(f"to do  {run}")
    hours = sum(result.seconds for result in done.values()) / 3600
    print(f"{sum(run in done for run in known)} of {len(known)} that are known to be wanted are done, {hours:.1f} h.")


def rows(done: Done) -> dict[str, dict[str, list[tuple[Run, Result]]]]:
    """The trainings with fresh seeds, by task and name, of cells that are done for all names."""
    found: dict[str, dict[str, list[tuple[Run, Result]]]] = {}
    for cell in CELLS:
        runs = {name: final_runs(cell, name, done)[0] for name in names_of(cell, done)}
        if runs and all(each and all(run in done for run in each) for each in runs.values()):
            found[cell.task] = {name: [(run, done[run]) for run in each] for name, each in runs.items()}
    return found


if __name__ == "__main__":
    common.start(main)
