"""How gradients reach the owners of their blocks, and how the updates come back and are applied.

Each layout has one of two ways, with the same three calls in the order of a step: `collect` (local), `to_owners`
(collective), `run` (computes the chunks, returns the updates, applies them).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from adafisher_dist import comm, plan
from adafisher_dist.comm import Wire
from adafisher_dist.faults import Faults
from adafisher_dist.plan import Piece
from adafisher_dist.shard import Chunk, Shard

Settings = Sequence[Mapping[str, Any]]  # for each param group of the shard


class Transfer(Protocol):
    """What a step needs of a layout. `collect` is this rank's own work; the others are collectives."""

    shard: Shard

    def collect(self, active: Sequence[bool]) -> Tensor:
        """Bring this rank's gradients to where they leave from; the largest absolute element, 0-d."""

    def to_owners(self, faults: Faults) -> None:
        """Bring all gradients of this rank's blocks into the arena."""

    def run(self, compute: Callable[[Chunk], None], active: Sequence[bool], settings: Settings, faults: Faults) -> None:
        """Compute the chunks, and apply the updates to the stored tensors. After a fault, zeros stand for updates."""


def transfer(shard: Shard) -> Transfer:
    """The way of the shard's layout."""
    return Gathered(shard) if shard.storage.replicated else Routed(shard)


class Gathered:
    """Every rank has all gradients and all parameters: an owner reads its own, and its updates go to all.

    The all-gather of one chunk's updates runs while the next chunk is computed; two buffers take turns.
    """

    def __init__(self, shard: Shard) -> None:
        self.shard = shard
        group, storage = shard.storage.group, shard.storage
        self.own = plan.local_pieces(storage.placed[group.rank], shard.owned[group.rank], group.rank)
        self.lengths = [max(plan.count(spans) for spans in by_rank) for by_rank in shard.pieces]
        self.pieces = [
            [plan.local_pieces(storage.placed[group.rank], spans, rank) for rank, spans in enumerate(by_rank)]
            for by_rank in shard.pieces
        ]
        sizes = [group.size * max(self.lengths)] * min(2, len(self.lengths)) if group.size > 1 else []
        self.buffers = [group.wire(shard.arena.new_zeros(size)) for size in sizes]
        self.arena = group.wire(shard.arena)

    def collect(self, active: Sequence[bool]) -> Tensor:
        """The owner reads its own elements."""
        _into_arena(self.shard, self.own, active)
        return _largest([self.shard.arena[: self.shard.length]])

    def to_owners(self, faults: Faults) -> None:
        """Nothing to do: the owner had them."""

    def run(self, compute: Callable[[Chunk], None], active: Sequence[bool], settings: Settings, faults: Faults) -> None:
        """Compute a chunk while the one before is gathered."""
        group = self.shard.storage.group
        finish: Callable[[], None] | None = None
        for number, chunk in enumerate(self.shard.chunks):
            _compute(self.shard, chunk, compute, faults)
            if group.size == 1:
                own = self.shard.arena[chunk.start : chunk.stop]
                faults.attempt(partial(self._apply, number, own, active, settings))
                continue
            out = self.buffers[number % 2].part(0, group.size * self.lengths[number])
            # Behind the chunk stand elements of the next, or padding: sent to make all ranks' parts equally long.
            wait = comm.gather(group, self.arena.part(chunk.start, chunk.start + self.lengths[number]), out)
            if finish is not None:
                finish()
            finish = partial(self._finish, wait, partial(self._apply, number, out.tensor, active, settings), faults)
        if finish is not None:
            finish()

    def _finish(self, wait: Callable[[], None], apply_updates: Callable[[], None], faults: Faults) -> None:
        wait()
        faults.attempt(apply_updates)

    def _apply(self, number: int, updates: Tensor, active: Sequence[bool], settings: Settings) -> None:
        targets = []
        for rank, pieces in enumerate(self.pieces[number]):
            base = rank * self.lengths[number]
            targets += [(piece, updates[base + piece.arena_offset :][: piece.numel]) for piece in pieces]
        apply(self.shard, targets, active, settings)


