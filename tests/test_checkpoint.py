"""A checkpoint saved in one layout goes on in any other as if training had not been interrupted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engines import config, engine_of, fp16_on_the_cpu, masters, train
from models import batch, distance, model, param_groups, weights
from ranks import run_ranks
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from adafisher_dist import AdaFisher, ds, load_checkpoint, save_checkpoint

pytestmark = [pytest.mark.deepspeed, pytest.mark.dist]

# Kept factors, in turns: the state that is hardest to carry over. max_blocks: a diagonal Fisher too.
SETTINGS = {"lr": 1e-2, "block_size": 8, "damping": 0.2, "inverse_update_freq": 3, "max_blocks": 60}
BEFORE, AFTER = 5, 10  # steps

# How a training is laid out: a layout, a precision, and more of the DeepSpeed config.
LAYOUTS: dict[str, tuple[Any, str, dict[str, Any]]] = {
    "alone": ("torch", "fp32", {}),
    "ddp": ("ddp", "fp32", {}),
    "fsdp2": ("fsdp2", "fp32", {}),
    "hsdp": ("hsdp", "fp32", {}),
    "zero0": (0, "fp32", {}),
    "zero0-bf16": (0, "bf16", {}),
    "zero0-fp16": (0, "fp16", {}),
    "zero1": (1, "fp32", {}),
    "zero1-bf16": (1, "bf16", {}),
    "bf16-optimizer": (1, "bf16-fp32", {}),
    "zero2": (2, "fp32", {}),
    "zero2-bf16": (2, "bf16", {}),
    "zero2-fp16": (2, "fp16", {}),
    "zero2-offload": (2, "fp32", {"offload": True}),
    "zero2-round-robin": (2, "fp32", {"zero": {"round_robin_gradients": True}}),
    "zero3": (3, "fp32", {}),
    "zero3-bf16": (3, "bf16", {}),
    "zero3-subgroups": (3, "fp32", {"zero": {"sub_group_size": 100}}),
    "zero3-kept": (3, "fp32", {"zero": {"stage3_param_persistence_threshold": 0}}),
}


class Run:
    """One training in one of the layouts."""

    def __init__(self, layout: str, rank: int, world: int, settings: dict[str, Any] = SETTINGS) -> None:
        self.kind, self.precision, more = LAYOUTS[layout]
        self.rank, self.world = rank, world
        self.engine: Any = None
        module = model()
        if isinstance(self.kind, int):
            ds_config = config(self.kind, world, settings, precision=self.precision, **more)
            self.engine = engine_of(ds_config, module, groups=True)
            return
        self.module: nn.Module = module
        if self.kind == "ddp":
            self.module = DistributedDataParallel(module)
        elif self.kind in ("fsdp2", "hsdp"):
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard

            shape = (2, world // 2) if self.kind == "hsdp" else (world,)
            fully_shard(module, mesh=init_device_mesh("cpu", shape))
        self.optimizer = AdaFisher(param_groups(module), **settings)
        self.plain = module

    def train(self, first: int, last: int) -> None:
        if self.engine is not None:
            train(self.engine, first, last, self.rank, self.world)
            return
        for step in range(first, last):
            x, y = batch(step, self.rank, self.world)
            self.optimizer.zero_grad()
            nn.functional.mse_loss(self.module(x), y).backward()
            self.optimizer.step()

    def save(self, folder: str, tag: str = "here", **more: Any) -> Any:
        if self.engine is not None:
            return ds.save_checkpoint(self.engine, folder, tag, **more)
        return save_checkpoint(f"{folder}/{tag}", self.module, self.optimizer, **more)

    def load(self, folder: str, tag: str = "here", **more: Any) -> Any:
        if self.engine is not None:
            return ds.load_checkpoint(self.engine, folder, tag, **more)
        return load_checkpoint(f"{folder}/{tag}", self.module, self.optimizer, **more)

    def weights(self) -> dict[str, np.ndarray]:
        if self.engine is not None:
            return masters(self.engine)
        full = {n: p.full_tensor() if hasattr(p, "full_tensor") else p for n, p in self.plain.named_parameters()}
        return {n: p.detach().double().numpy().copy() for n, p in full.items() if p.requires_grad}


def save_and_go_on(rank: int, world: int, layout: str, folder: str) -> tuple[Any, Any]:
    """The weights when the checkpoint was saved, and those of the uninterrupted run."""
    with fp16_on_the_cpu():
        run = Run(layout, rank, world)
        run.train(0, BEFORE)
        run.save(folder)
        saved = run.weights()
        run.train(BEFORE, AFTER)
        return saved, run.weights()


def load_and_go_on(rank: int, world: int, layout: str, folder: str) -> tuple[Any, Any]:
    with fp16_on_the_cpu():
        run = Run(layout, rank, world)
        run.load(folder)
        loaded = run.weights()
        run.train(BEFORE, AFTER)
        return loaded, run.weights()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_same_layout_goes_on_bit_for_bit(layout: str, tmp_path: Path) -> None:
    world = 1 if layout == "alone" else 4 if layout == "hsdp" else 2
    straight = run_ranks(save_and_go_on, world, layout, str(tmp_path), deepspeed=True)
    resumed = run_ranks(load_and_go_on, world, layout, str(tmp_path), deepspeed=True)
    for one, other in zip(straight, resumed, strict=True):
        for before, after in zip(one, other, strict=True):
            assert before.keys() == after.keys()
            assert all(np.array_equal(before[name], after[name]) for name in before)
