"""A step of dense blocks as one Triton kernel (`fused_kernel`), where `fisher` and torch would pass over F five times.

For p = 1, roots made at every step, a float32 or bfloat16 Fisher, and blocks of up to 128 that up to 64 rows share; the
rest is torch's. This module can be imported without Triton, which is imported with the first kernel.

**The ladder** is climbed in the kernel (`fisher.factorize`'s, without float64). A host that looked at flags would have
to wait for the device at each step; one that looked a step later would take the update of a failed block from a rule
that depends on timing, so that two runs, or two ranks, would differ. Each rung is counted on the device, in
`rungs_N3`; whoever wants the counts reads them, and only that waits.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from adafisher_dist import fisher
from adafisher_dist.settings import Structure

if TYPE_CHECKING:
    from adafisher_dist.batch import Batch

LARGEST_BLOCK, LARGEST_DEPTH = 128, 64


def misfit(structure: Structure) -> str | None:
    """Why the kernel cannot do what a param group asks for, and what to change; None where it can."""
    if structure.block_size > LARGEST_BLOCK:
        return (
            f"block_size is {structure.block_size}, and the kernel holds a block in registers, which hold up to"
            f" {LARGEST_BLOCK}. Use block_size={LARGEST_BLOCK}"
        )
    if structure.block_grid == "rows" and structure.rows_per_block > LARGEST_DEPTH:
        return (
            f"rows_per_block is {structure.rows_per_block}, and the kernel holds a block's rows in registers, which"
            f" hold up to {LARGEST_DEPTH}. Use rows_per_block={LARGEST_DEPTH}"
        )
    if structure.exponent != 1.0:
        return f"exponent is {structure.exponent}, and the kernel solves by elimination. Use exponent=1.0"
    if structure.keeps_factors:
        return (
            "inverse_update_freq is above 1, and the kernel keeps no factors: it makes them at every step. Use"
            " inverse_update_freq=1"
        )
    if structure.fisher_dtype not in (torch.float32, torch.bfloat16):
        return (
            f"fisher_dtype is {structure.fisher_dtype}, and the kernel computes in float32. Use torch.float32 or"
            " torch.bfloat16"
        )
    return None


def is_meant_for(device: torch.device) -> bool:
    """Whether anybody would expect the kernel on a device: on NVIDIA's, and where Triton interprets."""
    if device.type == "cuda":
        return torch.version.hip is None
    return device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"


@cache
def obstacle(device: torch.device) -> str | None:
    """Why the kernel cannot run on a device, and what to change; None where it can.

    Triton decides when it is imported whether it interprets, so TRITON_INTERPRET must be set before that.
    """
    if device.type == "cuda" and is_meant_for(device):
        major, minor = torch.cuda.get_device_capability(device)
        if major < 8:
            return f"{device} has compute capability {major}.{minor}, and the kernel needs 8.0. Use a newer GPU"
    elif device.type != "cpu":
        return f"the state is on {device}, and the kernel is made for CUDA devices. Use one"
    elif not is_meant_for(device):
        return (
            "the state is on the CPU, where the kernel is only interpreted, for tests: slowly, and where"
            " TRITON_INTERPRET=1 is set before the program starts. Use a CUDA device"
        )
    if find_spec("triton") is None:
        return "Triton is not installed. pip install triton (CUDA builds of torch bring it)"
    try:
        import triton
    except Exception as error:
        return f"Triton cannot be imported ({type(error).__name__}: {error}). Install the one that your torch brings"

    if not hasattr(triton.language, "gather"):
        return f"Triton is {triton.__version__}, and the kernel needs 3.3. Use a newer torch, or pip install -U triton"
    return None


