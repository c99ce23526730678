"""Small models and batches that tests train on, the same for any number of ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

SECOND_GROUP = {"weight_decay": 0.0, "lr": 5e-3, "damping": 0.3, "momentum": 0.8, "block_size": 4}


class Odd(nn.Module):
    """Shapes cut in every way: rows that are split or joined, a single element, a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(11, 37)
        self.mix = nn.Linear(37, 5, bias=False)
        self.conv = nn.Conv1d(1, 3, 3)
        self.scale = nn.Parameter(torch.tensor([1.5]))
        self.out = nn.Linear(9, 1)
        self.frozen = nn.Parameter(torch.ones(5), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.mix(torch.tanh(self.inner(x))) * self.scale + self.frozen
        return self.out(torch.tanh(self.conv(hidden.unsqueeze(1))).flatten(1))


class Tied(Odd):
    """The same with a weight used twice, and one that is not used at all."""

    def __init__(self) -> None:
        super().__init__()
        self.again = nn.Linear(11, 37, bias=False)
        self.again.weight = self.inner.weight
        self.unused = nn.Parameter(torch.ones(3, 7))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.again(x).mean(dim=1, keepdim=True)


class Stacked(Odd):
    """The same with a stack of matrices, as of experts, whose last rows fill no block."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.Parameter(torch.randn(2, 7, 37) / 6)

    def forward(self, x: Tensor) -> Tensor:
        given = torch.einsum("ni,eoi->neo", torch.tanh(self.inner(x)), self.experts)
        return super().forward(x) + torch.tanh(given).mean(dim=(1, 2)).unsqueeze(1)


def model(dtype: torch.dtype = torch.float32, kind: type[Odd] = Odd) -> Odd:
    """The model, with the same weights at every call."""
    torch.manual_seed(1)
    return kind().to(dtype)


def param_groups(module: nn.Module) -> list[dict[str, Any]]:
    """Two groups with settings of their own, each with dense blocks: `mix` is with the vectors."""
    groups: tuple[list[nn.Parameter], list[nn.Parameter]] = ([], [])
    for name, p in module.named_parameters():
        groups[p.dim() <= 1 or name.endswith("mix.weight")].append(p)
    return [{"params": groups[0]}, {"params": groups[1], **SECOND_GROUP}]


def batch(
    step: int, rank: int, world: int, size: int = 12, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """This rank's slice of the global batch of a step."""
    generator = torch.Generator().manual_seed(100 + step)
    x = torch.randn(size, 11, generator=generator)
    y = torch.sin(x[:, :1] * 3) + x[:, 1:2] * x[:, 2:3]
    part = slice(rank * size // world, (rank + 1) * size // world)
    return x[part].to(dtype), y[part].to(dtype)


def weights(module: nn.Module) -> dict[str, np.ndarray]:
    """All parameters as float64 arrays."""
    return {name: p.detach().double().numpy().copy() for name, p in module.named_parameters()}


def distance(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> float:
    """The largest difference, relative to the largest weight of the parameter."""
    return max(float(np.abs(a[name] - b[name]).max() / (np.abs(b[name]).max() + 1e-30)) for name in b)


def train_steps(module: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    """Train on the batches of steps [first, last), in this process."""
    for step in range(first, last):
        x, y = batch(step, 0, 1, dtype=module.inner.weight.dtype)
        optimizer.zero_grad()
        nn.functional.mse_loss(module(x), y).backward()
        optimizer.step()


def same_state(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Whether two state dicts have the same state, bit for bit."""
    return a["state"].keys() == b["state"].keys() and all(
        torch.equal(value, b["state"][i][key]) and value.dtype == b["state"][i][key].dtype
        for i, entry in a["state"].items()
        for key, value in entry.items()
    )


def same(found: Sequence[Mapping[str, np.ndarray]], wanted: Mapping[str, np.ndarray], bound: float = 1e-4) -> None:
    """Every rank's weights, of which together they have all, are those that are wanted."""
    assert set().union(*found) == set(wanted)
    for of_rank in found:
        for name, values in of_rank.items():
            assert np.abs(values - wanted[name]).max() < bound, name
