"""Refuse damaged files and wrong arguments with the reason; change nothing, unpickle nothing."""

from __future__ import annotations

import errno
import json
import os
import pickle
import random
import shutil
import sys
import zipfile
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from checkpoint_runs import (
    Child,
    Digests,
    Run,
    Tell,
    check,
    kill,
    leftovers,
    trained,
    visible,
)
from damage import (
    DAMAGES,
    FILES,
    SHARDS,
    Bystander,
    flip,
    named_for,
    positions_of,
    save_two,
)  # fmt: skip
from models import model
from ranks import run_ranks
from torch import nn

from adafisher_dist import AdaFisher, CheckpointError, load_checkpoint, save_checkpoint
from adafisher_dist.checkpoint import targets
from adafisher_dist.checkpoint.directory import CheckpointDirectory
from adafisher_dist.checkpoint.manifest import CHECKPOINT_FORMAT, MANIFEST, WITH_PARTS
from adafisher_dist.checkpoint.open_checkpoint import OpenCheckpoint
from adafisher_dist.comm.host_groups import HostGroup

# ---- damage ----


@pytest.fixture(scope="module")
def of_two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the checkpoints other and here, saved by two ranks."""
    root = tmp_path_factory.mktemp("of-two-ranks")
    run_ranks(save_two, 2, str(root))
    return root


@pytest.fixture
def damaged(of_two_ranks: Path, folder: Path) -> Path:
    """A copy of the checkpoint here, to be damaged; other is beside it."""
    return Path(shutil.copytree(of_two_ranks, folder / "copy")) / "here"


@pytest.mark.parametrize(("name", "count"), [(name, 60) for name in FILES])
def test_a_byte_changes(name: str, count: int, damaged: Path) -> None:
    draw, bystander = random.Random(name), Bystander()
    for position in positions_of(damaged / name, count, draw):
        flip(damaged / name, position, draw.randrange(1, 256), bystander)
    assert bystander.run.load(damaged) == 2 and bystander.run.digest() == Digests()[2]


KEEPING_SIZE = ("flipped",)  # and the header
CASES = [(name, how) for name in FILES for how in DAMAGES if (name == SHARDS[0] or how != "swapped")]


@pytest.mark.parametrize(("name", "how"), CASES)
def test_a_file_is_damaged(name: str, how: str, damaged: Path) -> None:
    """The error names the file; without checksums too, where its size or its header tells."""
    DAMAGES[how](damaged / name)
    for verify in (True, False) if how not in KEEPING_SIZE else (True,):
        message = Bystander().refuses(damaged, verify=verify)
        assert all(own in message for own in named_for(name, how)), message


def with_checksum(content: Any) -> bytes:
    crc32 = zlib.crc32(json.dumps(content, sort_keys=True, separators=(",", ":")).encode())
    return json.dumps({"crc32": f"{crc32:08x}", "content": content}).encode()


def test_a_shard_in_the_place_of_another_of_the_same_size(damaged: Path) -> None:
    """The error tells whose place it is."""
    shutil.copy(damaged / SHARDS[0], damaged / SHARDS[1])
    content = json.loads((damaged / MANIFEST).read_bytes())["content"]
    content["files"][1]["bytes"] = content["files"][0]["bytes"]
    (damaged / MANIFEST).write_bytes(with_checksum(content))
    message = Bystander().refuses(damaged)
    assert f"{SHARDS[1]} has checksum" in message and f"holds what {SHARDS[0]} should hold" in message


@pytest.mark.parametrize("kind", ["weight", "momentum", "fisher", "square", "factor", "curvature"])
def test_a_manifest_that_contradicts_itself(kind: str, damaged: Path) -> None:
    """A tensor that it describes is not in it, or shorter."""
    content = json.loads((damaged / MANIFEST).read_bytes())["content"]
    key, tensor = next((key, tensor) for key, tensor in content["tensors"].items() if key.startswith(f"{kind}/"))
    tensor["numel"] -= 1
    tensor["chunks"][-1][1] -= 1
    (damaged / MANIFEST).write_bytes(with_checksum(content))
    needed = f"{tensor['numel']} elements of {key}, and should have {tensor['numel'] + 1}"
    assert needed in Bystander().refuses(damaged, verify=False)
    del content["tensors"][key]
    (damaged / MANIFEST).write_bytes(with_checksum(content))
    assert f"it has 0 elements of {key}, and should have" in Bystander().refuses(damaged)


NO_MANIFESTS = {
    "text": b"hello", "list": b"[]", "null": b"null", "number": b"42", "string": b'"content"', "object": b"{}",
    "no checksum": b'{"content": {}}', "wrong checksum": b'{"crc32": 3, "content": {"format": 1}}',
    "content of another type": b'{"crc32": "00000000", "content": [1, 2]}', "not UTF-8": b"\xff\xfe\xfa",
    "deep": b"[" * 100_000, "long": b"1" * 10_000, "not a number": b'{"crc32": NaN, "content": {"format": NaN}}',
}  # fmt: skip


@pytest.mark.parametrize("content", NO_MANIFESTS.values(), ids=NO_MANIFESTS)
def test_a_manifest_that_is_none(content: bytes, damaged: Path) -> None:
    (damaged / MANIFEST).write_bytes(content)
    assert str(damaged / MANIFEST) in Bystander().refuses(damaged)


def test_another_format(damaged: Path) -> None:
    """Whatever else it holds."""
    content = json.loads((damaged / MANIFEST).read_bytes())["content"]
    (damaged / MANIFEST).write_bytes(with_checksum({**content, "format": 1}))
    message = Bystander().refuses(damaged)
    own = f"reads {CHECKPOINT_FORMAT} and {WITH_PARTS}"
    assert "has format 1" in message and f"{own}: load it with the version that saved it" in message
    for newer in ({**content, "format": WITH_PARTS + 1}, {"format": WITH_PARTS + 1, "everything": "else"}):
        (damaged / MANIFEST).write_bytes(with_checksum(newer))
        message = Bystander().refuses(damaged)
        assert f"has format {WITH_PARTS + 1}" in message and "update adafisher_dist" in message


class LosesARank:
    """A wrapper as ZeRO-3's, whose collective after a checkpoint fails."""

    def checkpoint_event_prologue(self) -> None:
        pass

    def checkpoint_event_epilogue(self) -> None:
        raise RuntimeError("Connection closed by peer")


