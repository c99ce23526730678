"""Who owns which row groups where ranks store different elements."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from operator import neg

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
    layouts = [replace(parts, tensor=0, offset=0) for parts in stored.parts]
    for parameter, (parts, grid) in enumerate(zip(layouts, grids, strict=True)):
        for rank, first, last, load in _runs_of(parts, grid):
            if rank is None:
                shared.append((-load, parameter, first))
            else:
                runs[rank].append((parameter, first, last))
                loads[rank] += load
    for minus_load, parameter, row_group in sorted(shared):
        first, amounts = _holders(layouts[parameter], grids[parameter], row_group)
        there = loads[first : first + len(amounts)]
        # Of equally loaded ones that which stores most, and of those the first.
        rank = first + min(zip(there, map(neg, amounts), range(len(there)), strict=True))[2]
        runs[rank].append((parameter, row_group, row_group + 1))
        loads[rank] -= minus_load
    return tuple(_joined(sorted(own), grids) for own in runs)


# Experts that are parameters of their own are alike by the thousand, and lie alike on the ranks.
@lru_cache(maxsize=1024)
def _runs_of(parts: StoredParts, grid: Grid) -> list[tuple[int | None, int, int, int]]:
    """A parameter's row groups: the rank that stores them whole, if one does, and their load."""
    found: list[tuple[int | None, int, int, int]] = []
    first = 0
    # From row group to row group, past all that one rank stores whole: never rank by rank, of which
    # there may be far more.
    while first < grid.row_groups:
        rank = parts.rank_of(grid.start(first))
        last = max(first + 1, grid.row_groups_before(parts.bounds(rank)[1]))
        is_whole = grid.start(last) <= parts.bounds(rank)[1]
        load = grid.fisher_numel(last) - grid.fisher_numel(first)
        found.append((rank if is_whole else None, first, last, load))
        first = last
    return found


@lru_cache(maxsize=1 << 16)
def _holders(parts: StoredParts, grid: Grid, row_group: int) -> tuple[int, list[int]]:
    """The first rank that stores a part of a row group; how many elements it has, and the next."""
    start, stop = grid.start(row_group), grid.start(row_group + 1)
    ranks = range(parts.rank_of(start), parts.rank_of(stop - 1) + 1)
    return ranks.start, [min(last, stop) - max(first, start) for first, last in map(parts.bounds, ranks)]


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
