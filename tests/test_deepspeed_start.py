"""How DeepSpeed's engine finds AdaFisher: any order of imports, replaced optimizers, old locks."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engines import config, engine_of, masters, train
from models import model, param_groups
from ranks import run_ranks
from torch import nn

from adafisher_dist import AdaFisher, UnsupportedLayoutError

pytestmark = [pytest.mark.deepspeed, pytest.mark.dist]

ROOT = Path(__file__).parent.parent


# ---- in any order of imports ----


EARLY = """
import os, sys, pickle
import torch
from torch import nn
from {home} import AdaFisher
what, stage, folder = sys.argv[1], int(sys.argv[2]), sys.argv[3]
torch.manual_seed(0 if what == "save" else 1)
module = nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 4))
optimizer = AdaFisher(module.parameters(), lr=1e-2, block_size=8)
assert not any(name.startswith("deepspeed") for name in sys.modules)
import deepspeed
import deepspeed.runtime.engine as imported
assert type(imported.__loader__).__module__ != "adafisher_dist.layouts.deepspeed_wrappers"
assert imported.__spec__.loader is imported.__loader__
from deepspeed.ops import __compatible_ops__
__compatible_ops__["deepspeed_shm_comm"] = False
os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1")
engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config={{
    "train_batch_size": 4, "zero_optimization": {{"stage": stage}}}})
def train(first, last):
    losses = []
    for step in range(first, last):
        x = torch.randn(4, 16, generator=torch.Generator().manual_seed(step))
        loss = (engine(x) - x[:, :4]).square().mean()
        engine.backward(loss); engine.step(); losses.append(loss.item())
    return losses
if what == "save":
    train(0, 3)
    engine.save_checkpoint(folder)
    assert os.path.isfile(folder + "/global_step3/adafisher_dist/manifest.json")
else:
    assert engine.load_checkpoint(folder)[0] is not None