class Routed:
    """Every element is stored on one rank. Blocks that a boundary between ranks cuts travel, in one call each way.

    Two buffers hold what travels: elements of blocks that are owned elsewhere, and the other ranks' elements of blocks
    that are owned here. Gradients go from the first to the second, updates come back.
    """

    def __init__(self, shard: Shard) -> None:
        self.shard = shard
        storage = shard.storage
        self.route = plan.route(storage.placed, shard.owned, storage.group.rank)
        self.crossing = plan.any_crossing(storage.placed, shard.owned)
        ranks = range(storage.group.size)
        self.away_counts = [sum(p.numel for p in self.route.send if p.rank == rank) for rank in ranks]
        self.guest_counts = [sum(p.numel for p in self.route.receive if p.rank == rank) for rank in ranks]
        self.away = storage.group.wire(shard.arena.new_zeros(sum(self.away_counts)))
        self.guests = storage.group.wire(shard.arena.new_zeros(sum(self.guest_counts)))

    def collect(self, active: Sequence[bool]) -> Tensor:
        """Own elements go into the arena, those of cut blocks into the buffer for their owners."""
        _into_arena(self.shard, self.route.local, active)
        for piece, part in _consecutive(self.away, self.route.send):
            _copy_gradient(part, self.shard, piece, active)
        return _largest([self.away.tensor, *(_arena_part(self.shard, piece) for piece in self.route.local)])

    def to_owners(self, faults: Faults) -> None:
        """Exchange the elements of cut blocks."""
        if self.crossing:
            group = self.shard.storage.group
            comm.exchange(group, self.away, self.away_counts, self.guests, self.guest_counts)
            faults.attempt(self._settle_guests)

    def run(self, compute: Callable[[Chunk], None], active: Sequence[bool], settings: Settings, faults: Faults) -> None:
        """Compute all chunks, and send the updates of cut blocks the way that their gradients came."""
        for chunk in self.shard.chunks:
            _compute(self.shard, chunk, compute, faults)
        targets = [(piece, _arena_part(self.shard, piece)) for piece in self.route.local]
        if self.crossing:
            if not faults.attempt(self._send_guests_home):
                self.guests.tensor.zero_()
            group = self.shard.storage.group
            comm.exchange(group, self.guests, self.guest_counts, self.away, self.away_counts)
            targets += _consecutive(self.away, self.route.send)
        faults.attempt(partial(apply, self.shard, targets, active, settings))

    def _settle_guests(self) -> None:
        for piece, part in _consecutive(self.guests, self.route.receive):
            _arena_part(self.shard, piece).copy_(part)

    def _send_guests_home(self) -> None:
        for piece, part in _consecutive(self.guests, self.route.receive):
            part.copy_(_arena_part(self.shard, piece))


def _compute(shard: Shard, chunk: Chunk, compute: Callable[[Chunk], None], faults: Faults) -> None:
    if not faults.attempt(partial(compute, chunk)):
        shard.arena[chunk.start : chunk.stop].zero_()


def apply(shard: Shard, targets: Sequence[tuple[Piece, Tensor]], active: Sequence[bool], settings: Settings) -> None:
    """θ ← θ − lr·λ·θ − lr·u for pieces of the stored tensors; 16-bit tensors are rounded once, at the end."""
    flats: dict[int, Tensor] = {}
    by_group: dict[int, tuple[list[Tensor], list[Tensor]]] = {}
    for piece, update in targets:
        if active[piece.tensor]:
            if piece.tensor not in flats:
                flats[piece.tensor] = shard.storage.values(piece.tensor).reshape(-1)
            weights, updates = by_group.setdefault(shard.groups[piece.tensor], ([], []))
            weights.append(flats[piece.tensor][piece.tensor_offset : piece.tensor_offset + piece.numel])
            updates.append(update)
    for group, (weights, updates) in by_group.items():
        lr, decay = float(settings[group]["lr"]), settings[group]["weight_decay"]
        work = [weight.to(torch.promote_types(weight.dtype, shard.arena.dtype)) for weight in weights]
        torch._foreach_mul_(work, 1 - lr * decay)
        torch._foreach_add_(work, updates, alpha=-lr)
        for weight, result in zip(weights, work, strict=True):
            if weight is not result:
                weight.copy_(result)
    for index, flat in flats.items():
        tensor = shard.storage.values(index)
        if flat.data_ptr() != tensor.data_ptr():  # reshape had to copy: the parameter is not contiguous
            tensor.copy_(flat.view(tensor.shape))


def _into_arena(shard: Shard, pieces: Sequence[Piece], active: Sequence[bool]) -> None:
    for piece in pieces:
        _copy_gradient(_arena_part(shard, piece), shard, piece, active)


def _copy_gradient(part: Tensor, shard: Shard, piece: Piece, active: Sequence[bool]) -> None:
    """Copy a piece of a stored tensor's gradient, or zeros where it has none."""
    gradient = shard.storage.gradient(piece.tensor) if active[piece.tensor] else None
    if gradient is None:
        part.zero_()
    elif piece.numel == gradient.numel():
        part.view(gradient.shape).copy_(gradient)
    else:
        part.copy_(gradient.reshape(-1)[piece.tensor_offset : piece.tensor_offset + piece.numel])


def _consecutive(buffer: Wire, pieces: Sequence[Piece]) -> Iterator[tuple[Piece, Tensor]]:
    """The pieces with the stretch of a buffer that each takes, one after the other."""
    offset = 0
    for piece in pieces:
        yield piece, buffer.tensor[offset : offset + piece.numel]
        offset += piece.numel


def _arena_part(shard: Shard, piece: Piece) -> Tensor:
    return shard.arena[piece.arena_offset : piece.arena_offset + piece.numel]


def _largest(tensors: Sequence[Tensor]) -> Tensor:
    """The largest absolute element, 0-d; NaN where there is one."""
    norms = [torch.linalg.vector_norm(tensor, torch.inf) for tensor in tensors if tensor.numel()]
    return torch.stack(norms).amax() if norms else tensors[0].new_zeros(())
