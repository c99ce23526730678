"""Large memory of a CPU in huge pages, where Linux gives them to those who ask ("madvise").

A state that has just been allocated gets its pages one by one as it is first written, which takes
longer than to read it from a checkpoint; huge pages are 512 times fewer.
"""

from __future__ import annotations

import ctypes
import mmap
from functools import cache
from typing import Any

import torch
from torch import Tensor

# The size of a huge page of x86 and of most of arm64: smaller tensors have none.
_HUGE_PAGE = 1 << 21


def empty(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """As `torch.empty`; on a CPU in huge pages, where it is large enough and they are to be had."""
    tensor = torch.empty(*shape, dtype=dtype, device=device)
    if device.type == "cpu" and tensor.nbytes >= 2 * _HUGE_PAGE:
        _ask_for_huge_pages(tensor.data_ptr(), tensor.nbytes)
    return tensor


def zeros(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """As `torch.zeros`, and so."""
    return empty(*shape, dtype=dtype, device=device).zero_()


def _ask_for_huge_pages(address: int, nbytes: int) -> None:
    madvise = _madvise()
    if madvise is None:
        return
    start = -(-address // _HUGE_PAGE) * _HUGE_PAGE
    stop = (address + nbytes) // _HUGE_PAGE * _HUGE_PAGE
    madvise(start, stop - start, mmap.MADV_HUGEPAGE)  # advice: a system that has none to give says so, and all is well


@cache
def _madvise() -> Any | None:
    """The C library's function; None on a system that has no huge pages by request."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    try:
        madvise = ctypes.CDLL(None).madvise
    except (OSError, AttributeError):  # a C library that cannot be asked
        return None
    madvise.argtypes, madvise.restype = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int), ctypes.c_int
    return madvise
