"""A checkpoint saved in one layout goes on in any other as if training had not been interrupted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engines import config, engine_of, fp16_on_the_cpu, full_weights, masters, train
from models import batch, distance, model, param_groups
from ranks import run_ranks
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from adafisher_dist import AdaFisher, ds, load_checkpoint, save_checkpoint
from adafisher_dist.checkpoint.manifest import read
from adafisher_dist.checkpoint.reader import read_tensor

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
        self.layout, self.rank, self.world = layout, rank, world
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


# ---- resharding ----


def contents(folder: str | Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, whole; random states left out."""
    folder = Path(folder)
    manifest = read(folder)
    keys = [key for key in manifest.tensors if not key.startswith("random/")]
    return {key: read_tensor(folder, manifest, key) for key in keys}


def load_save_and_go_on(rank: int, world: int, layout: str, source: str, target: str) -> Any:
    with fp16_on_the_cpu():
        run = Run(layout, rank, world)
        run.load(source)
        run.save(target)
        run.train(BEFORE, AFTER)
        return run.weights()


_sources: dict[tuple[str, int], tuple[str, Any]] = {}


@pytest.fixture
def source_of(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The checkpoint of a layout and world size, saved once, and the weights of the run that was not interrupted."""

    def source(layout: str, world: int) -> tuple[str, Any]:
        if (layout, world) not in _sources:
            folder = str(tmp_path_factory.mktemp(f"{layout}-{world}"))
            _, straight = run_ranks(save_and_go_on, world, layout, folder, deepspeed=True)[0]
            _sources[layout, world] = folder, straight
        return _sources[layout, world]

    return source


SOURCES = [
    ("alone", 1), ("ddp", 2), ("fsdp2", 3), ("hsdp", 4), ("zero0-bf16", 2), ("zero1", 3), ("bf16-optimizer", 2),
    ("zero2", 4), ("zero2-fp16", 2), ("zero3", 2), ("zero3-bf16", 4),
]  # fmt: skip
WORLDS = {"alone": [1], "hsdp": [4]}
EVERY = [
    (source, (layout, world)) for source in SOURCES for layout in LAYOUTS for world in WORLDS.get(layout, [1, 2, 3, 4])
]
# Each layout as source and as target, world sizes up and down.
FEW = [
    (("alone", 1), ("zero3", 2)), (("ddp", 2), ("zero2-fp16", 3)), (("fsdp2", 3), ("ddp", 2)),
    (("hsdp", 4), ("alone", 1)), (("zero0-bf16", 2), ("zero3-bf16", 3)), (("zero1", 3), ("fsdp2", 2)),
    (("bf16-optimizer", 2), ("zero1-bf16", 4)), (("zero2", 4), ("zero3-subgroups", 3)), (("zero2", 4), ("hsdp", 4)),
    (("zero2-fp16", 2), ("bf16-optimizer", 3)), (("zero3", 2), ("zero2-round-robin", 3)),
    (("zero3", 2), ("zero0-fp16", 2)), (("zero3-bf16", 4), ("zero2-offload", 1)),
]  # fmt: skip


def named(pair: Any) -> str:
    return "-".join(map(str, pair))


def reshard(source: tuple[str, int], target: tuple[str, int], source_of: Any, folder: Path) -> None:
    saved, straight = source_of(*source)
    resumed = run_ranks(load_save_and_go_on, target[1], target[0], saved, str(folder), deepspeed=True)
    before, after = contents(f"{saved}/here"), contents(folder / "here")
    assert before.keys() == after.keys()
    for key, value in before.items():
        same = after[key].to(value.dtype) if key == "weight/frozen" else after[key]  # it has the model's precision
        assert torch.equal(value, same), key
    old, new = read(Path(saved) / "here").about, read(folder / "here").about
    assert old["optimizer"] == new["optimizer"]
    low = any(LAYOUTS[layout][1] != "fp32" for layout in (source[0], target[0]))
    assert all(distance(result, straight) < (0.03 if low else 1e-4) for result in resumed)


@pytest.mark.parametrize(("source", "target"), FEW, ids=named)
def test_reshard(source: tuple[str, int], target: tuple[str, int], source_of: Any, tmp_path: Path) -> None:
    reshard(source, target, source_of, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("source", "target"), EVERY, ids=named)
def test_reshard_everywhere(source: tuple[str, int], target: tuple[str, int], source_of: Any, tmp_path: Path) -> None:
    reshard(source, target, source_of, tmp_path)
