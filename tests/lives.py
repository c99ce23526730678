"""Trainings in each layout whose ranks are killed in a step or a save; the next ones resume.

Each pair of ranks lives once: it loads what is there, trains a step, saves, and some of it is
killed meanwhile. Their journals, files in the folder of the checkpoints, outlive them.
"""

from __future__ import annotations

import hashlib
import os
import random
import signal
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from checkpoint_runs import before_each_change, kill, nth
from fault_points import Points, at_collective, watching
from fault_runs import PARTS, SETTINGS, SLACK, TIMEOUT, start
from layout_runs import Run
from ranks import run_ranks
from tally import Foreign, Hung, Lost, Tally, Wrong, explained

from adafisher_dist import AdaFisher, load_checkpoint, save_checkpoint

LAYOUTS = ["zero3", "fsdp2", "zero1", "ddp", "zero2", "hsdp", "zero0"]
WORLD = 2
MEETING = 60.0  # seconds that ranks give each other to be ready


class Plan(NamedTuple):
    """What is to happen in a life.

    Attributes:
        victims: the ranks that are killed.
        where: "step" or "save"; nobody is killed "nowhere".
        at: the collective of the step, or the change of the disk, at which they are.
        begun: right after the collective has begun, not before.
        after: seconds after the save began, instead of `at`.
    """

    layout: str
    on_device: bool = False
    victims: tuple[int, ...] = ()
    where: str = "nowhere"
    at: int = 0
    begun: bool = False
    after: float | None = None


def planned(layout: str, where: str, draw: random.Random) -> Plan:
    """One that is drawn; in a step one rank alone is killed."""
    one = (draw.randrange(WORLD),)
    if where == "step":
        return Plan(layout, draw.random() < 0.5, one, where, draw.randint(1, 6), draw.random() < 0.5)
    after = draw.choice([None, draw.uniform(0, 0.2)])
    return Plan(layout, False, draw.choice([one, (0, 1)]), where, draw.randint(1, 25), after=after)


# ---- in a rank ----


class Life(Run):
    """A rank's training, which remembers its steps."""

    def __init__(self, plan: Plan, rank: int, world: int, folder: Path) -> None:
        super().__init__(plan.layout, rank, world, SETTINGS)
        self.plan, self.folder, self.step = plan, folder, 0
        self.base = self.optimizer if self.engine is None else self.engine.basic_optimizer
        self._journal = os.open(journal_of(folder, rank), os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def note(self, *words: object) -> None:
        os.write(self._journal, (" ".join(map(str, words)).replace("\n", "↵") + "\n").encode())

    def resume(self) -> None:
        """From the last checkpoint, if there is one."""
        if not (self.folder / "latest").exists():
            return
        if self.engine is not None:
            self.engine.load_checkpoint(str(self.folder))
            self.step = self.engine.global_steps
        else:
            self.step = load_checkpoint(self.folder, self.module, self.optimizer).extra["step"]
        self.note("loaded", self.step, self.digest())

    def save_to_folder(self) -> None:
        if self.engine is not None:
            self.engine.save_checkpoint(str(self.folder), f"step{self.step}")
        else:
            save_checkpoint(self.folder / f"step{self.step}", self.module, self.optimizer, extra={"step": self.step})

    def digest(self) -> str:
        """Of every bit of this rank's weights and state that a checkpoint holds."""
        found = hashlib.sha256()
        for tensor in self.held():
            value = tensor.detach().contiguous()
            found.update(f"{value.dtype}{tuple(value.shape)}".encode() + value.numpy().tobytes())
        return found.hexdigest()

    def held(self) -> list[torch.Tensor]:
        shards = self.base._registry.stepper.planned
        fields = [
            value.tril() if name == "fisher" and value.dim() > 2 else value
            for shard in shards
            for stack in shard.stacks
            for name, value in sorted(stack.state.items())
        ]
        weights = [tensor for group in self.base.param_groups for tensor in group["params"]]
        local = [tensor.to_local() if hasattr(tensor, "to_local") else tensor for tensor in weights]
        return [*local, *fields, *(shard.counters for shard in shards)]

    def meet(self) -> None:
        """Wait until all are as far: whoever is killed at once would else be missed before."""
        self.note("ready")
        deadline = time.monotonic() + MEETING
        for rank in range(self.world):
            while "ready\n" not in journal_of(self.folder, rank).read_text():
                assert time.monotonic() < deadline, f"rank {rank} is not there"
                time.sleep(0.001)

    def one_step(self) -> None:
        self.train(self.step, self.step + 1)
        self.step += 1


def life(rank: int, world: int, folder: str, plan: Plan) -> None:
    """Resume, take a step, save; whoever the plan names is killed at some point of it."""
    start(plan.on_device)
    run = Life(plan, rank, world, Path(folder))
    run.resume()
    run.one_step()  # the first after a load makes what later ones have
    run.meet()
    if plan.where == "step" and rank in plan.victims:
        with suppress(Exception), watching(Points(at_collective(plan.at, plan.begun), die)):
            run.one_step()
        run.note("unreached")  # or the others have ended theirs, and are gone
        die()
    if plan.where == "step":
        return watch(run, survive_step)
    run.note("began", run.step, run.digest())
    if rank in plan.victims and plan.after is None:
        before_each_change(nth(plan.at, kill))
    elif rank in plan.victims:
        signal.setitimer(signal.ITIMER_REAL, max(plan.after or 0.0, 1e-6))  # whose default is to end the process
    watch(run, Life.save_to_folder)
    if rank in plan.victims:
        die()
    return None


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def watch(run: Life, work: Callable[[Life], None]) -> None:
    """Note how it ends."""
    began = time.monotonic()
    try:
        work(run)
    except Exception as error:
        run.note("raised", f"{time.monotonic() - began:.1f}", type(error).__name__, _own(error), error)
    else:
        run.note("ended", f"{time.monotonic() - began:.1f}", run.step)


def _own(error: Exception) -> str:
    """Whether it is one of ours, that names a rank or the checkpoint and says what to do."""
    try:
        explained(error)
    except Foreign as problem:
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "adafisher_dist/" in frame.filename]
        return f"foreign,_from_{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else str(problem)[:20]
    return "ours"


