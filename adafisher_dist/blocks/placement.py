"""Which elements of its parameters each rank stores, by layout.

Integers only, so that `estimate` can use it before anything is built. Nothing is made for each
parameter on each rank until it is asked for: of 4,096 ranks there would be a million.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from math import prod

from adafisher_dist.blocks.spans import Span, StoredSpan


@dataclass(frozen=True, slots=True)
class StoredParts:
    """How a parameter is stored: `length` elements on each of some consecutive ranks.

    Rank r has its elements from r·length − before on, as far as there are any.

    Attributes:
        numel: elements of the parameter.
        length: at least 1.
        before: elements of other parameters before it, which count in `length`.
        tensor: number of the rank's tensor that holds them.
        offset: where they begin in that tensor, but on the first rank, which has `before` % length
            elements of others before them.
    """

    numel: int
    length: int
    before: int
    tensor: int
    offset: int

    @property
    def ranks(self) -> range:
        """Those that store a part."""
        return range(self.before // self.length, -(-(self.before + self.numel) // self.length) if self.numel else 0)

    def rank_of(self, element: int) -> int:
        """The rank that stores an element."""
        return (self.before + element) // self.length

    def bounds(self, rank: int) -> tuple[int, int]:
        """The first element of a rank, and the one after the last."""
        begin = rank * self.length - self.before
        return max(0, min(self.numel, begin)), max(0, min(self.numel, begin + self.length))


class Placement:
    """For each rank the spans that it stores: `placement[rank]`.

    Attributes:
        parts: how each parameter is stored.
    """

    def __init__(self, parts: Sequence[StoredParts], world: int, replicated: bool = False) -> None:
        """Where `replicated`, each rank stores what the first one does."""
        self.parts = parts
        self._world, self._replicated = world, replicated
        self._in_order = sorted(range(len(parts)), key=lambda number: parts[number].before)
        self._made: dict[int, tuple[StoredSpan, ...]] = {}

    def __len__(self) -> int:
        return self._world

    def __getitem__(self, rank: int) -> tuple[StoredSpan, ...]:
        if not 0 <= rank < self._world:
            raise IndexError(rank)
        rank = 0 if self._replicated else rank
        if rank not in self._made:
            numbers = (number for number in self._in_order if rank in self.parts[number].ranks)
            self._made[rank] = tuple(self.place(number, rank) for number in numbers)
        return self._made[rank]

    def place(self, parameter: int, rank: int) -> StoredSpan:
        """What a rank stores of a parameter, which may be nothing."""
        parts = self.parts[parameter]
        start, stop = parts.bounds(rank)
        offset = parts.offset + max(0, start + parts.before - rank * parts.length)
        return StoredSpan(Span(parameter, parts.numel, start, stop), parts.tensor, offset)

    def ranks_of(self, span: Span) -> range:
        """The ranks that store a part of a span that is not empty."""
        parts = self.parts[span.parameter]
        return range(parts.rank_of(span.start), parts.rank_of(span.stop - 1) + 1)

    @cached_property
    def numels(self) -> list[int]:
        """Elements that each rank stores."""
        counts = [0] * self._world
        for parts in self.parts if not self._replicated else ():
            ranks, length = parts.ranks, parts.length
            for rank in ranks:
                counts[rank] += length
            if ranks:  # what of the first and last rank's parts belongs to others, or is padding
                counts[ranks[0]] -= parts.before - ranks[0] * length
                counts[ranks[-1]] -= ranks.stop * length - parts.before - parts.numel
        return counts if not self._replicated else [sum(parts.numel for parts in self.parts)] * self._world

    @property
    def most_pieces(self) -> int:
        """Parameters of which the rank that has most of them stores a part."""
        if self._replicated:
            return len(self.parts)
        counts = [0] * self._world
        for parts in self.parts:
            for rank in parts.ranks:
                counts[rank] += 1
        return max(counts)


def everywhere(numels: Sequence[int], world: int) -> Placement:
    """Each parameter is a tensor of its own, the same on every rank."""
    parts = [StoredParts(numel, max(1, numel), 0, i, 0) for i, numel in enumerate(numels)]
    return Placement(parts, world, replicated=True)


def in_partitions(offsets: Sequence[int], numels: Sequence[int], length: int, world: int) -> Placement:
    """Parameters lie at `offsets` of a flat buffer; each rank's partition has `length` elements."""
    parts = [StoredParts(numel, length, offset, 0, 0) for offset, numel in zip(offsets, numels, strict=True)]
    return Placement(parts, world)


def one_by_one(numels: Sequence[int], lengths: Sequence[int], world: int) -> Placement:
    """Each rank has `lengths[i]` elements of parameter i, padding included, one after the other."""
    rows = zip(numels, lengths, accumulate(lengths), strict=True)
    return Placement([StoredParts(numel, max(1, length), 0, 0, end - length) for numel, length, end in rows], world)


def by_rows(shapes: Sequence[Sequence[int]], world: int) -> Placement:
    """Each parameter is a tensor of its own, whose rows are cut over the ranks."""
    parts = [StoredParts(prod(shape), max(1, _rows_numel(shape, world)), 0, i, 0) for i, shape in enumerate(shapes)]
    return Placement(parts, world)


def rows_of(shape: Sequence[int], rank: int, world: int) -> tuple[int, int]:
    """The elements of a rank, [start, stop), where `torch.chunk` cuts the rows.

    Each rank has ⌈R/W⌉ rows; the last ranks have fewer or none.
    """
    numel, chunk = prod(shape), _rows_numel(shape, world)
    return min(numel, rank * chunk), min(numel, (rank + 1) * chunk)


def _rows_numel(shape: Sequence[int], world: int) -> int:
    numel, rows = prod(shape), shape[0] if shape else 1
    return -(-rows // world) * (numel // max(1, rows))


def runs(rows: int, ranks: int) -> list[tuple[int, int]]:
    """By rank, the first of its rows and the one after the last, where `torch.chunk` cuts them."""
    length = -(-rows // ranks)
    return [(min(rows, rank * length), min(rows, (rank + 1) * length)) for rank in range(ranks)]
