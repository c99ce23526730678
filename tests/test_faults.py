"""An error of one rank reaches all: none waits in a collective, none goes on with half a step."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from engines import PARAMS, backward, config, engine_of, masters, run_alone, train, train_one_step_with_nan
from models import batch, distance, model, weights
from ranks import run_ranks
from torch import nn

from adafisher_dist import AdaFisher
from adafisher_dist.comm import collectives
from adafisher_dist.numerics import block_step
from adafisher_dist.optimizer import state_dicts
from adafisher_dist.state import stacking

pytestmark = pytest.mark.dist

FAULTY = 1  # the rank that fails
SETTINGS = {"lr": 1e-2, "block_size": 8, "rows_per_block": 4}  # every rank owns dense blocks


class OutOfMemory(RuntimeError):
    """What torch.OutOfMemoryError is on a GPU."""


def fail(*_: Any, **__: Any) -> Any:
    raise OutOfMemory("out of memory, says the test")


def inject(place: str) -> None:
    """Make the next call fail: when allocating the state, in a block batch, or applying updates."""
    if place == "allocation":
        stacking.allocate = fail
    elif place == "block batch":
        block_step.factorize = fail
    elif place == "apply":
        torch._foreach_add_ = fail
    else:
        raise AssertionError(place)


PLACES = ["allocation", "block batch", "apply"]


def message_of(rank: int, step: Any) -> str:
    with pytest.raises(RuntimeError) as caught:
        step()
    assert isinstance(caught.value, OutOfMemory) == (rank == FAULTY)
    return str(caught.value)


def replicated(rank: int, world: int, place: str) -> tuple[str, str]:
    module = model()
    optimizer = AdaFisher(module.parameters(), **SETTINGS)

    def step(number: int) -> None:
        x, y = batch(number, 0, 1)
        optimizer.zero_grad()
        nn.functional.mse_loss(module(x), y).backward()
        optimizer.step()

    if place != "allocation":
        step(0)
    before = weights(module)
    if rank == FAULTY:
        inject(place)
    first = message_of(rank, lambda: step(1))
    with pytest.raises(RuntimeError) as caught:
        step(2)
    if place == "allocation":
        assert all(np.array_equal(value, before[name]) for name, value in weights(module).items())
    else:
        with pytest.raises(RuntimeError, match="incomplete"):
            optimizer.state_dict()
    return first, str(caught.value)


@pytest.mark.parametrize("place", PLACES)
def test_replicated(place: str) -> None:
    results = run_ranks(replicated, 3, place, timeout=60)
    for rank, (first, second) in enumerate(results):
        if rank == FAULTY:
            assert "says the test" in first
        else:
            when = "before anything changed" if place == "allocation" else "in the middle of a step"
            assert f"rank {FAULTY} failed {when}" in first
        if place != "allocation":
            assert "incomplete" in second


def sharded(rank: int, world: int, stage: int, place: str) -> str:
    engine = engine_of(config(stage, world))
    if place != "allocation":
        train(engine, 0, 1, rank, world)
    if rank == FAULTY:
        inject(place)
    backward(engine, 1, rank, world)
    return message_of(rank, engine.step)


@pytest.mark.deepspeed
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_sharded(stage: int, place: str) -> None:
    messages = run_ranks(sharded, 3, stage, place, timeout=60, deepspeed=True)
    for rank, text in enumerate(messages):
        assert ("says the test" if rank == FAULTY else "rank 1 failed") in text


def recovers(rank: int, world: int):
    """A checkpoint loaded after a failed step makes training go on as if it had not been."""
    module, twin = model(), model()
    optimizer, reference = (AdaFisher(m.parameters(), **SETTINGS) for m in (module, twin))

    def step(m: nn.Module, o: AdaFisher, number: int) -> None:
        x, y = batch(number, 0, 1)
        o.zero_grad()
        nn.functional.mse_loss(m(x), y).backward()
        o.step()

    for number in range(3):
        step(module, optimizer, number)
    optimizer.consolidate_state_dict(to=None)
    saved = {k: v.clone() for k, v in module.state_dict().items()}, optimizer.state_dict()
    real = block_step.factorize
    if rank == FAULTY:
        block_step.factorize = fail
    message_of(rank, lambda: step(module, optimizer, 3))
    block_step.factorize = real
    module.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    step(module, optimizer, 3)
    for number in range(4):
        step(twin, reference, number)
    return weights(module), weights(twin)


def test_recovery() -> None:
    for recovered, straight in run_ranks(recovers, 2, timeout=60):
        assert all(np.array_equal(recovered[name], straight[name]) for name in straight)


def broken_block(rank: int, world: int, stage: int):
    """Each Cholesky fails on one rank alone: its blocks take the diagonal, and training goes on."""
    engine = engine_of(config(stage, world, {**PARAMS, "exponent": 1.0}))
    real = torch.linalg.cholesky_ex

    def never(a: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        root, info = real(a)
        return root, torch.ones_like(info)

    if rank == FAULTY:
        torch.linalg.cholesky_ex = never
    train(engine, 0, 3, rank, world)
    torch.linalg.cholesky_ex = real
    ladder = [entry.ladder["diagonal"] for entry in engine.basic_optimizer.fisher_stats().values()]
    return masters(engine), sum(ladder)


@pytest.mark.deepspeed
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_factorisation_that_fails_on_one_rank(stage: int) -> None:
    results = run_ranks(broken_block, 2, stage, timeout=60, deepspeed=True)
    assert results[0][1] == 0 and results[1][1] > 0
    for result, _ in results:
        assert all(np.isfinite(value).all() for value in result.values())
        assert all(np.array_equal(result[name], results[0][0][name]) for name in result)


def poisoned(rank: int, world: int, stage: int):
    """A NaN in the gradients as one rank alone sees them, after DeepSpeed's own checks."""
    engine = engine_of(config(stage, world))
    base = engine.basic_optimizer
    train(engine, 0, 2, rank, world)
    before = masters(engine)
    train_one_step_with_nan(engine, 2, rank, world, faulty=FAULTY)
    after = masters(engine)
    train(engine, 3, 4, rank, world)
    steps = {entry.fisher_updates for entry in base.fisher_stats().values()}
    return before, after, masters(engine), base.skipped_steps, steps


