"""Output of runs: progress on the console, log.csv, loss curves, and a table of several runs."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table


@dataclass(frozen=True, slots=True)
class Row:
    """One line of log.csv.

    Attributes:
        step: steps done.
        loss: mean training loss since the last row, nats a byte; None in the first row.
        val_loss: on the held-out text; None where it was not measured.
        lr: learning rate of the last step.
        tokens_per_s: of all ranks, since the last row, validation left out.
        optimizer_share: part of that time spent in the optimizer's step(), 0 to 1; None where not
            all of its work is done there.
        seconds: training time so far, validation left out.
    """

    step: int
    loss: float | None
    val_loss: float | None
    lr: float
    tokens_per_s: float | None
    optimizer_share: float | None
    seconds: float


class Log:
    """log.csv, written as the run goes on."""

    def __init__(self, path: Path, after: int | None) -> None:
        """Start a new log, or continue `after` a step and drop what was logged later."""
        kept = [row for row in read_log(path) if row["step"] <= after] if after is not None and path.exists() else []
        self.file = path.open("w", newline="")
        self.writer = csv.DictWriter(self.file, [field.name for field in fields(Row)])
        self.writer.writeheader()
        self.writer.writerows({name: _rounded(value) for name, value in row.items()} for row in kept)

    def write(self, row: Row) -> None:
        self.writer.writerow({name: _rounded(value) for name, value in asdict(row).items()})
        self.file.flush()

    def close(self) -> None:
        self.file.close()


class Board:
    """Progress on rank 0's console: a bar on a terminal, elsewhere a line at every validation."""

    def __init__(self, console: Console, title: str, steps: int, start: int) -> None:
        self.console = console
        self.progress = Progress(
            TextColumn(title),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self.task = self.progress.add_task("", total=steps, completed=start)
        self.title, self.steps, self.val_loss = title, steps, None

    def __enter__(self) -> Board:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def advance(self) -> None:
        self.progress.advance(self.task)

    def show(self, row: Row) -> None:
        self.val_loss = row.val_loss or self.val_loss
        parts = [
            row.loss and f"loss {row.loss:.3f}",
            self.val_loss and f"val {self.val_loss:.3f}",
            row.tokens_per_s and f"{row.tokens_per_s:,.0f} tok/s",
            row.optimizer_share and f"optimizer {row.optimizer_share:.0%}",
        ]
        text = " · ".join(part for part in parts if part)
        self.progress.update(self.task, description=text)
        if not self.console.is_terminal and row.val_loss is not None:
            self.console.print(f"{self.title}  step {row.step}/{self.steps}  {text}  {row.seconds:.0f} s")


def draw_curves(logs: Mapping[str, Path], out: Path) -> None:
    """Draw training and held-out loss of one or more runs by step into a PNG.

    Args:
        logs: the runs' log.csv by label.
        out: the PNG.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(6.5, 4.2), layout="constrained")
    top = 0.0
    for number, (label, path) in enumerate(logs.items()):
        rows = read_log(path)
        early = [row["val_loss"] for row in rows if row["val_loss"] is not None and row["step"]]
        top = max(top, early[0])
        train = [(row["step"], row["loss"]) for row in rows if row["loss"] is not None]
        held_out = [(row["step"], row["val_loss"]) for row in rows if row["val_loss"] is not None]
        axis.plot(*zip(*train, strict=True), color=f"C{number}", alpha=0.35, linewidth=1, label=f"{label}, training")
        axis.plot(*zip(*held_out, strict=True), f"C{number}o-", markersize=4, label=f"{label}, held out")
    # The first steps, from log 256 on, would take most of the height.
    axis.set(xlabel="step", ylabel="loss (nats a byte)", ylim=(None, 1.02 * top))
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    figure.savefig(out, dpi=130)
    pyplot.close(figure)


def read_log(path: Path) -> list[dict[str, Any]]:
    """The rows of a log.csv, numbers as floats, empty cells as None."""
    with path.open(newline="") as file:
        return [{name: float(cell) if cell else None for name, cell in row.items()} for row in csv.DictReader(file)]


def table(summaries: Sequence[Mapping[str, Any]]) -> Table:
    """Finished runs side by side, from their summary.json."""
    result = Table()
    result.add_column("optimizer")
    for heading in ("learning rate", "steps", "training", "held out", "seconds", "tokens/s", "in optimizer"):
        result.add_column(heading, justify="right")
    for summary in summaries:
        share = summary["optimizer_share"]
        result.add_row(
            summary["optimizer"]["type"],
            f"{summary['optimizer']['params']['lr']:g}",
            str(summary["steps"]),
            f"{summary['loss']:.3f}",
            f"{summary['val_loss']:.3f}",
            f"{summary['seconds']:.0f}",
            f"{summary['tokens_per_s']:,.0f}",
            "–" if share is None else f"{share:.0%}",
        )
    return result


def _rounded(value: float | None) -> float | str | None:
    return f"{value:.6g}" if isinstance(value, float) else value
