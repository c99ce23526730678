"""Where ranks hold parameters of their own, `estimate` is asked for what one rank holds of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import test_experts
import test_pipeline
import torch
from engines import PARAMS
from ranks import run_ranks
from tensor_parallel_runs import SETTINGS, loss_of, parallel

from adafisher_dist import AdaFisher
from adafisher_dist.blocks import cost
from adafisher_dist.blocks.estimate import plan_of
from adafisher_dist.settings import DEFAULTS, normalize, state_config

pytestmark = pytest.mark.deepspeed

Shapes = Sequence[tuple[int, ...]]


def told(shapes: Shapes, layout: str, ranks: int, rank: int, settings: dict[str, Any]) -> int:
    """Bytes of one of the ranks that share parameters of these shapes."""
    group = {**DEFAULTS, **settings}
    normalize(group)
    return sum(cost.memory(plan_of([(shapes, state_config(group))], layout, ranks, torch.float32), rank).values())


def of_experts(rank: int, world: int, degree: int) -> tuple[int, int]:
    engine = test_experts.engine_of(1, degree, "fp32", world)
    parameters = list(engine.module.parameters())
    experts = [tuple(p.shape) for p in parameters if not getattr(p, "allreduce", True)]
    shared = [tuple(p.shape) for p in parameters if getattr(p, "allreduce", True)]
    test_experts.train(engine, 0, 1, rank, world)
    found = told(shared, "zero1", world, rank, PARAMS) + told(experts, "zero1", world // degree, rank // degree, PARAMS)
    return found, engine.basic_optimizer.memory_usage()["rank"]["total"]


def of_a_stage(rank: int, world: int) -> tuple[int, int]:
    engine = test_pipeline.engine_of(2, 1, "fp32", world // 2)
    replica = engine.grid.get_data_parallel_rank()
    engine.train_batch(test_pipeline.micro_batches(0, replica, world // 2))
    shapes = [tuple(p.shape) for p in engine.module.parameters()]
    found = told(shapes, "zero1", world // 2, replica, PARAMS)
    return found, engine.basic_optimizer.memory_usage()["rank"]["total"]


def of_a_part(rank: int, world: int) -> tuple[int, int]:
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("dp", "tp"))
    module = parallel(mesh, 32)
    optimizer = AdaFisher(module.parameters(), **SETTINGS)
    loss_of(module, 0).backward()
    optimizer.step()
    halved = {"embedding.weight": 0, "up.weight": 0, "up.bias": 0, "down.weight": 1, "head.weight": 0}
    cut = [
        tuple(length // 2 if halved[name] == dim else length for dim, length in enumerate(p.shape))
        for name, p in module.named_parameters()
        if name in halved
    ]
    whole = [tuple(p.shape) for name, p in module.named_parameters() if name not in halved]
    found = sum(told(shapes, "fsdp2", world // 2, mesh.get_local_rank("dp"), SETTINGS) for shapes in (cut, whole))
    return found, optimizer.memory_usage()["rank"]["total"]


@pytest.mark.parametrize(("world", "degree"), [(2, 2), (4, 2)])
def test_experts_are_asked_for_by_themselves(world: int, degree: int) -> None:
    for estimated, held in run_ranks(of_experts, world, degree, deepspeed=True):
        assert estimated == held


def test_a_stage_of_a_pipeline_is_a_model() -> None:
    for estimated, held in run_ranks(of_a_stage, 4, deepspeed=True):
        assert estimated == held


def test_a_part_of_tensor_parallelism_is_a_model() -> None:
    for estimated, held in run_ranks(of_a_part, 4):
        assert estimated == held
