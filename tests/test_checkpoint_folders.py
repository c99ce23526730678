"""Folders of checkpoints: what killed saves left, ages, tags, failures to publish."""

from __future__ import annotations

import logging
import os
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import config, engine_of, train
from ranks import run_ranks
from torch import nn
from typer.testing import CliRunner

from adafisher_dist import AdaFisher, CheckpointError, ds, load_checkpoint, save_checkpoint
from adafisher_dist.checkpoint import directory, folders
from adafisher_dist.tools import listing
from adafisher_dist.tools.cli import app


def made() -> tuple[nn.Module, AdaFisher]:
    torch.manual_seed(0)
    module = nn.Linear(8, 4)
    return module, AdaFisher(module.named_parameters())


def epoch_in(path: Path) -> object:
    return load_checkpoint(path, *made()).extra["epoch"]


# ---- what killed saves left ----


def test_what_cannot_be_taken_away_stops_no_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As another user's, or a file that is open over NFS; but the tag's own has to go."""
    remove = shutil.rmtree

    def refuse(path: Any, *given: Any, **more: Any) -> None:
        if Path(path).name in (".other.deleting", ".own.deleting"):
            raise PermissionError(13, "Permission denied", str(path))
        remove(path, *given, **more)

    monkeypatch.setattr(shutil, "rmtree", refuse)
    (tmp_path / ".other.deleting").mkdir()
    with caplog.at_level(logging.WARNING, "adafisher_dist"):
        save_checkpoint(tmp_path / "step1", *made(), extra={"epoch": 1})
    assert f"{tmp_path}/.other.deleting, cannot be taken away" in caplog.text
    assert epoch_in(tmp_path) == 1
    (tmp_path / ".own.saving").mkdir()
    with pytest.raises(CheckpointError, match=r"\.own\.deleting: Permission denied"):
        save_checkpoint(tmp_path / "own", *made())
    assert epoch_in(tmp_path) == 1


# ---- which is the oldest ----


def test_a_copied_folder_keeps_the_newest(tmp_path: Path) -> None:
    """The files' times are of the copying, in any order."""
    for step in range(1, 5):
        save_checkpoint(tmp_path / f"step{step}", *made())
        manifest = tmp_path / f"step{step}" / "manifest.json"
        text = manifest.read_bytes()
        place = text.index(b'"created": "') + len(b'"created": "')
        manifest.write_bytes(text[:place] + f"2026-01-0{step}".encode() + text[place + 10 :])
        os.utime(manifest, (10.0**9 - step, 10.0**9 - step))
    assert folders.tags(tmp_path) == ["step1", "step2", "step3", "step4"]
    assert [found.tag for found in listing.checkpoints_in(tmp_path)] == ["step1", "step2", "step3", "step4"]
    save_checkpoint(tmp_path / "step5", *made(), keep_last=2)
    assert folders.tags(tmp_path) == ["step4", "step5"]


def test_a_listing_while_another_job_deletes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for tag in "ab":
        save_checkpoint(tmp_path / tag, *made())
    found = listing.folder_of

    def then_delete(path: Path) -> Path | None:
        folder = found(path)
        if path.name == "a":
            shutil.rmtree(path)
        return folder

    monkeypatch.setattr(listing, "folder_of", then_delete)
    assert [each.tag for each in listing.checkpoints_in(tmp_path)] == ["b"]


def test_what_deepspeeds_function_was_about_to_replace_is_found(tmp_path: Path) -> None:
    """A kill between the two renames of `engine.save_checkpoint` leaves it under another name."""
    save_checkpoint(tmp_path / "a" / "adafisher_dist", *made(), extra={"epoch": 3})
    (tmp_path / "a" / "latest").unlink()
    kept = (tmp_path / "a" / "adafisher_dist").rename(tmp_path / "a" / ".adafisher_dist.replaced")
    assert directory.CheckpointDirectory(tmp_path, "a").find() == kept == folders.folder_of(tmp_path / "a")
    assert epoch_in(tmp_path / "a") == 3


# ---- tags ----


