"""Real DeepSpeed engines from a JSON config: stages 0, 1, 2 train like one process; other layouts are refused."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from models import batch, distance, model, weights
from ranks import run_ranks
from torch import nn

from adafisher_dist import AdaFisher, UnsupportedLayoutError
from adafisher_dist.ds import from_config

deepspeed = pytest.importorskip("deepspeed")
pytestmark = [pytest.mark.deepspeed, pytest.mark.dist]

PARAMS = {"lr": 1e-2, "block_size": 8, "damping": 0.2}


def config(stage: int, world: int, params: dict[str, Any] = PARAMS, clip: float = 0.0, zero: Any = None, **more: Any):
    """A DeepSpeed config for a global batch of 12."""
    return {
        "train_batch_size": 12,
        "train_micro_batch_size_per_gpu": 12 // world,
        "optimizer": {"type": "AdaFisher", "params": params},
        "gradient_clipping": clip,
        "zero_optimization": {"stage": stage, **(zero or {})},
        **more,
    }


def engine_of(ds_config: dict, module: nn.Module | None = None, groups: bool = False, **kwargs: Any):
    """A DeepSpeed engine on the test model."""
    module = module if module is not None else model()
    if groups:
        kwargs["model_parameters"] = param_groups(module)
    engine, *_ = deepspeed.initialize(model=module, config=copy.deepcopy(ds_config), dist_init_required=False, **kwargs)
    return engine


def param_groups(module: nn.Module) -> list[dict[str, Any]]:
    decay = [p for p in module.parameters() if p.dim() > 1]
    rest = [p for p in module.parameters() if p.dim() <= 1]
    return [{"params": decay}, {"params": rest, "weight_decay": 0.0, "lr": 2e-2, "damping": 0.3, "momentum": 0.8}]


def run_engine(rank: int, world: int, ds_config: dict, steps: int = 8, groups: bool = False, accumulate: int = 1):
    engine = engine_of(ds_config, groups=groups)
    for step in range(steps):
        for micro in range(accumulate):
            x, y = batch(step * accumulate + micro, rank, world)
            dtype = next(engine.module.parameters()).dtype
            engine.backward(nn.functional.mse_loss(engine(x.to(dtype)), y.to(dtype)))
            engine.step()
    stats = engine.basic_optimizer.fisher_stats()
    memory = engine.basic_optimizer.memory_usage()
    return weights(engine.module), stats, memory


def run_alone(
    params: dict[str, Any] = PARAMS, steps: int = 8, groups: bool = False, clip: float = 0, accumulate: int = 1
):
    module = model()
    optimizer = from_config(param_groups(module) if groups else module.parameters(), **params)
    for step in range(steps):
        optimizer.zero_grad()
        for micro in range(accumulate):
            x, y = batch(step * accumulate + micro, 0, 1)
            (nn.functional.mse_loss(module(x), y) / accumulate).backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(module.parameters(), clip)
        optimizer.step()
    return weights(module)


@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("groups", [False, True])
def test_stages_train_like_one_process(stage: int, world: int, groups: bool) -> None:
    alone = run_alone(groups=groups)
    results = run_ranks(run_engine, world, config(stage, world), 8, groups, deepspeed=True)
    for result, stats, _ in results:
        assert distance(result, alone) < 1e-4
        assert all(np.array_equal(result[name], results[0][0][name]) for name in result)
        assert {entry.fisher_updates for entry in stats.values()} == {8}
    memory = [usage for *_, usage in results]
    assert sum(usage["rank"]["fisher"] for usage in memory) == memory[0]["all"]["fisher"]


@pytest.mark.parametrize(
    "zero",
    [
        {"round_robin_gradients": True},
        {"round_robin_gradients": True, "parameter_alignment": True},
        {"parameter_alignment": True},
        {"overlap_comm": True},
        {"contiguous_gradients": False},
        {"reduce_bucket_size": 100},
    ],
    ids=lambda zero: "+".join(zero),
)
@pytest.mark.parametrize("stage", [1, 2])
def test_zero_options(stage: int, zero: dict[str, Any]) -> None:
    alone = run_alone(groups=True)
    for result, *_ in run_ranks(run_engine, 2, config(stage, 2, zero=zero), 8, True, deepspeed=True):
        assert distance(result, alone) < 1e-4


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_clipping_and_accumulation(stage: int) -> None:
    ds_config = config(stage, 2, clip=0.05, gradient_accumulation_steps=3) | {"train_batch_size": 36}
    alone = run_alone(steps=5, clip=0.05, accumulate=3)
    for result, *_ in run_ranks(run_engine, 2, ds_config, 5, False, 3, deepspeed=True):
        assert distance(result, alone) < 1e-4


@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("freq", [1, 3])
def test_old_factors_and_a_diagonal_tail(stage: int, freq: int) -> None:
    params = {**PARAMS, "inverse_update_freq": 4, "fisher_update_freq": freq, "max_blocks": 9, "block_grid": "flat"}
    alone = run_alone(params, steps=10)
    for result, *_ in run_ranks(run_engine, 3, config(stage, 3, params), 10, deepspeed=True):
        assert distance(result, alone) < 2e-4


@pytest.mark.parametrize("stage", [1, 2])
def test_bf16_weights_under_zero(stage: int) -> None:
    alone = run_alone()
    ds_config = config(stage, 2, bf16={"enabled": True}, data_types={"grad_accum_dtype": "bf16"})
    for result, stats, _ in run_ranks(run_engine, 2, ds_config, deepspeed=True):
        assert distance(result, alone) < 0.1  # bf16 gradients: 3 digits, eight steps
        assert {entry.fisher_updates for entry in stats.values()} == {8}


def resume(rank: int, world: int, ds_config: dict, folder: str):
    def steps(engine: Any, first: int, last: int) -> None:
        for step in range(first, last):
            x, y = batch(step, rank, world)
            engine.backward(nn.functional.mse_loss(engine(x), y))
            engine.step()

    def save(engine: Any) -> None:
        if ds_config["zero_optimization"]["stage"] == 0:
            engine.basic_optimizer.consolidate_state_dict()
        engine.save_checkpoint(folder)

    engine = engine_of(ds_config, groups=True)
    steps(engine, 0, 4)
    save(engine)
    steps(engine, 4, 8)
    straight = weights(engine.module)
    again = engine_of(ds_config, groups=True)
    again.load_checkpoint(folder)
    steps(again, 4, 8)
    return straight, weights(again.module)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_resume_is_bit_for_bit(stage: int, tmp_path: Any) -> None:
    params = {**PARAMS, "inverse_update_freq": 3}
    for straight, resumed in run_ranks(resume, 2, config(stage, 2, params), str(tmp_path), deepspeed=True):
        assert all(np.array_equal(straight[name], resumed[name]) for name in straight)


def save_unconsolidated(rank: int, world: int, folder: str) -> None:
    engine = engine_of(config(0, world))
    x, y = batch(0, rank, world)
    engine.backward(nn.functional.mse_loss(engine(x), y))
    engine.step()
    with pytest.raises(RuntimeError, match="consolidate_state_dict"):
        engine.save_checkpoint(folder)


def test_stage_0_never_saves_one_ranks_part_as_the_whole(tmp_path: Any) -> None:
    run_ranks(save_unconsolidated, 2, str(tmp_path), deepspeed=True)


def wrong_part(rank: int, world: int, folder: str) -> None:
    engine = engine_of(config(1, world))
    x, y = batch(0, rank, world)
    engine.backward(nn.functional.mse_loss(engine(x), y))
    engine.step()
    saved = engine.optimizer.state_dict()["base_optimizer_state"]
    assert saved["adafisher_dist"]["part"] == f"ZeRO-1, rank {rank} of {world}"
    with pytest.raises(ValueError, match="part of a sharded state"):
        AdaFisher(model().parameters()).load_state_dict({**saved, "param_groups": saved["param_groups"]})


def test_a_zero_partition_does_not_pass_for_the_whole(tmp_path: Any) -> None:
    run_ranks(wrong_part, 2, str(tmp_path), deepspeed=True)


def refused(rank: int, world: int, ds_config: dict) -> str:
    try:
        engine = engine_of(ds_config)
        x, y = batch(0, rank, world)
        dtype = next(engine.module.parameters()).dtype
        engine.backward(nn.functional.mse_loss(engine(x.to(dtype)), y.to(dtype)))
        engine.step()
    except UnsupportedLayoutError as error:
        return str(error)
    return "not refused"


@pytest.mark.parametrize(
    ("ds_config", "words"),
    [
        (config(3, 2), "stage 3"),
        (config(0, 2, bf16={"enabled": True}), "FP16_UnfusedOptimizer"),
        (config(1, 2, bf16={"enabled": True}, data_types={"grad_accum_dtype": "fp32"}), "BF16_Optimizer"),
    ],
    ids=["stage3", "bf16-stage0", "bf16-optimizer"],
)
def test_layouts_that_are_not_supported_are_refused_by_name(ds_config: dict, words: str) -> None:
    for message in run_ranks(refused, 2, ds_config, deepspeed=True):
        assert words in message, message


def client_optimizer(rank: int, world: int, stage: int):
    module = model()
    ds_config = config(stage, world)
    del ds_config["optimizer"]
    engine = engine_of(ds_config, module, optimizer=AdaFisher(module.named_parameters(), **PARAMS))
    for step in range(4):
        x, y = batch(step, rank, world)
        engine.backward(nn.functional.mse_loss(engine(x), y))
        engine.step()
    assert "inner.weight" in engine.basic_optimizer.fisher_stats()
    return weights(engine.module)


@pytest.mark.parametrize("stage", [0, 2])
def test_client_optimizer(stage: int) -> None:
    alone = run_alone(steps=4)
    for result in run_ranks(client_optimizer, 2, stage, deepspeed=True):
        assert distance(result, alone) < 1e-4


def test_misspelt_params() -> None:
    parameters = list(model().parameters())
    with pytest.raises(TypeError, match=r"no parameter 'dampening'.*Did you mean 'damping'.*inverse_update_freq"):
        torch.optim.AdaFisher(parameters, dampening=0.1)
    with pytest.raises(TypeError, match="betas"):
        torch.optim.AdaFisher(parameters, betas=[0.9, 0.95])
    with pytest.raises(ValueError, match="language_models, image_classification"):
        torch.optim.AdaFisher(parameters, preset="vision")
    with pytest.raises(TypeError, match="lr should be a number, got '1e-3'"):
        torch.optim.AdaFisher(parameters, lr="1e-3")


def test_preset_and_dtype_by_name() -> None:
    optimizer = torch.optim.AdaFisher(model().parameters(), preset="language_models", lr=5e-4, fisher_dtype="bfloat16")
    assert type(optimizer) is AdaFisher
    group = optimizer.param_groups[0]
    assert (group["lr"], group["fisher_decay"], group["block_size"], group["weight_decay"]) == (5e-4, 0.99, 128, 0.1)
    assert group["fisher_dtype"] is torch.bfloat16


SCRIPT = """
import os, sys, torch, deepspeed
assert "adafisher_dist.optimizer" not in sys.modules, "import torch alone must not import the optimizer"
from deepspeed.ops import __compatible_ops__
__compatible_ops__["deepspeed_shm_comm"] = False
os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
model = torch.nn.Linear(4, 2)
engine, *_ = deepspeed.initialize(model=model, config={
    "train_batch_size": 3, "zero_optimization": {"stage": 2},
    "optimizer": {"type": "AdaFisher", "params": {"preset": "image_classification", "lr": 0.1}}})
engine.backward(engine(torch.ones(3, 4)).square().sum()); engine.step()
print(type(engine.basic_optimizer).__module__, engine.basic_optimizer.fisher_stats()["weight"].fisher_updates)
torch.distributed.destroy_process_group()
"""


def test_a_script_that_never_imports_us() -> None:
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "MASTER_PORT": "29617"}
    script = SCRIPT.replace('MASTER_PORT="0"', 'MASTER_PORT="29617"')
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, timeout=180)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "adafisher_dist.optimizer 1" in done.stdout
