"""Experts stacked in one parameter, (E, out, in), cut over ranks: they train like one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import same
from ranks import run_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard

from adafisher_dist import AdaFisher, UnsupportedLayoutError, ds, load_checkpoint, save_checkpoint

pytestmark = pytest.mark.dist

SETTINGS: dict[str, Any] = {"lr": 1e-2, "block_size": 8, "rows_per_block": 4, "damping": 0.2}
TOKENS, WIDTH, HIDDEN = 24, 10, 14


class Experts(nn.Module):
    """A router, and the up- and down-projections of all experts, each in one parameter."""

    def __init__(self, experts: int) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.router = nn.Linear(WIDTH, experts, bias=False)
        self.up = nn.Parameter(torch.randn(experts, HIDDEN, WIDTH) / WIDTH**0.5)
        self.down = nn.Parameter(torch.randn(experts, WIDTH, HIDDEN) / HIDDEN**0.5)

    def forward(self, x_NI: Tensor) -> Tensor:
        weight_NE = torch.softmax(self.router(x_NI), dim=1)
        hidden_NEO = torch.tanh(torch.einsum("ni,eoi->neo", x_NI, self.up))
        return torch.einsum("neo,eio,ne->ni", hidden_NEO, self.down, weight_NE)


def loss_of(called: Any, step: int, rank: int, world: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 + step)
    x, y = torch.randn(2, TOKENS, WIDTH, generator=generator)
    own = slice(rank * TOKENS // world, (rank + 1) * TOKENS // world)
    return nn.functional.mse_loss(called(x[own]), torch.sin(3 * x[own]) + 0.1 * y[own])


class Training:
    """Of stacked experts: alone, under FSDP2, or at ZeRO-3."""

    def __init__(self, layout: str, experts: int, rank: int, world: int) -> None:
        self.rank, self.world, self.engine = rank, world, None
        self.module: nn.Module = Experts(experts)
        if layout == "zero3":
            from engines import engine_of

            config = {
                "train_micro_batch_size_per_gpu": TOKENS // world,
                "optimizer": {"type": "AdaFisher", "params": dict(SETTINGS)},
                "gradient_clipping": 0.0,
                "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
            }
            self.engine = engine_of(config, self.module)
            return
        if layout == "fsdp2":
            fully_shard(self.module, mesh=init_device_mesh("cpu", (world,)))
        self.optimizer = AdaFisher(self.module.named_parameters(), **SETTINGS)

    def train(self, first: int, last: int) -> None:
        for step in range(first, last):
            if self.engine is not None:
                self.engine.backward(loss_of(self.engine, step, self.rank, self.world))
                self.engine.step()
            else:
                self.optimizer.zero_grad()
                loss_of(self.module, step, self.rank, self.world).backward()
                self.optimizer.step()

    def weights(self) -> dict[str, np.ndarray]:
        if self.engine is not None:
            from engines import masters

            return masters(self.engine)
        found = {}
        for name, p in self.module.named_parameters():
            whole = p.full_tensor() if hasattr(p, "full_tensor") else p
            found[name] = whole.detach().double().numpy().copy()
        return found

    def save(self, folder: Path) -> None:
        if self.engine is not None:
            ds.save_checkpoint(self.engine, folder, "a")
        else:
            save_checkpoint(folder / "a", self.module, self.optimizer)

    def load(self, folder: Path) -> None:
        if self.engine is not None:
            ds.load_checkpoint(self.engine, folder, "a")
        else:
            load_checkpoint(folder / "a", self.module, self.optimizer)


def alone(experts: int, steps: int = 8) -> dict[str, np.ndarray]:
    training = Training("alone", experts, 0, 1)
    training.train(0, steps)
    return training.weights()


def trained(rank: int, world: int, layout: str, experts: int) -> dict[str, np.ndarray]:
    training = Training(layout, experts, rank, world)
    training.train(0, 8)
    return training.weights()


CASES = [(2, 4), (2, 3), (4, 3), pytest.param(4, 6, marks=pytest.mark.slow)]  # ranks, experts


@pytest.mark.parametrize(("world", "experts"), CASES)
def test_fsdp2_trains_like_one_process(world: int, experts: int) -> None:
    same(run_ranks(trained, world, "fsdp2", experts), alone(experts))


@pytest.mark.deepspeed
@pytest.mark.parametrize(("world", "experts"), CASES)
def test_zero3_trains_like_one_process(world: int, experts: int) -> None:
    same(run_ranks(trained, world, "zero3", experts, deepspeed=True), alone(experts))


def saved(rank: int, world: int, layout: str, experts: int, folder: Path) -> None:
    training = Training(layout, experts, rank, world)
    training.train(0, 4)
    training.save(folder)


def resumed(rank: int, world: int, layout: str, experts: int, folder: Path) -> dict[str, np.ndarray]:
    training = Training(layout, experts, rank, world)
    training.load(folder)
    training.train(4, 8)
    return training.weights()


@pytest.mark.deepspeed
@pytest.mark.parametrize(
    ("before", "after"),
    [
        (("fsdp2", 2), ("fsdp2", 4)),
        (("fsdp2", 4), ("zero3", 2)),
        (("zero3", 2), ("zero3", 4)),
        pytest.param(("zero3", 4), ("fsdp2", 3), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_goes_on_at_other_ranks(before: tuple[str, int], after: tuple[str, int], tmp_path: Path) -> None:
    for (layout, world), what in ((before, saved), (after, resumed)):
        found = run_ranks(what, world, layout, 3, tmp_path, deepspeed=layout == "zero3")
    same(found, alone(3))


def by_rows_of_each_expert(rank: int, world: int) -> str:
    module = Experts(4)
    mesh = init_device_mesh("cpu", (world,))
    fully_shard(module, mesh=mesh, shard_placement_fn=lambda p: Shard(1) if p.dim() == 3 else Shard(0))
    with pytest.raises(UnsupportedLayoutError) as error:
        AdaFisher(module.named_parameters(), **SETTINGS)
    return str(error.value)


def test_cutting_the_rows_of_each_expert_is_refused() -> None:
    for told in run_ranks(by_rows_of_each_expert, 2):
        assert "up is a DTensor with placements (Shard(dim=1),)" in told
        assert "leave shard_placement_fn out" in told
