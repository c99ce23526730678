"""Whatever kills a save or fills the disk, named checkpoints are whole, and the last one is there.

Saves are cut off, or made to fail, in processes forked for it. Then every bit of model and
optimizer is asked for.
"""

from __future__ import annotations

import errno
import itertools
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from checkpoint_runs import (
    Child,
    Digests,
    Run,
    Tell,
    before_each_change,
    check,
    check_that_saves_go_on,
    children,
    failing,
    kill,
    leftovers,
    nth,
    slow_but,
    trained,
    visible,
)
from ranks import run_ranks
from save_loops import killed_at

from adafisher_dist import CheckpointError

# ---- killed at a change of the disk ----

# What is saved over the checkpoints step1 and step2 (first: over none): a tag, and other arguments.
SCENES: dict[str, tuple[str, dict[str, Any]]] = {
    "first": ("step3", {}),
    "new": ("step3", {"keep_last": 2}),
    "same": ("step2", {}),
    "new in the background": ("step3", {"keep_last": 1, "asynchronous": True}),
    "same in the background": ("step2", {"keep_last": 1, "asynchronous": True}),
}


def roots(scene: str, two: Path, folder: Path) -> Iterator[tuple[int, Path]]:
    """Folders to save into, as many as are wanted."""
    for number in itertools.count(1):
        yield number, folder / "none" if scene == "first" else Path(shutil.copytree(two, folder / "root"))
        for path in folder.iterdir():
            shutil.rmtree(path)


@pytest.mark.parametrize("scene", slow_but("first", "same", "new in the background", of=SCENES))
def test_killed_at_every_change_of_the_disk(scene: str, two: Path, folder: Path) -> None:
    """Between any two system calls, and in the middle of writes."""
    (tag, arguments), run, problems = SCENES[scene], trained(3), []
    for number, root in roots(scene, two, folder):
        killed, events = killed_at(number, lambda root=root: run.save(root / tag, 3, **arguments))
        try:
            reached = check(root, Digests(), 3 if not killed else None if scene == "first" else 2)
            assert reached != 2 or "step1" in visible(root), "an old one was deleted before the new one was published"
            if root.exists():
                check_that_saves_go_on(Path(shutil.copytree(root, folder / "copy")), tag)
            check_that_saves_go_on(root, "another")
        except Exception as error:
            problems.append(f"{number} ({events[-1]}): {error!r}")
        if not killed:
            break
    assert {"os.mkdir", "open", "write", "fsync", "os.rename"} <= set(events) and number > 20
    assert not problems, f"of {number} kills:\n" + "\n".join(problems)
    # What a kill does not show, but a power cut would: every file and their folder are on the disk
    # before a rename.
    written = events[: events.index("os.rename")]
    assert events.count("fsync") > written.count("fsync") > written.count("open")


@pytest.mark.parametrize(
    ("tag", "made"), slow_but(("step2", True), of=list(itertools.product(["step2", "step3"], [True, False])))
)
def test_killed_again_after_a_kill_between_two_renames(tag: str, made: bool, two: Path, folder: Path) -> None:
    """The checkpoint put aside is the newest until the next one is published.

    Also where an empty folder has its name.
    """
    run = trained(3)
    for number, root in roots("same", two, folder):
        (root / "step2").rename(root / ".step2.replaced")
        if made:
            (root / "step2").mkdir()
        killed, events = killed_at(number, lambda root=root: run.save(root / tag, 3))
        try:
            check(root, Digests(), 2 if killed else 3)
            check_that_saves_go_on(root, "another")
        except Exception as error:
            raise AssertionError(f"{number} ({events[-1]})") from error
        if not killed:
            break


# A rank, and at which change of its disk it is killed while the other one lives on.
VICTIMS = [(1, "open", 1), (1, "write", 3), (1, "fsync", 1), (0, "os.mkdir", 1), (0, "write", 3), (0, "fsync", 2),
           (0, "os.rename", 1), (0, "os.rename", 2)]  # fmt: skip


@pytest.mark.dist
@pytest.mark.parametrize(("victim", "kind", "number"), VICTIMS)
def test_one_rank_of_two_is_killed(victim: int, kind: str, number: int, two: Path, folder: Path) -> None:
    """The other neither waits for ever nor publishes half a checkpoint."""
    root = Path(shutil.copytree(two, folder / "root"))

    def work(rank: int, tell: Tell) -> None:
        run = trained(3)
        before_each_change(*([nth(number, kill, kind)] if rank == victim else []))
        with pytest.raises(CheckpointError, match="step3 was not written") as caught:
            run.save(root / "step3", 3, keep_last=2)
        # Rank 0 may have published once it had this rank's part, which it has when both have
        # written theirs.
        early = victim == 1 or kind in ("os.mkdir", "write")
        assert ("may have been published" in str(caught.value)) != early, str(caught.value)
        assert ("Nothing was published" in str(caught.value)) == early

    ends = [child.end() for child in children(2, folder, work)]
    assert ends[victim][0] and not ends[1 - victim][0]
    named = (kind, number) == ("os.rename", 2)  # and `latest` still names the one before
    assert visible(root) == {"step1", "step2", *(["step3"] if named else [])}
    step = Run().load(root)
    assert step == 2
    check_that_saves_go_on(root, "step4")


