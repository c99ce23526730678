"""Which rank owns which blocks, and how pieces reach their owners: integers, no process group."""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, islice, pairwise

from adafisher_dist.blocks.grid import BlockShape, Grid


@dataclass(frozen=True, slots=True)
class Span:
    """Elements [start, stop) of a parameter, flattened row-major, with `numel` elements in all."""

    parameter: int
    numel: int
    start: int
    stop: int

    def __post_init__(self) -> None:
        assert 0 <= self.start <= self.stop <= self.numel, self

    def __len__(self) -> int:
        return self.stop - self.start

    def intersect(self, other: Span) -> Span | None:
        """The common elements, or None where there are none."""
        if self.parameter != other.parameter:
            return None
        start, stop = max(self.start, other.start), min(self.stop, other.stop)
        return Span(self.parameter, self.numel, start, stop) if start < stop else None


@dataclass(frozen=True, slots=True)
class StoredSpan:
    """A span that a rank stores; it begins at element `offset` of the rank's tensor `tensor`."""

    span: Span
    tensor: int
    offset: int


@dataclass(frozen=True, slots=True)
class TensorPiece:
    """Elements that lie in a stored tensor, and in a buffer of an owner's.

    The buffer holds all elements of some spans in a row.
    """

    rank: int  # the other end of the transfer
    tensor: int
    tensor_offset: int
    buffer_offset: int
    numel: int


@dataclass(frozen=True, slots=True)
class Route:
    """How a rank's gradients reach the owners of their blocks; in reverse, how updates come back.

    `local` stays on this rank. `send` leaves a tensor of this rank for an owner's buffer,
    `receive` enters this rank's; both are ordered by rank, and within a rank both ends list the
    same pieces in the same order.
    """

    local: tuple[TensorPiece, ...]
    send: tuple[TensorPiece, ...]
    receive: tuple[TensorPiece, ...]


Spans = tuple[Span, ...]

# What a chunk holds at most, about: elements of the Fisher, which bounds temporaries (128 MiB in
# fp32); elements, which bounds the workspace (64 MiB); of all ranks, where new weights are gathered
# (256 MiB, twice).
CHUNK_FISHER_NUMEL = 2**25
CHUNK_NUMEL = 2**24
GATHERED_NUMEL = 2**26


@dataclass(frozen=True, slots=True)
class Assignment:
    """Who owns which blocks.

    Attributes:
        owned: for each rank, the spans of its blocks.
        chunks: for each chunk and rank, the spans of the rank's chunk: its blocks in parts of equal
            work.
    """

    owned: tuple[Spans, ...]
    chunks: tuple[tuple[Spans, ...], ...]


