"""A rank's part of a checkpoint: ranges of global 1-d tensors, and where they lie in this rank's memory.

A parameter's momentum is the 1-d tensor of its elements, its Fisher that of its blocks, one after the other in the
order of the grid. A rank owns consecutive blocks, so that its state is a range of either, whatever the batches are that
hold it. That is what makes a checkpoint independent of ranks. A dense block of the Fisher is its lower triangle there,
whether the optimizer stores it so (`packed`) or not.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from math import prod

import torch
from torch import Tensor

from adafisher_dist import fisher, plan
from adafisher_dist.batch import Batch
from adafisher_dist.grid import Grid, Strip
from adafisher_dist.shard import Shard
from adafisher_dist.span import Span

# Elements a range holds at most, but for one block: what is packed at a time (64 MiB in fp32).
RANGE_NUMEL = 2**24

# A replicated tensor is written in parts of at least so many elements, so that small ones are not cut.
_PART_NUMEL = 2**14


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """Memory of this rank, of any shape, and where its elements are in the range: an offset, a stride a dimension.

    Where `symmetric`, the memory is whole blocks, (…, B, B), and the range has their lower triangles, (…, T).
    """

    memory: Tensor
    offset: int
    strides: tuple[int, ...]
    symmetric: bool = False

    def pack_into(self, packed: Tensor) -> None:
        """Copy the elements to their places in the packed range."""
        self._window(packed).copy_(self._triangles() if self.symmetric else self.memory)

    def unpack_from(self, packed: Tensor) -> None:
        """The inverse of `pack_into`."""
        window = self._window(packed)
        if self.symmetric:
            size = self.memory.shape[-1]
            window = fisher.unpack(window.reshape(-1, fisher.packed_numel(size)), size).view(self.memory.shape)
        self.memory.copy_(window)

    def _window(self, packed: Tensor) -> Tensor:
        """The places, in the shape of the memory, or of its triangles."""
        shape = self.memory.shape
        if self.symmetric:
            shape = torch.Size([*shape[:-2], fisher.packed_numel(shape[-1])])
        return packed.as_strided(shape, self.strides, packed.storage_offset() + self.offset)

    def _triangles(self) -> Tensor:
        *lead, size, _ = self.memory.shape
        return fisher.pack(self.memory.view(-1, size, size)).view(*lead, -1)


@dataclass(frozen=True, slots=True, eq=False)
class Range:
    """Elements [start, start + numel) of the 1-d tensor `key` of `total` elements."""

    key: str
    start: int
    numel: int
    total: int
    dtype: torch.dtype
    pieces: Sequence[Piece]

    def in_place(self) -> Tensor | None:
        """The elements as a 1-d view of this rank's memory, where they lie in a row there."""
        first = self.pieces[0]
        lying = len(self.pieces) == 1 and first.memory.is_contiguous() and not first.symmetric
        return first.memory.view(-1) if lying else None

    def room(self) -> Tensor:
        """An uninitialised 1-d tensor to pack into."""
        return torch.empty(self.numel, dtype=self.dtype, device=self.pieces[0].memory.device)

    def pack(self) -> Tensor:
        """The elements as one contiguous 1-d tensor: a copy, where they do not lie in a row."""
        lying = self.in_place()
        if lying is not None:
            return lying
        packed = self.room()
        for piece in self.pieces:
            piece.pack_into(packed)
        return packed

    def unpack(self, packed: Tensor) -> None:
        """The inverse of `pack`."""
        for piece in self.pieces:
            piece.unpack_from(packed)


def of_tensor(key: str, values: Tensor, start: int, stop: int, total: int) -> Iterator[Range]:
    """Elements [start, stop) of a tensor of `total`, which are the first in `values`, in parts."""
    if values.is_contiguous():
        flat = values.view(-1)
        for begin in range(start, stop, RANGE_NUMEL):
            end = min(stop, begin + RANGE_NUMEL)
            yield Range(
                key, begin, end - begin, total, values.dtype, [Piece(flat[begin - start : end - start], 0, (1,))]
            )
    elif start < stop:  # channels_last, say: whole
        assert stop - start == values.numel() == total
        strides = tuple(prod(values.shape[dim + 1 :]) for dim in range(values.dim()))
        yield Range(key, 0, total, total, values.dtype, [Piece(values, 0, strides)])


