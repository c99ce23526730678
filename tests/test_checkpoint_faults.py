"""A checkpoint can be trusted: whatever kills a save, fills the disk or damages a file, what has a name is whole.

Saves are cut off, or made to fail, in processes forked for it. Then every bit of model and optimizer is asked for.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import itertools
import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from models import batch, model
from ranks import run_ranks
from torch import nn

from adafisher_dist import AdaFisher, CheckpointError, load_checkpoint, save_checkpoint
from adafisher_dist.checkpoint.manifest import FORMAT, MANIFEST, read
from adafisher_dist.checkpoint.places import Place, latest_tag
from adafisher_dist.checkpoint.reader import read_tensor


class Run:
    """A training of a small model, the same on every rank; its optimizer keeps factors."""

    def __init__(self, **settings: Any) -> None:
        self.module = model()
        self.optimizer = AdaFisher(self.module.parameters(), **{"block_size": 8, "inverse_update_freq": 2, **settings})

    def train(self, *steps: int) -> Run:
        for step in steps:
            self.optimizer.param_groups[0]["lr"] = 1e-2 / (1 + step)  # a setting that tells the steps apart
            x, y = batch(step, 0, 1)
            self.optimizer.zero_grad()
            nn.functional.mse_loss(self.module(x), y).backward()
            self.optimizer.step()
        return self

    def save(self, path: Path, step: int, **more: Any) -> Any:
        return save_checkpoint(path, self.module, self.optimizer, extra={"step": step}, **more)

    def load(self, path: Path, **more: Any) -> int:
        return load_checkpoint(path, self.module, self.optimizer, **more).extra["step"]

    def digest(self) -> str:
        """Of every bit of model and optimizer. A collective."""
        self.optimizer.consolidate_state_dict(to=None)
        whole = self.optimizer.state_dict()
        found = hashlib.sha256(f"{whole['param_groups']} {self.optimizer.skipped_steps}".encode())
        tensors = dict(self.module.state_dict())
        tensors |= {f"{i}/{key}": value for i, entry in whole["state"].items() for key, value in entry.items()}
        for key, value in sorted(tensors.items()):
            if "/fisher_" in key and value.dim() == 3:
                value = value.tril()  # nothing reads the rest, and a checkpoint does not hold it
            found.update(f"{key} {value.dtype} {value.shape}".encode() + value.contiguous().numpy().tobytes())
        return found.hexdigest()


def trained(last: int) -> Run:
    """After the steps 1, …, last."""
    return Run().train(*range(1, last + 1))


@functools.cache
def digest_after(step: int) -> str:
    return trained(step).digest()


class Digests(dict[int, str]):
    """Of the training after each step."""

    def __missing__(self, step: int) -> str:
        return digest_after(step)


@pytest.fixture
def folder() -> Iterator[Path]:
    """An empty one. In memory, where there is such a disk: a kill does not lose what the kernel was given."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as made:
        yield Path(made)


# ---- what happens to the disk ----

# As Python tells an audit hook before it happens.
CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir"}
_acts: list[Callable[[str], Any]] = []
_watched: list[bool] = []


def before_each_change(*acts: Callable[[str], Any]) -> None:
    """Call them with the name of each change of the disk, right before it; "write" with half of it written.

    They take the place of earlier ones. For processes that end with the test: what watches the disk cannot be undone.
    """
    if not _watched:
        _watch()
    _acts[:] = acts


def _tell(event: str) -> None:
    for act in _acts:
        act(event)


def _watch() -> None:
    _watched.append(True)
    fsync, opened = os.fsync, Path.open

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in CHANGES or (event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR)):
            _tell(event)

    def told(handle: int) -> None:
        _tell("fsync")
        fsync(handle)

    os.fsync = told
    Path.open = lambda path, *arguments, **more: Torn(opened(path, *arguments, **more))
    sys.addaudithook(hook)