# ---- a disk that is full, or says no ----

CODES = {"full": errno.ENOSPC, "broken": errno.EIO, "forbidden": errno.EACCES}


def fail_and_check(number: int, code: int, run: Run, path: Path, arguments: dict[str, Any], tell: Tell) -> None:
    """A save whose n-th disk change fails: it raises and has changed nothing, or it is complete."""
    root, before, events, error = path.parent, visible(path.parent), [], None
    before_each_change(events.append, nth(number, failing(code)))
    try:
        run.save(path, 3, **arguments).wait()
    except CheckpointError as caught:
        error = str(caught)
    before_each_change()
    tell(f"{len(events)} {events[min(number, len(events)) - 1]}")
    assert run.digest() == Digests()[3]
    if error is not None:
        assert "Rank 0" in error and os.strerror(code) in error and f"{path} was not written" in error, error
        assert visible(root) == before and not leftovers(root), f"{error} There are {sorted(os.listdir(root))}"
        assert check(root, Digests(), 2) == 2, f"{error} But latest leads to it"
    else:
        assert check(root, Digests(), 3) == 3
    run.save(path, 3, **arguments).wait()  # nothing is broken
    assert check(root, Digests(), 3) == 3 and not leftovers(root)


DAILY = [("new", "full"), ("same in the background", "broken")]


@pytest.mark.parametrize(("scene", "code"), slow_but(*DAILY, of=list(itertools.product(list(SCENES)[1:], CODES))))
def test_any_change_of_the_disk_fails(scene: str, code: str, two: Path, folder: Path) -> None:
    (tag, arguments), run, problems, events = SCENES[scene], trained(3), [], set()
    for number, root in roots(scene, two, folder):
        child = Child(lambda tell, n=number, r=root: fail_and_check(n, CODES[code], run, r / tag, arguments, tell))
        length, _, event = child.line().partition(" ")
        try:
            child.end()
        except AssertionError as error:
            told = [line for line in str(error).splitlines() if "Error" in line]
            problems.append(f"{number} ({event}): {told[-1]}")
        if not length.isdigit() or int(length) < number:
            break
        events.add(event)
    assert events >= {"os.mkdir", "open", "write", "fsync", "os.rename"} and number > 20
    assert not problems, f"of {number} failures:\n" + "\n".join(problems)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of its own, of 256 KiB."""
    made = tmp_path / "disk"
    made.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(made)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("a tmpfs cannot be mounted here (that takes root)")
    yield made
    subprocess.run(["umount", str(made)], check=True)


def lies(free: int) -> Any:
    """In the place of shutil.disk_usage."""
    return lambda _: shutil._ntuple_diskusage(free, 0, free)


@pytest.mark.parametrize("asked", [True, False], ids=["asked", "not asked"])
def test_a_real_disk_is_full(asked: bool, small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Room for 1, 2, … pages, until it is enough; if free space is not asked for, a write fails."""
    root, filler, run = small_disk / "root", small_disk / "filler", trained(2)
    trained(1).save(root / "old", 1)
    room = shutil.disk_usage(small_disk).free
    if not asked:
        monkeypatch.setattr(shutil, "disk_usage", lies(2**60))
    problems, refused = [], 0
    for pages in range(1, 40):
        filler.write_bytes(bytes(room - 4096 * pages))
        try:
            run.save(root / "new", 2)
            break
        except CheckpointError as error:
            refused += "has 4096 free" in str(error) if asked and pages == 1 else "No space left" in str(error)
            if visible(root) != {"old"} or leftovers(root) or check(root, Digests(), 1) != 1:
                problems.append(f"{pages} pages: {error} There are {sorted(os.listdir(root))}")
                shutil.rmtree(root)
                filler.unlink()
                trained(1).save(root / "old", 1)
        finally:
            filler.unlink(missing_ok=True)
    assert 10 < pages < 39 and check(root, Digests(), 2) == 2 and not leftovers(root)
    assert refused == pages - 1 if not asked else refused > 0
    assert not problems, "\n".join(problems)


