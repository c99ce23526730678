"""One rank's share of the blocks of some parameters: where its elements come from, and its state.

The rank's own elements stand in a row in the *flat buffer*, in the order of the plan. The flat buffer is cut into chunks, so that
the updates of one can travel while the next is computed; within a chunk, blocks of one size are stacked in a `Batch`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from adafisher_dist.blocks import sharding
from adafisher_dist.blocks.cost import PlanSummary
from adafisher_dist.blocks.grid import Grid, Kind, Strip, grid_of
from adafisher_dist.layouts import Parameter, Storage
from adafisher_dist.numerics import batch as stacked
from adafisher_dist.numerics import fisher
from adafisher_dist.numerics.batch import Batch, Numbers, allocate
from adafisher_dist.settings import StateConfig


@dataclass(frozen=True, slots=True)
class Segment:
    """Rows [start, stop) of a batch; `owner` is the number of a parameter."""

    owner: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """The rows of one batch that lie in one chunk: of which parameters, and the same elements in the flat buffer."""

    batch: Batch
    segments: list[Segment]
    in_buffer: list[Tensor]
    in_batch: list[Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class Chunk:
    """Elements [start, stop) of the flat buffer."""

    start: int
    stop: int
    rows: list[Rows]


class TensorSpec(NamedTuple):
    """The shape, device and dtype of what a rank holds of a stored tensor."""

    shape: torch.Size
    device: torch.device
    dtype: torch.dtype


@dataclass(slots=True, eq=False)
class Shard:
    """See the module's docstring.

    Attributes:
        storage: what the layout told.
        groups: for each stored tensor, the number of its param group within this shard.
        structures: for each of those groups, the settings that its state was built for.
        grids: for each parameter.
        assignment: which blocks each rank owns, and in which chunk they are.
        flat_buffer: gradients on the way in, updates on the way out; compute dtype.
        chunks: of this rank.
        batches: of this rank.
        by_parameter: for each batch, the rows of each parameter.
        counters: (parameters, 2) int64 on the CPU: steps t and Fisher updates k of each.
        stored: for each stored tensor, what this rank held of it when the shard was built.
        views: for each stored tensor, views of its state, by name: what `optimizer.state` holds.
        checked: whether the ranks have compared their plans.
        removed: the numbers of the stored tensors that the user has taken out of the param groups, or replaced by
            others that do not fit in their places. Nobody gives them a gradient, or sees their state, any more.
    """

    storage: Storage
    groups: Sequence[int]
    structures: Sequence[StateConfig]
    grids: Sequence[Grid]
    assignment: sharding.Assignment
    flat_buffer: Tensor
    chunks: list[Chunk]
    batches: list[Batch]
    by_parameter: list[list[Segment]]
    counters: Tensor
    stored: list[TensorSpec]
    views: list[dict[str, Tensor]]
    checked: bool = False
    removed: set[int] = field(default_factory=set)

    @property
    def owned(self) -> Sequence[sharding.Spans]:
        """For each rank, the spans of its blocks."""
        return self.assignment.owned

    @property
    def plan_summary(self) -> PlanSummary:
        """What tells how much this rank and the others hold and send."""
        structures = [self.structures[self.groups[parameter.tensor]] for parameter in self.storage.parameters]
        itemsize = gather_dtype(self).itemsize
        storage = self.storage
        return PlanSummary(self.grids, structures, storage.stored_spans, self.assignment, storage.replicated, itemsize)

    @property
    def active(self) -> list[tuple[int, Parameter]]:
        """The parameters, with their numbers, but those of retired tensors."""
        return [(i, p) for i, p in enumerate(self.storage.parameters) if p.tensor not in self.removed]

    @property
    def active_tensors(self) -> list[Tensor]:
        """The stored tensors that stand in the param groups."""
        return [tensor for index, tensor in enumerate(self.storage.tensors) if index not in self.removed]

    @property
    def stepped(self) -> bool:
        """Whether any of its parameters has seen a step."""
        return bool(self.counters.any())

    @property
    def numels(self) -> list[int]:
        """Of each stored tensor, how many elements this rank holds."""
        return [stored.shape.numel() for stored in self.stored]

    def digest(self) -> int:
        """A fingerprint of the plan: the same on all ranks."""
        shapes = [parameter.shape for parameter in self.storage.parameters]
        dtypes = [stored.dtype for stored in self.stored]
        return sharding.digest(self.storage.layout, shapes, dtypes, self.groups, self.structures, self.owned)


def build(storage: Storage, groups: Sequence[int], structures: Sequence[StateConfig], zeroed: bool = True) -> Shard:
    """Plan the blocks of the stored parameters and allocate this rank's state; see `allocate` for `zeroed`."""
    parameters, rank = storage.parameters, storage.group.rank
    grids = [grid_of(parameter.shape, structures[groups[parameter.tensor]]) for parameter in parameters]
    assignment = sharding.assign(grids, storage.stored_spans, storage.replicated)
    numel = sharding.count(assignment.owned[rank])
    flat_buffer = torch.zeros(numel, dtype=structures[0].compute_dtype, device=storage.values(0).device)
    own = [by_rank[rank] for by_rank in assignment.chunks]
    chunks, batches, by_parameter = _stack(flat_buffer, own, grids, parameters, groups, structures, zeroed)
    counters = torch.zeros(len(parameters), 2, dtype=torch.int64)
    held = [storage.values(index) for index in range(len(storage.tensors))]
    stored = [TensorSpec(tensor.shape, tensor.device, tensor.dtype) for tensor in held]
    views = _views(counters, parameters, batches, by_parameter)
    if storage.one_each:  # on all ranks the same keys, as torch's checkpoint functions expect of a state
        for parameter, grid in zip(parameters, grids, strict=True):
            shapes = state_shapes(grid, structures[groups[parameter.tensor]])
            for key, (shape, dtype) in shapes.items():
                views[parameter.tensor].setdefault(
                    key, torch.empty(0, *shape[1:], dtype=dtype, device=flat_buffer.device)
                )
    return Shard(
        storage, groups, structures, grids, assignment, flat_buffer, chunks, batches, by_parameter, counters, stored, views,
    )  # fmt: skip


