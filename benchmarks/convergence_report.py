"""What follows from the trainings of convergence.py: tables, two pictures, and the numbers."""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import common
import figures
from common import ROOT
from convergence_tasks import hidden_numel, task_of
from matplotlib.figure import Figure
from scipy.interpolate import PchipInterpolator
from scipy.optimize import brentq
from scipy.stats import t as student
from trainings import Done, Result, Run

BASE, OURS = "AdamW", "AdaFisher"
SMALLEST = "laws64"
RIVALS_SHOWN = ("Muon", "NorMuon", "SOAP")  # by time, where there are more
NEAR = 0.02  # nats a byte
Rows = Mapping[str, Mapping[str, Sequence[tuple[Run, Result]]]]
Tuned = Mapping[str, tuple[Sequence[Run], Run]]
Found = Mapping[str, Sequence[Mapping[str, Any]]]  # by task a row an optimizer: see `numbers`
COLORS = {
    "AdamW": "black", "AdaFisher": "tab:blue", "AdaFisher without F": "tab:cyan", "Muon": "tab:green",
    "NorMuon": "tab:olive", "SOAP": "tab:orange", "SOAP, every 10": "tab:brown", "KL-SOAP": "tab:red",
    "Kron": "tab:purple", "AdEMAMix": "tab:gray",
}  # fmt: skip
HEADINGS = ("optimizer", "lr, decay", "final loss", "seeds", "AdamW's tokens", "time", "bytes")
LEGEND = """\
Final loss: held out, the mean over fresh seeds ± its standard error. AdamW's tokens: how many times
as many AdamW needs to that loss, by its losses at several budgets (a monotone cubic in the
logarithm of the tokens between them; > where AdamW has not got there at its largest). Time:
processor seconds of a step over AdamW's, all measured in turn in one run
(docs/convergence_times.json). Bytes: of optimizer state, AdaFisher's with its buffers, for each
trained element."""
PAIRED = """\
Final loss: the mean ± its standard error. AdaFisher less the others: below 0 where AdaFisher ends
lower; the difference with the same initial weights and batches, seed by seed: the mean ± half of
its 95 % interval (Student's t). Bold: the interval does not hold 0. One that does shows neither a
difference nor that there is none. AdamW's tokens: how many times as many it needs to that loss; >
where it has not got there with its longest training."""


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

    Infinite past the end of AdamW's curve; None where that has no more tokens than the point, where
    it has one point alone, or begins with a smaller loss.
    """
    if len(curve) < 2 or own.loss > curve[0].loss:
        return None
    # Fritsch and Carlson's: the curve is convex, so that straight lines between its points would
    # lie above it and flatter whoever is faster.
    spline = PchipInterpolator([math.log(point.tokens) for point in curve], [point.loss for point in curve])
    for a, b in pairwise(curve):
        if b.loss <= own.loss <= a.loss and a.loss > b.loss:
            low, high = math.log(a.tokens), math.log(b.tokens)
            place = _where(spline, own.loss, low, high)
            part = (place - low) / (high - low)
            base = math.hypot((1 - part) * a.error, part * b.error)  # of AdamW's loss there
            found = math.exp(place) / own.tokens
            return found, found / abs(float(spline(place, 1)) or math.inf) * math.hypot(own.error, base)
    return (math.inf, math.nan) if curve[-1].tokens > own.tokens else None


def _where(curve: PchipInterpolator, loss: float, low: float, high: float) -> float:
    """Where a falling curve has this loss, between two of its points."""
    if float(curve(low)) <= loss:
        return low
    return high if float(curve(high)) >= loss else float(brentq(lambda at: float(curve(at)) - loss, low, high))


def numbers(rows: Rows) -> dict[str, list[dict[str, Any]]]:
    """By task a row an optimizer, the best first."""
    curves, milliseconds, found = curves_of(rows), step_times(), {}
    for task, by_name in rows.items():
        curve, tokens, lines = curves.get(series_of(task), []), task_of(task).tokens, []
        for name, trained in by_name.items():
            run, results = trained[0][0], [result for _, result in trained]
            loss, error = mean(results)
            faster = speed_up(curve, Point(tokens, loss, error)) if "x" in task else None
            line = {"optimizer": name, "lr": run.lr, "wd": run.wd, "settings": json.loads(run.settings)}
            line |= {"loss": loss, "error": error, "seeds": len(results)}
            line |= {"speed_up": faster and faster[0], "speed_up_error": faster and faster[1]}
            line["largest"] = curve[-1].tokens / tokens if curve else None
            line["beyond"] = line["speed_up"] == math.inf  # JSON has null for it
            step = milliseconds.get(series_of(task), {})
            line["milliseconds"] = step.get(name)
            line["time"] = step[name] / step[BASE] if name in step else None
            line["bytes"] = results[0].state_bytes
            line["finals"] = [result.final for result in results]
            line["losses"] = [statistics.fmean(each) for each in zip(*_full(results), strict=True)]
            lines.append(line)
        found[task] = sorted(lines, key=lambda line: line["loss"])
    return found


def step_times() -> dict[str, dict[str, float]]:
    """Milliseconds of a step, by model and optimizer: see convergence_times.py."""
    return _times()["milliseconds"]


def _times() -> dict[str, Any]:
    return json.loads((ROOT / "docs" / "convergence_times.json").read_text())


def _full(results: Sequence[Result]) -> list[list[float]]:
    return [[loss for loss in result.losses if loss is not None] for result in results if result.final < math.inf]


def markdown(found: Found) -> str:
    """All there is: a table a task."""
    lines = [LEGEND]
    for task, rows in found.items():
        steps, tokens = task_of(task).steps, task_of(task).tokens
        lines += ["", f"### {task}: {steps:,} steps, {tokens / 1e6:.1f} M bytes or images", ""]
        lines += [f"| {' | '.join(HEADINGS)} |", "| --- | --- |" + " ---: |" * (len(HEADINGS) - 2)]
        lines += [f"| {' | '.join(_cells(row))} |" for row in rows]
    return "\n".join(lines) + "\n"


def _cells(row: Mapping[str, Any]) -> list[str]:
    time = f"{row['time']:.2f}" if row["time"] else "–"
    return [
        row["optimizer"], f"{row['lr']:g}, {row['wd']:g}", _loss(row), str(row["seeds"]), _faster(row),
        time, f"{row['bytes']:.1f}",
    ]  # fmt: skip


def _loss(row: Mapping[str, Any]) -> str:
    return "diverged" if row["loss"] == math.inf else _with_error(row["loss"], 4, row["error"])


def _faster(row: Mapping[str, Any]) -> str:
    if row["speed_up"] is None:
        return "–"
    if row["speed_up"] == math.inf:
        return f"> {row['largest']:.2g}"
    return _with_error(row["speed_up"], 2, row["speed_up_error"])


def _with_error(value: float, digits: int, error: float) -> str:
    return f"{value:.{digits}f}" + ("" if math.isnan(error) else f" ± {error:.{digits}f}")


def summary(found: Found) -> str:
    """Of those that are trained on all tasks: tables of losses, differences and speed-ups."""
    names = [name for name in COLORS if all(name in _by_name(rows) for rows in found.values() if len(rows) > 1)]
    rivals = [name for name in names if name not in (BASE, OURS)]
    losses, apart, tokens = [], [], []
    for task, rows in found.items():
        by_name = _by_name(rows)
        if len(by_name) == 1:
            continue
        own, best = by_name[OURS], min((by_name[name] for name in rivals), key=lambda row: row["loss"])
        losses.append([task, *(_loss(by_name[name]) for name in names)])
        apart.append([task, *(paired(own["finals"], by_name[name]["finals"]) for name in (BASE, *rivals))])
        if any(_place(by_name[name]) for name in (OURS, *rivals)):
            known = not (own["beyond"] or best["beyond"]) and own["speed_up"] and best["speed_up"]
            ratio = f"{own['speed_up'] / best['speed_up']:.2f}" if known else "–"
            tokens.append([task, *(_faster(by_name[name]) for name in names if name != BASE), ratio])
    heads = ["AdamW's tokens", *(name for name in names if name != BASE), f"{OURS} / best rival"]
    less = [f"{OURS} less", BASE, *rivals]
    tables = [_table(["final loss", *names], losses), _table(less, apart), _table(heads, tokens)]
    return "\n\n".join([*tables, PAIRED]) + "\n"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [" | ".join(cells) for cells in (heads, *rows)]
    lines.insert(1, " | ".join(["---", *["---:"] * (len(heads) - 1)]))
    return "\n".join(f"| {line} |" for line in lines)


def paired(own: Sequence[float], other: Sequence[float]) -> str:
    """The mean difference of trainings with the same seeds, and half its 95 % interval by t.

    Bold where the interval does not hold 0.
    """
    apart = [a - b for a, b in zip(own, other, strict=True)]
    if len(apart) < 2 or not all(map(math.isfinite, apart)):
        return "–"
    middle, error = statistics.fmean(apart), statistics.stdev(apart) / len(apart) ** 0.5
    half = student.ppf(0.975, len(apart) - 1) * error
    told = f"{middle:+.4f} ± {half:.4f}"
    return f"**{told}**" if round(abs(middle), 4) > round(half, 4) else told


def rates(tuned: Tuned, done: Done) -> str:
    """A line an optimizer: what was tried at the smallest size, and how wide the good rates are."""
    lines = ["| optimizer | rates tried | best | its loss | within 0.02 of it |", "| --- | --- | --- | ---: | --- |"]
    for name, (runs, best) in tuned.items():
        by_rate = {run.lr: done[run].final for run in runs[::-1] if (run.wd, run.settings) == _first(runs)}
        least = min(by_rate.values())
        good = sorted(lr for lr, loss in by_rate.items() if loss <= least + NEAR)
        own = "".join(f", {key} {value:g}" for key, value in json.loads(best.settings).items())
        lines.append(
            f"| {name} | {min(by_rate):g} to {max(by_rate):g} | {best.lr:g}, decay {best.wd:g}{own} "
            f"| {done[best].final:.4f} | {', '.join(f'{lr:g}' for lr in good)} |"
        )
    return "\n".join(lines) + "\n"


def best_rates(found: Found) -> str:
    """A line a task that several are trained on: their learning rates, and AdamW's weight decay."""
    shown = {task: _by_name(rows) for task, rows in found.items() if len(rows) > 1}
    names = [name for name in COLORS if all(name in by_name for by_name in shown.values())]
    cells = [
        [task, *(f"{by_name[name]['lr']:.3g}" for name in names), f"{by_name[BASE]['wd']:g}"]
        for task, by_name in shown.items()
    ]
    return _table(["best rate", *names, f"{BASE}'s decay"], cells) + "\n"