# The rank that fails, with which error, at which change of its disk.
ALONE: dict[str, tuple[int, str, str, int, int]] = {
    "shard, rank 0": (0, "No space left", "write", 3, errno.ENOSPC),
    "shard, rank 1": (1, "No space left", "write", 3, errno.ENOSPC),
    "end of a shard, rank 1": (1, "Input/output error", "fsync", 1, errno.EIO),
    "may not write, rank 1": (1, "Permission denied", "open", 1, errno.EACCES),
    "may not make the folder, rank 0": (0, "Permission denied", "os.mkdir", 2, errno.EACCES),
    "manifest, rank 0": (0, "No space left", "open", 2, errno.ENOSPC),
    "may not rename, rank 0": (0, "Read-only file system", "os.rename", 1, errno.EROFS),
    "no room, rank 0": (0, "has 1 free", "disk_usage", 1, 0),
}


def fails_on_one_rank(rank: int, world: int, folder: str, asynchronous: bool) -> list[str]:
    root, run, messages, real = Path(folder), trained(2), [], shutil.disk_usage
    trained(1).save(root / "old", 1)
    for faulty, _, kind, number, code in ALONE.values():
        before_each_change(*([nth(number, failing(code), kind)] if rank == faulty else []))
        shutil.disk_usage = lies(1) if kind == "disk_usage" else real
        with pytest.raises(CheckpointError) as caught:
            run.save(root / "new", 2, asynchronous=asynchronous).wait()
        messages.append(str(caught.value))
        shutil.disk_usage = real
        dist.barrier()
        assert run.digest() == Digests()[2] and Run().load(root) == 1
        assert visible(root) == {"old"} and not leftovers(root), messages[-1]
        dist.barrier()
    run.save(root / "new", 2, asynchronous=asynchronous).wait()
    dist.barrier()
    assert Run().load(root) == 2 and visible(root) == {"old", "new"}
    return messages


@pytest.mark.dist
@pytest.mark.parametrize("asynchronous", [False, True])
def test_one_rank_cannot_write(asynchronous: bool, folder: Path) -> None:
    """Both ranks name the rank and the cause; nothing is published or left; the next save works."""
    both = run_ranks(fails_on_one_rank, 2, str(folder / "root"), asynchronous, timeout=60)
    for (what, (faulty, cause, *_)), *messages in zip(ALONE.items(), *both, strict=True):
        for message in messages:
            told = (f"Rank {faulty}: ", cause, str(folder / "root" / "new"))
            assert all(part in message for part in told), f"{what}: {message}"


def in_the_background(root: Path, act: Callable[[Run, Any], None]) -> None:
    """A save in the background fails while training goes on, which does not feel it; then act."""

    def work(_: Tell) -> None:
        run = trained(1)
        run.save(root / "old", 1)
        before_each_change(nth(3, failing(errno.ENOSPC), "write"))
        saving = run.train(2).save(root / "lost", 2, asynchronous=True)
        run.train(3)
        while not saving.done():
            time.sleep(0.001)
        assert run.train(4).digest() == Digests()[4]
        act(run, saving)
        run.save(root / "next", 4, asynchronous=True).wait()  # it was told, and is forgotten
        assert visible(root) == {"old", "next"} and check(root, Digests(), 4) == 4 and not leftovers(root)

    Child(work).end()


LOST = r"lost was not written.*No space left"


def test_a_failure_in_the_background_is_told_by_wait(folder: Path) -> None:
    def act(run: Run, saving: Any) -> None:
        with pytest.raises(CheckpointError, match=LOST):
            saving.wait()

    in_the_background(folder, act)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_failure_in_the_background_is_told_by_the_next_save(asynchronous: bool, folder: Path) -> None:
    def act(run: Run, saving: Any) -> None:
        with pytest.raises(CheckpointError, match=LOST):
            run.save(folder / "next", 4, asynchronous=asynchronous)
        assert visible(folder) == {"old"} and not leftovers(folder)

    in_the_background(folder, act)


def test_a_failure_in_the_background_is_told_by_the_next_load(folder: Path) -> None:
    def act(run: Run, saving: Any) -> None:
        with pytest.raises(CheckpointError, match=LOST):
            run.load(folder)
        assert run.digest() == Digests()[4]

    in_the_background(folder, act)


# A script that ends while its checkpoint is being written, which takes a while.
AT_EXIT = """
import sys, time
sys.path[:0] = {path!r}
from pathlib import Path
from checkpoint_runs import trained
from adafisher_dist.checkpoint.directory import CheckpointDirectory
prepare = CheckpointDirectory.prepare
CheckpointDirectory.prepare = lambda place: (time.sleep(0.3), prepare(place))
trained(1).save(Path({root!r}) / "last", 1, asynchronous=True)
"""


def test_a_script_that_ends_waits_for_its_last_checkpoint(folder: Path) -> None:
    script = AT_EXIT.format(path=[str(Path(__file__).parent), os.getcwd()], root=str(folder))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert visible(folder) == {"last"} and check(folder, Digests(), 1) == 1, done.stderr