class Torn:
    """A file that tells when half of what it was given is on the disk: at first, and then from time to time."""

    def __init__(self, file: Any) -> None:
        self._file, self._count = file, itertools.count()

    def write(self, data: Any) -> int:
        half, count = len(data) // 2, next(self._count)
        self._file.write(data[:half])
        self._file.flush()
        if count < 2 or count % 10 == 0:
            _tell("write")
        self._file.write(data[half:])
        return len(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> Torn:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def nth(number: int, do: Callable[[str], None], only: str | None = None) -> Callable[[str], None]:
    """Do it once: at the n-th change, or the n-th of one kind."""
    count = itertools.count(1)

    def act(event: str) -> None:
        if only in (None, event) and next(count) == number:
            do(event)

    return act


def kill(_: str) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def failing(code: int) -> Callable[[str], None]:
    def fail(event: str) -> None:
        raise OSError(code, os.strerror(code), f"{event}, says the test")

    return fail


# ---- processes that are killed ----

Tell = Callable[[str], None]


class Child:
    """A forked process: it works until it is killed, and what it tells can be read afterwards."""

    def __init__(self, work: Callable[[Tell], Any]) -> None:
        mine, theirs = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os._exit(_work(work, lambda text: os.write(theirs, f"{text}\n".encode()) and None))
        os.close(theirs)
        self._told = os.fdopen(mine)

    def line(self) -> str:
        """The next that it tells; waits for it."""
        return self._told.readline().strip()

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)

    def end(self, timeout: float = 60) -> tuple[bool, list[str]]:
        """Whether it was killed, and what else it told, when it has ended."""
        deadline = time.monotonic() + timeout
        while os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is None:
            if time.monotonic() > deadline:
                self.kill()
                raise AssertionError(f"hung for {timeout} s")
            time.sleep(0.001)
        status = os.waitpid(self.pid, 0)[1]
        with self._told:
            told = self._told.read().splitlines()
        killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        if not killed and status != 0:
            raise AssertionError("\n".join(told))
        return killed, told


def _work(work: Callable[[Tell], Any], tell: Tell) -> int:
    try:
        work(tell)
    except BaseException:
        tell(traceback.format_exc())
        return 1
    return 0


def children(world: int, folder: Path, work: Callable[[int, Tell], Any]) -> list[Child]:
    """One alone, or some that share a gloo group; `work` is given the rank."""
    if world == 1:
        return [Child(lambda tell: work(0, tell))]
    store = f"file://{tempfile.mkdtemp(dir=folder)}/store"

    def joined(rank: int, tell: Tell) -> None:
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
        work(rank, tell)

    return [Child(lambda tell, rank=rank: joined(rank, tell)) for rank in range(world)]


# ---- what is asked of a folder of checkpoints ----


def visible(root: Path) -> set[str]:
    return {path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith(".")}


def leftovers(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir() if path.name.startswith("."))


def check(root: Path, digests: dict[int, str], least: int | None) -> int | None:
    """What has a name is whole, and `latest` leads to a checkpoint that is no older than the last completed one.

    Args:
        root: the folder.
        digests: for each step of which a save began, of what should have been saved.
        least: the last step of which a save was completed.

    Returns:
        The step that `latest` leads to.
    """
    for tag in visible(root) if root.exists() else ():
        run = Run()
        step = run.load(root / tag)
        assert run.digest() == digests[step], f"{tag} does not hold what was saved at step {step}"
    if least is None and latest_tag(root) is None:
        with pytest.raises(CheckpointError):
            Run().load(root)
        return None
    run = Run()
    step = run.load(root)
    assert run.digest() == digests[step], f"latest does not lead to what was saved at step {step}"
    assert least is None or step >= least, f"latest leads back to step {step}; step {least} was completed"
    return step


def check_that_saves_go_on(root: Path, tag: str) -> None:
    """The next save is complete, and takes away what others have left."""
    trained(4).save(root / tag, 4, keep_last=2)
    assert leftovers(root) == [], "left over after the next save"
    assert len(visible(root)) <= 2, "keep_last=2"
    assert latest_tag(root) == tag and check(root, Digests(), 4) == 4


# ---- killed at a change of the disk ----

# What is saved over the checkpoints step1 and step2 (first: over none): a tag, and other arguments.
SCENES: dict[str, tuple[str, dict[str, Any]]] = {
    "first": ("step3", {}),
    "new": ("step3", {"keep_last": 2}),
    "same": ("step2", {}),
    "new in the background": ("step3", {"keep_last": 1, "asynchronous": True}),
    "same in the background": ("step2", {"keep_last": 1, "asynchronous": True}),
}


