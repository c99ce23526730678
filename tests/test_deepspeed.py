"""DeepSpeed's engine with AdaFisher: JSON config, resuming, saving, bad params, a plain script."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from engines import (
    PARAMS,
    UNSCALED,
    backward,
    config,
    engine_of,
    fp16_on_the_cpu,
    full_weights,
    masters,
    run_alone,
    train,
)
from models import distance, model
from ranks import run_ranks

from adafisher_dist import AdaFisher, UnsupportedLayoutError

pytestmark = [pytest.mark.deepspeed, pytest.mark.dist]


def resume(rank: int, world: int, ds_config: dict[str, Any], folder: str):
    with fp16_on_the_cpu():
        engine = engine_of(ds_config, groups=True)
        train(engine, 0, 4, rank, world)
        engine.save_checkpoint(folder)
        train(engine, 4, 8, rank, world)
        straight = masters(engine)
        again = engine_of(ds_config, groups=True)
        again.load_checkpoint(folder)
        train(again, 4, 8, rank, world)
        return straight, masters(again)


@pytest.mark.parametrize(
    ("stage", "precision", "zero"),
    [
        (0, "fp32", {}),
        (0, "fp16", {}),
        (1, "fp32", {}),
        (1, "bf16-fp32", {}),
        (2, "bf16", {}),
        (3, "fp32", {"sub_group_size": 100}),
        (3, "bf16", {}),
    ],
    ids=str,
)
def test_resume_is_bit_for_bit(stage: int, precision: str, zero: dict[str, Any], tmp_path: Any) -> None:
    ds_config = config(stage, 2, {**PARAMS, "inverse_update_freq": 3}, precision=precision, zero=zero)
    for straight, resumed in run_ranks(resume, 2, ds_config, str(tmp_path), deepspeed=True):
        assert all(np.array_equal(straight[name], resumed[name]) for name in straight)


def save_by_deepspeed(rank: int, world: int, ds_config: dict[str, Any], folder: str):
    with fp16_on_the_cpu():
        engine = engine_of(ds_config, groups=True)
        train(engine, 0, 4, rank, world)
        engine.save_checkpoint(folder, client_state={"epoch": 3})
        train(engine, 4, 8, rank, world)
        return masters(engine)


def load_by_deepspeed(rank: int, world: int, ds_config: dict[str, Any], folder: str):
    with fp16_on_the_cpu():
        engine = engine_of(ds_config, groups=True)
        path, client_state = engine.load_checkpoint(folder)
        assert path is not None and client_state["epoch"] == 3 and engine.global_steps == 4
        train(engine, 4, 8, rank, world)
        return masters(engine)


@pytest.mark.parametrize(
    ("before", "after"),
    [((0, 2), (0, 3)), ((0, 2), (3, 2)), ((1, 2), (1, 4)), ((2, 3), (0, 1)), ((3, 4), (3, 2)), ((3, 2), (1, 3))],
    ids=str,
)
def test_deepspeeds_own_checkpoint_resumes_elsewhere(before: Any, after: Any, tmp_path: Any) -> None:
    """By (stage, world size): a script that knows nothing of us goes on at another one."""
    params = {**PARAMS, "inverse_update_freq": 3}
    configs = [config(stage, world, params) for stage, world in (before, after)]
    straight = run_ranks(save_by_deepspeed, before[1], configs[0], str(tmp_path), deepspeed=True)[0]
    for resumed in run_ranks(load_by_deepspeed, after[1], configs[1], str(tmp_path), deepspeed=True):
        assert distance(resumed, straight) < 1e-4


def wrong_part(rank: int, world: int, stage: int) -> None:
    engine = engine_of(config(stage, world))
    train(engine, 0, 1, rank, world)
    whole = engine.optimizer.state_dict()
    saved = whole.get("base_optimizer_state") or whole["optimizer_state_dict"]
    assert saved["adafisher_dist"]["part"] == f"ZeRO-{stage}, rank {rank} of {world}"
    with pytest.raises(ValueError, match="part of a sharded state"):
        AdaFisher(model().parameters()).load_state_dict(saved)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_zero_partition_does_not_pass_for_the_whole(stage: int) -> None:
    run_ranks(wrong_part, 2, stage, deepspeed=True)


class Watch(torch.optim.SGD):
    """Keeps the largest gradient of the last step."""

    def step(self, closure: Any = None) -> None:
        self.largest = max(float(p.grad.abs().max()) for group in self.param_groups for p in group["params"])


def scaled_at_stage_0(rank: int, world: int) -> tuple[float, float]:
    with fp16_on_the_cpu():
        scaled = {"fp16": {"enabled": True, "initial_scale_power": 8}}
        engine = engine_of(config(0, world, **scaled))
        backward(engine, 0, rank, world)
        with pytest.raises(UnsupportedLayoutError, match="without having multiplied the loss"):
            engine.step()
        largest = []
        for more in (scaled, UNSCALED):
            module = model()
            ds_config = config(0, world, **more)
            del ds_config["optimizer"]
            trainable = [p for p in module.parameters() if p.requires_grad]
            engine = engine_of(ds_config, module, optimizer=Watch(trainable, lr=0.1))
            backward(engine, 0, rank, world)
            engine.step()
            largest.append(engine.basic_optimizer.largest)
        return largest[0] * 2**8, largest[1]


def test_a_loss_scale_at_stage_0_is_refused_for_what_deepspeed_makes_of_it() -> None:
    """Pin the defect: if this fails, DeepSpeed has fixed it, and the scale need not be refused."""
    for scaled, unscaled in run_ranks(scaled_at_stage_0, 2, deepspeed=True):
        assert scaled == pytest.approx(unscaled, rel=1e-2)


def client_optimizer(rank: int, world: int, stage: int):
    module = model()
    ds_config = config(stage, world)
    del ds_config["optimizer"]
    engine = engine_of(ds_config, module, optimizer=AdaFisher(module.named_parameters(), **PARAMS))
    train(engine, 0, 4, rank, world)
    assert "inner.weight" in engine.basic_optimizer.fisher_stats()
    return full_weights(engine)


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_client_optimizer(stage: int) -> None:
    alone = run_alone(steps=4)
    for result in run_ranks(client_optimizer, 2, stage, deepspeed=True):
        assert distance(result, alone) < 1e-4


def test_misspelt_params() -> None:
    parameters = list(model().parameters())
    with pytest.raises(TypeError, match=r"no parameter 'dampening'.*Did you mean 'damping'.*inverse_update_freq"):
        torch.optim.AdaFisher(parameters, dampening=0.1)
    with pytest.raises(ValueError, match="language_models, image_classification"):
        torch.optim.AdaFisher(parameters, preset="vision")
    with pytest.raises(TypeError, match="lr should be a number, got '1e-3'"):
        torch.optim.AdaFisher(parameters, lr="1e-3")
    with pytest.raises(TypeError, match=r"lr should be a number, got 'auto' .*Accelerate replace"):
        torch.optim.AdaFisher(parameters, lr="auto")


def test_a_memory_budget_alone_stands_for_blocks_that_fit_it() -> None:
    parameters = list(model().parameters())
    (group,) = torch.optim.AdaFisher(parameters, memory_budget_gb=1.0).param_groups
    assert (group["block_size"], group["memory_budget_gb"]) == ("auto", 1.0)
    (group,) = torch.optim.AdaFisher(parameters, memory_budget_gb=None).param_groups
    assert group["block_size"] == 128
    with pytest.raises(ValueError, match='is for block_size="auto", and block_size is 32'):
        torch.optim.AdaFisher(parameters, memory_budget_gb=1.0, block_size=32)


def test_preset_and_dtype_by_name() -> None:
    optimizer = torch.optim.AdaFisher(model().parameters(), preset="language_models", lr=5e-4, fisher_dtype="bfloat16")
    assert type(optimizer) is AdaFisher
    group = optimizer.param_groups[0]
    assert (group["lr"], group["fisher_decay"], group["block_size"], group["weight_decay"]) == (5e-4, 0.97, 128, 0.1)
    assert group["fisher_dtype"] == "bfloat16"


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
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, env=environment, timeout=180)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "adafisher_dist.optimizer.adafisher 1" in done.stdout
