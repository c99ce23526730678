"""One step of stacked blocks: their gradient goes into their state, and the update takes its place.

    M, then w and F of the gradient → S = ŵ^(−p) M̂ A^(−p) → U = polar(S), as long as Adam's update

What takes B numbers a block is done for a whole stack, what takes B² tile by tile, so that a CPU's
caches hold it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import floor
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from adafisher_dist.numerics import fisher, fused_step
from adafisher_dist.numerics.block_stack import BlockStack, Numbers
from adafisher_dist.numerics.factors import FALLBACKS, Factor, factorize, inverted, solve
from adafisher_dist.numerics.fisher import Decay
from adafisher_dist.numerics.packing import pack
from adafisher_dist.numerics.precision import full_precision
from adafisher_dist.numerics.rounding import rounding_noise, seeds
from adafisher_dist.numerics.update_rule import (
    diagonal_update,
    natural_update,
    orthogonal_update,
    row_shares,
    scale_rows,
)
from adafisher_dist.settings import StateConfig, StepSettings

# Where F is 0, A is δ + ε on its diagonal, and the square of that has to be a number of float32's.
LEAST_IN_A = 1e-18


@dataclass(frozen=True, slots=True, eq=False)
class StepContext:
    """What a step of some blocks is taken with.

    Attributes:
        settings: of their param group.
        step: t, this step included.
        updates: k, the updates of F, this step's included where it makes one.
        should_step: where it is given, an int32 0-d tensor on the device. If it is 0, the update is
            0 and nothing else changes, whatever is in the gradient; nobody waits to know.
    """

    settings: StepSettings
    step: int
    updates: int
    should_step: Tensor | None = None

    @property
    def updates_fisher(self) -> bool:
        """Whether F is updated at this step."""
        return self.settings.updates_fisher(self.step)

    @property
    def momentum_correction(self) -> float:
        """What M̂ is of M, but for Nesterov's part."""
        own = self.settings
        return 1 / (1 - own.momentum**self.step) if own.bias_correction else 1.0

    @property
    def fisher_correction(self) -> float:
        """What F̂ is of F."""
        own = self.settings
        return 1 / (1 - own.fisher_decay**self.updates) if own.bias_correction else 1.0

    def every_step(self, updates: int) -> StepContext:
        """The same where F is updated in each step, and has been so often."""
        if self.settings.fisher_update_freq == 1 and self.updates == updates:  # as nearly always
            return self
        return replace(self, settings=self.settings._replace(fisher_update_freq=1), updates=updates)

    def fisher_decay(self, like: Tensor) -> Decay:
        """ρ and 1 − ρ; the latter is taken here, since float32 would lose its digits."""
        rho = self.settings.fisher_decay
        return Decay(self.if_stepping(rho, 1.0, like), self.if_stepping(1 - rho, 0.0, like))

    def if_stepping(self, on: float, off: float, like: Tensor) -> float | Tensor:
        """One number or the other, as `should_step` has it on the device."""
        if self.should_step is None:
            return on
        return torch.where(self.should_step.bool(), torch.full((), on, dtype=like.dtype, device=like.device), off)


def waits_for_nothing(config: StateConfig) -> bool:
    """Whether a param group's arithmetic never reads from the device, so a host need not wait.

    A Cholesky factor of A may fail, and whether it did decides what is done next; a kept factor
    would have to be put back.
    """
    return config.exponent != 1.0 and not config.keeps_factors


def refresh_interval(freq: int, updates: int, decay: float) -> int:
    """Steps between refreshes of a factor: 1 at first, `freq` when the Fisher is full.

    See DESIGN.md, "Old factors".
    """
    return max(1, min(updates, floor(freq * (1 - decay**updates) + 0.5)))


