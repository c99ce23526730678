"""Which rank owns which blocks, and how pieces reach their owners: integers, no process group."""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate, pairwise

from adafisher_dist.blocks.grid import BlockShape, Grid
from adafisher_dist.blocks.ownership import owned_where_stored as owned_where_stored
from adafisher_dist.blocks.placement import Placement
from adafisher_dist.blocks.spans import Span as Span
from adafisher_dist.blocks.spans import Spans as Spans
from adafisher_dist.blocks.spans import StoredSpan as StoredSpan


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


# What a chunk holds at most, about: elements of the Fisher, which bounds temporaries (128 MiB in
# fp32); elements, which bounds the workspace (64 MiB).
CHUNK_FISHER_NUMEL = 2**25
CHUNK_NUMEL = 2**24

# What is gathered at a time of all ranks' new weights, where all have all weights (256 MiB, twice).
GATHERED_NUMEL = 2**26

# How many of the longest row groups a rank's part of a chunk has at least, where more chunks are
# made for the sake of what is gathered. Parts differ by a row group, and the shorter are padded.
_LEAST_ROW_GROUPS = 4


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


def assign(grids: Sequence[Grid], stored_spans: Placement, replicated: bool) -> Assignment:
    """Assign every block to a rank.

    Where every rank stores everything, see `_equal_shares`. Otherwise a row group belongs to a rank
    that stores a part of it, see `owned_where_stored`.
    """
    ranks = len(stored_spans)
    owned = _equal_shares(grids, ranks) if replicated else owned_where_stored(stored_spans, grids)
    parts = max(1, *(-(-work(spans, grids) // CHUNK_FISHER_NUMEL) for spans in owned))
    parts = max(parts, *(-(-count(spans) // CHUNK_NUMEL) for spans in owned))
    if replicated and ranks > 1:
        gathered = max(GATHERED_NUMEL, ranks * _LEAST_ROW_GROUPS * max(grid.start(1) for grid in grids))
        parts = max(parts, -(-sum(map(count, owned)) // gathered))
    by_rank = [cut(spans, grids, parts) for spans in owned]
    return Assignment(owned, tuple(zip(*by_rank, strict=True)))


def _equal_shares(grids: Sequence[Grid], ranks: int) -> tuple[Spans, ...]:
    """For each rank an equal run of the parameters with blocks, and one of those without.

    An element of the latter has half the Fisher. If both were shared out together, some ranks had
    twice the elements of others, and all would send as many as the one that has most.
    """
    having = [span for span in whole(grids) if grids[span.parameter].dense_row_groups]
    without = [span for span in whole(grids) if not grids[span.parameter].dense_row_groups]
    runs = cut(tuple(having), grids, ranks), cut(tuple(without), grids, ranks)
    return tuple(own + more for own, more in zip(*runs, strict=True))


def slices(longest: int, ranks: int) -> list[tuple[int, int]]:
    """A rank's part of a chunk, [start, stop) by [start, stop), as it is gathered.

    Each has at most `GATHERED_NUMEL` elements on all ranks together.

    Args:
        longest: elements of the longest part.
        ranks: that gather.
    """
    number = max(1, -(-longest * ranks // GATHERED_NUMEL))
    length = max(1, -(-longest // number))
    return [(start, min(longest, start + length)) for start in range(0, longest, length)]


def elements(spans: Spans, start: int, stop: int) -> Spans:
    """Elements [start, stop) of the elements of the spans, counted in a row."""
    result, begun = [], 0
    for span in spans:
        first, last = max(0, start - begun), min(len(span), stop - begun)
        if first < last:
            result.append(Span(span.parameter, span.numel, span.start + first, span.start + last))
        begun += len(span)
    return tuple(result)


def whole(grids: Sequence[Grid]) -> Spans:
    """All elements of all parameters, in order."""
    return tuple(Span(index, grid.numel, 0, grid.numel) for index, grid in enumerate(grids))


def cut(spans: Spans, grids: Sequence[Grid], parts: int) -> tuple[Spans, ...]:
    """Cut a run of blocks into contiguous runs of equal work, on the boundaries of row groups.

    Work is measured in elements of the Fisher, so that blocks of several sizes, and diagonal ones,
    weigh what they cost in memory and time. No run exceeds its even share by more than one row
    group.
    """
    if parts == 1:
        return (tuple(span for span in spans if len(span)),)
    before = [_work(grids[span.parameter], 0, span.start) for span in spans]
    totals = [0, *accumulate(_work(grids[span.parameter], span.start, span.stop) for span in spans)]

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


def cut_by_boundaries(assignment: Assignment, stored: Placement, grids: Sequence[Grid]) -> tuple[Spans, ...]:
    """For each rank the row groups that it owns and does not store whole, chunk by chunk."""
    return tuple(
        tuple(
            part
            for by_rank in assignment.chunks
            for span in by_rank[rank]
            for part, place in split_where_cut(span, stored.place(span.parameter, rank), grids[span.parameter])
            if place is None
        )
        for rank in range(len(stored))
    )


Places = Mapping[int, StoredSpan]  # of each parameter of which a rank stores a part


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
    first, last = _held_whole(grid, span.start, span.stop, place.span.start, place.span.stop)
    for start, stop, here in ((span.start, first, None), (first, last, place), (last, span.stop, None)):
        if start < stop:
            yield Span(span.parameter, span.numel, start, stop), here


@lru_cache(maxsize=1 << 16)
def _held_whole(grid: Grid, start: int, stop: int, held_start: int, held_stop: int) -> tuple[int, int]:
    """Of elements [start, stop), those in row groups that lie whole in what is held."""
    first = min(stop, grid.start(grid.row_group_from(max(start, held_start))))
    return first, max(first, min(stop, grid.start(grid.row_groups_before(held_stop))))


def route(stored: Placement, owned: Sequence[Spans], rank: int) -> Route:
    """How `rank` sends what it stores and receives what it owns.

    Every element has to be stored on one rank.
    """
    places = by_parameter(stored[rank])
    send = [piece for owner, spans in enumerate(owned) for piece in pieces_of(places, spans, owner)]
    return Route(
        local=tuple(piece for piece in send if piece.rank == rank),
        send=tuple(piece for piece in send if piece.rank != rank),
        receive=tuple(piece for piece in _sources(stored, owned[rank]) if piece.rank != rank),
    )


def _sources(stored: Placement, owned: Spans) -> list[TensorPiece]:
    """Where the elements of a buffer of `owned` are stored, by rank."""
    pieces, begun = [], 0
    for span in owned:
        for source in stored.ranks_of(span):
            piece = _piece(stored.place(span.parameter, source), span, begun, source)
            pieces += [piece] if piece is not None else []
        begun += len(span)
    return sorted(pieces, key=lambda piece: piece.rank)  # stable: in the buffer's order within a rank


def pieces_of(places: Places, owned: Spans, rank: int) -> list[TensorPiece]:
    """The stored elements that lie in a buffer of `owned`; `rank` is noted."""
    pieces, begun = [], 0
    for span in owned:
        place = places.get(span.parameter)
        piece = _piece(place, span, begun, rank) if place is not None else None
        pieces += [piece] if piece is not None else []
        begun += len(span)
    return pieces


def _piece(place: StoredSpan, span: Span, begun: int, rank: int) -> TensorPiece | None:
    """The stored elements of a span that begins at element `begun` of the buffer."""
    common = span.intersect(place.span)
    if common is None:
        return None
    in_tensor, in_buffer = common.start - place.span.start, common.start - span.start
    return TensorPiece(rank, place.tensor, place.offset + in_tensor, begun + in_buffer, len(common))


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


Blocks = Counter[tuple[int, BlockShape]]  # how many of each param group and shape


def blocks_of(spans: Spans, grids: Sequence[Grid], groups: Sequence[int]) -> Blocks:
    """The blocks of spans; `groups`: the number of each parameter's param group."""
    blocks: Blocks = Counter()
    for span in spans:
        for run in grids[span.parameter].runs(span.start, span.stop):
            blocks[groups[span.parameter], run.shape] += run.num_blocks
    return blocks


def workspace_numel(spans: Spans, grids: Sequence[Grid], groups: Sequence[int]) -> int:
    """Elements that the blocks of a chunk take in the workspace; see `room`."""
    return room(blocks_of(spans, grids, groups))


def room(blocks: Blocks) -> int:
    """Elements of these blocks, where those of each group and shape begin at an aligned one."""
    return sum(aligned(number * shape.rows * shape.columns) for (_, shape), number in blocks.items())


ALIGNMENT = 64  # elements


def aligned(numel: int) -> int:
    """As many, or a few more: a multiple of ALIGNMENT."""
    return -(-numel // ALIGNMENT) * ALIGNMENT


def work(spans: Spans, grids: Sequence[Grid]) -> int:
    """Elements of the Fisher in the blocks of the spans."""
    return sum(_work(grids[span.parameter], span.start, span.stop) for span in spans)


@lru_cache(maxsize=1 << 16)
def _work(grid: Grid, start: int, stop: int) -> int:
    return grid.fisher_numel(grid.row_group_from(stop)) - grid.fisher_numel(grid.row_group_from(start))


def digest(*parts: object) -> int:
    """A 62-bit fingerprint of anything with an exact repr; ranks compare it to find differences."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 2
