"""F, the gradient averages that precondition blocks, and the second moments taken from them.

Shape suffixes, here and in the other modules of this folder: N blocks, R rows that share a block, B
elements of a row, T = B (B + 1) / 2 elements of a lower triangle. Formulas use DESIGN's symbols: F
Fisher, d mean curvature, A = F̂/d + (δ + ε) I with F̂ = F · correction, p exponent, m̂ momentum.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from adafisher_dist.numerics.rounding import round_stochastically, seeds_of_elements


class Decay(NamedTuple):
    """How an average takes in a gradient: ρ of what it was, and 1 − ρ of the new.

    0-d tensors where the device decides whether they are 1 and 0, which changes nothing.
    """

    old: float | Tensor
    new: float | Tensor


def gradient_limit(dtype: torch.dtype, block_size: int) -> float:
    """Largest gradient element whose squares sum up over a block in this dtype; margin of 8."""
    return float((torch.finfo(dtype).max / (8 * block_size)) ** 0.5)


def update(
    fisher_NBB: Tensor,
    gradient_NRB: Tensor,
    decay: Decay,
    weight_NR: Tensor | None = None,
    seed_N: Tensor | None = None,
) -> None:
    """F ← ρ F + Σ h hᵀ with h = √((1 − ρ)/R) g, over a block's rows, in place.

    Arithmetic is in the gradient's dtype. Only the lower triangle counts: a product of matrices
    need not be symmetric in the last bit.

    F may be stored in bfloat16. It is then rounded stochastically, since (1 − ρ) g gᵀ is soon less
    than half a unit in F's last place: rounded to nearest, F would neither fill nor decay (at ρ =
    0.99 it stops 20 % off).

    Args:
        fisher_NBB: F.
        gradient_NRB: g.
        decay: ρ.
        weight_NR: by what each row is multiplied first; see `row_weights`.
        seed_N: int32, for each block; needed for bfloat16. The same seeds give the same rounding on
            any rank.
    """
    h_NRB = gradient_NRB * (decay.new / gradient_NRB.shape[1]) ** 0.5
    if weight_NR is not None:
        h_NRB *= weight_NR.unsqueeze(2)
    rounded = fisher_NBB.dtype != gradient_NRB.dtype
    wide_NBB = fisher_NBB.to(gradient_NRB.dtype) if rounded else fisher_NBB
    if h_NRB.shape[1] == 1:  # by element: on a CPU faster than a product of matrices (LOG.md, 2026-11-25)
        wide_NBB.mul_(decay.old).addcmul_(h_NRB.mT, h_NRB)
    elif isinstance(decay.old, Tensor):
        wide_NBB.mul_(decay.old).baddbmm_(h_NRB.mT, h_NRB)
    else:
        wide_NBB.baddbmm_(h_NRB.mT, h_NRB, beta=decay.old)
    if rounded:
        assert seed_N is not None
        round_stochastically(wide_NBB, seeds_of_elements(seed_N, fisher_NBB.shape[1]))
        fisher_NBB.copy_(wide_NBB)


def update_diagonal(fisher_N1: Tensor, gradient_N1: Tensor, decay: Decay, seed_N: Tensor | None = None) -> None:
    """Diag F ← ρ diag F + (1 − ρ) g², in place, for elements without blocks.

    seed_N is overwritten.
    """
    if fisher_N1.dtype == gradient_N1.dtype:
        fisher_N1.lerp_(gradient_N1.square(), decay.new)
    else:
        assert seed_N is not None
        wide_N1 = fisher_N1.to(gradient_N1.dtype).lerp_(gradient_N1.square(), decay.new)
        round_stochastically(wide_N1, seed_N[:, None])
        fisher_N1.copy_(wide_N1)


def update_squares(square_NR: Tensor, gradient_NRB: Tensor, decay: Decay) -> None:
    """For each row w ← ρ w + (1 − ρ) ‖g‖² / B, in place: it tells the rows of a block apart."""
    square_NR.lerp_(gradient_NRB.square().mean(dim=2), decay.new)


def row_weights(square_NR: Tensor) -> Tensor:
    """1/√ŵ of each row, its weight in F, so that large rows do not dominate; 0 where ŵ is 0.

    F is then the right factor of a Kronecker product whose left factor is the diagonal ŵ (one step
    of "KL-Shampoo", Lin et al. 2025, arXiv 2509.03378).
    """
    return torch.where(square_NR > 0, square_NR.rsqrt(), 0.0)


def second_moment(diagonal_NB: Tensor, square_NR: Tensor | None) -> Tensor:
    """The second moment of each element, (N, R, B); for blocks of one row diag F̂, (N, 1, B).

    For rows that share a block it is the product of what is known of rows and of columns, ŵ · diag
    F̂ / d: Adafactor's (Shazeer and Stern 2018, algorithm 1).
    """
    if square_NR is None:
        return diagonal_NB.unsqueeze(1)
    d_N1 = diagonal_NB.mean(dim=1, keepdim=True).clamp_min(torch.finfo(diagonal_NB.dtype).tiny)
    return square_NR.unsqueeze(2) * (diagonal_NB / d_N1).unsqueeze(1)
