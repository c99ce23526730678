"""The Newton-Schulz iteration: polar factors and inverse roots, by matrix products alone."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

# a, b and c of a step, which takes singular values x to a x + b x³ + c x⁵.
Step = tuple[float, float, float]

# Coefficients of Jordan et al. (2024, "Muon"), for five steps: singular values from 2e-3 on become
# 0.68 to 1.13, which is as good as 1 (LOG.md, 2026-11-26).
JORDAN: Step = (3.4445, -4.7750, 2.0315)
POLAR_STEPS = 5

# From there these take them on to 1, to twelve digits.
_TO_ONE: Step = (1.875, -1.25, 0.375)
_TO_ONE_STEPS = 4

# By how much `steps_from` may leave singular values unlike each other: 2/3 to 4/3.
ROUGH = 2.0


def polar_factor(vectors_NRB: Tensor) -> Tensor:
    """The polar factor of each block, about: see `JORDAN`."""
    tall = vectors_NRB.shape[1] > vectors_NRB.shape[2]
    norm_N11 = torch.linalg.vector_norm(vectors_NRB, dim=(1, 2), keepdim=True)
    x_NIJ = vectors_NRB / torch.where(norm_N11 > 0, norm_N11, 1.0)
    x_NIJ = x_NIJ.mT if tall else x_NIJ
    a, b, c = JORDAN
    for _ in range(POLAR_STEPS):
        gram_NII = x_NIJ @ x_NIJ.mT
        polynomial_NII = torch.baddbmm(gram_NII, gram_NII, gram_NII, beta=b, alpha=c)
        x_NIJ = torch.baddbmm(x_NIJ, polynomial_NII, x_NIJ, beta=a)
    return x_NIJ.mT.contiguous() if tall else x_NIJ


def times_inverse_root(vectors_NRB: Tensor | None, a_NBB: Tensor, steps: tuple[Step, ...]) -> Tensor:
    """X A^(−1/2) of symmetric positive definite blocks, as near as `steps` come.

    Without X: A^(−1/2).

    With P = A/‖A‖ and the polynomial Q = a I + b P + c P² in each step: X ← X Q and P ← Q P Q,
    which goes to I (Higham 2008, section 7.3).
    """
    norm_N11 = torch.linalg.matrix_norm(a_NBB, keepdim=True)
    x_NRB, p_NBB = vectors_NRB, a_NBB / norm_N11
    for number, (a, b, c) in enumerate(steps, 1):
        polynomial_NBB = _plus_identity(torch.baddbmm(p_NBB, p_NBB, p_NBB, beta=b, alpha=c), a)
        x_NRB = polynomial_NBB if x_NRB is None else x_NRB @ polynomial_NBB
        if number < len(steps):
            p_NBB = polynomial_NBB @ (p_NBB @ polynomial_NBB)
    assert x_NRB is not None
    return x_NRB.mul_(norm_N11.rsqrt())


def inverse_root(a_NBB: Tensor) -> Tensor:
    """A^(−1/2) of symmetric positive definite blocks, exactly but for rounding.

    By the same iteration, coupled (Higham 2008, section 6.7): y → A^(1/2), z → A^(−1/2), of A over
    its norm. It takes more products than to carry X along, and is what bears rounding where
    eigenvalues are below that of float32: P may come out negative there, and grow without bound.
    """
    norm_N11 = torch.linalg.matrix_norm(a_NBB, keepdim=True)
    y_NBB = a_NBB / norm_N11
    steps = (JORDAN,) * POLAR_STEPS + (_TO_ONE,) * _TO_ONE_STEPS
    z_NBB: Tensor | None = None
    for number, (a, b, c) in enumerate(steps, 1):
        p_NBB = y_NBB if z_NBB is None else z_NBB @ y_NBB
        polynomial_NBB = _plus_identity(torch.baddbmm(p_NBB, p_NBB, p_NBB, beta=b, alpha=c), a)
        z_NBB = polynomial_NBB if z_NBB is None else polynomial_NBB @ z_NBB
        if number < len(steps):
            y_NBB = y_NBB @ polynomial_NBB
    assert z_NBB is not None
    return z_NBB.mul_(norm_N11.rsqrt())


def _plus_identity(p_NBB: Tensor, a: float) -> Tensor:
    """P + a I, in the memory of P."""
    p_NBB.diagonal(dim1=1, dim2=2).add_(a)
    return p_NBB


@lru_cache(maxsize=256)
def steps_from(least: float) -> tuple[Step, ...]:
    """As few steps as take all of [least, 1] to where the largest is at most `ROUGH` the least.

    Each is the polynomial nearest to 1, in the worst case, where the one before it left the
    singular values (Amsel et al. 2025, "The Polar Express", arXiv 2505.16932).
    """
    assert 0 < least <= 1
    low, high = least, 1.0
    steps: list[Step] = []
    while high > ROUGH * low or not steps:
        step, error = _nearest_to_one(low, high)
        steps.append(step)
        low, high = 1 - error, 1 + error
    return tuple(steps)


def _nearest_to_one(low: float, high: float) -> tuple[Step, float]:
    """a, b and c of the polynomial nearest to 1 on [low, high], and how far it is from it at most.

    By Remez's exchange: it is as far from 1 at four points, on either side in turn; two are the
    ends, and at the others its slope is 0.
    """
    if high - low < 0.01:
        return _TO_ONE, 0.0
    points = np.array([low, 0.75 * low + 0.25 * high, 0.25 * low + 0.75 * high, high])
    signs, error = np.array([1.0, -1.0, 1.0, -1.0]), 0.0
    for _ in range(100):
        system = np.stack([points, points**3, points**5, signs], axis=1)
        a, b, c, found = np.linalg.solve(system, np.ones(4)).tolist()
        if abs(found - error) <= 1e-15:
            break
        error = found
        root = (9 * b * b - 20 * a * c) ** 0.5
        points[1:3] = [((-3 * b - root) / (10 * c)) ** 0.5, ((-3 * b + root) / (10 * c)) ** 0.5]
    return (a, b, c), abs(found)
