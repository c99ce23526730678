"""A load gives a whole checkpoint, or fails and changes nothing; a failed save's error is true."""

from __future__ import annotations

import errno
import json
import math
import os
import random
import resource
import shutil
import signal
import threading
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint_runs import (
    Child,
    Digests,
    Run,
    Tell,
    before_each_change,
    children,
    content_of,
    failing,
    leftovers,
    nth,
    trained,
    visible,
    write_manifest,
)  # fmt: skip
from ranks import run_ranks
from torch import nn
from typer.testing import CliRunner

from adafisher_dist import AdaFisher, CheckpointError
from adafisher_dist.checkpoint.directory import CheckpointDirectory
from adafisher_dist.checkpoint.manifest import MANIFEST, read
from adafisher_dist.checkpoint.open_checkpoint import OpenCheckpoint
from adafisher_dist.tools.cli import app
from adafisher_dist.tools.export import export_weights

# ---- what ties a shard to its manifest ----

SHARD = "shard-00000-of-00001.safetensors"


def test_a_shard_of_another_checkpoint(folder: Path) -> None:
    """Of the same size; its header tells, without a checksum."""
    root = folder / "root"
    for step in (2, 3):
        saved = trained(step)
        torch.manual_seed(0), np.random.seed(0), random.seed(0)  # whose states are as long then
        saved.save(root / f"step{step}", step)
    shutil.copy(root / "step3" / SHARD, root / "step2" / SHARD)
    run = trained(5)
    before = run.digest()
    assert (root / "step3" / SHARD).stat().st_size == read(root / "step2").files[SHARD].nbytes
    with pytest.raises(CheckpointError, match=f"{SHARD} belongs to the checkpoint [0-9a-f]+, and the manifest to"):
        run.load(root / "step2", verify=False)
    assert run.digest() == before
    out = CliRunner().invoke(app, ["export", str(root / "step2"), "--to", "safetensors", "--no-verify"])
    assert out.exit_code == 1 and "belongs to the checkpoint" in out.output


