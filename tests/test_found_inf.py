"""A step that the device decides on: its arithmetic is gated, and the host learns of it later.

A CPU stands for the device here, so that all of it can be seen without a GPU.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from engines import config, engine_of, masters, train, train_one_step_with_nan
from models import batch, distance, model, param_groups, weights
from ranks import run_ranks
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from adafisher_dist import AdaFisher
from adafisher_dist.stepping import found_inf
from adafisher_dist.stepping.found_inf import FoundInf

SETTINGS: dict[str, Any] = {"lr": 1e-2, "block_size": 8, "rows_per_block": 4}  # every rank has dense blocks


def decide_on_device(yes: bool) -> None:
    """In this process: whether it is as if the CPU were an accelerator."""
    found_inf.is_meant_for = lambda device: yes


@pytest.fixture(autouse=True)
def on_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(found_inf, "is_meant_for", lambda device: True)


def gradients(
    module: nn.Module, step: int, bad: float | None = None, dtype: torch.dtype = torch.float32
) -> None:  # fmt: skip
    x, y = batch(step, 0, 1, dtype=dtype)
    module.zero_grad()
    nn.functional.mse_loss(module(x), y).backward()
    if bad is not None:
        module.mix.weight.grad[2, 3] = bad


def state_of(optimizer: AdaFisher) -> list[Any]:
    return [value.clone() for entry in optimizer.state_dict()["state"].values() for value in entry.values()]


@pytest.mark.parametrize(
    ("bad", "rows_per_block", "max_blocks", "fisher_dtype"),
    [
        (float("nan"), 16, None, torch.float32),
        (float("nan"), 1, None, torch.float32),
        (float("inf"), 2, 3, torch.float32),
        (3e19, 16, None, torch.float32),
        (float("nan"), 16, 3, torch.bfloat16),
    ],
)
def test_a_bad_gradient_leaves_no_trace(
    bad: float, rows_per_block: int, max_blocks: int | None, fisher_dtype: torch.dtype
) -> None:
    """Weights, state and counters equal an unaffected twin's, whenever the host learns of it."""
    module, twin = model(), model()
    more = {**SETTINGS, "rows_per_block": rows_per_block, "max_blocks": max_blocks, "fisher_dtype": fisher_dtype}
    more["fisher_update_freq"] = 2
    optimizer = AdaFisher(param_groups(module), **more)
    other = AdaFisher(param_groups(twin), **more)
    for step, poison in enumerate([None, bad, None, None, bad, bad, None]):
        before = weights(module)
        gradients(module, step, poison)
        optimizer.step()
        if poison is not None:
            assert all(np.array_equal(value, before[name]) for name, value in weights(module).items())
        else:
            gradients(twin, step)
            other.step()
    assert all(np.array_equal(value, weights(twin)[name]) for name, value in weights(module).items())
    assert all(torch.equal(a, b) for a, b in zip(state_of(optimizer), state_of(other), strict=True))
    assert optimizer.skipped_steps == 3 and other.skipped_steps == 0


@pytest.mark.parametrize("how", ["del", "clear", "reset_state"])
def test_a_state_that_is_reset_after_a_bad_step_begins_anew(how: str) -> None:
    """What the bad step has to be undone of is undone before, not after."""
    module = model()
    optimizer = AdaFisher(module.parameters(), **SETTINGS)
    for step, poison in enumerate([None, None, float("nan")]):
        gradients(module, step, poison)
        optimizer.step()
    reset = next(p for p in module.parameters() if p.grad is not None)
    if how == "del":
        del optimizer.state[reset]
    elif how == "clear":
        optimizer.state.clear()
    else:
        optimizer.reset_state()
    gradients(module, 3)
    optimizer.step()
    assert optimizer.skipped_steps == (0 if how == "reset_state" else 1)
    steps = {int(optimizer.state[p]["step"]) for p in module.parameters() if p is not reset and p.grad is not None}
    assert int(optimizer.state[reset]["step"]) == 1 and steps == {3 if how == "del" else 1}


def test_whoever_asks_is_told() -> None:
    """Right after a bad step: statistics, state dict and the count of skipped steps are correct."""
    for ask in ("skipped_steps", "fisher_stats", "state_dict"):
        module = model()
        optimizer = AdaFisher(module.parameters(), **SETTINGS)
        for step, poison in enumerate([None, float("nan")]):
            gradients(module, step, poison)
            optimizer.step()
        if ask == "skipped_steps":
            assert optimizer.skipped_steps == 1
        elif ask == "fisher_stats":
            assert {stats.fisher_updates for stats in optimizer.fisher_stats().values()} == {1}
        else:
            assert {int(entry["step"]) for entry in optimizer.state_dict()["state"].values()} == {1}


