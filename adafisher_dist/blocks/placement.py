"""Which elements of its parameters each rank stores, by layout. Integers only, so that they can also be foretold."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from math import prod

from adafisher_dist.blocks.sharding import Placed
from adafisher_dist.blocks.spans import Span

Places = Sequence[Sequence[Placed]]  # for each rank, the spans that it stores


def everywhere(numels: Sequence[int], world: int) -> Places:
    """Each parameter is a tensor of its own, the same on every rank."""
    placed = tuple(Placed(Span(i, numel, 0, numel), i, 0) for i, numel in enumerate(numels) if numel)
    return [placed] * world


def in_partitions(offsets: Sequence[int], numels: Sequence[int], length: int, world: int) -> Places:
    """The parameters lie in one flat buffer at `offsets`, of which each rank has a partition of `length` elements."""
    placed: list[list[Placed]] = [[] for _ in range(world)]
    for offset, number in sorted(zip(offsets, range(len(numels)), strict=True)):
        numel = numels[number]
        for rank in range(offset // length, -(-(offset + numel) // length)):
            start, stop = max(0, rank * length - offset), min(numel, (rank + 1) * length - offset)
            placed[rank].append(Placed(Span(number, numel, start, stop), 0, offset + start - rank * length))
    return placed


def one_by_one(numels: Sequence[int], lengths: Sequence[int], world: int) -> Places:
    """Each rank has `lengths[i]` elements of parameter i, padding included, one parameter after the other."""
    placed: list[list[Placed]] = [[] for _ in range(world)]
    for number, (numel, length, end) in enumerate(zip(numels, lengths, accumulate(lengths), strict=True)):
        for rank, places in enumerate(placed):
            start, stop = min(numel, rank * length), min(numel, (rank + 1) * length)
            if start < stop:
                places.append(Placed(Span(number, numel, start, stop), 0, end - length))
    return placed


def by_rows(shapes: Sequence[Sequence[int]], world: int) -> Places:
    """Each parameter is a tensor of its own, whose rows are cut over the ranks."""
    placed: list[list[Placed]] = [[] for _ in range(world)]
    for number, shape in enumerate(shapes):
        for rank, places in enumerate(placed):
            start, stop = rows_of(shape, rank, world)
            if start < stop:
                places.append(Placed(Span(number, prod(shape), start, stop), number, 0))
    return placed


def rows_of(shape: Sequence[int], rank: int, world: int) -> tuple[int, int]:
    """The elements that a rank holds where `torch.chunk` cuts the rows: ⌈R/W⌉ each, the last ranks fewer or none."""
    numel, rows = prod(shape), shape[0]
    chunk = -(-rows // world) * (numel // max(1, rows))
    return min(numel, rank * chunk), min(numel, (rank + 1) * chunk)


def runs(rows: int, ranks: int) -> list[tuple[int, int]]:
    """By rank, the first of its rows and the one after the last, where `torch.chunk` cuts them."""
    length = -(-rows // ranks)
    return [(min(rows, rank * length), min(rows, (rank + 1) * length)) for rank in range(ranks)]
