"""DeepSpeed steps one param group, or a part of one, after the other: all of a step, or nothing."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engines import backward, config, engine_of, masters, train
from models import model, param_groups
from ranks import run_ranks
from torch import nn

from adafisher_dist import AdaFisher, ds
from adafisher_dist.stepping import found_inf


def recovers(rank: int, world: int, stage: int, folder: str) -> tuple[str, float, list[int]]:
    """An error in the second group's part; then what was wrong is mended, and training goes on.

    Returns the error, how far the weights are from those of a run without it, and the steps.
    """
    small = {"sub_group_size": 60} if stage == 3 else {}
    undisturbed, engine = (engine_of(config(stage, world, zero=small), groups=True) for _ in range(2))
    train(undisturbed, 0, 6, rank, world)
    train(engine, 0, 3, rank, world)
    optimizer = engine.basic_optimizer
    ds.save_checkpoint(engine, folder, "before")
    group = optimizer._registry.groups[1]
    right = group["block_size"]
    group["block_size"] = 5
    with pytest.raises((RuntimeError, ValueError)) as raised:
        train(engine, 3, 4, rank, world)
    group["block_size"] = right
    engine.zero_grad()
    ds.load_checkpoint(engine, folder, "before")
    train(engine, 3, 6, rank, world)
    assert len(optimizer.param_groups) == 2
    found, want = masters(engine), masters(undisturbed)
    furthest = max(float(np.abs(found[name] - want[name]).max()) for name in want)
    updates = sorted({stats.fisher_updates for stats in optimizer.fisher_stats().values()})
    return str(raised.value), furthest, updates


@pytest.mark.dist
@pytest.mark.deepspeed
@pytest.mark.parametrize("stage", [2, 3])
def test_after_an_error_in_a_part_a_checkpoint_restores_all(stage: int, tmp_path: Path) -> None:
    for error, furthest, updates in run_ranks(recovers, 2, stage, str(tmp_path), deepspeed=True):
        assert "block_size" in error
        assert furthest == 0 and updates == [6]


def mixed(rank: int, world: int, number: int, own: dict[str, Any]) -> list[list[bool]]:
    """Which param groups move in a step with a NaN and in those after it.

    One of the groups has settings with which hosts decide; a CPU stands for the device.
    """
    import deepspeed

    found_inf.is_meant_for = lambda device: True
    module = model()
    groups = param_groups(module)
    groups[number] |= own
    names = [
        {name for name, p in module.named_parameters() if p.requires_grad and any(p is q for q in group["params"])}
        for group in groups
    ]
    settings = config(2, world, precision="bf16", bf16={"enabled": True, "check_grad_overflow": False})
    engine, *_ = deepspeed.initialize(
        model=module, config=copy.deepcopy(settings), model_parameters=groups, dist_init_required=False
    )
    train(engine, 0, 4, rank, world)
    found = []
    for step in range(4, 9):
        before = masters(engine)
        if step == 4:
            backward(engine, step, rank, world, float("nan"))
            engine.step()
        else:
            train(engine, step, step + 1, rank, world)
        after = masters(engine)
        found.append([any(bool((after[name] != before[name]).any()) for name in own) for own in names])
    assert engine.basic_optimizer.skipped_steps == 1
    return found


@pytest.mark.dist
@pytest.mark.deepspeed
@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("own", [{"exponent": 1.0}, {"inverse_update_freq": 2}], ids=str)
def test_groups_that_hosts_decide_on_beside_others(number: int, own: dict[str, Any]) -> None:
    for found in run_ranks(mixed, 2, number, own, deepspeed=True):
        assert found == [[False, False]] + [[True, True]] * 4


def apart(rank: int, world: int) -> list[list[float]]:
    """Ranks step shards of one shape that are not the same; not in a call 1, 2, 4, 8, …"""
    torch.manual_seed(0)
    first, second = (nn.Parameter(torch.randn(16, 16)) for _ in range(2))
    optimizer = AdaFisher([first, second], lr=1e-2, block_size=8, rows_per_block=4)

    def step(parameter: nn.Parameter) -> None:
        optimizer.zero_grad()
        parameter.grad = torch.ones(16, 16)
        optimizer.step()

    step(first)
    step(second)
    before = [parameter.detach().clone() for parameter in (first, second)]
    with pytest.raises(RuntimeError, match="differ in which parameters have a gradient"):
        step(second if rank else first)
    return [(new - old).abs().max().item() for new, old in zip((first, second), before, strict=True)]


@pytest.mark.dist
def test_ranks_that_step_different_shards_are_stopped() -> None:
    assert run_ranks(apart, 2) == [[0.0, 0.0]] * 2


def pressed_early(rank: int, world: int, stage: int, folder: str) -> float:
    """Ctrl-C in the second part, before anything is agreed on; then a checkpoint is loaded."""
    small = {"sub_group_size": 60} if stage == 3 else {}
    undisturbed, engine = (engine_of(config(stage, world, zero=small), groups=True) for _ in range(2))
    train(undisturbed, 0, 6, rank, world)
    train(engine, 0, 3, rank, world)
    registry = engine.basic_optimizer._registry
    ds.save_checkpoint(engine, folder, "before")
    real, calls = registry.sync_user_state, []

    def pressed(shards: Any) -> None:
        calls.append(shards)
        if len(calls) == 2:
            raise KeyboardInterrupt
        real(shards)

    registry.sync_user_state = pressed
    with pytest.raises(KeyboardInterrupt):
        train(engine, 3, 4, rank, world)
    registry.sync_user_state = real
    engine.zero_grad()
    ds.load_checkpoint(engine, folder, "before")
    train(engine, 3, 6, rank, world)
    found, want = masters(engine), masters(undisturbed)
    return max(float(np.abs(found[name] - want[name]).max()) for name in want)


@pytest.mark.dist
@pytest.mark.deepspeed
@pytest.mark.parametrize("stage", [2, 3])
def test_ctrl_c_before_a_part_leaves_the_param_groups(stage: int, tmp_path: Path) -> None:
    assert run_ranks(pressed_early, 1, stage, str(tmp_path), deepspeed=True) == [0.0]
