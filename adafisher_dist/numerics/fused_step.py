"""One step of dense blocks in one kernel, where a GPU and Triton are at hand.

The same formulas as `block_step`, for the default kind of update; products of the inverse root and
of the polar factor are of float16 numbers, which moves an update by about as much as five steps of
Newton and Schulz leave it from exact (DESIGN.md, section 2).
"""

from __future__ import annotations

import importlib.util
import os
from functools import cache
from importlib.metadata import version
from math import prod

import torch

from adafisher_dist.blocks.grid import BlockShape
from adafisher_dist.numerics.block_stack import BlockStack
from adafisher_dist.numerics.newton_schulz import FAST

LARGEST_SIDE, SMALLEST_SIDE = 128, 16  # of a block in a program, which multiplies powers of two
LARGEST_BLOCK = 128 * 64  # elements; with more, what a program keeps exceeds shared memory

# Where every check of `make gpu` has passed. Elsewhere ADAFISHER_KERNEL=1 asks for the kernel.
PROVEN_CAPABILITIES = ((9, 0),)

LEAST_TRITON = (3, 6)  # of those that have compiled it

# Below it A is so ill conditioned that 22 bits of an element do not hold its least eigenvalues.
LEAST_DAMPING = 0.005


def applies_to(blocks: BlockStack, damping: float) -> bool:
    """Whether the kernel takes a step of these blocks, with this δ + ε."""
    own, shape = blocks.config, blocks.shape
    return (
        shape.dense
        and own.exponent == 0.5
        and own.grafting == "rms"
        and not own.keeps_factors
        and own.compute_dtype == torch.float32
        and damping >= LEAST_DAMPING
        and max(padded(shape)) <= LARGEST_SIDE
        and prod(padded(shape)) <= LARGEST_BLOCK
        and _runs_on(blocks.device, os.environ.get("ADAFISHER_KERNEL", ""))
    )


def padded(shape: BlockShape) -> tuple[int, int]:
    """Rows and columns of a block as a program has them: the next powers of two."""
    rows, columns = (max(SMALLEST_SIDE, 1 << (side - 1).bit_length()) for side in (shape.rows, shape.columns))
    return rows, columns


@cache
def _runs_on(device: torch.device, asked: str) -> bool:
    if asked == "0" or importlib.util.find_spec("triton") is None:
        return False
    if device.type == "cpu":  # where Triton's interpreter can
        return asked == "1" and os.environ.get("TRITON_INTERPRET") == "1"
    if device.type != "cuda" or torch.version.hip is not None or _triton() < LEAST_TRITON:
        return False
    return asked == "1" or torch.cuda.get_device_capability(device) in PROVEN_CAPABILITIES


def _triton() -> tuple[int, ...]:
    """Its version: major, minor."""
    return tuple(int(number) for number in version("triton").split(".")[:2])


def step(
    blocks: BlockStack, seed_N: torch.Tensor | None, should_step: torch.Tensor | None, *, mu: float,
    momentum_scale: float, gradient_scale: float, decay: float, correction: float, damping: float, noise: float,
    eps: float, updates: bool,
) -> None:  # fmt: skip
    """Take a step of blocks: their gradient goes into their state, the update takes its place."""
    from adafisher_dist.numerics.fused_kernel import step_kernel

    shape, own = blocks.shape, blocks.config
    rows, columns = padded(shape)
    nothing = blocks.gradient_NRB
    a, b, c = FAST[0]
    step_kernel[(len(blocks),)](
        blocks.gradient_NRB,
        blocks.momentum_NRB,
        blocks.fisher,
        nothing if blocks.square_NR is None else blocks.square_NR,
        nothing if seed_N is None else seed_N,
        nothing if should_step is None else should_step,
        shape.rows,
        shape.columns,
        mu,
        momentum_scale,
        gradient_scale,
        decay,
        ((1 - decay) / shape.rows) ** 0.5,
        correction,
        damping,
        noise,
        eps,
        R=rows,
        B=columns,
        SQUARES=blocks.square_NR is not None,
        PACKED=own.packed,
        ROUNDED=own.fisher_dtype == torch.bfloat16,
        UPDATES=updates,
        GATED=should_step is not None,
        TINY=torch.finfo(torch.float32).tiny,
        PA=a,
        PB=b,
        PC=c,
        num_warps=8 if rows * columns == LARGEST_BLOCK or columns == LARGEST_SIDE else 4,
    )
