"""A = F̂/d + (δ + ε) I, and A^(−p): made once by `factorize`, applied often by `solve`."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from adafisher_dist.numerics.newton_schulz import Step, inverse_root, steps_from, times_inverse_root

# What is done for a block that has no Cholesky factor, one after the other.
FALLBACKS = ("more damping", "float64", "diagonal")

# The root of an eigenvalue of A over its norm, below which it counts as that.
LEAST = 2e-3


class Factor(NamedTuple):
    """What preconditions a stack of blocks.

    root_NBB is the lower Cholesky factor of A where `triangular`; A itself where there are `steps`,
    which multiply by A^(−1/2); else A^(−p). d_N is the mean curvature that A was scaled by.
    fallback_N is None, or tells for each block which of FALLBACKS gave its factor (0: none was
    needed).
    """

    root_NBB: Tensor
    d_N: Tensor
    fallback_N: Tensor | None = None
    triangular: bool = False
    steps: tuple[Step, ...] = ()


def factorize(
    fisher_NBB: Tensor, correction: float, damping: float, noise: float, exponent: float, dtype: torch.dtype,
    exact: bool,
) -> Factor:  # fmt: skip
    """Factorise A, whose damping is δ + ε, or more: see `_damped`.

    For p = 1/2 there is none to make, unless A^(−1/2) is to be `exact`. Never raises for a bad
    block. For p = 1 there are the FALLBACKS (ten times the damping, at least 1e-2; that in
    float64; the diagonal), and `fallback_N` tells which. d = 0 gives the factor of damping · I.
    """
    mean_N = fisher_NBB.diagonal(dim1=1, dim2=2).to(dtype).mean(dim=1)
    d_N = mean_N * correction
    a_NBB = _damped(fisher_NBB, mean_N, damping, noise)
    if exponent != 1.0 and exact:
        return Factor(inverse_root(a_NBB), d_N)
    if exponent != 1.0:
        return Factor(a_NBB, d_N, steps=root_steps(a_NBB.shape[1], damping))
    root_NBB, info_N = torch.linalg.cholesky_ex(a_NBB)
    failed_N = info_N != 0
    fallback_N = _fall_back(a_NBB, root_NBB, failed_N, damping) if bool(failed_N.any()) else None
    return Factor(root_NBB, d_N, fallback_N, triangular=True)


def root_steps(size: int, damping: float) -> tuple[Step, ...]:
    """The steps to A^(−1/2) of a block of so many columns, as near as a direction needs.

    A's eigenvalues are at least the damping, and its norm is at most its trace, size · (1 +
    damping).
    """
    return steps_from(max((damping / (size * (1 + damping))) ** 0.5, LEAST))


def inverted(factor: Factor) -> Factor:
    """The same as A^(−p), to keep: more costly to make than what `solve` needs, less to apply.

    A is at most block_size/damping conditioned, so that its inverse loses nothing that matters.
    """
    if factor.steps:
        root_NBB = times_inverse_root(None, factor.root_NBB, factor.steps)
        return factor._replace(root_NBB=root_NBB, steps=())
    if not factor.triangular:
        return factor
    eye_NBB = torch.eye(factor.root_NBB.shape[1], dtype=factor.d_N.dtype, device=factor.d_N.device)
    # L⁻ᵀ L⁻¹; twice as fast as torch.cholesky_inverse on a CPU.
    inverse_NBB = torch.linalg.solve_triangular(
        factor.root_NBB, eye_NBB.expand_as(factor.root_NBB), upper=False, left=False
    )
    return factor._replace(root_NBB=inverse_NBB.mT @ inverse_NBB, triangular=False)


def solve(factor: Factor, vectors_NRB: Tensor) -> Tensor:
    """Each row times A^(−p), which is symmetric."""
    if factor.steps:
        return times_inverse_root(vectors_NRB, factor.root_NBB, factor.steps)
    if not factor.triangular:
        return vectors_NRB @ factor.root_NBB
    # x A⁻¹ = (x L⁻ᵀ) L⁻¹
    half_NRB = torch.linalg.solve_triangular(factor.root_NBB.mT, vectors_NRB, upper=True, left=False)
    result: Tensor = torch.linalg.solve_triangular(factor.root_NBB, half_NRB, upper=False, left=False)
    return result


def condition_number(fisher_NBB: Tensor, damping: float, noise: float, dtype: torch.dtype) -> Tensor:
    """‖A‖₁ ‖A⁻¹‖₁ of each block, (N,); NaN or ∞ where A has no factor.

    It is at most B times the ratio of the largest to the smallest eigenvalue.
    """
    mean_N = fisher_NBB.diagonal(dim1=1, dim2=2).to(dtype).mean(dim=1)
    a_NBB = _damped(fisher_NBB, mean_N, damping, noise)
    eye_NBB = torch.eye(a_NBB.shape[1], dtype=dtype, device=a_NBB.device).expand_as(a_NBB)
    root_NBB = torch.linalg.cholesky_ex(a_NBB).L  # where there is none, no error, which would wait for the device
    half_NBB = torch.linalg.solve_triangular(root_NBB, eye_NBB, upper=False)
    norms = [matrix_NBB.abs().sum(dim=1).amax(dim=1) for matrix_NBB in (a_NBB, half_NBB.mT @ half_NBB)]
    return norms[0] * norms[1]


def _damped(fisher_NBB: Tensor, mean_N: Tensor, damping: float, noise: float) -> Tensor:
    """A = F̂/d + damping · I, symmetric; damped more where F's rounding noise exceeds damping.

    The norm of a symmetric matrix of independent noise is about twice the largest root of a row's
    summed variances (Bandeira and van Handel 2016, Annals of Probability 44), which A must outweigh
    to stay positive definite.
    """
    # F̂ / d = F / mean diag F. A mean that is not a normal number counts as the smallest that is: 1
    # / mean is finite.
    scale_N = mean_N.clamp_min(torch.finfo(mean_N.dtype).tiny).reciprocal()
    a_NBB = fisher_NBB.to(mean_N.dtype) * scale_N[:, None, None]
    a_NBB = a_NBB.tril().add_(a_NBB.tril(-1).mT)  # only the lower triangle of F counts
    if noise:
        norm_N1 = noise * torch.linalg.vector_norm(a_NBB, dim=2).amax(dim=1, keepdim=True)
        a_NBB.diagonal(dim1=1, dim2=2).add_(norm_N1.clamp_min_(damping))
    else:
        a_NBB.diagonal(dim1=1, dim2=2).add_(damping)
    return a_NBB


def _fall_back(a_NBB: Tensor, root_NBB: Tensor, failed_N: Tensor, damping: float) -> Tensor:
    """Replace the failed Cholesky factors in `root_NBB`; returns fallback_N."""
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
