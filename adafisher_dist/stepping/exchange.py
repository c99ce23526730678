"""How gradients reach the owners of their blocks, and results come back to the stored weights.

Each layout has its own `Exchange`, with the same two calls in the order of a step: `collect`
(local), and `chunks` (a collective: brings gradients to the owners, has the chunks computed, and
brings back what changes the weights).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import accumulate
from typing import Protocol

import torch
from torch import Tensor

from adafisher_dist.blocks import sharding
from adafisher_dist.blocks.sharding import TensorPiece
from adafisher_dist.comm import collectives
from adafisher_dist.comm.collectives import CommBuffer
from adafisher_dist.comm.deferred_errors import DeferredErrors
from adafisher_dist.state.shard import Shard, gather_dtype
from adafisher_dist.state.stacking import Chunk
from adafisher_dist.stepping.copy_plan import CopyPlan
from adafisher_dist.stepping.inputs import Inputs


class Exchange(Protocol):
    """What a step needs of a layout."""

    shard: Shard

    def collect(self, inputs: Inputs) -> Tensor:
        """Bring this rank's gradients to where they leave from. Local.

        Returns their largest absolute element, 0-d.
        """

    def chunks(self, inputs: Inputs, should_step: Tensor | None, errors: DeferredErrors) -> Iterator[Chunk]:
        """Bring all gradients to the owners, and the results to the stored weights. A collective.

        Yields the chunks of the flat buffer whose gradients are there; whoever asks for the next
        one has turned them into updates. After an error this rank goes on through the collectives,
        and leaves its part of the weights as it is.

        Args:
            inputs: of this call.
            should_step: None, or 0-d on the device: 0 if the step is to change nothing, and all
                updates are zeros.
            errors: of this rank.
        """

    def changed(self, inputs: Inputs) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
        """After `chunks`: weights, and the change of each, in lists that match. Local.

        Of all ranks together these are all weights that have a gradient, each once.
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
        rank = shard.storage.group.rank
        pieces = sharding.pieces_of(shard.storage.stored_spans[rank], shard.owned[rank], rank)
        self.own = _copy_plan(pieces, shard.flat_buffer, shard)

    def collect(self, inputs: Inputs) -> Tensor:
        """The owner reads its own elements into the flat buffer."""
        _read(self.own, inputs.gradients)
        return _largest([self.shard.flat_buffer])

    def chunks(self, inputs: Inputs, should_step: Tensor | None, errors: DeferredErrors) -> Iterator[Chunk]:
        """Nothing is sent."""
        yield from self.shard.chunks
        errors.attempt(partial(_change_weights, self.shard, self.own, inputs, should_step))

    def changed(self, inputs: Inputs) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
        """The flat buffer has been scaled."""
        yield self.own.of(inputs.weights)