def test_a_rank_that_is_lost_hides_no_error() -> None:
    """DeepSpeed gathers parameters when a save or a load has ended, however it ended."""
    lossy: Any = SimpleNamespace(wrapper=LosesARank(), hosts=HostGroup(None, 0, 1))
    with (
        pytest.raises(CheckpointError, match="step3 was not written"),
        targets.partitioned(lossy, "It was loaded"),
    ):
        raise CheckpointError("step3 was not written")
    with (
        pytest.raises(
            CheckpointError, match=r"It was loaded, and.*could not gather.*closed by peer.*Start all ranks again"
        ),
        targets.partitioned(lossy, "It was loaded"),
    ):
        pass


def test_a_damaged_checkpoint_says_what_to_do(damaged: Path) -> None:
    another = "Load another checkpoint of its folder"
    content = json.loads((damaged / MANIFEST).read_bytes())["content"]
    next(iter(content["tensors"].values()))["numel"] += 1
    (damaged / MANIFEST).write_bytes(with_checksum(content))
    assert another in Bystander().refuses(damaged)
    (damaged / MANIFEST).write_bytes(b"{}")
    assert another in Bystander().refuses(damaged)
    (damaged.parent / "latest").write_text("hexe")
    told = Bystander().refuses(damaged.parent)
    assert f"{damaged.parent / 'latest'} names it" in told and "load one by its name" in told
    (damaged.parent / "latest").write_bytes(b"\xff")
    assert "Write the tag that is meant into it" in Bystander().refuses(damaged.parent)


LATEST = {"empty": b"", "a tag that is gone": b"step7", "not UTF-8": b"\xff\xfe", "outside": b"../here",
          "two lines": b"here\nother", "zero": b"\0", "none": None}  # fmt: skip


@pytest.mark.parametrize("content", LATEST.values(), ids=LATEST)
def test_latest_is_damaged(content: bytes | None, damaged: Path) -> None:
    """The error lists the checkpoints, which can still be loaded by their own names."""
    (damaged.parent / "latest").unlink()
    if content is not None:
        (damaged.parent / "latest").write_bytes(content)
    message = Bystander().refuses(damaged.parent)
    assert "here" in message.replace(str(damaged.parent), "") and "other" in message
    assert Run().load(damaged) == 2


ON_TWO_RANKS = [(name, how) for name, how in CASES if how not in ("empty", "twice", "without its last byte")]


def damage_on_two_ranks(rank: int, world: int, root: str, source: str) -> list[str]:
    here, bystander, messages = Path(root) / "here", Bystander(), []
    for name, how in [*ON_TWO_RANKS, (MANIFEST, None)]:
        if rank == 0:
            shutil.rmtree(root, ignore_errors=True)
            shutil.copytree(source, root)
            DAMAGES.get(how, lambda path: None)(here / name)
        dist.barrier()
        if how is not None:
            messages.append(bystander.refuses(here))
        else:
            assert bystander.run.load(here) == 2  # in the end a whole one
        dist.barrier()
    return messages


