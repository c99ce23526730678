"""Products on a GPU in full precision, whatever the user allows the model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Multiply in full float32 on a GPU: the TF32 that users allow would round F to 10 bits."""
    if device.type != "cuda":
        yield
        return
    matmul = torch.backends.cuda.matmul
    try:
        allowed = matmul.allow_tf32
    except RuntimeError:  # somebody has set it by torch 2.9's names, and torch refuses a mixture of both
        before = matmul.fp32_precision
        matmul.fp32_precision = "ieee"
        try:
            yield
        finally:
            matmul.fp32_precision = before
        return
    if not allowed:
        yield
        return
    precision = torch.get_float32_matmul_precision()  # "high", or "medium", which allow_tf32 would make "high"
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)
