"""What is kept of a block: the one table by which state is allocated, counted, saved and loaded."""

from __future__ import annotations

from typing import NamedTuple

import torch

from adafisher_dist.blocks.grid import BlockShape, Grid
from adafisher_dist.settings import StateConfig


class Field(NamedTuple):
    """A tensor that has a row for each block: the row's shape, and the dtype."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype


def fields(block: BlockShape, config: StateConfig) -> tuple[Field, ...]:
    """The state of a block of this shape, by its names in state dicts and checkpoints.

    Momentum; F, dense, as a lower triangle, or its diagonal; of rows that share a block the mean
    square of each; and of dense blocks whose factors are kept A^(−p) and the mean curvature that it
    was made with.
    """
    columns, rows, dense = block
    wide = config.compute_dtype
    fisher = (1,) if not dense else (triangle(columns),) if config.packed else (columns, columns)
    kept = [Field("momentum", (rows, columns), wide), Field("fisher", fisher, config.fisher_dtype)]
    if rows > 1:
        kept.append(Field("square", (rows,), wide))
    if dense and config.keeps_factors:
        kept += [Field("factor", (columns, columns), wide), Field("curvature", (), wide)]
    return tuple(kept)


SAVED = ("momentum", "fisher", "square", "factor", "curvature")
"""The fields that a checkpoint may have of a parameter, each a 1-d tensor, block after block."""


def saved_numel(field: str, block: BlockShape) -> int:
    """Elements of a block in a field's 1-d tensor in a checkpoint.

    F is a triangle there, however it is stored.
    """
    columns, rows, dense = block
    if field == "momentum":
        return rows * columns
    if field == "fisher":
        return triangle(columns)
    if field == "square":
        return rows if rows > 1 else 0
    return (columns**2 if field == "factor" else 1) if dense else 0


def saved_offset(field: str, grid: Grid, row_group: int) -> int:
    """Where a row group begins in that 1-d tensor."""
    blocks = grid.blocks_by_shape(grid.start(row_group))
    return sum(saved_numel(field, block) * count for block, count in blocks.items())


def triangle(columns: int) -> int:
    """T: elements of a block's lower triangle."""
    return columns * (columns + 1) // 2