class _Over(BaseException):
    """The optimizer's part of the step has ended; what a wrapper does after it is its own."""


def survive_step(run: Life) -> None:
    """A step of the optimizer while another rank is killed."""
    real, parts = AdaFisher.step, PARTS.get(run.layout, 1)
    failed: list[Exception] = []

    def step(self: AdaFisher, closure: Any = None) -> None:
        nonlocal parts
        try:
            real(self, closure)
        except Exception as error:
            failed.append(error)
            raise _Over from error
        parts -= 1
        if parts == 0:
            raise _Over

    AdaFisher.step = step  # type: ignore[method-assign]
    try:
        run.one_step()
    except _Over:
        pass
    except Exception as error:  # of DDP or DeepSpeed, before or after
        run.note("theirs", error)
        return
    if failed:
        raise failed[0]


# ---- what became of them ----


def journal_of(folder: Path, rank: int) -> Path:
    return folder / f".journal{rank}"


class Chronicle:
    """What all lives in a folder have told so far."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.least = folder, 0
        self.digests: dict[tuple[int, int], str] = {}

    def live(self, plan: Plan, tally: Tally) -> None:
        """A life, and what was wrong with it."""
        for rank in range(WORLD):
            journal_of(self.folder, rank).unlink(missing_ok=True)
        run_ranks(
            life, WORLD, str(self.folder), plan,
            killed=plan.victims, group_timeout=TIMEOUT, timeout=180, deepspeed="zero" in plan.layout,
        )  # fmt: skip
        tally.trials += len(plan.victims)
        lines = [journal_of(self.folder, rank).read_text().splitlines() for rank in range(WORLD)]
        unreached = any(line == "unreached" for rank in plan.victims for line in lines[rank])
        for rank in range(WORLD):
            for line in lines[rank]:
                what = line.split()[0]
                if what in ("ended", "raised", "theirs") and plan.victims:
                    tally.outcomes[f"{what} in a {plan.where}"] += 1
                self.check(rank, plan, line, unreached)
        ended = [line.split()[2] for own in lines for line in own if line.startswith("ended") and plan.where != "step"]
        if ended:  # by one rank: it is complete
            self.least = int(ended[0])

    def check(self, rank: int, plan: Plan, line: str, unreached: bool) -> None:
        """What a rank has noted; `unreached`: its victim was killed after the step."""
        what, *words = line.split(" ", 4)
        if what in ("loaded", "began"):
            step, digest = int(words[0]), words[1]
            if what == "loaded" and step < self.least:
                raise Lost(f"{plan}: latest leads back to step {step}; step {self.least} was completed")
            if self.digests.setdefault((rank, step), digest) != digest:
                raise Wrong(f"{plan}: rank {rank} {what} another step {step}")
        elif what == "raised":
            seconds, kind, own, told = words
            if float(seconds) > TIMEOUT + SLACK:
                raise Hung(f"{plan}: rank {rank} waited for {seconds} s")
            named = "ank " in told or "could not exchange" in told or str(self.folder) in told
            if not named or (plan.where == "save" and own != "ours"):
                raise Foreign(f"{plan}: rank {rank}, {own}: {kind}: {told}")
        elif what == "ended":
            seconds, *_ = words
            if plan.where == "step" and not (plan.begun or unreached):
                raise Wrong(f"{plan}: rank {rank} took a step without the other")


def kill_again_and_again(layout: str, where: str, kills: int, draw: random.Random, folder: Path, tally: Tally) -> None:
    """Lives in one folder; in the first and the last nobody is killed."""
    chronicle = Chronicle(folder)
    for plan in [Plan(layout), *(planned(layout, where, draw) for _ in range(kills)), Plan(layout)]:
        chronicle.live(plan, tally)