def update_blocks(blocks: BlockStack, gradient_NRB: Tensor, context: StepContext) -> None:
    """Take a step of blocks. They are independent: `BlockStack.parts` tells how many at a time.

    Args:
        blocks: their state.
        gradient_NRB: the gradient on the way in, the update on the way out; compute dtype.
        context: what the step is taken with.
    """
    context = _context_of(blocks, context)
    own, config = context.settings, blocks.config
    if blocks.fused and own.damping + own.eps >= fused_step.LEAST_DAMPING:
        _update_fused(blocks, gradient_NRB, context)
        return
    momentum_NRB = blocks.momentum_NRB
    if context.should_step is not None:
        gradient_NRB.copy_(torch.where(context.should_step.bool(), gradient_NRB, 0.0))
    mu = own.momentum
    momentum_NRB.lerp_(gradient_NRB, context.if_stepping(1 - mu, 0.0, momentum_NRB))
    if own.nesterov:
        hat_NRB = (momentum_NRB * (mu * context.momentum_correction)).add_(gradient_NRB, alpha=1 - mu)
    else:
        hat_NRB = momentum_NRB * context.momentum_correction
    decay = context.fisher_decay(momentum_NRB)
    if not blocks.shape.dense:
        fisher.update_diagonal(blocks.fisher, gradient_NRB[:, 0], decay, _seeds(blocks, context))
        moment_N11 = blocks.fisher.to(hat_NRB.dtype).unsqueeze(2) * context.fisher_correction
        update_NRB = diagonal_update(hat_NRB, moment_N11, own.eps)
    elif config.grafting == "rms":
        square_NR = _mean_squares(blocks, gradient_NRB, context, decay)
        weight_NR = None if square_NR is None else fisher.row_weights(square_NR)
        scaled_NRB = scale_rows(hat_NRB, weight_NR, config.exponent)
        solved = _precondition(blocks, gradient_NRB, scaled_NRB, weight_NR, context, decay)
        moment_NRB = fisher.second_moment(solved.diagonal_NB, square_NR)
        share_NR = None if square_NR is None else row_shares(square_NR, own.eps)
        update_NRB = orthogonal_update(solved.vectors_NRB, diagonal_update(hat_NRB, moment_NRB, own.eps), share_NR)
    else:
        solved = _precondition(blocks, gradient_NRB, hat_NRB, None, context, decay)
        update_NRB = natural_update(solved.vectors_NRB, _curvature(solved, config), config.exponent)
    if context.should_step is not None:
        update_NRB = torch.where(context.should_step.bool(), update_NRB, 0.0)
    gradient_NRB.copy_(update_NRB)


def _context_of(blocks: BlockStack, context: StepContext) -> StepContext:
    """What these blocks take the step with: not all are asked how often to update F.

    Where V bounds the update it must not lag behind the momentum: where gradients were small for a
    while, those that come next would be divided by what was left of the old squares.
    """
    if not blocks.shape.dense:
        return context.every_step(context.step)
    return context.every_step(context.updates) if blocks.config.grafting == "rms" else context


def _update_fused(blocks: BlockStack, gradient_NRB: Tensor, context: StepContext) -> None:
    """The same by the kernel."""
    own, scale = context.settings, context.momentum_correction
    scalars = fused_step.Scalars(
        1 - own.momentum,
        own.momentum * scale if own.nesterov else scale,
        1 - own.momentum if own.nesterov else 0.0,
        own.fisher_decay,
        1 - own.fisher_decay,
        context.fisher_correction,
        *damping(blocks.config, own),
        own.eps,
    )
    fused_step.step(blocks, gradient_NRB, scalars, _seeds(blocks, context), context.should_step)


def _mean_squares(blocks: BlockStack, gradient_NRB: Tensor, context: StepContext, decay: Decay) -> Tensor | None:
    """ŵ of rows, (N, R), brought up to date; None where blocks have one row."""
    if blocks.square_NR is None:
        return None
    fisher.update_squares(blocks.square_NR, gradient_NRB, decay)
    return blocks.square_NR * context.fisher_correction


class _Preconditioned(NamedTuple):
    """Vectors times A^(−p), the present diagonal of F̂, and A's d, which may be some steps old."""

    vectors_NRB: Tensor
    diagonal_NB: Tensor
    d_N: Tensor


