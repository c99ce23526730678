"""What follows from the trainings of convergence.py: one table, two pictures, and the numbers."""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import common
from common import ROOT
from convergence_tasks import task_of
from trainings import Result, Run

BASE = "AdamW"
Rows = Mapping[str, Mapping[str, Sequence[tuple[Run, Result]]]]
COLORS = {
    "AdamW": "black", "AdaFisher": "tab:blue", "AdaFisher without F": "tab:cyan", "Muon": "tab:green",
    "NorMuon": "tab:olive", "SOAP": "tab:orange", "SOAP, every 10": "tab:brown", "KL-SOAP": "tab:red",
    "Kron": "tab:purple", "AdEMAMix": "tab:gray",
}  # fmt: skip
HEADINGS = ("optimizer", "lr, decay", "own settings", "final loss", "seeds", "AdamW's tokens", "time", "bytes")
LEGEND = """\
Final loss: held out, the mean over fresh seeds ± its standard error. AdamW's tokens: how many times
as many AdamW needs to that loss, by its losses at several budgets (linear in the logarithm of the
tokens between them; > where AdamW has not got there at its largest). Time: processor seconds of a
training over AdamW's. Bytes: of optimizer state, for each trained element."""


class Point(NamedTuple):
    """A mean of losses."""

    tokens: int
    loss: float
    error: float


def mean(results: Sequence[Result]) -> tuple[float, float]:
    """Of the final losses, with its standard error, which is NaN of one alone."""
    finals = [result.final for result in results]
    if len(finals) < 2 or math.inf in finals:
        return statistics.fmean(finals), math.nan
    return statistics.fmean(finals), statistics.stdev(finals) / len(finals) ** 0.5


def series_of(task: str) -> str:
    """What tasks that differ in their budget alone have in common."""
    return re.sub(r"x\d+$", "", task)


def curves_of(rows: Rows) -> dict[str, list[Point]]:
    """AdamW's loss by tokens, of each model."""
    curves: dict[str, list[Point]] = {}
    for task, by_name in rows.items():
        if BASE in by_name:
            point = Point(task_of(task).tokens, *mean([result for _, result in by_name[BASE]]))
            curves.setdefault(series_of(task), []).append(point)
    return {key: sorted(points) for key, points in curves.items()}


def speed_up(curve: Sequence[Point], own: Point) -> tuple[float, float] | None:
    """AdamW's tokens to this loss over the point's own, and the standard error.

    Infinite past the end of AdamW's curve; None where the curve has one point alone, or begins with
    a smaller loss.
    """
    if len(curve) < 2 or own.loss > curve[0].loss:
        return None
    for a, b in pairwise(curve):
        if b.loss <= own.loss <= a.loss and a.loss > b.loss:
            slope = math.log(b.tokens / a.tokens) / (a.loss - b.loss)
            found = a.tokens * math.exp(slope * (a.loss - own.loss)) / own.tokens
            part = (a.loss - own.loss) / (a.loss - b.loss)
            base = math.hypot((1 - part) * a.error, part * b.error)  # of AdamW's loss there
            return found, found * slope * math.hypot(own.error, base)
    return math.inf, math.nan


def numbers(rows: Rows) -> dict[str, list[dict[str, Any]]]:
    """By task a row an optimizer, the best first."""
    curves, found = curves_of(rows), {}
    for task, by_name in rows.items():
        curve, tokens, lines = curves.get(series_of(task), []), task_of(task).tokens, []
        base = by_name.get(BASE)
        for name, trained in by_name.items():
            run, results = trained[0][0], [result for _, result in trained]
            loss, error = mean(results)
            faster = speed_up(curve, Point(tokens, loss, error)) if "x" in task else None
            line = {"optimizer": name, "lr": run.lr, "wd": run.wd, "settings": json.loads(run.settings)}
            line |= {"loss": loss, "error": error, "seeds": len(results)}
            line |= {"speed_up": faster and faster[0], "speed_up_error": faster and faster[1]}
            line["largest"] = curve[-1].tokens / tokens if curve else None
            line["time"] = _seconds(trained) / _seconds(base) if base else None
            line["bytes"] = results[0].state_bytes
            line["losses"] = [statistics.fmean(each) for each in zip(*_full(results), strict=True)]
            line["seconds"] = _seconds(trained)
            lines.append(line)
        found[task] = sorted(lines, key=lambda line: line["loss"])
    return found