class Waits(TorchDispatchMode):
    """Notes operations that give the host a result of the device, so that it has waited for it."""

    NAMES = ("_local_scalar_dense", "is_nonzero", "nonzero", "equal", "allclose", "unique")

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if any(name.startswith(word) for word in self.NAMES):
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


def waits(dtype: torch.dtype = torch.float32, **settings: Any) -> list[str]:
    module = model(dtype)
    optimizer = AdaFisher(param_groups(module), **{**SETTINGS, **settings}, max_blocks=3)
    for step in range(3):
        gradients(module, step, dtype=dtype)
        with Waits() as noted:
            optimizer.step()
    return noted.seen


def test_no_step_waits_for_the_device() -> None:
    assert waits() == waits(grafting="none") == []
    assert waits(packed=True, fisher_dtype="bfloat16", fisher_update_freq=2) == []
    assert waits(torch.bfloat16, stochastic_rounding=True) == []
    assert waits(exponent=1.0)  # whether a factorisation failed; and the test can see it


def under_ddp(rank: int, world: int, device: bool):
    decide_on_device(device)
    module = model()
    wrapped = DistributedDataParallel(module)
    optimizer = AdaFisher(module.parameters(), **SETTINGS)
    for step in range(5):
        x, y = batch(step, rank, world)
        optimizer.zero_grad()
        nn.functional.mse_loss(wrapped(x), y).backward()
        if step == 2 and rank == 1:  # at its third call, where gradients are not compared
            for p in module.parameters():
                if p.grad is not None:
                    p.grad.fill_(float("nan"))
        optimizer.step()
    return weights(module), optimizer.skipped_steps


@pytest.mark.dist
def test_ddp() -> None:
    """A NaN on one rank skips the step on all; deciding on device or host gives close weights."""
    fused, plain = (run_ranks(under_ddp, 2, device) for device in (True, False))
    for (result, skipped), (want, skipped_there) in zip(fused, plain, strict=True):
        assert skipped == skipped_there == 1
        assert distance(result, want) < 1e-4
        assert all(np.array_equal(value, fused[0][0][name]) for name, value in result.items())


def poisoned(rank: int, world: int, stage: int, device: bool):
    decide_on_device(device)
    engine = engine_of(config(stage, world, SETTINGS))
    base = engine.basic_optimizer
    train(engine, 0, 2, rank, world)
    before = masters(engine)
    train_one_step_with_nan(engine, 2, rank, world, faulty=1)
    after = masters(engine)
    train(engine, 3, 5, rank, world)
    return before, after, masters(engine), base.skipped_steps


@pytest.mark.dist
@pytest.mark.deepspeed
@pytest.mark.parametrize("stage", [0, 1, 3])
def test_zero(stage: int) -> None:
    fused, plain = (run_ranks(poisoned, 2, stage, device, deepspeed=True) for device in (True, False))
    for (before, after, last, skipped), (_, _, want, _) in zip(fused, plain, strict=True):
        assert skipped == 1
        assert all(np.array_equal(before[name], after[name]) for name in before)
        assert distance(last, want) < 1e-4


def order_of_calls(rank: int, world: int) -> list[str]:
    """The order of deciding and reading when DeepSpeed steps one param group after the other."""
    decide_on_device(True)
    order: list[str] = []
    decide, read = FoundInf.decide, FoundInf.read
    names: dict[int, str] = {}

    def note(verdict: FoundInf, what: str) -> None:
        order.append(f"{what} {names.setdefault(id(verdict), 'ABC'[len(names)])}")

    FoundInf.decide = lambda self, *args: (note(self, "decide"), decide(self, *args))[1]
    FoundInf.read = lambda self: (note(self, "read"), read(self))[1]
    engine = engine_of(config(1, world, SETTINGS), groups=True)
    train(engine, 0, 2, rank, world)
    return order


@pytest.mark.dist
@pytest.mark.deepspeed
def test_a_verdict_is_not_read_before_the_next_step() -> None:
    for order in run_ranks(order_of_calls, 2, deepspeed=True):
        assert order == ["decide A", "decide B", "read A", "decide A", "read B", "decide B"]


def other_devices(rank: int, world: int) -> str:
    decide_on_device(rank == 1)
    module = model()
    optimizer = AdaFisher(module.parameters(), **SETTINGS)
    gradients(module, 0)
    with pytest.raises(RuntimeError) as caught:
        optimizer.step()
    return str(caught.value)


@pytest.mark.dist
def test_ranks_that_would_wait_for_each_other_are_refused() -> None:
    for message in run_ranks(other_devices, 2):
        assert "on a GPU and others on the CPU" in message
