"""Products in full precision, whatever the user allows the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from threading import Lock
from typing import Any

import torch

_MKLDNN: Any = getattr(torch.backends.mkldnn, "matmul", None)  # where torch has 2.9's names


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Multiply in the dtype of the tensors, and in all its bits.

    The TF32, or on CPUs the bfloat16, that users allow to float32 products would round F to 10
    bits or fewer, and a step taken inside of `torch.autocast` would be one in 16 bits.
    """
    with _without_autocast(device), _CUDA if device.type == "cuda" else _CPU:
        yield


def _without_autocast(device: torch.device) -> AbstractContextManager[None]:
    if torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


class _Shared:
    """A change of torch's settings, which are the process's: until the last thread leaves."""

    def __init__(self, change: Callable[[], AbstractContextManager[None]]) -> None:
        self._change = change
        self._changed = ExitStack()
        self._lock = Lock()
        self._inside = 0

    def __enter__(self) -> None:
        with self._lock:
            if self._inside == 0:
                self._changed.enter_context(self._change())
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                self._changed.close()


@contextmanager
def _on_cuda() -> Iterator[None]:
    matmul = torch.backends.cuda.matmul
    try:
        precision = torch.get_float32_matmul_precision() if matmul.allow_tf32 else "highest"
    except RuntimeError:  # somebody has set it by torch 2.9's names, and torch refuses a mixture of both
        with _precision(matmul):
            yield
        return
    # "high", or "medium", which to set allow_tf32 again would make "high"
    with _highest(precision):
        yield


@contextmanager
def _on_cpu() -> Iterator[None]:
    with _highest(torch.get_float32_matmul_precision()) if _MKLDNN is None else _precision(_MKLDNN):
        yield


@contextmanager
def _precision(matmul: Any) -> Iterator[None]:
    """Full float32, by torch 2.9's names."""
    before = matmul.fp32_precision
    if before in ("none", "ieee"):
        yield
        return
    matmul.fp32_precision = "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = "none"  # where it was of all products, it is again
        if matmul.fp32_precision != before:
            matmul.fp32_precision = before


@contextmanager
def _highest(precision: str) -> Iterator[None]:
    """Full float32 in place of `precision`, by the older names, of CPUs and GPUs together."""
    if precision == "highest":
        yield
        return
    on_cpu = None if _MKLDNN is None else _MKLDNN.fp32_precision
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)
        if _MKLDNN is not None:  # allow_tf32 is of GPUs alone
            _MKLDNN.fp32_precision = on_cpu


_CUDA, _CPU = _Shared(_on_cuda), _Shared(_on_cpu)
