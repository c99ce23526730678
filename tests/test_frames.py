"""From step() to the arithmetic it is not far: `python tests/test_frames.py` shows the way."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest
import torch
from torch import nn

from adafisher_dist import AdaFisher

MOST = 7
PRODUCTS = ("baddbmm", "bmm", "matmul")


def ways(**settings: Any) -> list[list[str]]:
    """For each matrix product of a step, the package's functions from `AdaFisher.step` to it."""
    parameter = nn.Parameter(torch.randn(64, 64))
    optimizer = AdaFisher([parameter], **settings)
    found: list[list[str]] = []
    for step in range(2):
        parameter.grad = torch.randn(64, 64)
        if step:
            with torch.utils._python_dispatch._disable_current_modes(), _Watch(found):
                optimizer.step()
        else:
            optimizer.step()
    return found


class _Watch(torch.overrides.TorchFunctionMode):
    """Notes who calls for a product."""

    def __init__(self, found: list[list[str]]) -> None:
        super().__init__()
        self._found = found

    def __torch_function__(self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(name in getattr(function, "__name__", "") for name in PRODUCTS):
            names, frame = [], sys._getframe(1)
            while frame is not None:
                names += [_name(frame)] if _is_own(frame) else []
                frame = frame.f_back
            self._found.append(names[::-1])
        return function(*args, **(kwargs or {}))


def _is_own(frame: FrameType) -> bool:
    return str(frame.f_globals.get("__name__")).startswith("adafisher_dist.")


def _name(frame: FrameType) -> str:
    return f"{frame.f_globals['__name__'].removeprefix('adafisher_dist.')}.{frame.f_code.co_name}"


@pytest.mark.parametrize("settings", [{}, {"exponent": 1.0, "grafting": "none"}], ids=str)
def test_few_frames_from_the_step_to_a_product(settings: dict[str, Any]) -> None:
    found = ways(**settings)
    assert found and all(way[0] == "optimizer.adafisher.step" for way in found)
    longest = max(found, key=len)
    assert len(longest) <= MOST, " → ".join(longest)


if __name__ == "__main__":
    for way in {tuple(way) for way in ways()}:
        print(f"{len(way)} frames: {' → '.join(way)}")