@pytest.mark.deepspeed
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_gradient_that_is_not_finite_on_one_rank(stage: int) -> None:
    for before, after, later, skipped, steps in run_ranks(poisoned, 3, stage, timeout=60, deepspeed=True):
        assert skipped == 1 and steps == {3}
        assert all(np.array_equal(before[name], after[name]) for name in before)
        assert all(np.isfinite(value).all() for value in later.values())


def refused_layout(rank: int, world: int) -> str:
    """A layout that is refused on one rank alone."""
    module = model()
    optimizer = AdaFisher(module.parameters(), **SETTINGS)
    if rank == FAULTY:
        module.inner.weight.allreduce = False  # marks an expert of DeepSpeed's mixture of experts
    x, y = batch(0, 0, 1)
    nn.functional.mse_loss(module(x), y).backward()
    with pytest.raises(RuntimeError) as caught:
        optimizer.step()
    return str(caught.value)


def test_a_layout_refused_on_one_rank() -> None:
    messages = run_ranks(refused_layout, 3, timeout=60)
    assert all(
        ("marked as an expert's" if rank == FAULTY else "rank 1 failed") in text for rank, text in enumerate(messages)
    )


def on_the_wire(rank: int, world: int) -> str:
    """Buffers for a backend that cannot send from the device are made with the state, guarded."""
    module = model()
    optimizer = AdaFisher(module.parameters(), **SETTINGS)
    real = collectives.Group.comm_buffer

    def comm_buffer(group: collectives.Group, tensor: torch.Tensor) -> collectives.CommBuffer:
        if tensor.dtype.is_floating_point:
            if rank == FAULTY:
                fail()
            return collectives.CommBuffer(tensor, tensor.clone())  # as on a device of its own
        return real(group, tensor)

    collectives.Group.comm_buffer = comm_buffer
    x, y = batch(0, 0, 1)
    nn.functional.mse_loss(module(x), y).backward()
    return message_of(rank, optimizer.step)


