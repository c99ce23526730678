"""What the checks of `correct.py` train: models, batches, and the oracle beside them.

Batches are cut by rank; what is not data is the same on each.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from datetime import timedelta
from functools import cache
from typing import Any, ClassVar

import models
import numpy as np
import torch
import torch.distributed as dist
from beside_oracle import assert_blocks_agree
from common_gpu import ROOT
from correct_blocks import host
from correct_runner import TIMEOUT, Here
from models import SECOND_GROUP, param_groups
from oracle import Oracle
from torch import Tensor, nn

from adafisher_dist import AdaFisher
from adafisher_dist.comm import collectives

sys.path.insert(0, str(ROOT / "tests"))  # before launch/, which has modules of the same names

Arrays = dict[str, np.ndarray]
Settings = dict[str, Any]

PARAMS: Settings = {"lr": 1e-2, "block_size": 8, "damping": 0.2}
STEPS = 5
NAN, INF = float("nan"), float("inf")
FLOATS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}


def weights(module: nn.Module) -> Arrays:
    return {name.removeprefix("module."): host(p) for name, p in module.named_parameters()}


def gradients_of(module: nn.Module) -> Arrays:
    named = module.named_parameters()
    return {name.removeprefix("module."): host(p.grad) for name, p in named if p.grad is not None}


def state_of(optimizer: AdaFisher) -> list[Tensor]:
    """Copies of all that this rank holds of the state."""
    return [value.clone() for entry in optimizer.state.values() for value in entry.values()]


def known(value: Tensor) -> Tensor:
    """Of whole blocks the lower triangle, which is all that counts and that a checkpoint holds."""
    return value.tril() if value.dim() == 3 and value.shape[1] == value.shape[2] > 1 else value


def samples(here: Here) -> int:
    """In the batch of a step, over all ranks: as many on each."""
    return 12 if 12 % here.world == 0 else 2 * here.world


def batch(step: int, here: Here) -> tuple[Tensor, Tensor]:
    x, y = models.batch(step, here.rank, here.world, size=samples(here))
    return x.to(here.device), y.to(here.device)


def same_on_all(found: Arrays, here: Here) -> None:
    """Raise where ranks hold other weights. A collective."""
    prints = collectives.host_group(None).gather([value.tobytes() for value in found.values()])
    assert all(other == prints[0] for other in prints), f"the weights on this rank, {here.rank}, or on others differ"


class Given(nn.Module):
    """Parameters of a few shapes, whose gradients are given, and no model's."""

    SHAPES: ClassVar = {"a": (37, 11), "b": (37,), "c": (3, 1, 3), "d": (1,)}

    def __init__(self, here: Here, device: torch.device | None = None, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        for number, (name, shape) in enumerate(self.SHAPES.items()):
            value = torch.from_numpy(np.random.default_rng(number).standard_normal(shape))
            setattr(self, name, nn.Parameter(value.to(device or here.device, dtype)))

    def take_gradients(self, step: int) -> Arrays:
        """Those of a step, alike on all ranks and devices, as they are in the parameters' dtype."""
        for number, p in enumerate(self.parameters()):
            size = np.exp(np.random.default_rng([number, 1]).standard_normal(p.shape))
            value = torch.from_numpy(size * np.random.default_rng([number, 2, step]).standard_normal(p.shape))
            p.grad = value.to(p.device, p.dtype)
        return gradients_of(self)

    def train(self, optimizer: AdaFisher, steps: Iterable[int]) -> Given:  # type: ignore[override]
        for step in steps:
            self.take_gradients(step)
            optimizer.step()
        return self


class Beside:
    """The oracle beside a training: compares what each step added to the weights, by block."""

    def __init__(
        self, start: Arrays, own: Mapping[str, Settings], dtype: torch.dtype = torch.float32, tolerance: float = 3e-4,
        **hyper: Any,
    ) -> None:  # fmt: skip
        """`start`: weights in param-group order; `own`: by name, what its group sets otherwise."""
        self.names, self.tolerance = list(start), tolerance
        self.rounding = float(torch.finfo(dtype).eps)
        arithmetic: type = np.float64 if dtype == torch.float64 else np.float32
        for name in ("fisher_dtype", "packed"):
            hyper.pop(name, None)
        self.oracle = Oracle([(start[name], own.get(name, {})) for name in self.names], arithmetic, **hyper)
        self.steps = 0

    def step(self, gradients: Arrays, before: Arrays, after: Arrays) -> None:
        changes = self.oracle.step([gradients.get(name) for name in self.names])
        for name, change, setting in zip(self.names, changes, self.oracle.settings, strict=True):
            if name in after:
                where = f"step {self.steps}, {name}"
                floor = 4 * self.rounding * np.maximum(np.abs(before[name]), np.abs(after[name]))
                scale = self.tolerance * np.abs(change) + 1e-12
                assert_blocks_agree(after[name] - before[name], change, scale, floor, where, setting)
        self.steps += 1


def beside_groups(module: nn.Module, start: Arrays, **more: Any) -> Beside:
    """The oracle for a model whose optimizer was given `param_groups(module)`, and PARAMS."""
    names = {id(p): name.removeprefix("module.") for name, p in module.named_parameters()}
    groups = [[names[id(p)] for p in group["params"]] for group in param_groups(module)]
    own = {name: SECOND_GROUP for name in groups[1]}
    return Beside({name: start[name] for group in groups for name in group}, own, **{**PARAMS, **more})


@cache
def other_group(name: str) -> Any:
    """Another group of all ranks, for a backend that also sends CPU tensors (NCCL does not)."""
    return dist.new_group(backend=name, timeout=timedelta(seconds=TIMEOUT))


def both(here: Here) -> Any:
    return other_group("gloo" if here.device.type == "cpu" else "cpu:gloo,cuda:nccl")
