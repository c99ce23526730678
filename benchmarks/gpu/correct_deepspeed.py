"""Checks of the optimizer in DeepSpeed engines, at every ZeRO stage."""

from __future__ import annotations

import io
import logging
import os
import warnings
from contextlib import nullcontext, redirect_stdout
from functools import cache
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch.distributed as dist
from correct_blocks import same_bits
from correct_runner import Here, NotChecked
from correct_trainings import (
    NAN,
    PARAMS,
    STEPS,
    Arrays,
    Settings,
    batch,
    beside_groups,
    known,
    same_on_all,
    samples,
    state_of,
    weights,
)
from models import distance, model
from torch import nn


@cache
def with_deepspeed() -> Any:
    """tests/engines.py, once DeepSpeed has joined the process group that there is."""
    if find_spec("deepspeed") is None:
        raise NotChecked("DeepSpeed is not installed")
    warnings.filterwarnings("ignore", "`torch.distributed", FutureWarning)  # old names of what torch 2.13 renamed
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else it is compiled at the first use
    deepspeed.init_distributed(dist_backend=dist.get_backend(), auto_mpi_discovery=False, verbose=False)
    import engines

    return engines


def engine_config(here: Here, stage: int, precision: str, offload: bool = False, accumulate: int = 1) -> Settings:
    engines = with_deepspeed()
    config = engines.config(
        stage, here.world, PARAMS, precision=precision, offload=offload, accumulate=accumulate
    )  # fmt: skip
    config["train_batch_size"] = samples(here) * accumulate
    config["train_micro_batch_size_per_gpu"] = samples(here) // here.world
    return config


def new_engine(config: Settings, **more: Any) -> Any:
    """An engine, without the lines on memory that DeepSpeed prints for some."""
    with redirect_stdout(io.StringIO()):
        return with_deepspeed().engine_of(config, **more)


def backward(engine: Any, step: int, here: Here, factor: float = 1.0) -> None:
    x, y = batch(step, here)
    dtype = next(engine.module.parameters()).dtype
    engine.backward(nn.functional.mse_loss(engine(x.to(dtype)).float(), y) * factor)


def zero(here: Here, stage: int, precision: str, offload: bool) -> str:
    """An engine's steps beside numpy, of two micro-steps; in fp16 the last rank overflows once."""
    engines, accumulate = with_deepspeed(), 2
    bad = 2 if precision == "fp16" else None
    with engines.fp16_on_the_cpu() if here.device.type == "cpu" else nullcontext():
        engine = new_engine(engine_config(here, stage, precision, offload, accumulate), groups=True)
        start = model()
        beside = beside_groups(start, {**weights(start), **engines.masters(engine)})
        for step in range(STEPS):
            for micro in range(accumulate):
                backward(engine, step * accumulate + micro, here, 1e9 if step == bad and here.is_last else 1.0)
                if micro == accumulate - 1:
                    gradients, before = engines.gradients(engine), engines.masters(engine)
                engine.step()
            after = engines.masters(engine)
            overflow = bool(getattr(engine.optimizer, "overflow", False))
            assert overflow == (step == bad), f"step {step}: DeepSpeed says overflow {overflow}"
            if overflow:
                assert all(np.array_equal(value, after[name]) for name, value in before.items()), "a skipped step moved"
            else:
                beside.step(gradients, before, after)
        updates = {entry.fisher_updates for entry in engine.basic_optimizer.fisher_stats().values()}
        devices = {str(shard.device.type) for shard in engine.basic_optimizer._registry.shards}
    assert updates == {beside.steps}, updates
    assert devices == {"cpu" if offload else here.device.type}, devices
    same_on_all(after, here)
    skipped = ", one skipped" if bad is not None else ""
    return f"{beside.steps} steps beside numpy{skipped}; the optimizer's state is on {devices.pop()}"


def zero_bad_gradient(here: Here, stage: int) -> str:
    """A NaN that DeepSpeed does not look for, in fp32, on the last rank alone."""
    engines = with_deepspeed()
    engine = new_engine(engine_config(here, stage, "fp32"))
    ours, before = engine.basic_optimizer, {}

    def spoil(*_: Any) -> None:
        for tensor in ours.param_groups[0]["params"] if here.is_last else ():
            if tensor.grad is not None:
                tensor.grad.fill_(NAN)

    for step in range(STEPS):
        hook = ours.register_step_pre_hook(spoil) if step == 2 else None
        before = engines.masters(engine)
        backward(engine, step, here)
        engine.step()
        if hook is not None:
            hook.remove()
            after = engines.masters(engine)
            assert all(np.array_equal(value, after[name]) for name, value in before.items()), "the skipped step moved"
    assert ours.skipped_steps == 1, ours.skipped_steps
    assert all(np.isfinite(value).all() for value in engines.masters(engine).values())
    return "skipped without a trace, and counted"


def zero_checkpoint(here: Here, stage: int) -> str:
    """engine.save_checkpoint and load_checkpoint, and ds.save_checkpoint in the background."""
    from adafisher_dist import ds

    engines = with_deepspeed()
    config = engine_config(here, stage, "bf16")

    def steps(engine: Any, first: int, last: int) -> Arrays:
        for step in range(first, last):
            backward(engine, step, here)
            engine.step()
        return engines.masters(engine)

    engine = new_engine(config)
    middle = steps(engine, 0, 3)
    state = state_of(engine.basic_optimizer)
    folders = [here.folder / f"zero{stage}-{kind}" for kind in ("deepspeed", "background")]
    engine.save_checkpoint(str(folders[0]), client_state={"step": 3})
    saving = ds.save_checkpoint(engine, folders[1], client_state={"step": 3}, asynchronous=True)
    straight = steps(engine, 3, STEPS)
    saving.wait()
    apart = 0.0
    for folder in folders:
        resumed = new_engine(config)
        assert resumed.load_checkpoint(str(folder))[1]["step"] == 3
        assert distance(engines.masters(resumed), middle) == 0, "the weights that were loaded are not those saved"
        same_bits([known(value) for value in state_of(resumed.basic_optimizer)], [known(value) for value in state])
        apart = max(apart, distance(steps(resumed, 3, STEPS), straight))
    assert apart < 1e-5, f"two steps later the weights are {apart:.2g} apart"
    return f"loaded bit for bit; two steps later {'the same' if apart == 0 else f'{apart:.1e} apart'}"
