"""What a step leaves behind: nothing that waits for Python to look for cycles."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest
import torch
from engines import config, engine_of
from models import batch
from ranks import run_ranks
from torch import Tensor, nn

from adafisher_dist import AdaFisher


@pytest.fixture(autouse=True)
def no_collector() -> Iterator[None]:
    """As torchtitan trains."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def output_of_step(module: nn.Module, optimizer: torch.optim.Optimizer) -> weakref.ref[Tensor]:
    """A weak reference to what the model has returned, as large as logits are."""
    output = module(torch.ones(4, 16))
    output.square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    return weakref.ref(output)


def test_the_caller_s_tensors_are_freed() -> None:
    module = nn.Linear(16, 16)
    optimizer = AdaFisher(module.parameters())
    output_of_step(module, optimizer)
    assert all(output_of_step(module, optimizer)() is None for _ in range(3))


def test_what_is_deleted_in_the_caller_is_freed() -> None:
    module = nn.Linear(16, 16)
    optimizer = AdaFisher(module.parameters())
    for _ in range(3):
        output = module(torch.ones(4, 16))
        output.square().mean().backward()
        optimizer.step()
        alive = weakref.ref(output)
        del output
        assert alive() is None


@pytest.mark.parametrize("kind", [torch.optim.AdamW, AdaFisher])
def test_a_deleted_optimizer_frees_its_state_and_its_model(kind: type[torch.optim.Optimizer]) -> None:
    module = nn.Linear(16, 16)
    optimizer = kind(module.parameters(), lr=1e-3)
    for _ in range(2):
        output_of_step(module, optimizer)
    entries = [value for entry in optimizer.state.values() for value in entry.values() if isinstance(value, Tensor)]
    alive = [weakref.ref(each) for each in (optimizer, module.weight, *entries)]
    assert len(alive) > 6
    del optimizer, module, entries
    assert [reference() for reference in alive] == [None] * len(alive)


def collected(rank: int, world: int, stage: int) -> list[int]:
    """Objects in cycles, of each of some steps of DeepSpeed's engine with and without its step."""
    engine = engine_of(config(stage, world, {"lr": 1e-2}))
    found = []
    for number in range(5):
        x, y = batch(number, rank, world)
        loss = nn.functional.mse_loss(engine(x), y)
        engine.backward(loss)
        gc.collect()
        gc.disable()
        before = engine.basic_optimizer.step

        def step(*args: object, before: object = before, **more: object) -> object:
            result = before(*args, **more)  # type: ignore[operator]
            found.append(gc.collect())
            return result

        engine.basic_optimizer.step = step
        engine.step()
        engine.basic_optimizer.step = before
    return found[2:]


@pytest.mark.dist
@pytest.mark.deepspeed
@pytest.mark.parametrize("stage", [1, 3])
def test_no_cycles_under_deepspeed(stage: int) -> None:
    for found in run_ranks(collected, 1, stage, deepspeed=True):
        assert not any(found), found
