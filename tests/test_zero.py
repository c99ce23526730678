"""Every ZeRO stage and precision: exact beside the oracle and beside one process, or refused. Real DeepSpeed engines.

The oracle is fed the gradients that DeepSpeed's public `safe_get_full_grad` tells, so that a low precision's rounding
of the gradient is in both, and every step is compared with `safe_get_full_fp32_param`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from engines import (
    PARAMS,
    backward,
    config,
    engine_of,
    fp16_on_the_cpu,
    full_weights,
    gradients,
    masters,
    train,
)
from models import OWN_SETTINGS, Odd, Tied, batch, distance, model, param_groups, weights
from oracle import Oracle
from ranks import run_ranks
from test_oracle import assert_blocks_agree
from torch import nn
from torch.nn.utils import clip_grad_norm_

from adafisher_dist.ds import from_config

pytestmark = [pytest.mark.deepspeed, pytest.mark.dist]

Arrays = dict[str, np.ndarray]


# ---- every step beside the oracle ----


def record(rank: int, world: int, ds_config: dict[str, Any], steps: int, groups: bool, kind: type[Odd]):
    """For each step: gradients, weights before, weights after, whether DeepSpeed skipped it for an overflow."""
    with fp16_on_the_cpu():
        engine = engine_of(ds_config, groups=groups, kind=kind)
        rows = []
        accumulate = engine.gradient_accumulation_steps()
        for step in range(steps):
            for micro in range(accumulate):
                backward(engine, step * accumulate + micro, rank, world)
                if micro == accumulate - 1:
                    grads, before = gradients(engine), masters(engine)
                engine.step()
            rows.append((grads, before, masters(engine), bool(getattr(engine.optimizer, "overflow", False))))
        stats = engine.basic_optimizer.fisher_stats()
        held = {name: p.detach().double().numpy() for name, p in engine.module.named_parameters() if p.numel()}
        dtype = next(engine.module.parameters()).dtype
        params_left = [len(group["params"]) for group in engine.basic_optimizer.param_groups]
        return rows, {name: entry.fisher_updates for name, entry in stats.items()}, held, str(dtype), params_left


def follow(
    ds_config: dict[str, Any], world: int, steps: int = 5, groups: bool = True, kind: type[Odd] = Odd
) -> list[Any]:
    """Train on `world` ranks, and compare every step of every parameter with the oracle, block by block."""
    results = run_ranks(record, world, ds_config, steps, groups, kind, deepspeed=True)
    rows, updates, *_ = results[0]
    for other, other_updates, *_ in results[1:]:
        assert other_updates == updates
        for (_, _, mine, _), (_, _, theirs, _) in zip(rows, other, strict=True):
            assert all(np.array_equal(mine[name], theirs[name]) for name in mine), "ranks differ"
    module = model(kind=kind)
    names = {id(p): name for name, p in module.named_parameters()}
    settings = {name: {} for name in names.values()}
    order = [name for name in names.values() if name in rows[0][0]]
    if groups:
        first, second = ([names[id(p)] for p in group["params"]] for group in param_groups(module))
        settings |= {name: OWN_SETTINGS for name in second}
        order = [name for name in (*first, *second) if name in rows[0][0]]
    hyper = ds_config["optimizer"]["params"]
    # Frozen parameters count among those that were given.
    everything = [names[id(p)] for group in param_groups(module) for p in group["params"]] if groups else [*settings]
    start = {**weights(module), **rows[0][1]}
    oracle = Oracle([(start[name], settings[name]) for name in everything], arithmetic=np.float32, **hyper)
    trained = 0
    for number, (grads, before, after, overflow) in enumerate(rows):
        if overflow:
            assert all(np.array_equal(before[name], after[name]) for name in before), "a skipped step moved something"
            continue
        trained += 1
        changes = dict(zip(everything, oracle.step([grads.get(name) for name in everything]), strict=True))
        for index, name in enumerate(everything):
            if name not in order:
                continue
            where = f"step {number}, {name}"
            floor = 4 * np.finfo(np.float32).eps * np.maximum(np.abs(before[name]), np.abs(after[name]))
            scale = 3e-4 * np.abs(changes[name]) + 1e-12
            assert_blocks_agree(
                after[name] - before[name], changes[name], scale, floor, where, oracle.settings[index]
            )
    assert trained >= 2 and set(updates.values()) == {trained}
    return results


LAYOUTS = {  # name: (stage, precision, offload)
    **{f"zero0-{precision}": (0, precision, False) for precision in ("fp32", "bf16", "fp16")},
    **{
        f"zero{stage}-{precision}{'-offload' if offload else ''}": (stage, precision, offload)
        for stage in (1, 2, 3)
        for precision in ("fp32", "bf16", "fp16")
        for offload in (False, True)
    },
    "bf16-optimizer": (1, "bf16-fp32", False),
    "zero2-bf16-fp32": (2, "bf16-fp32", False),
    "zero3-bf16-fp32": (3, "bf16-fp32", False),
}


def layout_config(layout: str, world: int, **more: Any) -> dict[str, Any]:
    stage, precision, offload = LAYOUTS[layout]
    return config(stage, world, precision=precision, offload=offload, **more)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_beside_the_oracle(layout: str) -> None:
    follow(layout_config(layout, 2, accumulate=3), 2)


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("groups", [False, True])
@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_beside_the_oracle(layout: str, world: int, groups: bool, accumulate: int) -> None:
    follow(layout_config(layout, world, accumulate=accumulate), world, groups=groups)
