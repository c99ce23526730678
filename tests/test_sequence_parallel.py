"""Sequence parallelism: each rank has a part of every sequence, and the parameters are the same."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from engines import PARAMS, PRECISIONS, fp16_on_the_cpu, masters
from models import same, weights
from ranks import run_ranks
from torch import Tensor, nn

from adafisher_dist import AdaFisher, UnsupportedLayoutError

pytestmark = pytest.mark.deepspeed

SEQUENCES, LENGTH, WIDTH, HEADS = 4, 8, 16, 4


class Attends(nn.Module):
    """A layer of attention over sequences of which every rank has a part."""

    def __init__(self, attention: Any) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)  # softmax does not see the keys' bias: noise
        self.out = nn.Linear(WIDTH, WIDTH)
        self.attention = attention

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (HEADS, -1)) for part in self.qkv(x).chunk(3, dim=-1))
        return self.out(self.attention(q, k, v).flatten(2))


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Of (batch, sequence, head, element)."""
    q, k, v = (each.transpose(1, 2) for each in (q, k, v))
    return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def loss_of(model: Any, step: int, rows: slice = slice(None), columns: slice = slice(None)) -> Tensor:
    generator = torch.Generator().manual_seed(100 + step)
    x, y = torch.randn(2, SEQUENCES, LENGTH, WIDTH, generator=generator)[:, rows, columns]
    dtype = next(model.parameters()).dtype
    return nn.functional.mse_loss(model(x.to(dtype)).float(), y)


def alone(steps: int) -> dict[str, np.ndarray]:
    """Weights after the same training in one process, on whole sequences."""
    model = Attends(attention)
    optimizer = AdaFisher(model.parameters(), **PARAMS)
    for step in range(steps):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()
    return weights(model)


def engine_of(stage: int, degree: int, precision: str, data: int) -> Any:
    import deepspeed
    from deepspeed.runtime.sequence_parallel import parallel_state_sp
    from deepspeed.sequence.layer import DistributedAttention

    attend, more = attention, {}
    if degree > 1:
        if parallel_state_sp._SEQUENCE_PARALLEL_GROUP is None:
            parallel_state_sp.initialize_sequence_parallel(degree)
        ulysses = DistributedAttention(attention, parallel_state_sp.get_sequence_parallel_group(), 2, 1)
        attend, more = partial(ulysses, batch_dim_idx=0), {"mpu": parallel_state_sp}
    config = {
        "train_micro_batch_size_per_gpu": SEQUENCES // data,
        "optimizer": {"type": "AdaFisher", "params": copy.deepcopy(PARAMS)},
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage},
        **PRECISIONS[precision],
    }
    engine, *_ = deepspeed.initialize(model=Attends(attend), config=config, dist_init_required=False, **more)
    return engine


