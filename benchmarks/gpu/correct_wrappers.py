"""Checks of the optimizer in one process, in DDP, with GradScaler, and in FSDP2."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from correct_blocks import host, same_bits
from correct_runner import Here, NotChecked
from correct_trainings import (
    FLOATS,
    PARAMS,
    STEPS,
    Arrays,
    Settings,
    batch,
    beside_groups,
    gradients_of,
    same_on_all,
    state_of,
    weights,
)
from models import model, param_groups
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from adafisher_dist import AdaFisher

# ---- one process, or DDP ----


def wrapped(module: nn.Module, here: Here, group: Any = None) -> nn.Module:
    """In DDP where there are several ranks."""
    if here.world == 1:
        return module
    ids = None if here.device.type == "cpu" else [here.device.index]
    return DistributedDataParallel(module, device_ids=ids, process_group=group)


def replicated(here: Here, precision: str, group: Callable[[Here], Any] = lambda here: None, **more: Any) -> str:
    """Steps with a model's own gradients, in param groups; in one step a parameter has none."""
    dtype, chosen = FLOATS[precision], group(here)
    module = model(dtype).to(here.device)
    net = wrapped(module, here, chosen)
    ours = AdaFisher(param_groups(module), **{**PARAMS, **more}, process_group=chosen)
    beside = beside_groups(module, weights(module), dtype=dtype, **more)
    for step in range(STEPS):
        x, y = batch(step, here)
        ours.zero_grad()
        nn.functional.mse_loss(net(x.to(dtype)).float(), y).backward()
        if step == 3:
            module.mix.weight.grad = None
        gradients, before = gradients_of(module), weights(module)
        ours.step()
        beside.step(gradients, before, weights(module))
    same_on_all(weights(module), here)
    return f"{STEPS} steps beside numpy, {'one process' if here.world == 1 else f'DDP over {here.world} ranks'}"


def scaler(here: Here) -> str:
    """GradScaler, fp16 autocast; a step whose gradients overflow on the last rank is skipped."""
    module = model().to(here.device)
    net, ours = wrapped(module, here), AdaFisher(param_groups(module), **PARAMS)
    beside, bad = beside_groups(module, weights(module)), 2
    grad_scaler = torch.amp.GradScaler(here.device.type, init_scale=2.0**10, growth_interval=100)
    for step in range(STEPS):
        x, y = batch(step, here)
        ours.zero_grad()
        with torch.autocast(here.device.type, torch.float16):
            loss = nn.functional.mse_loss(net(x).float(), y)
        grad_scaler.scale(loss * (1e9 if step == bad and here.is_last else 1.0)).backward()
        grad_scaler.unscale_(ours)
        gradients, before, state = gradients_of(module), weights(module), state_of(ours)
        grad_scaler.step(ours)
        grad_scaler.update()
        if step != bad:
            beside.step(gradients, before, weights(module))
            continue
        assert not all(np.isfinite(value).all() for value in gradients.values()), (
            "the step that was to overflow did not"
        )
        same_bits(state_of(ours), state)
        assert all(np.array_equal(value, before[name]) for name, value in weights(module).items())
    assert grad_scaler.get_scale() == 2.0**9 and ours.skipped_steps == 0
    same_on_all(weights(module), here)
    return f"{STEPS - 1} steps beside numpy, and one that the scaler skipped"


# ---- FSDP2 ----


def fsdp2(here: Here, policy: str, group: Callable[[Here], Any] = lambda here: None) -> str:
    """fully_shard over all ranks, beside numpy."""
    from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

    if here.device.type == "cpu" and not hasattr(torch.cpu.Stream, "record_event"):
        raise NotChecked("fully_shard of torch 2.6 does not work on CPUs")
    policies: dict[str, Settings] = {
        "fp32": {},
        "bf16": {"mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)},
        "offload": {"offload_policy": CPUOffloadPolicy(pin_memory=here.device.type == "cuda")},
    }
    kind, chosen = here.device.type, group(here)
    mesh = init_device_mesh(kind, (here.world,)) if chosen is None else DeviceMesh.from_group(chosen, kind)
    module = model()
    for part in (module.inner, module.conv, module):
        fully_shard(part, mesh=mesh, **policies[policy])
    ours = AdaFisher(param_groups(module), **PARAMS)
    whole = partial(_whole, module, here)
    beside = beside_groups(module, whole())
    for step in range(STEPS):
        x, y = batch(step, here)
        ours.zero_grad()
        nn.functional.mse_loss(module(x).float(), y).backward()
        gradients, before = whole(gradients=True), whole()
        ours.step()
        beside.step(gradients, before, whole())
    devices = {shard.device.type for shard in ours._registry.shards}
    assert devices == {"cpu" if policy == "offload" else kind}, devices
    same_on_all(whole(), here)
    return f"{STEPS} steps beside numpy over {here.world} rank(s); the optimizer's state is on {devices.pop()}"


def _whole(module: nn.Module, here: Here, gradients: bool = False) -> Arrays:
    """Full weights or gradients; those on the CPU are gathered on the device, as NCCL needs it."""
    from torch.distributed.tensor import DTensor

    found = {}
    for name, p in module.named_parameters():
        tensor = p.grad if gradients else p
        if tensor is not None:
            assert isinstance(tensor, DTensor)
            local = tensor.detach().to_local().to(here.device)
            there = DTensor.from_local(
                local, tensor.device_mesh, tensor.placements, run_check=False, shape=tensor.shape,
                stride=tensor.stride(),
            )  # fmt: skip
            found[name] = host(there.full_tensor())
    return found
