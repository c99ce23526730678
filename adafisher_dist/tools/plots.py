"""Reads a log of metrics, of CsvLog or of DeepSpeed's csv_monitor, and draws it."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path

from adafisher_dist.stepping.metrics import LADDER, NAMES

Curve = tuple[list[float], list[float]]  # steps, and the values there

# What shares a panel, by its title.
PANELS: dict[str, tuple[str, ...]] = {
    "condition number of A": ("condition_number_median", "condition_number_max"),
    "damping": ("damping_min", "damping_max"),
    "age of factors (steps)": ("factor_age_mean", "factor_age_max"),
    "factorisations that needed help": LADDER,
    "‖update‖ / ‖weights‖": ("update_to_weight",),
    "sent in a step (bytes, all ranks)": ("communication_bytes",),
    "waited for other ranks (ms a step)": ("communication_ms",),
    "skipped steps": ("skipped_steps",),
}
_LOGARITHMIC = ("condition number of A", "‖update‖ / ‖weights‖")


def read(log: Path) -> tuple[str, dict[str, Curve]]:
    """What the horizontal axis is, and the curves by the names of `metrics.NAMES`.

    Args:
        log: a file of CsvLog, or the folder in which DeepSpeed's csv_monitor has a file for each
            metric.

    Raises:
        OSError: it cannot be read.
        ValueError: it is neither, or holds no metrics.
    """
    if log.is_dir():
        files = {name: log / f"AdaFisher_{name}.csv" for name in NAMES}
        found = {name: _columns(path)[0] for name, path in files.items() if path.is_file()}
        axis = "samples"
    else:
        header, *_ = log.read_text(encoding="utf-8").splitlines() or [""]
        found = dict(zip(header.split(",")[1:], _columns(log), strict=True)) if header.startswith("step,") else {}
        found = {name: curve for name, curve in found.items() if name in NAMES and curve[0]}
        axis = "step"
    if not found:
        raise ValueError(
            f"{log} holds no metrics of AdaFisher. Give the file of adafisher_dist.metrics.CsvLog, or the folder of"
            " DeepSpeed's csv_monitor (output_path/job_name)."
        )
    return axis, found


def _columns(path: Path) -> list[Curve]:
    """Each column of a CSV file over the first; empty cells are left out."""
    with path.open(newline="", encoding="utf-8") as file:
        heading, *rows = list(csv.reader(file)) or [[]]
    curves: list[Curve] = [([], []) for _ in heading[1:]]
    for number, row in enumerate(rows, 2):
        if row[:1] == heading[:1]:  # a run that went on wrote it again
            continue
        try:
            step, *values = row
            for (steps, numbers), value in zip(curves, values, strict=True):
                if value:
                    steps.append(float(step))
                    numbers.append(float(value))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}, is not a step with {len(curves)} numbers: {row}") from error
    return curves


def draw(axis: str, curves: Mapping[str, Curve], out: Path) -> None:
    """Draw a panel for each kind of metric found; the suffix of `out` gives the file format."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = {title: [name for name in names if name in curves] for title, names in PANELS.items()}
    panels = {title: names for title, names in panels.items() if names}
    rows = -(-len(panels) // 2)
    figure, axes = pyplot.subplots(rows, 2, figsize=(10, 2.4 * rows), squeeze=False, sharex=True, layout="constrained")
    for title, panel in zip(panels, axes.flat, strict=False):
        for name in panels[title]:
            steps, values = curves[name]
            panel.plot(steps, values, marker="o", markersize=2, linewidth=1, label=name.replace("_", " "))
        if title in _LOGARITHMIC and all(value > 0 for name in panels[title] for value in curves[name][1]):
            panel.set_yscale("log")
        panel.set_title(title, fontsize=9)
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
        if len(panels[title]) > 1:
            panel.legend(frameon=False, fontsize=7)
    for panel in axes.flat[len(panels) :]:
        panel.set_visible(False)
    for panel in axes[-1]:
        panel.set_xlabel(axis)
    try:
        figure.savefig(out, dpi=130)
    finally:
        pyplot.close(figure)
