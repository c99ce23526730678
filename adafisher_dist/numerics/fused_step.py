"""A step of dense blocks in one kernel, on GPUs, where it is asked for.

The formulas are those of `block_step`, and the result is about as exact as torch's in float32.
Torch's products of many small matrices are bound by memory, since each of some twenty reads and
writes them; here they stay on the chip, and tensor cores multiply them (docs/gpu.md has the times).
"""

from __future__ import annotations

import logging
import os
import re
from contextlib import nullcontext
from functools import cache, lru_cache
from math import prod
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from adafisher_dist.blocks.grid import BlockShape
from adafisher_dist.numerics.factors import root_steps
from adafisher_dist.numerics.newton_schulz import JORDAN, Step
from adafisher_dist.settings import StateConfig

if TYPE_CHECKING:
    from adafisher_dist.numerics.block_stack import BlockStack

logger = logging.getLogger("adafisher_dist")

SMALLEST_SIDE = 16  # that a tensor core multiplies
LARGEST_SIDE = 128
LARGEST_BLOCK = 128 * 64  # elements; with more, what a program keeps exceeds shared memory

LEAST_TRITON = (3, 6)
SHARED_BYTES = 132 * 1024  # of a program with the largest block

# Below it A may be so ill conditioned that the kernel's 22 bits do not hold its least eigenvalues:
# with less than this the update's error passes 3e-3 where float32's is 5e-4.
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

    It has to be asked for, by ADAFISHER_KERNEL=1 in the environment.

    Raises:
        ValueError: ADAFISHER_KERNEL is neither 0 nor 1.
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
    if asked not in ("", "0", "1"):
        raise ValueError(
            f"ADAFISHER_KERNEL should be 0 or 1, got {asked!r}. Correct it in the environment of all ranks."
        )
    if asked != "1":
        return False
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if device.type != "cuda":
        return device.type == "cpu" and interpreted
    try:
        why_not = "TRITON_INTERPRET=1 is for CPUs" if interpreted else _hindrance(device)
    except Exception as error:  # no Triton, no C compiler, a version that is none
        why_not = f"{type(error).__name__}: {error}"
    if why_not:
        logger.warning(
            "AdaFisher steps blocks with torch's products: ADAFISHER_KERNEL=1 asks for its kernel, which cannot run"
            f" here ({why_not}). It needs an NVIDIA GPU with {SHARED_BYTES // 1024} KiB of shared memory a block,"
            f" Triton {'.'.join(map(str, LEAST_TRITON))} and a C compiler (gcc)."
        )
    return not why_not


def _hindrance(device: torch.device) -> str:
    """Why the kernel cannot run on a GPU; nothing if it can."""
    import triton

    if torch.version.hip is not None:
        return "ROCm"
    found = re.match(r"(\d+)\.(\d+)", triton.__version__)
    if found is None or tuple(map(int, found.groups())) < LEAST_TRITON:
        return f"Triton {triton.__version__}"
    shared: int = torch.cuda.get_device_properties(device).shared_memory_per_block_optin  # type: ignore[attr-defined]
    if shared < SHARED_BYTES:
        return f"{shared // 1024} KiB of shared memory"
    from adafisher_dist.numerics.fused_kernel import write_one

    one = torch.zeros(1, device=device)
    with torch.cuda.device(device):
        write_one[(1,)](one)
    return "" if one.item() == 1 else "a kernel that writes 1 wrote something else"


def step(
    blocks: BlockStack, gradient_NRB: Tensor, own: Scalars, seed_N: Tensor | None, should_step: Tensor | None,
) -> None:  # fmt: skip
    """Take a step of blocks: their gradient goes into their state, the update takes its place.

    Args:
        blocks: of which `can_step` said so.
        gradient_NRB: gradient, then update; contiguous.
        own: the numbers of the step.
        seed_N: by which this update of a bfloat16 F is rounded, (N,) int32.
        should_step: see `block_step.StepContext`.
    """
    from adafisher_dist.numerics.fused_kernel import step_kernel

    shape, config = blocks.shape, blocks.config
    rows, columns = padded(shape)
    unused = gradient_NRB
    a, b, c = JORDAN
    steps = root_steps(shape.columns, own.damping)
    on_device = torch.cuda.device(blocks.device) if blocks.device.type == "cuda" else nullcontext()
    with on_device:  # Triton launches on the current one
        step_kernel[(len(blocks),)](
            gradient_NRB,
            blocks.momentum_NRB,
            blocks.fisher,
            unused if blocks.square_NR is None else blocks.square_NR,
            unused if seed_N is None else seed_N,
            unused if should_step is None else should_step,
            _on_device(steps, blocks.device),
            shape.rows,
            shape.columns,
            *own,
            R=rows,
            B=columns,
            WHOLE=(rows, columns) == (shape.rows, shape.columns),
            SQUARES=blocks.square_NR is not None,
            PACKED=config.packed,
            ROUNDED=config.fisher_dtype == torch.bfloat16,
            GATED=should_step is not None,
            TINY=torch.finfo(torch.float32).tiny,
            STEPS=len(steps),
            PA=a,
            PB=b,
            PC=c,
            num_warps=8 if rows * columns == LARGEST_BLOCK or columns == LARGEST_SIDE else 4,
        )


@lru_cache(maxsize=64)
def _on_device(steps: tuple[Step, ...], device: torch.device) -> Tensor:
    """The coefficients, for whose way there no host waits: the damping may change in any step."""
    host = torch.tensor(steps, dtype=torch.float32, device="cpu", pin_memory=device.type == "cuda")
    return host.to(device, non_blocking=True)