def _seconds(trained: Sequence[tuple[Run, Result]]) -> float:
    return statistics.median(result.seconds for _, result in trained)


def _full(results: Sequence[Result]) -> list[list[float]]:
    return [[loss for loss in result.losses if loss is not None] for result in results if result.final < math.inf]


def markdown(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    lines = ["<!-- Written by `python benchmarks/convergence.py`; do not edit. -->", "", LEGEND]
    for task, rows in found.items():
        steps, tokens = task_of(task).steps, task_of(task).tokens
        lines += ["", f"### {task}: {steps:,} steps, {tokens / 1e6:.1f} M bytes or images", ""]
        lines += [f"| {' | '.join(HEADINGS)} |", "| --- | --- | --- |" + " ---: |" * (len(HEADINGS) - 3)]
        lines += [f"| {' | '.join(_cells(row))} |" for row in rows]
    return "\n".join(lines) + "\n"


def _cells(row: Mapping[str, Any]) -> list[str]:
    own = ", ".join(f"{key} {value:g}" for key, value in row["settings"].items())
    faster = "–"
    if row["speed_up"] is not None:
        faster = (
            f"> {row['largest']:.2g}"
            if row["speed_up"] == math.inf
            else _with_error(row["speed_up"], 2, row["speed_up_error"])
        )
    time = f"{row['time']:.2f}" if row["time"] else "–"
    loss = "diverged" if row["loss"] == math.inf else _with_error(row["loss"], 4, row["error"])
    return [
        row["optimizer"], f"{row['lr']:g}, {row['wd']:g}", own or "–", loss, str(row["seeds"]), faster, time,
        f"{row['bytes']:.1f}",
    ]  # fmt: skip


def _with_error(value: float, digits: int, error: float) -> str:
    return f"{value:.{digits}f}" + ("" if math.isnan(error) else f" ± {error:.{digits}f}")


def write(rows: Rows) -> None:
    """docs/convergence.json, .png and _tables.md."""
    found = numbers(rows)
    tables = ROOT / "docs" / "convergence_tables.md"
    tables.write_text(markdown(found), encoding="utf-8")
    plain = json.loads(json.dumps(common.rounded(found, 6)).replace("Infinity", "null").replace("NaN", "null"))
    common.save("convergence", False, {"tasks": plain}, draw(found))
    print(f"Written: {tables.relative_to(ROOT)}")


def draw(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> Any:
    """Speed-up by task, and loss by time of the longest task of the smallest model."""
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
    tasks = [task for task, rows in found.items() if len(rows) > 1 and any(row["speed_up"] for row in rows)]
    names = dict.fromkeys(row["optimizer"] for task in tasks for row in found[task] if row["optimizer"] != BASE)
    for name in names:
        points = [(at, row) for at, task in enumerate(tasks) for row in found[task] if row["optimizer"] == name]
        points = [(at, row) for at, row in points if row["speed_up"] and row["speed_up"] < math.inf]
        errors = [0 if math.isnan(row["speed_up_error"]) else row["speed_up_error"] for _, row in points]
        left.errorbar(
            [at for at, _ in points], [row["speed_up"] for _, row in points], errors, fmt="o", capsize=3,
            color=COLORS[name], label=name,
        )  # fmt: skip
    left.axhline(1, color=COLORS[BASE], lw=1, label=BASE)
    left.set_xticks(range(len(tasks)), tasks)
    left.set(ylabel="AdamW's tokens to the same loss, over its own", title="Speed-up by size and budget")
    left.legend(fontsize=8)
    longest = max(
        (task for task in found if series_of(task) == "laws64"),
        key=lambda t: task_of(t).tokens * (len(found[t]) > 1),
        default=None,
    )
    for row in found[longest] if longest else ():
        at = [row["seconds"] * (index + 1) / len(row["losses"]) for index in range(len(row["losses"]))]
        right.plot(at, row["losses"], color=COLORS[row["optimizer"]], label=row["optimizer"])
    right.set(xlabel="processor seconds", ylabel="held-out loss, nats a byte", title=f"{longest} by time")
    right.grid(alpha=0.25)
    left.grid(alpha=0.25)
    return figure