def slow_but(*fast: Any, of: Any) -> list[Any]:
    """Parameters of which only some are for every day."""
    return [
        pytest.param(*(p if isinstance(p, tuple) else (p,)), marks=() if p in fast else pytest.mark.slow) for p in of
    ]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the checkpoints step1 and step2."""
    root = tmp_path_factory.mktemp("two")
    for step in (1, 2):
        trained(step).save(root / f"step{step}", step)
    return root


def roots(scene: str, two: Path, folder: Path) -> Iterator[tuple[int, Path]]:
    """Folders to save into, as many as are wanted."""
    for number in itertools.count(1):
        yield number, folder / "none" if scene == "first" else Path(shutil.copytree(two, folder / "root"))
        for path in folder.iterdir():
            shutil.rmtree(path)


def killed_at(number: int, save: Callable[[], Any]) -> tuple[bool, list[str]]:
    """Save in a process that is killed before its n-th change of the disk: whether it was, and all changes begun."""

    def work(tell: Tell) -> None:
        before_each_change(tell, nth(number, kill))
        save().wait()

    return Child(work).end()


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
    # What a kill does not show, but a power cut would: every file and their folder are on the disk before a rename.
    written = events[: events.index("os.rename")]
    assert events.count("fsync") > written.count("fsync") > written.count("open")


@pytest.mark.parametrize(
    ("tag", "made"), slow_but(("step2", True), of=list(itertools.product(["step2", "step3"], [True, False])))
)
def test_killed_again_after_a_kill_between_two_renames(tag: str, made: bool, two: Path, folder: Path) -> None:
    """The checkpoint that was put aside is the newest one until the next is published, whoever makes its folder."""
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


def killed_again_and_again(rounds: int, seed: int, two: Path, folder: Path) -> None:
    """Kills in one folder, each in what the last ones have left; from time to time a save is completed."""
    draw, run, least, tag, digests = random.Random(seed), trained(2), 2, "step2", Digests()
    root = Path(shutil.copytree(two, folder / "root"))
    for step in range(3, 3 + rounds):
        digests[step] = run.train(step).digest()
        number, tag = draw.randrange(1, 50), draw.choice([tag, tag, f"step{step}"])
        more = {"keep_last": draw.choice([None, 1, 2]), "asynchronous": draw.random() < 0.5}
        killed, events = killed_at(number, lambda tag=tag, step=step, more=more: run.save(root / tag, step, **more))
        try:
            least = check(root, digests, least if killed else step)
        except Exception as error:
            raise AssertionError(f"at step {step}, kill {number} ({events[-1]}) of {tag}, {more}: {error}") from error
    check_that_saves_go_on(root, "another")


def test_killed_again_and_again(two: Path, folder: Path) -> None:
    killed_again_and_again(30, 1, two, folder)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2, 12))
def test_killed_very_often(seed: int, two: Path, folder: Path) -> None:
    killed_again_and_again(150, seed, two, folder)


# ---- killed at any time ----


def tag_of(tags: str, step: int) -> str:
    return "only" if tags == "same" else f"step{step}"


def train_and_save(root: Path, tags: str, asynchronous: bool, tell: Tell) -> None:
    """Go on from the last checkpoint, and save after every step. What is told is the journal of the saves."""
    run, saving, step = Run(), None, 0
    if latest_tag(root) is not None:
        step = run.load(root)
    while True:
        step += 1
        digest = run.train(step).digest()  # while the last step is being saved
        if saving is not None:
            saving.wait()
            tell(f"ended {step - 1}")
        tell(f"began {step} {digest}")
        saving = run.save(root / tag_of(tags, step), step, keep_last=2, asynchronous=asynchronous)
        if not asynchronous:
            tell(f"ended {step}")
            saving = None


def journal(lines: list[str], digests: dict[int, str], least: int | None) -> int | None:
    """Note what was to be saved, the same as before the kill; the last step whose save was completed."""
    for line in lines:
        what, step, *digest = line.split()
        if what == "began":
            assert digests.setdefault(int(step), *digest) == digest[0], f"step {step} went otherwise after a kill"
        else:
            least = int(step)
    return least


def killed_at_any_time(world: int, tags: str, asynchronous: bool, rounds: int, seed: int, folder: Path) -> None:
    draw, root, least, digests = random.Random(seed), folder / "root", None, {}
    for _ in range(rounds):
        ranks = children(world, folder, lambda _, tell: train_and_save(root, tags, asynchronous, tell))
        lines = [ranks[0].line() for _ in range(draw.randint(1, 5))]  # so many saves have begun or ended
        time.sleep(draw.uniform(0, 0.03))
        for child in draw.sample(ranks, world):
            child.kill()
        ends = [child.end() for child in ranks]
        assert all(killed for killed, _ in ends)
        least = check(root, digests, journal([*lines, *ends[0][1]], digests, least))
    assert least is not None, "no save was completed"
    run, step = Run(), 10**6
    run.load(root)
    digests[step] = run.train(step).digest()
    run.save(root / tag_of(tags, step), step, keep_last=2)
    assert check(root, digests, step) == step and leftovers(root) == []
    assert len(visible(root)) == (1 if tags == "same" else 2)


LOOPS = list(itertools.product([1, 2], ["new", "same"], [False, True]))


@pytest.mark.parametrize(("world", "tags", "asynchronous"), [*LOOPS[:4], LOOPS[4]])
def test_killed_at_any_time(world: int, tags: str, asynchronous: bool, folder: Path) -> None:
    killed_at_any_time(world, tags, asynchronous, 8 if world == 1 else 3, 3, folder)


@pytest.mark.slow
@pytest.mark.parametrize(("world", "tags", "asynchronous"), LOOPS)
def test_killed_at_any_time_often(world: int, tags: str, asynchronous: bool, folder: Path) -> None:
    killed_at_any_time(world, tags, asynchronous, 40, 4, folder)


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
        with pytest.raises(CheckpointError, match="step3 was not written"):
            run.save(root / "step3", 3, keep_last=2)

    ends = [child.end() for child in children(2, folder, work)]
    assert ends[victim][0] and not ends[1 - victim][0]
    named = (kind, number) == ("os.rename", 2)  # and `latest` still names the one before
    assert visible(root) == {"step1", "step2", *(["step3"] if named else [])}
    step = Run().load(root)
    assert step == 2
    check_that_saves_go_on(root, "step4")


# ---- damage ----

SHARDS = ["shard-00000-of-00002.safetensors", "shard-00001-of-00002.safetensors"]
FILES = [*SHARDS, MANIFEST]


def save_two(rank: int, world: int, root: str) -> None:
    trained(1).save(Path(root) / "other", 1)
    trained(2).save(Path(root) / "here", 2)


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


class Bystander:
    """A training that a load may not touch if it fails."""

    def __init__(self) -> None:
        self.run = Run().train(5)
        self.digest, self.random = self.run.digest(), torch.get_rng_state()

    def refuses(self, path: Path, **more: Any) -> str:
        """Load: the error. It names the path."""
        with pytest.raises(CheckpointError) as caught:
            self.run.load(path, **more)
        assert self.run.digest() == self.digest and torch.equal(torch.get_rng_state(), self.random)
        assert str(path) in str(caught.value)
        return str(caught.value)


def flipped(content: bytes, position: int, mask: int) -> bytes:
    return content[:position] + bytes([content[position] ^ mask]) + content[position + 1 :]


def flip_all_over(name: str, here: Path, count: int) -> None:
    """Change the first byte, the last, the length of a safetensors header, some in it, and others all over the file."""
    content, bystander, draw = (here / name).read_bytes(), Bystander(), random.Random(name)
    header = 8 + int.from_bytes(content[:8], "little") if name in SHARDS else 0
    positions = [0, len(content) - 1, *(draw.randrange(len(content)) for _ in range(count))]
    positions += [*range(8), *(draw.randrange(8, header) for _ in range(20))] if header else []
    for position in positions:
        damage = flipped(content, position, draw.randrange(1, 256))
        if name == MANIFEST and says_the_same(damage, content):
            continue
        (here / name).write_bytes(damage)
        assert name in bystander.refuses(here), position
    (here / name).write_bytes(content)
    assert bystander.run.load(here) == 2 and bystander.run.digest() == Digests()[2]


def says_the_same(damage: bytes, content: bytes) -> bool:
    """One white space for another, or 1e-05 as 1E-05."""
    try:
        return json.loads(damage) == json.loads(content)
    except ValueError:
        return False


@pytest.mark.parametrize(("name", "count"), [*((name, 60) for name in FILES), *slow_but(of=[(n, 3000) for n in FILES])])
def test_a_byte_changes(name: str, count: int, damaged: Path) -> None:
    flip_all_over(name, damaged, count)


def rewrite(change: Callable[[bytes], bytes]) -> Callable[[Path], Any]:
    return lambda path: path.write_bytes(change(path.read_bytes()))


def swap(path: Path) -> None:
    partner = path.with_name(next(name for name in SHARDS if name != path.name))
    path.rename(path.with_name("aside"))
    partner.rename(path)
    path.with_name("aside").rename(partner)


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "deleted": Path.unlink,
    "empty": rewrite(lambda content: b""),
    "half": rewrite(lambda content: content[: len(content) // 2]),
    "without its last byte": rewrite(lambda content: content[:-1]),
    "with a byte more": rewrite(lambda content: content + b"\0"),
    "twice": rewrite(lambda content: content * 2),
    "zeros": rewrite(lambda content: bytes(len(content))),
    "flipped": rewrite(lambda content: flipped(content, len(content) // 2, 1)),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "a dangling link": lambda path: (path.unlink(), path.symlink_to("nowhere")),
    "of another checkpoint": lambda path: shutil.copy(path.parent.parent / "other" / path.name, path),
    "swapped": swap,
}


def named_for(name: str, how: str) -> list[str]:
    """What the error should name. A manifest of another checkpoint is whole itself: the shards do not fit it."""
    if how == "swapped" or (name, how) == (MANIFEST, "of another checkpoint"):
        return SHARDS
    return [name]


KEEPING_SIZE = ("zeros", "flipped", "of another checkpoint", "swapped")
CASES = [(name, how) for name in FILES for how in DAMAGES if (name == SHARDS[0] or how != "swapped")]


@pytest.mark.parametrize(("name", "how"), CASES)
def test_a_file_is_damaged(name: str, how: str, damaged: Path) -> None:
    """The error names the file; without checksums too, where the size tells."""
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
    assert "has format 1" in message and f"reads {FORMAT}: load it with the version that saved it" in message
    for newer in ({**content, "format": FORMAT + 1}, {"format": FORMAT + 1, "everything": "else"}):
        (damaged / MANIFEST).write_bytes(with_checksum(newer))
        message = Bystander().refuses(damaged)
        assert f"has format {FORMAT + 1}" in message and "update adafisher_dist" in message


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
        if event == "open" and str(arguments[0]).endswith(f"/{name}"):
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
    """Neither through the functions that there are for it, nor by who has taken hold of them before."""
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
    here = of_two_ranks / "here"
    manifest, covered = read(here), 0
    for name in SHARDS:
        with safe_open(here / name, framework="pt") as shard:
            for key in shard.keys():  # noqa: SIM118 (it is no dict)
                tensor, (whole, _, span) = shard.get_tensor(key), key.rpartition("[")
                start, stop = map(int, span.rstrip("]").split(":"))
                assert torch.equal(tensor, read_tensor(here, manifest, whole)[start:stop])
                covered += tensor.numel()
    assert covered == sum(tensor.numel for tensor in manifest.tensors.values())


# ---- a disk that is full, or says no ----

CODES = {"full": errno.ENOSPC, "broken": errno.EIO, "forbidden": errno.EACCES}


def fail_and_check(number: int, code: int, run: Run, path: Path, arguments: dict[str, Any], tell: Tell) -> None:
    """One save in which the n-th change of the disk fails: it says so and has changed nothing, or it is complete."""
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
    """With room for one page, two, …, until there is enough. Not asked how much it has, it fails in a file."""
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
    """Both ranks tell which, and why; nothing is published, nothing lies about, and the next save succeeds."""
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
from test_checkpoint_faults import Place, trained
prepare = Place.prepare
Place.prepare = lambda place: (time.sleep(0.3), prepare(place))
trained(1).save(Path({root!r}) / "last", 1, asynchronous=True)
"""


