"""The blocks of one size, stacked, and one step of their arithmetic."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import floor
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from adafisher_dist.blocks.grid import Kind
from adafisher_dist.numerics import fisher
from adafisher_dist.settings import StateConfig

Numbers = np.ndarray[Any, np.dtype[np.int64]]

# Elements of the Fisher that a CPU works on at a time: 2 MiB in float32, so that A and its factor stay in its caches.
# Twice as fast as whole chunks at block sizes 32 to 64 (LOG.md, 2026-11-24).
CPU_TILE_FISHER_NUMEL = 2**19


@dataclass(slots=True, eq=False)
class Batch:
    """Stacked blocks of one kind and one param group, or elements with a diagonal Fisher.

    Rows are in the order of the rank's elements. Momentum, factors and arithmetic have the compute dtype.

    Attributes:
        gradient_NDB: the gradient on the way in, the update on the way out.
        momentum_NDB: m.
        fisher: F in fisher_dtype: (N, B, B); packed, the lower triangles, (N, T); or the diagonals, (N, 1).
        square_ND: ‖g‖² / B of each vector, averaged like F; None where a block has one vector.
        factor_NBB: A^(−p) that is kept between refreshes; None where a factor is made at every step.
        curvature_N: d of the kept roots.
        made_N: for each kept root, the step t at which it was made; -1 where that is not known.
        number_N: each block's number q, which decides when its root is refreshed and how a bfloat16 F is rounded.
        seeding_N: the same as int32 on the device, where F is bfloat16.
        fallback_counts: for each block, how often its factorisation needed each fallback.
    """

    group: int
    kind: Kind
    structure: StateConfig
    gradient_NDB: Tensor
    momentum_NDB: Tensor
    fisher: Tensor
    square_ND: Tensor | None
    factor_NBB: Tensor | None
    curvature_N: Tensor | None
    made_N: Numbers | None
    number_N: Numbers
    seeding_N: Tensor | None
    fallback_counts: dict[int, list[int]] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Elements of a vector."""
        return self.kind.size

    @property
    def dense(self) -> bool:
        """Whether F is a matrix."""
        return self.kind.dense

    def tensors(self) -> dict[str, Tensor]:
        """The state by its name."""
        tensors = {"momentum": self.momentum_NDB, "fisher": self.fisher}
        if self.square_ND is not None:
            tensors["square"] = self.square_ND
        if self.factor_NBB is not None and self.curvature_N is not None:
            tensors |= {"factor": self.factor_NBB, "curvature": self.curvature_N}
        return tensors

    def state(self, start: int, stop: int) -> dict[str, Tensor]:
        """Views of the state of rows [start, stop), by the names that they have in a state dict."""
        return {f"{name}_{self.kind.name}": tensor[start:stop] for name, tensor in self.tensors().items()}

    def ages(self, step: int) -> Numbers:
        """Steps since the blocks' factors were made, of those of which it is known: 0 where none is kept."""
        if self.made_N is None:
            return np.zeros_like(self.number_N)
        return step - self.made_N[self.made_N >= 0]


def allocate(
    group: int, kind: Kind, structure: StateConfig, number: Numbers, device: torch.device, zeroed: bool = True
) -> Batch:  # fmt: skip
    """A batch of blocks of these numbers that have seen no gradient.

    Or, not zeroed, whose whole state will be read.
    """
    new = torch.zeros if zeroed else torch.empty
    wide = structure.compute_dtype
    size, depth, dense = kind
    rows = len(number)
    keeps = dense and structure.keeps_factors
    rounded = structure.fisher_dtype == torch.bfloat16
    return Batch(
        group,
        kind,
        structure,
        gradient_NDB=torch.zeros(rows, depth, size, dtype=wide, device=device),
        momentum_NDB=new(rows, depth, size, dtype=wide, device=device),
        fisher=new(rows, *fisher_shape(kind, structure), dtype=structure.fisher_dtype, device=device),
        square_ND=new(rows, depth, dtype=wide, device=device) if depth > 1 else None,
        factor_NBB=new(rows, size, size, dtype=wide, device=device) if keeps else None,
        curvature_N=new(rows, dtype=wide, device=device) if keeps else None,
        made_N=np.full(rows, -1) if keeps else None,
        number_N=number,
        seeding_N=torch.from_numpy(number.astype(np.int32)).to(device) if rounded else None,
    )


