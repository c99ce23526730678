"""Tensor parallelism with FSDP2: each rank steps the blocks of its part of a parameter."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from models import same
from ranks import run_ranks
from tensor_parallel_runs import SETTINGS, alone, alone_in_parts, loss_of, parallel

from adafisher_dist import AdaFisher, OptimizerState
from adafisher_dist.blocks.grid import grid_of
from adafisher_dist.settings import DEFAULTS, normalized, state_config
from adafisher_dist.stepping import found_inf

pytestmark = pytest.mark.dist


def trained(
    rank: int, world: int, tensor: int, hidden: int, settings: dict[str, Any], replicas: int = 1
) -> dict[str, np.ndarray]:
    from torch.distributed.device_mesh import init_device_mesh

    data = world // tensor
    sizes, names = (data // replicas, tensor), ("dp", "tp")
    if replicas > 1:
        sizes, names = (replicas, *sizes), ("replicas", *names)
    mesh = init_device_mesh("cpu", sizes, mesh_dim_names=names)
    module = parallel(mesh, hidden)
    optimizer = AdaFisher(module.parameters(), **settings)
    own = rank // tensor
    for step in range(8):
        optimizer.zero_grad()
        loss_of(module, step, slice(own * 8 // data, (own + 1) * 8 // data)).backward()
        optimizer.step()
    return {name: p.full_tensor().detach().double().numpy() for name, p in module.named_parameters()}


@pytest.mark.parametrize(("world", "tensor"), [(2, 2), (4, 2), pytest.param(4, 4, marks=pytest.mark.slow)])
def test_trains_like_one_process(world: int, tensor: int) -> None:
    same(run_ranks(trained, world, tensor, 32, SETTINGS), alone(32, SETTINGS))


@pytest.mark.parametrize("replicas", [1, 2])
def test_with_replicas(replicas: int) -> None:
    same(run_ranks(trained, 4, 2, 32, SETTINGS, replicas), alone(32, SETTINGS))


@pytest.mark.parametrize(
    "more", [{"exponent": 1.0, "inverse_update_freq": 2}, {"packed": True}, {"block_grid": "flat"}]
)
def test_other_settings(more: dict[str, Any]) -> None:
    same(run_ranks(trained, 2, 2, 32, {**SETTINGS, **more}), alone(32, {**SETTINGS, **more}))


@pytest.mark.parametrize(("world", "hidden"), [(2, 20), (4, 20)])
def test_where_edges_are_not_on_the_grid_blocks_end_at_them(world: int, hidden: int) -> None:
    same(run_ranks(trained, world, 2, hidden, SETTINGS), alone_in_parts(hidden, 2))


def test_a_part_of_a_table_has_no_blocks_either() -> None:
    config = state_config(normalized(DEFAULTS))
    whole, part = (32000, 4096), (4000, 4096)
    assert grid_of(part, config).dense_row_groups > 0
    assert grid_of(part, config, whole).dense_row_groups == grid_of(whole, config).dense_row_groups == 0
    wide = grid_of((2752, 4096), config, (11008, 4096))
    assert wide == grid_of((2752, 4096), config)
    assert wide.dense_row_groups * 4 == grid_of((11008, 4096), config).dense_row_groups


def faulty(rank: int, world: int, fault: str, on_device: bool) -> tuple[str, int, bool]:
    """What becomes of a step in which one of four ranks errs."""
    from torch.distributed.device_mesh import init_device_mesh

    if on_device:
        found_inf.is_meant_for = lambda device: True
    module = parallel(init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp")), 32)
    optimizer = AdaFisher(module.parameters(), **SETTINGS)
    told, before = "", {}
    for step in range(7):
        optimizer.zero_grad()
        loss_of(module, step).backward()
        if step == 5 and rank == 1:
            gradient = module.up.weight.grad.to_local()
            if fault == "nan":
                gradient.fill_(torch.nan)
            else:
                optimizer.set_lr(0.5)
        if step == 5:
            before = {name: p.to_local().detach().clone() for name, p in module.named_parameters()}
        if step == 6 and fault == "nan":
            break
        try:
            optimizer.step()
        except RuntimeError as error:
            told = str(error)
            break
    skipped = optimizer.skipped_steps if fault == "nan" else 0
    unchanged = all(torch.equal(p.to_local(), before[name]) for name, p in module.named_parameters())
    return told, skipped, unchanged


@pytest.mark.parametrize("on_device", [False, True])
def test_a_bad_gradient_skips_the_step_on_all_ranks(on_device: bool) -> None:
    assert run_ranks(faulty, 4, "nan", on_device) == [("", 1, True)] * 4


@pytest.mark.parametrize("on_device", [False, True])
def test_ranks_that_differ_stop_together(on_device: bool) -> None:
    found = run_ranks(faulty, 4, "rate", on_device)
    assert all(told and unchanged for told, _, unchanged in found)
    assert sum("different settings" in told for told, _, _ in found) >= 2


def not_carried(rank: int, world: int) -> str:
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
    from torch.distributed.device_mesh import init_device_mesh

    module = parallel(init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "tp")), 32)
    optimizer = AdaFisher(module.parameters(), **SETTINGS)
    loss_of(module, 0).backward()
    optimizer.step()
    with pytest.raises(Exception, match="save_checkpoint") as error:
        get_optimizer_state_dict(module, optimizer)
    with pytest.raises(RuntimeError, match="under tensor parallelism"):
        OptimizerState(module, optimizer)
    return str(error.value)


def test_torchs_own_checkpoints_do_not_carry_it_and_say_so() -> None:
    assert all("tensor parallelism" in told for told in run_ranks(not_carried, 2))


def by_state_dict(rank: int, world: int) -> dict[str, np.ndarray]:
    """Half of the training goes on from a rank's own state dict."""
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    saved: dict[str, Any] = {}
    for first, last in ((0, 4), (4, 8)):
        module = parallel(mesh, 32)
        optimizer = AdaFisher(module.parameters(), **SETTINGS)
        if saved:
            module.load_state_dict(saved["model"])
            optimizer.load_state_dict(saved["optimizer"])
        for step in range(first, last):
            optimizer.zero_grad()
            loss_of(module, step, slice(rank // 2 * 4, rank // 2 * 4 + 4)).backward()
            optimizer.step()
        saved = {"model": copy.deepcopy(module.state_dict()), "optimizer": copy.deepcopy(optimizer.state_dict())}
    return {name: p.full_tensor().detach().double().numpy() for name, p in module.named_parameters()}


def test_goes_on_from_each_ranks_state_dict() -> None:
    same(run_ranks(by_state_dict, 4), alone(32, SETTINGS))


def of_another_part(rank: int, world: int) -> str:
    """Each rank loads what the other has saved."""
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "tp"))
    module = parallel(mesh, 32)
    optimizer = AdaFisher(module.parameters(), **SETTINGS)
    loss_of(module, 0).backward()
    optimizer.step()
    both: list[Any] = [None, None]
    dist.all_gather_object(both, optimizer.state_dict())
    with pytest.raises(ValueError, match="part of a sharded state") as told:
        optimizer.load_state_dict(both[1 - rank])
    return str(told.value)


