"""Which elements of its parameters each rank stores, by layout.

Integers only, so that `estimate` can use it before anything is built.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from math import prod

from adafisher_dist.blocks.sharding import Span, StoredSpan

StoredSpans = Sequence[Sequence[StoredSpan]]  # for each rank, the spans that it stores


def everywhere(numels: Sequence[int], world: int) -> StoredSpans:
    """Each parameter is a tensor of its own, the same on every rank."""
    stored_spans = tuple(StoredSpan(Span(i, numel, 0, numel), i, 0) for i, numel in enumerate(numels) if numel)
    return [stored_spans] * world


def in_partitions(offsets: Sequence[int], numels: Sequence[int], length: int, world: int) -> StoredSpans:
    """Parameters lie at `offsets` of a flat buffer; each rank's partition has `length` elements."""
    stored_spans: list[list[StoredSpan]] = [[] for _ in range(world)]
    for offset, number in sorted(zip(offsets, range(len(numels)), strict=True)):
        numel = numels[number]
        for rank in range(offset // length, -(-(offset + numel) // length)):
            start, stop = max(0, rank * length - offset), min(numel, (rank + 1) * length - offset)
            stored_spans[rank].append(StoredSpan(Span(number, numel, start, stop), 0, offset + start - rank * length))
    return stored_spans


def one_by_one(numels: Sequence[int], lengths: Sequence[int], world: int) -> StoredSpans:
    """Each rank has `lengths[i]` elements of parameter i, padding included, one after the other."""
    stored_spans: list[list[StoredSpan]] = [[] for _ in range(world)]
    for number, (numel, length, end) in enumerate(zip(numels, lengths, accumulate(lengths), strict=True)):
        for rank, places in enumerate(stored_spans):
            start, stop = min(numel, rank * length), min(numel, (rank + 1) * length)
            if start < stop:
                places.append(StoredSpan(Span(number, numel, start, stop), 0, end - length))
    return stored_spans


def by_rows(shapes: Sequence[Sequence[int]], world: int) -> StoredSpans:
    """Each parameter is a tensor of its own, whose rows are cut over the ranks."""
    stored_spans: list[list[StoredSpan]] = [[] for _ in range(world)]
    for number, shape in enumerate(shapes):
        for rank, places in enumerate(stored_spans):
            start, stop = rows_of(shape, rank, world)
            if start < stop:
                places.append(StoredSpan(Span(number, prod(shape), start, stop), number, 0))
    return stored_spans


def rows_of(shape: Sequence[int], rank: int, world: int) -> tuple[int, int]:
    """The elements of a rank, [start, stop), where `torch.chunk` cuts the rows.

    Each rank has ⌈R/W⌉ rows; the last ranks have fewer or none.
    """
    numel, rows = prod(shape), shape[0]
    chunk = -(-rows // world) * (numel // max(1, rows))
    return min(numel, rank * chunk), min(numel, (rank + 1) * chunk)


def runs(rows: int, ranks: int) -> list[tuple[int, int]]:
    """By rank, the first of its rows and the one after the last, where `torch.chunk` cuts them."""
    length = -(-rows // ranks)
    return [(min(rows, rank * length), min(rows, (rank + 1) * length)) for rank in range(ranks)]