def share(values: Tensor, number: int, rank: int, ranks: int) -> tuple[int, int]:
    """The elements of replicated tensor `number` that a rank writes, so that all write about as much."""
    numel = values.numel()
    part = max(_PART_NUMEL, -(-numel // ranks)) if values.is_contiguous() else max(1, numel)
    index = (rank - number) % ranks
    return min(numel, index * part), min(numel, (index + 1) * part)


def of_state(shard: Shard, names: Mapping[int, str]) -> Iterator[Range]:
    """The state of the blocks that this rank owns: keys momentum/NAME, fisher/NAME and, where kept, factor/NAME and
    curvature/NAME.

    Args:
        shard: the shard.
        names: for each parameter of the shard that takes part, its name in the checkpoint.
    """  # noqa: D205
    places: dict[int, dict[str, tuple[Batch, int]]] = {}
    for batch, segments in zip(shard.batches, shard.by_parameter, strict=True):
        for segment in segments:
            places.setdefault(segment.owner, {})[batch.kind] = batch, segment.start
    for span in shard.owned[shard.storage.group.rank]:
        if span.parameter in names and len(span):
            grid = shard.grids[span.parameter]
            parts = -(-plan.work((span,), shard.grids) // RANGE_NUMEL)
            for part in chain.from_iterable(plan.cut((span,), shard.grids, parts)):
                yield from _of_blocks(names[span.parameter], grid, span, part, places[span.parameter])


def _of_blocks(
    name: str, grid: Grid, owned: Span, part: Span, places: Mapping[str, tuple[Batch, int]]
) -> Iterator[Range]:
    """The state of the blocks of `part`, a part of the owned span, whose rows `places` tells by their kind."""
    before = grid.rows_by_kind(owned.start)
    upto = grid.rows_by_kind(part.start)
    first, last = grid.block_from(part.start), grid.block_from(part.stop)
    dense_first, dense_last = min(first, grid.dense_blocks), min(last, grid.dense_blocks)
    fields: dict[str, list[tuple[Strip, Tensor]]] = {"momentum": [], "fisher": [], "factor": [], "curvature": []}
    for strip in grid.strips(part.start, part.stop):
        batch, row = places[strip.kind]
        row += upto[strip.kind] - before[strip.kind]
        upto[strip.kind] += strip.rows
        for field, tensor in batch.tensors().items():
            fields[field].append((strip, tensor[row : row + strip.rows]))
    triangle, square = grid.triangle_numel, grid.fisher_numel
    ends = {
        "momentum": (part.start, part.stop, grid.numel),
        "fisher": (triangle(first), triangle(last), triangle(grid.num_blocks)),
        "factor": (square(dense_first), square(dense_last), square(grid.dense_blocks)),
        "curvature": (dense_first, dense_last, grid.dense_blocks),
    }
    for field, members in fields.items():
        if members:
            start, stop, total = ends[field]
            index = partial(_index, grid, field)
            symmetric = field == "fisher"
            pieces = [_piece(strip, rows, start, index, symmetric and rows.dim() == 3) for strip, rows in members]
            yield Range(f"{field}/{name}", start, stop - start, total, members[0][1].dtype, pieces)


def _index(grid: Grid, field: str, block: int) -> int:
    """The first element of a block in the 1-d tensor of a field."""
    places = {"momentum": grid.start, "fisher": grid.triangle_numel, "factor": grid.fisher_numel}
    return block if field == "curvature" else places[field](block)


def _piece(strip: Strip, rows: Tensor, start: int, index: partial[int], symmetric: bool) -> Piece:
    """The rows of a strip, a period after the other; those of one period lie in a row."""
    offset = index(strip.block) - start
    if symmetric:
        size = strip.size
        stride = index(strip.block + strip.blocks_per_period) - index(strip.block) if strip.periods > 1 else 0
        strides = (stride, fisher.packed_numel(size), 1)
        return Piece(rows.view(strip.periods, strip.count, size, size), offset, strides, symmetric=True)
    periodic = rows.view(strip.periods, -1)
    stride = index(strip.block + strip.blocks_per_period) - index(strip.block) if strip.periods > 1 else 0
    if stride == periodic.shape[1] or strip.periods == 1:
        return Piece(rows.view(-1), offset, (1,))
    return Piece(periodic, offset, (stride, 1))
