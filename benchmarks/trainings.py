"""Single trainings of convergence.py, and the file in which the finished ones are kept.

The file has a line of JSON a training. Several processes may append to it at once, and may be
killed at any time.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import common
import torch
from optimizers import contenders
from tasks import Task, tasks
from torch import nn

VALIDATIONS = 20  # in a training, besides the one before it
WARM_UP = 0.1  # of the steps


@dataclass(frozen=True, slots=True)
class Run:
    """What a training is a function of.

    Attributes:
        task, optimizer: names.
        settings: the optimizer's, besides the learning rate, as JSON with sorted keys.
        lr: the largest of the schedule.
        seed: of initial weights and batches.
        steps: length of the training and of its schedule.
    """

    task: str
    optimizer: str
    settings: str
    lr: float
    seed: int
    steps: int

    def __str__(self) -> str:
        return f"{self.task} · {self.optimizer} · lr {self.lr:g} · seed {self.seed}"


@dataclass(frozen=True, slots=True)
class Curve:
    """What came of a training.

    Attributes:
        at: steps done at each validation.
        losses: validation losses, to six significant digits.
        diverged: whether a loss was not finite; the training ended there.
    """

    at: list[int]
    losses: list[float]
    diverged: bool

    @property
    def final(self) -> float:
        """The last validation loss, infinite if it diverged."""
        return math.inf if self.diverged else self.losses[-1]


def train(run: Run) -> Curve:
    """Train from the seed's weights on its batches; the same on every call, whatever ran before."""
    task = tasks()[run.task]
    torch.manual_seed(run.seed)
    model = task.build()
    optimizers = contenders()[run.optimizer].build(model, task, run.lr)
    every = max(1, run.steps // VALIDATIONS)
    at: list[int] = []
    losses: list[float] = []
    for step in range(run.steps + 1):
        if step % every == 0 or step == run.steps:
            found = validate(task, model)
            if not math.isfinite(found):
                return Curve(at, losses, diverged=True)
            at.append(step)
            losses.append(common.rounded(found, 6))
        if step == run.steps:
            break
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = run.lr * schedule(step, run.steps)
        try:
            if not math.isfinite(train_step(task, model, optimizers, run.seed, step)):
                return Curve(at, losses, diverged=True)
        except torch.linalg.LinAlgError:  # SOAP's eigendecomposition, of gradients that overflowed
            return Curve(at, losses, diverged=True)
    return Curve(at, losses, diverged=False)


def train_step(task: Task, model: nn.Module, optimizers: list[torch.optim.Optimizer], seed: int, step: int) -> float:
    """Take a training step; returns the loss before it. If that is not finite, it does nothing."""
    for optimizer in optimizers:
        optimizer.zero_grad()
    loss = task.loss(model, seed, step)
    value = loss.item()
    if math.isfinite(value):
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
    return value


@torch.no_grad()
def validate(task: Task, model: nn.Module) -> float:
    model.eval()
    loss = task.validate(model)
    model.train()
    return loss


def schedule(step: int, steps: int) -> float:
    """Warm-up, then a cosine to 2 %, as in launch/trainer.py, which would bring DeepSpeed along."""
    warm = max(1, round(WARM_UP * steps))
    if step < warm:
        return (step + 1) / warm
    done = (step - warm) / max(1, steps - warm)
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done))


# ---- the file ----


def read(path: Path) -> dict[Run, Curve]:
    """All finished trainings.

    Raises:
        ValueError: a line of the file is no training.
    """
    done = {}
    with _locked(path):
        lines = _whole_lines(path)
    for number, line in enumerate(lines, 1):
        try:
            run, curve = _parse(line)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}, line {number}, is no finished training: {line[:80]!r}; delete it.") from error
        done[run] = curve
    return done


def append(path: Path, run: Run, curve: Curve) -> None:
    entry = {**asdict(run), "settings": json.loads(run.settings), **asdict(curve)}
    with _locked(path):
        _whole_lines(path)
        with path.open("ab", buffering=0) as file:
            file.write(json.dumps(entry, ensure_ascii=False).encode() + b"\n")


def forget(path: Path, unwanted: Callable[[Run], bool]) -> int:
    """Take trainings out of the file; returns how many there were."""
    with _locked(path):
        lines = _whole_lines(path)
        kept = [line for line in lines if not unwanted(_parse(line)[0])]
        if len(kept) < len(lines):
            beside = path.with_suffix(".new")
            beside.write_bytes(b"".join(line + b"\n" for line in kept))
            beside.replace(path)
    return len(lines) - len(kept)


def written(settings: object) -> str:
    """Settings as they stand in a Run."""
    return json.dumps(settings, sort_keys=True, ensure_ascii=False)


def _parse(line: bytes) -> tuple[Run, Curve]:
    entry = json.loads(line)
    curve = Curve(*(entry.pop(name) for name in ("at", "losses", "diverged")))
    return Run(**{**entry, "settings": written(entry["settings"])}), curve


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Keep other readers and writers out. Locks the folder, since `forget` replaces the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def _whole_lines(path: Path) -> list[bytes]:
    """The file's lines. An incomplete last one, left by a killed process, is cut off the file."""
    text = path.read_bytes() if path.exists() else b""
    whole = text[: text.rfind(b"\n") + 1]
    if len(whole) < len(text):
        os.truncate(path, len(whole))
    return whole.splitlines()