class AllGather(Local):
    """All ranks have all gradients and weights: owners read theirs, and send new weights to all.

    Weights travel in their own precision, which loses nothing, and in bfloat16 takes half the bytes
    of the updates. The all-gather of one chunk runs while the next chunk is computed; two buffers
    take turns.
    """

    def __init__(self, shard: Shard) -> None:
        super().__init__(shard)
        group = shard.storage.group
        self.lengths = [max(sharding.count(spans) for spans in by_rank) for by_rank in shard.assignment.chunks]
        dtype, longest = gather_dtype(shard), max(self.lengths)
        turns = range(min(2, len(self.lengths)))
        self.mine = [group.comm_buffer(shard.flat_buffer.new_zeros(longest, dtype=dtype)) for _ in turns]
        self.everyone = [
            group.comm_buffer(shard.flat_buffer.new_zeros(group.size * longest, dtype=dtype)) for _ in turns
        ]
        self.copies = [self._copy_plans(number, by_rank) for number, by_rank in enumerate(shard.assignment.chunks)]

    def _copy_plans(self, number: int, by_rank: Sequence[sharding.Spans]) -> tuple[CopyPlan, CopyPlan, CopyPlan]:
        """Copy plans of a chunk: own part in the flat buffer and as sent, all parts as received."""
        shard, group, turn = self.shard, self.shard.storage.group, number % 2
        pieces = [sharding.pieces_of(shard.storage.stored_spans[r], spans, r) for r, spans in enumerate(by_rank)]
        mine, start = pieces[group.rank], shard.chunks[number].start
        received = self.everyone[turn].tensor
        parts = [received[rank * self.lengths[number] :] for rank in range(group.size)]
        return (
            _copy_plan(mine, shard.flat_buffer[start:], shard),
            _copy_plan(mine, self.mine[turn].tensor, shard),
            CopyPlan(
                [piece for of_rank in pieces for piece in of_rank],
                [_part(part, piece) for of_rank, part in zip(pieces, parts, strict=True) for piece in of_rank],
                shard.numels,
            ),
        )

    def chunks(self, inputs: Inputs, should_step: Tensor | None, errors: DeferredErrors) -> Iterator[Chunk]:
        """While one chunk is computed, the one before is gathered."""
        finish: Callable[[], None] | None = None
        for number, chunk in enumerate(self.shard.chunks):
            yield chunk
            wait = self._send(number, inputs, should_step, errors)
            if finish is not None:
                finish()
            finish = partial(self._receive, number, wait, inputs, errors)
        if finish is not None:
            finish()

    def _send(
        self, number: int, inputs: Inputs, should_step: Tensor | None, errors: DeferredErrors
    ) -> Callable[[], None]:
        group, length, turn = self.shard.storage.group, self.lengths[number], number % 2
        in_buffer, in_mine, _ = self.copies[number]
        weights, new = in_mine.of(inputs.weights)
        _, updates = in_buffer.of(inputs.weights)

        def make() -> None:
            _copy(new, weights)
            _scale(self.shard, in_buffer, inputs, should_step)
            _add(new, updates)

        if not errors.attempt(make):
            errors.rescue(lambda: _copy(new, weights))
        # Behind this rank's part stands padding: all ranks' parts are equally long.
        return collectives.all_gather(
            group, self.mine[turn].part(0, length), self.everyone[turn].part(0, group.size * length)
        )

    def _receive(self, number: int, wait: Callable[[], None], inputs: Inputs, errors: DeferredErrors) -> None:
        wait()
        weights, new = self.copies[number][2].of(inputs.weights)
        errors.attempt(lambda: _copy(weights, new))

    def changed(self, inputs: Inputs) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
        """The flat buffer has been scaled; it holds this rank's part."""
        for in_buffer, _, _ in self.copies:
            yield in_buffer.of(inputs.weights)


class AllToAll:
    """Every element is stored on one rank; blocks cut by a rank boundary travel, one call each way.

    Two buffers hold what travels: elements of blocks that are owned elsewhere, and the other ranks'
    elements of blocks that are owned here. Gradients go from the first to the second, updates come
    back.
    """

    def __init__(self, shard: Shard) -> None:
        self.shard = shard
        storage, flat_buffer = shard.storage, shard.flat_buffer
        route = sharding.route(storage.stored_spans, shard.owned, storage.group.rank)
        self.crossing = sharding.any_crossing(storage.stored_spans, shard.owned)
        ranks = range(storage.group.size)
        self.send_counts = [sum(p.numel for p in route.send if p.rank == rank) for rank in ranks]
        self.receive_counts = [sum(p.numel for p in route.receive if p.rank == rank) for rank in ranks]
        self.send_buffer = storage.group.comm_buffer(flat_buffer.new_zeros(sum(self.send_counts)))
        self.receive_buffer = storage.group.comm_buffer(flat_buffer.new_zeros(sum(self.receive_counts)))
        self.local = _copy_plan(sharding.merged(route.local), flat_buffer, shard)
        self.stored_elsewhere = _in_a_row(self.receive_buffer.tensor, route.receive)
        self.received_in_buffer = [_part(flat_buffer, piece) for piece in route.receive]
        self.owned_elsewhere = CopyPlan(route.send, _in_a_row(self.send_buffer.tensor, route.send), shard.numels)
        starts = sorted(piece.buffer_offset for piece in route.receive)
        waits = [any(c.start <= start < c.stop for start in starts) for c in shard.chunks]
        self.ready_and_late = [
            [c for c, late in zip(shard.chunks, waits, strict=True) if late == want] for want in (False, True)
        ]

    def collect(self, inputs: Inputs) -> Tensor:
        """Own elements go into the flat buffer, those of other owners into the send buffer."""
        _read(self.local, inputs.gradients)
        _read(self.owned_elsewhere, inputs.gradients)
        if self.received_in_buffer:
            torch._foreach_zero_(self.received_in_buffer)  # of the step before; their rank looks at the new ones
        return _largest([self.send_buffer.tensor, self.shard.flat_buffer])

    def chunks(self, inputs: Inputs, should_step: Tensor | None, errors: DeferredErrors) -> Iterator[Chunk]:
        """Chunks that wait for no other rank come first; weights change while updates travel."""
        ready, late = self.ready_and_late
        wait = self._exchange(self.send_buffer, self.send_counts, self.receive_buffer, self.receive_counts)
        yield from ready
        wait()
        errors.attempt(lambda: _copy(self.received_in_buffer, self.stored_elsewhere))
        yield from late
        if not errors.attempt(lambda: _copy(self.stored_elsewhere, self.received_in_buffer)):
            self.receive_buffer.tensor.zero_()
        wait = self._exchange(self.receive_buffer, self.receive_counts, self.send_buffer, self.send_counts)
        errors.attempt(partial(_change_weights, self.shard, self.local, inputs, should_step))
        wait()
        errors.attempt(partial(_change_weights, self.shard, self.owned_elsewhere, inputs, should_step))

    def changed(self, inputs: Inputs) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
        """What is stored here: updates are in the flat buffer, or came back to the send buffer."""
        yield self.local.of(inputs.weights)
        yield self.owned_elsewhere.of(inputs.weights)

    def _exchange(
        self, send: CommBuffer, counts: list[int], receive: CommBuffer, expected: list[int]
    ) -> Callable[[], None]:
        if not self.crossing:
            return lambda: None
        return collectives.all_to_all(self.shard.storage.group, send, counts, receive, expected)