def test_a_state_dict_of_another_part_is_refused() -> None:
    for rank, told in enumerate(run_ranks(of_another_part, 2)):
        assert f"(part {2 - rank} of 2)" in told


def thaws(rank: int, world: int, on_device: bool) -> str:
    """One part of a weight has its first gradient later than the other."""
    from torch.distributed.device_mesh import init_device_mesh

    if on_device:
        found_inf.is_meant_for = lambda device: True
    module = parallel(init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp")), 32)
    optimizer = AdaFisher(module.parameters(), **SETTINGS)
    for step in range(7):
        optimizer.zero_grad()
        loss_of(module, step).backward()
        if rank % 2 and step < 4:
            module.up.weight.grad = None
        try:
            optimizer.step()
        except RuntimeError as error:
            return str(error)
    return ""


def test_parts_that_change_at_different_times_stop_together_where_devices_decide() -> None:
    """Hosts would have to ask each other, and not all would know that they have to."""
    assert run_ranks(thaws, 4, False, timeout=60) == [""] * 4
    told = run_ranks(thaws, 4, True, timeout=60)
    assert all("Give parameters their first gradient in the same step" in message for message in told)


def replicas_differ(rank: int, world: int) -> str:
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (2, 1, 2), mesh_dim_names=("replicas", "dp", "tp"))
    module = parallel(mesh, 32)
    optimizer = AdaFisher(module.parameters(), **SETTINGS)
    loss_of(module, 0).backward()
    if rank == 3:
        module.up.weight.grad.to_local().mul_(2)
    with pytest.raises(RuntimeError) as told:
        optimizer.step()
    return str(told.value)


def test_replicas_of_a_part_that_differ_are_found() -> None:
    told = run_ranks(replicas_differ, 4)
    assert [("replicas of an HSDP mesh" in message) for message in told] == [False, True, False, True]
