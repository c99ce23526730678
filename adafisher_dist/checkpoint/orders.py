"""How the parts of tensor parallelism follow each other in a checkpoint, and the way to others.

The tensors of a parameter that was cut lie in a checkpoint part by part (`blocks.parts`). What is
cut otherwise here, or not at all, has their elements in another order. Both orders are runs of the
whole parameter's own order: of its elements, or where there are blocks of its blocks, if none goes
over an edge.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import prod
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from adafisher_dist.blocks.fields import saved_numel
from adafisher_dist.blocks.grid import GRID_SETTINGS, BlockShape, Grid, make_grid
from adafisher_dist.blocks.parts import Parts, saved_parts
from adafisher_dist.checkpoint.manifest import Manifest
from adafisher_dist.checkpoint.ranges import RANGE_NUMEL, Range

# Elements between two runs that are read with them: to read them apart takes as long.
_GAP = 2**14

Ints = NDArray[np.int64]


class Order(NamedTuple):
    """A tensor as runs of its elements.

    Attributes:
        whole: (n,), ascending: where each run begins in the whole parameter's order.
        own: (n,): where it begins here.
    """

    whole: Ints
    own: Ints


PLAIN = Order(np.zeros(1, np.int64), np.zeros(1, np.int64))


def of_elements(parts: Parts | None) -> Order:
    """The order of weights and momentum."""
    if parts is None:
        return PLAIN
    before, width = prod(parts.whole[: parts.dim]), _width(parts)
    row = parts.whole[parts.dim] * width
    starts = [np.arange(before) * row + start * width for start, _ in parts.edges]
    lengths = [np.full(before, (stop - start) * width) for start, stop in parts.edges]
    return _joined(np.concatenate(starts), np.concatenate(lengths))


def of_field(field: str, shape: Sequence[int], parts: Parts | None, settings: Mapping[str, Any]) -> Order | None:
    """The order of a field of the state (`blocks.fields`); None where blocks are not the whole's.

    Args:
        field: which.
        shape: of the whole parameter.
        parts: how it is cut.
        settings: those that make its blocks.
    """
    if field == "momentum" or parts is None:
        return of_elements(parts)
    whole = make_grid(shape, **{key: settings[key] for key in GRID_SETTINGS})
    grids = parts.grids(settings)
    if not any(grid.dense_row_groups for grid in (whole, *grids)):  # each element has its own
        return of_elements(parts)
    found = _blocks_of_whole(whole, grids, parts)
    if found is None:
        return None
    sizes = _sizes(field, _blocks(whole))
    starts = np.cumsum(sizes) - sizes
    return _joined(starts[found], sizes[found])


def runs_of(range_: Range, manifest: Manifest) -> Ints | None:
    """Where a wanted range lies in a checkpoint; None: as it is here.

    Returns:
        (n, 3): where each run begins in the tensor here, where in the checkpoint's, its length; in
        the checkpoint's order.
    """
    kind, _, name = range_.key.partition("/")
    fact = {} if kind == "buffer" else manifest.about["model"]["parameters"][name]
    there = saved_parts(fact)
    if there == range_.parts:
        return None
    settings = manifest.about["optimizer"]["state"][name]["structure"] if kind != "weight" else {}
    kind = "momentum" if kind == "weight" else kind  # both have the parameter's elements
    own, stored = (of_field(kind, fact["shape"], parts, settings) for parts in (range_.parts, there))
    assert own is not None and stored is not None, range_.key  # `matching` has refused others
    return runs(own, stored, range_.start, range_.start + range_.numel, range_.total)


def bounds_of(range_: Range, manifest: Manifest) -> tuple[Ints, Ints]:
    """Where each read for a wanted range begins in the checkpoint's tensor, and where it ends."""
    found = runs_of(range_, manifest)
    if found is None:
        return np.array([range_.start]), np.array([range_.start + range_.numel])
    groups = [(group[0][1], group[-1][1] + group[-1][2]) for group in read_together(found)]
    starts, stops = np.array(groups, dtype=np.int64).reshape(-1, 2).T
    return starts, stops


