"""Draws the pictures of docs/how_it_works.md into docs/pictures: `python docs/pictures.py`.

Blocks and owners are the package's own plan of small matrices, not drawn by hand.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import ConnectionPatch, Rectangle

from adafisher_dist.blocks import placement, sharding
from adafisher_dist.blocks.grid import Grid, make_grid
from adafisher_dist.blocks.placement import Placement
from adafisher_dist.blocks.sharding import Assignment

sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks"))
import figures

FOLDER = Path(__file__).parent / "pictures"
COLOURS = ("#4C72B0", "#DD8452", "#55A868", "#B07AA1")
INK, PAPER, PALE = "#30343B", "#FFFFFF", "#E4E8EF"
ROWS, LENGTH, WORLD = 24, 40, 4


def main() -> None:
    """Draw all."""
    FOLDER.mkdir(exist_ok=True)
    for name, draw in {"blocks": blocks, "ranks": ranks, "step": step}.items():
        figures.write(draw(), FOLDER / f"{name}.svg")


def _figure(height: float) -> Figure:
    figures.use_style()
    return Figure(figsize=(figures.WIDTH, height), layout="constrained")


def blocks() -> Figure:
    """A weight matrix cut into blocks, and what a block keeps."""
    grid = make_grid((ROWS, LENGTH), 16, 8, "rows", None)
    figure = _figure(5.6)
    above, below = figure.subplots(2, 1, height_ratios=(3, 2.5))
    _matrix(above, grid, lambda row_group, piece: COLOURS[0] if (row_group, piece) == (1, 1) else PALE)
    above.set_ylim(ROWS + 4, -1)
    above.set_title(f"A weight of {ROWS} rows of {LENGTH}: block_size=16,\nrows_per_block=8")
    above.text(LENGTH / 2, ROWS + 3.6, "a row: all that feeds one output", ha="center")
    above.annotate("", (0, ROWS + 1), (LENGTH, ROWS + 1), arrowprops={"arrowstyle": "<->", "color": INK})
    above.text(LENGTH / 2, 4, "a row group: 8 rows, which one rank owns", ha="center", va="center")
    above.text(21, 12, "a block", ha="center", va="center", color=PAPER)
    below.set_aspect("equal")
    below.set_axis_off()
    below.set_title("The block of 8 rows of 14, and its Fisher matrix")
    size, rows = grid.columns, grid.rows
    generator = np.random.default_rng(0)
    vectors = generator.standard_normal((rows, size)) @ generator.standard_normal((size, size))
    for row in range(rows):
        below.add_patch(Rectangle((0, 3 + row), size, 0.8, facecolor=COLOURS[0], edgecolor=PAPER))
        below.add_patch(Rectangle((size + 1, 3 + row), 0.9, 0.8, facecolor=COLOURS[1], edgecolor=PAPER))
    below.text(size / 2, 2.4, "8 rows g of the gradient", ha="center", va="top")
    below.text(size + 1.45, 2.4, "w", ha="center", va="top")
    left = size + 9
    below.imshow(np.abs(vectors.T @ vectors), cmap="Blues", extent=(left, left + size, 0, size))
    below.add_patch(Rectangle((left, 0), size, size, fill=False, edgecolor=INK))
    below.text(left + size / 2, -0.7, f"F, {size} × {size}", ha="center", va="top")
    arrow = {"arrowstyle": "-|>", "color": INK}
    below.annotate("", (left - 0.5, size / 2), (size + 2.6, size / 2), arrowprops=arrow)
    below.text(size + 5.6, size / 2 + 0.8, "mean\ng gᵀ / w", ha="center", va="bottom")
    below.set_xlim(-0.5, left + size + 0.5)
    below.set_ylim(-3, size + 0.5)
    return figure


def ranks() -> Figure:
    """What each rank holds and steps, and what travels: with whole parameters, and with parts."""
    grid = make_grid((ROWS, LENGTH), 16, 4, "rows", None)
    figure = _figure(6.7)
    whole, parts = figure.subfigures(2, 1, height_ratios=(1.05, 1))
    _whole(whole, grid)
    _in_parts(parts, grid)
    return figure


def _whole(figure: Figure, grid: Grid) -> None:
    """DDP: owners of row groups above, all new weights below."""
    assignment = sharding.assign([grid], placement.everywhere([ROWS * LENGTH], WORLD), True)
    figure.suptitle("DDP, ZeRO-0: each rank has all weights", x=0.01, ha="left", weight="bold", fontsize=11)
    before, after = figure.subplots(2, WORLD)
    owners = [_owned(assignment, grid, row_group) for row_group in range(grid.row_groups)]
    for rank, axes in enumerate(before):
        colours = [COLOURS[rank] if owner == rank else PALE for owner in owners]
        _matrix(axes, grid, lambda row_group, piece, colours=colours: colours[row_group], equal=False)
        axes.set_title(f"rank {rank}", loc="center", fontsize=10, color=COLOURS[rank])
    for axes in after:
        axes.set_title("↓", loc="center", fontsize=10)
        _matrix(axes, grid, lambda row_group, piece: COLOURS[owners[row_group]], equal=False)
    said = "1. It steps its own row groups.  2. One all-gather brings\nthe new weights to all ranks (below)."
    figure.supxlabel(said, x=0.01, ha="left", fontsize=10)


def _in_parts(figure: Figure, grid: Grid) -> None:
    """ZeRO and FSDP2: each rank's part, coloured by the owner; what another rank owns travels."""
    stored_spans = _cut_by_partitions(ROWS * LENGTH, WORLD)
    assignment = sharding.assign([grid], stored_spans, False)
    figure.suptitle("ZeRO-1 to 3, FSDP2: each rank has a part", x=0.01, ha="left", weight="bold", fontsize=11)
    panels = figure.subplots(1, WORLD)
    for rank, axes in enumerate(panels):
        _matrix(axes, grid, lambda row_group, piece: PALE, equal=False, alpha=0.45)
        axes.set_title(f"rank {rank}", loc="center", fontsize=10, color=COLOURS[rank])
        for stored in stored_spans[rank]:
            for row in range(ROWS):
                start, stop = max(stored.span.start, row * LENGTH), min(stored.span.stop, (row + 1) * LENGTH)
                if start < stop:
                    colour = COLOURS[_owned(assignment, grid, row // grid.rows)]
                    axes.add_patch(Rectangle((start % LENGTH, row), stop - start, 1, color=colour, linewidth=0.4))
    for rank, row_group, rows in _foreign(grid, stored_spans, assignment):
        _arrow(figure, panels[rank], panels[_owned(assignment, grid, row_group)], rows)
    lines = (
        "A row group belongs to one of the ranks that have a part of",
        "it (its colour).  1. Other pieces travel to the owner (arrows)",
        "as gradients.  2. It steps the row group.  3. The updates of",
        "these pieces travel back.",
    )
    figure.supxlabel("\n".join(lines), x=0.01, ha="left", fontsize=10)


def _foreign(grid: Grid, stored_spans: Placement, assignment: Assignment) -> list[tuple[int, int, float]]:
    """Pieces of row groups that another rank owns: rank, row group, the piece's middle row."""
    found = []
    for rank, spans in enumerate(stored_spans):
        for row_group in range(grid.row_groups):
            first, end = row_group * grid.rows * LENGTH, (row_group + 1) * grid.rows * LENGTH
            for stored in spans:
                start, stop = max(stored.span.start, first), min(stored.span.stop, end)
                if start < stop and _owned(assignment, grid, row_group) != rank:
                    found.append((rank, row_group, (start + stop) / 2 / LENGTH))
    return found


def _arrow(figure: Figure, sender: Axes, owner: Axes, row: float) -> None:
    right = owner.get_subplotspec().colspan.start > sender.get_subplotspec().colspan.start
    ends = (0.75 * LENGTH, 0.2 * LENGTH) if right else (0.25 * LENGTH, 0.8 * LENGTH)
    (x, other), style = ends, {"arrowstyle": "-|>", "mutation_scale": 14, "color": INK, "linewidth": 1.6}
    figure.add_artist(ConnectionPatch((x, row), (other, row), "data", "data", axesA=sender, axesB=owner, **style))


def _cut_by_partitions(numel: int, world: int) -> Placement:
    """Partitions that cut row groups, as if 70 elements of another parameter came first."""
    offset = 70
    length = -(-(numel + offset) // world)
    return placement.in_partitions([offset], [numel], length, world)


def step() -> Figure:
    """The order of a step."""
    figure = _figure(4.3)
    axes = figure.subplots()
    axes.set_axis_off()
    axes.set_xlim(0, 100)
    axes.set_ylim(98, 0)
    boxes = (
        ("1. agree", "Are all gradients finite, all ranks alike?", PALE),
        ("2. to the owners", "what of a row group lies on another rank", "#F3DFC9"),
        ("3. compute", "each rank its blocks: w, F, A^(−1/2), polar, U", "#CFE3D4"),
        ("4. and back", "new weights, or pieces of the update", "#F3DFC9"),
        ("5. settle", "Did every rank do its part?", PALE),
    )
    arrow = {"arrowstyle": "-|>", "color": INK, "shrinkA": 0, "shrinkB": 0}
    for number, (title, text, colour) in enumerate(boxes):
        y = 1 + 20 * number
        axes.add_patch(Rectangle((1, y), 98, 15, facecolor=colour, edgecolor=INK))
        axes.text(50, y + 4.6, title, ha="center", va="center", weight="bold")
        axes.text(50, y + 10.4, text, ha="center", va="center")
        if number:
            axes.annotate("", (50, y), (50, y - 5), arrowprops=arrow)
    return figure


def _matrix(
    axes: Axes, grid: Grid, colour_of: Callable[[int, int], str], equal: bool = True, alpha: float = 1.0
) -> None:
    """The blocks of a matrix, first row on top."""
    if equal:
        axes.set_aspect("equal")
    axes.set_axis_off()
    axes.set_xlim(-1, LENGTH + 1)
    axes.set_ylim(ROWS + 0.5, -0.5)
    for row_group in range(grid.row_groups):
        top, bottom = row_group * grid.rows, min(ROWS, (row_group + 1) * grid.rows)
        for piece in range(grid.pieces):
            start, stop = piece * grid.columns, min(LENGTH, (piece + 1) * grid.columns)
            look = {"facecolor": colour_of(row_group, piece), "edgecolor": PAPER, "linewidth": 1.8, "alpha": alpha}
            axes.add_patch(Rectangle((start, top), stop - start, bottom - top, **look))


def _owned(assignment: Assignment, grid: Grid, row_group: int) -> int:
    """The rank that owns a row group."""
    first = grid.start(row_group)
    return next(
        rank for rank, spans in enumerate(assignment.owned) if any(span.start <= first < span.stop for span in spans)
    )


if __name__ == "__main__":
    main()
