"""Time of a step of blocks of one kind on a device, beside its lower bounds. For `fast.py`.

About 1 GB of blocks, far more than any cache holds, in chunks as large as the optimizer's. Two
floors stand beside it: F, m and w read and written, g read and u written, once each, at the
bandwidth of a large copy; and the products of matrices of `block_step`, as torch counts them, at
the rate of a large product in float32, or where the kernel takes the step, three times as many at
the rate of one in float16.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from clocks import Effort, Row, median_ms
from torch.utils.flop_counter import FlopCounterMode

from adafisher_dist.blocks.fields import triangle
from adafisher_dist.blocks.grid import BlockShape
from adafisher_dist.blocks.sharding import CHUNK_FISHER_NUMEL
from adafisher_dist.numerics.block_stack import BlockStack, allocate
from adafisher_dist.numerics.block_step import StepContext, update_blocks
from adafisher_dist.numerics.packing import pack
from adafisher_dist.numerics.precision import full_precision
from adafisher_dist.settings import DEFAULTS, normalize, state_config, step_settings

STATE_BYTES, PRODUCT_SIDE = 2**30, 8192
EFFORT = Effort(3, 10)


class Speeds(NamedTuple):
    """Measured per second on a device: bytes that a copy reads and writes, and operations."""

    copy_bytes: float
    flops: float
    half_flops: float


@dataclass(frozen=True, slots=True)
class Block:
    """A kind of block: `rows` vectors of `size` elements share a Fisher, stored in `dtype`."""

    size: int
    rows: int
    dtype: str = "float32"
    packed: bool = False

    @property
    def name(self) -> str:
        return f"b={self.size} rows={self.rows} {self.dtype}{' packed' if self.packed else ''}"

    @property
    def bytes(self) -> int:
        """Of the state and the gradient of one."""
        numel = triangle(self.size) if self.packed else self.size**2
        return numel * getattr(torch, self.dtype).itemsize + 8 * self.size * self.rows

    def settings(self) -> dict[str, Any]:
        """A param group's that has such blocks."""
        own = {"block_size": self.size, "rows_per_block": self.rows, "fisher_dtype": self.dtype, "packed": self.packed}
        result = {**DEFAULTS, **own}
        normalize(result)
        return result


def speeds(device: torch.device, numel: int = STATE_BYTES, side: int = PRODUCT_SIDE) -> Speeds:
    """By a copy of so many bytes, and by a product of two square matrices."""
    source = torch.zeros(numel, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy_ms = median_ms(lambda: target.copy_(source), lambda: None, EFFORT, device)
    rates = []
    for dtype in (torch.float32, torch.float16):
        a = torch.randn(side, side, dtype=dtype, device=device)
        product_ms = median_ms(lambda a=a: torch.mm(a, a), lambda: None, EFFORT, device)
        rates.append(2e3 * side**3 / product_ms)
    return Speeds(2e3 * numel / copy_ms, *rates)


def make(block: Block, count: int, device: torch.device) -> BlockStack:
    """Blocks that have seen many gradients of unit covariance: F is the identity."""
    shape = BlockShape(block.size, block.rows, True)
    blocks = allocate(0, shape, state_config(block.settings()), np.arange(count), device)
    identity = torch.eye(block.size, dtype=blocks.fisher.dtype, device=device).unsqueeze(0)
    blocks.fisher.copy_(pack(identity) if block.packed else identity)
    if blocks.square_NR is not None:
        blocks.square_NR.fill_(1.0)
    return blocks


def flops_of(block: Block, device: torch.device) -> int:
    """Operations of a block's products in torch's way to take a step."""
    one = make(block, 1, device)
    one.fused = False
    gradient_NRB = torch.randn_like(one.momentum_NRB)
    with FlopCounterMode(display=False) as counter:
        update_blocks(one, gradient_NRB, StepContext(step_settings(block.settings()), 100, 100))
    return int(counter.get_total_flops())


def measure(block: Block, state_bytes: int, speed: Speeds, device: torch.device, effort: Effort = EFFORT) -> Row:
    """Everything about one kind of block."""
    count = max(1, state_bytes // block.bytes)
    chunk = min(count, CHUNK_FISHER_NUMEL // block.size**2)
    blocks, settings = make(block, count, device), step_settings(block.settings())
    gradient_NRB = torch.randn_like(blocks.momentum_NRB)
    work_NRB = torch.empty_like(gradient_NRB)
    done = 100  # the averages are full

    def prepare() -> None:
        nonlocal done
        work_NRB.copy_(gradient_NRB)
        done += 1

    def step() -> None:
        context = StepContext(settings, done, done)
        with full_precision(device):
            for start in range(0, count, chunk):
                for part, where in blocks.parts(start, min(count, start + chunk)):
                    update_blocks(part, work_NRB[where], context)

    prepare()
    step()
    if not bool(work_NRB.isfinite().all()):
        raise RuntimeError("the update is not finite")
    step_ms = median_ms(step, prepare, effort, device)
    moved = 2 * sum(tensor.nbytes for tensor in (*blocks.state.values(), gradient_NRB))
    flops = count * flops_of(block, device)
    rate = speed.half_flops / 3 if blocks.fused else speed.flops
    floors = {"bytes_ms": 1e3 * moved / speed.copy_bytes, "flops_ms": 1e3 * flops / rate}
    return {
        "blocks": count,
        "moved_bytes": moved,
        "flops": flops,
        "by_kernel": blocks.fused,
        "step_ms": step_ms,
        **floors,
        "of_the_floor": max(floors.values()) / step_ms,
    }
