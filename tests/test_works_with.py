"""Checkpointed and compiled models, averages of weights, loss scales, tied weights.

Each beside the plain run: the same training without it, or one process.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import Odd, Tied, batch, distance, model, weights
from ranks import run_ranks
from test_fsdp2 import full
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

from adafisher_dist import AdaFisher

pytestmark = pytest.mark.dist

SETTINGS: dict[str, Any] = {"lr": 1e-2, "block_size": 8, "rows_per_block": 4, "damping": 0.2}
STEPS = 5

Arrays = dict[str, np.ndarray]


class Recomputed(Odd):
    """Computes its forward anew in the backward."""

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(super().forward, x, use_reentrant=False)


def wrapped(module: nn.Module, layout: str, **options: Any) -> nn.Module:
    return fully_shard(module) if layout == "FSDP2" else DDP(module, **options)


def train(module: nn.Module, rank: int, world: int, then: Callable[[], object] = lambda: None) -> None:
    """STEPS steps on this rank's part of each batch; `then` is called after each."""
    optimizer = AdaFisher(module.parameters(), **SETTINGS)
    for step in range(STEPS):
        x, y = batch(step, rank, world)
        optimizer.zero_grad()
        nn.functional.mse_loss(module(x), y).backward()
        optimizer.step()
        then()


def full_weights(module: nn.Module) -> Arrays:
    return {name.removeprefix("module."): full(p) for name, p in module.named_parameters()}


# ---- gradient checkpointing ----


def recomputed(rank: int, world: int, layout: str) -> list[Arrays]:
    """Weights with torch's gradient checkpointing, and without."""
    found = []
    for kind in (Recomputed, Odd):
        module = wrapped(model(kind=kind), layout)
        train(module, rank, world)
        found.append(full_weights(module))
    return found


@pytest.mark.parametrize("layout", ["DDP", "FSDP2"])
def test_gradient_checkpointing(layout: str) -> None:
    for one, other in run_ranks(recomputed, 2, layout):
        assert all(np.array_equal(one[name], other[name]) for name in other)
        assert distance(one, weights(model())) > 0.02, "nothing was trained"


def hugging_face(rank: int, world: int, layout: str) -> tuple[list[Arrays], int]:
    """Weights with `gradient_checkpointing_enable` and without, and how often a layer has run."""
    sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
    from tiny import batch as tokens_of
    from tiny import llama

    found, runs = [], []
    for enabled in (True, False):
        module = llama().train()
        if enabled:
            module.gradient_checkpointing_enable()
        calls: list[int] = []
        module.model.layers[0].self_attn.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        trained = wrapped(module, layout)
        optimizer = AdaFisher(trained.parameters(), **SETTINGS)
        for step in range(2):
            tokens = tokens_of(step, rank, world)[:2]
            optimizer.zero_grad()
            trained(input_ids=tokens, labels=tokens).loss.backward()
            optimizer.step()
        found.append(full_weights(trained))
        runs.append(len(calls))
    return found, runs[0] - runs[1]


@pytest.mark.parametrize("layout", ["DDP", "FSDP2"])
def test_gradient_checkpointing_of_hugging_face(layout: str) -> None:
    pytest.importorskip("transformers", reason="the extra 'hf' is not installed")
    for (one, other), more in run_ranks(hugging_face, 2, layout):
        assert more == 2, "no layer was computed anew"
        assert all(np.array_equal(one[name], other[name]) for name in other)


# ---- torch.compile ----


def compiled(rank: int, world: int, layout: str) -> tuple[list[Arrays], int]:
    """Weights with the model compiled by Inductor and without, and how many graphs it compiled."""
    from torch._dynamo.utils import counters

    found = []
    for compiles in (True, False):
        module = model()
        if compiles:
            module.compile()
        train(module if layout == "one process" else wrapped(module, layout), rank, world)
        found.append(full_weights(module))
    return found, counters["aot_autograd"]["ok"]


@pytest.mark.ci
@pytest.mark.parametrize("layout", ["one process", "DDP", "FSDP2"])
def test_a_compiled_model(layout: str) -> None:
    for (one, other), graphs in run_ranks(compiled, 1 if layout == "one process" else 2, layout):
        assert graphs > 0, "nothing was compiled"
        assert one.keys() == other.keys() and distance(one, other) < 1e-3
        assert distance(one, weights(model())) > 0.02, "nothing was trained"


# ---- averages of weights ----

DECAY = 0.8