print("losses", train(3, 6))
torch.distributed.destroy_process_group()
"""


def run_script(script: str, *arguments: str, **environment: str) -> str:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, text=True, timeout=300,
        env={**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "MASTER_PORT": port, **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


@pytest.mark.parametrize(("stage", "home"), [(0, "adafisher_dist"), (2, "adafisher_dist.optimizer")])
def test_an_optimizer_built_before_deepspeed_is_imported(stage: int, home: str, tmp_path: Path) -> None:
    """No zero_allow_untested_optimizer is needed, and the resumed run repeats the losses."""
    script = EARLY.format(home=home)
    outputs = [run_script(script, what, str(stage), str(tmp_path)) for what in ("save", "load")]
    losses = [next(line for line in out.splitlines() if line.startswith("losses")) for out in outputs]
    assert losses[0] == losses[1]


# ---- another optimizer in our place ----


class Foreign(torch.optim.SGD):
    """What a library might build."""


def replaced(rank: int, world: int) -> list[str]:
    told: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("adafisher_dist").addHandler(handler)
    plain = config(2, world, zero_allow_untested_optimizer=True)
    del plain["optimizer"]

    def with_sgd(module: nn.Module) -> None:
        engine_of(plain, module, optimizer=Foreign([p for p in module.parameters() if p.requires_grad], lr=0.1))

    import copy
    import gc

    # Nothing to tell of: an optimizer of another model, one in an engine, a copy, one that has
    # trained.
    elsewhere = AdaFisher(model().parameters())
    with_sgd(model())
    module = model()
    engine = engine_of(config(2, world), module)
    train(engine, 0, 1, rank, world)
    module = model()
    copied = copy.deepcopy(AdaFisher(module.parameters()))
    gc.collect()  # the original is gone
    with_sgd(module)
    first = model()
    trained = AdaFisher(first.parameters())
    first(torch.randn(3, 11)).sum().backward()
    trained.step()
    with_sgd(first)
    assert not any("not used" in line for line in told), told
    module = model()
    idle = AdaFisher(param_groups(module))
    with_sgd(module)
    with_sgd(module)  # told once
    assert len(idle.param_groups) == 2 and elsewhere is not None and copied is not None
    module = model()
    handed = AdaFisher(module.parameters())  # its own groups go on, as Accelerate hands them to DeepSpeedCPUAdam
    engine_of(plain, module, optimizer=Foreign(handed.param_groups, lr=0.1))
    assert handed.param_groups[0]["params"][0] is not next(module.parameters()), "DeepSpeed put its own there"
    return [line for line in told if "not used" in line]


def test_an_optimizer_that_was_replaced_is_told_of() -> None:
    (first, second) = run_ranks(replaced, 2, deepspeed=True)
    assert len(first) == 2 and second == []
    for line in first:
        assert "trains with Foreign" in line and '"type": "AdaFisher"' in line
        assert '"zero_force_ds_cpu_optimizer": false' in line


# ---- pipelines ----


def pipeline(rank: int, world: int) -> None:
    from deepspeed.pipe import LayerSpec, PipelineModule

    net = PipelineModule([LayerSpec(nn.Linear, 4, 4), LayerSpec(nn.Linear, 4, 4)], num_stages=2, loss_fn=nn.MSELoss())
    engine = engine_of(config(0, 1, gradient_clipping=0.0), net)
    x = torch.ones(12, 4)
    with pytest.raises(UnsupportedLayoutError, match="PipelineEngine with pipeline parallelism at ZeRO stage 0"):
        engine.train_batch(iter([(x, x)]))


def test_pipelines_are_refused_by_name() -> None:
    run_ranks(pipeline, 2, deepspeed=True)


# ---- locks that a killed compilation has left ----


@pytest.mark.parametrize("inside", ["", "py311_cpu"])
def test_an_old_lock_is_told_of(inside: str, tmp_path: Path) -> None:
    folder = tmp_path / inside / "deepspeed_shm_comm"
    folder.mkdir(parents=True)
    lock = folder / "lock"
    lock.touch()
    launcher = [str(ROOT / "launch" / "torchrun.sh"), "--ranks", "1", "--dry-run", "launch/train.py"]
    environment = {**os.environ, "TORCH_EXTENSIONS_DIR": str(tmp_path), "PYTHON": sys.executable}

    def said() -> list[str]:
        by_launcher = subprocess.run(launcher, cwd=ROOT, capture_output=True, text=True, env=environment, timeout=120)
        assert by_launcher.returncode == 0, by_launcher.stderr
        told = {"TORCH_EXTENSIONS_DIR": str(tmp_path), "LOCAL_RANK": "0"}
        return [by_launcher.stderr, run_script("import torch, adafisher_dist", **told)]

    assert not any("/lock" in text for text in said())  # somebody may be compiling
    os.utime(lock, (0, 0))
    for text in said():
        assert text.count(f"rm {lock}") == 1
    assert "lock" not in run_script("import torch", TORCH_EXTENSIONS_DIR=str(tmp_path), LOCAL_RANK="1")


def test_where_deepspeed_compiles() -> None:
    """Pins the names: the operator's, and torch's folder for it."""
    from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder
    from torch.utils.cpp_extension import get_default_build_root

    assert ShareMemCommBuilder.NAME == "deepspeed_shm_comm"
    assert get_default_build_root().endswith("torch_extensions")


def with_an_empty_group(rank: int, world: int, stage: int, first: bool, folder: str) -> list[float]:
    """How far each weight of a resumed training is from the straight one's."""

    def built() -> Any:
        module = model()
        full, empty = param_groups(module), {"params": [], "weight_decay": 0.3}
        groups = [empty, *full] if first else [full[0], empty, *full[1:]]
        return engine_of(config(stage, world), module, model_parameters=groups)

    engine = built()
    train(engine, 0, 2, rank, world)
    engine.save_checkpoint(folder)
    train(engine, 2, 4, rank, world)
    again = built()
    again.load_checkpoint(folder)
    train(again, 2, 4, rank, world)
    straight, resumed = masters(engine), masters(again)
    assert again.basic_optimizer.param_groups[-1]["weight_decay"] != 0.3
    return [float(np.abs(value - straight[name]).max()) for name, value in resumed.items()]


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_deepspeed_takes_empty_groups_away(stage: int, first: bool, tmp_path: Path) -> None:
    for apart in run_ranks(with_an_empty_group, 2, stage, first, str(tmp_path), deepspeed=True):
        assert apart and not any(apart)
