"""How gradients reach the owners of their blocks, and results come back to the stored weights.

Each layout has its own `Exchange`, with the same two calls in the order of a step: `collect`
(local), and `chunks` (a collective: brings gradients to the owners, has the chunks computed, and
brings back what changes the weights).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from typing import Protocol

from torch import Tensor

from adafisher_dist.blocks import sharding
from adafisher_dist.comm import collectives
from adafisher_dist.comm.collectives import CommBuffer
from adafisher_dist.comm.deferred_errors import DeferredErrors
from adafisher_dist.numerics import huge_pages
from adafisher_dist.state.shard import Shard, gather_dtype
from adafisher_dist.state.stacking import Chunk
from adafisher_dist.stepping.copy_plan import CopyPlan
from adafisher_dist.stepping.inputs import Inputs, largest_gradient, stored_stretches
from adafisher_dist.stepping.updating import (
    Observe,
    PiecesByGroup,
    apply_runs,
    change_stored,
    copy_all,
    copy_plan_of,
    in_a_row,
    part_of,
    read_gradients,
)


class Exchange(Protocol):
    """What a step needs of a layout."""

    shard: Shard

    @property
    def buffers(self) -> list[CommBuffer]:
        """What travels is in these; no step needs what one before has left there."""

    def collect(self, inputs: Inputs) -> Tensor:
        """Bring this rank's gradients to where they leave from. Local.

        Returns their largest absolute element, 0-d.
        """

    def chunks(
        self, inputs: Inputs, should_step: Tensor | None, errors: DeferredErrors, observe: Observe | None
    ) -> Iterator[Chunk]:
        """Bring all gradients to the owners, and the results to the stored weights. A collective.

        Yields the chunks whose gradients are in the workspace; whoever asks for the next one has
        turned them into updates. After an error this rank goes on through the collectives, and
        leaves its part of the weights as it is.

        Args:
            inputs: of this call.
            should_step: None, or 0-d on the device: 0 if the step is to change nothing, and all
                updates are zeros.
            errors: of this rank.
            observe: what sees the changes.
        """


def exchange_for(shard: Shard) -> Exchange:
    """The way of the shard's layout."""
    if not shard.storage.replicated:
        return AllToAll(shard)
    return AllGather(shard) if shard.storage.group.size > 1 else Local(shard)


class Local:
    """One process has all gradients, all blocks and all weights."""

    def __init__(self, shard: Shard) -> None:
        self.shard = shard
        self._stored = stored_stretches(shard)

    @property
    def buffers(self) -> list[CommBuffer]:
        """Nothing travels."""
        return []

    def collect(self, inputs: Inputs) -> Tensor:
        """Gradients are read when their chunk's turn comes."""
        return largest_gradient(inputs, self._stored, self.shard)

    def chunks(
        self, inputs: Inputs, should_step: Tensor | None, errors: DeferredErrors, observe: Observe | None
    ) -> Iterator[Chunk]:
        """Nothing is sent."""
        for chunk in self.shard.blocks.chunks:
            errors.attempt(partial(read_gradients, chunk, inputs))
            yield chunk
            errors.attempt(partial(change_stored, self.shard, chunk, inputs, should_step, observe))


