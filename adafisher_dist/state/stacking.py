"""How a rank's blocks are stacked: those of one shape and one param group, of any parameter.

They are stepped chunk by chunk. Gradients are brought to the blocks of a chunk from where they are
stored, into a workspace that all chunks share, and updates go from there to the weights; only of
row groups that a boundary between ranks cuts the elements are staged, since a part of them comes
from other ranks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from adafisher_dist.blocks import sharding
from adafisher_dist.blocks.grid import BlockRun, BlockShape, Grid
from adafisher_dist.blocks.sharding import Spans, StoredSpan
from adafisher_dist.layouts.storage import Parameter
from adafisher_dist.numerics import huge_pages
from adafisher_dist.numerics.block_stack import BlockStack, Numbers, allocate
from adafisher_dist.settings import StateConfig
from adafisher_dist.state.runs import Lattice, Run, merged, run_of


@dataclass(frozen=True, slots=True)
class Segment:
    """Blocks [start, stop) of a stack; `owner` is the number of a parameter."""

    owner: int
    start: int
    stop: int


@dataclass(slots=True, eq=False)
class ChunkRows:
    """The blocks of a stack in one chunk.

    Attributes:
        blocks: their state.
        gradient_NRB: gradients, then updates: a part of the workspace.
        segments: their parameters; counted within `blocks`.
        stored: those whose elements this rank stores.
        in_staging: views of the staging buffer, of those that it does not store whole.
        staged: the same blocks in the workspace.
        owners: of the segments.
    """

    blocks: BlockStack
    gradient_NRB: Tensor
    segments: list[Segment]
    stored: list[Run]
    in_staging: list[Tensor]
    staged: list[Tensor]
    owners: list[int]
    _whole: list[tuple[BlockStack, Tensor]] = field(default_factory=list)

    def parts(self, start: int, stop: int) -> Iterable[tuple[BlockStack, Tensor]]:
        """What is stepped at a time of blocks [start, stop); those of all are kept."""
        if (start, stop) != (0, len(self.blocks)):
            return self._parts(start, stop)
        if not self._whole:
            self._whole.extend(self._parts(start, stop))
        return self._whole

    def _parts(self, start: int, stop: int) -> Iterator[tuple[BlockStack, Tensor]]:
        for part, where in self.blocks.parts(start, stop):
            yield part, self.gradient_NRB[where]


Chunk = list[ChunkRows]


@dataclass(frozen=True, slots=True, eq=False)
class Stacks:
    """A rank's blocks.

    Attributes:
        all: the stacks.
        by_parameter: for each stack, the blocks of each parameter.
        chunks: in the order in which they are stepped.
        staging: elements of the row groups that this rank owns and does not store whole; compute
            dtype.
    """

    all: list[BlockStack]
    by_parameter: list[list[Segment]]
    chunks: list[Chunk]
    staging: Tensor


@dataclass(slots=True)
class _Planned:
    """A run of blocks: where its elements are, and the first block's number in its stack.

    Attributes:
        run: of the parameter's grid.
        parameter: its number.
        begin: the number in the stack.
        tensor: the number of the stored tensor; None for the staging buffer.
        offset: of the first element there.
        in_chunk: where all elements of the chunk stand in a row.
    """

    run: BlockRun
    parameter: int
    begin: int
    tensor: int | None
    offset: int
    in_chunk: int


_Key = tuple[int, BlockShape]  # param group


def stack_blocks(
    chunks: Sequence[Spans], stored: Sequence[StoredSpan], grids: Sequence[Grid], parameters: Sequence[Parameter],
    groups: Sequence[int], configs: Sequence[StateConfig], held: Sequence[Tensor], zeroed: bool,
) -> Stacks:  # fmt: skip
    """Sort the chunks' blocks into stacks, allocate these, and plan the ways of their elements.

    Args:
        chunks: of this rank.
        stored: what this rank stores.
        grids: of each parameter.
        parameters: they.
        groups: for each stored tensor, the number of its param group.
        configs: for each of those.
        held: what this rank holds of each stored tensor; the state is on the same device.
        zeroed: see `block_stack.allocate`.
    """
    places = sharding.by_parameter(stored)
    planned: list[dict[_Key, list[_Planned]]] = []
    counts: dict[_Key, int] = {}
    staged = 0
    for spans in chunks:
        planned.append({})
        in_chunk = 0
        for span in spans:
            grid = grids[span.parameter]
            for part, place in sharding.split_where_cut(span, places[span.parameter], grid):
                # From an element's number in the parameter to its place.
                shift = staged - part.start if place is None else place.offset - place.span.start
                for run in grid.runs(part.start, part.stop):
                    key = (groups[parameters[span.parameter].tensor], run.shape)
                    begin = counts.get(key, 0)
                    tensor = None if place is None else place.tensor
                    where = in_chunk + run.start - span.start
                    entry = _Planned(run, span.parameter, begin, tensor, run.start + shift, where)
                    planned[-1].setdefault(key, []).append(entry)
                    counts[key] = begin + run.num_blocks
                staged += len(part) if place is None else 0
            in_chunk += len(span)
    device = held[0].device
    entries = {key: [entry for chunk in planned for entry in chunk.get(key, ())] for key in counts}
    positions = [parameter.info.position for parameter in parameters]
    stacks = {
        key: allocate(*key, configs[key[0]], _numbers(own, positions, configs[key[0]]), device, zeroed)
        for key, own in entries.items()
    }
    dtype = configs[0].compute_dtype
    of_parameter = [groups[parameter.tensor] for parameter in parameters]
    longest = max((sharding.workspace_numel(spans, grids, of_parameter) for spans in chunks), default=0)
    work = huge_pages.zeros(longest, dtype=dtype, device=device)
    staging = huge_pages.zeros(staged, dtype=dtype, device=device)
    return Stacks(
        list(stacks.values()),
        [_segments(entries[key]) for key in stacks],
        [list(_rows_of(by_key, stacks, work, staging, [tensor.shape for tensor in held])) for by_key in planned],
        staging,
    )


def _numbers(entries: list[_Planned], positions: Sequence[int], config: StateConfig) -> Numbers:
    """The number q of each block: its index on the parameter's grid plus the parameter's position.

    Of elements without blocks: the index of the element, likewise, where their rounding asks for
    it; else zeros, which take no memory.
    """
    if not entries[0].run.shape.dense and config.fisher_dtype != torch.bfloat16:
        return np.broadcast_to(np.int64(0), sum(entry.run.num_blocks for entry in entries))
    numbers = []
    for entry in entries:
        run = entry.run
        if not run.shape.dense:
            numbers.append(positions[entry.parameter] + run.start + np.arange(run.num_blocks))
            continue
        row_groups = np.arange(run.row_groups)[:, None] * run.blocks_per_row_group
        numbers.append((positions[entry.parameter] + run.first_block + row_groups + np.arange(run.count)).ravel())
    return np.concatenate(numbers).astype(np.int64)


def _numel(shape: BlockShape, entries: list[_Planned]) -> int:
    return sum(entry.run.num_blocks for entry in entries) * shape.rows * shape.columns


def _rows_of(
    by_key: Mapping[_Key, list[_Planned]], stacks: Mapping[_Key, BlockStack], work: Tensor, staging: Tensor,
    shapes: Sequence[torch.Size],
) -> Iterator[ChunkRows]:  # fmt: skip
    """The blocks of a chunk, by stack: they stand in the workspace one stack after the other."""
    begun = 0
    for key, entries in by_key.items():
        shape, numel = key[1], _numel(key[1], entries)
        gradient_NRB = work[begun : begun + numel].view(-1, shape.rows, shape.columns)
        begun += sharding.aligned(numel)
        first = entries[0].begin
        blocks = stacks[key].rows(first, first + len(gradient_NRB))
        segments = [Segment(s.owner, s.start - first, s.stop - first) for s in _segments(entries)]
        rows = ChunkRows(blocks, gradient_NRB, segments, [], [], [], [segment.owner for segment in segments])
        lattices = [_lattice_of(entry, shape, entry.begin - first) for entry in entries]
        for lattice in merged(merged(lattices)):
            in_work = lattice.of_work(gradient_NRB)
            if lattice.tensor is None:
                rows.in_staging.append(staging.as_strided(lattice.sizes, lattice.strides, lattice.offset))
                rows.staged.append(in_work)
            else:
                rows.stored.append(run_of(lattice, shapes[lattice.tensor], in_work))
        yield rows


def _lattice_of(entry: _Planned, shape: BlockShape, number: int) -> Lattice:
    """A run of blocks from block `number` of the stack's part of the workspace on."""
    run, numel = entry.run, shape.rows * shape.columns
    return Lattice(
        entry.tensor,
        (run.row_groups, run.count, shape.rows, shape.columns),
        (run.stride, shape.columns, run.row_stride, 1),
        (run.count * numel, numel, shape.columns, 1),
        entry.offset,
        entry.in_chunk,
        number * numel,
    )


def _segments(entries: list[_Planned]) -> list[Segment]:
    """The blocks of consecutive entries, those of one parameter together."""
    segments: list[Segment] = []
    for entry in entries:
        owner = entry.parameter
        stop = entry.begin + entry.run.num_blocks
        if segments and segments[-1].owner == owner:
            segments[-1] = Segment(owner, segments[-1].start, stop)
        else:
            segments.append(Segment(owner, entry.begin, stop))
    return segments
