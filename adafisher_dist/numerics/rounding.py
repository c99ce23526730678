"""Stochastic rounding to bfloat16, of F and of weights, alike on every rank."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

# Weights that are rounded at a time, or one tensor that has more, with 12 bytes of scratch each: on
# a CPU 3 MB, for its caches; on an accelerator 200 MB, for few kernels.
CPU_NUMEL, DEVICE_NUMEL = 2**18, 2**24

Number = TypeVar("Number", int, Tensor)


def rounding_noise(decay: float, stored: torch.dtype) -> float:
    """Twice the relative standard deviation of F's rounding errors: 0 except in bfloat16.

    Rounding leaves 0.24 % at an update, and σ = 0.24 % / √(1 − ρ²) in the average (LOG.md,
    2026-11-25).
    """
    return 0.005 / (1 - decay**2) ** 0.5 if stored == torch.bfloat16 else 0.0


def seeds(number_N: Tensor, update: int) -> Tensor:
    """The seeds of blocks by their numbers at their k-th Fisher update: int32."""
    return _scramble(_mixed(number_N, update))


def seeds_of_elements(seed_N: Tensor, size: int) -> Tensor:
    """A seed for each element of square blocks, (N, size, size); symmetric, so that F stays so."""
    index_B = torch.arange(size, dtype=torch.int32, device=seed_N.device)
    low_BB, high_BB = torch.minimum(index_B[:, None], index_B), torch.maximum(index_B[:, None], index_B)
    return _scramble((low_BB << 16) + high_BB) ^ seed_N[:, None, None]


@dataclass(frozen=True, slots=True)
class Elements:
    """Which elements of a parameter a tensor holds, and when: what their rounding depends on.

    It depends on no rank, and not on how the parameter is cut.

    Attributes:
        sizes: of the tensor.
        strides: from one element to the next in the flattened parameter.
        first: the first element's number there.
        position: of the parameter among those that the optimizer was given.
        step: t.
    """

    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    first: int
    position: int
    step: int

    def write_numbers(self, out: Tensor) -> None:
        """Write each element's number in the flattened parameter, modulo 2³², int32 and 1-d."""
        sizes, strides = _without_seams(self.sizes, self.strides)
        out = out.view(sizes)
        if strides == (1,):
            torch.arange(len(out), out=out)
        else:
            out.zero_()
            for dim, (size, stride) in enumerate(zip(sizes, strides, strict=True)):
                along = torch.arange(size, dtype=out.dtype, device=out.device).mul_(_wrapped(stride))
                out.add_(along.view([-1, *[1] * (len(sizes) - 1 - dim)]))
        if self.first:
            out.add_(_wrapped(self.first))


def seeds_of_weights(elements: Sequence[Elements], device: torch.device) -> Tensor:
    """A seed for each element of some tensors, one after the other: int32, 1-d."""
    numels = [math.prod(own.sizes) for own in elements]
    number = torch.empty(sum(numels), dtype=torch.int32, device=device)
    parts = number.split_with_sizes(numels)
    for own, part in zip(elements, parts, strict=True):
        own.write_numbers(part)
    _scramble(number)
    of_parameters = [_wrapped(_mixed(own.position, own.step)) for own in elements]
    seeds_of_parameters = _scramble(torch.tensor(of_parameters, dtype=torch.int32, device="cpu"))
    for seed, part in zip(seeds_of_parameters.tolist(), parts, strict=True):
        part.bitwise_xor_(seed)
    return number


def add_stochastically(weights: list[Tensor], updates: list[Tensor], elements: list[Elements]) -> None:
    """θ ← θ + u in float32, rounded to bfloat16's values so that the mean is kept; in place.

    Args:
        weights: θ, values of bfloat16; all on one device.
        updates: u, in the same shapes.
        elements: which the weights are.
    """
    for some in _together(weights):
        _add_stochastically(weights[some], updates[some], elements[some])


def _together(weights: Sequence[Tensor]) -> Iterator[slice]:
    """As many as need little memory, and few kernels."""
    begin = held = 0
    for number, weight in enumerate(weights):
        most = CPU_NUMEL if weight.device.type == "cpu" else DEVICE_NUMEL
        if held and held + weight.numel() > most:
            yield slice(begin, number)
            begin, held = number, 0
        held += weight.numel()
    yield slice(begin, len(weights))


def _add_stochastically(weights: list[Tensor], updates: list[Tensor], elements: list[Elements]) -> None:
    numels = [weight.numel() for weight in weights]
    flat = torch.empty(sum(numels), dtype=torch.float32, device=weights[0].device)
    wide = [part.view(weight.shape) for part, weight in zip(flat.split_with_sizes(numels), weights, strict=True)]
    torch._foreach_copy_(wide, weights)
    torch._foreach_add_(wide, updates)
    round_stochastically(flat, seeds_of_weights(elements, flat.device))
    torch._foreach_copy_(weights, wide)


def round_stochastically(x: Tensor, seed: Tensor) -> None:
    """Round finite float32 values in place to bfloat16's, up or down, so that the mean is kept.

    Args:
        x: the values, in memory of their own.
        seed: int32, for each of them; it is overwritten.
    """
    bits = x.view(torch.int32)
    bits.add_(_scramble(seed).bitwise_and_(0xFFFF)).bitwise_and_(-0x10000)


def _scramble(x: Tensor) -> Tensor:
    """Replace each int32 by a hash of it (the finaliser of MurmurHash3); products wrap."""
    x.bitwise_xor_((x >> 16).bitwise_and_(0xFFFF)).mul_(-0x7A143595)
    x.bitwise_xor_((x >> 13).bitwise_and_(0x7FFFF)).mul_(-0x3D4D51CB)
    return x.bitwise_xor_((x >> 16).bitwise_and_(0xFFFF))


def _mixed(number: Number, update: int) -> Number:
    return number * 0x9E3779B + update * 0x5851F42 % (1 << 31)


def _wrapped(number: int) -> int:
    """Modulo 2³², as an int32."""
    return (number + 2**31) % 2**32 - 2**31


def _without_seams(sizes: Sequence[int], strides: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The same elements with as few dimensions as can be."""
    found: list[tuple[int, int]] = []
    for size, stride in zip(sizes, strides, strict=True):
        if found and found[-1][1] == size * stride:
            found[-1] = found[-1][0] * size, stride
        elif size != 1:
            found.append((size, stride))
    return tuple(size for size, _ in found), tuple(stride for _, stride in found)
