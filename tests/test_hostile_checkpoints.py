"""Checkpoints that something else than a save made: refused in seconds, with what to do."""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoint_runs import Run, content_of, trained
from damage import link, moved_out, pipe, sparse
from mutants import load_strange_texts, write_text
from tally import Tally
from typer.testing import CliRunner

from adafisher_dist import CheckpointError, load_checkpoint, save_checkpoint
from adafisher_dist.checkpoint import encoding
from adafisher_dist.checkpoint.directory import latest_tag
from adafisher_dist.checkpoint.errors import os_problem
from adafisher_dist.checkpoint.foreign import _check_file
from adafisher_dist.checkpoint.latest import prepare_latest, read_latest
from adafisher_dist.checkpoint.manifest import MANIFEST
from adafisher_dist.tools.cli import app

SHARD = "shard-00000-of-00001.safetensors"


@pytest.fixture
def root(two: Path, tmp_path: Path) -> Path:
    """A copy of a folder with the checkpoints step1 and step2, which `latest` names."""
    return Path(shutil.copytree(two, tmp_path / "root"))


SHARDS = {
    "a pipe": (pipe, "it is a pipe, and no file"),
    "endless": (lambda path: link(path, "/dev/zero"), "it is a link to /dev/zero, which is out of its folder"),
    "a link out": (moved_out, f"it is a link to ../out-{SHARD}, which is out of its folder.*cp -L"),
    "links in a circle": (lambda path: link(path, path.name), "its links lead to each other"),
    "60 GB": (sparse, "has 60000000000 bytes, and should have"),
}
FILES = {
    "a pipe": (pipe, "is no file|it is a pipe, and no file"),
    "endless": (lambda path: link(path, "/dev/zero"), "is no file|it is a link to /dev/zero, which is out of its fold"),
    "a link out": (moved_out, "it is a link to ../out-.*, which is out of its folder.*cp -L"),
    "60 GB": (sparse, "it has 60000000000 bytes, and a manifest has at most|more than 8192 bytes"),
}
HOSTILE = [
    *((f"step2/{SHARD}", how, *SHARDS[how]) for how in SHARDS),
    *((f"step2/{MANIFEST}", how, *FILES[how]) for how in FILES),
    *(("latest", how, *FILES[how]) for how in FILES),
]


@pytest.mark.timeout(60)
@pytest.mark.parametrize(("name", "how", "change", "message"), HOSTILE, ids=[f"{c[0]}-{c[1]}" for c in HOSTILE])
def test_a_file_that_is_none(name: str, how: str, change: Callable[[Path], Any], message: str, root: Path) -> None:
    """Loads, `inspect` and `export` name it and end at once."""
    change(root / name)
    run, began = Run(), time.monotonic()
    for verify in (True, False):
        with pytest.raises(CheckpointError, match=message) as caught:
            run.load(root, verify=verify)
        assert Path(name).name in str(caught.value) and str(root) in str(caught.value)
    export = ("export", root, "--to", "safetensors", "--out", root / "out")
    for words in (("inspect", root, "--verify"), export, (*export, "--no-verify")):
        result = CliRunner().invoke(app, [str(word) for word in words])
        assert result.exit_code in (1, 2) and re.search(message, result.output) and "Errno" not in result.output
    assert not (root / "out").exists()
    assert time.monotonic() - began < 20


def test_links_that_stay_in_the_folder(root: Path, tmp_path: Path) -> None:
    """And a checkpoint's folder that is a link itself."""
    shutil.move(root / "step2", tmp_path / "elsewhere")
    (root / "step2").symlink_to(tmp_path / "elsewhere")
    folder = root / "step2"
    (folder / SHARD).rename(folder / "one")
    (folder / "two").symlink_to("one")
    (folder / SHARD).symlink_to(tmp_path / "elsewhere" / "two")
    assert Run().load(root) == 2 and Run().load(folder) == 2


@pytest.mark.timeout(60)
@pytest.mark.parametrize("change", [pipe, lambda path: link(path, "/dev/zero")], ids=["a pipe", "endless"])
def test_a_file_of_deepspeeds_that_is_none(change: Callable[[Path], Any], tmp_path: Path) -> None:
    path = tmp_path / "mp_rank_00_model_states.pt"
    path.touch()
    change(path)
    with pytest.raises(CheckpointError, match=r"cannot be read: it is a (pipe|device), and no file"):
        _check_file(path)


# ---- latest ----


def test_a_flipped_bit_of_latest_is_noticed(root: Path) -> None:
    """Any, also where it makes the name of another checkpoint."""
    content = (root / "latest").read_bytes()
    for position in range(len(content)):
        for bit in range(8):
            damage = bytearray(content)
            damage[position] ^= 1 << bit
            (root / "latest").write_bytes(damage)
            with pytest.raises(CheckpointError, match=str(root)):
                Run().load(root)
    for name in ("step1", "step1\n"):  # as DeepSpeed, earlier versions and people write it
        (root / "latest").write_text(name)
        assert Run().load(root) == 1