def state_shapes(grid: Grid, structure: StateConfig) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of each key of a parameter's whole state, but its counters."""
    wide = structure.compute_dtype
    shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    for kind, rows in grid.blocks_by_shape(grid.numel).items():
        size, depth, dense = kind
        shapes[f"momentum_{kind.name}"] = (rows, depth, size), wide
        shapes[f"fisher_{kind.name}"] = (rows, *stacked.fisher_shape(kind, structure)), structure.fisher_dtype
        if depth > 1:
            shapes[f"square_{kind.name}"] = (rows, depth), wide
        if structure.keeps_factors and dense:
            shapes[f"factor_{kind.name}"] = (rows, size, size), wide
            shapes[f"curvature_{kind.name}"] = (rows,), wide
    return shapes


def _views(
    counters: Tensor, parameters: Sequence[Parameter], batches: Sequence[Batch],
    by_parameter: Sequence[Sequence[Segment]],
) -> list[dict[str, Tensor]]:  # fmt: skip
    views = _counter_views(counters, parameters)
    for batch, segments in zip(batches, by_parameter, strict=True):
        rows: dict[int, tuple[int, int]] = {}  # of each tensor: first, stop
        for segment in segments:
            tensor = parameters[segment.owner].tensor
            rows[tensor] = rows.get(tensor, (segment.start, 0))[0], segment.stop
        for tensor, (start, stop) in rows.items():
            views[tensor] |= batch.state(start, stop)
    return views


def _counter_views(counters: Tensor, parameters: Sequence[Parameter]) -> list[dict[str, Tensor]]:
    """Of each stored tensor: 0-d where it is one parameter, else (n,) for the n parameters that it holds."""
    views = []
    for _, members in groupby(range(len(parameters)), key=lambda number: parameters[number].tensor):
        numbers = list(members)
        own = counters[numbers[0]] if len(numbers) == 1 else counters[numbers[0] : numbers[-1] + 1].T
        views.append({"step": own[0], "fisher_updates": own[1]})
    return views


Time = tuple[int, int] | None  # t and k of a parameter; None where it has no gradient


def compute(
    chunk: Chunk, times: Sequence[Time], settings: Sequence[Mapping[str, Any]], should_step: Tensor | None = None
) -> None:
    """Turn the gradients in a chunk of the flat buffer into updates.

    Args:
        chunk: the chunk.
        times: for each parameter; the elements of one without gradient are zero, and stay so.
        settings: for each param group of the shard, its settings.
        should_step: see `batch.compute`.
    """
    alike = len(set(times)) == 1
    for rows in chunk.rows:
        torch._foreach_copy_(rows.in_batch, rows.in_buffer)
        runs = [(rows.segments[0].start, rows.segments[-1].stop, times[0])] if alike else _runs(rows.segments, times)
        for start, stop, time in runs:
            if time is not None:
                stacked.compute(rows.batch, start, stop, *time, settings[rows.batch.group], should_step)
        torch._foreach_copy_(rows.in_buffer, rows.in_batch)


def waits_for_nothing(shard: Shard) -> bool:
    """Whether a step of these blocks asks the device nothing; the same on all ranks, whichever blocks they own."""
    return all(map(stacked.waits_for_nothing, shard.structures))


