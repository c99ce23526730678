"""The maths on stacked blocks (DESIGN.md, section 2): pure functions, no state, no communication.

Shape suffixes: N blocks, D vectors that share a block, B elements a vector, T = B (B + 1) / 2 elements of a lower
triangle. Formulas use DESIGN's symbols: F Fisher, d mean curvature, A = F̂/d + (δ + ε) I with F̂ = F · correction,
p exponent, m̂ momentum.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

RUNGS = ("more damping", "float64", "diagonal")

# How many times as long as the diagonal's an update may be, to make as much progress along the gradient; and how far a
# step may move the output of a unit, in units of its inputs: each of its L weights by as much over L.
LARGEST_STRETCH = 16.0
TRUST_RADIUS = 1.0


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


def update(fisher_NBB: Tensor, gradient_NDB: Tensor, decay: float, seed_N: Tensor | None = None) -> None:
    """F ← ρ F + Σ h hᵀ with h = √((1 − ρ)/D) g, over a block's vectors, in place; arithmetic in the gradient's dtype.

    Only the lower triangle counts: a product of matrices need not be symmetric in the last bit.

    F may be stored in bfloat16. It is then rounded stochastically, since (1 − ρ) g gᵀ is soon less than half a unit in
    F's last place: rounded to nearest, F would neither fill nor decay (at ρ = 0.99 it stops 20 % off).

    Args:
        fisher_NBB: F.
        gradient_NDB: g.
        decay: ρ.
        seed_N: int32, for each block; needed for bfloat16. The same seeds give the same rounding on any rank.
    """
    h_NDB = gradient_NDB * ((1 - decay) / gradient_NDB.shape[1]) ** 0.5
    if fisher_NBB.dtype == gradient_NDB.dtype:
        _add_products(fisher_NBB, h_NDB, decay)
    else:
        assert seed_N is not None
        wide_NBB = fisher_NBB.to(gradient_NDB.dtype)
        _add_products(wide_NBB, h_NDB, decay)
        index_B = torch.arange(fisher_NBB.shape[1], dtype=torch.int32, device=seed_N.device)
        # Alike for (i, j) and (j, i), so that F stays symmetric.
        low_BB, high_BB = torch.minimum(index_B[:, None], index_B), torch.maximum(index_B[:, None], index_B)
        _round_stochastically(wide_NBB, _scramble((low_BB << 16) + high_BB) ^ seed_N[:, None, None])
        fisher_NBB.copy_(wide_NBB)


def _add_products(fisher_NBB: Tensor, h_NDB: Tensor, decay: float) -> None:
    """F ← ρ F + Σ h hᵀ, in place."""
    if h_NDB.shape[1] == 1:  # by element: on a CPU faster than a product of matrices (LOG.md, 2026-11-25)
        fisher_NBB.mul_(decay).addcmul_(h_NDB.mT, h_NDB)
    else:
        fisher_NBB.baddbmm_(h_NDB.mT, h_NDB, beta=decay)


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Products on a GPU as float32 has them: the TF32 that users allow their models would round F to 10 bits."""
    if device.type != "cuda":
        yield
        return
    matmul = torch.backends.cuda.matmul
    try:
        allowed = matmul.allow_tf32
    except RuntimeError:  # somebody has set it by torch 2.9's names, and torch refuses a mixture of both
        before = matmul.fp32_precision
        matmul.fp32_precision = "ieee"
        try:
            yield
        finally:
            matmul.fp32_precision = before
        return
    if not allowed:
        yield
        return
    precision = torch.get_float32_matmul_precision()  # "high", or "medium", which allow_tf32 would make "high"
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)


def update_squares(square_ND: Tensor, gradient_NDB: Tensor, decay: float) -> None:
    """Of each vector w ← ρ w + (1 − ρ) ‖g‖² / B, in place: what tells apart the vectors that share a block."""
    square_ND.lerp_(gradient_NDB.square().mean(dim=2), 1 - decay)


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


def damping(delta: float, eps: float, decay: float, size: int, stored: torch.dtype) -> float:
    """δ + ε of a block of vectors of `size` elements; more where F is stored in bfloat16.

    Rounding leaves noise in each element of such an F, of 0.24 % of it at an update and σ = 0.24 % / √(1 − ρ²) in the
    average. Its norm is about 2 √B σ mean curvatures, which A must outweigh to stay positive definite (LOG.md,
    2026-11-25).
    """
    if stored == torch.bfloat16:
        delta = max(delta, 0.005 * (size / (1 - decay**2)) ** 0.5)
    return delta + eps


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


def condition_number(fisher_NBB: Tensor, damping: float, dtype: torch.dtype) -> Tensor:
    """‖A‖₁ ‖A⁻¹‖₁ of each block, (N,), at most B times the ratio of its eigenvalues; NaN or ∞ where A has no factor."""
    mean_N = fisher_NBB.diagonal(dim1=1, dim2=2).to(dtype).mean(dim=1)
    a_NBB = fisher_NBB.to(dtype) / mean_N.clamp_min(torch.finfo(dtype).tiny)[:, None, None]
    a_NBB = a_NBB.tril().add_(a_NBB.tril(-1).mT)  # only the lower triangle of F counts
    a_NBB.diagonal(dim1=1, dim2=2).add_(damping)
    eye_NBB = torch.eye(a_NBB.shape[1], dtype=dtype, device=a_NBB.device).expand_as(a_NBB)
    root_NBB = torch.linalg.cholesky_ex(a_NBB).L  # where there is none, no error, which would wait for the device
    half_NBB = torch.linalg.solve_triangular(root_NBB, eye_NBB, upper=False)
    norms = [matrix_NBB.abs().sum(dim=1).amax(dim=1) for matrix_NBB in (a_NBB, half_NBB.mT @ half_NBB)]
    return norms[0] * norms[1]


