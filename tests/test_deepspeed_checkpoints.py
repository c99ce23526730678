"""DeepSpeed's own save and load: nothing is unpickled; what another optimizer saved."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint_runs import as_version_0_1_wrote_it, change_manifest
from engines import config, engine_of, fp16_on_the_cpu, full_weights, masters, train
from models import model
from ranks import run_ranks
from torch import nn

from adafisher_dist import CheckpointError, ds

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


def pressed_in_a_part(rank: int, world: int, stage: int, folder: str) -> None:
    from adafisher_dist.stepping import step as stepping

    engine = engine_of(config(stage, world), groups=True)
    train(engine, 0, 2, rank, world)
    compute = stepping.compute_chunk

    def pressed(*arguments: Any) -> None:
        stepping.compute_chunk = compute
        signal.raise_signal(signal.SIGINT)

    stepping.compute_chunk = pressed
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which processes in the background ignore
    with pytest.raises(KeyboardInterrupt):
        train(engine, 2, 3, rank, world)
    with pytest.raises(RuntimeError, match="incomplete"):
        ds.save_checkpoint(engine, folder)


@pytest.mark.parametrize("stage", [1, 3])
def test_ctrl_c_in_one_of_several_parts_of_a_step_is_no_whole_step(stage: int, tmp_path: Path) -> None:
    run_ranks(pressed_in_a_part, 1, stage, str(tmp_path), deepspeed=True)


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
        with pytest.raises(CheckpointError, match=r"of DeepSpeed's own, and .* names it.*load_optimizer_states=False"):
            ds.load_checkpoint(engine, folder, load_optimizer_states=False)
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
    ds.save_checkpoint(engine, f"{folder}/ours")
    for flags in ({}, {"load_optimizer_states": False}, {"load_module_only": True}):
        with pytest.raises(CheckpointError, match=r"writes no files of DeepSpeed's.* export "):
            other.load_checkpoint(f"{folder}/ours", **flags)


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
