"""Saves of ranks that do not do the same: nothing is replaced or published that should not be."""

from __future__ import annotations

import pickle
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from engines import config, engine_of, train
from ranks import run_ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from adafisher_dist import AdaFisher, CheckpointError, load_checkpoint, save_checkpoint
from adafisher_dist.checkpoint.directory import CheckpointDirectory
from adafisher_dist.checkpoint.latest import read_latest
from adafisher_dist.checkpoint.manifest import read


def stages(rank: int, world: int, folder: str, own_tags: bool) -> str:
    """Two halves of the ranks train a model each; both save to one folder, the second later."""
    mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("stage", "data"))
    stage = mesh.get_local_rank("stage")
    model = nn.Sequential()
    model.add_module(f"layer{stage}", nn.Linear(16, 16))
    fully_shard(model, mesh=mesh["data"])
    optimizer = AdaFisher(model.named_parameters(), lr=1e-2)
    model(torch.ones(8, 16)).square().mean().backward()
    optimizer.step()
    told, tag = "", f"stage{stage}" if own_tags else "a"
    for turn in range(2):
        dist.barrier()
        if turn == stage:
            try:
                save_checkpoint(Path(folder, tag), model, optimizer)
                save_checkpoint(Path(folder, tag), model, optimizer)  # their own they may replace
            except CheckpointError as error:
                told = str(error)
    dist.barrier()
    save_checkpoint(Path(folder, f"stage{stage}", "a"), model, optimizer)
    load_checkpoint(Path(folder, f"stage{stage}"), model, optimizer)
    return told


@pytest.mark.dist
@pytest.mark.parametrize("own_tags", [False, True])
def test_ranks_that_save_alone_need_a_folder_of_their_own(own_tags: bool, tmp_path: Path) -> None:
    """Where `latest` names theirs, and what is half written is not cleared away by others."""
    told = run_ranks(stages, 4, str(tmp_path / "both"), own_tags)
    assert told[:2] == ["", ""]
    assert all("by the ranks [0, 1] of this job, and here the ranks [2, 3] save" in each for each in told[2:])
    saved = read(tmp_path / "both" / ("stage0" if own_tags else "a"))
    assert set(saved.about["model"]["parameters"]) == {"layer0.weight", "layer0.bias"}


def in_phases(rank: int, world: int, folder: str) -> None:
    """All ranks train and save; then one goes on alone, into the same folder."""
    model = nn.Linear(8, 8)
    for parameter in model.parameters():
        dist.broadcast(parameter.data, 0)
    alone = dist.new_group([0])
    for name, group in (("first", None), ("second", alone)):
        if name == "first" or rank == 0:
            optimizer = AdaFisher(model.named_parameters(), lr=1e-2, process_group=group)
            model(torch.ones(2, 8)).square().mean().backward()
            optimizer.step()
            save_checkpoint(Path(folder, name), model, optimizer)
    dist.barrier()


@pytest.mark.dist
def test_some_of_the_ranks_may_go_on_alone(tmp_path: Path) -> None:
    run_ranks(in_phases, 2, str(tmp_path))
    assert read_latest(tmp_path) == "second"


def test_a_folder_that_another_clears_away_is_not_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of it may be gone by then."""
    from adafisher_dist.checkpoint import directory

    own, other = CheckpointDirectory(tmp_path, "own"), CheckpointDirectory(tmp_path, "other")
    own.prepare()
    (own.saving / "manifest.json").write_text("{}")
    remove = directory._remove

    def publish_meanwhile(path: Path) -> None:
        with pytest.raises(FileNotFoundError):
            own.publish(latest=False)
        remove(path)

    monkeypatch.setattr(directory, "_remove", publish_meanwhile)
    other.prepare()
    assert not own.folder.exists() and other.saving.exists()


def differs(rank: int, world: int, folder: str, frozen: bool) -> list[str]:
    """Rank 1 leaves out what the others save."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    optimizer = AdaFisher(module.named_parameters(), lr=1e-2)
    module(torch.ones(3, 8)).square().mean().backward()
    optimizer.step()
    save_checkpoint(Path(folder, "whole"), module, optimizer)
    if rank == 1 or not frozen:
        module[0].bias.requires_grad_(False)
    told = []
    try:
        save_checkpoint(Path(folder, "half"), module, optimizer, exclude_frozen_parameters=frozen or rank == 1)
    except CheckpointError as error:
        told.append(str(error))
    load_checkpoint(folder, module, optimizer)  # the last whole one
    return told


@pytest.mark.dist
@pytest.mark.parametrize("frozen", [False, True])
def test_nothing_is_published_that_no_load_takes(frozen: bool, tmp_path: Path) -> None:
    for told in run_ranks(differs, 2, str(tmp_path), frozen):
        assert len(told) == 1 and "elements of weight/0.bias: all have to save the same model" in told[0]
    assert read_latest(tmp_path) == "whole" and not (tmp_path / "half").exists()


def hangs(rank: int, world: int, stage: int, folder: str) -> float:
    """Rank 1 keeps still for long in a save; how long rank 0 waited for it."""
    from adafisher_dist import ds
    from adafisher_dist.checkpoint import writer

    engine = engine_of(config(stage, world))
    train(engine, 0, 1, rank, world)
    ds.save_checkpoint(engine, folder, "a")
    if rank == 1:
        writer.as_bytes = lambda tensor: time.sleep(60)  # type: ignore[assignment, return-value]
    began = time.monotonic()
    with pytest.raises(CheckpointError, match="Rank 1 did not come"):
        ds.save_checkpoint(engine, folder, "b")
    return time.monotonic() - began


@pytest.mark.dist
@pytest.mark.deepspeed
def test_a_lost_rank_costs_the_timeout_once(tmp_path: Path) -> None:
    """ZeRO-3 gathers parameters again after a save, which is a collective too."""
    waited, _ = run_ranks(hangs, 2, 3, str(tmp_path), deepspeed=True, group_timeout=6, lost=[1])
    assert waited < 11


def one_file_fails(rank: int, world: int, failing: int, folder: str) -> tuple[float, str]:
    """DeepSpeed's own files of one rank alone cannot be written: no room, or not pickled."""
    engine = engine_of(config(1, world))
    train(engine, 0, 1, rank, world)
    engine.save_checkpoint(folder, "a")
    if rank == failing:

        def fail(*_: Any, **__: Any) -> None:
            raise OSError(28, "No space left on device") if rank else pickle.PicklingError("No space for it")

        engine.checkpoint_engine.save = fail
        engine._copy_recovery_script = fail
    began = time.monotonic()
    with pytest.raises(CheckpointError) as caught:
        engine.save_checkpoint(folder, "b")
    waited = time.monotonic() - began
    assert engine.load_checkpoint(folder)[0].startswith(f"{folder}/a")
    return waited, str(caught.value)


@pytest.mark.dist
@pytest.mark.deepspeed
@pytest.mark.parametrize("failing", [0, 1])
def test_a_file_of_deepspeeds_that_one_rank_cannot_write_is_everybodys_error(failing: int, tmp_path: Path) -> None:
    for waited, told in run_ranks(one_file_fails, 2, failing, str(tmp_path), deepspeed=True, group_timeout=60):
        assert waited < 30 and "No space" in told and f"files of {tmp_path}/b" in told
