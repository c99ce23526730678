"""The maths on stacked blocks (DESIGN.md, section 2): pure functions, no state, no communication.

Shape suffixes: N blocks, B elements a block, T = B (B + 1) / 2 elements of a lower triangle. Formulas use DESIGN's
symbols: F Fisher, d mean curvature, A = F̂/d + (δ + ε) I with F̂ = F · correction, p exponent, m̂ momentum.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

RUNGS = ("more damping", "float64", "diagonal")


class Factor(NamedTuple):
    """What preconditions a stack of blocks: made once by `factorize`, applied often by `solve`.

    root_NBB is the lower Cholesky factor of A where `triangular`, else A^(−p); d_N the mean curvature that A was scaled
    by. rungs_N is None, or for each block the rung of the ladder that gave its factor (0: none was needed).
    """

    root_NBB: Tensor
    d_N: Tensor
    rungs_N: Tensor | None
    triangular: bool


def largest_gradient(dtype: torch.dtype, block_size: int) -> float:
    """The largest gradient element whose squares can be summed over a block in this dtype, with a margin of 8."""
    return float((torch.finfo(dtype).max / (8 * block_size)) ** 0.5)


def update(fisher_NBB: Tensor, gradient_NB: Tensor, decay: float, seed_N: Tensor | None = None) -> None:
    """F ← ρ F + h hᵀ with h = √(1 − ρ) g, in place; the arithmetic has the gradient's dtype.

    By element: hᵢ hⱼ = hⱼ hᵢ to the last bit, no product is made in TF32, and on a CPU it is faster than a batched
    matrix product (LOG.md, 2026-11-25).

    F may be stored in bfloat16. It is then rounded stochastically, since (1 − ρ) g gᵀ is soon less than half a unit in
    F's last place: rounded to nearest, F would neither fill nor decay (at ρ = 0.99 it stops 20 % off).

    Args:
        fisher_NBB: F.
        gradient_NB: g.
        decay: ρ.
        seed_N: int32, for each block; needed for bfloat16. The same seeds give the same rounding on any rank.
    """
    h_NB = gradient_NB * (1 - decay) ** 0.5
    column_NB1, row_N1B = h_NB.unsqueeze(2), h_NB.unsqueeze(1)
    if fisher_NBB.dtype == gradient_NB.dtype:
        fisher_NBB.mul_(decay).addcmul_(column_NB1, row_N1B)
    else:
        assert seed_N is not None
        wide_NBB = fisher_NBB.to(gradient_NB.dtype).mul_(decay).addcmul_(column_NB1, row_N1B)
        index_B = torch.arange(fisher_NBB.shape[1], dtype=torch.int32, device=seed_N.device)
        # Alike for (i, j) and (j, i), so that F stays symmetric.
        low_BB, high_BB = torch.minimum(index_B[:, None], index_B), torch.maximum(index_B[:, None], index_B)
        _round_stochastically(wide_NBB, _scramble((low_BB << 16) + high_BB) ^ seed_N[:, None, None])
        fisher_NBB.copy_(wide_NBB)


def pack(fisher_NBB: Tensor) -> Tensor:
    """The lower triangles of symmetric blocks, row-major, (N, T): element (i, j), i ≥ j, is at i (i + 1) / 2 + j."""
    lower_T, _ = _places(fisher_NBB.shape[1], fisher_NBB.device)
    return _columns(fisher_NBB.flatten(1), lower_T)


def unpack(fisher_NT: Tensor, size: int) -> Tensor:
    """The inverse of `pack`: whole blocks, (N, size, size)."""
    _, full = _places(size, fisher_NT.device)
    return _columns(fisher_NT, full).view(-1, size, size)


def packed_numel(size: int) -> int:
    """T: elements of a block's lower triangle."""
    return size * (size + 1) // 2


def _columns(x: Tensor, index: Tensor) -> Tensor:
    if x.dtype == torch.bfloat16 and x.device.type == "cpu":  # where torch is fast in float32 only, by five times
        return x.float().index_select(1, index).to(x.dtype)
    return x.index_select(1, index)


