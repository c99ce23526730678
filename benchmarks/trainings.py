"""Trainings that compare optimizers: how one goes, and the file of those that are done.

The file has a line of JSON a training. Several processes may append to it at once, and may be
killed at any time: a training of hours goes on where it last saved itself.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import math
import multiprocessing
import os
import platform
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import optimizers
import torch
from torch import Tensor, nn

WARM_UP, CLIP = 0.05, 1.0
WITHOUT_STATE_DICT = {"prototype"}  # such a training begins anew
SAVE_EVERY = 300.0  # processor seconds


@dataclass(frozen=True, slots=True)
class Task:
    """A task: `build(seed)`, `loss(model, seed, step)`, and the held-out loss `validate(model)`.

    Attributes:
        tokens: that a whole training sees: bytes of text, or images.
        test: the held-out loss of data that nothing was chosen by, where there are such.
    """

    steps: int
    tokens: int
    build: Callable[[int], nn.Module]
    loss: Callable[[nn.Module, int, int], Tensor]
    validate: Callable[[nn.Module], float]
    test: Callable[[nn.Module], float] | None = None


@dataclass(frozen=True, slots=True)
class Run:
    """What a training is a function of.

    Attributes:
        task, optimizer: names.
        lr: the largest of the schedule.
        wd: the decoupled weight decay.
        seed: of initial weights and batches.
        settings: the optimizer's others, as JSON with sorted keys: see `written`.
    """

    task: str
    optimizer: str
    lr: float
    wd: float = 0.1
    seed: int = 0
    settings: str = "{}"

    def __str__(self) -> str:
        more = "" if self.settings == "{}" else f" {self.settings}"
        return f"{self.task} {self.optimizer}{more} lr {self.lr:g} wd {self.wd:g} seed {self.seed}"


@dataclass(frozen=True, slots=True)
class Result:
    """What came of a training.

    Attributes:
        losses: held out, at each tenth; None where it was not finite, and the training ended.
        commit: of the code, with a plus where it had been changed.
        seconds: of processor time.
        machine: the processor.
        state_bytes: of the optimizers' tensors, for each trained element.
        versions: of torch and the packages that an optimizer is from.
    """

    losses: tuple[float | None, ...]
    commit: str = ""
    seconds: float = math.nan
    machine: str = ""
    state_bytes: float = math.nan
    versions: str = ""

    @property
    def final(self) -> float:
        """The last held-out loss, infinite if it diverged."""
        last = self.losses[-1]
        return math.inf if last is None else last


Done = Mapping[Run, Result]


def written(settings: Mapping[str, Any]) -> str:
    """Settings as a `Run` has them."""
    return json.dumps(settings, sort_keys=True)


def train(run: Run, task: Task, unfinished: Path | None = None, reported: bool = False) -> Result:
    """Train from the seed's weights on the seed's batches.

    Args:
        run: what is trained.
        task: its task.
        reported: whether nothing is chosen by it: its losses are those of the task's test data,
            where it has any.
        unfinished: a folder where the training saves itself, and goes on from; it ends as one
            that was never stopped, to the bit.
    """
    torch.manual_seed(run.seed)
    model = task.build(run.seed)
    made = optimizers.build(run.optimizer, model, run.lr, run.wd, json.loads(run.settings))
    rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in made]
    marks = {round(task.steps * i / 10) for i in range(1, 11)}
    if run.optimizer in WITHOUT_STATE_DICT:
        unfinished = None
    saved = Unfinished(unfinished, run, model, made) if unfinished else None
    start, losses, before = saved.load() if saved else (0, [], 0.0)
    began = last = time.process_time()
    for step in range(start, task.steps):
        if saved and time.process_time() - last > SAVE_EVERY:
            last = time.process_time()
            saved.save(step, losses, before + last - began)
        for optimizer, own in zip(made, rates, strict=True):
            for group, rate in zip(optimizer.param_groups, own, strict=True):
                group["lr"] = rate * schedule(step, task.steps)
        if not one_step(task, model, made, run.seed, step):
            losses.append(None)
            break
        if step + 1 in marks:
            losses.append(measured(task.test if reported and task.test else task.validate, model))
    seconds = round(before + time.process_time() - began, 1)
    if saved:
        saved.path.unlink(missing_ok=True)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return Result(
        tuple(losses), commit(), seconds, processor(), round(optimizers.state_bytes(made) / trained, 2), versions()
    )


def one_step(task: Task, model: nn.Module, made: list[optimizers.Optimizer], seed: int, step: int) -> bool:
    """Whether the loss was finite; it trains only then."""
    for optimizer in made:
        optimizer.zero_grad()
    loss = task.loss(model, seed, step)
    if not math.isfinite(loss.item()):
        return False
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), CLIP)
    for optimizer in made:
        optimizer.step()
    return True


class Unfinished:
    """The file of a training that may be stopped: all that its next steps are a function of."""

    def __init__(self, folder: Path, run: Run, model: nn.Module, made: list[optimizers.Optimizer]) -> None:
        name = hashlib.sha256(f"{run} {commit()} {versions()}".encode()).hexdigest()[:16]
        self.path, self._parts = folder / f"{name}.pt", [model, *made]

    def load(self) -> tuple[int, list[float | None], float]:
        """The next step, the losses, and the seconds so far."""
        if not self.path.exists():
            return 0, [], 0.0
        found = torch.load(self.path, weights_only=True)
        for part, state in zip(self._parts, found["states"], strict=True):
            part.load_state_dict(state)
        torch.set_rng_state(found["random"])
        return found["step"], found["losses"], found["seconds"]

    def save(self, step: int, losses: list[float | None], seconds: float) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        states = [part.state_dict() for part in self._parts]
        whole = {"step": step, "losses": losses, "seconds": seconds, "random": torch.get_rng_state(), "states": states}
        written = self.path.with_suffix(".part")
        torch.save(whole, written)
        written.replace(self.path)


def schedule(step: int, steps: int) -> float:
    """Warm-up, then a cosine to 0."""
    warm = max(1, round(WARM_UP * steps))
    return (step + 1) / warm if step < warm else 0.5 * (1 + math.cos(math.pi * (step - warm) / (steps - warm)))


@torch.no_grad()
def measured(loss_of: Callable[[nn.Module], float], model: nn.Module) -> float | None:
    model.eval()
    loss = loss_of(model)
    model.train()
    return round(loss, 5) if math.isfinite(loss) else None


def commit() -> str:
    told = [
        subprocess.run(["git", *words], cwd=Path(__file__).parent, capture_output=True, text=True, check=False).stdout
        for words in (("rev-parse", "--short", "HEAD"), ("status", "--porcelain", "--", ":/*.py"))
    ]
    return told[0].strip() + ("+" if told[1].strip() else "")


def processor() -> str:
    info = Path("/proc/cpuinfo")
    models = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return models[0].partition(":")[2].strip() if models else platform.processor() or platform.machine()


def versions() -> str:
    """Of what a figure depends on, where it is installed."""
    found = []
    for package in ("adafisher-dist", "torch", "pytorch_optimizer", "heavyball"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found.append(f"{package} {metadata.version(package)}")
    return ", ".join(found)


# ---- the file ----


def read(path: Path) -> dict[Run, Result]:
    """The finished trainings in the order of the file; of one that stands there twice, the last.

    Raises:
        ValueError: a line of the file is no training.
    """
    done = {}
    for number, line in enumerate(path.read_bytes().splitlines() if path.exists() else (), 1):
        try:
            run, result = _parse(json.loads(line))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}, line {number}, is no finished training: {line[:80]!r}; delete it.") from error
        done[run] = result
    return done


def append(path: Path, run: Run, result: Result) -> None:
    """Add a line. What a writer that was killed left of its own is cut off."""
    entry = {**asdict(run), "settings": json.loads(run.settings), **asdict(result)}
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)
        file.write(json.dumps(entry).encode() + b"\n")


def _parse(entry: dict[str, Any]) -> tuple[Run, Result]:
    run = {name: entry.pop(name) for name in ("task", "optimizer", "lr", "wd", "seed", "settings")}
    return Run(**{**run, "settings": written(run["settings"])}), Result(**{**entry, "losses": tuple(entry["losses"])})


# ---- several at once ----


def carry_out(
    wanted: Callable[[Done], Iterable[Run]], path: Path, one: Callable[[Run], Result], workers: int
) -> dict[Run, Result]:
    """Train until nothing more is wanted, in processes of one thread each.

    Args:
        wanted: the trainings to do, the most wanted first; it is asked again after each.
        path: the file.
        one: carries out a training; a function at the top of a module.
        workers: processes.

    Raises:
        Exception: a worker's own; the others are ended, and what is finished is in the file.
    """
    done = read(path)
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _prepare)
    running: dict[Future[Result], Run] = {}
    try:
        while True:
            todo = [run for run in wanted(done) if run not in done and run not in running.values()]
            for run in todo[: workers - len(running)]:
                running[pool.submit(one, run)] = run
            if not running:
                break
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                run = running.pop(future)
                done[run] = future.result()
                append(path, run, done[run])
                print(f"{done[run].final:.4f}  {run}  {done[run].seconds:.0f} s; {len(todo)} to do", flush=True)
    except BaseException:
        for process in multiprocessing.active_children():  # a training may have hours to go
            process.terminate()
        raise
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    return done


def _prepare() -> None:
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all of a terminal's processes; the parent decides
    threading.Thread(target=_leave_with, args=(multiprocessing.parent_process(),), daemon=True).start()


def _leave_with(parent: multiprocessing.process.BaseProcess) -> None:
    """A parent that is killed cannot end its workers, and they would train on."""
    parent.join()
    os._exit(1)
