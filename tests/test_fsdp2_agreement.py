"""What only some FSDP2 ranks do is refused by all of them, on any mix of meshes."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.distributed as dist
from models import batch, distance, model, weights
from ranks import run_ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from adafisher_dist import AdaFisher

pytestmark = pytest.mark.dist

PARAMS = {"lr": 1e-2, "block_size": 8, "rows_per_block": 4, "damping": 0.2}
STEPS = 4


def full(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()


def trained_alone(order: list[str]) -> dict[str, object]:
    module = model()
    named = dict(module.named_parameters())
    optimizer = AdaFisher([named[name] for name in order], **PARAMS)
    for step in range(STEPS):
        optimizer.zero_grad()
        nn.functional.mse_loss(module(batch(step, 0, 1)[0]), batch(step, 0, 1)[1]).backward()
        optimizer.step()
    return weights(module)


def loss_of(module: nn.Module, step: int, rank: int, world: int) -> torch.Tensor:
    x, y = batch(step, rank, world)
    return nn.functional.mse_loss(module(x), y)


# ---- the order of parameters ----


def in_another_order(rank: int, world: int, other: bool) -> str | list[torch.Tensor]:
    layers = nn.Sequential(*(nn.Linear(10, 10, bias=False) for _ in range(2)))
    module = fully_shard(layers, mesh=init_device_mesh("cpu", (world,)))
    named = list(module.named_parameters())
    optimizer = AdaFisher(named[::-1] if other and rank == 1 else named, **PARAMS)
    try:
        for _ in range(2):
            optimizer.zero_grad()
            module(torch.ones(3, 10)).square().mean().backward()
            optimizer.step()
    except RuntimeError as error:
        return str(error)
    return "trained"


def test_named_parameters_in_another_order_are_refused() -> None:
    """They have one shape, so that names alone tell."""
    for message in run_ranks(in_another_order, 2, True, timeout=60):
        assert "The ranks planned different blocks: their parameters' shapes, order" in message
    assert run_ranks(in_another_order, 2, False, timeout=60) == ["trained"] * 2


# ---- a parameter that HSDP leaves alone ----


def left_alone(rank: int, world: int, averaged: bool):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    module = model()
    alone = module.mix.weight
    fully_shard(module, mesh=mesh, ignored_params={alone})
    optimizer = AdaFisher(module.parameters(), **PARAMS)
    try:
        for step in range(STEPS):
            optimizer.zero_grad()
            loss_of(module, step, rank, world).backward()
            if averaged:
                dist.all_reduce(alone.grad)
                alone.grad /= world
            optimizer.step()
    except RuntimeError as error:
        return str(error)
    return {name: full(p).numpy() for name, p in module.named_parameters()}


def test_a_plain_parameter_whose_gradient_nobody_averages_is_found() -> None:
    for message in run_ranks(left_alone, 4, False, timeout=60):
        assert "The ranks hold different gradients" in message
    expected = trained_alone([name for name, _ in model().named_parameters()])
    for result in run_ranks(left_alone, 4, True, timeout=60):
        assert distance(result, expected) < 1e-4


# ---- HSDP beside another mesh ----


def two_meshes(rank: int, world: int, hsdp_first: bool, differ: bool):
    flat = init_device_mesh("cpu", (world,))
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    module = model()
    fully_shard(module.inner, mesh=flat)
    fully_shard(module, mesh=mesh)
    named = order_of(module, hsdp_first)
    optimizer = AdaFisher([p for _, p in named], **PARAMS)
    try:
        for step in range(STEPS):
            optimizer.zero_grad()
            loss_of(module, step, rank, world).backward()
            if differ and rank < 2:
                module.mix.weight.grad.to_local().mul_(-1)
            optimizer.step()
    except RuntimeError as error:
        return str(error)
    return {name: full(p).numpy() for name, p in module.named_parameters()}


def order_of(module: nn.Module, hsdp_first: bool) -> list[tuple[str, nn.Parameter]]:
    inner = [pair for pair in module.named_parameters() if pair[0].startswith("inner")]
    rest = [pair for pair in module.named_parameters() if not pair[0].startswith("inner")]
    return rest + inner if hsdp_first else inner + rest


@pytest.mark.parametrize("hsdp_first", [False, True])
def test_replicas_that_differ_are_found_whichever_mesh_comes_first(hsdp_first: bool) -> None:
    for message in run_ranks(two_meshes, 4, hsdp_first, True, timeout=60):
        assert "The replicas of an HSDP mesh hold different" in message
    expected = trained_alone([name for name, _ in order_of(model(), hsdp_first)])
    for one, other in itertools.pairwise(run_ranks(two_meshes, 4, hsdp_first, False, timeout=60)):
        assert distance(one, expected) < 1e-4 and distance(other, expected) < 1e-4
