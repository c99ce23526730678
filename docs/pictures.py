"""Draws the pictures of docs/how_it_works.md into docs/pictures: `python docs/pictures.py`.

Blocks and owners are the package's own plan of small matrices, not drawn by hand.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle

from adafisher_dist.blocks import placement, sharding
from adafisher_dist.blocks.grid import Grid, make_grid
from adafisher_dist.blocks.placement import Placement
from adafisher_dist.blocks.sharding import Assignment

FOLDER = Path(__file__).parent / "pictures"
COLOURS = ("#4C72B0", "#DD8452", "#55A868", "#B07AA1")
INK, PAPER = "#30343B", "#FFFFFF"
ROWS, LENGTH = 24, 40


def main() -> None:
    """Draw all."""
    matplotlib.rcParams |= {
        "svg.hashsalt": "adafisher_dist",  # the same bytes each time
        "font.family": "sans-serif",
        "text.color": INK,
        "font.size": 10,
    }
    FOLDER.mkdir(exist_ok=True)
    for name, figure in {"blocks": blocks(), "ranks": ranks(), "step": step()}.items():
        figure.savefig(FOLDER / f"{name}.svg", metadata={"Date": None}, facecolor=PAPER, bbox_inches="tight")


def blocks() -> Figure:
    """A weight matrix cut into blocks, and what a block keeps."""
    grid = make_grid((ROWS, LENGTH), 16, 8, "rows", None)
    figure = Figure(figsize=(9, 3.6))
    left, right = figure.subplots(1, 2, width_ratios=(2, 1))
    _matrix(left, grid, lambda row_group, piece: COLOURS[0] if (row_group, piece) == (1, 1) else "#E4E8EF")
    left.set_title(f"a weight of {ROWS} rows of L = {LENGTH}: block_size=16, rows_per_block=8", fontsize=10)
    left.text(LENGTH / 2, ROWS + 2.2, "a row: all that feeds one output", ha="center")
    left.annotate("", (0, ROWS + 0.8), (LENGTH, ROWS + 0.8), arrowprops={"arrowstyle": "<->", "color": INK})
    left.text(-1, ROWS / 2, "a row group: 8 rows,\nnever shared out", ha="right", va="center")
    right.set_aspect("equal")
    right.set_axis_off()
    size, rows = grid.columns, grid.rows
    generator = np.random.default_rng(0)
    vectors = generator.standard_normal((rows, size)) @ generator.standard_normal((size, size))
    right.imshow(np.abs(vectors.T @ vectors), cmap="Blues", extent=(0, size, 0, size))
    right.add_patch(Rectangle((0, 0), size, size, fill=False, edgecolor=INK))
    right.text(size / 2, -0.7, f"F, {size} × {size}: one for the block", ha="center", va="top")
    for row in range(rows):
        right.add_patch(Rectangle((0, size + 2 + row), size, 0.8, facecolor=COLOURS[0], edgecolor=PAPER))
        right.add_patch(Rectangle((size + 1, size + 2 + row), 0.9, 0.8, facecolor=COLOURS[1], edgecolor=PAPER))
    right.text(size / 2, size + rows + 2.6, "its 8 vectors", ha="center")
    right.text(size + 1.5, size + rows + 2.6, "w", ha="center")
    right.set_xlim(-1, size + 4)
    right.set_ylim(-3, size + rows + 4.5)
    return figure


def ranks() -> Figure:
    """Who owns which row groups: where all ranks hold everything, and where each holds a part."""
    world = 4
    grid = make_grid((ROWS, LENGTH), 16, 4, "rows", None)
    numel = [ROWS * LENGTH]
    everywhere = placement.everywhere(numel, world)
    figure = Figure(figsize=(9, 3.4))
    left, right = figure.subplots(1, 2)
    for axes, stored_spans, replicated, title in (
        (left, everywhere, True, "DDP, ZeRO-0: equal runs of row groups"),
        (right, _cut_by_partitions(numel[0], world), False, "ZeRO-1 to 3, FSDP2: the least loaded that stores a part"),
    ):
        assignment = sharding.assign([grid], stored_spans, replicated)
        _matrix(axes, grid, lambda row_group, piece, of=assignment: COLOURS[_owner(of, grid.start(row_group))])
        axes.set_title(title, fontsize=10)
        if not replicated:
            _boundaries(axes, stored_spans)
    for rank, colour in enumerate(COLOURS):
        figure.text(0.3 + 0.12 * rank, 0.02, f"■ rank {rank}", color=colour, ha="center")
    return figure


def _cut_by_partitions(numel: int, world: int) -> Placement:
    """Partitions that cut row groups, as if 70 elements of another parameter came first."""
    offset = 70
    length = -(-(numel + offset) // world)
    return placement.in_partitions([offset], [numel], length, world)


def step() -> Figure:
    """The order of a step."""
    figure = Figure(figsize=(9, 2.5))
    axes = figure.subplots()
    axes.set_axis_off()
    axes.set_xlim(0, 100)
    axes.set_ylim(0, 30)
    boxes = (
        ("agree", "all gradients finite?\nall ranks alike?", "#E4E8EF"),
        ("to the owners", "what of a row group lies\non another rank", "#F3DFC9"),
        ("compute", "each rank its blocks:\nw, F, $A^{-1/2}$, polar, U", "#CFE3D4"),
        ("and back", "new weights, or\npieces of the update", "#F3DFC9"),
        ("settle", "did every rank\ndo its part?", "#E4E8EF"),
    )
    for number, (title, text, colour) in enumerate(boxes):
        x = 1 + 20 * number
        axes.add_patch(Rectangle((x, 6), 17, 18, facecolor=colour, edgecolor=INK))
        axes.text(x + 8.5, 20, title, ha="center", va="center", weight="bold")
        axes.text(x + 8.5, 12.5, text, ha="center", va="center", fontsize=8)
        if number:
            axes.add_patch(FancyArrowPatch((x - 3, 15), (x, 15), arrowstyle="-|>", mutation_scale=12, color=INK))
    return figure


def _matrix(axes: Axes, grid: Grid, colour_of: Callable[[int, int], str]) -> None:
    """The blocks of a matrix, first row on top."""
    axes.set_aspect("equal")
    axes.set_axis_off()
    axes.set_xlim(-1, LENGTH + 1)
    axes.set_ylim(ROWS + 1, -1)
    for row_group in range(grid.row_groups):
        top, bottom = row_group * grid.rows, min(ROWS, (row_group + 1) * grid.rows)
        for piece in range(grid.pieces):
            start, stop = piece * grid.columns, min(LENGTH, (piece + 1) * grid.columns)
            axes.add_patch(
                Rectangle(
                    (start, top),
                    stop - start,
                    bottom - top,
                    facecolor=colour_of(row_group, piece),
                    edgecolor=PAPER,
                    linewidth=2.5,
                )
            )
        for row in range(top + 1, bottom):
            axes.plot((0, LENGTH), (row, row), color=PAPER, linewidth=0.5)


def _owner(assignment: Assignment, element: int) -> int:
    return next(
        rank for rank, spans in enumerate(assignment.owned) if any(span.start <= element < span.stop for span in spans)
    )


def _boundaries(axes: Axes, stored_spans: Placement) -> None:
    """Where one rank's part ends and the next one's begins."""
    for rank in range(1, len(stored_spans)):
        row, column = divmod(stored_spans[rank][0].span.start, LENGTH)
        path = ((LENGTH + 0.6, column, column, -0.6), (row, row, row + 1, row + 1))
        axes.plot(*path, color=INK, linewidth=1.8)


if __name__ == "__main__":
    main()
