"""DeepSpeed's bf16_master_weights_and_grads: the weights that AdaFisher steps are in bf16 alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from engines import PARAMS, backward, config, engine_of, full_weights, gradients, masters, train
from models import model, param_groups, weights
from ranks import run_ranks

from adafisher_dist import AdaFisher

pytestmark = [pytest.mark.deepspeed, pytest.mark.dist]

MASTERS = {"enabled": True, "bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}
Arrays = dict[str, np.ndarray]


def bf16(stage: int, world: int, **more: Any) -> dict[str, Any]:
    return config(stage, world, bf16=MASTERS, **more)


def stored(engine: Any) -> torch.Tensor:
    kept = ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat")
    return next(getattr(engine.optimizer, name)[0] for name in kept if hasattr(engine.optimizer, name))


def follow(rank: int, world: int, stage: int) -> list[tuple[Arrays, Arrays]]:
    """The gradients that each step used, and the weights after it."""
    engine = engine_of(bf16(stage, world), groups=True)
    assert stored(engine).dtype == torch.bfloat16
    rows = []
    for step in range(6):
        backward(engine, step, rank, world)
        used = gradients(engine)
        engine.step()
        rows.append((used, full_weights(engine)))
    assert all(np.array_equal(full, rows[-1][1][name]) for name, full in masters(engine).items())
    return rows


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_like_one_process_on_the_same_gradients(stage: int, world: int) -> None:
    """Bit for bit, but where an update lies at the border between two bf16 numbers."""
    single = model(torch.bfloat16)
    optimizer = AdaFisher(param_groups(single), **PARAMS)
    results = run_ranks(follow, world, stage, deepspeed=True)
    start = weights(single)
    for grads, after in results[0]:
        for name, p in single.named_parameters():
            p.grad = torch.from_numpy(grads[name]).to(torch.bfloat16) if name in grads else None
        optimizer.step()
        found = weights(single)
        assert np.concatenate([(after[name] == found[name]).ravel() for name in found]).mean() > 0.97
        for name in found:
            assert np.allclose(after[name], found[name], rtol=2e-2, atol=1e-3), name
    assert all((start[name] != found[name]).any() for name in found if name != "frozen")
    for rows in results[1:]:
        assert all(np.array_equal(rows[-1][1][name], results[0][-1][1][name]) for name in found)


def resume(rank: int, world: int, before: int, after: int, folder: str) -> tuple[Arrays, Arrays]:
    engine = engine_of(bf16(before, world), groups=True)
    train(engine, 0, 4, rank, world)
    engine.save_checkpoint(folder)
    train(engine, 4, 8, rank, world)
    again = engine_of(bf16(after, world), groups=True)
    again.load_checkpoint(folder)
    train(again, 4, 8, rank, world)
    return full_weights(engine), full_weights(again)


@pytest.mark.parametrize(("before", "after"), [(2, 2), (3, 3), (2, 3), (3, 1)])
def test_goes_on_from_a_checkpoint(before: int, after: int, tmp_path: Any) -> None:
    for straight, resumed in run_ranks(resume, 2, before, after, str(tmp_path), deepspeed=True):
        for name in straight:
            if before == after:
                assert np.array_equal(straight[name], resumed[name])
            assert np.allclose(straight[name], resumed[name], rtol=2e-2, atol=2e-3), name
