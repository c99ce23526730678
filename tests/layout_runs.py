"""A training in every layout, whose checkpoints and weights are compared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from engines import config, engine_of, full_weights, masters, train
from models import Stacked, batch, model, param_groups
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from adafisher_dist import AdaFisher, ds, load_checkpoint, save_checkpoint
from adafisher_dist.checkpoint.open_checkpoint import OpenCheckpoint

# Kept factors, in turns: the state that is hardest to carry over. max_blocks: the larger matrices
# end with a diagonal Fisher, in the middle of a stack too.
SETTINGS = {
    "lr": 1e-2, "block_size": 8, "rows_per_block": 4, "damping": 0.2, "inverse_update_freq": 3, "max_blocks": 16,
}  # fmt: skip
BEFORE, AFTER = 5, 10  # steps

# How a training is laid out: a layout, a precision, and more of the DeepSpeed config (and "packed",
# of AdaFisher's).
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
    "ddp-packed": ("ddp", "fp32", {"packed": True}),
    "zero3-packed": (3, "fp32", {"packed": True}),
    "zero3-kept": (3, "fp32", {"zero": {"stage3_param_persistence_threshold": 0}}),
}


class Run:
    """One training in one of the layouts."""

    def __init__(self, layout: str, rank: int, world: int, settings: dict[str, Any] = SETTINGS) -> None:
        self.kind, self.precision, more = LAYOUTS[layout]
        settings = {**settings, "packed": more.get("packed", False)}
        more = {key: value for key, value in more.items() if key != "packed"}
        self.layout, self.rank, self.world = layout, rank, world
        self.engine: Any = None
        module = model(kind=Stacked)
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

            hsdp = self.kind == "hsdp"
            shape, names = ((2, world // 2), ("replica", "shard")) if hsdp else ((world,), ("shard",))
            fully_shard(module, mesh=init_device_mesh("cpu", shape, mesh_dim_names=names))
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
        if self.engine is not None and LAYOUTS[self.layout][2].get("zero", {}).get("round_robin_gradients"):
            return {n: w for n, w in full_weights(self.engine).items() if n != "frozen"}  # DeepSpeed's map is wrong
        if self.engine is not None:
            return masters(self.engine)
        full = {n: p.full_tensor() if hasattr(p, "full_tensor") else p for n, p in self.plain.named_parameters()}
        return {n: p.detach().double().numpy().copy() for n, p in full.items() if p.requires_grad}


def contents(folder: str | Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, whole; random states left out."""
    folder = Path(folder)
    with OpenCheckpoint(folder) as opened:
        keys = [key for key in opened.manifest.tensors if not key.startswith("random/")]
        return {key: opened.read_tensor(key) for key in keys}
