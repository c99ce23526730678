"""The Newton-Schulz iteration: polar factors and inverse roots, by matrix products alone."""

from __future__ import annotations

import torch
from torch import Tensor

# Coefficients of Jordan et al. (2024, "Muon"): x ← a x + (b x xᵀ + c (x xᵀ)²) x, five times. It
# takes singular values from 2e-3 on to between 0.68 and 1.13, which is as good as 1 (LOG.md,
# 2026-11-26). `EXACT` takes them on to 1, to twelve digits.
FAST = ((3.4445, -4.7750, 2.0315),) * 5
EXACT = ((1.875, -1.25, 0.375),) * 4


def polar_factor(vectors_NRB: Tensor) -> Tensor:
    """The polar factor of each block, about: see `FAST`."""
    tall = vectors_NRB.shape[1] > vectors_NRB.shape[2]
    norm_N11 = torch.linalg.vector_norm(vectors_NRB, dim=(1, 2), keepdim=True)
    x_NIJ = vectors_NRB / torch.where(norm_N11 > 0, norm_N11, 1.0)
    x_NIJ = x_NIJ.mT if tall else x_NIJ
    for a, b, c in FAST:
        gram_NII = x_NIJ @ x_NIJ.mT
        polynomial_NII = torch.baddbmm(gram_NII, gram_NII, gram_NII, beta=b, alpha=c)
        x_NIJ = torch.baddbmm(x_NIJ, polynomial_NII, x_NIJ, beta=a)
    return x_NIJ.mT.contiguous() if tall else x_NIJ


def inverse_root(a_NBB: Tensor, exact: bool) -> Tensor:
    """A^(−1/2) of symmetric positive definite blocks.

    The same iteration, coupled (Higham 2008, section 6.7): y → A^(1/2), z → A^(−1/2), of A over its
    norm. Where it is not `exact`, it is A^(−1/2) but for a factor of 0.68 to 1.13 in each
    eigenvalue.
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