def assign(grids: Sequence[Grid], stored_spans: Sequence[Sequence[StoredSpan]], replicated: bool) -> Assignment:
    """Assign every block to a rank.

    Where every rank stores everything, the ranks get equal runs of row groups. Otherwise a row
    group belongs to a rank that stores a part of it, see `owned_where_stored`.
    """
    owned = cut(whole(grids), grids, len(stored_spans)) if replicated else owned_where_stored(stored_spans, grids)
    parts = max(1, *(-(-work(spans, grids) // CHUNK_FISHER_NUMEL) for spans in owned))
    parts = max(parts, *(-(-count(spans) // CHUNK_NUMEL) for spans in owned))
    if replicated and len(owned) > 1:
        parts = max(parts, -(-sum(map(count, owned)) // GATHERED_NUMEL))
    by_rank = [cut(spans, grids, parts) for spans in owned]
    return Assignment(owned, tuple(zip(*by_rank, strict=True)))


def whole(grids: Sequence[Grid]) -> Spans:
    """All elements of all parameters, in order."""
    return tuple(Span(index, grid.numel, 0, grid.numel) for index, grid in enumerate(grids))


def cut(spans: Spans, grids: Sequence[Grid], parts: int) -> tuple[Spans, ...]:
    """Cut a run of blocks into contiguous runs of equal work, on the boundaries of row groups.

    Work is measured in elements of the Fisher, so that blocks of several sizes, and diagonal ones,
    weigh what they cost in memory and time. No run exceeds its even share by more than one row
    group.
    """
    before = [grids[s.parameter].fisher_numel(grids[s.parameter].row_group_from(s.start)) for s in spans]
    totals = [0, *accumulate(work((span,), grids) for span in spans)]

    def boundary(part: int) -> tuple[int, int]:
        """(span, element) where this part begins."""
        if part == parts:
            return len(spans), 0
        target = -(-totals[-1] * part // parts)
        index = bisect_right(totals, target) - 1
        if index >= len(spans):
            return len(spans), 0
        grid = grids[spans[index].parameter]
        row_group = grid.row_group_of_fisher_numel(before[index] + target - totals[index])
        return index, max(spans[index].start, min(grid.start(row_group), spans[index].stop))

    ends = [boundary(part) for part in range(parts + 1)]
    return tuple(_between(spans, low, high) for low, high in pairwise(ends))


def _between(spans: Spans, low: tuple[int, int], high: tuple[int, int]) -> Spans:
    result = []
    for index in range(low[0], min(high[0] + 1, len(spans))):
        span = spans[index]
        start = max(span.start, low[1]) if index == low[0] else span.start
        stop = min(span.stop, high[1]) if index == high[0] else span.stop
        if start < stop:
            result.append(Span(span.parameter, span.numel, start, stop))
    return tuple(result)


def owned_where_stored(stored: Sequence[Sequence[StoredSpan]], grids: Sequence[Grid]) -> tuple[Spans, ...]:
    """Each rank owns row groups of which it stores a part: all that it stores whole, some others.

    Those that a boundary between ranks cuts go, the costliest first, to the least loaded of the
    ranks that store a part; of equally loaded ones to the one that stores most. Load is counted in
    elements of the Fisher, as in `cut`.
    """
    held = _holders(stored, len(grids))
    runs: list[list[_Run]] = [[] for _ in stored]
    loads = [0] * len(stored)
    shared: list[tuple[int, int, int]] = []  # minus the load, parameter, row group
    for parameter, (holders, grid) in enumerate(zip(held, grids, strict=True)):
        for span, rank in holders:
            first, last = grid.row_group_from(span.start), _whole_before(grid, span)
            if first < last:
                runs[rank].append((parameter, first, last))
                loads[rank] += grid.fisher_numel(last) - grid.fisher_numel(first)
        ends = (span.stop for span, _ in holders[:-1])
        cut_groups = {grid.row_group_from(end) - 1 for end in ends if grid.start(grid.row_group_from(end)) != end}
        shared += [(grid.fisher_numel(g) - grid.fisher_numel(g + 1), parameter, g) for g in cut_groups]
    for minus_load, parameter, row_group in sorted(shared):
        rank = _least_loaded(held[parameter], grids[parameter], row_group, loads)
        runs[rank].append((parameter, row_group, row_group + 1))
        loads[rank] -= minus_load
    return tuple(_joined(sorted(own), grids) for own in runs)


def cut_by_boundaries(
    assignment: Assignment, stored: Sequence[Sequence[StoredSpan]], grids: Sequence[Grid]
) -> tuple[Spans, ...]:
    """For each rank the row groups that it owns and does not store whole, chunk by chunk."""
    return tuple(
        tuple(
            part
            for by_rank in assignment.chunks
            for span in by_rank[rank]
            for part, place in split_where_cut(span, held[span.parameter], grids[span.parameter])
            if place is None
        )
        for rank, held in enumerate(map(by_parameter, stored))
    )


def by_parameter(places: Sequence[StoredSpan]) -> dict[int, StoredSpan]:
    """What a rank stores of each parameter: one run of it in every layout."""
    found = {place.span.parameter: place for place in places}
    assert len(found) == len(places)
    return found


def split_where_cut(span: Span, place: StoredSpan, grid: Grid) -> Iterator[tuple[Span, StoredSpan | None]]:
    """A span of whole row groups, parted where the rank that owns it ceases to store them whole.

    Args:
        span: of one parameter.
        place: what the rank stores of it.
        grid: of the parameter.

    Yields:
        Up to three parts in order, each with `place`, or None where not all of it is there.
    """
    held = place.span
    first = min(span.stop, grid.start(grid.row_group_from(max(span.start, held.start))))
    last = max(first, min(span.stop, grid.start(_whole_before(grid, held))))
    for start, stop, here in ((span.start, first, None), (first, last, place), (last, span.stop, None)):
        if start < stop:
            yield Span(span.parameter, span.numel, start, stop), here


_Run = tuple[int, int, int]  # parameter, first row group, the one after the last
_Holders = list[tuple[Span, int]]  # what each rank stores of a parameter, in order


def _holders(stored: Sequence[Sequence[StoredSpan]], parameters: int) -> list[_Holders]:
    held: list[_Holders] = [[] for _ in range(parameters)]
    for rank, places in enumerate(stored):
        for place in places:
            if len(place.span):
                held[place.span.parameter].append((place.span, rank))
    for holders in held:
        holders.sort(key=lambda holder: holder[0].start)
    return held


def _whole_before(grid: Grid, span: Span) -> int:
    """The row group after the last that ends within the span."""
    last = grid.row_group_from(span.stop)
    return last if grid.start(last) == span.stop else last - 1


def _least_loaded(holders: _Holders, grid: Grid, row_group: int, loads: Sequence[int]) -> int:
    """Of the ranks that store a part of a row group, the one to own it."""
    start, stop = grid.start(row_group), grid.start(row_group + 1)
    first = bisect_right(holders, start, key=lambda holder: holder[0].stop)
    best = None
    for span, rank in islice(holders, first, None):
        if span.start >= stop:
            break
        candidate = loads[rank], max(span.start, start) - min(span.stop, stop), rank
        best = candidate if best is None else min(best, candidate)
    assert best is not None
    return best[2]


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


def route(stored: Sequence[Sequence[StoredSpan]], owned: Sequence[Spans], rank: int) -> Route:
    """How `rank` sends what it stores and receives what it owns.

    Every element has to be stored on one rank.
    """
    send = [piece for owner in range(len(owned)) for piece in pieces_of(stored[rank], owned[owner], owner)]
    receive = [piece for source in range(len(stored)) for piece in pieces_of(stored[source], owned[rank], source)]
    return Route(
        local=tuple(piece for piece in send if piece.rank == rank),
        send=tuple(piece for piece in send if piece.rank != rank),
        receive=tuple(piece for piece in receive if piece.rank != rank),
    )


def pieces_of(stored: Sequence[StoredSpan], owned: Spans, rank: int) -> list[TensorPiece]:
    """The stored elements that lie in a buffer of `owned`; `rank` is noted."""
    places: dict[int, list[StoredSpan]] = {}
    for place in stored:
        places.setdefault(place.span.parameter, []).append(place)
    pieces, begun = [], 0
    for span in owned:
        for place in places.get(span.parameter, ()):
            common = span.intersect(place.span)
            if common is not None:
                tensor_offset = place.offset + common.start - place.span.start
                buffer_offset = begun + common.start - span.start
                pieces.append(TensorPiece(rank, place.tensor, tensor_offset, buffer_offset, len(common)))
        begun += len(span)
    return pieces


def merged(pieces: Sequence[TensorPiece]) -> tuple[TensorPiece, ...]:
    """Join pieces that continue the one before, both in the tensor and in the buffer."""
    result: list[TensorPiece] = []
    for piece in pieces:
        last = result[-1] if result else None
        if (
            last is not None
            and (last.rank, last.tensor) == (piece.rank, piece.tensor)
            and last.tensor_offset + last.numel == piece.tensor_offset
            and last.buffer_offset + last.numel == piece.buffer_offset
        ):
            result[-1] = replace(last, numel=last.numel + piece.numel)
        else:
            result.append(piece)
    return tuple(result)


def count(spans: Spans) -> int:
    """Elements in the spans."""
    return sum(len(span) for span in spans)


def workspace_numel(spans: Spans, grids: Sequence[Grid], groups: Sequence[int]) -> int:
    """Elements that the blocks of a chunk take in the workspace.

    Those of each param group and shape begin at a multiple of ALIGNMENT.
    """
    numels: Counter[tuple[int, BlockShape]] = Counter()
    for span in spans:
        for run in grids[span.parameter].runs(span.start, span.stop):
            numels[groups[span.parameter], run.shape] += run.num_blocks * run.shape.rows * run.shape.columns
    return sum(map(aligned, numels.values()))


ALIGNMENT = 64  # elements


def aligned(numel: int) -> int:
    """As many, or a few more: a multiple of ALIGNMENT."""
    return -(-numel // ALIGNMENT) * ALIGNMENT


def work(spans: Spans, grids: Sequence[Grid]) -> int:
    """Elements of the Fisher in the blocks of the spans."""
    total = 0
    for span in spans:
        grid = grids[span.parameter]
        total += grid.fisher_numel(grid.row_group_from(span.stop)) - grid.fisher_numel(grid.row_group_from(span.start))
    return total


def digest(*parts: object) -> int:
    """A 62-bit fingerprint of anything with an exact repr; ranks compare it to find differences."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 2