def _precondition(
    blocks: BlockStack, gradient_NRB: Tensor, vectors_NRB: Tensor, weight_NR: Tensor | None, context: StepContext,
    decay: Decay,
) -> _Preconditioned:  # fmt: skip
    """Update F, and multiply each row by A^(−p)."""
    count, keeps = len(blocks), blocks.config.keeps_factors
    result = _Preconditioned(
        torch.empty_like(vectors_NRB), vectors_NRB.new_empty(count, blocks.shape.columns), vectors_NRB.new_empty(count)
    )
    for tile in blocks.tiles():
        part = blocks.rows(tile.start, tile.stop)
        whole_NBB = part.whole(part.fisher)
        if context.updates_fisher:
            weight = None if weight_NR is None else weight_NR[tile]
            fisher.update(whole_NBB, gradient_NRB[tile], decay, weight, _seeds(part, context))
            if part.config.packed:
                part.fisher.copy_(pack(whole_NBB))
        result.diagonal_NB[tile] = whole_NBB.diagonal(dim1=1, dim2=2)
        if not keeps:
            factor = factorize(whole_NBB, *_how(part, context))
            _count_fallbacks(part, np.arange(len(part)), factor)
            result.vectors_NRB[tile] = solve(factor, vectors_NRB[tile])
            result.d_N[tile] = factor.d_N
    result.diagonal_NB.mul_(context.fisher_correction)
    if keeps:
        _refresh(blocks, _due(blocks, context), context)
        factor = Factor(blocks.state["factor"], blocks.state["curvature"])
        return result._replace(vectors_NRB=solve(factor, vectors_NRB), d_N=factor.d_N)
    return result


def _curvature(solved: _Preconditioned, config: StateConfig) -> Tensor:
    """The d that the natural gradient is divided by: A's own, or the present one if it is larger.

    Where A is some steps old, what comes after a time without gradients would be divided by the
    little that was left.
    """
    if not config.keeps_factors:
        return solved.d_N
    return torch.where(solved.d_N > 0, torch.maximum(solved.d_N, solved.diagonal_NB.mean(dim=1)), 0.0)


def _seeds(blocks: BlockStack, context: StepContext) -> Tensor | None:
    """By which this update of a bfloat16 F is rounded."""
    return None if blocks.seeding_N is None else seeds(blocks.seeding_N, context.updates)


def rebuild_factors(blocks: BlockStack, context: StepContext) -> None:
    """Make all kept A^(−p) anew, from F after k updates: where a saved state had none."""
    if blocks.config.keeps_factors and blocks.shape.dense and context.updates > 0:
        with full_precision(blocks.device):
            _refresh(blocks, np.arange(len(blocks)), _context_of(blocks, context))


def _due(blocks: BlockStack, context: StepContext) -> Numbers:
    """Choose the blocks whose kept A^(−p) is made anew in this step, and note it in `made_N`."""
    own = context.settings
    interval = refresh_interval(own.inverse_update_freq, context.updates, own.fisher_decay)
    if interval == 1 or context.step == 1:
        due = np.arange(len(blocks))
    else:
        due = np.flatnonzero((blocks.number_N + context.step) % interval == 0)
    assert blocks.made_N is not None
    blocks.made_N[due] = context.step
    return due


def _refresh(blocks: BlockStack, due: Numbers, context: StepContext) -> None:
    """Make the kept A^(−p) of these blocks anew, some at a time, which bounds the memory."""
    for begin in range(0, len(due), blocks.refreshed_at_once):
        numbers = due[begin : begin + blocks.refreshed_at_once]
        rows = torch.from_numpy(numbers).to(blocks.device)
        factor = factorize(blocks.whole(blocks.fisher.index_select(0, rows)), *_how(blocks, context))
        _count_fallbacks(blocks, numbers, factor)
        factor = inverted(factor)
        blocks.state["factor"].index_copy_(0, rows, factor.root_NBB)
        blocks.state["curvature"].index_copy_(0, rows, factor.d_N)


def damping(config: StateConfig, settings: StepSettings) -> tuple[float, float]:
    """δ + ε in A, and the noise that it may have to outweigh."""
    return max(settings.damping + settings.eps, LEAST_IN_A), rounding_noise(settings.fisher_decay, config.fisher_dtype)


def _how(blocks: BlockStack, context: StepContext) -> tuple[float, float, float, float, torch.dtype, bool]:
    """How F is factorised: `factorize`'s arguments after the first."""
    config = blocks.config
    own, noise = damping(config, context.settings)
    return context.fisher_correction, own, noise, config.exponent, config.compute_dtype, config.grafting == "none"


def _count_fallbacks(blocks: BlockStack, rows: Numbers, factor: Factor) -> None:
    if factor.fallback_N is None:
        return
    for row, fallback in zip(rows.tolist(), factor.fallback_N.tolist(), strict=True):
        if fallback:
            counts = blocks.fallback_counts.setdefault(blocks.first + row, [0] * len(FALLBACKS))
            counts[fallback - 1] += 1
