"""How a chunk's gradients are read from where they are stored, and how updates change weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from adafisher_dist.blocks.sharding import TensorPiece
from adafisher_dist.numerics.rounding import Elements, add_stochastically
from adafisher_dist.settings import StepSettings
from adafisher_dist.state.runs import Run
from adafisher_dist.state.shard import Shard
from adafisher_dist.state.stacking import Chunk, ChunkRows
from adafisher_dist.stepping.copy_plan import CopyPlan
from adafisher_dist.stepping.inputs import Inputs, flattened

Observe = Callable[[list[Tensor], list[Tensor]], None]
"""Sees new weights and the change of each, in lists that match.

Of all chunks and all ranks together these are all weights that have a gradient, each once.
"""

Where = Callable[[int], Elements]
"""By the number of a weight in such a list: which elements it has."""


class PiecesByGroup:
    """Pieces of stored tensors and their places in a buffer, by param group."""

    def __init__(self, pieces: Sequence[TensorPiece], parts: Sequence[Tensor], buffer: Tensor, shard: Shard) -> None:
        self._shard = shard
        self._buffer = buffer
        self._plans: dict[int, CopyPlan] = {}
        for group in sorted({shard.groups[piece.tensor] for piece in pieces}):
            own = [(p, part) for p, part in zip(pieces, parts, strict=True) if shard.groups[p.tensor] == group]
            self._plans[group] = CopyPlan([p for p, _ in own], [part for _, part in own], shard.numels)

    def read(self, gradients: Sequence[Tensor | None]) -> None:
        """Copy gradients into the buffer, and zeros where there are none."""
        flat = flattened(gradients) if self._plans else []
        for copies in self._plans.values():
            theirs, ours = copies.of(flat)
            copy_all(ours, theirs)
            missing = copies.missing(flat)
            if missing:
                torch._foreach_zero_(missing)

    def change(self, inputs: Inputs, should_step: Tensor | None, observe: Observe | None) -> None:
        """Apply the buffer's updates, and leave nothing of use in it."""
        together = self._buffer if len(self._plans) == 1 else None
        for group, copies in self._plans.items():
            weights, updates = copies.of(inputs.flat_weights)
            settings = inputs.settings[group]
            rounded = settings is not None and settings.stochastic_rounding
            places = copies.places(inputs.flat_weights) if rounded else []

            def where(number: int, places: list[tuple[int, int, int]] = places) -> Elements:
                tensor, start, stop = places[number]
                return _elements(self._shard, tensor, (stop - start,), (1,), start)

            apply(weights, updates, together, settings, should_step, observe, where)


def read_gradients(chunk: Chunk, inputs: Inputs) -> None:
    """Bring a chunk's gradients into the workspace."""
    for rows in chunk:
        gradients, places = [], []
        for run in rows.stored:
            gradient = inputs.gradients[run.tensor]
            if gradient is not None:
                gradients.append(run.of(gradient))
                places.append(run.in_work)
        copy_all(places, gradients)
        copy_all(rows.staged, rows.in_staging)


def change_stored(
    shard: Shard, chunk: Chunk, inputs: Inputs, should_step: Tensor | None, observe: Observe | None
) -> None:
    """Apply a chunk's updates; 16-bit weights are rounded once, at the end.

    Updates of row groups that are cut go to the staging buffer.
    """
    for rows in chunk:
        copy_all(rows.in_staging, rows.staged)
        weights, runs = [], []
        for run in rows.stored:
            weight = inputs.weights[run.tensor]
            if weight is not None:
                weights.append(run.of(weight))
                runs.append(run)
        apply_runs(shard, weights, runs, rows, inputs, should_step, observe)


def apply_runs(
    shard: Shard, weights: list[Tensor], runs: list[Run], rows: ChunkRows, inputs: Inputs,
    should_step: Tensor | None, observe: Observe | None,
) -> None:  # fmt: skip
    """`apply` the updates of some runs of a chunk to weights that lie as these do."""

    def where(number: int) -> Elements:
        run = runs[number]
        return _elements(shard, run.tensor, run.shape, run.strides, run.offset)

    updates, settings = [run.in_work for run in runs], inputs.settings[rows.blocks.group]
    apply(weights, updates, rows.gradient_NRB, settings, should_step, observe, where)


def _elements(shard: Shard, tensor: int, sizes: tuple[int, ...], strides: tuple[int, ...], offset: int) -> Elements:
    """Those of a view of a stored tensor, which is a parameter or rows of one."""
    number, first = shard.first_elements[tensor]
    step, position = int(shard.counters.numpy()[number, 0]), shard.storage.parameters[number].info.position
    return Elements(sizes, strides, first + offset, position, step)


def apply(
    weights: list[Tensor], updates: list[Tensor], together: Tensor | None, settings: StepSettings | None,
    should_step: Tensor | None, observe: Observe | None, where: Where,
) -> None:  # fmt: skip
    """In place: u ← −lr·(u + λ·θ), θ ← θ + u.

    Args:
        weights: θ.
        updates: u, in the compute dtype.
        together: one tensor of which all updates are parts; None where there is none.
        settings: of their param group.
        should_step: see `Exchange.chunks`.
        observe: likewise.
        where: the weights are from, for those that are rounded stochastically.
    """
    if settings is None or not updates:
        return
    if settings.weight_decay:
        torch._foreach_add_(updates, weights, alpha=settings.weight_decay)
    lr = settings.lr if should_step is None else should_step.to(updates[0].dtype) * settings.lr
    if together is not None:
        together.mul_(-lr)
    else:
        torch._foreach_mul_(updates, -lr)
    if settings.stochastic_rounding:
        add_stochastically(weights, updates, [where(number) for number in range(len(weights))])
    else:
        add_all(weights, updates)
    if observe is not None:
        observe(weights, updates)


def copy_all(to: list[Tensor], source: list[Tensor]) -> None:
    """Each into its counterpart."""
    if to:
        torch._foreach_copy_(to, source)


def add_all(to: list[Tensor], more: list[Tensor]) -> None:
    """Each to its counterpart, in the wider of the two dtypes, and rounded once."""
    if to:
        torch._foreach_add_(to, more)


def copy_plan_of(pieces: Sequence[TensorPiece], buffer: Tensor, shard: Shard) -> CopyPlan:
    """Stored tensors and a buffer."""
    return CopyPlan(pieces, [part_of(buffer, piece) for piece in pieces], shard.numels)


def part_of(buffer: Tensor, piece: TensorPiece) -> Tensor:
    """A piece's place in a buffer."""
    return buffer[piece.buffer_offset : piece.buffer_offset + piece.numel]


def in_a_row(buffer: Tensor, pieces: Sequence[TensorPiece]) -> list[Tensor]:
    """The stretch of a buffer that each piece takes, one after the other."""
    stops = list(accumulate(piece.numel for piece in pieces))
    return [buffer[stop - piece.numel : stop] for piece, stop in zip(pieces, stops, strict=True)]
