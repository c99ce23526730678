"""A rank's part of a checkpoint: ranges of global 1-d tensors, and their places in its memory.

A parameter's momentum is the 1-d tensor of its elements, its Fisher that of its blocks, one after
the other in the order of the grid. A rank owns consecutive blocks, so that its state is a range of
either, whatever the batches are that hold it. That is what makes a checkpoint independent of ranks.
A dense block of the Fisher is its lower triangle there, whether the optimizer stores it so
(`packed`) or not. Blocks that vectors share also have those vectors' mean squares, block by block.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from math import prod

import torch
from torch import Tensor

from adafisher_dist.blocks import sharding
from adafisher_dist.blocks.fields import SAVED, saved_numel, saved_offset, triangle
from adafisher_dist.blocks.grid import BlockRun, BlockShape, Grid
from adafisher_dist.blocks.parts import Parts, saved_offsets
from adafisher_dist.blocks.sharding import Span
from adafisher_dist.layouts.storage import Parameter
from adafisher_dist.numerics import packing
from adafisher_dist.numerics.block_stack import BlockStack
from adafisher_dist.settings import StateConfig
from adafisher_dist.state.shard import Shard

# Elements a range holds at most, but for one block: what is packed at a time (32 MiB in fp32).
RANGE_NUMEL = 2**23

# A replicated tensor is written in parts of at least so many elements, so that small ones are not
# cut.
_PART_NUMEL = 2**14


@dataclass(frozen=True, slots=True, eq=False)
class RangePiece:
    """Memory of this rank, of any shape, and its place in a range: an offset, a stride a dimension.

    Where `symmetric`, the memory is whole blocks, (…, B, B), and the range has their lower
    triangles, (…, T).
    """

    memory: Tensor
    offset: int
    strides: tuple[int, ...]
    symmetric: bool = False

    @property
    def in_order(self) -> bool:
        """Whether the elements lie in memory as they do in the range."""
        places = zip(self.memory.shape, self.memory.stride(), self.strides, strict=not self.symmetric)
        alike = all(length == 1 or here == there for length, here, there in places)
        return alike and self.memory.is_contiguous() and not self.symmetric

    def pack_into(self, packed: Tensor) -> None:
        """Copy the elements to their places in the packed range."""
        window = self._window(packed)
        if not self.symmetric:
            window.copy_(self.memory)
            return
        size = self.memory.shape[-1]
        blocks = self.memory.view(-1, size, size)
        if window.is_contiguous() and window.dtype == blocks.dtype:
            packing.pack_into(blocks, window.view(-1, triangle(size)))
        else:
            window.copy_(packing.pack(blocks).view(window.shape))

    def unpack_from(self, packed: Tensor) -> None:
        """The inverse of `pack_into`."""
        window = self._window(packed)
        if not self.symmetric:
            self.memory.copy_(window)
            return
        size = self.memory.shape[-1]
        triangles = window.reshape(-1, triangle(size))
        if self.memory.is_contiguous() and self.memory.dtype == window.dtype:
            packing.unpack_into(triangles, self.memory.view(-1, size, size))
        else:
            self.memory.copy_(packing.unpack(triangles, size).view(self.memory.shape))

    def _window(self, packed: Tensor) -> Tensor:
        """The places, in the shape of the memory, or of its triangles."""
        shape = self.memory.shape
        if self.symmetric:
            shape = torch.Size([*shape[:-2], triangle(shape[-1])])
        return packed.as_strided(shape, self.strides, packed.storage_offset() + self.offset)


@dataclass(frozen=True, slots=True, eq=False)
class Range:
    """Elements [start, start + numel) of the 1-d tensor `key` of `total` elements.

    Where tensor parallelism cuts the parameter, `parts` tells how: the tensor goes part by part.
    """

    key: str
    start: int
    numel: int
    total: int
    dtype: torch.dtype
    pieces: Sequence[RangePiece]
    parts: Parts | None = None

    def in_place(self) -> Tensor | None:
        """The elements as a 1-d view of this rank's memory, where they lie in a row there."""
        first = self.pieces[0]
        return first.memory.view(-1) if len(self.pieces) == 1 and first.in_order else None

    @property
    def device(self) -> torch.device:
        """Where the elements are."""
        return self.pieces[0].memory.device

    def pack(self) -> Tensor:
        """The elements as one contiguous 1-d tensor: a copy, where they do not lie in a row."""
        lying = self.in_place()
        if lying is not None:
            return lying
        packed = torch.empty(self.numel, dtype=self.dtype, device=self.device)
        self.pack_into(packed)
        return packed

    def pack_into(self, packed: Tensor) -> None:
        """The same, into a contiguous 1-d tensor on the device of the elements."""
        for piece in self.pieces:
            piece.pack_into(packed)

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
                key, begin, end - begin, total, values.dtype, [RangePiece(flat[begin - start : end - start], 0, (1,))]
            )
    elif start < stop:  # channels_last, say: whole
        assert stop - start == values.numel() == total
        strides = tuple(prod(values.shape[dim + 1 :]) for dim in range(values.dim()))
        yield Range(key, 0, total, total, values.dtype, [RangePiece(values, 0, strides)])


