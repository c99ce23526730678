"""Buffers of the host that are used again: to get new pages costs more than to read into them."""

from __future__ import annotations

import torch
from torch import Tensor

from adafisher_dist.numerics import huge_pages


class HostBuffers:
    """Memory to pack into or to read into; threads may share it."""

    def __init__(self) -> None:
        self._free: list[Tensor] = []

    def take(self, numel: int, dtype: torch.dtype) -> Tensor:
        """An uninitialised 1-d tensor."""
        nbytes = numel * dtype.itemsize
        try:
            buffer = self._free.pop()
        except IndexError:  # which is another thread's answer too
            buffer = torch.empty(0, dtype=torch.uint8, device="cpu")
        if buffer.numel() < nbytes:
            buffer = huge_pages.empty(nbytes, dtype=torch.uint8, device=torch.device("cpu"))
        return buffer[:nbytes].view(dtype)

    def give_back(self, taken: Tensor) -> None:
        """It is not needed any more."""
        self._free.append(torch.empty(0, dtype=torch.uint8, device="cpu").set_(taken.untyped_storage()))
