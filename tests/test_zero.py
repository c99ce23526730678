"""Every ZeRO stage and precision, in real engines: equal to the oracle and to one process.

The oracle is fed the gradients that DeepSpeed's public `safe_get_full_grad` tells, so that a low
precision's rounding of the gradient is in both, and every step is compared with
`safe_get_full_fp32_param`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from beside_oracle import assert_blocks_agree
from engines import (
    PARAMS,
    backward,
    config,
    engine_of,
    fp16_on_the_cpu,
    full_weights,
    gradients,
    masters,
    run_alone,
    train,
)
from models import SECOND_GROUP, Odd, Stacked, Tied, distance, model, param_groups, weights
from oracle import Oracle
from ranks import run_ranks
from torch import nn

pytestmark = [pytest.mark.deepspeed, pytest.mark.dist]

Arrays = dict[str, np.ndarray]


# ---- every step beside the oracle ----


def record(
    rank: int, world: int, ds_config: dict[str, Any], steps: int, groups: bool, kind: type[Odd], spikes: tuple[int, ...]
):
    """For each step: gradients, weights before and after, whether it was skipped for an overflow.

    In the steps `spikes` the loss of the last rank alone is so large that fp16 gradients overflow.
    """
    with fp16_on_the_cpu():
        engine = engine_of(ds_config, groups=groups, kind=kind)
        rows = []
        accumulate = engine.gradient_accumulation_steps()
        for step in range(steps):
            for micro in range(accumulate):
                factor = 1e9 if step in spikes and rank == world - 1 else 1.0
                backward(engine, step * accumulate + micro, rank, world, factor)
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
    ds_config: dict[str, Any],
    world: int,
    steps: int = 5,
    groups: bool = True,
    kind: type[Odd] = Odd,
    spikes: tuple[int, ...] = (),
    recorder: Callable[..., Any] = record,
) -> list[Any]:
    """Train on `world` ranks; compare every step of every parameter with the oracle, by block."""
    results = run_ranks(recorder, world, ds_config, steps, groups, kind, spikes, deepspeed=True)
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
        settings |= {name: SECOND_GROUP for name in second}
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
            assert_blocks_agree(after[name] - before[name], changes[name], scale, floor, where, oracle.settings[index])
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


# ---- the trajectory of one process, in fp32 ----


def run_engine(
    rank: int, world: int, ds_config: dict[str, Any], steps: int = 8, groups: bool = False, kind: type[Odd] = Odd
):
    engine = engine_of(ds_config, groups=groups, kind=kind)
    train(engine, 0, steps, rank, world)
    optimizer = engine.basic_optimizer
    return full_weights(engine), optimizer.fisher_stats(), optimizer.memory_usage()


def same_as_alone(ds_config: dict[str, Any], world: int, *, bound: float = 1e-4, **training: Any) -> list[Any]:
    """Compare the weights of `world` ranks and of one; returns (weights, stats, memory) by rank."""
    alone = run_alone(
        ds_config["optimizer"]["params"],
        clip=ds_config["gradient_clipping"],
        accumulate=ds_config["gradient_accumulation_steps"],
        **training,
    )
    order = ("steps", "groups", "kind")
    info = [{"steps": 8, "groups": False, "kind": Odd, **training}[key] for key in order]
    results = run_ranks(run_engine, world, ds_config, *info, deepspeed=True)
    for result, *_ in results:
        assert distance(result, alone) < bound
        assert all(np.array_equal(result[name], results[0][0][name]) for name in result), "ranks differ"
    return results


@pytest.mark.parametrize("groups", [False, True])
@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_stages_train_like_one_process(stage: int, world: int, groups: bool) -> None:
    results = same_as_alone(config(stage, world), world, groups=groups)
    for _, stats, _ in results:
        assert {entry.fisher_updates for entry in stats.values()} == {8}
    memory = [usage for *_, usage in results]
    assert sum(usage["rank"]["fisher"] for usage in memory) == memory[0]["all"]["fisher"]


ZERO_OPTIONS = {
    "round-robin": {"round_robin_gradients": True},
    "round-robin-aligned": {"round_robin_gradients": True, "parameter_alignment": True},
    "aligned": {"parameter_alignment": True},
    "overlap": {"overlap_comm": True},
    "not-contiguous": {"contiguous_gradients": False},
    "small-buckets": {"reduce_bucket_size": 100},
    "offload": {"offload_optimizer": {"device": "cpu"}},
    "offload-round-robin": {"offload_optimizer": {"device": "cpu"}, "round_robin_gradients": True},
}
ZERO3_OPTIONS = {
    "sub-groups-of-1": {"sub_group_size": 1},
    "sub-groups-of-100": {"sub_group_size": 100},
    "overlap": {"overlap_comm": True},
    "no-persistence": {"stage3_param_persistence_threshold": 0},
    "not-contiguous": {"contiguous_gradients": False},
    "offload": {"offload_optimizer": {"device": "cpu"}, "sub_group_size": 100},
    "offload-both": {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}},
    "no-reduce-scatter": {"reduce_scatter": False},
}


@pytest.mark.parametrize("world", [2, pytest.param(3, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("stage", "option"),
    [
        *((stage, option) for stage in (1, 2) for option in ZERO_OPTIONS),
        *((3, option) for option in ZERO3_OPTIONS),
    ],
)
def test_options(stage: int, option: str, world: int) -> None:
    zero = (ZERO3_OPTIONS if stage == 3 else ZERO_OPTIONS)[option]
    same_as_alone(config(stage, world, zero=zero), world, groups=True)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_clipping_and_accumulation(stage: int) -> None:
    same_as_alone(config(stage, 2, clip=0.05, accumulate=3), 2, steps=5)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize(("freq", "grid"), [(1, "rows"), (3, "flat")])
def test_old_factors_and_a_diagonal_tail(stage: int, freq: int, grid: str) -> None:
    params = {**PARAMS, "inverse_update_freq": 4, "fisher_update_freq": freq, "max_blocks": 9, "block_grid": grid}
    zero = {"sub_group_size": 150} if stage == 3 else {}
    # For three steps an element with a diagonal Fisher is divided by its first gradient. One of
    # these almost cancels out, so that its rounding shows: 2.6e-4.
    bound = 2e-4 if freq == 1 else 1e-3
    same_as_alone(config(stage, 3, params, zero=zero), 3, steps=10, groups=True, bound=bound)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_tied_and_unused_weights(stage: int) -> None:
    # An unused parameter has no gradient at stage 0, and one of zeros at the others, where weight
    # decay moves it.
    params = {**PARAMS, "weight_decay": 0.0}
    same_as_alone(config(stage, 2, params), 2, kind=Tied)
    if stage:
        follow(config(stage, 2, precision="bf16"), 2, kind=Tied)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_stack_of_matrices(stage: int) -> None:
    """Partitions begin inside either matrix, and inside the left-over row blocks at its end."""
    follow(config(stage, 3, {**PARAMS, "max_blocks": 16}), 3, kind=Stacked)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_schedule(stage: int) -> None:
    schedule = {"type": "WarmupDecayLR", "params": {"total_num_steps": 8, "warmup_max_lr": 0.02, "warmup_num_steps": 4}}
    world = 2
    with_schedule = run_ranks(run_engine, world, config(stage, world, scheduler=schedule), deepspeed=True)
    alone = run_ranks(run_engine, 1, config(0, 1, scheduler=schedule), deepspeed=True)
    constant = run_alone()
    assert distance(with_schedule[0][0], alone[0][0]) < 1e-4
    assert distance(with_schedule[0][0], constant) > 1e-3


# ---- zero.Init ----


def with_zero_init(rank: int, world: int, ds_config: dict[str, Any]):
    import deepspeed

    initial = weights(model())
    with deepspeed.zero.Init(config_dict_or_path=ds_config):
        module = Odd()
    named = dict(module.named_parameters())
    with deepspeed.zero.GatheredParameters(list(named.values()), modifier_rank=0):
        if rank == 0:
            for name, p in named.items():
                p.data.copy_(torch.from_numpy(initial[name]))
    engine = engine_of(ds_config, module)
    train(engine, 0, 6, rank, world)
    return full_weights(engine)


@pytest.mark.parametrize("world", [2, 3])
def test_zero_init(world: int) -> None:
    alone = run_alone(steps=6)
    for result in run_ranks(with_zero_init, world, config(3, world), deepspeed=True):
        assert distance(result, alone) < 1e-4


# ---- what is skipped leaves no trace ----


@pytest.mark.parametrize("layout", ["zero0-fp16", "zero1-fp16", "zero2-fp16-offload", "zero3-fp16"])
def test_fp16_overflows_leave_no_trace(layout: str) -> None:
    results = follow(layout_config(layout, 2), 2, steps=8, spikes=(0, 3, 4))
    assert [overflow for *_, overflow in results[0][0]] == [step in (0, 3, 4) for step in range(8)]


def at_start_up(rank: int, world: int, layout: str):
    with fp16_on_the_cpu():
        engine = engine_of(layout_config(layout, world), groups=True)
        optimizer = engine.basic_optimizer
        return optimizer.num_parameters(), len(optimizer.state), optimizer.memory_usage()["all"]["total"]


@pytest.mark.parametrize(
    "layout", ["zero0-bf16", "zero0-fp16", "zero1-fp32", "zero2-bf16", "bf16-optimizer", "zero3-fp32"]
)
def test_starting_the_engine_is_no_step(layout: str) -> None:
    assert run_ranks(at_start_up, 2, layout, deepspeed=True) == [(0, 0, 0)] * 2


@pytest.mark.parametrize("offload", [False, True])
def test_stage_3_leaves_nothing_in_the_param_groups(offload: bool) -> None:
    results = run_ranks(record, 2, config(3, 2, offload=offload), 2, True, Odd, (), deepspeed=True)
    assert all(left == [0, 0] for *_, left in results)


def largest_tensor(rank: int, world: int) -> tuple[int, int]:
    """Elements of the largest tensor of AdaFisher's step, blocks aside, and of the parameter."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Watch(TorchDispatchMode):
        largest = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            for value in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(value, torch.Tensor) and value.dim() <= 2:  # blocks are 3-d
                    self.largest = max(self.largest, value.numel())
            return out

    module = nn.Linear(64, 256, bias=False)
    numel = module.weight.numel()
    ds_config = config(3, world, {**PARAMS, "block_size": 4}, zero={"stage3_param_persistence_threshold": 0})
    engine = engine_of(ds_config, module)
    engine.backward(engine(torch.ones(2, 64)).square().mean())
    watch = Watch()
    inner = engine.basic_optimizer.step

    def watched(*args: Any, **kwargs: Any) -> Any:
        with watch:
            return inner(*args, **kwargs)

    engine.basic_optimizer.step = watched
    engine.step()
    return watch.largest, numel


