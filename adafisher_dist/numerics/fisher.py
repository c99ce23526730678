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

FALLBACKS = ("more damping", "float64", "diagonal")

# The iteration of Newton and Schulz for polar factors and inverse roots, with the coefficients of Jordan et al. (2024,
# "Muon"): x ← a x + (b x xᵀ + c (x xᵀ)²) x, five times. It takes singular values from 2e-3 on to between 0.68 and
# 1.13, which is as good as 1 (LOG.md, 2026-11-26). `EXACT` takes them on to 1, to twelve digits.
FAST = ((3.4445, -4.7750, 2.0315),) * 5
EXACT = ((1.875, -1.25, 0.375),) * 4


class Factor(NamedTuple):
    """What preconditions a stack of blocks: made once by `factorize`, applied often by `solve`.

    root_NBB is the lower Cholesky factor of A where `triangular`, else A^(−p); d_N the mean curvature that A was scaled
    by. rungs_N is None, or for each block the fallback of the fallbacks that gave its factor (0: none was needed).
    """

    root_NBB: Tensor
    d_N: Tensor
    fallback_N: Tensor | None
    triangular: bool


def largest_gradient(dtype: torch.dtype, block_size: int) -> float:
    """The largest gradient element whose squares can be summed over a block in this dtype, with a margin of 8."""
    return float((torch.finfo(dtype).max / (8 * block_size)) ** 0.5)


def update(
    fisher_NBB: Tensor,
    gradient_NDB: Tensor,
    decay: float | Tensor,
    weight_ND: Tensor | None = None,
    seed_N: Tensor | None = None,
) -> None:
    """F ← ρ F + Σ h hᵀ with h = √((1 − ρ)/D) g, over a block's vectors, in place; arithmetic in the gradient's dtype.

    Only the lower triangle counts: a product of matrices need not be symmetric in the last bit.

    F may be stored in bfloat16. It is then rounded stochastically, since (1 − ρ) g gᵀ is soon less than half a unit in
    F's last place: rounded to nearest, F would neither fill nor decay (at ρ = 0.99 it stops 20 % off).

    Args:
        fisher_NBB: F.
        gradient_NDB: g.
        decay: ρ; a 0-d tensor where the device decides whether it is 1.
        weight_ND: by what each vector is multiplied first; see `row_weights`.
        seed_N: int32, for each block; needed for bfloat16. The same seeds give the same rounding on any rank.
    """
    h_NDB = gradient_NDB * ((1 - decay) / gradient_NDB.shape[1]) ** 0.5
    if weight_ND is not None:
        h_NDB *= weight_ND.unsqueeze(2)
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


def _add_products(fisher_NBB: Tensor, h_NDB: Tensor, decay: float | Tensor) -> None:
    """F ← ρ F + Σ h hᵀ, in place."""
    if h_NDB.shape[1] == 1:  # by element: on a CPU faster than a product of matrices (LOG.md, 2026-11-25)
        fisher_NBB.mul_(decay).addcmul_(h_NDB.mT, h_NDB)
    elif isinstance(decay, Tensor):
        fisher_NBB.mul_(decay).baddbmm_(h_NDB.mT, h_NDB)
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


def update_squares(square_ND: Tensor, gradient_NDB: Tensor, decay: float | Tensor) -> None:
    """Of each vector w ← ρ w + (1 − ρ) ‖g‖² / B, in place: what tells apart the vectors that share a block."""
    square_ND.lerp_(gradient_NDB.square().mean(dim=2), 1 - decay)


def row_weights(square_ND: Tensor) -> Tensor:
    """1/√ŵ of rows, by which F weighs its vectors, so that large ones do not drown the rest; 0 where ŵ is 0.

    F is then the right factor of a Kronecker product whose left factor is the diagonal ŵ (one step of "KL-Shampoo", Lin
    et al. 2025, arXiv 2509.03378).
    """
    return torch.where(square_ND > 0, square_ND.rsqrt(), 0.0)


def scale_rows(vectors_NDB: Tensor, weight_ND: Tensor | None, exponent: float) -> Tensor:
    """Rows times ŵ^(−p), given 1/√ŵ: the left factor's part. Each block's own scale is lost: its direction is meant."""
    if weight_ND is not None:
        for _ in range(round(2 * exponent)):
            vectors_NDB = without_scale(vectors_NDB) * weight_ND.unsqueeze(2)
    return without_scale(vectors_NDB)


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


def rounding_noise(decay: float, stored: torch.dtype) -> float:
    """Twice the standard deviation of F's elements for their rounding, as a part of them: 0 but for bfloat16.

    Rounding leaves 0.24 % at an update, and σ = 0.24 % / √(1 − ρ²) in the average (LOG.md, 2026-11-25).
    """
    return 0.005 / (1 - decay**2) ** 0.5 if stored == torch.bfloat16 else 0.0