@cache
def _places(size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Where each element of a lower triangle is in a whole block, (T,), and the reverse, (size²,)."""
    index_B = torch.arange(size, device=device)
    low_BB, high_BB = torch.minimum(index_B[:, None], index_B), torch.maximum(index_B[:, None], index_B)
    row_T, column_T = torch.tril_indices(size, size, device=device)
    return row_T * size + column_T, (high_BB * (high_BB + 1) // 2 + low_BB).flatten()


def inverted(factor: Factor) -> Factor:
    """The same as A^(−p): dearer to make than a Cholesky factor, and much cheaper to apply, where it is kept.

    A is at most block_size/damping conditioned, so that its inverse loses nothing that matters.
    """
    if not factor.triangular:
        return factor
    eye_NBB = torch.eye(factor.root_NBB.shape[1], dtype=factor.d_N.dtype, device=factor.d_N.device)
    # L⁻ᵀ L⁻¹; twice as fast as torch.cholesky_inverse on a CPU.
    inverse_NBB = torch.linalg.solve_triangular(
        factor.root_NBB, eye_NBB.expand_as(factor.root_NBB), upper=False, left=False
    )
    return factor._replace(root_NBB=inverse_NBB.mT @ inverse_NBB, triangular=False)


def factorize(fisher_NBB: Tensor, correction: float, damping: float, exponent: float, dtype: torch.dtype) -> Factor:
    """Factorise A = F̂/d + damping · I, where damping is DESIGN's δ + ε.

    Never raises for a bad block: it walks the ladder (ten times the damping, at least 1e-2; that in float64; the
    diagonal), and `rungs_N` tells how far. d = 0 gives the factor of damping · I.
    """
    mean_N = fisher_NBB.diagonal(dim1=1, dim2=2).to(dtype).mean(dim=1)
    d_N = mean_N * correction
    # F̂ / d = F / mean diag F. A mean that is not a normal number counts as the smallest that is: 1 / mean is finite.
    scale_N = mean_N.clamp_min(torch.finfo(dtype).tiny).reciprocal_()
    a_NBB = fisher_NBB.to(dtype) * scale_N[:, None, None]
    a_NBB.diagonal(dim1=1, dim2=2).add_(damping)
    root_NBB, failed_N = _root(a_NBB, exponent)
    rungs_N = _climb(a_NBB, root_NBB, failed_N, damping, exponent) if bool(failed_N.any()) else None
    return Factor(root_NBB, d_N, rungs_N, triangular=exponent == 1.0)


class Solution(NamedTuple):
    """What `graft` needs of a stack of blocks.

    solution_NB is A^(−p) m̂/√d, which has no units, so that no norm leaves the dtype's range (where d = 0, A^(−p) m̂);
    diagonal_NB today's diagonal of F̂; d_N the d of the factor, which may be some steps old.
    """

    solution_NB: Tensor
    diagonal_NB: Tensor
    d_N: Tensor


def solve(factor: Factor, momentum_NB: Tensor, solution_NB: Tensor) -> None:
    """A^(−p) m̂/√d into `solution_NB`; see `Solution`."""
    right_NB = momentum_NB * _unit(factor.d_N)[:, None]
    if factor.triangular:
        left_NB1 = torch.linalg.solve_triangular(factor.root_NBB, right_NB.unsqueeze(2), upper=False)
        torch.linalg.solve_triangular(factor.root_NBB.mT, left_NB1, upper=True, out=solution_NB.unsqueeze(2))
    else:
        # A row times a symmetric matrix: on a CPU three to ten times as fast as the matrix times a column (LOG.md).
        torch.bmm(right_NB.unsqueeze(1), factor.root_NBB, out=solution_NB.unsqueeze(1))


def _unit(d_N: Tensor) -> Tensor:
    """1/√d, or 1 where d = 0."""
    return torch.where(d_N > 0, d_N.rsqrt(), 1.0)


def graft(solution: Solution, momentum_NB: Tensor, eps: float, exponent: float, grafting: str) -> Tensor:
    """The update u_NB of a stack of blocks.

    Args:
        solution: by `solve`; changed.
        momentum_NB: m̂.
        eps: ε of the diagonal's update, from which "rms" takes the length.
        exponent: p.
        grafting: "rms": direction from F, length from the diagonal; "none": d^(−p) A^(−p) m̂.

    Returns:
        u_NB. A block whose Fisher is zero gets zeros; one whose direction is not representable (an underflow, an
        overflow) gets the diagonal's update.
    """
    s_NB, diagonal_NB, d_N = solution
    by_diagonal_NB = diagonal_update(momentum_NB, diagonal_NB, eps)
    norm_N = torch.linalg.vector_norm(s_NB, dim=1)
    usable_N = (norm_N > 0) & (norm_N < torch.inf)
    if grafting == "rms":
        seen_N = diagonal_NB.sum(dim=1) > 0
        scale_N = torch.linalg.vector_norm(by_diagonal_NB, dim=1) / norm_N
    else:
        seen_N = d_N > 0
        scale_N = _unit(d_N) ** (2 * exponent - 1)  # d^(−p) √d
    u_NB = s_NB.mul_(scale_N[:, None])
    if not bool((usable_N & seen_N).all()):  # asked, since `where` is slow on a CPU; blocks without a gradient are rare
        u_NB = torch.where(usable_N[:, None], u_NB, by_diagonal_NB)
        u_NB = torch.where(seen_N[:, None], u_NB, 0.0)
    return u_NB


def update_diagonal(fisher_N1: Tensor, gradient_N1: Tensor, decay: float, seed_N: Tensor | None = None) -> None:
    """Diag F ← ρ diag F + (1 − ρ) g², in place, for elements past max_blocks; otherwise as `update`."""
    if fisher_N1.dtype == gradient_N1.dtype:
        fisher_N1.mul_(decay).addcmul_(gradient_N1, gradient_N1, value=1 - decay)
    else:
        assert seed_N is not None
        wide_N1 = fisher_N1.to(gradient_N1.dtype).mul_(decay).addcmul_(gradient_N1, gradient_N1, value=1 - decay)
        _round_stochastically(wide_N1, seed_N[:, None])
        fisher_N1.copy_(wide_N1)


def seeds(number_N: Tensor, update: int) -> Tensor:
    """The seeds of blocks by their numbers at their k-th Fisher update: int32."""
    return _scramble(number_N * 0x9E3779B + update * 0x5851F42 % (1 << 31))


def _round_stochastically(x: Tensor, seed: Tensor) -> None:
    """Leave what bfloat16 can hold of a finite float32 tensor, in place: up or down, so that the mean is kept."""
    bits = x.view(torch.int32)
    bits.add_(_scramble(seed).bitwise_and_(0xFFFF)).bitwise_and_(-0x10000)


def _scramble(x: Tensor) -> Tensor:
    """A hash of each int32 (the finaliser of MurmurHash3); products wrap."""
    x = (x ^ ((x >> 16) & 0xFFFF)) * -0x7A143595
    x = (x ^ ((x >> 13) & 0x7FFFF)) * -0x3D4D51CB
    return x ^ ((x >> 16) & 0xFFFF)


def diagonal_update(momentum_NB: Tensor, diagonal_NB: Tensor, eps: float) -> Tensor:
    """m̂ / (√diag F̂ + ε)."""
    return momentum_NB / diagonal_NB.sqrt().add_(eps)


def _root(a_NBB: Tensor, exponent: float) -> tuple[Tensor, Tensor]:
    """(root_NBB as in Factor, whether each block failed)."""
    if exponent == 1.0:
        root_NBB, info_N = torch.linalg.cholesky_ex(a_NBB)
        return root_NBB, info_N != 0
    try:
        values_NB, vectors_NBB = torch.linalg.eigh(a_NBB)
    except LinAlgError:  # of the whole stack, though perhaps one block alone did not converge
        if len(a_NBB) == 1:
            return torch.zeros_like(a_NBB), torch.ones(1, dtype=torch.bool, device=a_NBB.device)
        halves = [_root(half_NBB, exponent) for half_NBB in a_NBB.tensor_split(2)]
        return torch.cat([root for root, _ in halves]), torch.cat([failed for _, failed in halves])
    root_NBB = (vectors_NBB * values_NB.rsqrt().unsqueeze(1)) @ vectors_NBB.mT
    return root_NBB, ~(values_NB[:, 0] > 0)


def _climb(a_NBB: Tensor, root_NBB: Tensor, failed_N: Tensor, damping: float, exponent: float) -> Tensor:
    """Replace the failed factors in `root_NBB`; returns rungs_N."""
    rungs_N = torch.zeros_like(failed_N, dtype=torch.int64)
    failed = failed_N.nonzero().squeeze(1)
    more_NBB = a_NBB[failed]
    more_NBB.diagonal(dim1=1, dim2=2).add_(max(10 * damping, 1e-2) - damping)
    for rung, dtype in enumerate((a_NBB.dtype, torch.float64), start=1):
        again_NBB, still_N = _root(more_NBB.to(dtype), exponent)
        root_NBB[failed] = again_NBB.to(root_NBB.dtype)
        rungs_N[failed] = rung
        failed, more_NBB = failed[still_N], more_NBB[still_N]
        if len(failed) == 0:
            return rungs_N
    power = 0.5 if exponent == 1.0 else -0.5  # a Cholesky factor, or A^(−1/2)
    root_NBB[failed] = torch.diag_embed(more_NBB.diagonal(dim1=1, dim2=2).clamp_min(1e-2) ** power)
    rungs_N[failed] = len(RUNGS)
    return rungs_N