def test_stage_3_gathers_no_full_parameter() -> None:
    for largest, numel in run_ranks(largest_tensor, 4, deepspeed=True):
        assert 0 < largest <= numel / 4


# ---- all of a step, or none of it ----


def poisoned(rank: int, world: int, ds_config: dict[str, Any], bad: float, name: str):
    """Weights before and after five steps; in the third, a gradient of the last rank is `bad`."""
    engine = engine_of(ds_config, groups=True)
    poison = [False]
    parameter = dict(engine.module.named_parameters())[name]
    parameter.register_hook(lambda g: torch.full_like(g, bad) if poison[0] and rank == world - 1 else g)
    rows = []
    for step in range(5):
        poison[0] = step == 2
        backward(engine, step, rank, world)
        before = masters(engine)
        engine.step()
        rows.append((before, masters(engine)))
    optimizer = engine.basic_optimizer
    updates = {key: stats.fisher_updates for key, stats in optimizer.fisher_stats().items()}
    return rows, optimizer.skipped_steps, int(engine.skipped_steps), updates


# What DeepSpeed lets through to a base optimizer.
UNCHECKED = {"precision": "bf16", "bf16": {"enabled": True, "check_grad_overflow": False}}
LARGE = 8e18  # finite, as is its square; too large to sum over a block of four, also in the mean of two ranks
HALVES: dict[str, tuple[dict[str, Any], float]] = {
    **{f"zero{stage}-bf16-nan": ({"stage": stage, **UNCHECKED}, float("nan")) for stage in (1, 2)},
    **{f"zero{stage}-bf16-inf-clipped": ({"stage": stage, "clip": 1.0, **UNCHECKED}, float("inf")) for stage in (1, 2)},
    "zero2-bf16-offload-nan": ({"stage": 2, "offload": True, **UNCHECKED}, float("nan")),
    **{
        f"zero{stage}-no-norm-{bad}": ({"stage": stage, "zero": {"compute_grad_norm": False}}, bad)
        for stage in (1, 2)
        for bad in (float("nan"), LARGE)
    },
    **{f"zero{stage}-large": ({"stage": stage}, LARGE) for stage in (1, 2)},
    "zero2-large-offload": ({"stage": 2, "offload": True}, LARGE),
    "zero3-large": ({"stage": 3, "zero": {"sub_group_size": 50}}, LARGE),
    "zero3-nan": ({"stage": 3, "zero": {"sub_group_size": 50}}, float("nan")),
    "zero3-bf16-nan": ({"stage": 3, "zero": {"sub_group_size": 50}, **UNCHECKED}, float("nan")),
}


@pytest.mark.parametrize("name", [pytest.param("inner.weight", marks=pytest.mark.slow), "out.bias"])  # of either group
@pytest.mark.parametrize("case", HALVES)
def test_a_bad_gradient_in_one_part_skips_all_of_the_step(case: str, name: str) -> None:
    """DeepSpeed steps one param group or sub-group after the other: all of them go on, or none."""
    options, bad = HALVES[case]
    results = run_ranks(poisoned, 2, config(world=2, **options), bad, name, deepspeed=True)
    for rows, ours, theirs, updates in results:
        for step, (before, after) in enumerate(rows):
            moved = {key for key in before if not np.array_equal(before[key], after[key])}
            if step == 2:
                assert not moved, f"a part of the step was taken: {sorted(moved)}"
            else:
                assert len(moved) == len(before), f"step {step} left {sorted(set(before) - moved)} alone"
        assert ours + theirs == 1, "the step counts as one that was skipped"
        assert set(updates.values()) == {4}