def _first(runs: Sequence[Run]) -> tuple[float, str]:
    return runs[0].wd, runs[0].settings


def _by_name(rows: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    return {row["optimizer"]: row for row in rows}


def blocks(rows: Rows, tuned: Tuned, done: Done) -> dict[str, str]:
    """What docs/convergence.md has between its comments."""
    found = numbers(rows)
    return {
        "summary": summary(found), "rates": f"{rates(tuned, done)}\n{best_rates(found)}", "tasks": markdown(found)
    }  # fmt: skip


def write(rows: Rows, tuned: Tuned, done: Done) -> None:
    """docs/convergence.json and its two pictures, and the tables in docs/convergence.md."""
    found, docs = numbers(rows), ROOT / "docs"
    page = docs / "convergence.md"
    text = page.read_text(encoding="utf-8")
    for name, block in blocks(rows, tuned, done).items():
        text = with_block(text, name, block)
    page.write_text(text, encoding="utf-8")
    plain = json.loads(json.dumps(common.rounded(found, 6)).replace("Infinity", "null").replace("NaN", "null"))
    common.save("convergence", False, {"tasks": plain}, draw)
    if any(series_of(task) == SMALLEST for task in found):
        figures.write(draw_seconds({"tasks": plain}), docs / "convergence_seconds.svg")
        print("Written: docs/convergence_seconds.svg")
    print(f"Written: tables in {page.relative_to(ROOT)}")


def with_block(text: str, name: str, block: str) -> str:
    """A page with what stands between the two comments of a name replaced."""
    start, end = rf"<!-- {name}: by [\w/]+\.py -->\n", rf"<!-- end of {name} -->\n"
    page, count = re.subn(f"({start}).*?({end})", lambda at: f"{at[1]}\n{block}\n{at[2]}", text, flags=re.DOTALL)
    if count != 1:
        raise ValueError(f"the page has {count} pairs of comments of {name}, not one")
    return page


def draw(content: Mapping[str, Any]) -> Figure:
    """The speed-up by size and budget."""
    found = content["tasks"]
    tasks = [task for task, rows in found.items() if any(_place(row) for row in rows if row["optimizer"] != BASE)]
    drawn = {row["optimizer"] for task in tasks for row in found[task] if _place(row)}
    names = [name for name in COLORS if name in drawn and name != BASE]
    figure, (axes,) = figures.panels([3.2 + 0.2 * len(names)])
    for place, name in enumerate(names):
        shift = 0.5 * (place / max(1, len(names) - 1) - 0.5)
        rows = [(at + shift, _by_name(found[task]).get(name)) for at, task in enumerate(tasks)]
        rows = [(at, row) for at, row in rows if row and _place(row)]
        known = [(at, row) for at, row in rows if not row["beyond"]]
        axes.errorbar(
            [at for at, _ in known], [row["speed_up"] for _, row in known],
            [row["speed_up_error"] or 0 for _, row in known], fmt="o", markersize=4, capsize=3, color=COLORS[name],
            label=name,
        )  # fmt: skip
        beyond = [(at, row["largest"]) for at, row in rows if row["beyond"]]
        axes.plot([at for at, _ in beyond], [least for _, least in beyond], "^", markersize=6, color=COLORS[name])
    axes.axhline(1, color=COLORS[BASE], lw=1, label=BASE)
    axes.set_xticks(range(len(tasks)), [_told(task) for task in tasks])
    axes.set_xlim(-0.5, max(1, len(tasks)) - 0.5)
    axes.set(xlabel="parameters × bytes of text a parameter", ylabel=f"times as fast as {BASE}")
    figures.head(axes, f"Less text than {BASE} to the same loss")
    figures.tell(
        figure,
        "A byte-level GPT on German law, which the update was not developed on; embedding and head are not counted as"
        " parameters. Means of finished trainings, with standard errors, all at their best settings"
        f" (docs/convergence.md). A triangle: more than this, where {BASE} has not got there with its longest training."
        " On CPUs, in float32.",
    )
    return figure


def _place(row: Mapping[str, Any]) -> float | None:
    return row["largest"] if row["beyond"] else row["speed_up"]


def draw_seconds(content: Mapping[str, Any]) -> Figure:
    """Loss by time, in the longest training of the smallest model."""
    found = content["tasks"]
    smallest = [task for task in found if series_of(task) == SMALLEST]
    longest = max(smallest, key=lambda task: (len(found[task]) > 1, task_of(task).tokens))
    shown = [row for row in found[longest] if row["optimizer"] in (BASE, OURS, *RIVALS_SHOWN)]
    figure, (axes,) = figures.panels([2.9 + 0.2 * len(shown)])
    for row in shown:
        minutes = task_of(longest).steps * row["milliseconds"] / 60e3
        at = [minutes * (index + 1) / len(row["losses"]) for index in range(len(row["losses"]))]
        label = f"{row['optimizer']}: {row['loss']:.3f}"
        axes.plot(at, row["losses"], "o-", markersize=3, lw=1.4, color=COLORS[row["optimizer"]], label=label)
    axes.set(xlabel="minutes of one CPU thread", ylabel="held-out loss, nats a byte")
    figures.head(axes, f"Loss by time: {_told(longest)} bytes a parameter")
    figures.tell(
        figure,
        "A byte-level GPT on German law, which the update was not developed on. Means over seeds, at the best settings"
        " of each; time is steps × what a step takes.",
        figures.machine(_times()),
    )
    return figure


def _told(task: str) -> str:
    """As a label: 0.14 M × 20."""
    found = re.fullmatch(r"laws(\d+)x(\d+)(large)?", task)
    if not found:
        return task
    width, budget = int(found[1]), int(found[2])
    return f"{hidden_numel(width) / 1e6:.2g} M × {budget}" + ("\nlarge batch" if found[3] else "")
