"""Real DeepSpeed engines on the test models, and their results by DeepSpeed's public functions."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import deepspeed
import numpy as np
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad
from models import Odd, batch, model, param_groups, weights
from torch import nn

from adafisher_dist.ds import from_config

# Of four rows, so that partitions begin in the middle of blocks, and not only of whole matrices.
PARAMS = {"lr": 1e-2, "block_size": 8, "rows_per_block": 4, "damping": 0.2}
BATCH = 12

PRECISIONS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "bf16"}},
    "bf16-fp32": {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}},
    "fp16": {"fp16": {"enabled": True, "initial_scale_power": 8}},
}


# DeepSpeed does not scale the loss at stage 0, and AdaFisher refuses a scale there.
UNSCALED = {"fp16": {"enabled": True, "loss_scale": 1.0}}


def config(
    stage: int,
    world: int,
    params: dict[str, Any] = PARAMS,
    *,
    precision: str = "fp32",
    offload: bool = False,
    accumulate: int = 1,
    clip: float = 0.0,
    zero: dict[str, Any] | None = None,
    **more: Any,
) -> dict[str, Any]:
    """A DeepSpeed config for a global batch of 12 a micro-step."""
    offloaded = {"offload_optimizer": {"device": "cpu"}} if offload else {}
    return {
        "train_batch_size": BATCH * accumulate,
        "train_micro_batch_size_per_gpu": BATCH // world,
        "gradient_accumulation_steps": accumulate,
        "optimizer": {"type": "AdaFisher", "params": params},
        "gradient_clipping": clip,
        "zero_optimization": {"stage": stage, **offloaded, **(zero or {})},
        **PRECISIONS[precision],
        **(UNSCALED if stage == 0 and precision == "fp16" else {}),
        **more,
    }


def engine_of(
    ds_config: dict[str, Any], module: nn.Module | None = None, groups: bool = False, kind: type[Odd] = Odd, **more: Any
) -> Any:
    """A DeepSpeed engine on a test model."""
    module = module if module is not None else model(kind=kind)
    if groups:
        more["model_parameters"] = param_groups(module)
    engine, *_ = deepspeed.initialize(model=module, config=copy.deepcopy(ds_config), dist_init_required=False, **more)
    return engine


@contextmanager
def fp16_on_the_cpu() -> Iterator[None]:
    """Allow fp16 where DeepSpeed refuses it (MKL-DNN without fast fp16): torch computes it."""
    kind = type(get_accelerator())
    before = kind.is_fp16_supported
    kind.is_fp16_supported = lambda self: True
    try:
        yield
    finally:
        kind.is_fp16_supported = before


def backward(engine: Any, step: int, rank: int, world: int, factor: float = 1.0) -> None:
    """Forward and backward of one micro-step, the loss times a factor."""
    x, y = batch(step, rank, world)
    dtype = next(engine.module.parameters()).dtype
    engine.backward(nn.functional.mse_loss(engine(x.to(dtype)).float(), y) * factor)


def train(engine: Any, first: int, last: int, rank: int, world: int) -> None:
    """Some steps, with the engine's own gradient accumulation."""
    accumulate = engine.gradient_accumulation_steps()
    for step in range(first * accumulate, last * accumulate):
        backward(engine, step, rank, world)
        engine.step()


def train_one_step_with_nan(engine: Any, step: int, rank: int, world: int, faulty: int) -> None:
    """One step in which rank `faulty` alone has NaNs as gradients, after DeepSpeed's own checks."""

    def poison(optimizer: Any, *_: Any) -> None:
        for tensor in optimizer.param_groups[0]["params"]:
            if rank == faulty and tensor.grad is not None:
                tensor.grad.fill_(float("nan"))

    hook = engine.basic_optimizer.register_step_pre_hook(poison)
    train(engine, step, step + 1, rank, world)
    hook.remove()


def gradients(engine: Any) -> dict[str, np.ndarray]:
    """Full gradients (float64) after a step's last backward: averaged and unscaled, not clipped."""
    scale = getattr(engine.optimizer, "loss_scale", 1.0) if engine.fp16_enabled() else 1.0
    return {
        name: safe_get_full_grad(p).detach().double().cpu().numpy() / scale
        for name, p in engine.module.named_parameters()
        if p.requires_grad
    }


def masters(engine: Any) -> dict[str, np.ndarray]:
    """All full weights, the fp32 copies where there are any, as float64 arrays."""
    named = {name: p for name, p in engine.module.named_parameters() if p.requires_grad}
    wrapper = engine.optimizer
    if hasattr(wrapper, "fp32_groups"):  # FP16_UnfusedOptimizer
        copies = {
            id(p): master
            for own, full in zip(wrapper.fp16_groups, wrapper.fp32_groups, strict=True)
            for p, master in zip(own, full, strict=True)
        }
        found = {name: copies[id(p)] for name, p in named.items()}
    elif engine.zero_optimization_stage() == 0:
        found = named
    else:
        found = {name: safe_get_full_fp32_param(p) for name, p in named.items()}
    return {name: value.detach().double().cpu().numpy().copy() for name, value in found.items()}


def full_weights(engine: Any) -> dict[str, np.ndarray]:
    """The model's own weights, gathered at stage 3, as float64 arrays."""
    named = dict(engine.module.named_parameters())
    stage3 = engine.zero_optimization_stage() == 3
    gathered = deepspeed.zero.GatheredParameters(list(named.values())) if stage3 else nullcontext()
    with gathered:
        return {name: p.detach().double().cpu().numpy().copy() for name, p in named.items()}


def run_alone(
    params: dict[str, Any] = PARAMS,
    steps: int = 8,
    groups: bool = False,
    clip: float = 0.0,
    accumulate: int = 1,
    kind: type[Odd] = Odd,
) -> dict[str, np.ndarray]:
    """Weights after the same training without DeepSpeed, in one process with the global batch."""
    module = model(kind=kind)
    optimizer = from_config(param_groups(module) if groups else module.parameters(), **params)
    for step in range(steps):
        optimizer.zero_grad()
        for micro in range(accumulate):
            x, y = batch(step * accumulate + micro, 0, 1)
            (nn.functional.mse_loss(module(x), y) / accumulate).backward()
        if clip:
            nn.utils.clip_grad_norm_(module.parameters(), clip)
        for group in optimizer.param_groups:
            for p in group["params"]:
                if p.requires_grad and p.grad is None:
                    p.grad = torch.zeros_like(p)  # ZeRO gives an unused parameter a gradient of zeros
        optimizer.step()
    return weights(module)
