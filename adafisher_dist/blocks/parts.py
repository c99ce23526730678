"""Parts of a parameter, one on each tensor-parallel rank, and the order that they are saved in.

A checkpoint has the tensors of the parts one after the other, each as if it were a parameter of its
own. Where the parameter was cut by its first dimension, that is the parameter's own order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import prod
from typing import Any

from adafisher_dist.blocks.fields import saved_offset
from adafisher_dist.blocks.grid import GRID_SETTINGS, Grid, is_table, make_grid
from adafisher_dist.blocks.placement import runs

PARTS = "parts"
"""What a checkpoint says of a parameter that was cut: along which dimension, into how many."""


@dataclass(frozen=True, slots=True)
class Parts:
    """How a parameter of shape `whole` is cut into `count` parts along a dimension.

    It is cut as `torch.chunk` does, so that the last parts may be smaller, or empty.
    """

    whole: tuple[int, ...]
    dim: int
    count: int

    @property
    def edges(self) -> list[tuple[int, int]]:
        """Of each part, its first index in the cut dimension, and the one after its last."""
        return runs(self.whole[self.dim], self.count)

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Of each part."""
        before, after = self.whole[: self.dim], self.whole[self.dim + 1 :]
        return [(*before, stop - start, *after) for start, stop in self.edges]

    def offset(self, number: int) -> int:
        """Elements in the parts before one."""
        return sum(map(prod, self.shapes[:number]))

    def grids(self, settings: Mapping[str, Any]) -> list[Grid]:
        """The blocks of each part; of the settings, those that `make_grid` takes are used."""
        table, made = is_table(self.whole), {}
        for shape in set(self.shapes):
            made[shape] = make_grid(shape, **{key: settings[key] for key in GRID_SETTINGS}, table=table)
        return [made[shape] for shape in self.shapes]

    def facts(self) -> dict[str, Any]:
        """What a checkpoint says of them, as JSON; `saved_parts` reads it."""
        return {PARTS: {"dim": self.dim, "count": self.count}}


def grids_of(shape: Sequence[int], parts: Parts | None, settings: Mapping[str, Any]) -> list[Grid]:
    """The blocks of a parameter, part by part where it is cut; `settings`: see `Parts.grids`."""
    if parts is not None:
        return parts.grids(settings)
    return [make_grid(shape, **{key: settings[key] for key in GRID_SETTINGS})]


def saved_parts(fact: Mapping[str, Any]) -> Parts | None:
    """How a parameter was cut when it was saved, from what the checkpoint says of it."""
    cut = fact.get(PARTS)
    return None if cut is None else Parts(tuple(fact["shape"]), cut["dim"], cut["count"])


def saved_offsets(field: str, grids: Sequence[Grid]) -> list[int]:
    """Where each part begins in a field's tensor in a checkpoint; at last, that tensor's length."""
    lengths = {grid: saved_offset(field, grid, grid.row_groups) for grid in set(grids)}
    return list(accumulate((lengths[grid] for grid in grids), initial=0))
