"""Stochastic rounding to bfloat16, of F and of weights, alike on every rank."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def rounding_noise(decay: float, stored: torch.dtype) -> float:
    """Twice the relative standard deviation of F's rounding errors: 0 except in bfloat16.

    Rounding leaves 0.24 % at an update, and σ = 0.24 % / √(1 − ρ²) in the average (LOG.md,
    2026-11-25).
    """
    return 0.005 / (1 - decay**2) ** 0.5 if stored == torch.bfloat16 else 0.0


def seeds(number_N: Tensor, update: int) -> Tensor:
    """The seeds of blocks by their numbers at their k-th Fisher update: int32."""
    return _scramble(number_N * 0x9E3779B + update * 0x5851F42 % (1 << 31))


def seeds_of_elements(seed_N: Tensor, size: int) -> Tensor:
    """A seed for each element of square blocks, (N, size, size); symmetric, so that F stays so."""
    index_B = torch.arange(size, dtype=torch.int32, device=seed_N.device)
    low_BB, high_BB = torch.minimum(index_B[:, None], index_B), torch.maximum(index_B[:, None], index_B)
    return _scramble((low_BB << 16) + high_BB) ^ seed_N[:, None, None]


def seeds_of_weights(
    sizes: Sequence[int], strides: Sequence[int], first: int, position: int, step: int, device: torch.device
) -> Tensor:
    """A seed for each element of a view of a parameter, in the view's shape, int32.

    It depends on the element, the parameter and its step, and on no rank.

    Args:
        sizes: of the view.
        strides: from one element to the next in the flattened parameter.
        first: the first element's number there.
        position: of the parameter among those that the optimizer was given.
        step: t.
        device: of the result.
    """
    number = torch.full((), (first + 2**31) % 2**32 - 2**31, dtype=torch.int32, device=device)  # wraps, as products do
    for size, stride in zip(sizes, strides, strict=True):
        number = number[..., None] + torch.arange(size, dtype=torch.int32, device=device) * stride
    of_host = torch.tensor(position, dtype=torch.int32, device="cpu")
    return _scramble(number) ^ seeds(of_host, step)


def add_stochastically(weight: Tensor, update: Tensor, seed: Tensor) -> None:
    """θ ← θ + u in float32, rounded to bfloat16's values so that the mean is kept; in place.

    Args:
        weight: θ, values of bfloat16.
        update: u.
        seed: int32, for each element.
    """
    wide = weight.float().add_(update)
    round_stochastically(wide, seed)
    weight.copy_(wide)


def round_stochastically(x: Tensor, seed: Tensor) -> None:
    """Round finite float32 values in place to bfloat16's, up or down, so that the mean is kept."""
    bits = x.view(torch.int32)
    bits.add_(_scramble(seed).bitwise_and_(0xFFFF)).bitwise_and_(-0x10000)


def _scramble(x: Tensor) -> Tensor:
    """A hash of each int32 (the finaliser of MurmurHash3); products wrap."""
    x = (x ^ ((x >> 16) & 0xFFFF)) * -0x7A143595
    x = (x ^ ((x >> 13) & 0x7FFFF)) * -0x3D4D51CB
    return x ^ ((x >> 16) & 0xFFFF)