def rewrite_shard(folder: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Change a shard's header, and the manifest to fit: as another version may have written it."""
    data = (folder / SHARD).read_bytes()
    length = int.from_bytes(data[:8], "little")
    text = json.dumps(change(json.loads(data[8 : 8 + length]))).encode()
    text += b" " * (-len(text) % 8)
    (folder / SHARD).write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    content = content_of(folder)
    whole = (folder / SHARD).read_bytes()
    content["files"] = [{"name": SHARD, "bytes": len(whole), "crc32": f"{zlib.crc32(whole):08x}"}]
    for tensor in content["tensors"].values():
        for chunk in tensor["chunks"]:
            chunk[3] += len(text) - length
    write_manifest(folder, content)


def test_a_shard_without_an_id_loads(two: Path, folder: Path) -> None:
    """As checkpoints are that were saved before shards had one."""
    root = Path(shutil.copytree(two, folder / "root"))
    rewrite_shard(root / "step2", lambda header: {k: v for k, v in header.items() if k != "__metadata__"})
    for verify in (True, False):
        run = Run()
        assert run.load(root / "step2", verify=verify) == 2 and run.digest() == Digests()[2]


def test_a_header_that_contradicts_the_manifest(two: Path, folder: Path) -> None:
    """All checksums are right."""
    root = Path(shutil.copytree(two, folder / "root"))

    def swapped(header: dict[str, Any]) -> dict[str, Any]:
        weights = [key for key in header if key.startswith("weight/")]
        first, second = next((a, b) for a in weights for b in weights if a < b and header[a] != header[b])
        return {**header, first: header[second], second: header[first]}

    rewrite_shard(root / "step2", swapped)
    run = trained(5)
    before = run.digest()
    with pytest.raises(CheckpointError, match=r"does not hold weight/.* where the manifest has it"):
        run.load(root / "step2")
    assert run.digest() == before


# ---- as many files as there are ranks ----


def split(folder: Path, count: int) -> None:
    """Cut a checkpoint's shard into so many files, each with a part of each larger tensor."""
    with OpenCheckpoint(folder) as opened:
        tensors = {key: opened.read_tensor(key) for key in opened.manifest.tensors}
    content = content_of(folder)
    names = [f"shard-{number:05d}-of-{count:05d}.safetensors" for number in range(count)]
    parts: list[list[tuple[str, int, torch.Tensor]]] = [[] for _ in names]
    at = 0
    for key, tensor in tensors.items():
        content["tensors"][key]["chunks"] = []
        size = max(1, -(-len(tensor) // 8))
        for start in range(0, len(tensor), size):
            parts[at % count].append((key, start, tensor[start : start + size]))
            at += 1
    assert at >= count
    content["files"] = []
    for number, (name, members) in enumerate(zip(names, parts, strict=True)):
        header: dict[str, Any] = {"__metadata__": {"adafisher_dist": content["about"]["id"]}}
        data = b""
        for key, start, part in members:
            raw = part.view(torch.uint8).numpy().tobytes()
            entry = {"dtype": content["tensors"][key]["dtype"], "shape": [len(part)]}
            header[f"{key}[{start}:{start + len(part)}]"] = {**entry, "data_offsets": [len(data), len(data) + len(raw)]}
            data += raw
        text = json.dumps(header).encode()
        for key, start, part in members:
            begin = header[f"{key}[{start}:{start + len(part)}]"]["data_offsets"][0]
            content["tensors"][key]["chunks"].append([start, len(part), number, 8 + len(text) + begin])
        whole = len(text).to_bytes(8, "little") + text + data
        (folder / name).write_bytes(whole)
        content["files"].append({"name": name, "bytes": len(whole), "crc32": f"{zlib.crc32(whole):08x}"})
    for tensor in content["tensors"].values():
        tensor["chunks"].sort()
    (folder / SHARD).unlink()
    write_manifest(folder, content)


class Many(Run):
    """With enough parameters for many shards."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.module = nn.Sequential(*(nn.Linear(4, 4) for _ in range(16)))
        self.optimizer = AdaFisher(self.module.parameters(), block_size=4, rows_per_block=2)

    def train(self, *steps: int) -> Many:
        for step in steps:
            self.optimizer.zero_grad()
            (self.module(torch.ones(3, 4) * step) + 1).square().mean().backward()
            self.optimizer.step()
        return self


@pytest.mark.parametrize(
    ("count", "soft", "hard", "works"), [(512, 1024, 1024, True), (512, 256, 1024, True), (512, 256, 256, False)]
)
def test_many_shards(count: int, soft: int, hard: int, works: bool, folder: Path) -> None:
    """All are open at once. The limit of open files is raised if possible, or an error names it."""

    def work(_: Tell) -> None:
        run = Many().train(1, 2)
        run.save(folder / "a", 2)
        split(folder / "a", count)
        other = Many().train(3)
        before = other.digest()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        held = len(os.listdir("/proc/self/fd"))
        if works:
            assert other.load(folder / "a") == 2 and other.digest() == run.digest()
            assert export_weights(folder / "a", folder / "out")
            assert CliRunner().invoke(app, ["inspect", str(folder / "a"), "--verify"]).exit_code == 0
        else:
            for load in (lambda: other.load(folder / "a"), lambda: export_weights(folder / "a", folder / "out")):
                with pytest.raises(CheckpointError, match=r"has 512 files, of which \d+ could be .*ulimit -n 1024"):
                    load()
            assert other.digest() == before
        assert len(os.listdir("/proc/self/fd")) == held, "handles were left open"

    Child(work).end()


def test_nothing_stays_open(two: Path, folder: Path) -> None:
    """After a load that succeeds, and one that fails anywhere."""
    root, run = Path(shutil.copytree(two, folder / "root")), trained(3)
    held = sorted(os.listdir("/proc/self/fd"))
    run.load(root)
    for name in (SHARD, MANIFEST):
        (root / "step2" / name).write_bytes((root / "step2" / name).read_bytes()[:-1])
        with pytest.raises(CheckpointError):
            run.load(root)
    assert sorted(os.listdir("/proc/self/fd")) == held


# ---- what is said of a save is so ----


@pytest.mark.parametrize("keep_last", [2.5, 2.0, True, "3", math.nan, -1, 0])
def test_keep_last_is_a_whole_number(keep_last: Any, two: Path, folder: Path) -> None:
    """Looked at before anything is written."""
    root, run = Path(shutil.copytree(two, folder / "root")), trained(3)
    for asynchronous in (False, True):
        with pytest.raises(ValueError, match="keep_last should be"):
            run.save(root / "step3", 3, keep_last=keep_last, asynchronous=asynchronous)
    assert visible(root) == {"step1", "step2"} and not leftovers(root)
    run.save(root / "step3", 3, keep_last=np.int64(1))
    assert visible(root) == {"step3"}


def keep_different_numbers(rank: int, world: int, root: str) -> str:
    with pytest.raises(ValueError, match="keep_last") as caught:
        trained(1).save(Path(root) / "a", 1, keep_last=rank + 1)
    assert not list(Path(root).iterdir())
    return str(caught.value)


@pytest.mark.dist
def test_keep_last_is_the_same_on_all_ranks(folder: Path) -> None:
    both = run_ranks(keep_different_numbers, 2, str(folder), timeout=60)
    assert both == ["The ranks give keep_last different values: [1, 2]."] * 2


def die_when(there: Path) -> None:
    """From now on in a thread: end this process by a signal as soon as a file exists."""

    def watch() -> None:
        while not there.exists():
            time.sleep(0.0005)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


@pytest.mark.dist
@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_peer_dies_between_publishing_and_the_last_message(asynchronous: bool, two: Path, folder: Path) -> None:
    """Rank 0 has published, and says so, if it notices at all."""
    root = Path(shutil.copytree(two, folder / "root"))

    def work(rank: int, tell: Tell) -> None:
        run = trained(3)
        if rank == 1:
            die_when(root / "step3" / MANIFEST)
        else:
            publish = CheckpointDirectory.publish
            CheckpointDirectory.publish = lambda *a: (publish(*a), time.sleep(1.0))[0]  # type: ignore[method-assign]
        try:
            run.save(root / "step3", 3, asynchronous=asynchronous).wait()
            tell("saved")
        except CheckpointError as error:
            tell(str(error).replace("\n", " "))

    first, second = (child.end() for child in children(2, folder, work))
    assert second[0] and not first[0] and visible(root) == {"step1", "step2", "step3"}
    assert Run().load(root) == 3
    told = first[1][-1]
    assert told == "saved" or f"{root / 'step3'} was published and is whole" in told, told
    assert "Nothing was published" not in told and not leftovers(root)


@pytest.mark.dist
@pytest.mark.parametrize("published", [True, False])
def test_rank_0_dies_about_publishing(published: bool, two: Path, folder: Path) -> None:
    """The other rank cannot know, says so, and how to look."""
    root = Path(shutil.copytree(two, folder / "root"))

    def work(rank: int, tell: Tell) -> None:
        run = trained(3)
        if rank == 0:
            publish = CheckpointDirectory.publish

            def dies(*arguments: Any) -> None:
                if published:
                    publish(*arguments)
                os.kill(os.getpid(), signal.SIGKILL)

            CheckpointDirectory.publish = dies  # type: ignore[method-assign]
        with pytest.raises(CheckpointError) as caught:
            run.save(root / "step3", 3)
        tell(str(caught.value).replace("\n", " "))

    first, second = (child.end() for child in children(2, folder, work))
    told = second[1][-1]
    assert first[0] and "may have been published" in told and "Nothing was published" not in told, told
    assert f"`python -m adafisher_dist inspect {root / 'step3'}`" in told
    result = CliRunner().invoke(app, ["inspect", str(root / "step3")])
    assert result.exit_code == (0 if published else 2), result.output
    own = told.rpartition("that of this save is ")[2].rstrip(".")
    assert len(own) == 32 and (own in result.output) == published


def test_latest_cannot_be_changed_and_the_rename_not_undone(two: Path, folder: Path) -> None:
    """It is published then, and that is what is said."""
    root = Path(shutil.copytree(two, folder / "root"))

    def work(_: Tell) -> None:
        run, fail = trained(3), failing(errno.EROFS)  # the second does not see what the first lets fail
        before_each_change(nth(2, fail, "os.rename"), nth(2, fail, "os.rename"))
        with pytest.raises(CheckpointError, match="step3 was published and is whole") as caught:
            run.save(root / "step3", 3)
        assert "`latest` could not be changed" in str(caught.value) and "Nothing was" not in str(caught.value)
        before_each_change()
        assert Run().load(root / "step3") == 3 and Run().load(root) == 2

    Child(work).end()
