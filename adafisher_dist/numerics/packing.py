"""Symmetric blocks stored as their lower triangles."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

# Elements on a CPU, so that they stay in its cache: four times as fast as all at once.
_AT_ONCE = 1 << 17


def pack(fisher_NBB: Tensor) -> Tensor:
    """The lower triangles of symmetric blocks, row-major, (N, T).

    Element (i, j), i ≥ j, is at i (i + 1) / 2 + j.
    """
    size = fisher_NBB.shape[1]
    fisher_NT = fisher_NBB.new_empty(len(fisher_NBB), size * (size + 1) // 2)
    pack_into(fisher_NBB, fisher_NT)
    return fisher_NT


def pack_into(fisher_NBB: Tensor, fisher_NT: Tensor) -> None:
    """The same, written into these, which are contiguous."""
    lower_T, _ = _places(fisher_NBB.shape[1], fisher_NBB.device)
    _columns(fisher_NBB.flatten(1), lower_T, fisher_NT)


def unpack(fisher_NT: Tensor, size: int) -> Tensor:
    """The inverse of `pack`: whole blocks, (N, size, size)."""
    fisher_NBB = fisher_NT.new_empty(len(fisher_NT), size, size)
    unpack_into(fisher_NT, fisher_NBB)
    return fisher_NBB


def unpack_into(fisher_NT: Tensor, fisher_NBB: Tensor) -> None:
    """The same, written into these, which are contiguous."""
    size = fisher_NBB.shape[1]
    _, full = _places(size, fisher_NT.device)
    _columns(fisher_NT, full, fisher_NBB.view(-1, size * size))


def _columns(x: Tensor, index: Tensor, out: Tensor) -> None:
    if x.device.type != "cpu":
        torch.index_select(x, 1, index, out=out)
        return
    rows = max(1, _AT_ONCE // max(x.shape[1], len(index)))
    for some, to in zip(torch.split(x, rows), torch.split(out, rows), strict=True):
        if x.dtype == torch.bfloat16:  # where torch is fast in float32 only, by five times
            to.copy_(some.float().index_select(1, index))
        else:
            torch.index_select(some, 1, index, out=to)


@cache
def _places(size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Where each lower-triangle element is in a whole block, (T,), and the reverse, (size²,)."""
    index_B = torch.arange(size, device=device)
    low_BB, high_BB = torch.minimum(index_B[:, None], index_B), torch.maximum(index_B[:, None], index_B)
    row_T, column_T = torch.tril_indices(size, size, device=device)
    return row_T * size + column_T, (high_BB * (high_BB + 1) // 2 + low_BB).flatten()