def constants(size: int, depth: int) -> dict[str, int]:
    """How blocks of this kind are worked on; chosen by what ptxas makes of them for sm_90, as `fused_kernel` tells."""
    width = _padded(size)
    return {
        "SIZE": size,
        "WIDTH": width,
        "DEPTH": depth,
        "DEEP": _padded(depth),
        # Where blocks are small, some of them a thread, to have work between the steps of a chain; or, where vectors
        # are that work, as many as fill a warp.
        "NUMBER": max(1, min(1024 // width**2, 128 // width) if depth == 1 else 32 // width),
        "PANEL": 8 if width >= 64 else 4,
    }


def options(size: int, depth: int) -> dict[str, Any]:
    """What the compiler is told."""
    known = constants(size, depth)
    num_warps = 4 if size > 64 else 2 if size > 32 and depth > 16 else 1
    if depth == 1 or size > 64:
        limits = ((16, 96), (32, 128), (48, 168), (64, 200), (128, 255))
        # 21, 16, 12, 10 or 8 warps an SM, which hide each other's latencies. As few registers as cost hardly a spill
        # (at most some 50 instructions of thousands; packed, whose addresses need registers, some 300).
        maxnreg = next(registers for largest, registers in limits if size <= largest)
    else:
        # By the same measure: a thread's part of A, of the right-hand sides and of m̂, and 64.
        numel = known["NUMBER"] * known["WIDTH"] * (size + 2 * known["DEEP"])
        maxnreg = min(255, 64 + numel // (32 * num_warps))
    return {
        "num_warps": num_warps,
        "maxnreg": maxnreg,
        "enable_fp_fusion": False,  # the same bits as elsewhere; fused where the kernel says so
    }


@cache
def _open_gate(device: torch.device) -> Tensor:
    """What lets every step go on."""
    return torch.ones((), dtype=torch.int32, device=device)


def _padded(length: int) -> int:
    """The next power of two."""
    return 1 << (length - 1).bit_length()


def compute(
    batch: Batch, start: int, stop: int, step: int, updates: int, settings: Mapping[str, Any], go: Tensor | None
) -> None:
    """One step of rows [start, stop), which must not be empty: as `batch.compute`.

    Nothing here waits for the device. The arguments that change from step to step are no reason to compile again.
    """
    from adafisher_dist.fused_kernel import step_kernel

    assert batch.dense and start < stop, (batch.kind, start, stop)
    assert go is None or (go.dtype == torch.int32 and go.device == batch.fisher.device), go
    if batch.rungs_N3 is None:
        batch.rungs_N3 = torch.zeros(len(batch.fisher), 3, dtype=torch.int32, device=batch.fisher.device)
    decay, mu, eps = settings["fisher_decay"], settings["momentum"], settings["eps"]  # ρ, μ, ε
    unbias_m = 1 / (1 - mu**step) if settings["bias_correction"] else 1.0
    unbias_f = 1 / (1 - decay**updates) if settings["bias_correction"] else 1.0
    damping = fisher.damping(settings["damping"], eps, decay, batch.size, batch.structure.fisher_dtype)
    known = constants(batch.size, batch.kind.depth)
    # Triton starts on the current device. (On a CPU this does nothing.)
    with torch.cuda.device_of(batch.fisher):  # type: ignore[no-untyped-call]
        step_kernel[(-(-(stop - start) // known["NUMBER"]),)](
            batch.fisher,
            batch.momentum_NDB,
            batch.gradient_NDB,
            batch.momentum_NDB if batch.square_ND is None else batch.square_ND,  # not read of blocks of one vector
            batch.length_N,
            batch.rungs_N3 if batch.seeding_N is None else batch.seeding_N,  # not read in float32
            batch.rungs_N3,
            _open_gate(batch.fisher.device) if go is None else go,
            start,
            stop,
            updates * 0x5851F42 % (1 << 31),  # as fisher.seeds
            decay,
            ((1 - decay) / batch.kind.depth) ** 0.5,
            1 - decay,
            1 - mu,
            mu * unbias_m if settings["nesterov"] else unbias_m,
            1 - mu if settings["nesterov"] else 0.0,
            unbias_f,
            damping,
            max(10 * damping, 1e-2),
            eps,
            fisher.reach(float(settings["lr"])),
            fisher.LARGEST_STRETCH,
            UPDATES=(step - 1) % settings["fisher_update_freq"] == 0,  # as batch.updates_fisher
            ROUNDED=batch.seeding_N is not None,
            PACKED=batch.structure.packed,
            BY_DIAGONAL=settings["grafting"] == "rms",
            **known,
            **options(batch.size, batch.kind.depth),
        )
