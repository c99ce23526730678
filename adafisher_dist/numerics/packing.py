"""Symmetric blocks stored as their lower triangles."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor


def pack(fisher_NBB: Tensor) -> Tensor:
    """The lower triangles of symmetric blocks, row-major, (N, T).

    Element (i, j), i ≥ j, is at i (i + 1) / 2 + j.
    """
    lower_T, _ = _places(fisher_NBB.shape[1], fisher_NBB.device)
    return _columns(fisher_NBB.flatten(1), lower_T)


def unpack(fisher_NT: Tensor, size: int) -> Tensor:
    """The inverse of `pack`: whole blocks, (N, size, size)."""
    _, full = _places(size, fisher_NT.device)
    return _columns(fisher_NT, full).view(-1, size, size)


def _columns(x: Tensor, index: Tensor) -> Tensor:
    if x.dtype == torch.bfloat16 and x.device.type == "cpu":  # where torch is fast in float32 only, by five times
        return x.float().index_select(1, index).to(x.dtype)
    return x.index_select(1, index)


@cache
def _places(size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Where each lower-triangle element is in a whole block, (T,), and the reverse, (size²,)."""
    index_B = torch.arange(size, device=device)
    low_BB, high_BB = torch.minimum(index_B[:, None], index_B), torch.maximum(index_B[:, None], index_B)
    row_T, column_T = torch.tril_indices(size, size, device=device)
    return row_T * size + column_T, (high_BB * (high_BB + 1) // 2 + low_BB).flatten()
