"""QLoRA: adapters train on a frozen base of uint8 or float8, in each layout, and resume."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engines import config, engine_of
from ranks import run_ranks
from torch import Tensor, nn

from adafisher_dist import AdaFisher, ds, load_checkpoint, save_checkpoint

pytestmark = [pytest.mark.dist, pytest.mark.deepspeed]

WIDTH = 64
PARAMS = {"lr": 1e-2, "weight_decay": 0.0}


class Codes(nn.Module):
    """A frozen matrix: two 4-bit codes a byte, (elements/2, 1) as bitsandbytes', or float8.

    The kind "bytes" holds float8 as uint8.
    """

    def __init__(self, kind: str) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        if kind == "uint8":
            values = torch.randint(0, 256, (WIDTH * WIDTH // 2, 1), generator=generator, dtype=torch.uint8)
        else:
            values = torch.randn(WIDTH, WIDTH, generator=generator).to(torch.float8_e4m3fn)
        self.kind = kind
        self.weight = nn.Parameter(values.view(torch.uint8) if kind == "bytes" else values, requires_grad=False)
        self.register_buffer("scale", torch.rand(WIDTH, 1, generator=generator) / WIDTH**0.5)

    def forward(self, x: Tensor) -> Tensor:
        stored = self.weight
        if self.kind == "uint8":
            codes = torch.stack((stored >> 4, stored & 15), dim=-1).view(WIDTH, WIDTH).float() / 4 - 2
        else:
            codes = stored.view(torch.float8_e4m3fn).float()
        return x @ (codes * self.scale).T


class QLora(nn.Module):
    """Of rank 4, so that its factors are tables, as those of real models are."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.base = linear_4bit() if kind == "bitsandbytes" else Codes(kind)
        torch.manual_seed(1)
        self.a, self.b = nn.Linear(WIDTH, 4, bias=False), nn.Linear(4, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.b(self.a(x))


def linear_4bit() -> nn.Module:
    """Of bitsandbytes, quantised on the CPU."""
    import bitsandbytes

    torch.manual_seed(0)
    made = bitsandbytes.nn.Linear4bit(WIDTH, WIDTH, bias=False, compute_dtype=torch.float32, quant_type="nf4")
    return made.to("cpu").requires_grad_(False)


class Run:
    """Model and optimizer in a layout: "ddp", "fsdp2", or a ZeRO stage."""

    def __init__(self, layout: str, kind: str, rank: int, world: int) -> None:
        self.layout, self.rank, self.world = layout, rank, world
        self.module = QLora(kind)
        trained = [(name, p) for name, p in self.module.named_parameters() if p.requires_grad]
        if layout == "ddp":
            # gloo cannot send float8
            self.model: Any = nn.parallel.DistributedDataParallel(self.module, init_sync=kind != "float8")
        elif layout == "fsdp2":
            from torch.distributed.fsdp import fully_shard

            whole = {self.module.base.weight} if kind == "float8" else None
            fully_shard(self.module.base, ignored_params=whole)
            self.model = fully_shard(self.module, ignored_params=whole)
        else:
            # ZeRO-1 and 2 keep gradients in the dtype of the first parameter that they are given.
            given = {} if layout == "zero3" else {"model_parameters": [p for _, p in trained]}
            self.model = engine_of(config(int(layout[-1]), world, PARAMS), self.module, **given)
            self.optimizer = self.model.basic_optimizer
            return
        trained = [(name, p) for name, p in self.module.named_parameters() if p.requires_grad]  # as sharded
        self.optimizer = AdaFisher(trained, **PARAMS)

    def train(self, first: int, last: int) -> list[float]:
        losses = []
        for step in range(first, last):
            x = torch.randn(12, WIDTH, generator=torch.Generator().manual_seed(step))[self.rank :: self.world]
            loss = (self.model(x) - x.flip(1)).square().mean()
            if self.layout.startswith("zero"):
                self.model.backward(loss)
                self.model.step()
            else:
                loss.backward()
                self.optimizer.step()
                self.optimizer.zero_grad()
            losses.append(float(loss))
        return losses

    def save(self, folder: str, exclude: bool) -> None:
        if self.layout.startswith("zero"):
            ds.save_checkpoint(self.model, folder, "tag", exclude_frozen_parameters=exclude)
        else:
            save_checkpoint(f"{folder}/tag", self.module, self.optimizer, exclude_frozen_parameters=exclude)

    def load(self, folder: str) -> None:
        if self.layout.startswith("zero"):
            ds.load_checkpoint(self.model, folder, "tag")
        else:
            load_checkpoint(f"{folder}/tag", self.module, self.optimizer)

    def base(self) -> Tensor:
        """This rank's part of the frozen codes."""
        weight = self.module.base.weight
        here = weight.ds_tensor if hasattr(weight, "ds_tensor") else getattr(weight, "_local_tensor", weight)
        return here.detach()


def train_and_resume(rank: int, world: int, layout: str, kind: str, folder: str) -> tuple[list[float], str]:
    run = Run(layout, kind, rank, world)
    stored, before = str(run.base().dtype), run.base().view(torch.uint8).clone()
    losses = run.train(0, 3)
    run.save(f"{folder}/with", exclude=False)
    run.save(f"{folder}/without", exclude=True)
    losses += run.train(3, 6)
    assert torch.equal(run.base().view(torch.uint8), before)
    for kept in ("with", "without"):
        again = Run(layout, kind, rank, world)
        if kept == "with":
            again.base().view(torch.uint8).zero_()
        again.load(f"{folder}/{kept}")
        assert torch.equal(again.base().view(torch.uint8), before)
        assert again.train(3, 6) == losses[3:]
    return losses, stored


LAYOUTS = ["ddp", "fsdp2", "zero2", "zero3"]


def train_somewhere(layout: str, kind: str, folder: Path) -> str:
    """Train on two ranks, and resume; returns in which dtype the base was stored."""
    (losses, stored), other = run_ranks(train_and_resume, 2, layout, kind, str(folder), deepspeed=True)
    assert np.mean([losses[-1], other[0][-1]]) < np.mean([losses[0], other[0][0]])
    names = {}
    for kept in ("with", "without"):
        tensors = json.loads((folder / kept / "tag" / "manifest.json").read_text())["content"]["tensors"]
        names[kept] = {name for name in tensors if name.startswith("weight/")}
    assert names["with"] - names["without"] == {"weight/base.weight"}
    assert names["without"] == {"weight/a.weight", "weight/b.weight"}
    return stored


@pytest.mark.parametrize("layout", LAYOUTS)
def test_uint8(layout: str, tmp_path: Path) -> None:
    assert train_somewhere(layout, "uint8", tmp_path) == "torch.uint8"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_float8_as_bytes(layout: str, tmp_path: Path) -> None:
    assert train_somewhere(layout, "bytes", tmp_path) == "torch.uint8"


@pytest.mark.parametrize("layout", ["ddp", "fsdp2", "zero2"])
def test_float8(layout: str, tmp_path: Path) -> None:
    """Where no rank has to send it: gloo cannot, so at ZeRO-3 it has to be held as bytes."""
    assert train_somewhere(layout, "float8", tmp_path) == "torch.float8_e4m3fn"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_bitsandbytes(layout: str, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="it is not installed: pip install bitsandbytes")
    assert train_somewhere(layout, "bitsandbytes", tmp_path) == "torch.uint8"


def test_a_trained_parameter_is_real() -> None:
    codes = nn.Parameter(torch.zeros(8, 1, dtype=torch.uint8), requires_grad=False)
    assert len(AdaFisher([codes, nn.Parameter(torch.ones(3))]).param_groups[0]["params"]) == 2
    with pytest.raises(TypeError, match="complex64"):
        AdaFisher([nn.Parameter(torch.ones(3, dtype=torch.complex64), requires_grad=False)])