def share(values: Tensor, number: int, rank: int, ranks: int) -> tuple[int, int]:
    """The elements of replicated tensor `number` that a rank writes, balanced over the ranks."""
    numel = values.numel()
    part = max(_PART_NUMEL, -(-numel // ranks)) if values.is_contiguous() else max(1, numel)
    index = (rank - number) % ranks
    return min(numel, index * part), min(numel, (index + 1) * part)


def of_state(shard: Shard, names: Mapping[int, str]) -> Iterator[Range]:
    """The state of the blocks that this rank owns.

    Keys are momentum/NAME and fisher/NAME; square/NAME where vectors share blocks; factor/NAME and
    curvature/NAME where factors are kept.

    Args:
        shard: the shard.
        names: for each parameter of the shard that takes part, its name in the checkpoint.
    """
    places: dict[int, dict[BlockShape, tuple[BlockStack, int]]] = {}
    for stack, segments in zip(shard.stacks, shard.by_parameter, strict=True):
        for segment in segments:
            places.setdefault(segment.owner, {})[stack.shape] = stack, segment.start
    for span in shard.owned[shard.storage.group.rank]:
        if span.parameter in names and len(span):
            grid = shard.grids[span.parameter]
            parts = -(-sharding.work((span,), shard.grids) // RANGE_NUMEL)
            for part in chain.from_iterable(sharding.cut((span,), shard.grids, parts)):
                for range_ in _of_blocks(names[span.parameter], grid, span, part, places[span.parameter]):
                    parameter = shard.storage.parameters[span.parameter]
                    yield among_parts(range_, parameter, shard.configs[shard.groups[parameter.tensor]])


def among_parts(range_: Range, parameter: Parameter, config: StateConfig) -> Range:
    """A range of this rank's part of a parameter's state, as one of the tensor of all parts."""
    parts = parameter.parts
    if parts is None or parts.count == 1:
        return range_
    grids = parts.grids(config._asdict())
    offsets = saved_offsets(range_.key.partition("/")[0], grids)
    return replace(range_, start=range_.start + offsets[parameter.part], total=offsets[-1], parts=parts)


def _of_blocks(
    name: str, grid: Grid, owned: Span, part: Span, places: Mapping[BlockShape, tuple[BlockStack, int]]
) -> Iterator[Range]:
    """The state of the blocks in `part` of the owned span; `places` gives each shape's stack."""
    before = grid.blocks_by_shape(owned.start)
    upto = grid.blocks_by_shape(part.start)
    row_groups = grid.row_group_from(part.start), grid.row_group_from(part.stop), grid.row_groups
    fields: dict[str, list[tuple[BlockRun, Tensor]]] = {field: [] for field in SAVED}
    for run in grid.runs(part.start, part.stop):
        stack, begin = places[run.shape]
        begin += upto[run.shape] - before[run.shape]
        upto[run.shape] += run.num_blocks
        for field, tensor in stack.state.items():
            fields[field].append((run, tensor[begin : begin + run.num_blocks]))
    for field, members in fields.items():
        if members:
            start, stop, total = (saved_offset(field, grid, row_group) for row_group in row_groups)
            pieces = [_piece(field, grid, run, rows, start) for run, rows in members]
            yield Range(f"{field}/{name}", start, stop - start, total, members[0][1].dtype, pieces)


def _piece(field: str, grid: Grid, run: BlockRun, rows: Tensor, start: int) -> RangePiece:
    """A field of a run of blocks, by row group, and its places in the range from `start` on."""
    # Before it in its row group: blocks of as many columns as the grid's.
    row_group, before = divmod(run.first_block, grid.pieces)
    shape: tuple[int, ...] = (rows[0].numel(),)
    strides: tuple[int, ...]
    symmetric = field == "fisher" and rows.dim() == 3
    columns = run.shape.columns
    if field == "momentum":  # element by element, as the parameter has them
        shape, strides, offset = (run.shape.rows, columns), (columns, run.row_stride, 1), before * grid.columns
    else:
        shape = (columns, columns) if symmetric else shape
        whole = run.shape._replace(columns=grid.columns)
        strides, offset = (saved_numel(field, run.shape), 1), before * saved_numel(field, whole)
    first, second = (saved_offset(field, grid, number) for number in (row_group, row_group + 1))
    stride = second - first if run.row_groups > 1 else 0
    return RangePiece(
        rows.view(run.row_groups, run.count, *shape), first + offset - start, (stride, *strides), symmetric
    )
