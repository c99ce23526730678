"""How a rank's blocks are stacked: those of one shape and one param group, of any parameter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from adafisher_dist.blocks import sharding
from adafisher_dist.blocks.grid import BlockRun, BlockShape, Grid
from adafisher_dist.layouts.storage import Parameter
from adafisher_dist.numerics.block_stack import BlockStack, Numbers, allocate
from adafisher_dist.settings import StateConfig


@dataclass(frozen=True, slots=True)
class Segment:
    """Blocks [start, stop) of a stack; `owner` is the number of a parameter."""

    owner: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True, eq=False)
class StackRows:
    """The blocks of a stack in one chunk: their parameters, their elements in the flat buffer."""

    stack: BlockStack
    segments: list[Segment]
    in_buffer: list[Tensor]
    in_stack: list[Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class Chunk:
    """Elements [start, stop) of the flat buffer."""

    start: int
    stop: int
    rows: list[StackRows]


@dataclass(slots=True)
class _Planned:
    """A run of blocks: the first one's number in its stack, and its offset in the flat buffer."""

    run: BlockRun
    parameter: int
    begin: int
    offset: int


_Key = tuple[int, BlockShape]  # param group


def stack_blocks(
    flat_buffer: Tensor, chunks: Sequence[sharding.Spans], grids: Sequence[Grid], parameters: Sequence[Parameter],
    groups: Sequence[int], configs: Sequence[StateConfig], zeroed: bool,
) -> tuple[list[Chunk], list[BlockStack], list[list[Segment]]]:  # fmt: skip
    """Sort the chunks' blocks into stacks, allocate these, pair their elements with the buffer's.

    Returns the chunks, the stacks, and for each stack the blocks of each parameter.
    """
    tensors = [parameter.tensor for parameter in parameters]
    positions = [parameter.info.position for parameter in parameters]
    planned: list[dict[_Key, list[_Planned]]] = []
    counts: dict[_Key, int] = {}
    offset = 0
    for spans in chunks:
        planned.append({})
        for span in spans:
            for run in grids[span.parameter].runs(span.start, span.stop):
                key = (groups[tensors[span.parameter]], run.shape)
                begin = counts.get(key, 0)
                entry = _Planned(run, span.parameter, begin, offset + run.start - span.start)
                planned[-1].setdefault(key, []).append(entry)
                counts[key] = begin + run.num_blocks
            offset += len(span)
    entries = {key: [entry for chunk in planned for entry in chunk.get(key, ())] for key in counts}
    stacks = {
        key: allocate(*key, configs[key[0]], _numbers(own, positions, configs[key[0]]), flat_buffer.device, zeroed)
        for key, own in entries.items()
    }
    result, start = [], 0
    for spans, by_key in zip(chunks, planned, strict=True):
        stop = start + sharding.count(spans)
        result.append(Chunk(start, stop, [_rows(flat_buffer, stacks[key], by_key[key]) for key in by_key]))
        start = stop
    by_parameter = [_segments(entries[key]) for key in stacks]
    return result, list(stacks.values()), by_parameter


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


def _rows(flat_buffer: Tensor, stack: BlockStack, entries: list[_Planned]) -> StackRows:
    in_buffer, in_stack = [], []
    for entry in entries:
        run, (columns, rows, _) = entry.run, entry.run.shape
        shape = (run.row_groups, run.count, rows, columns)
        in_buffer.append(flat_buffer.as_strided(shape, (run.stride, columns, run.row_stride, 1), entry.offset))
        in_stack.append(stack.gradient_NRB[entry.begin : entry.begin + run.num_blocks].view(shape))
    return StackRows(stack, _segments(entries), in_buffer, in_stack)


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