def gather_dtype(shard: Shard) -> torch.dtype:
    """What weights are gathered in, where they are replicated: their own dtype; of several the one that holds all."""
    return reduce(torch.promote_types, (stored.dtype for stored in shard.stored))


def largest_gradient(shard: Shard) -> float:
    """The largest gradient element that the shard's blocks can square and sum up."""
    return min(fisher.largest_gradient(s.compute_dtype, s.block_size) for s in shard.structures)


def _runs(segments: Sequence[Segment], times: Sequence[Time]) -> Iterator[tuple[int, int, Time]]:
    """Consecutive rows whose parameters are at the same t and k, as (start, stop, (t, k) or None)."""
    for time, run in groupby(segments, key=lambda segment: times[segment.owner]):
        members = list(run)
        yield members[0].start, members[-1].stop, time


@dataclass(slots=True)
class _Planned:
    """Where a strip's rows begin in its batch, and its elements in the flat buffer."""

    strip: Strip
    parameter: int
    row: int
    offset: int


_Key = tuple[int, Kind]  # param group


def _stack(
    flat_buffer: Tensor, chunks: Sequence[sharding.Spans], grids: Sequence[Grid], parameters: Sequence[Parameter],
    groups: Sequence[int], structures: Sequence[StateConfig], zeroed: bool,
) -> tuple[list[Chunk], list[Batch], list[list[Segment]]]:  # fmt: skip
    """Sort the strips of the chunks into batches, allocate those, and pair their elements with the flat buffer's."""
    tensors = [parameter.tensor for parameter in parameters]
    positions = [parameter.info.position for parameter in parameters]
    planned: list[dict[_Key, list[_Planned]]] = []
    rows: dict[_Key, int] = {}
    offset = 0
    for spans in chunks:
        planned.append({})
        for span in spans:
            for strip in grids[span.parameter].strips(span.start, span.stop):
                key = (groups[tensors[span.parameter]], strip.kind)
                begin = rows.get(key, 0)
                entry = _Planned(strip, span.parameter, begin, offset + strip.start - span.start)
                planned[-1].setdefault(key, []).append(entry)
                rows[key] = begin + strip.rows
            offset += len(span)
    entries = {key: [entry for chunk in planned for entry in chunk.get(key, ())] for key in rows}
    batches = {
        key: allocate(
            *key, structures[key[0]], _numbers(own, positions, structures[key[0]]), flat_buffer.device, zeroed
        )
        for key, own in entries.items()
    }
    result, start = [], 0
    for spans, by_key in zip(chunks, planned, strict=True):
        stop = start + sharding.count(spans)
        result.append(Chunk(start, stop, [_rows(flat_buffer, batches[key], by_key[key]) for key in by_key]))
        start = stop
    by_parameter = [_segments(entries[key]) for key in batches]
    return result, list(batches.values()), by_parameter


def _numbers(entries: list[_Planned], positions: Sequence[int], structure: StateConfig) -> Numbers:
    """The number q of each row's block: its index on the parameter's grid plus the parameter's position.

    Of elements without blocks: the index of the element, likewise, where their rounding asks for it; else zeros, which
    take no memory.
    """
    if not entries[0].strip.dense and structure.fisher_dtype != torch.bfloat16:
        return np.broadcast_to(np.int64(0), sum(entry.strip.rows for entry in entries))
    numbers = []
    for entry in entries:
        strip = entry.strip
        if not strip.dense:
            numbers.append(positions[entry.parameter] + strip.start + np.arange(strip.rows))
            continue
        row_groups = np.arange(strip.row_groups)[:, None] * strip.blocks_per_row_group
        numbers.append((positions[entry.parameter] + strip.block + row_groups + np.arange(strip.count)).ravel())
    return np.concatenate(numbers).astype(np.int64)


def _rows(flat_buffer: Tensor, batch: Batch, entries: list[_Planned]) -> Rows:
    in_buffer, in_batch = [], []
    for entry in entries:
        strip = entry.strip
        shape = (strip.row_groups, strip.count, strip.depth, strip.size)
        in_buffer.append(flat_buffer.as_strided(shape, (strip.stride, strip.size, strip.row, 1), entry.offset))
        in_batch.append(batch.gradient_NDB[entry.row : entry.row + strip.rows].view(shape))
    return Rows(batch, _segments(entries), in_buffer, in_batch)


def _segments(entries: list[_Planned]) -> list[Segment]:
    """The rows of consecutive entries, those of one parameter together."""
    segments: list[Segment] = []
    for entry in entries:
        owner = entry.parameter
        stop = entry.row + entry.strip.rows
        if segments and segments[-1].owner == owner:
            segments[-1] = Segment(owner, segments[-1].start, stop)
        else:
            segments.append(Segment(owner, entry.row, stop))
    return segments
