"""One rank's share of the blocks of some parameters: where its elements come from, and its state.

The rank's own blocks are stepped chunk by chunk, so that the updates of one can travel while the
next is computed, and what a step needs beside the state is of a chunk's size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import reduce
from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from adafisher_dist.blocks import sharding
from adafisher_dist.blocks.cost import PlanSummary
from adafisher_dist.blocks.fields import fields
from adafisher_dist.blocks.grid import Grid, grid_of
from adafisher_dist.layouts.storage import Parameter, Storage
from adafisher_dist.numerics import block_step, fisher
from adafisher_dist.numerics.block_stack import BlockStack, Numbers
from adafisher_dist.numerics.block_step import StepContext, update_blocks
from adafisher_dist.settings import StateConfig
from adafisher_dist.state.stacking import Chunk, ChunkRows, Segment, Stacks, stack_blocks

if TYPE_CHECKING:
    from adafisher_dist.state.offload import Offloaded


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
        configs: for each of those groups, the settings that its state was built for.
        grids: for each parameter.
        assignment: which blocks each rank owns, and in which chunk they are.
        blocks: of this rank.
        cut: for each rank, the row groups that it owns and does not store whole.
        counters: (parameters, 2) int64 on the CPU: steps t and Fisher updates k of each.
        stored: for each stored tensor, what this rank held of it when the shard was built.
        views: for each stored tensor, views of its state, by name: what `optimizer.state` holds.
        checked: whether the ranks have compared their plans.
        removed: the numbers of the stored tensors that the user has taken out of the param groups,
            or replaced by others that do not fit in their places. Nobody gives them a gradient, or
            sees their state, any more.
        absent: the numbers of those that stand in no param group now, and whose state
            `optimizer.state` still has: they may come back.
        offloaded: the state, while it is on the host; None while it is on its device.
        tensor_of_parameter: for each parameter, the number of the stored tensor that holds it.
        first_elements: by stored tensor, where each holds one parameter: that one's number, and the
            first element that is here.
    """

    storage: Storage
    groups: Sequence[int]
    configs: Sequence[StateConfig]
    grids: Sequence[Grid]
    assignment: sharding.Assignment
    blocks: Stacks
    cut: Sequence[sharding.Spans]
    counters: Tensor
    stored: list[TensorSpec]
    views: list[dict[str, Tensor]]
    checked: bool = False
    removed: set[int] = field(default_factory=set)
    absent: set[int] = field(default_factory=set)
    offloaded: Offloaded | None = None
    tensor_of_parameter: Numbers = field(init=False)
    first_elements: dict[int, tuple[int, int]] = field(init=False)

    def __post_init__(self) -> None:
        self.tensor_of_parameter = np.array([parameter.tensor for parameter in self.storage.parameters], dtype=np.int64)
        here = self.storage.stored_spans[self.storage.group.rank]
        self.first_elements = {p.tensor: (p.span.parameter, p.span.start - p.offset) for p in here}

    @property
    def stacks(self) -> list[BlockStack]:
        """Of this rank."""
        return self.blocks.all

    @property
    def by_parameter(self) -> list[list[Segment]]:
        """For each stack, the blocks of each parameter."""
        return self.blocks.by_parameter

    @property
    def group_of_parameter(self) -> list[int]:
        """For each parameter, the number of its param group within this shard."""
        return [self.groups[parameter.tensor] for parameter in self.storage.parameters]

    @property
    def device(self) -> torch.device:
        """Where the state is."""
        return self.blocks.staging.device

    @property
    def owned(self) -> Sequence[sharding.Spans]:
        """For each rank, the spans of its blocks."""
        return self.assignment.owned

    @property
    def plan_summary(self) -> PlanSummary:
        """What tells how much this rank and the others hold and send."""
        groups = self.group_of_parameter
        configs = [self.configs[group] for group in groups]
        itemsize = gather_dtype(self).itemsize
        storage = self.storage
        where = storage.stored_spans, self.assignment, self.cut
        return PlanSummary(self.grids, configs, groups, *where, storage.replicated, itemsize)

    @property
    def active(self) -> list[tuple[int, Parameter]]:
        """The parameters, with their numbers, whose tensors stand in the param groups."""
        return [(i, p) for i, p in enumerate(self.storage.parameters) if self.stands(p.tensor)]

    @property
    def active_tensors(self) -> list[Tensor]:
        """The stored tensors that stand in the param groups."""
        return [tensor for index, tensor in enumerate(self.storage.tensors) if self.stands(index)]

    def stands(self, index: int) -> bool:
        """Whether a stored tensor, by its number, stands in the param groups."""
        return index not in self.removed and index not in self.absent

    @property
    def stepped(self) -> bool:
        """Whether any of its parameters has seen a step."""
        return bool(self.counters.any())

    @property
    def numels(self) -> list[int]:
        """Of each stored tensor, how many elements this rank holds."""
        return [stored.shape.numel() for stored in self.stored]

    def digest(self) -> int:
        """A fingerprint of the plan: the same on all ranks.

        State dicts keep it, so it is made of plain values, whose text no renaming changes.
        """
        shapes = [tuple(parameter.shape) for parameter in self.storage.parameters]
        dtypes = [str(stored.dtype) for stored in self.stored]
        configs = [(*map(str, config),) for config in self.configs]
        owned = [sorted((span.parameter, span.start, span.stop) for span in spans) for spans in self.owned]
        return sharding.digest(self.storage.layout, shapes, dtypes, list(self.groups), configs, owned)