def _scaled(fisher_NBB: Tensor, mean_N: Tensor, damping: float, noise: float) -> Tensor:
    """A = F̂/d + damping · I, symmetric; with more damping where rounding has left F with more noise than that.

    The norm of a symmetric matrix of independent noise is about twice the largest root of a row's summed variances
    (Bandeira and van Handel 2016, Annals of Probability 44), which A must outweigh to stay positive definite.
    """
    # F̂ / d = F / mean diag F. A mean that is not a normal number counts as the smallest that is: 1 / mean is finite.
    scale_N = mean_N.clamp_min(torch.finfo(mean_N.dtype).tiny).reciprocal()
    a_NBB = fisher_NBB.to(mean_N.dtype) * scale_N[:, None, None]
    a_NBB = a_NBB.tril().add_(a_NBB.tril(-1).mT)  # only the lower triangle of F counts
    if noise:
        norm_N1 = noise * torch.linalg.vector_norm(a_NBB, dim=2).amax(dim=1, keepdim=True)
        a_NBB.diagonal(dim1=1, dim2=2).add_(norm_N1.clamp_min_(damping))
    else:
        a_NBB.diagonal(dim1=1, dim2=2).add_(damping)
    return a_NBB


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


def factorize(
    fisher_NBB: Tensor, correction: float, damping: float, noise: float, exponent: float, dtype: torch.dtype,
    exact: bool,
) -> Factor:  # fmt: skip
    """Factorise A = F̂/d + damping · I, where damping is DESIGN's δ + ε, or more: see `rounding_noise`.

    Never raises for a bad block. For p = 1 it walks the fallbacks (ten times the damping, at least 1e-2; that in float64;
    the diagonal), and `fallback_N` tells how far. d = 0 gives the factor of damping · I. `exact` is of A^(−1/2).
    """
    mean_N = fisher_NBB.diagonal(dim1=1, dim2=2).to(dtype).mean(dim=1)
    d_N = mean_N * correction
    a_NBB = _scaled(fisher_NBB, mean_N, damping, noise)
    if exponent != 1.0:
        return Factor(inverse_root(a_NBB, exact), d_N, None, triangular=False)
    root_NBB, info_N = torch.linalg.cholesky_ex(a_NBB)
    failed_N = info_N != 0
    fallback_N = _fall_back(a_NBB, root_NBB, failed_N, damping) if bool(failed_N.any()) else None
    return Factor(root_NBB, d_N, fallback_N, triangular=True)


def inverse_root(a_NBB: Tensor, exact: bool) -> Tensor:
    """A^(−1/2) of symmetric positive definite blocks, by products of matrices alone.

    The iteration of `polar_factor`, coupled (Higham 2008, section 6.7): y → A^(1/2), z → A^(−1/2), of A over its norm.
    Where it is not `exact`, it is A^(−1/2) but for a factor of 0.68 to 1.13 in each eigenvalue.
    """
    norm_N11 = torch.linalg.matrix_norm(a_NBB, keepdim=True)
    y_NBB = a_NBB / norm_N11
    steps = FAST + (EXACT if exact else ())
    z_NBB: Tensor | None = None
    for number, (a, b, c) in enumerate(steps, 1):
        product_NBB = y_NBB if z_NBB is None else z_NBB @ y_NBB
        polynomial_NBB = torch.baddbmm(product_NBB, product_NBB, product_NBB, beta=b, alpha=c)
        polynomial_NBB.diagonal(dim1=1, dim2=2).add_(a)
        z_NBB = polynomial_NBB if z_NBB is None else polynomial_NBB @ z_NBB
        if number < len(steps):
            y_NBB = y_NBB @ polynomial_NBB
    assert z_NBB is not None
    return z_NBB.mul_(norm_N11.rsqrt())


def condition_number(fisher_NBB: Tensor, damping: float, noise: float, dtype: torch.dtype) -> Tensor:
    """‖A‖₁ ‖A⁻¹‖₁ of each block, (N,), at most B times the ratio of its eigenvalues; NaN or ∞ where A has no factor."""
    mean_N = fisher_NBB.diagonal(dim1=1, dim2=2).to(dtype).mean(dim=1)
    a_NBB = _scaled(fisher_NBB, mean_N, damping, noise)
    eye_NBB = torch.eye(a_NBB.shape[1], dtype=dtype, device=a_NBB.device).expand_as(a_NBB)
    root_NBB = torch.linalg.cholesky_ex(a_NBB).L  # where there is none, no error, which would wait for the device
    half_NBB = torch.linalg.solve_triangular(root_NBB, eye_NBB, upper=False)
    norms = [matrix_NBB.abs().sum(dim=1).amax(dim=1) for matrix_NBB in (a_NBB, half_NBB.mT @ half_NBB)]
    return norms[0] * norms[1]


def solve(factor: Factor, vectors_NDB: Tensor) -> Tensor:
    """Each vector times A^(−p). Vectors are rows: a row times a symmetric matrix."""
    if not factor.triangular:
        return vectors_NDB @ factor.root_NBB
    # x A⁻¹ = (x L⁻ᵀ) L⁻¹
    half_NDB = torch.linalg.solve_triangular(factor.root_NBB.mT, vectors_NDB, upper=True, left=False)
    result: Tensor = torch.linalg.solve_triangular(factor.root_NBB, half_NDB, upper=False, left=False)
    return result


