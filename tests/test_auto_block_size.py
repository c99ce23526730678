"""block_size="auto": the largest blocks that the budget has room for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from engines import config, engine_of, train
from models import Odd, batch, model
from ranks import run_ranks
from test_estimate import SHAPES, kind_of
from torch import nn

from adafisher_dist import AdaFisher
from adafisher_dist.blocks import estimate, sharding
from adafisher_dist.blocks.estimate import AUTO_BLOCK_SIZES


def automatic(rank: int, world: int, stage: int, budget: float):
    params = {"lr": 1e-2, "block_size": "auto", "rows_per_block": 1, "memory_budget_gb": budget}
    engine = engine_of(config(stage, world, params), groups=True)
    train(engine, 0, 2, rank, world)
    optimizer = engine.basic_optimizer
    return [group["block_size"] for group in optimizer.param_groups], optimizer.memory_usage()["rank"]["total"]


@pytest.mark.dist
@pytest.mark.deepspeed
@pytest.mark.parametrize("stage", [0, 1, 3])
def test_auto_uses_what_more_ranks_give(stage: int) -> None:
    """Equal on all ranks, within the budget, larger on more ranks; a group's own size is kept."""
    budget = 20e-6
    sizes = []
    for world in (1, 3):
        results = run_ranks(automatic, world, stage, budget, deepspeed=True)
        assert all(found == results[0][0] for found, _ in results)
        assert all(total <= budget * 1e9 for _, total in results)
        first, second = results[0][0]
        assert second == 4 and first in AUTO_BLOCK_SIZES
        sizes.append(first)
    assert sizes[1] > sizes[0]


def step(module: Odd, optimizer: AdaFisher, number: int) -> None:
    x, y = batch(number, 0, 1)
    optimizer.zero_grad()
    nn.functional.mse_loss(module(x), y).backward()
    optimizer.step()


def test_auto_is_the_largest_that_fits() -> None:
    for budget in (14e-6, 20e-6, 1.0):
        module = model()
        optimizer = AdaFisher(module.parameters(), block_size="auto", rows_per_block=1, memory_budget_gb=budget)
        assert optimizer.param_groups[0]["block_size"] == "auto"
        step(module, optimizer, 0)
        chosen = optimizer.param_groups[0]["block_size"]
        assert optimizer.memory_usage()["rank"]["total"] <= budget * 1e9
        larger = [size for size in AUTO_BLOCK_SIZES if size > chosen]
        if larger:
            kind = kind_of({"block_size": larger[-1], "rows_per_block": 1})
            assert estimate.estimate(SHAPES, "ddp", 1, kind).memory["total"] > budget * 1e9
        else:
            assert chosen == 128


def test_a_budget_that_nothing_fits() -> None:
    module = model()
    optimizer = AdaFisher(module.parameters(), block_size="auto", memory_budget_gb=1e-6)
    with pytest.raises(ValueError, match=r"needs .* GB a rank even with blocks of one element, and .* is 1e-06"):
        step(module, optimizer, 0)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"block_size": "auto"}, "needs memory_budget_gb"),
        ({"memory_budget_gb": 1.0}, 'is for block_size="auto", and block_size is 128'),
        ({"block_size": "auto", "memory_budget_gb": -1.0}, "memory_budget_gb should be at least 0"),
        ({"block_size": "large"}, "block_size should be an integer, got 'large'"),
    ],
)
def test_bad_budgets(settings: dict[str, Any], words: str) -> None:
    with pytest.raises((TypeError, ValueError), match=words):
        AdaFisher(model().parameters(), **settings)


@pytest.mark.parametrize("stepped", [False, True])
def test_a_checkpoint_brings_its_block_size(tmp_path: Any, stepped: bool) -> None:
    """Resumed where another size would be chosen, training goes on with the checkpoint's blocks."""
    from adafisher_dist import load_checkpoint, save_checkpoint

    module = model()
    settings: dict[str, Any] = {"lr": 1e-2, "block_size": "auto", "rows_per_block": 1}
    optimizer = AdaFisher(module.parameters(), memory_budget_gb=14e-6, **settings)
    for number in range(3):
        step(module, optimizer, number)
    save_checkpoint(tmp_path / "a", module, optimizer)
    again = model()
    other = AdaFisher(again.parameters(), memory_budget_gb=1.0, **settings)
    if stepped:
        step(again, other, 7)
        assert other.param_groups[0]["block_size"] == 128
    load_checkpoint(tmp_path / "a", again, other)
    for number in range(3, 6):
        step(module, optimizer, number)
        step(again, other, number)
    assert other.param_groups[0]["block_size"] == optimizer.param_groups[0]["block_size"] < 128
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), again.parameters(), strict=True))


def held_by(blocks: Any, groups: list[dict[str, Any]]) -> tuple[Any, int]:
    """Blocks of the param groups, and bytes of this rank after a step, with such settings."""
    optimizer = AdaFisher(groups, **blocks)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.full_like(parameter, 1e-3)
    optimizer.step()
    return {group["block_size"] for group in optimizer.param_groups}, optimizer.memory_usage()["rank"]["total"]


def test_groups_share_the_workspace(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where each layer has a learning rate of its own: one shard, with one workspace."""
    monkeypatch.setattr(sharding, "CHUNK_FISHER_NUMEL", 2**14)  # which is less than they all would take

    def groups() -> list[dict[str, Any]]:
        return [{"params": [nn.Parameter(torch.zeros(64, 64))], "lr": 1e-3 / (1 + i)} for i in range(20)]

    _, needed = held_by({"block_size": 128}, groups())
    for budget, enough in ((needed, True), (needed - 1, False)):
        sizes, total = held_by({"block_size": "auto", "memory_budget_gb": budget / 1e9}, groups())
        assert total <= budget
        assert (sizes == {128}) == enough


def mixed(rank: int, world: int) -> tuple[int, int]:
    """What is needed with the largest blocks, and what is held where there is one byte less."""

    def group() -> list[dict[str, Any]]:
        layers = [nn.Parameter(torch.zeros(64, 64, dtype=torch.bfloat16)) for _ in range(4)]
        return [{"params": [*layers, nn.Parameter(torch.ones(64))]}]

    _, needed = held_by({"block_size": 128}, group())
    _, total = held_by({"block_size": "auto", "memory_budget_gb": (needed - 1) / 1e9}, group())
    return needed, total


@pytest.mark.dist
def test_weights_are_gathered_in_the_widest_dtype() -> None:
    """A model in bfloat16 with a norm in float32."""
    for needed, total in run_ranks(mixed, 2):
        assert total < needed