def build(storage: Storage, groups: Sequence[int], configs: Sequence[StateConfig], zeroed: bool = True) -> Shard:
    """Plan the blocks of the stored parameters and allocate this rank's state.

    See `block_stack.allocate` for `zeroed`.
    """
    parameters, rank = storage.parameters, storage.group.rank
    grids = [grid_of(p.shape, configs[groups[p.tensor]], p.whole) for p in parameters]
    assignment = sharding.assign(grids, storage.stored_spans, storage.replicated)
    own, held = (
        [by_rank[rank] for by_rank in assignment.chunks],
        [storage.values(i) for i in range(len(storage.tensors))],
    )
    blocks = stack_blocks(own, storage.stored_spans[rank], grids, parameters, groups, configs, held, zeroed)
    cut = sharding.cut_by_boundaries(assignment, storage.stored_spans, grids) if not storage.replicated else ()
    counters = torch.zeros(len(parameters), 2, dtype=torch.int64, device="cpu")
    stored = [TensorSpec(tensor.shape, tensor.device, tensor.dtype) for tensor in held]
    views = _views(counters, parameters, blocks)
    if storage.one_each:  # on all ranks the same keys, as torch's checkpoint functions expect of a state
        for parameter, grid in zip(parameters, grids, strict=True):
            shapes = state_shapes(grid, configs[groups[parameter.tensor]])
            for key, (shape, dtype) in shapes.items():
                views[parameter.tensor].setdefault(key, torch.empty(0, *shape[1:], dtype=dtype, device=held[0].device))
    return Shard(storage, groups, configs, grids, assignment, blocks, cut, counters, stored, views)


def state_shapes(grid: Grid, config: StateConfig) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of each key of a parameter's whole state, but its counters."""
    return {
        f"{field.name}_{block.name}": ((count, *field.shape), field.dtype)
        for block, count in grid.blocks_by_shape(grid.numel).items()
        for field in fields(block, config)
    }


def _views(counters: Tensor, parameters: Sequence[Parameter], blocks: Stacks) -> list[dict[str, Tensor]]:
    views = _counter_views(counters, parameters)
    for stack, segments in zip(blocks.all, blocks.by_parameter, strict=True):
        rows: dict[int, tuple[int, int]] = {}  # of each tensor: first, stop
        for segment in segments:
            tensor = parameters[segment.owner].tensor
            rows[tensor] = rows.get(tensor, (segment.start, 0))[0], segment.stop
        for tensor, (start, stop) in rows.items():
            views[tensor] |= stack.named_state(start, stop)
    return views


def _counter_views(counters: Tensor, parameters: Sequence[Parameter]) -> list[dict[str, Tensor]]:
    """For each stored tensor, 0-d if it is one parameter, else (n,) for the n that it holds."""
    views = []
    for _, members in groupby(range(len(parameters)), key=lambda number: parameters[number].tensor):
        numbers = list(members)
        own = counters[numbers[0]] if len(numbers) == 1 else counters[numbers[0] : numbers[-1] + 1].T
        views.append({"step": own[0], "fisher_updates": own[1]})
    return views


def compute_chunk(chunk: Chunk, contexts: Sequence[StepContext | None]) -> None:
    """Turn the gradients of a chunk, which are in the workspace, into updates; in full precision.

    Args:
        chunk: the chunk.
        contexts: for each parameter, the same object where they are at the same step of the same
            param group; None where it has no gradient: what is in its place is nobody's.
    """
    for rows in chunk:
        for start, stop, context in _runs(rows, contexts):
            if context is not None:
                for part, gradient_NRB in rows.parts(start, stop):
                    update_blocks(part, gradient_NRB, context)


def waits_for_nothing(shard: Shard) -> bool:
    """Whether a step of these blocks never reads from the device; the same on all ranks.

    It does not depend on which blocks a rank owns.
    """
    return all(map(block_step.waits_for_nothing, shard.configs))


def gather_dtype(shard: Shard) -> torch.dtype:
    """The dtype that replicated weights are gathered in: theirs; if several, one that holds all."""
    return reduce(torch.promote_types, (stored.dtype for stored in shard.stored))


def gradient_limit(shard: Shard) -> float:
    """The largest gradient element that the shard's blocks can square and sum up."""
    return min(fisher.gradient_limit(s.compute_dtype, s.block_size) for s in shard.configs)


def _runs(rows: ChunkRows, contexts: Sequence[StepContext | None]) -> Iterator[tuple[int, int, StepContext | None]]:
    """Consecutive blocks of parameters that have the same context, as (start, stop, context)."""
    first = contexts[rows.owners[0]]
    if all(contexts[owner] is first for owner in rows.owners):  # as nearly always
        yield 0, len(rows.blocks), first
        return
    for _, run in groupby(rows.segments, key=lambda segment: id(contexts[segment.owner])):
        members = list(run)
        yield members[0].start, members[-1].stop, contexts[members[0].owner]
