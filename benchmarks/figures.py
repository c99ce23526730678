"""What all figures share: one column that a phone shows whole, and what was measured, in words.

A figure is 374 points wide. A phone of 390 pixels shows a page's column at 358, so text of 10
points is 9.6 pixels there; tests/test_site.py looks. Text stays text in the SVG.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

WIDTH = 374 / 72  # inches
OURS, THEIRS, THIRD, GREY, INK = "#4C72B0", "#DD8452", "#55A868", "#A9AFBA", "#30343B"


def use_style() -> None:
    """The sizes and colours of all figures; the same bytes each time one is drawn."""
    matplotlib.rcParams |= {
        "svg.fonttype": "none",
        "svg.hashsalt": "adafisher_dist",
        "font.family": "sans-serif",
        "font.size": 10,
        "axes.titlesize": 11,
        "axes.titlelocation": "left",
        "axes.titleweight": "bold",
        "axes.labelsize": 10,
        "legend.fontsize": 10,
        "text.color": INK,
        "axes.labelcolor": INK,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.alpha": 0.25,
    }


def panels(heights: Sequence[float], **more: Any) -> tuple[Figure, list[Axes]]:
    """A figure of panels below each other, whose heights are in inches, and room for the words."""
    use_style()
    figure = Figure(figsize=(WIDTH, sum(heights)), layout="constrained")
    axes = figure.subplots(len(heights), 1, squeeze=False, height_ratios=heights, **more)[:, 0]
    return figure, list(axes)


def tell(figure: Figure, *sentences: str) -> None:
    """Say below the panels what was measured, of what, on what and with which settings."""
    lines = [line for sentence in sentences for line in textwrap.wrap(sentence, 62)]
    figure.set_figheight(figure.get_figheight() + 0.18 * len(lines) + 0.1)
    figure.supxlabel("\n".join(lines), x=0.01, ha="left", fontsize=10, linespacing=1.25)


def machine(content: Mapping[str, Any]) -> str:
    """The hardware, versions and date of a saved result."""
    found = content["machine"]
    where = f"{found['gpu']}, " if "gpu" in found else ""
    cores, threads = found["cores"], found["threads"]
    where += f"CPU {found['cpu']}, {cores} cores, {threads} thread{'s' * (threads > 1)} a process"
    return f"{where}; torch {content['torch']}; {content['date']}."


def bars(axes: Axes, rows: Sequence[tuple[str, float, str, str]], log: bool = False) -> None:
    """Horizontal bars, each below its own line of text: a phone has no room for labels beside them.

    Args:
        axes: the panel.
        rows: label, value, the value in words, colour.
        log: whether lengths are logarithms.
    """
    values = [value for _, value, _, _ in rows]
    axes.barh(range(len(rows)), values, 0.36, color=[colour for *_, colour in rows], log=log)
    for at, (label, _, words, _) in enumerate(rows):
        for x, side, text in ((0.005, "left", label), (0.995, "right", words)):
            axes.text(x, at - 0.2, text, ha=side, va="bottom", transform=axes.get_yaxis_transform())
    axes.set_ylim(len(rows) - 0.7, -0.85)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.grid(axis="y", visible=False)


def height(rows: int) -> float:
    """Inches of a panel of bars, with its title and axis."""
    return 0.36 * rows + 0.75


def between(axes: Axes, values: Sequence[Mapping[str, float]], at: Sequence[float], **more: Any) -> None:
    """Medians as a line, smallest and largest as whiskers."""
    middle = [value["median"] for value in values]
    reach = [[abs(value[end] - value["median"]) for value in values] for end in ("min", "max")]
    axes.errorbar(at, middle, yerr=reach, marker="o", markersize=4, capsize=3, linewidth=1.4, **more)


def head(axes: Axes, title: str) -> None:
    """A title, and below it the legend, a line for each of its entries."""
    entries = len(axes.get_legend_handles_labels()[0])
    axes.set_title(title, pad=15.5 * entries + 8)
    axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1.0), borderaxespad=0.2)


def plain_log_ticks(axes: Axes, low: float, high: float) -> None:
    """Powers of two on the vertical axis, as plain numbers."""
    axes.set_yscale("log", base=2)
    ticks = [2.0**power for power in range(math.floor(math.log2(low)), math.ceil(math.log2(high)) + 1)]
    axes.set_ylim(low, high)
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()


def write(figure: Figure, path: Path) -> None:
    """As an SVG on white."""
    use_style()
    figure.savefig(path, format="svg", metadata={"Date": None}, facecolor="white")
