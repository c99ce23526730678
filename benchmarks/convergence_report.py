"""What follows from the trainings of convergence.py: numbers, tables, figures."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import common
from optimizers import ADAFISHERS, ADAMWS
from rich.table import Table
from tasks import Task
from trainings import Curve

WITHIN = 0.02  # of the best final loss, in the width of the learning rates
COLORS = {
    "AdaFisher": "tab:blue",
    "AdamW": "black",
    "AdamW, β₂ = 0.95": "tab:gray",
    "SGD": "tab:olive",
    "Muon": "tab:green",
    "SOAP": "tab:orange",
}
OTHER_COLORS = ("tab:cyan", "tab:purple", "tab:red", "tab:pink", "tab:brown")
HEADINGS = (
    "optimizer", "best lr", "final loss", "min to max", "steps to AdamW's loss", "time to it", "width",
    "worst / AdamW",
)  # fmt: skip
LEGEND = (
    "Final loss: validation loss at the end of a training at the best lr, mean over the seeds. Steps to AdamW's loss:"
    " until the mean curve is at the final loss of the better AdamW, in its steps; time to it: in the time of its whole"
    f" training. Width: largest over smallest of the neighbouring lrs within {100 * WITHIN:.0f} % of the optimizer's"
    " own best. Worst / AdamW: largest ratio of the final loss to the better AdamW's at the same lr of the base grid."
)

Curves = Mapping[float, Sequence[Curve]]  # by learning rate, a curve for each seed
Report = dict[str, Any]


# ---- numbers ----


def task_report(
    task: Task, steps: int, curves: Mapping[str, Curves], base_lrs: Sequence[float], ratios: Mapping[str, Any]
) -> Report:
    """Everything about a task.

    Args:
        task: for its words.
        steps: of each training.
        curves: by optimizer.
        base_lrs: the learning rates that all are run at.
        ratios: of a training step to AdamW's, by optimizer; what has not been timed is left out.
    """
    rows = {name: own_report(by_lr, base_lrs) for name, by_lr in curves.items()}
    adamws = [name for name in ADAMWS if name in rows]
    better = min(adamws, key=lambda name: rows[name]["final"]["mean"], default=None)
    for name, row in rows.items():
        target = rows[better]["final"]["mean"] if better else -math.inf
        part = part_to(row["curve"], target, steps)
        row["steps_to_adamw"] = part
        row["time_to_adamw"] = part * ratios[name]["median"] if part is not None and name in ratios else None
        row["worst_to_adamw"] = worst_ratio(row, [rows[base] for base in adamws], base_lrs)
    return {"title": task.title, "unit": task.unit, "steps": steps, "better_adamw": better, "optimizers": rows}


def own_report(by_lr: Curves, base_lrs: Sequence[float]) -> Report:
    """What can be said of an optimizer without the others."""
    finals = []
    for lr, curves in sorted(by_lr.items()):
        losses = [curve.final for curve in curves]
        mean = statistics.fmean(losses)
        finals.append({"lr": lr, "mean": mean, "min": min(losses), "max": max(losses), "seeds": len(losses)})
    best = min(finals, key=lambda entry: entry["mean"])
    return {
        "best_lr": best["lr"],
        "final": {key: best[key] for key in ("mean", "min", "max")},
        "width": width({entry["lr"]: entry["mean"] for entry in finals}),
        "lrs_beyond_the_base_grid": [lr for lr in sorted(by_lr) if lr not in base_lrs],
        "by_lr": finals,
        "curve": mean_curve(by_lr[best["lr"]]),
    }


def mean_curve(curves: Sequence[Curve]) -> dict[str, list[float]]:
    """The mean over seeds as far as all of them went."""
    points = list(zip(*(curve.losses for curve in curves), strict=False))
    return {"at": curves[0].at[: len(points)], "loss": [statistics.fmean(point) for point in points]}


def part_to(curve: Mapping[str, Sequence[float]], target: float, steps: int) -> float | None:
    """Part of the steps after which the curve first reaches `target`, by linear interpolation."""
    if not math.isfinite(target):
        return None
    before: tuple[float, float] | None = None
    for at, loss in zip(curve["at"], curve["loss"], strict=True):
        if loss <= target:
            since, above = before or (at, loss)
            passed = (above - target) / (above - loss) if above > loss else 1.0
            return (since + passed * (at - since)) / steps
        before = (at, loss)
    return None


def width(means: Mapping[float, float]) -> float:
    """Largest over smallest learning rate around the best with about its loss; 1 if it is alone."""
    lrs = sorted(means)
    low = high = best = min(range(len(lrs)), key=lambda i: means[lrs[i]])
    bound = (1 + WITHIN) * means[lrs[best]]
    while low > 0 and means[lrs[low - 1]] <= bound < math.inf:
        low -= 1
    while high < len(lrs) - 1 and means[lrs[high + 1]] <= bound < math.inf:
        high += 1
    return lrs[high] / lrs[low]


def worst_ratio(row: Report, adamws: Sequence[Report], base_lrs: Sequence[float]) -> Report | None:
    """Largest ratio to the better AdamW's final loss at the same learning rate, and that rate."""
    own, *others = ({entry["lr"]: entry["mean"] for entry in report["by_lr"]} for report in (row, *adamws))
    found = []
    for lr in base_lrs:
        there = [other[lr] for other in others if lr in other]
        if lr in own and there:
            both_diverged = own[lr] == min(there) == math.inf
            found.append({"ratio": 1.0 if both_diverged else own[lr] / min(there), "lr": lr})
    return max(found, key=lambda entry: entry["ratio"], default=None)