def fisher_shape(kind: Kind, structure: StateConfig) -> tuple[int, ...]:
    """How a block's F is stored."""
    if not kind.dense:
        return (1,)
    return (fisher.packed_numel(kind.size),) if structure.packed else (kind.size, kind.size)


def refresh_interval(freq: int, updates: int, decay: float) -> int:
    """Steps between refreshes of a factor: 1 at first, `freq` when the Fisher is full (DESIGN.md, "Old factors")."""
    return max(1, min(updates, floor(freq * (1 - decay**updates) + 0.5)))


def waits_for_nothing(structure: StateConfig) -> bool:
    """Whether the arithmetic of a param group asks the device nothing, so that a host need not wait for it.

    A Cholesky factor of A may fail, and whether it did decides what is done next; a kept factor would have to be put
    back.
    """
    return structure.exponent != 1.0 and not structure.keeps_factors


def compute(
    batch: Batch,
    start: int,
    stop: int,
    step: int,
    updates: int,
    settings: Mapping[str, Any],
    should_step: Tensor | None = None,
) -> None:
    """One step of rows [start, stop): their gradient goes into m and F, and the update u takes its place.

    Blocks do not depend on each other, so on a CPU the rows are worked on in tiles that stay in its cache.

    Args:
        batch: the rows' batch.
        start: first row.
        stop: row after the last.
        step: t, this step included.
        updates: k, this step included where it updates F.
        settings: the param group.
        should_step: where it is given, an int32 0-d tensor on the device. If it is 0, u is 0 and nothing else changes, whatever
            is in the gradient; nobody waits to know.
    """
    device = batch.fisher.device
    tiles = max(1, 16 // batch.kind.depth) if batch.dense else 1
    rows = tiles * tile_rows(batch) if device.type == "cpu" else stop - start
    with fisher.full_precision(device):
        for begin in range(start, stop, rows):
            _compute_rows(batch, begin, min(stop, begin + rows), step, updates, settings, should_step)


def tile_rows(batch: Batch) -> int:
    """Blocks whose Fisher a CPU works on at a time."""
    return max(1, CPU_TILE_FISHER_NUMEL // batch.size**2)


def _compute_rows(
    batch: Batch,
    start: int,
    stop: int,
    step: int,
    updates: int,
    settings: Mapping[str, Any],
    should_step: Tensor | None,
) -> None:
    """A step of some rows. What takes B numbers a block is done for all of them, what takes B² in tiles."""
    gradient_NDB, momentum_NDB = batch.gradient_NDB[start:stop], batch.momentum_NDB[start:stop]
    if should_step is not None:
        gradient_NDB.copy_(torch.where(should_step.bool(), gradient_NDB, 0.0))
    mu, eps = settings["momentum"], settings["eps"]  # μ, ε
    unbias_m = 1 / (1 - mu**step) if settings["bias_correction"] else 1.0
    momentum_NDB.lerp_(gradient_NDB, _if_stepping(should_step, 1 - mu, 0.0, momentum_NDB))
    if settings["nesterov"]:
        hat_NDB = (momentum_NDB * (mu * unbias_m)).add_(gradient_NDB, alpha=1 - mu)
    else:
        hat_NDB = momentum_NDB * unbias_m
    decay = _if_stepping(should_step, settings["fisher_decay"], 1.0, momentum_NDB)  # ρ
    if batch.dense and batch.structure.grafting == "rms":
        square_ND = _squares(batch, start, stop, step, updates, settings, decay)
        weight_ND = None if square_ND is None else fisher.row_weights(square_ND)
        scaled_NDB = fisher.scale_rows(hat_NDB, weight_ND, batch.structure.exponent)
        solved = _solve(batch, start, scaled_NDB, weight_ND, step, updates, settings, decay)
        moment_NDB = fisher.second_moment(solved.diagonal_NB, square_ND)
        by_diagonal_NDB = fisher.diagonal_update(hat_NDB, moment_NDB, eps)
        update_NDB = fisher.orthogonal_update(solved.vectors_NDB, by_diagonal_NDB)
    elif batch.dense:
        solved = _solve(batch, start, hat_NDB, None, step, updates, settings, decay)
        update_NDB = fisher.natural_update(solved.vectors_NDB, solved.d_N, batch.structure.exponent)
    else:
        _update_fisher(batch, batch.fisher[start:stop], start, None, step, updates, settings, decay)
        moment_N11 = batch.fisher[start:stop].to(hat_NDB.dtype).unsqueeze(2) * _unbias(updates, settings)
        update_NDB = fisher.diagonal_update(hat_NDB, moment_N11, eps)
    gradient_NDB.copy_(update_NDB if should_step is None else torch.where(should_step.bool(), update_NDB, 0.0))


def _if_stepping(should_step: Tensor | None, on: float, off: float, like: Tensor) -> float | Tensor:
    """One number or the other, as `should_step` has it on the device."""
    if should_step is None:
        return on
    return torch.where(should_step.bool(), torch.full((), on, dtype=like.dtype, device=like.device), off)


def _squares(
    batch: Batch, start: int, stop: int, step: int, updates: int, settings: Mapping[str, Any], decay: float | Tensor
) -> Tensor | None:
    """ŵ of rows [start, stop), (N, D), brought up to date when F is; None where blocks have one vector."""
    if batch.square_ND is None:
        return None
    square_ND = batch.square_ND[start:stop]
    if updates_fisher(step, settings):
        fisher.update_squares(square_ND, batch.gradient_NDB[start:stop], decay)
    return square_ND * _unbias(updates, settings)


class _Solved(NamedTuple):
    """Vectors times A^(−p), today's diagonal of F̂, and the d that A was scaled by, which may be some steps old."""

    vectors_NDB: Tensor
    diagonal_NB: Tensor
    d_N: Tensor


def _solve(
    batch: Batch, start: int, vectors_NDB: Tensor, weight_ND: Tensor | None, step: int, updates: int,
    settings: Mapping[str, Any], decay: float | Tensor,
) -> _Solved:  # fmt: skip
    """Update F of the blocks from row `start` on, and solve."""
    count = len(vectors_NDB)
    solved = _Solved(
        torch.empty_like(vectors_NDB), vectors_NDB.new_empty(count, batch.size), vectors_NDB.new_empty(count)
    )
    unbias, keeps = _unbias(updates, settings), batch.structure.keeps_factors
    tile = tile_rows(batch) if vectors_NDB.device.type == "cpu" else count
    for begin in range(0, count, tile):
        part = slice(begin, min(count, begin + tile))
        stored = batch.fisher[start:][part]
        whole_NBB = whole(batch, stored)
        weight = None if weight_ND is None else weight_ND[part]
        changed = _update_fisher(batch, whole_NBB, start + begin, weight, step, updates, settings, decay)
        if changed and batch.structure.packed:
            stored.copy_(fisher.pack(whole_NBB))
        solved.diagonal_NB[part] = whole_NBB.diagonal(dim1=1, dim2=2)
        if not keeps:
            factor = _fresh(batch, whole_NBB, np.arange(start + begin, start + begin + len(stored)), unbias, settings)
            solved.vectors_NDB[part] = fisher.solve(factor, vectors_NDB[part])
            solved.d_N[part] = factor.d_N
    solved.diagonal_NB.mul_(unbias)
    if keeps:
        factor = _kept(batch, start, start + count, step, updates, settings)
        return solved._replace(vectors_NDB=fisher.solve(factor, vectors_NDB), d_N=factor.d_N)
    return solved


def whole(batch: Batch, stored: Tensor) -> Tensor:
    """Rows of a batch's F as whole blocks."""
    return fisher.unpack(stored, batch.size) if batch.structure.packed else stored


def _update_fisher(
    batch: Batch, blocks: Tensor, start: int, weight_ND: Tensor | None, step: int, updates: int,
    settings: Mapping[str, Any], decay: float | Tensor,
) -> bool:  # fmt: skip
    """Update F of the rows from `start` on, which are `blocks`, if it is time; returns whether it was."""
    if not updates_fisher(step, settings):
        return False
    rows = slice(start, start + len(blocks))
    seeds = None if batch.seeding_N is None else fisher.seeds(batch.seeding_N[rows], updates)
    if batch.dense:
        fisher.update(blocks, batch.gradient_NDB[rows], decay, weight_ND, seeds)
    else:
        fisher.update_diagonal(blocks, batch.gradient_NDB[rows, 0], decay, seeds)
    return True


def _unbias(updates: int, settings: Mapping[str, Any]) -> float:
    """What F̂ is of F."""
    return 1 / (1 - settings["fisher_decay"] ** updates) if settings["bias_correction"] else 1.0


def rebuild_factors(batch: Batch, start: int, stop: int, updates: int, settings: Mapping[str, Any]) -> None:
    """Make the kept A^(−p) of rows [start, stop) anew, from F after k updates: where a saved state had none."""
    if batch.factor_NBB is not None and updates > 0:
        with fisher.full_precision(batch.fisher.device):
            _refresh(batch, np.arange(start, stop), updates, settings)


def updates_fisher(step: int, settings: Mapping[str, Any]) -> bool:
    """Whether F is updated at step t of a parameter."""
    return (step - 1) % int(settings["fisher_update_freq"]) == 0


def _kept(batch: Batch, start: int, stop: int, step: int, updates: int, settings: Mapping[str, Any]) -> fisher.Factor:
    """The kept A^(−p) of rows [start, stop); those whose turn it is are made anew."""
    assert batch.factor_NBB is not None and batch.curvature_N is not None
    interval = refresh_interval(settings["inverse_update_freq"], updates, settings["fisher_decay"])
    if interval == 1 or step == 1:
        due = np.arange(start, stop)
    else:
        due = start + np.flatnonzero((batch.number_N[start:stop] + step) % interval == 0)
    _refresh(batch, due, updates, settings)
    assert batch.made_N is not None
    batch.made_N[due] = step
    return fisher.Factor(batch.factor_NBB[start:stop], batch.curvature_N[start:stop], None, triangular=False)


def _refresh(batch: Batch, due: Numbers, updates: int, settings: Mapping[str, Any]) -> None:
    """Make the kept A^(−p) of these rows anew; in tiles on a GPU too, which bounds the memory."""
    assert batch.factor_NBB is not None and batch.curvature_N is not None
    tile = tile_rows(batch)
    for begin in range(0, len(due), tile):
        numbers = due[begin : begin + tile]
        rows = torch.from_numpy(numbers).to(batch.fisher.device)
        whole_NBB = whole(batch, batch.fisher.index_select(0, rows))
        factor = fisher.inverted(_fresh(batch, whole_NBB, numbers, _unbias(updates, settings), settings))
        batch.factor_NBB.index_copy_(0, rows, factor.root_NBB)
        batch.curvature_N.index_copy_(0, rows, factor.d_N)


def damping(batch: Batch, settings: Mapping[str, Any]) -> tuple[float, float]:
    """δ + ε in A, and the noise that it may have to outweigh."""
    noise = fisher.rounding_noise(settings["fisher_decay"], batch.structure.fisher_dtype)
    return settings["damping"] + settings["eps"], noise


def _fresh(
    batch: Batch, fisher_NBB: Tensor, rows: Numbers, unbias: float, settings: Mapping[str, Any]
) -> fisher.Factor:
    """The factor of these rows of the batch; counts where a fallback was needed."""
    structure, exact = batch.structure, batch.structure.grafting == "none"
    factor = fisher.factorize(
        fisher_NBB, unbias, *damping(batch, settings), structure.exponent, structure.compute_dtype, exact
    )
    if factor.fallback_N is not None:
        _count(batch.fallback_counts, rows, factor.fallback_N)
    return factor


def _count(fallback_counts: dict[int, list[int]], rows: Numbers, fallback_N: Tensor) -> None:
    for row, fallback in zip(rows.tolist(), fallback_N.tolist(), strict=True):
        if fallback:
            fallback_counts.setdefault(row, [0] * len(fisher.FALLBACKS))[fallback - 1] += 1
