"""DeepSpeed's own functions: nothing unpickled, frozen weights left out, any order of imports."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint_runs import as_version_0_1_wrote_it, change_manifest
from engines import PARAMS, config, engine_of, fp16_on_the_cpu, full_weights, masters, train
from models import model, param_groups
from ranks import run_ranks
from torch import nn

from adafisher_dist import AdaFisher, CheckpointError, UnsupportedLayoutError, ds, load_checkpoint, save_checkpoint

pytestmark = [pytest.mark.deepspeed, pytest.mark.dist]

ROOT = Path(__file__).parent.parent


# ---- nothing is unpickled unasked ----


class Evil:
    """Leaves a mark where it is unpickled."""

    def __init__(self, mark: str) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (self.mark, "w")


def poisoned(rank: int, world: int, stage: int, folder: str) -> None:
    """Each load on files of DeepSpeed's that run code when they are unpickled."""
    import torch.distributed as dist

    root, mark = Path(folder), Path(folder, "mark")
    engine = engine_of(config(stage, world))
    train(engine, 0, 1, rank, world)
    engine.save_checkpoint(folder, "a", client_state={"epoch": 3})
    dist.barrier()
    if rank == 0:
        files = sorted((root / "a").glob("*.pt"))
        assert files
        for path in files:
            torch.save({"module": {}, "x": Evil(str(mark))}, path)
        outside = root / "outside" / "a"
        outside.mkdir(parents=True)
        for path in files:
            (outside / path.name).write_bytes(path.read_bytes())
        torch.load(files[0], weights_only=False)
        assert mark.exists()  # the files do run code
        mark.unlink()
    dist.barrier()
    own = root / "a" / "adafisher_dist"

    def prepare(work: Callable[[], object]) -> None:
        dist.barrier()
        if rank == 0:
            work()
        dist.barrier()

    other = engine_of(config(stage, world))
    assert other.load_checkpoint(folder)[1] == {"epoch": 3}
    for change in (
        lambda content: content["about"]["values"].update(client_state=None),
        lambda content: content["about"]["values"].pop("client_state"),
    ):
        prepare(lambda change=change: change_manifest(own, change))  # type: ignore[misc]
        for flags in ({}, {"load_module_only": True}, {"load_optimizer_states": False}):
            assert other.load_checkpoint(folder, **flags)[1] == {}
    before = masters(other)
    prepare((own / "manifest.json").unlink)
    with pytest.raises(CheckpointError, match=r"no adafisher_dist/manifest\.json.*load_optimizer_states=False"):
        other.load_checkpoint(folder)
    for flags in ({"load_module_only": True}, {"load_optimizer_states": False}):
        with pytest.raises(CheckpointError, match=r"plain data .*open.*add_safe_globals"):
            other.load_checkpoint(folder, **flags)
    for name in ("../outside/a", "/etc", "a/../../outside/a", "", "..", "."):
        prepare(lambda name=name: (root / "latest").write_text(name))  # type: ignore[misc]
        for load in (other.load_checkpoint, lambda *args, **more: ds.load_checkpoint(other, *args, **more)):
            with pytest.raises(CheckpointError, match=r"latest is damaged.*folder inside of theirs"):
                load(folder, load_optimizer_states=False)
            if name:
                with pytest.raises(ValueError, match="folder inside of theirs"):
                    load(folder, name)
    assert not mark.exists()
    assert all(np.array_equal(value, before[name]) for name, value in masters(other).items())
    train(other, 1, 2, rank, world)  # nothing was left half done


@pytest.mark.parametrize(("stage", "world"), [(0, 1), (2, 2), (3, 2)])
def test_nothing_is_unpickled(stage: int, world: int, tmp_path: Path) -> None:
    run_ranks(poisoned, world, stage, str(tmp_path), deepspeed=True)


def what_cannot_be_saved(rank: int, world: int, folder: str) -> None:
    engine = engine_of(config(2, world))
    train(engine, 0, 1, rank, world)
    for tag in ("../a", "/a", "..", "", "a\nb"):
        with pytest.raises(ValueError, match="cannot be the tag of a checkpoint"):
            engine.save_checkpoint(f"{folder}/run", tag)
    with pytest.raises(
        (TypeError, CheckpointError), match=r"client_state\['x'\] is a types\.SimpleNamespace.*Save what"
    ):
        engine.save_checkpoint(f"{folder}/run", client_state={"x": SimpleNamespace() if rank else 1})
    assert not list(Path(folder).rglob("*.pt")) and not list(Path(folder).rglob("manifest.json"))
    engine.save_checkpoint(f"{folder}/run", "a/b", client_state={"x": 1})  # DeepSpeed allows folders in folders
    assert engine.load_checkpoint(f"{folder}/run")[1] == {"x": 1}


