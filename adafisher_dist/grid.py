"""How one parameter is cut into blocks. Integers only, and in closed form: a block has no object of its own."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod


@dataclass(frozen=True, slots=True)
class Strip:
    """Blocks of one size in a regular pattern: `periods` times, every `stride` elements, `count` blocks side by side.

    `start` is the first element in the flattened parameter, `block` the index of the first block, and
    `blocks_per_period` how far that index moves from one period to the next. A strip that is not dense stands for
    elements with a diagonal Fisher: size is 1, and `count` counts elements.
    """

    size: int
    dense: bool
    start: int
    periods: int
    stride: int
    count: int
    block: int
    blocks_per_period: int

    @property
    def rows(self) -> int:
        """Blocks in the strip."""
        return self.periods * self.count

    @property
    def kind(self) -> str:
        """Which batch they go to: the block size, or "diagonal"."""
        return str(self.size) if self.dense else "diagonal"


@dataclass(frozen=True, slots=True)
class Grid:
    """A parameter's blocks, numbered row-major.

    The flattened parameter is a sequence of periods of `period` elements, each cut into `pieces` blocks as equal as
    possible, the longer ones first. The last period may be short only where `pieces` is 1. Blocks from
    `dense_blocks` on keep a diagonal Fisher.
    """

    numel: int
    period: int
    pieces: int
    dense_blocks: int

    @property
    def num_blocks(self) -> int:
        """Dense and diagonal blocks."""
        return -(-self.numel // self.period) if self.pieces == 1 else self.numel // self.period * self.pieces

    def start(self, block: int) -> int:
        """First element of a block; `numel` for the block past the last."""
        index, piece = divmod(block, self.pieces)
        size, longer = divmod(self.period, self.pieces)
        return min(self.numel, index * self.period + piece * size + min(piece, longer))

    def block_from(self, element: int) -> int:
        """The first block that starts at or after `element`."""
        index, rest = divmod(element, self.period)
        size, longer = divmod(self.period, self.pieces)
        in_longer = longer * (size + 1)
        piece = -(-rest // (size + 1)) if rest <= in_longer else longer - (in_longer - rest) // size
        return min(self.num_blocks, index * self.pieces + piece)

    def fisher_numel(self, block: int) -> int:
        """Elements of the Fisher in the blocks before `block`: the measure by which work is shared out."""
        dense = min(block, self.dense_blocks)
        index, piece = divmod(dense, self.pieces)
        size, longer = divmod(self.period, self.pieces)
        total = index * (longer * (size + 1) ** 2 + (self.pieces - longer) * size**2)
        total += min(piece, longer) * (size + 1) ** 2 + max(0, piece - longer) * size**2
        if self.pieces == 1 and dense * self.period > self.numel:  # the last block is short
            total += (self.numel % self.period) ** 2 - self.period**2
        return total + self.start(block) - self.start(dense)

    def triangle_numel(self, block: int) -> int:
        """Elements of the lower triangles of the Fisher in the blocks before `block`; a diagonal one's are its own."""
        return (self.fisher_numel(block) + self.start(block)) // 2  # the sum of (r² + r) / 2

    def block_of_fisher_numel(self, amount: int) -> int:
        """The first block whose predecessors hold at least `amount` elements of the Fisher."""
        return bisect_left(range(self.num_blocks), amount, key=self.fisher_numel)

    def strips(self, start: int, stop: int) -> Iterator[Strip]:
        """The blocks of the elements [start, stop), both on block boundaries, in the order of their numbers by size."""
        first, last = self.block_from(start), self.block_from(stop)
        dense_last = max(first, min(last, self.dense_blocks))
        if self.pieces == 1:
            yield from self._uniform(first, dense_last)
        else:
            yield from self._periodic(first, dense_last)
        if dense_last < last:
            begin = self.start(dense_last)
            yield Strip(1, False, begin, 1, stop - begin, stop - begin, dense_last, 0)

    def rows_by_kind(self, stop: int) -> Counter[str]:
        """How many rows of each kind the elements before `stop`, a block boundary, fill."""
        rows: Counter[str] = Counter()
        for strip in self.strips(0, stop):
            rows[strip.kind] += strip.rows
        return rows

    def _uniform(self, first: int, last: int) -> Iterator[Strip]:
        whole = min(last, self.numel // self.period)
        if first < whole:
            yield Strip(self.period, True, first * self.period, whole - first, self.period, 1, first, 1)
        if max(first, whole) < last:
            begin = whole * self.period
            yield Strip(self.numel - begin, True, begin, 1, self.period, 1, whole, 1)

    def _periodic(self, first: int, last: int) -> Iterator[Strip]:
        (index, piece), (last_index, last_piece) = divmod(first, self.pieces), divmod(last, self.pieces)
        if index == last_index:
            yield from self._pieces(index, 1, piece, last_piece)
            return
        if piece:
            yield from self._pieces(index, 1, piece, self.pieces)
            index += 1
        yield from self._pieces(index, last_index - index, 0, self.pieces)
        yield from self._pieces(last_index, 1, 0, last_piece)

    def _pieces(self, index: int, periods: int, first: int, last: int) -> Iterator[Strip]:
        """Pieces [first, last) of `periods` periods from period `index` on."""
        size, longer = divmod(self.period, self.pieces)
        for length, low, high in ((size + 1, first, min(last, longer)), (size, max(first, longer), last)):
            if periods > 0 and low < high:
                block = index * self.pieces + low
                yield Strip(length, True, self.start(block), periods, self.period, high - low, block, self.pieces)


def make_grid(shape: Sequence[int], block_size: int, block_grid: str, max_blocks: int | None) -> Grid:
    """The grid of a parameter of this shape (DESIGN.md, section 2: `rows` and `flat`)."""
    numel = prod(shape)
    row = numel // shape[0] if len(shape) >= 2 and numel else numel
    if block_grid == "flat" or numel == 0:
        period, pieces = block_size, 1
    elif row < block_size:
        period, pieces = block_size // row * row, 1
    else:
        period, pieces = row, -(-row // block_size)
        if period % pieces == 0:  # all pieces are alike: one strip instead of one a row
            period, pieces = period // pieces, 1
    blocks = Grid(numel, period, pieces, 0).num_blocks
    return Grid(numel, period, pieces, blocks if max_blocks is None else min(blocks, max_blocks))