class AllGather(Local):
    """All ranks have all gradients and weights: owners read theirs, and send new weights to all.

    Weights travel in their own precision, which loses nothing, and in bfloat16 takes half the bytes
    of the updates. A chunk is gathered while the next one is computed, in slices, of which two are
    under way at a time: of many ranks a chunk may be more than there is room for.
    """

    def __init__(self, shard: Shard) -> None:
        super().__init__(shard)
        group = shard.storage.group
        plan, dtype = shard.plan_summary, gather_dtype(shard)

        def buffers(turns: int, numel: int) -> list[CommBuffer]:
            made = (huge_pages.zeros(numel, dtype=dtype, device=shard.device) for _ in range(min(2, turns)))
            return [group.comm_buffer(buffer) for buffer in made]

        self.mine = buffers(len(plan.longest), max(plan.longest))
        self.everyone = buffers(len(plan.gathered), group.size * max(plan.gathered, default=0))
        places = sharding.by_parameter(shard.storage.stored_spans[group.rank])
        self.sent_plans = [
            copy_plan_of(sharding.pieces_of(places, own[group.rank], group.rank), self.mine[number % 2].tensor, shard)
            for number, own in enumerate(shard.assignment.chunks)
        ]
        turns = cycle(self.everyone)
        self.slices = [
            [self._slice(by_rank, *bounds, next(turns), places) for bounds in sharding.slices(longest, group.size)]
            for by_rank, longest in zip(shard.assignment.chunks, plan.longest, strict=True)
        ]
        self.sent_runs = [
            [[run.of_chunk(self.mine[number % 2].tensor) for run in rows.stored] for rows in chunk]
            for number, chunk in enumerate(shard.blocks.chunks)
        ]

    @property
    def buffers(self) -> list[CommBuffer]:
        """Own part and all parts of chunks."""
        return [*self.mine, *self.everyone]

    def _slice(
        self, by_rank: Sequence[sharding.Spans], start: int, stop: int, buffer: CommBuffer, places: sharding.Places
    ) -> _Slice:
        pieces, parts = [], []
        for rank, spans in enumerate(by_rank):
            part = buffer.tensor[rank * (stop - start) : (rank + 1) * (stop - start)]
            own = sharding.pieces_of(places, sharding.elements(spans, start, stop), rank)
            pieces += own
            parts += [part_of(part, piece) for piece in own]
        return _Slice(start, stop, buffer, CopyPlan(pieces, parts, self.shard.numels))

    def chunks(
        self, inputs: Inputs, should_step: Tensor | None, errors: DeferredErrors, observe: Observe | None
    ) -> Iterator[Chunk]:
        """While one chunk is computed, the one before is gathered."""
        under_way: deque[Callable[[], None]] = deque()
        others = errors.result(partial(self._weights_without_gradient, inputs), None)
        for number, chunk in enumerate(self.shard.blocks.chunks):
            errors.attempt(partial(read_gradients, chunk, inputs))
            yield chunk
            if others is not None:
                errors.attempt(partial(self._send_as_they_are, number, others))
            self._make(number, inputs, should_step, errors, observe)
            for part in self.slices[number]:
                if len(under_way) == 2:
                    under_way.popleft()()
                under_way.append(self._gather(number, part, inputs, errors))
            while len(under_way) > len(self.slices[number]):  # the buffer of the chunk before is free then
                under_way.popleft()()
        while under_way:
            under_way.popleft()()

    def _weights_without_gradient(self, inputs: Inputs) -> list[Tensor | None] | None:
        """They are sent as they are: another rank may have a gradient, which shows only later."""
        if not any(weight is None for weight in inputs.weights):
            return None
        removed, values = self.shard.removed, self.shard.storage.values
        having = [weight is not None or index in removed for index, weight in enumerate(inputs.weights)]
        return [None if has else values(index).contiguous().view(-1) for index, has in enumerate(having)]

    def _send_as_they_are(self, number: int, weights: list[Tensor | None]) -> None:
        theirs, ours = self.sent_plans[number].of(weights)
        copy_all(ours, theirs)

    def _make(
        self, number: int, inputs: Inputs, should_step: Tensor | None, errors: DeferredErrors, observe: Observe | None
    ) -> None:
        """The chunk's new weights, in the buffer that they leave from."""

        def copy() -> None:
            weights, new = self.sent_plans[number].of(inputs.flat_weights)
            copy_all(new, weights)

        def make() -> None:
            copy()
            for rows, in_mine in zip(self.shard.blocks.chunks[number], self.sent_runs[number], strict=True):
                active = [
                    (run, view)
                    for run, view in zip(rows.stored, in_mine, strict=True)
                    if inputs.weights[run.tensor] is not None
                ]
                sent, runs = [view for _, view in active], [run for run, _ in active]
                apply_runs(self.shard, sent, runs, rows, inputs, should_step, observe)

        if not errors.attempt(make):
            errors.rescue(copy)

    def _gather(self, number: int, part: _Slice, inputs: Inputs, errors: DeferredErrors) -> Callable[[], None]:
        """Start to gather a slice; what is returned waits for it, and copies it to the weights."""
        group = self.shard.storage.group
        # Behind this rank's part of a chunk stands padding: all ranks' parts are equally long.
        mine = self.mine[number % 2].part(part.start, part.stop)
        wait = collectives.all_gather(group, mine, part.buffer.part(0, group.size * (part.stop - part.start)))

        def copy() -> None:
            weights, new = part.received.of(inputs.flat_weights)
            copy_all(weights, new)

        def receive() -> None:
            wait()
            errors.attempt(copy)

        return receive