def without_scale(vectors_NDB: Tensor) -> Tensor:
    """Each block over its largest element, so that no product leaves the dtype's range; zeros stay zeros."""
    largest_N11 = vectors_NDB.abs().amax(dim=(1, 2), keepdim=True)
    return vectors_NDB / torch.where(largest_N11 > 0, largest_N11, 1.0)


def orthogonal_update(vectors_NDB: Tensor, by_diagonal_NDB: Tensor) -> Tensor:
    """The update of a stack of blocks: the polar factor of each, as long as `by_diagonal_NDB`; of zeros, zeros.

    The polar factor of X = U Σ Vᵀ is U Vᵀ: of all matrices of this spectral norm that with the most progress along X.
    """
    x_NDB = polar_factor(vectors_NDB)
    norm_N11, length_N11 = (torch.linalg.vector_norm(v, dim=(1, 2), keepdim=True) for v in (x_NDB, by_diagonal_NDB))
    return x_NDB.mul_(torch.where(norm_N11 > 0, length_N11 / norm_N11, 0.0))


def second_moment(diagonal_NB: Tensor, square_ND: Tensor | None) -> Tensor:
    """The second moment of each element, (N, D, B), or (N, 1, B) for blocks of one vector, whose diag F̂ it is.

    Of vectors that share a block it is the product of what is known of rows and of columns, ŵ · diag F̂ / d: Adafactor's
    (Shazeer and Stern 2018, algorithm 1).
    """
    if square_ND is None:
        return diagonal_NB.unsqueeze(1)
    d_N1 = diagonal_NB.mean(dim=1, keepdim=True).clamp_min(torch.finfo(diagonal_NB.dtype).tiny)
    return square_ND.unsqueeze(2) * (diagonal_NB / d_N1).unsqueeze(1)


def polar_factor(vectors_NDB: Tensor) -> Tensor:
    """The polar factor of each block, about; see `FAST`."""
    tall = vectors_NDB.shape[1] > vectors_NDB.shape[2]
    norm_N11 = torch.linalg.vector_norm(vectors_NDB, dim=(1, 2), keepdim=True)
    x_NIJ = vectors_NDB / torch.where(norm_N11 > 0, norm_N11, 1.0)
    x_NIJ = x_NIJ.mT if tall else x_NIJ
    for a, b, c in FAST:
        gram_NII = x_NIJ @ x_NIJ.mT
        polynomial_NII = torch.baddbmm(gram_NII, gram_NII, gram_NII, beta=b, alpha=c)
        x_NIJ = torch.baddbmm(x_NIJ, polynomial_NII, x_NIJ, beta=a)
    return x_NIJ.mT.contiguous() if tall else x_NIJ


def natural_update(vectors_NDB: Tensor, d_N: Tensor, exponent: float) -> Tensor:
    """The update of grafting="none", F̂^(−p) m̂, given A^(−p) m̂: times d^(−p); zeros where d = 0."""
    unit_N11 = torch.where(d_N > 0, d_N.rsqrt(), 0.0)[:, None, None]
    result: Tensor = (vectors_NDB * unit_N11) * unit_N11 ** (2 * exponent - 1)  # in two steps, within the dtype's range
    return result


def update_diagonal(
    fisher_N1: Tensor, gradient_N1: Tensor, decay: float | Tensor, seed_N: Tensor | None = None
) -> None:
    """Diag F ← ρ diag F + (1 − ρ) g², in place, for elements without blocks; otherwise as `update`."""
    if fisher_N1.dtype == gradient_N1.dtype:
        fisher_N1.lerp_(gradient_N1.square(), 1 - decay)
    else:
        assert seed_N is not None
        wide_N1 = fisher_N1.to(gradient_N1.dtype).lerp_(gradient_N1.square(), 1 - decay)
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
    """m̂ / (√v + ε), v being the second moment: Adam's. 0 where v is: of that element F has not seen a gradient yet."""
    return torch.where(moment > 0, momentum / moment.sqrt().add_(eps), 0.0)


def _fall_back(a_NBB: Tensor, root_NBB: Tensor, failed_N: Tensor, damping: float) -> Tensor:
    """Replace the failed Cholesky factors in `root_NBB`; returns rungs_N."""
    fallback_N = torch.zeros_like(failed_N, dtype=torch.int64)
    failed = failed_N.nonzero().squeeze(1)
    more_NBB = a_NBB[failed]
    more_NBB.diagonal(dim1=1, dim2=2).add_(max(10 * damping, 1e-2) - damping)
    for fallback, dtype in enumerate((a_NBB.dtype, torch.float64), start=1):
        again_NBB, info_N = torch.linalg.cholesky_ex(more_NBB.to(dtype))
        still_N = info_N != 0
        root_NBB[failed] = again_NBB.to(root_NBB.dtype)
        fallback_N[failed] = fallback
        failed, more_NBB = failed[still_N], more_NBB[still_N]
        if len(failed) == 0:
            return fallback_N
    root_NBB[failed] = torch.diag_embed(more_NBB.diagonal(dim1=1, dim2=2).clamp_min(1e-2).sqrt())
    fallback_N[failed] = len(FALLBACKS)
    return fallback_N
