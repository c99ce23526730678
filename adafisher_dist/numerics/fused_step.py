"""A step of dense blocks in one kernel, on GPUs where it has been proven.

The formulas are those of `block_step`, and the result is about as exact as torch's in float32.
Torch's products of many small matrices are bound by memory, since each of some twenty reads and
writes them; here they stay on the chip, and tensor cores multiply them (docs/gpu.md has the times).
"""

from __future__ import annotations

import importlib.util
import logging
import os
from contextlib import nullcontext
from functools import cache
from importlib.metadata import version
from math import prod
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from adafisher_dist.blocks.grid import BlockShape
from adafisher_dist.numerics.newton_schulz import FAST
from adafisher_dist.settings import StateConfig

if TYPE_CHECKING:
    from adafisher_dist.numerics.block_stack import BlockStack

logger = logging.getLogger("adafisher_dist")

SMALLEST_SIDE = 16  # that a tensor core multiplies
LARGEST_SIDE = 128
LARGEST_BLOCK = 128 * 64  # elements; with more, what a program keeps exceeds shared memory

# Where every check of `make gpu` has passed.
PROVEN_CAPABILITIES = ((9, 0),)
LEAST_TRITON = (3, 6)

# Below it A may be so ill conditioned that the 22 bits that the kernel has of an element hold its
# least eigenvalues worse than float32's 24 do: the update is up to ten times as far from exact.
LEAST_DAMPING = 0.005


class Scalars(NamedTuple):
    """The numbers of a step.

    M ← M + weight (g − M), M̂ = momentum_scale M + gradient_scale g, F ← decay F + fisher_weight …,
    F̂ = correction F; δ + ε, what `rounding.rounding_noise` says, and ε.
    """

    weight: float
    momentum_scale: float
    gradient_scale: float
    decay: float
    fisher_weight: float
    correction: float
    damping: float
    noise: float
    eps: float


def can_step(shape: BlockShape, config: StateConfig, device: torch.device) -> bool:
    """Whether the kernel takes steps of blocks of this shape with these settings, on this device.

    ADAFISHER_KERNEL in the environment: "0" says no; "1" says yes where nothing has been proven,
    too, and on a CPU with Triton's interpreter.
    """
    return (
        shape.dense
        and config.exponent == 0.5
        and config.grafting == "rms"
        and not config.keeps_factors
        and config.compute_dtype == torch.float32
        and max(padded(shape)) <= LARGEST_SIDE
        and prod(padded(shape)) <= LARGEST_BLOCK
        and _runs_on(device, os.environ.get("ADAFISHER_KERNEL", ""))
    )


def padded(shape: BlockShape) -> tuple[int, int]:
    """Rows and columns of a block as a program has them: the next powers of two."""
    rows, columns = (max(SMALLEST_SIDE, 1 << (side - 1).bit_length()) for side in (shape.rows, shape.columns))
    return rows, columns


@cache
def _runs_on(device: torch.device, asked: str) -> bool:
    if asked == "0" or importlib.util.find_spec("triton") is None:
        return False
    if device.type == "cpu":
        return asked == "1" and os.environ.get("TRITON_INTERPRET") == "1"
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    if tuple(int(number) for number in version("triton").split(".")[:2]) < LEAST_TRITON:
        return False
    proven = torch.cuda.get_device_capability(device) in PROVEN_CAPABILITIES
    return (proven or asked == "1") and _compiles(device)


def _compiles(device: torch.device) -> bool:
    """Whether Triton can make a kernel here; it needs a C compiler, which not every image has."""
    try:
        from adafisher_dist.numerics.fused_kernel import write_one

        one = torch.zeros(1, device=device)
        with torch.cuda.device(device):
            write_one[(1,)](one)
        return bool(one.item() == 1)
    except Exception as error:
        logger.warning(
            "AdaFisher steps blocks with torch's products, which are several times slower: Triton cannot compile its"
            f" kernel here ({type(error).__name__}: {error}). With a C compiler (gcc) in the PATH it can."
        )
        return False


def step(blocks: BlockStack, own: Scalars, updates: bool, seed_N: Tensor | None, should_step: Tensor | None) -> None:
    """Take a step of blocks: their gradient goes into their state, the update takes its place.

    Args:
        blocks: of which `can_step` said so.
        own: the numbers of the step.
        updates: whether F and w are updated.
        seed_N: by which this update of a bfloat16 F is rounded, (N,) int32.
        should_step: see `block_step.StepContext`.
    """
    from adafisher_dist.numerics.fused_kernel import step_kernel

    shape, config = blocks.shape, blocks.config
    rows, columns = padded(shape)
    unused = blocks.gradient_NRB
    a, b, c = FAST[0]
    on_device = torch.cuda.device(blocks.device) if blocks.device.type == "cuda" else nullcontext()
    with on_device:  # Triton launches on the current one
        step_kernel[(len(blocks),)](
            blocks.gradient_NRB,
            blocks.momentum_NRB,
            blocks.fisher,
            unused if blocks.square_NR is None else blocks.square_NR,
            unused if seed_N is None else seed_N,
            unused if should_step is None else should_step,
            shape.rows,
            shape.columns,
            *own,
            R=rows,
            B=columns,
            SQUARES=blocks.square_NR is not None,
            PACKED=config.packed,
            ROUNDED=config.fisher_dtype == torch.bfloat16,
            UPDATES=updates,
            GATED=should_step is not None,
            TINY=torch.finfo(torch.float32).tiny,
            PA=a,
            PB=b,
            PC=c,
            num_warps=8 if rows * columns == LARGEST_BLOCK or columns == LARGEST_SIDE else 4,
        )