def test_no_room_on_the_wire() -> None:
    messages = run_ranks(on_the_wire, 3, timeout=60)
    for rank, text in enumerate(messages):
        assert ("says the test" if rank == FAULTY else "rank 1 failed") in text


def through_copies(rank: int, world: int, stage: int):
    """All data goes through copies, as with CPU offload and a backend for accelerators only."""
    collectives.Group.comm_buffer = lambda group, tensor: collectives.CommBuffer(tensor, tensor.clone())
    engine = engine_of(config(stage, world))
    train(engine, 0, 4, rank, world)
    return masters(engine)


@pytest.mark.deepspeed
@pytest.mark.parametrize("stage", [0, 1, 3])
def test_data_that_travels_through_copies(stage: int) -> None:
    alone = run_alone(steps=4)
    for result in run_ranks(through_copies, 3, stage, timeout=60, deepspeed=True):
        assert distance({name: result[name] for name in result}, {name: alone[name] for name in result}) < 1e-4


def host_verdicts(rank: int, world: int, stage: int, accelerator_only: bool):
    """As under NCCL, which cannot send from the CPU: hosts agree over a gloo group of their own."""
    used = []
    if accelerator_only:
        collectives.dist.get_backend_config = lambda handle: "cuda:nccl"
        real = collectives.host_group

        def host_group(*arguments: Any) -> Any:
            used.append(real(*arguments))
            return used[-1]

        collectives.host_group = host_group
    engine = engine_of(config(stage, world))
    train(engine, 0, 4, rank, world)
    assert bool(used) == accelerator_only and len({id(group) for group in used}) == bool(used)
    return masters(engine)


@pytest.mark.deepspeed
@pytest.mark.parametrize("stage", [0, 1, 3])
def test_found_infs_where_the_backend_knows_accelerators_alone(stage: int) -> None:
    there, here = (run_ranks(host_verdicts, 3, stage, alone, timeout=60, deepspeed=True) for alone in (True, False))
    for a, b in zip(there, here, strict=True):
        assert all(np.array_equal(a[name], b[name]) for name in b)


def no_room(rank: int, world: int) -> str:
    module = model()
    optimizer = AdaFisher(module.parameters(), lr=1e-2)
    x, y = batch(0, 0, 1)
    nn.functional.mse_loss(module(x), y).backward()
    optimizer.step()
    if rank == FAULTY:
        state_dicts.room = fail
    with pytest.raises(RuntimeError) as caught:
        optimizer.consolidate_state_dict(to=FAULTY)
    optimizer.step()  # nothing is broken
    return str(caught.value)


def test_no_room_for_the_whole_state() -> None:
    messages = run_ranks(no_room, 3, timeout=60)
    words = ["says the test" if rank == FAULTY else "rank 1 failed to gather the whole state" for rank in range(3)]
    assert all(word in text for word, text in zip(words, messages, strict=True))


WRONG = [("block_size", 0), ("block_size", "64"), ("rows_per_block", -1), ("inverse_update_freq", "5"), ("lr", -1.0)]


def wrong_setting(rank: int, world: int, later: bool) -> list[str]:
    """What each rank says where one of them has a wrong setting in its param group."""
    told = []
    for name, value in WRONG:
        module = model()
        optimizer = AdaFisher(module.parameters(), **SETTINGS)
        for number in range(2 if later else 1):
            if rank == FAULTY and number == int(later):
                optimizer.param_groups[0][name] = value
            x, y = batch(number, 0, 1)
            optimizer.zero_grad()
            nn.functional.mse_loss(module(x), y).backward()
            if number < int(later):
                optimizer.step()
        with pytest.raises((ValueError, TypeError, RuntimeError)) as caught:
            optimizer.step()
        told.append(str(caught.value))
    return told


@pytest.mark.parametrize("later", [False, True])
def test_a_wrong_setting_of_one_rank_reaches_all(later: bool) -> None:
    other, faulty = run_ranks(wrong_setting, 2, later)
    for (name, value), theirs, own in zip(WRONG, other, faulty, strict=True):
        assert own.startswith(f"{name} should be "), own
        assert str(value) in own
        assert f"rank {FAULTY} failed" in theirs