def train(engine: Any, first: int, last: int, rank: int, degree: int, data: int) -> None:
    replica, place = divmod(rank, degree)
    rows = slice(replica * SEQUENCES // data, (replica + 1) * SEQUENCES // data)
    columns = slice(place * LENGTH // degree, (place + 1) * LENGTH // degree)
    for step in range(first, last):
        engine.backward(loss_of(engine, step, rows, columns))
        engine.step()


def in_parts(
    rank: int, world: int, stage: int, degree: int, precision: str, folder: Path | None = None
) -> dict[str, np.ndarray]:
    """The same training by an engine; with a folder, saved half-way and loaded into another."""
    data = world // degree
    with fp16_on_the_cpu():
        engine = engine_of(stage, degree, precision, data)
        train(engine, 0, 4, rank, degree, data)
        if folder is not None:
            engine.save_checkpoint(str(folder))
            engine = engine_of(stage, degree, precision, data)
            engine.load_checkpoint(str(folder))
        train(engine, 4, 8, rank, degree, data)
        return masters(engine)


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_trains_like_one_process(stage: int, world: int) -> None:
    same(run_ranks(in_parts, world, stage, 2, "fp32", deepspeed=True), alone(8))


# Not bf16-fp32 at stage 1: DeepSpeed's BF16_Optimizer fails there by itself.
@pytest.mark.parametrize(
    ("stage", "precision"),
    [(0, "bf16"), *((stage, p) for stage in (1, 2, 3) for p in PRECISIONS if (stage, p) != (1, "bf16-fp32"))],
)
def test_in_half_precision_as_with_data_parallelism_alone(stage: int, precision: str) -> None:
    parts = run_ranks(in_parts, 2, stage, 2, precision, deepspeed=True)
    same(parts, run_ranks(in_parts, 2, stage, 1, precision, deepspeed=True)[0], bound=2e-2)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_goes_on_from_a_checkpoint(stage: int, tmp_path: Path) -> None:
    same(run_ranks(in_parts, 2, stage, 2, "fp32", tmp_path, deepspeed=True), alone(8))


class Gathers(nn.Module):
    """Attention over keys and values from all ranks of a context-parallel group."""

    def __init__(self, group: Any) -> None:
        super().__init__()
        self.group = group

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        from torch.distributed._functional_collectives import all_gather_tensor_autograd

        k, v = (all_gather_tensor_autograd(each.contiguous(), 1, self.group) for each in (k, v))
        before = dist.get_rank(self.group) * q.shape[1]
        seen = torch.arange(k.shape[1]) <= before + torch.arange(q.shape[1])[:, None]
        q, k, v = (each.transpose(1, 2) for each in (q, k, v))
        return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen).transpose(1, 2)


def fsdp2_in_parts(rank: int, world: int, degree: int) -> dict[str, np.ndarray]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    data = world // degree
    mesh = init_device_mesh("cpu", (data, degree), mesh_dim_names=("dp", "cp"))
    model = Attends(Gathers(mesh["cp"].get_group()))
    fully_shard(model, mesh=mesh["dp", "cp"]._flatten("dp_cp"))
    optimizer = AdaFisher(model.parameters(), **PARAMS)
    replica, place = divmod(rank, degree)
    rows = slice(replica * SEQUENCES // data, (replica + 1) * SEQUENCES // data)
    columns = slice(place * LENGTH // degree, (place + 1) * LENGTH // degree)
    for step in range(8):
        optimizer.zero_grad()
        loss_of(model, step, rows, columns).backward()
        optimizer.step()
    return {name: p.full_tensor().detach().double().numpy() for name, p in model.named_parameters()}


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_fsdp2_over_a_context_parallel_mesh(world: int) -> None:
    same(run_ranks(fsdp2_in_parts, world, 2), alone(8))


def with_a_mesh(rank: int, world: int, stage: int, precision: str = "fp32") -> Any:
    """Weights, or why there are none."""
    import deepspeed
    from deepspeed.sequence.layer import DistributedAttention
    from deepspeed.utils import groups

    config = {
        "train_micro_batch_size_per_gpu": SEQUENCES,
        "optimizer": {"type": "AdaFisher", "params": copy.deepcopy(PARAMS)},
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage},
        **PRECISIONS[precision],
    }
    model = Attends(None)
    engine, *_ = deepspeed.initialize(model=model, config=config, mesh_param=(1, world), dist_init_required=False)
    model.attention = partial(
        DistributedAttention(attention, groups._get_sequence_parallel_group(), 2, 1), batch_dim_idx=0
    )
    try:
        train(engine, 0, 8, rank, world, 1)
    except UnsupportedLayoutError as error:
        return str(error)
    return masters(engine)


def test_a_mesh_trains_like_one_process_at_stage_3() -> None:
    same(run_ranks(with_a_mesh, 2, 3, deepspeed=True), alone(8))


@pytest.mark.parametrize(("stage", "precision"), [(1, "fp32"), (2, "fp32"), (1, "bf16"), (1, "bf16-fp32")])
def test_a_mesh_over_which_deepspeed_does_not_average_is_refused(stage: int, precision: str) -> None:
    for message in run_ranks(with_a_mesh, 2, stage, precision, deepspeed=True):
        assert "Pass initialize() an mpu instead" in message
