"""Stacked blocks of one shape and one param group, or elements with a diagonal Fisher."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from adafisher_dist.blocks.fields import fields
from adafisher_dist.blocks.grid import BlockShape
from adafisher_dist.numerics import fused_step, huge_pages
from adafisher_dist.numerics.packing import unpack
from adafisher_dist.settings import StateConfig

Numbers = np.ndarray[Any, np.dtype[np.int64]]

# Elements of the Fisher that a CPU works on at a time: 2 MiB in float32, so that A and its factor
# stay in its caches. Twice as fast as whole chunks at block sizes 32 to 64 (LOG.md, 2026-11-24).
CPU_TILE_FISHER_NUMEL = 2**19
# What an accelerator factorises at a time where factors are kept: 128 MiB, which is about a chunk
# of a step, since its host waits once for each.
DEVICE_FISHER_NUMEL = 2**25


@dataclass(slots=True, eq=False)
class BlockStack:
    """Blocks in the order of the rank's elements; a slice of them is a stack of views.

    Attributes:
        group: the number of their param group.
        shape: of each block.
        config: the settings that their state was made for.
        state: what is kept, by name: see `blocks.fields`.
        number_N: each block's number q, which decides when its factor is refreshed and how a
            bfloat16 F is rounded.
        seeding_N: the same as int32 on the device, where F is bfloat16.
        made_N: of each kept factor, the step t at which it was made; -1 where that is not known.
        fallback_counts: for each block of the whole stack, how often each of FALLBACKS was needed.
        first: the number of the first block in the whole stack.
        fused: whether a kernel may take their steps: `fused_step.can_step`.
    """

    group: int
    shape: BlockShape
    config: StateConfig
    state: dict[str, Tensor]
    number_N: Numbers
    seeding_N: Tensor | None
    made_N: Numbers | None
    fallback_counts: dict[int, list[int]] = field(default_factory=dict)
    first: int = 0
    fused: bool = False

    def __len__(self) -> int:
        return len(self.number_N)

    @property
    def device(self) -> torch.device:
        """Where all of it is."""
        return self.momentum_NRB.device

    @property
    def momentum_NRB(self) -> Tensor:
        """M, in the compute dtype."""
        return self.state["momentum"]

    @property
    def fisher(self) -> Tensor:
        """F in fisher_dtype: (N, B, B); packed lower triangles, (N, T); or diagonals, (N, 1)."""
        return self.state["fisher"]

    @property
    def square_NR(self) -> Tensor | None:
        """w, the mean square of each row, averaged like F; None where a block has one row."""
        return self.state.get("square")

    def rows(self, start: int, stop: int) -> BlockStack:
        """Blocks [start, stop)."""
        part = slice(start, stop)
        return replace(
            self,
            state={name: tensor[part] for name, tensor in self.state.items()},
            number_N=self.number_N[part],
            seeding_N=None if self.seeding_N is None else self.seeding_N[part],
            made_N=None if self.made_N is None else self.made_N[part],
            first=self.first + start,
        )

    def tiles(self) -> Iterator[slice]:
        """Slices of as many blocks as fit a CPU's caches; on an accelerator one of all."""
        size = self.tile_rows if self.device.type == "cpu" else max(1, len(self))
        for begin in range(0, len(self), size):
            yield slice(begin, min(len(self), begin + size))

    @property
    def tile_rows(self) -> int:
        """Blocks whose Fisher a CPU works on at a time."""
        return max(1, CPU_TILE_FISHER_NUMEL // self.shape.columns**2)

    @property
    def refreshed_at_once(self) -> int:
        """Blocks whose kept factors are made anew at a time."""
        return self.tile_rows if self.device.type == "cpu" else max(1, DEVICE_FISHER_NUMEL // self.shape.columns**2)

    def parts(self, start: int, stop: int) -> Iterator[tuple[BlockStack, slice]]:
        """Of blocks [start, stop) what a CPU steps at a time, and which they are.

        It is 16 tiles of one-row blocks, fewer of those with more rows; on an accelerator all.
        """
        tiles = max(1, 16 // self.shape.rows) if self.shape.dense else 1
        size = tiles * self.tile_rows if self.device.type == "cpu" else max(1, stop - start)
        for begin in range(start, stop, size):
            end = min(stop, begin + size)
            yield self.rows(begin, end), slice(begin, end)

    def whole(self, stored: Tensor) -> Tensor:
        """Some of F, dense, as whole matrices: itself, or a copy where it is packed."""
        return unpack(stored, self.shape.columns) if self.config.packed else stored

    def named_state(self, start: int, stop: int) -> dict[str, Tensor]:
        """Views of the state of blocks [start, stop), by their names in a state dict."""
        return {f"{name}_{self.shape.name}": tensor[start:stop] for name, tensor in self.state.items()}

    def ages(self, step: int) -> Numbers:
        """Steps since the blocks' factors were made, where known; zeros where none is kept."""
        if self.made_N is None:
            return np.zeros_like(self.number_N)
        return step - self.made_N[self.made_N >= 0]


def allocate(
    group: int, shape: BlockShape, config: StateConfig, number: Numbers, device: torch.device, zeroed: bool = True
) -> BlockStack:  # fmt: skip
    """Allocate blocks with these numbers that have seen no gradient.

    With `zeroed` off the state is not initialised: all of it will be read from elsewhere.
    """
    count, new = len(number), huge_pages.zeros if zeroed else huge_pages.empty
    rounded = config.fisher_dtype == torch.bfloat16
    return BlockStack(
        group,
        shape,
        config,
        {f.name: new(count, *f.shape, dtype=f.dtype, device=device) for f in fields(shape, config)},
        number,
        seeding_N=torch.from_numpy(number.astype(np.int32)).to(device) if rounded else None,
        made_N=np.full(count, -1) if shape.dense and config.keeps_factors else None,
        fused=fused_step.can_step(shape, config, device),
    )
