"""What a step of blocks of one kind takes on a device, beside the least that it could take. For `fast.py`.

About 1 GB of blocks, far more than any cache holds, in chunks as large as the optimizer's. Two floors stand beside it:
F, m and w read and written, g read and u written, once each, at the bandwidth of a large copy; and the step's products
of matrices, as torch counts them, at the rate of a large product in float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from adafisher_dist.numerics.batch import Batch
from clocks import Effort, Row, median_ms
from torch.utils.flop_counter import FlopCounterMode

from adafisher_dist.blocks.grid import BlockShape
from adafisher_dist.blocks.sharding import CHUNK_FISHER_NUMEL
from adafisher_dist.numerics import batch as stacked
from adafisher_dist.numerics import fisher
from adafisher_dist.settings import DEFAULTS, normalize, state_config

STATE_BYTES, PRODUCT_SIDE = 2**30, 8192
EFFORT = Effort(3, 10)


class Speeds(NamedTuple):
    """What a device was measured to do in a second: bytes that a copy reads and writes, and operations."""

    copy_bytes: float
    flops: float


@dataclass(frozen=True, slots=True)
class Block:
    """A kind of block: `rows` vectors of `size` elements share a Fisher, which is kept in `dtype`."""

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
        triangle = fisher.packed_numel(self.size) if self.packed else self.size**2
        return triangle * getattr(torch, self.dtype).itemsize + 8 * self.size * self.rows

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
    a = torch.ones(side, side, device=device)
    product_ms = median_ms(lambda: torch.mm(a, a), lambda: None, EFFORT, device)
    return Speeds(2e3 * numel / copy_ms, 2e3 * side**3 / product_ms)


def make(block: Block, count: int, device: torch.device) -> Batch:
    """Blocks that have seen many gradients of unit covariance: F is the identity."""
    kind = BlockShape(block.size, block.rows, True)
    batch = stacked.allocate(0, kind, state_config(block.settings()), np.arange(count), device)
    identity = torch.eye(block.size, dtype=batch.fisher.dtype, device=device).unsqueeze(0)
    batch.fisher.copy_(fisher.pack(identity) if block.packed else identity)
    if batch.square_ND is not None:
        batch.square_ND.fill_(1.0)
    return batch


def measure(block: Block, state_bytes: int, speed: Speeds, device: torch.device, effort: Effort = EFFORT) -> Row:
    """Everything about one kind of block."""
    count = max(1, state_bytes // block.bytes)
    chunk = min(count, CHUNK_FISHER_NUMEL // block.size**2)
    batch, settings = make(block, count, device), block.settings()
    gradient_NDB = torch.randn_like(batch.gradient_NDB)
    done = 100  # the averages are full

    def prepare() -> None:
        nonlocal done
        batch.gradient_NDB.copy_(gradient_NDB)
        done += 1

    def step() -> None:
        for start in range(0, count, chunk):
            stacked.compute(batch, start, min(count, start + chunk), done, done, settings)

    prepare()
    with FlopCounterMode(display=False) as counter:
        step()
    if not bool(batch.gradient_NDB.isfinite().all()):
        raise RuntimeError("the update is not finite")
    step_ms = median_ms(step, prepare, effort, device)
    moved = 2 * sum(tensor.nbytes for tensor in (*batch.tensors().values(), gradient_NDB))
    floors = {"bytes_ms": 1e3 * moved / speed.copy_bytes, "flops_ms": 1e3 * counter.get_total_flops() / speed.flops}
    return {
        "blocks": count,
        "moved_bytes": moved,
        "flops": counter.get_total_flops(),
        "step_ms": step_ms,
        **floors,
        "of_the_floor": max(floors.values()) / step_ms,
    }