def runs(here: Order, there: Order, start: int, stop: int, total: int) -> Ints:
    """Where elements [start, stop) of a tensor of `total` in one order lie in another: (n, 3)."""
    by_place = np.argsort(here.own)
    begins, whole = here.own[by_place], here.whole[by_place]
    low, high = np.maximum(begins, start), np.minimum(np.append(begins[1:], total), stop)
    held = low < high
    if not held.any():
        return np.empty((0, 3), np.int64)
    places, firsts, lasts = low[held], (whole + low - begins)[held], (whole + high - begins)[held]
    in_order = np.argsort(firsts)
    places, firsts, lasts = places[in_order], firsts[in_order], lasts[in_order]
    # The runs of both orders, cut where a run of either begins.
    cuts = np.union1d(firsts, there.whole)
    of = np.searchsorted(firsts, cuts, side="right") - 1
    inside = (of >= 0) & (cuts < lasts[of])
    nexts = np.append(cuts[1:], np.iinfo(np.int64).max)[inside]
    cuts, of = cuts[inside], of[inside]
    at = np.searchsorted(there.whole, cuts, side="right") - 1
    stored = there.own[at] + cuts - there.whole[at]
    found = np.stack([places[of] + cuts - firsts[of], stored, np.minimum(lasts[of], nexts) - cuts], axis=1)
    return found[np.argsort(stored)]


def read_together(found: Ints) -> Iterator[list[list[int]]]:
    """The runs in groups, each of which one read of all between its ends brings."""
    group: list[list[int]] = []
    for run in found.tolist():
        _, at, numel = run
        far = group and (at - group[-1][1] - group[-1][2] > _GAP or at + numel - group[0][1] > RANGE_NUMEL)
        if far:
            yield group
            group = []
        group.append(run)
    if group:
        yield group


# ---- runs ----


def _width(parts: Parts) -> int:
    """Elements from one index of the dimension that is cut to the next."""
    return prod(parts.whole[parts.dim + 1 :])


def _joined(starts: Ints, lengths: Ints) -> Order:
    """Of runs in their own order, where each begins in the whole's; those that go on are one."""
    own, some = np.cumsum(lengths) - lengths, lengths > 0
    starts, lengths, own = starts[some], lengths[some], own[some]
    if not len(starts):
        return PLAIN
    begins = np.append(True, starts[1:] != starts[:-1] + lengths[:-1])
    starts, own = starts[begins], own[begins]
    by_start = np.argsort(starts)
    return Order(starts[by_start], own[by_start])


class _Blocks(NamedTuple):
    """The blocks of a grid, all dense, in its order: first elements, columns, rows; each (n,)."""

    starts: Ints
    columns: Ints
    rows: Ints


def _blocks(grid: Grid) -> _Blocks:
    edges = np.array([grid.start(number) for number in range(grid.row_groups + 1)], dtype=np.int64)
    offsets = np.arange(grid.pieces) * grid.columns
    held = np.diff(edges)[:, None]  # elements of each row group
    columns = np.minimum(np.minimum(grid.columns, grid.row_numel - offsets), held)
    rows = np.maximum(1, held // max(1, grid.row_numel))
    starts = edges[:-1, None] + offsets
    return _Blocks(*(np.broadcast_to(value, starts.shape).ravel() for value in (starts, columns, rows)))


def _blocks_of_whole(whole: Grid, grids: Sequence[Grid], parts: Parts) -> Ints | None:
    """Of each block of the parts, part by part, its number in the whole's grid; None: not all are.

    A block is the whole's if it begins and ends where that does, and its rows are as far apart.
    """
    if any(grid.dense_row_groups < grid.row_groups for grid in (whole, *grids)):
        return None
    width, everything, found = _width(parts), _blocks(whole), []
    row = parts.whole[parts.dim] * width
    for (start, stop), grid in zip(parts.edges, grids, strict=True):
        own, own_row = _blocks(grid), (stop - start) * width
        if not len(own.starts):
            continue
        if grid.row_numel != whole.row_numel and (grid.row_numel, whole.row_numel) != (own_row, row):
            return None
        ends = own.starts + (own.rows - 1) * grid.row_numel + own.columns - 1
        firsts, lasts = (own_at // own_row * row + start * width + own_at % own_row for own_at in (own.starts, ends))
        numbers = np.minimum(np.searchsorted(everything.starts, firsts), len(everything.starts) - 1)
        there = _Blocks(*(values[numbers] for values in everything))
        there_ends = there.starts + (there.rows - 1) * whole.row_numel + there.columns - 1
        alike = (there.starts == firsts) & (there_ends == lasts)
        if not (alike & (there.columns == own.columns) & (there.rows == own.rows)).all():
            return None
        found.append(numbers)
    return np.concatenate(found) if found else np.empty(0, np.int64)


def _sizes(field: str, blocks: _Blocks) -> Ints:
    """Elements of each block in a field's tensor."""
    kinds, of = np.unique(np.stack([blocks.columns, blocks.rows]), axis=1, return_inverse=True)
    sizes = [saved_numel(field, BlockShape(columns, rows, dense=True)) for columns, rows in kinds.T.tolist()]
    return np.array(sizes, dtype=np.int64)[of.reshape(-1)]