def test_what_cannot_be_saved_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    run_ranks(what_cannot_be_saved, 2, str(tmp_path), deepspeed=True)


def interrupted(rank: int, world: int, stage: int, folder: str) -> str:
    """DeepSpeed's own files cannot be written: `latest`, which a rename changes, names the last."""
    import torch.distributed as dist

    engine, latest = engine_of(config(stage, world)), Path(folder, "latest")
    train(engine, 0, 1, rank, world)
    engine.save_checkpoint(folder, "a")
    dist.barrier()
    first = latest.stat().st_ino
    dist.barrier()
    engine.save_checkpoint(folder, "b")
    assert latest.read_text() == "b" and latest.stat().st_ino != first  # never in place, where a kill would cut it
    train(engine, 1, 2, rank, world)
    wanted = masters(engine)

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(5, "Input/output error")

    engine.checkpoint_engine.save = fail
    engine._save_checkpoint = fail
    with pytest.raises(CheckpointError) as caught:
        engine.save_checkpoint(folder, "c")
    assert latest.read_text() == "b"
    other = engine_of(config(stage, world))
    other.load_checkpoint(folder)
    assert other.global_steps == 1
    other.load_checkpoint(folder, "c")
    assert all(np.array_equal(value, wanted[name]) for name, value in masters(other).items())
    return str(caught.value)


@pytest.mark.parametrize("stage", [0, 3])
def test_deepspeeds_own_files_cannot_be_written(stage: int, tmp_path: Path) -> None:
    for told in run_ranks(interrupted, 2, stage, str(tmp_path), deepspeed=True):
        assert f"could not write its own files of {tmp_path / 'c'}: " in told and "Input/output error" in told
        assert "complete" in told and "the tag 'c'" in told and "latest" in told


# ---- what another optimizer saved ----


def with_adamw(stage: int, world: int, precision: str) -> Any:
    ds_config = config(stage, world, precision=precision)
    ds_config["optimizer"] = {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}}
    return engine_of(ds_config)


def switched(rank: int, world: int, stage: int, precision: str, folder: str) -> None:
    import torch.distributed as dist

    with fp16_on_the_cpu():
        adam = with_adamw(stage, world, precision)
        train(adam, 0, 2, rank, world)
        adam.save_checkpoint(folder, "older")
        train(adam, 2, 4, rank, world)
        adam.save_checkpoint(folder)
        saved = full_weights(adam)
        for flags in ({"load_optimizer_states": False}, {"load_module_only": True}):
            torch.manual_seed(5 + rank)
            engine = engine_of(config(stage, world, precision=precision), torch_model_of(7))
            with pytest.raises(CheckpointError, match="load_optimizer_states=False"):
                engine.load_checkpoint(folder)
            assert engine.load_checkpoint(folder, **flags)[0] is not None
            assert engine.global_steps == (0 if "load_module_only" in flags else 4)
            low = full_weights(engine)
            assert all(np.array_equal(low[name], saved[name]) for name in saved)
            # DeepSpeed makes its fp32 copies of the 16-bit weights, so they are as right as those.
            assert all(np.array_equal(value, saved[name]) for name, value in masters(engine).items())
            before = masters(engine)
            train(engine, 4, 5, rank, world)
            moved = max(float(np.abs(value - before[name]).max()) for name, value in masters(engine).items())
            assert 0 < moved < 0.5
        engine = engine_of(config(stage, world, precision=precision))
        if stage == 3:
            with pytest.raises(CheckpointError, match="of what the file latest in"):
                engine.load_checkpoint(folder, "older", load_module_only=True)
        else:
            engine.load_checkpoint(folder, "older", load_module_only=True)
            assert any(not np.array_equal(value, saved[name]) for name, value in full_weights(engine).items())
        with pytest.raises(CheckpointError, match="There is no checkpoint"):
            engine.load_checkpoint(folder, "nowhere", load_module_only=True)
        elsewhere = engine_of(config(2 if stage == 3 else 3, world, precision=precision))
        with pytest.raises(CheckpointError, match="has no file of DeepSpeed's that fits ZeRO stage"):
            elsewhere.load_checkpoint(folder, load_module_only=True)
        assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ
        dist.barrier()


def torch_model_of(seed: int) -> nn.Module:
    """The test model with other weights."""
    module = model()
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.rand_like(parameter))
    return module


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("stage", "world"), [(0, 2), (1, 2), (2, 2), (3, 2), (3, 1)])
def test_weights_that_adamw_trained(stage: int, world: int, precision: str, tmp_path: Path) -> None:
    run_ranks(switched, world, stage, precision, str(tmp_path), deepspeed=True)


