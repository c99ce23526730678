"""Who owns which row groups where ranks store different elements."""

from __future__ import annotations

from collections.abc import Sequence

from adafisher_dist.blocks.grid import Grid
from adafisher_dist.blocks.placement import Placement, StoredParts
from adafisher_dist.blocks.spans import Span, Spans

_Run = tuple[int, int, int]  # parameter, first row group, the one after the last


def owned_where_stored(stored: Placement, grids: Sequence[Grid]) -> tuple[Spans, ...]:
    """Each rank owns row groups of which it stores a part: all that it stores whole, some others.

    Those that a boundary between ranks cuts go, the costliest first, to the least loaded of the
    ranks that store a part; of equally loaded ones to the one that stores most. Load is counted in
    elements of the Fisher, as in `sharding.cut`.
    """
    runs: list[list[_Run]] = [[] for _ in range(len(stored))]
    loads = [0] * len(stored)
    shared: list[tuple[int, int, int]] = []  # minus the load, parameter, row group
    for parameter, (parts, grid) in enumerate(zip(stored.parts, grids, strict=True)):
        first = 0
        # From row group to row group, past all that one rank stores whole: never rank by rank, of
        # which there may be far more.
        while first < grid.row_groups:
            rank = parts.rank_of(grid.start(first))
            last = max(first + 1, grid.row_groups_before(parts.bounds(rank)[1]))
            load = grid.fisher_numel(last) - grid.fisher_numel(first)
            if grid.start(last) <= parts.bounds(rank)[1]:
                runs[rank].append((parameter, first, last))
                loads[rank] += load
            else:
                shared.append((-load, parameter, first))
            first = last
    for minus_load, parameter, row_group in sorted(shared):
        rank = _least_loaded(stored.parts[parameter], grids[parameter], row_group, loads)
        runs[rank].append((parameter, row_group, row_group + 1))
        loads[rank] -= minus_load
    return tuple(_joined(sorted(own), grids) for own in runs)


def _least_loaded(parts: StoredParts, grid: Grid, row_group: int, loads: Sequence[int]) -> int:
    """Of the ranks that store a part of a row group, the one to own it."""
    start, stop = grid.start(row_group), grid.start(row_group + 1)

    def stored(rank: int) -> int:
        first, last = parts.bounds(rank)
        return min(last, stop) - max(first, start)

    ranks = range(parts.rank_of(start), parts.rank_of(stop - 1) + 1)
    least = min(loads[ranks.start : ranks.stop])
    return max((rank for rank in ranks if loads[rank] == least), key=stored)  # the first of several


def _joined(runs: Sequence[_Run], grids: Sequence[Grid]) -> Spans:
    """The spans of these row groups, in order; those that meet as one."""
    result: list[Span] = []
    for parameter, first, last in runs:
        grid = grids[parameter]
        start, stop = grid.start(first), grid.start(last)
        if result and result[-1].parameter == parameter and result[-1].stop == start:
            start = result.pop().start
        result.append(Span(parameter, grid.numel, start, stop))
    return tuple(result)