class Solution(NamedTuple):
    """What `graft` needs of a stack of blocks.

    solution_NDB is A^(−p) m̂/√d, which has no units, so that no norm leaves the dtype's range (where d = 0, A^(−p) m̂);
    diagonal_NB today's diagonal of F̂; d_N the d of the factor, which may be some steps old.
    """

    solution_NDB: Tensor
    diagonal_NB: Tensor
    d_N: Tensor


def solve(factor: Factor, momentum_NDB: Tensor, solution_NDB: Tensor) -> None:
    """A^(−p) m̂/√d into `solution_NDB`; see `Solution`. Vectors are rows: a row times a symmetric matrix."""
    right_NDB = momentum_NDB * _unit(factor.d_N)[:, None, None]
    if factor.triangular:
        # m̂ A⁻¹ = (m̂ L⁻ᵀ) L⁻¹
        half_NDB = torch.linalg.solve_triangular(factor.root_NBB.mT, right_NDB, upper=True, left=False)
        torch.linalg.solve_triangular(factor.root_NBB, half_NDB, upper=False, left=False, out=solution_NDB)
    else:
        torch.bmm(right_NDB, factor.root_NBB, out=solution_NDB)


def _unit(d_N: Tensor) -> Tensor:
    """1/√d, or 1 where d = 0."""
    return torch.where(d_N > 0, d_N.rsqrt(), 1.0)


def second_moment(diagonal_NB: Tensor, square_ND: Tensor | None) -> Tensor:
    """The second moment of each element, (N, D, B), or (N, 1, B) for blocks of one vector.

    Of vectors that share a block it is the product of what is known of columns and of rows, diag F̂ · ŵ / d: Adafactor's
    (Shazeer and Stern 2018, algorithm 1), d being the mean of both.
    """
    if square_ND is None:
        return diagonal_NB.unsqueeze(1)
    d_N1 = diagonal_NB.mean(dim=1, keepdim=True).clamp_min(torch.finfo(diagonal_NB.dtype).tiny)
    return (square_ND / d_N1).unsqueeze(2) * diagonal_NB.unsqueeze(1)


def reach(lr: float) -> float:
    """The stretch that takes a step of this learning rate to the trust radius, in rows of one element."""
    return TRUST_RADIUS / lr if lr > 0 else float("inf")


def largest_stretch(length_N: Tensor, lr: float) -> Tensor:
    """The bound of κ for blocks in rows of these lengths L, (N,): 1/(η L), but at most 16."""
    return (reach(lr) / length_N).clamp_(max=LARGEST_STRETCH)


def graft(
    solution: Solution,
    momentum_NDB: Tensor,
    moment_NDB: Tensor,
    stretch_N: Tensor,
    eps: float,
    exponent: float,
    grafting: str,
) -> Tensor:
    """The update u_NDB of a stack of blocks.

    Args:
        solution: by `solve`; changed.
        momentum_NDB: m̂.
        moment_NDB: by `second_moment`.
        stretch_N: by `largest_stretch`.
        eps: ε of the diagonal's update, from which "rms" takes the length.
        exponent: p.
        grafting: "rms": direction from F, the length of each vector from the diagonal's update; "none":
            d^(−p) A^(−p) m̂.

    Returns:
        u_NDB. A vector whose second moment is zero gets zeros; one whose direction is not representable (an underflow,
        an overflow) gets the diagonal's update.
    """
    s_NDB, _, d_N = solution
    by_diagonal_NDB = diagonal_update(momentum_NDB, moment_NDB, eps)
    norm_ND = torch.linalg.vector_norm(s_NDB, dim=2)
    usable_ND = (norm_ND > 0) & (norm_ND < torch.inf)
    if grafting == "rms":
        seen_ND = moment_NDB.sum(dim=2) > 0
        length_ND = torch.linalg.vector_norm(by_diagonal_NDB, dim=2)
        # Without units, so that no product leaves the dtype's range before its norm does.
        unitless_NDB = momentum_NDB * _unit(d_N)[:, None, None]
        progress_ND = (unitless_NDB * s_NDB).sum(dim=2) / norm_ND
        wanted_ND = (unitless_NDB * by_diagonal_NDB).sum(dim=2) / length_ND
        stretch_ND = (wanted_ND / progress_ND).clamp_(min=1.0).minimum(stretch_N.unsqueeze(1)).nan_to_num_(1.0)
        scale_ND = length_ND / norm_ND * stretch_ND
    else:
        seen_ND = (d_N > 0).unsqueeze(1)
        scale_ND = (_unit(d_N) ** (2 * exponent - 1)).unsqueeze(1)  # d^(−p) √d
    u_NDB = s_NDB.mul_(scale_ND.unsqueeze(2))
    if not bool((usable_ND & seen_ND).all()):  # asked, since `where` is slow on a CPU; rows without a gradient are rare
        u_NDB = torch.where(usable_ND.unsqueeze(2), u_NDB, by_diagonal_NDB)
        u_NDB = torch.where(seen_ND.unsqueeze(2), u_NDB, 0.0)
    return u_NDB


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


def diagonal_update(momentum: Tensor, moment: Tensor, eps: float) -> Tensor:
    """m̂ / (√v + ε), v being the second moment: Adam's."""
    return momentum / moment.sqrt().add_(eps)


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