def _change_weights(shard: Shard, copies: CopyPlan, inputs: Inputs, should_step: Tensor | None) -> None:
    """θ ← θ − lr·(u + λ·θ), by a buffer's updates; 16-bit weights are rounded once, at the end."""
    _scale(shard, copies, inputs, should_step)
    _add(*copies.of(inputs.weights))


def _scale(shard: Shard, copies: CopyPlan, inputs: Inputs, should_step: Tensor | None) -> None:
    """In the buffer: u ← −lr·(u + λ·θ), by param group."""
    for group, settings in enumerate(inputs.settings):
        members = [
            weight if number == group else None for weight, number in zip(inputs.weights, shard.groups, strict=True)
        ]
        weights, updates = copies.of(members)
        if settings is None or not updates:
            continue
        if settings.weight_decay:
            torch._foreach_add_(updates, weights, alpha=settings.weight_decay)
        lr = settings.lr if should_step is None else should_step.to(shard.flat_buffer.dtype) * settings.lr
        torch._foreach_mul_(updates, -lr)


def _read(copies: CopyPlan, gradients: Sequence[Tensor | None]) -> None:
    """Copy gradients into a buffer, and zeros where there are none."""
    theirs, ours = copies.of(gradients)
    _copy(ours, theirs)
    missing = copies.missing(gradients)
    if missing:
        torch._foreach_zero_(missing)


def _copy(to: list[Tensor], source: list[Tensor]) -> None:
    if to:
        torch._foreach_copy_(to, source)


def _add(to: list[Tensor], more: list[Tensor]) -> None:
    if to:
        torch._foreach_add_(to, more)


def _copy_plan(pieces: Sequence[TensorPiece], buffer: Tensor, shard: Shard) -> CopyPlan:
    return CopyPlan(pieces, [_part(buffer, piece) for piece in pieces], shard.numels)


def _part(buffer: Tensor, piece: TensorPiece) -> Tensor:
    return buffer[piece.buffer_offset : piece.buffer_offset + piece.numel]


def _in_a_row(buffer: Tensor, pieces: Sequence[TensorPiece]) -> list[Tensor]:
    """The stretch of a buffer that each piece takes, one after the other."""
    stops = list(accumulate(piece.numel for piece in pieces))
    return [buffer[stop - piece.numel : stop] for piece, stop in zip(pieces, stops, strict=True)]


def _largest(tensors: Sequence[Tensor]) -> Tensor:
    """The largest absolute element, 0-d; NaN where there is one."""
    ends = [end for tensor in tensors if tensor.numel() for end in torch.aminmax(tensor)]  # 20 times as fast as a norm
    return torch.stack(ends).abs().amax() if ends else tensors[0].new_zeros(())
