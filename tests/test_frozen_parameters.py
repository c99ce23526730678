"""Frozen weights are left out of checkpoints on request, in one process and at each stage."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engines import PARAMS, config, engine_of, masters, train
from ranks import run_ranks
from torch import nn

from adafisher_dist import AdaFisher, CheckpointError, ds, load_checkpoint, save_checkpoint

pytestmark = [pytest.mark.deepspeed, pytest.mark.dist]

ROOT = Path(__file__).parent.parent


class Lora(nn.Module):
    """A large frozen base and a small trained part, of which one matrix has dense blocks."""

    def __init__(self, width: int = 256) -> None:
        super().__init__()
        self.inner = nn.Linear(11, width, bias=False).requires_grad_(False)
        self.base = nn.Linear(width, width, bias=False).requires_grad_(False)
        self.a, self.b = nn.Linear(width, width // 8, bias=False), nn.Linear(width // 8, 1, bias=False)
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.a(self.base(self.inner(x))))


def lora(width: int = 256) -> Lora:
    torch.manual_seed(2)
    return Lora(width)


def keys_of(folder: Path) -> set[str]:
    return set(json.loads((folder / "manifest.json").read_bytes())["content"]["tensors"])


def without_the_base(rank: int, world: int, stage: int, folder: str) -> None:
    import torch.distributed as dist

    def built(width: int = 256) -> Any:
        return engine_of(config(stage, world, precision="bf16"), lora(width))

    engine = built()
    train(engine, 0, 3, rank, world)
    engine.save_checkpoint(f"{folder}/theirs", exclude_frozen_parameters=True)
    engine.save_checkpoint(f"{folder}/positional", "tag", {}, True, True)
    ds.save_checkpoint(engine, f"{folder}/ours", exclude_frozen_parameters=True)
    train(engine, 3, 6, rank, world)
    straight = masters(engine)
    dist.barrier()
    for own in ("theirs/global_step3/adafisher_dist", "positional/tag/adafisher_dist", "ours/global_step3"):
        kept = {key for key in keys_of(Path(folder) / own) if key.startswith(("weight/", "buffer/"))}
        assert kept == {"weight/a.weight", "weight/b.weight", "buffer/seen"}
    loads = [
        lambda e: e.load_checkpoint(f"{folder}/theirs"),
        lambda e: e.load_checkpoint(f"{folder}/positional", load_module_strict=False),
        lambda e: ds.load_checkpoint(e, f"{folder}/ours"),
        lambda e: e.load_checkpoint(f"{folder}/ours"),
    ]
    for load in loads:
        again = built()
        assert load(again)[0] is not None
        train(again, 3, 6, rank, world)
        assert all(np.array_equal(value, straight[name]) for name, value in masters(again).items())
    with pytest.raises(CheckpointError, match=r"base\.weight has shape"):
        loads[0](built(128))


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_frozen_parameters_are_left_out(stage: int, tmp_path: Path) -> None:
    run_ranks(without_the_base, 2, stage, str(tmp_path), deepspeed=True)


def test_frozen_parameters_in_one_process(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from adafisher_dist.tools.export import export_weights

    module = lora()
    optimizer = AdaFisher(module.named_parameters(), **PARAMS)
    for step in range(3):
        optimizer.zero_grad()
        module(torch.randn(4, 11)).square().mean().backward()
        optimizer.step()
        if step == 1:
            module.b.requires_grad_(False)  # frozen with state: its state is kept, its weight is not
    save_checkpoint(tmp_path / "step3", module, optimizer, exclude_frozen_parameters=True)
    assert {key for key in keys_of(tmp_path / "step3") if key.startswith("weight/")} == {"weight/a.weight"}
    other = lora()
    again = AdaFisher(other.named_parameters(), **PARAMS)
    with torch.no_grad():
        other.b.weight.fill_(7.0)
    with caplog.at_level(logging.INFO, "adafisher_dist"):
        assert load_checkpoint(tmp_path, other, again).not_restored == []
    assert "3 frozen parameters, as inner.weight, were left out" in caplog.text
    assert "1 parameter(s), as b.weight, are trained here" in caplog.text
    assert torch.equal(other.a.weight, module.a.weight) and bool((other.b.weight == 7.0).all())
    kept, loaded = optimizer.state[module.b.weight], again.state[other.b.weight]
    assert int(kept["step"]) == 2 and all(torch.equal(loaded[key], value) for key, value in kept.items())
    other.renamed = other.__dict__["_modules"].pop("base")  # a base of another name is another base
    with pytest.raises(CheckpointError, match=r"base\.weight is not in the model"):
        load_checkpoint(tmp_path, other, AdaFisher(other.named_parameters(), **PARAMS))
    (file,) = export_weights(tmp_path / "step3", tmp_path / "out")
    from safetensors.torch import load_file

    assert set(load_file(file)) == {"a.weight", "seen"} and "strict=False" in caplog.text
