"""Trainings of one process, as the tests of checkpoints save and load them."""

from __future__ import annotations

from typing import Any

import torch
from models import batch, model
from torch import Tensor, nn

from adafisher_dist import AdaFisher

SETTINGS = {"lr": 1e-2, "block_size": 8, "damping": 0.2}


def steps(module: nn.Module, optimizer: AdaFisher, first: int, last: int) -> None:
    for step in range(first, last):
        x, y = batch(step, 0, 1)
        dtype = next(module.parameters()).dtype
        optimizer.zero_grad()
        nn.functional.mse_loss(module(x.to(dtype)).float(), y).backward()
        optimizer.step()


def trained(module: nn.Module | None = None, count: int = 4, **settings: Any) -> tuple[nn.Module, AdaFisher]:
    module = module if module is not None else model()
    optimizer = AdaFisher(module.parameters(), **{**SETTINGS, **settings})
    steps(module, optimizer, 0, count)
    return module, optimizer


def state(optimizer: AdaFisher) -> dict[str, Tensor]:
    names = {id(t): given.name for t, given in optimizer._registry.given_parameters.items()}
    return {
        f"{names[id(p)]}/{key}": lower(key, value)
        for p, entry in optimizer.state.items()
        for key, value in entry.items()
    }


def lower(key: str, value: Tensor) -> Tensor:
    """A copy, without what nothing reads: the upper triangles of the Fisher."""
    return value.tril() if key.startswith("fisher") and value.dim() == 3 else value.clone()


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