@pytest.mark.dist
def test_damage_on_two_ranks(of_two_ranks: Path, folder: Path) -> None:
    """Both raise and name the same file, nobody waits, and nothing has changed."""
    both = run_ranks(damage_on_two_ranks, 2, str(folder / "root"), str(of_two_ranks), timeout=60)
    for (name, how), *messages in zip(ON_TWO_RANKS, *both, strict=True):
        for message in messages:
            assert all(own in message for own in named_for(name, how)), f"{name} {how}: {messages}"


def may_not_read(name: str) -> None:
    """From now on in this process. root may read all, so the kernel's answer is played."""

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and Path(str(arguments[0])).name == name:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(arguments[0]))

    sys.addaudithook(hook)


@pytest.mark.parametrize("name", [*FILES, "latest"])
def test_a_file_that_may_not_be_read(name: str, of_two_ranks: Path) -> None:
    def work(_: Tell) -> None:
        bystander = Bystander()
        may_not_read(name)
        message = bystander.refuses(of_two_ranks)
        assert name in message and "Permission denied" in message

    Child(work).end()


def one_rank_sees_less(rank: int, world: int, root: str, what: str) -> str:
    bystander, path = Bystander(), Path(root)
    if rank == 1 and what == "another checkpoint":
        path = path / "other"
    elif rank == 1:
        may_not_read(what)
    with pytest.raises(CheckpointError) as caught:
        bystander.run.load(path)
    assert bystander.run.digest() == bystander.digest
    return str(caught.value)


@pytest.mark.dist
@pytest.mark.parametrize("what", ["another checkpoint", "latest", MANIFEST, SHARDS[1]])
def test_one_rank_sees_less(what: str, of_two_ranks: Path) -> None:
    """What one rank alone cannot read, or reads from elsewhere, both refuse."""
    word = "see different checkpoints" if what == "another checkpoint" else "Permission denied"
    assert all(word in message for message in run_ranks(one_rank_sees_less, 2, str(of_two_ranks), what, timeout=60))


# ---- nothing is unpickled ----


class Unpickled(AssertionError):
    """Something was."""


def test_nothing_is_unpickled(of_two_ranks: Path) -> None:
    """Neither by pickle's and torch's functions, nor by references taken to them earlier."""
    early = pickle.loads

    def refuse(*_: Any, **__: Any) -> Any:
        raise Unpickled

    def work(_: Tell) -> None:
        for owner, names in {
            pickle: ("load", "loads", "Unpickler"),
            torch: ("load",),
            torch.serialization: ("_load",),
        }.items():
            for name in names:
                setattr(owner, name, refuse)
        sys.addaudithook(lambda event, _: refuse() if event == "pickle.find_class" else None)
        for unpickle in (early, pickle.loads):
            with pytest.raises(Unpickled):
                unpickle(pickle.dumps(Path("it works")))
        run = Run()
        assert run.load(of_two_ranks) == 2 and run.digest() == Digests()[2]

    Child(work).end()


def test_no_file_is_a_pickle(of_two_ranks: Path) -> None:
    """Nor a zip, as torch.save writes."""
    files = [path for path in of_two_ranks.rglob("*") if path.is_file()]
    assert len(files) == 7
    for path in files:
        content = path.read_bytes()
        assert not zipfile.is_zipfile(path) and not content.startswith((b"\x80", b"PK", b"\x1f\x8b"))
        assert content[:1] == b"{" if path.name == MANIFEST else path.name == "latest" or content[8:9] == b"{"


def test_safetensors_reads_the_shards(of_two_ranks: Path) -> None:
    """Each tensor there is a range of a global one, as its name says, and has its values."""
    safe_open = pytest.importorskip("safetensors").safe_open
    here, covered = of_two_ranks / "here", 0
    with OpenCheckpoint(here) as opened:
        for name in SHARDS:
            with safe_open(here / name, framework="pt") as shard:
                assert shard.metadata() == {"adafisher_dist": opened.manifest.about["id"]}
                for key in shard.keys():  # noqa: SIM118 (it is no dict)
                    tensor, (whole, _, span) = shard.get_tensor(key), key.rpartition("[")
                    start, stop = map(int, span.rstrip("]").split(":"))
                    assert torch.equal(tensor, opened.read_tensor(whole)[start:stop])
                    covered += tensor.numel()
    assert covered == sum(tensor.numel for tensor in opened.manifest.tensors.values())


# ---- wrong arguments ----


@pytest.mark.parametrize("keep_last", [0, -1])
def test_nothing_would_be_kept(keep_last: int, two: Path) -> None:
    with pytest.raises(ValueError, match=f"keep_last should be at least 1, got {keep_last}"):
        trained(3).save(two / "step3", 3, keep_last=keep_last)
    assert visible(two) == {"step1", "step2"} and check(two, Digests(), 2) == 2


@pytest.mark.parametrize("tag", ["", ".", "..", "latest", ".hidden", "a/b", "/", "a/../b"])
def test_names_that_a_checkpoint_cannot_have(tag: str, folder: Path) -> None:
    with pytest.raises(ValueError, match="cannot be the name of a checkpoint"):
        CheckpointDirectory(folder, tag)