def test_a_script_that_ends_waits_for_its_last_checkpoint(folder: Path) -> None:
    script = AT_EXIT.format(path=[str(Path(__file__).parent), os.getcwd()], root=str(folder))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert visible(folder) == {"last"} and check(folder, Digests(), 1) == 1, done.stderr


# ---- wrong arguments ----


@pytest.mark.parametrize("keep_last", [0, -1])
def test_nothing_would_be_kept(keep_last: int, two: Path) -> None:
    with pytest.raises(ValueError, match=f"keep_last should be at least 1, got {keep_last}"):
        trained(3).save(two / "step3", 3, keep_last=keep_last)
    assert visible(two) == {"step1", "step2"} and check(two, Digests(), 2) == 2


@pytest.mark.parametrize("tag", ["", ".", "..", "latest", ".hidden", "a/b", "/", "a/../b"])
def test_names_that_a_checkpoint_cannot_have(tag: str, folder: Path) -> None:
    with pytest.raises(ValueError, match="cannot be the name of a checkpoint"):
        Place(folder, tag)


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
    with pytest.raises(TypeError, match="The optimizer is a SGD; these checkpoints are AdaFisher's"):
        call(two / "step1", run.module, torch.optim.SGD(run.module.parameters(), lr=0.1))
    assert run.digest() == Digests()[3] and check(two, Digests(), 2) == 2


def test_a_checkpoint_of_another_training(two: Path) -> None:
    """What does not fit is listed, and nothing has changed: names and shapes, then the optimizer's settings."""
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
    ({"run": (Place, 1)}, r"extra\['run'\]\[0\] is a builtins.type"),
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
