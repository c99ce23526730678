"""A small training compared bit for bit with its checkpoints, and saves that are killed or fail."""

from __future__ import annotations

import builtins
import functools
import hashlib
import itertools
import json
import os
import signal
import sys
import tempfile
import time
import traceback
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from models import batch, model
from tally import Foreign, Hung, Lost
from torch import nn

from adafisher_dist import AdaFisher, CheckpointError, load_checkpoint, save_checkpoint
from adafisher_dist.checkpoint.directory import latest_tag
from adafisher_dist.checkpoint.manifest import MANIFEST


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


# ---- what a manifest says ----


def change_manifest(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the content of a checkpoint's manifest, with the right checksum."""
    content = json.loads((folder / MANIFEST).read_bytes())["content"]
    change(content)
    crc32 = zlib.crc32(json.dumps(content, sort_keys=True, separators=(",", ":")).encode())
    (folder / MANIFEST).write_text(json.dumps({"crc32": f"{crc32:08x}", "content": content}))


def as_version_0_1_wrote_it(content: dict[str, Any]) -> None:
    """Change into format 3: a backend, other numbers of blocks, no grafting in the structure."""
    content["format"], content["about"]["versions"]["adafisher_dist"] = 3, "0.1.0"
    for group in content["about"]["optimizer"]["groups"]:
        group["settings"]["backend"] = "auto"
    for entry in content["about"]["optimizer"]["state"].values():
        del entry["structure"]["grafting"]
        entry["blocks"] = entry["dense_blocks"] = entry["blocks"] + 3


# ---- what happens to the disk ----

# As Python tells an audit hook before it happens.
CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir"}
_acts: list[Callable[[str], Any]] = []
_watched: list[bool] = []


def before_each_change(*acts: Callable[[str], Any]) -> None:
    """Call `acts` with the name of each disk change, right before it; at "write", half is written.

    They take the place of earlier ones. For processes that end with the test: what watches the disk
    cannot be undone.
    """
    if not _watched:
        _watch()
    _acts[:] = acts


def _tell(event: str) -> None:
    for act in _acts:
        act(event)


def _watch() -> None:
    _watched.append(True)
    fsync, opened, plain = os.fsync, Path.open, builtins.open

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in CHANGES or (event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR)):
            _tell(event)

    def told(handle: int) -> None:
        _tell("fsync")
        fsync(handle)

    os.fsync = told
    Path.open = lambda path, *arguments, **more: Torn(opened(path, *arguments, **more))
    builtins.open = lambda *arguments, **more: _torn(plain(*arguments, **more))  # DeepSpeed's
    sys.addaudithook(hook)


def _torn(file: Any) -> Any:
    return Torn(file) if file.writable() and "b" not in file.mode else file


class Torn:
    """A file that reports when half of a write is on the disk: first two, then every tenth."""

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
                raise Hung(f"hung for {timeout} s")
            time.sleep(0.001)
        status = os.waitpid(self.pid, 0)[1]
        with self._told:
            told = self._told.read().splitlines()
        killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        if not killed and status != 0:
            raise Foreign("\n".join(told))
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
    """Check that named checkpoints are whole, and `latest` no older than the last completed save.

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
    if least is not None and step < least:
        raise Lost(f"latest leads back to step {step}; step {least} was completed")
    return step


def check_that_saves_go_on(root: Path, tag: str) -> None:
    """The next save is complete, and takes away what others have left."""
    trained(4).save(root / tag, 4, keep_last=2)
    assert leftovers(root) == [], "left over after the next save"
    assert len(visible(root)) <= 2, "keep_last=2"
    assert latest_tag(root) == tag and check(root, Digests(), 4) == 4


# ---- which tests are for every day ----


def slow_but(*fast: Any, of: Any) -> list[Any]:
    """Parameters of which only some are for every day."""
    return [
        pytest.param(*(p if isinstance(p, tuple) else (p,)), marks=() if p in fast else pytest.mark.slow) for p in of
    ]


def write_manifest(folder: Path, content: Any) -> None:
    """With the right checksum."""
    crc32 = zlib.crc32(json.dumps(content, sort_keys=True, separators=(",", ":")).encode())
    (folder / MANIFEST).write_text(json.dumps({"crc32": f"{crc32:08x}", "content": content}))


def content_of(folder: Path) -> Any:
    return json.loads((folder / MANIFEST).read_bytes())["content"]