def average(values: list[Arrays]) -> Arrays:
    """What torch's EMA makes of weights after each step: it begins with the first."""
    result = values[0]
    for later in values[1:]:
        result = {name: DECAY * mean + (1 - DECAY) * later[name] for name, mean in result.items()}
    return result


def averaged_under_fsdp2(rank: int, world: int) -> tuple[Arrays, list[Arrays]]:
    """The average's weights, and those of each step."""
    module = model()
    averaged = AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(DECAY))
    fully_shard(module)  # after the copy, since a sharded module cannot be copied; then the copy too
    fully_shard(averaged.module)
    after: list[Arrays] = []

    def then() -> None:
        averaged.update_parameters(module)
        after.append(full_weights(module))

    train(module, rank, world, then)
    return full_weights(averaged.module), after


def plain_steps() -> list[Arrays]:
    """Weights after each step of one process, and no average."""
    module, after = model(), []
    train(module, 0, 1, lambda: after.append(weights(module)))
    return after


def check_average(found: Arrays, after: list[Arrays]) -> None:
    plain = plain_steps()
    assert distance(found, average(after)) < 1e-6
    assert distance(after[-1], plain[-1]) < 1e-4 and distance(found, average(plain)) < 1e-4
    assert distance(found, plain[-1]) > 0.01, "the average is the last"


def test_an_average_of_weights_under_fsdp2() -> None:
    for found, after in run_ranks(averaged_under_fsdp2, 2):
        check_average(found, after)


def averaged_under_zero(rank: int, world: int, stage: int) -> tuple[Arrays, list[Arrays]]:
    import deepspeed
    from engines import backward, config, engine_of
    from engines import full_weights as gathered_weights

    module = model()
    averaged = AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(DECAY))
    engine = engine_of(config(stage, world, SETTINGS), module)
    after = []
    for step in range(STEPS):
        backward(engine, step, rank, world)
        engine.step()
        partitioned = list(engine.module.parameters()) if stage == 3 else []
        with deepspeed.zero.GatheredParameters(partitioned, enabled=stage == 3):
            averaged.update_parameters(engine.module)
        after.append(gathered_weights(engine))
    return weights(averaged.module), after


@pytest.mark.deepspeed
@pytest.mark.parametrize("stage", [2, 3])
def test_an_average_of_weights_under_zero(stage: int) -> None:
    pytest.importorskip("deepspeed", reason="the extra 'deepspeed' is not installed")
    for found, after in run_ranks(averaged_under_zero, 2, stage, deepspeed=True):
        check_average(found, after)


# ---- a loss scale, and tied weights, under DDP ----


def scaled(rank: int, world: int, scale: bool) -> tuple[Arrays, float, int]:
    """With a GradScaler the last rank alone overflows in step 2; without, there is no step 2."""
    module = DDP(model())
    optimizer = AdaFisher(module.parameters(), **SETTINGS)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=3, enabled=scale)
    for step in range(8):
        if step == 2 and not scale:
            continue
        x, y = batch(step, rank, world)
        optimizer.zero_grad()
        factor = float("inf") if step == 2 and rank == world - 1 else 1.0
        scaler.scale(nn.functional.mse_loss(module(x), y) * factor).backward()
        scaler.step(optimizer)
        scaler.update()
    return full_weights(module), scaler.get_scale(), optimizer.skipped_steps


@pytest.mark.parametrize("world", [2, 3])
def test_a_loss_scale_under_ddp(world: int) -> None:
    plain = run_ranks(scaled, world, False)[0][0]
    for found, scale, skipped in run_ranks(scaled, world, True):
        assert all(np.array_equal(found[name], plain[name]) for name in plain)
        assert scale == 2.0**8 and skipped == 0  # halved once, doubled once; GradScaler itself leaves the step out
    assert distance(plain, weights(model())) > 0.02, "nothing was trained"


def tied(rank: int, world: int) -> Arrays:
    module: nn.Module = model(kind=Tied)
    trained = DDP(module, find_unused_parameters=True) if world > 1 else module
    train(trained, rank, world)
    assert module.again.weight is module.inner.weight
    return weights(module)


@pytest.mark.parametrize("world", [2, 3])
def test_tied_weights_under_ddp(world: int) -> None:
    alone = tied(0, 1)
    for found in run_ranks(tied, world):
        assert distance(found, alone) < 2e-4
    assert distance(alone, weights(model(kind=Tied))) > 0.02, "nothing was trained"