def adafishers_into_adamw(rank: int, world: int, stage: int, folder: str) -> None:
    engine = engine_of(config(stage, world))
    train(engine, 0, 2, rank, world)
    engine.save_checkpoint(folder)
    saved = full_weights(engine)
    adamw = {**config(stage, world), "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}}}
    other = engine_of(adamw, torch_model_of(3))
    before = full_weights(other)
    for tag in (None, "global_step2"):
        with pytest.raises(CheckpointError, match="was saved by AdaFisher, whose state AdamW cannot take over"):
            other.load_checkpoint(folder, tag)
    assert all(np.array_equal(value, before[name]) for name, value in full_weights(other).items())
    other.load_checkpoint(folder, load_optimizer_states=False)
    assert all(np.array_equal(value, saved[name]) for name, value in full_weights(other).items())


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_adafishers_checkpoint_into_adamw(stage: int, tmp_path: Path) -> None:
    run_ranks(adafishers_into_adamw, 2, stage, str(tmp_path), deepspeed=True)


def adafisher_without_ours(rank: int, world: int, stage: int, folder: str) -> None:
    """If only our folder is lost, the weights alone can still be loaded from DeepSpeed's files."""
    import shutil

    import torch.distributed as dist

    engine = engine_of(config(stage, world, precision="bf16"))
    train(engine, 0, 2, rank, world)
    engine.save_checkpoint(folder)
    saved = full_weights(engine)
    dist.barrier()
    if rank == 0:
        shutil.rmtree(Path(folder) / "global_step2" / "adafisher_dist")
    dist.barrier()
    again = engine_of(config(stage, world, precision="bf16"), torch_model_of(3))
    with pytest.raises(CheckpointError, match="If AdaFisher saved it, that folder is lost"):
        again.load_checkpoint(folder)
    again.load_checkpoint(folder, load_optimizer_states=False)
    assert all(np.array_equal(value, saved[name]) for name, value in full_weights(again).items())


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_adafishers_checkpoint_without_its_folder(stage: int, tmp_path: Path) -> None:
    run_ranks(adafisher_without_ours, 2, stage, str(tmp_path), deepspeed=True)


def of_version_0_1(rank: int, world: int, stage: int, folder: str) -> None:
    """Its optimizer state is refused, and its weights are there for who asks for these alone."""
    import torch.distributed as dist

    engine = engine_of(config(stage, world), groups=True)
    train(engine, 0, 2, rank, world)
    engine.save_checkpoint(f"{folder}/theirs", "a")
    ds.save_checkpoint(engine, f"{folder}/ours", "a")
    saved = masters(engine)
    dist.barrier()
    if rank == 0:
        for own in ("theirs/a/adafisher_dist", "ours/a"):
            change_manifest(Path(folder) / own, as_version_0_1_wrote_it)
    dist.barrier()
    loads: list[Callable[..., Any]] = [
        lambda e, **flags: e.load_checkpoint(f"{folder}/theirs", **flags),
        lambda e, **flags: e.load_checkpoint(f"{folder}/ours", **flags),
        lambda e, **flags: ds.load_checkpoint(e, f"{folder}/ours", **flags),
    ]
    for load in loads:
        other, untouched = (engine_of(config(stage, world), torch_model_of(3), groups=True) for _ in range(2))
        for each in (other, untouched):
            train(each, 0, 1, rank, world)
        with pytest.raises(CheckpointError, match=r"adafisher_dist 0\.1\.0 \(format 3; .*load_optimizer_states=False"):
            load(other)
        for each in (other, untouched):  # nothing was changed
            train(each, 1, 2, rank, world)
        right = masters(untouched)
        assert all(np.array_equal(value, right[name]) for name, value in masters(other).items())
        flags = {"load_module_only": True} if load is loads[-1] else {"load_optimizer_states": False}
        assert load(other, **flags)[0] is not None
        assert all(np.array_equal(value, saved[name]) for name, value in masters(other).items())
        train(other, 2, 3, rank, world)


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_checkpoint_of_version_0_1_gives_its_weights_alone(stage: int, tmp_path: Path) -> None:
    run_ranks(of_version_0_1, 2, stage, str(tmp_path), deepspeed=True)


def universal(rank: int, world: int, folder: str) -> None:
    engine = engine_of(config(2, world, checkpoint={"load_universal": True}))
    with pytest.raises(CheckpointError, match=r'"load_universal" out of the config.*any number of ranks'):
        engine.load_checkpoint(folder)


def test_universal_checkpoints_are_refused(tmp_path: Path) -> None:
    run_ranks(universal, 1, str(tmp_path), deepspeed=True)


# ---- frozen parameters ----


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

    assert not any("lock" in text for text in said())  # somebody may be compiling
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