UNUSUAL = [" a", "a ", "a\n", "a\nb", "\ta", "a\0b", "x" * 300, "\u00e9\u4e2d", "\udcff", "-rf", "a.saving"]


@pytest.mark.parametrize("tag", UNUSUAL, ids=ascii)
def test_unusual_names_are_found_again_or_refused(tag: str, two: Path, folder: Path) -> None:
    """Above all, `latest` does not name what cannot be found."""
    root = Path(shutil.copytree(two, folder / "root"))
    try:
        trained(3).save(root / tag, 3)
    except (ValueError, CheckpointError):
        assert visible(root) == {"step1", "step2"} and check(root, Digests(), 2) == 2 and not leftovers(root)
    else:
        assert check(root, Digests(), 3) == 3


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("what", ["a folder", "a file", "under a file"])
def test_something_else_has_the_name(what: str, asynchronous: bool, folder: Path) -> None:
    """It stays as it is, and is no checkpoint to load."""
    mine = folder / "mine"
    target = mine / "tag" if what == "under a file" else mine
    note = mine / "note" if what == "a folder" else mine
    note.parent.mkdir(exist_ok=True)
    note.write_text("mine")
    with pytest.raises(CheckpointError, match=str(target)):
        trained(1).save(target, 1, asynchronous=asynchronous).wait()
    assert [path.name for path in folder.iterdir()] == ["mine"] and note.read_text() == "mine"
    Bystander().refuses(target)


def test_there_is_nothing(folder: Path) -> None:
    Bystander().refuses(folder)
    Bystander().refuses(folder / "none")


@pytest.mark.parametrize("call", [save_checkpoint, load_checkpoint])
def test_an_optimizer_of_another_model_or_class(call: Any, two: Path) -> None:
    run = trained(3)
    with pytest.raises(ValueError, match=r"parameters that are not in the model.*the model that it was built for"):
        call(two / "step1", model(), run.optimizer)
    with pytest.raises(TypeError, match="The optimizer should be an AdaFisher, got SGD"):
        call(two / "step1", run.module, torch.optim.SGD(run.module.parameters(), lr=0.1))
    with pytest.raises(TypeError, match=r"The model should be a torch\.nn\.Module, got OrderedDict"):
        call(two / "step1", run.module.state_dict(), run.optimizer)
    assert run.digest() == Digests()[3] and check(two, Digests(), 2) == 2


def test_a_checkpoint_of_another_training(two: Path) -> None:
    """What does not fit is listed and nothing changes: names, shapes, the optimizer's settings."""
    stranger = nn.Linear(3, 2)
    before = [p.clone() for p in stranger.parameters()]
    with pytest.raises(CheckpointError, match=r"step2 does not fit:(.|\n)*Nothing was changed"):
        load_checkpoint(two, stranger, AdaFisher(stranger.parameters()))
    assert all(torch.equal(p, q) for p, q in zip(stranger.parameters(), before, strict=True))
    run = Run(block_size=4).train(5)
    digest = run.digest()
    with pytest.raises(CheckpointError, match="block_size=8, here 4"):
        run.load(two)
    assert run.digest() == digest


UNPICKLABLE = [
    (kill, "extra is a builtins.function"),
    ({"a": [1, {"b": object()}]}, r"extra\['a'\]\[1\]\['b'\] is a builtins.object"),
    ({"run": (CheckpointDirectory, 1)}, r"extra\['run'\]\[0\] is a builtins.type"),
]


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize(("extra", "where"), UNPICKLABLE)
def test_what_only_pickle_could_save(extra: Any, where: str, asynchronous: bool, folder: Path) -> None:
    run = trained(1)
    with pytest.raises(TypeError, match=where):
        save_checkpoint(folder / "a", run.module, run.optimizer, extra=extra, asynchronous=asynchronous)
    assert not list(folder.iterdir())


def wrong_on_one_rank(rank: int, world: int, root: str) -> list[str]:
    run, messages = trained(1), []
    for wrong in ({"extra": object()}, {"keep_last": 0}):
        with pytest.raises((TypeError, ValueError) if rank == 1 else CheckpointError) as caught:
            save_checkpoint(Path(root) / "a", run.module, run.optimizer, **(wrong if rank == 1 else {}))
        messages.append(str(caught.value))
    assert not list(Path(root).iterdir())
    return messages


@pytest.mark.dist
def test_wrong_arguments_on_one_rank(folder: Path) -> None:
    """All stop, and all know why."""
    first, second = run_ranks(wrong_on_one_rank, 2, str(folder), timeout=60)
    for one, other in zip(first, second, strict=True):
        assert one.startswith("Rank 1 failed, so all stop.") and other in one