@dataclass(frozen=True, slots=True, eq=False)
class _Slice:
    """Elements [start, stop) of each rank's part of a chunk: what is gathered at a time."""

    start: int
    stop: int
    buffer: CommBuffer
    received: CopyPlan


class AllToAll:
    """Every element is stored on one rank; row groups cut by a rank boundary travel.

    Two buffers hold what travels: elements of row groups that are owned elsewhere, and the other
    ranks' elements of those that are owned here. Gradients go from the first to the second, updates
    come back. What is owned here and cut stands whole in the staging buffer.
    """

    def __init__(self, shard: Shard) -> None:
        self.shard = shard
        self._stored = stored_stretches(shard)
        storage, staging = shard.storage, shard.blocks.staging
        route = sharding.route(storage.stored_spans, shard.cut, storage.group.rank)
        self.crossing = any(shard.cut)
        ranks = range(storage.group.size)
        self.send_counts = [sum(p.numel for p in route.send if p.rank == rank) for rank in ranks]
        self.receive_counts = [sum(p.numel for p in route.receive if p.rank == rank) for rank in ranks]
        self.send_buffer, self.receive_buffer = (
            storage.group.comm_buffer(huge_pages.zeros(sum(counts), dtype=staging.dtype, device=staging.device))
            for counts in (self.send_counts, self.receive_counts)
        )
        self.stored_elsewhere = in_a_row(self.receive_buffer.tensor, route.receive)
        self.received = [part_of(staging, piece) for piece in route.receive]
        local = sharding.merged(route.local)
        self.staged = PiecesByGroup(local, [part_of(staging, piece) for piece in local], staging, shard)
        sent = self.send_buffer.tensor
        self.owned_elsewhere = PiecesByGroup(route.send, in_a_row(sent, route.send), sent, shard)
        self.ready = [chunk for chunk in shard.blocks.chunks if not any(rows.staged for rows in chunk)]
        self.late = [chunk for chunk in shard.blocks.chunks if any(rows.staged for rows in chunk)]

    @property
    def buffers(self) -> list[CommBuffer]:
        """Elements that are owned elsewhere, and those that are stored elsewhere."""
        return [self.send_buffer, self.receive_buffer]

    def collect(self, inputs: Inputs) -> Tensor:
        """Of row groups that are cut, own parts are staged, others' go into the send buffer."""
        self.staged.read(inputs.gradients)
        self.owned_elsewhere.read(inputs.gradients)
        return largest_gradient(inputs, self._stored, self.shard)

    def chunks(
        self, inputs: Inputs, should_step: Tensor | None, errors: DeferredErrors, observe: Observe | None
    ) -> Iterator[Chunk]:
        """Chunks that wait for no other rank come first; weights change while updates travel."""
        wait = self._exchange(self.send_buffer, self.send_counts, self.receive_buffer, self.receive_counts)
        for chunk in self.ready:
            errors.attempt(partial(read_gradients, chunk, inputs))
            yield chunk
            errors.attempt(partial(change_stored, self.shard, chunk, inputs, should_step, observe))
        wait()
        errors.attempt(lambda: copy_all(self.received, self.stored_elsewhere))
        for chunk in self.late:
            errors.attempt(partial(read_gradients, chunk, inputs))
            yield chunk
            errors.attempt(partial(change_stored, self.shard, chunk, inputs, should_step, observe))
        if not errors.attempt(lambda: copy_all(self.stored_elsewhere, self.received)):
            errors.rescue(self.receive_buffer.tensor.zero_)
        wait = self._exchange(self.receive_buffer, self.receive_counts, self.send_buffer, self.send_counts)
        errors.attempt(partial(self.staged.change, inputs, should_step, observe))
        wait()
        errors.attempt(partial(self.owned_elsewhere.change, inputs, should_step, observe))

    def _exchange(
        self, send: CommBuffer, counts: list[int], receive: CommBuffer, expected: list[int]
    ) -> Callable[[], None]:
        if not self.crossing:
            return lambda: None
        return collectives.all_to_all(self.shard.storage.group, send, counts, receive, expected)