def plain(value: Any) -> Any:
    """As JSON has it: a loss that is infinite, since a training diverged, is the string "inf"."""
    if isinstance(value, Mapping):
        return {key: plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    return "inf" if value == math.inf else value


# ---- tables ----


def cells(report: Report) -> list[list[str]]:
    """The rows under HEADINGS, the best optimizer first."""
    rows = sorted(report["optimizers"].items(), key=lambda item: item[1]["final"]["mean"])
    return [
        [
            name,
            f"{row['best_lr']:g}",
            number(row["final"]["mean"]),
            f"{number(row['final']['min'])} to {number(row['final']['max'])}",
            share(row["steps_to_adamw"]),
            share(row["time_to_adamw"]),
            f"{row['width']:.3g} ×",
            share(row["worst_to_adamw"] and row["worst_to_adamw"]["ratio"]),
        ]
        for name, row in rows
    ]


def number(loss: float) -> str:
    return f"{loss:#.4g}" if math.isfinite(loss) else "diverged"


def share(value: float | None) -> str:
    return "–" if value is None else "∞" if value == math.inf else f"{value:.2f}"


def remarks(report: Report) -> list[str]:
    """What stands under a task's table."""
    lines = []
    for name in ADAFISHERS:
        worst = report["optimizers"].get(name, {}).get("worst_to_adamw")
        if worst:
            lines.append(
                f"Worst ratio to AdamW at the same lr, {name}: {share(worst['ratio'])} (at {worst['lr']:g}; 1 or less"
                " means that it is nowhere worse)."
            )
    beyond = {name: row["lrs_beyond_the_base_grid"] for name, row in report["optimizers"].items()}
    extended = [f"{name} ({', '.join(f'{lr:g}' for lr in lrs)})" for name, lrs in beyond.items() if lrs]
    if extended:
        lines.append(f"Best at the edge of the base grid, and so also run beyond it: {', '.join(extended)}.")
    lines += [f"{name} is left out: {reason}." for name, reason in report["left_out"].items()]
    if report["runs_missing"]:
        lines.append(f"INCOMPLETE: {report['runs_missing']} trainings are still to be done.")
    return lines


def heading(report: Report) -> str:
    return f"{report['title']}, {report['steps']} steps, loss in {report['unit']}"


def show(report: Report) -> None:
    table = Table(title=heading(report), caption="\n".join(remarks(report)), caption_justify="left")
    for name in HEADINGS:
        table.add_column(name, justify="left" if name == "optimizer" else "right")
    for row in cells(report):
        table.add_row(*row)
    common.show(table)


def markdown(reports: Mapping[str, Report], command: str) -> str:
    """The tables for a document on GitHub."""
    lines = [f"<!-- Written by `{command}`; do not edit. -->", "", LEGEND]
    for report in reports.values():
        lines += ["", f"### {heading(report)}", "", f"| {' | '.join(HEADINGS)} |"]
        lines.append("| --- |" + " ---: |" * (len(HEADINGS) - 1))
        lines += [f"| {' | '.join(row)} |" for row in cells(report)]
        for remark in remarks(report):
            lines += ["", remark]
    return "\n".join(lines) + "\n"


# ---- figures ----


def draw(reports: Mapping[str, Report], ratios: Mapping[str, Any]) -> Any:
    """A row of panels for each task: loss by step and by time at the best lr, final loss by lr."""
    from matplotlib import pyplot

    count = max(1, len(reports))
    figure, rows = pyplot.subplots(count, 3, figsize=(15, 4.4 * count), layout="constrained", squeeze=False)
    for (name, report), (by_step, by_time, by_lr) in zip(reports.items(), rows, strict=False):
        draw_curves(by_step, by_time, report, ratios.get(name, {}))
        draw_finals(by_lr, report)
        by_step.set(xlabel="step", ylabel=f"validation loss at the best lr ({report['unit']})", title=report["title"])
        by_time.set(xlabel="time, in steps of AdamW", title="the same by time")
        by_lr.set(xlabel="learning rate", title="final loss, and from the best to the worst seed")
    for axis in rows.flat:
        axis.grid(alpha=0.25, which="both")
    return figure


def draw_curves(by_step: Any, by_time: Any, report: Report, ratios: Mapping[str, Any]) -> None:
    early, lowest = [], []
    for (name, row), color in zip(report["optimizers"].items(), colors(report), strict=True):
        at, losses = row["curve"]["at"], row["curve"]["loss"]
        by_step.plot(at, losses, color=color, label=f"{name}, lr {row['best_lr']:g}")
        if name in ratios:
            by_time.plot([step * ratios[name]["median"] for step in at], losses, color=color)
        early += [loss for step, loss in zip(at, losses, strict=True) if step >= 0.1 * report["steps"]][:1]
        lowest.append(min(losses, default=math.inf))
    for axis in (by_step, by_time):
        # The first steps would take most of the height, and so would who is still there later.
        limit(axis, min(lowest), statistics.median(early) if early else math.inf)
    by_step.legend(fontsize=8)
    if by_time.lines:
        # AdamW's whole training, and on until the last of the others is where it ends; then there
        # are only the dear.
        reached = [row["time_to_adamw"] or 0 for row in report["optimizers"].values()]
        by_time.set_xlim(0, max(1.5, *(1.1 * part for part in reached)) * report["steps"])
    else:
        by_time.text(0.5, 0.5, "not timed", ha="center", transform=by_time.transAxes)


def draw_finals(axis: Any, report: Report) -> None:
    """Final losses; a cross at the top stands for an lr at which a training diverged."""
    finite: list[float] = []
    for row, color in zip(report["optimizers"].values(), colors(report), strict=True):
        entries = [entry for entry in row["by_lr"] if math.isfinite(entry["mean"])]
        lrs = [entry["lr"] for entry in entries]
        axis.plot(lrs, [entry["mean"] for entry in entries], "o-", markersize=3, color=color)
        axis.fill_between(lrs, *([entry[end] for entry in entries] for end in ("min", "max")), color=color, alpha=0.15)
        lost = [entry["lr"] for entry in row["by_lr"] if not math.isfinite(entry["mean"])]
        axis.plot(lost, [0.97] * len(lost), "x", color=color, transform=axis.get_xaxis_transform())
        finite += [entry["mean"] for entry in entries]
    axis.set_xscale("log")
    plain_numbers(axis.xaxis, (1, 3))
    # The worst fifth leaves the picture.
    limit(axis, min(finite, default=math.inf), sorted(finite)[int(0.8 * len(finite))] if finite else math.inf)


def colors(report: Report) -> list[str]:
    """In the order of the report's optimizers."""
    free = itertools.cycle(OTHER_COLORS)
    return [COLORS.get(name) or next(free) for name in report["optimizers"]]


def limit(axis: Any, low: float, high: float) -> None:
    """A logarithmic axis with plain numbers, a little more than from low to high."""
    axis.set_yscale("log")
    if 0 < low < high < math.inf:
        reach = (high / low) ** 0.05
        axis.set_ylim(low / reach, high * reach)
    plain_numbers(axis.yaxis, (1, 1.5, 2, 3, 5, 7))


def plain_numbers(axis: Any, digits: Sequence[float]) -> None:
    """Ticks of a logarithmic axis at these digits of each decade, and no others."""
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    axis.set_major_locator(LogLocator(subs=digits))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_locator(NullLocator())