@pytest.mark.deepspeed
@pytest.mark.dist
@pytest.mark.parametrize("stage", [1])
def test_one_tag_has_one_checkpoint(stage: int, tmp_path: Path) -> None:
    for messages in run_ranks(saved_twice, 2, stage, str(tmp_path), deepspeed=True):
        own, theirs = messages
        assert "would write a second one into it" in own and "another tag" in own
        assert "exists and is no checkpoint" in theirs


def saved_twice(rank: int, world: int, stage: int, folder: str) -> list[str]:
    """What is told of a tag that was saved by either function, and is saved by the other."""
    engine = engine_of(config(stage, world))
    train(engine, 0, 1, rank, world)
    ds.save_checkpoint(engine, folder, tag="a", client_state={"at": 1})
    engine.save_checkpoint(folder, tag="b", client_state={"at": 2})
    with pytest.raises(CheckpointError) as own:
        engine.save_checkpoint(folder, tag="a")
    with pytest.raises(CheckpointError) as theirs:
        ds.save_checkpoint(engine, folder, tag="b")
    for tag, at in (("a", 1), ("b", 2)):
        for load in (ds.load_checkpoint(engine, folder, tag=tag), engine.load_checkpoint(folder, tag=tag)):
            assert load[1] == {"at": at}
    return [str(own.value), str(theirs.value)]


@pytest.mark.deepspeed
@pytest.mark.dist
def test_a_tag_may_be_a_path(tmp_path: Path) -> None:
    run_ranks(saved_in_a_folder, 1, str(tmp_path), deepspeed=True)
    shown = CliRunner().invoke(app, ["inspect", str(tmp_path)])
    assert shown.exit_code == 0 and "run/last" in shown.output.replace("\n", "")


def saved_in_a_folder(rank: int, world: int, folder: str) -> None:
    engine = engine_of(config(1, world))
    train(engine, 0, 1, rank, world)
    engine.save_checkpoint(folder, tag="run/last", client_state={"at": 1})
    assert engine.load_checkpoint(folder)[1] == {"at": 1}
    assert ds.load_checkpoint(engine, folder)[1] == {"at": 1}


def test_latest_may_not_lead_out_of_its_folder(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "a", *made())
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "latest").write_text("../a")
    with pytest.raises(CheckpointError, match="latest is damaged"):
        load_checkpoint(tmp_path / "in", *made())


# ---- failures to publish ----


@pytest.mark.parametrize("at", ["a.replaced", "a", "sync", "latest"])
def test_ctrl_c_while_it_is_published(at: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may come when the system has done what was asked; the error says what stands there."""
    save_checkpoint(tmp_path / "a", *made(), extra={"epoch": 1})
    rename, sync, pressed = os.rename, directory.sync, [at]

    def then_interrupted(source: Any, target: Any, **more: Any) -> None:
        rename(source, target, **more)
        if [Path(target).name.removeprefix(".")] == pressed:
            raise KeyboardInterrupt(pressed.pop())

    def interrupted_sync(path: Path) -> None:
        sync(path)
        if at == "sync" and path == tmp_path and (tmp_path / ".a.replaced").exists():
            raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises((CheckpointError, KeyboardInterrupt)) as error:
        patched.setattr(os, "rename", then_interrupted)
        patched.setattr(directory, "sync", interrupted_sync)
        save_checkpoint(tmp_path / "a", *made(), extra={"epoch": 2})
    published = at == "latest"
    assert ("was published and is whole" if published else "Nothing was published") in str(error.value)
    assert epoch_in(tmp_path) == epoch_in(tmp_path / "a") == (2 if published else 1)
    save_checkpoint(tmp_path / "a", *made(), extra={"epoch": 3})
    assert epoch_in(tmp_path) == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "latest"]


def test_a_thread_that_cannot_be_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The save is done at once, and those after it are as ever."""

    def refuse(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patched, caplog.at_level(logging.WARNING, "adafisher_dist"):
        patched.setattr(threading.Thread, "start", refuse)
        saving = save_checkpoint(tmp_path / "a", *made(), extra={"epoch": 1}, asynchronous=True)
    assert saving.done() and saving.wait() == tmp_path / "a" and "cannot go on in the background" in caplog.text
    assert epoch_in(tmp_path) == 1
    save_checkpoint(tmp_path / "b", *made(), extra={"epoch": 2}, asynchronous=True).wait()
    assert epoch_in(tmp_path) == 2