def test_what_latest_says(tmp_path: Path) -> None:
    for tag in ("a", "epoch1/step3", "é中", "two words"):
        prepare_latest(tmp_path, tag).rename(tmp_path / "latest")
        assert read_latest(tmp_path) == tag
    (tmp_path / "latest").write_text("b\ncrc32 00000000\n")
    with pytest.raises(CheckpointError, match=r"it says 'b' and the checksum 00000000.*Checkpoints in .*: none"):
        latest_tag(tmp_path)


# ---- the manifest ----


def test_a_manifest_of_strange_values(root: Path) -> None:
    tally = Tally()
    load_strange_texts(150, 1, root / "step2", tally)
    tally.check()
    assert tally.outcomes["refused"] > tally.outcomes["loaded"]


def test_chunks_that_share_bytes(root: Path) -> None:
    """A file of 30 kB may not ask for more memory than it has bytes."""
    content = content_of(root / "step2")
    key = next(key for key in content["tensors"] if key.startswith("weight/"))
    tensor = content["tensors"][key]
    ((_, elements, file, offset), *_) = tensor["chunks"]
    tensor["chunks"] = [[n * elements, elements, file, offset] for n in range(1000)]
    tensor["numel"] = 1000 * elements
    write_text(root / "step2", json.dumps(content))
    with pytest.raises(CheckpointError, match=r"its tensors have \d+ bytes, and its files \d+"):
        Run().load(root)


def test_values_that_are_nested(tmp_path: Path) -> None:
    """What a save takes, a load takes, and it says when that ends."""
    value: Any = 1
    for _ in range(encoding.MOST_LEVELS - 1):
        value = [value]
    run = trained(1)
    save_checkpoint(tmp_path / "a", run.module, run.optimizer, extra=value)
    assert load_checkpoint(tmp_path / "a", run.module, run.optimizer).extra == value
    with pytest.raises(TypeError, match="extra is nested too deep to be saved: 201 levels of 200"):
        save_checkpoint(tmp_path / "a", run.module, run.optimizer, extra=[value])


# ---- what reaches a terminal ----


def test_names_that_a_terminal_would_obey(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    content = content_of(root / "step2")
    parameters, name = content["about"]["model"]["parameters"], "evil\x1b]0;title\x07"
    parameters[name] = {**next(iter(parameters.values())), "left_out": True}
    write_text(root / "step2", json.dumps(content))
    with pytest.raises(CheckpointError) as caught:
        Run().load(root)
    assert "evil\\x1b]0;title\\x07 is not in the model" in str(caught.value) and "\x1b" not in str(caught.value)
    with caplog.at_level(logging.WARNING, "adafisher_dist"):
        Run().load(root, strict=False)
    assert "evil\\x1b" in caplog.text and "\x1b" not in caplog.text
    shown = CliRunner().invoke(app, ["inspect", str(root), "--all"]).output
    assert "evil\\x1b" in shown and "\x1b" not in shown


# ---- the operating system's errors ----


@pytest.mark.parametrize(
    ("code", "remedy"),
    [
        (errno.ENOSPC, "Free some room"), (errno.EACCES, "permission"), (errno.EROFS, "Choose a folder"),
        (errno.EMFILE, "ulimit -n"), (errno.EIO, "kernel's log"),
    ],
)  # fmt: skip
def test_an_error_of_the_system_has_path_and_remedy(
    code: int, remedy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: Path, *arguments: Any, **more: Any) -> None:
        raise OSError(code, os.strerror(code), str(path))

    monkeypatch.setattr(Path, "mkdir", fail)
    with pytest.raises(CheckpointError, match=remedy) as caught:
        trained(1).save(tmp_path / "a" / "b", 1)
    assert str(tmp_path / "a") in str(caught.value) and os.strerror(code) in str(caught.value)
    assert "Errno" not in str(caught.value)
    assert "Errno" not in os_problem(OSError(code, os.strerror(code)))


def test_a_tag_that_could_not_be_replaced(tmp_path: Path) -> None:
    """The longest can be saved twice; a longer one not even once."""
    longest = "x" * 245
    for step in (1, 2):
        trained(step).save(tmp_path / longest, step)
    assert Run().load(tmp_path) == 2
    with pytest.raises(CheckpointError, match="has 246 bytes, and may have 245"):
        trained(1).save(tmp_path / f"{longest}x", 1)
    assert {path.name for path in tmp_path.iterdir()} == {longest, "latest"}
