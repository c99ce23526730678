"""Saves that are killed again and again in one folder, and loads beside a saver."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from threading import Timer
from typing import Any

import torch
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
    kill,
    leftovers,
    nth,
    trained,
    visible,
)  # fmt: skip
from ranks import free_port
from tally import BAD, Foreign, Hung, Lost, Tally, Wrong, column_of, explained

from adafisher_dist import CheckpointError
from adafisher_dist.checkpoint.directory import latest_tag

ORPHANS = 60.0  # seconds that ranks may take to end when their launcher is gone

# ---- saves that are killed ----


def killed_at(number: int, save: Callable[[], Any]) -> tuple[bool, list[str]]:
    """Save in a process, killed before its n-th disk change; returns (killed, changes begun)."""

    def work(tell: Tell) -> None:
        before_each_change(tell, nth(number, kill))
        save().wait()

    return Child(work).end()


def killed_again_and_again(rounds: int, seed: int, two: Path, folder: Path, tally: Tally) -> None:
    """Kill saves in one folder, each amid what the last ones left; now and then one completes."""
    draw, run, least, tag, digests = random.Random(seed), trained(2), 2, "step2", Digests()
    root = Path(shutil.copytree(two, folder / "root"))
    for step in range(3, 3 + rounds):
        digests[step] = run.train(step).digest()
        number, tag = draw.randrange(1, 50), draw.choice([tag, tag, f"step{step}"])
        more = {"keep_last": draw.choice([None, 1, 2]), "asynchronous": draw.random() < 0.5}
        killed, events = killed_at(number, lambda tag=tag, step=step, more=more: run.save(root / tag, step, **more))
        tally.trials += killed
        try:
            least = check(root, digests, least if killed else step)
        except Exception as error:
            raise kind_of(error)(f"at step {step}, kill {number} ({events[-1]}) of {tag}, {more}: {error}") from error
    check_that_saves_go_on(root, "another")


def kind_of(error: Exception) -> type[AssertionError]:
    """What a check of a folder of checkpoints has found; one that does not load is lost."""
    return BAD.get(column_of(error), Wrong) if isinstance(error, AssertionError) else Lost


def tag_of(tags: str, step: int) -> str:
    return "only" if tags == "same" else f"step{step}"


def train_and_save(root: Path, tags: str, asynchronous: bool, tell: Tell, steps: int = 10**6) -> None:
    """Resume from the last checkpoint and save after every step; `tell` gets a journal of saves."""
    run, saving, step = Run(), None, 0
    if latest_tag(root) is not None:
        step = run.load(root)
    for _ in range(steps):
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
    if saving is not None:
        saving.wait()
        tell(f"ended {step}")


def journal(lines: list[str], digests: dict[int, str], least: int | None) -> int | None:
    """Note digests, equal to those before a kill; returns the last step whose save completed."""
    for line in lines:
        what, step, *digest = line.split()
        if what == "began":
            assert digests.setdefault(int(step), *digest) == digest[0], f"step {step} went otherwise after a kill"
        else:
            least = int(step)
    return least


def killed_at_any_time(
    world: int, tags: str, asynchronous: bool, rounds: int, seed: int, folder: Path, tally: Tally
) -> None:
    """Kill all ranks at once; the next ones resume and go on."""
    draw, root, least, digests = random.Random(seed), folder / "root", None, {}
    for _ in range(rounds):
        ranks = children(world, folder, lambda _, tell: train_and_save(root, tags, asynchronous, tell))
        lines = [ranks[0].line() for _ in range(draw.randint(1, 5))]  # so many saves have begun or ended
        time.sleep(draw.uniform(0, 0.03))
        for child in draw.sample(ranks, world):
            child.kill()
        ends = [child.end() for child in ranks]
        assert all(killed for killed, _ in ends)
        tally.trials += world
        least = check(root, digests, journal([*lines, *ends[0][1]], digests, least))
    assert least is not None, "no save was completed"
    run, step = Run(), 10**6
    run.load(root)
    digests[step] = run.train(step).digest()
    run.save(root / tag_of(tags, step), step, keep_last=2)
    assert check(root, digests, step) == step and leftovers(root) == []
    assert len(visible(root)) == (1 if tags == "same" else 2)


def one_of_two_killed(draw: random.Random, two: Path, folder: Path, tally: Tally) -> None:
    """A rank is killed at a change of its disk; the other says so, or the checkpoint is whole."""
    root, victim = Path(shutil.copytree(two, folder / "root")), draw.randrange(2)
    number, asynchronous = draw.randint(1, 12 if victim else 40), draw.random() < 0.5

    def work(rank: int, tell: Tell) -> None:
        run = trained(3)
        if rank == victim:
            before_each_change(nth(number, kill))
        failure = _failure(lambda: run.save(root / "step3", 3, keep_last=2, asynchronous=asynchronous).wait())
        tell("saved" if failure is None else "refused")
        if failure is not None:
            explained(failure, str(root / "step3"))

    ends = [child.end() for child in children(2, folder, work)]
    tally.trials += ends[victim][0]
    saved = any(told[:1] == ["saved"] for _, told in ends)
    tally.outcomes["saved" if saved else "refused"] += 1
    check(root, Digests(), 3 if saved else 2)
    check_that_saves_go_on(root, "step4")


def _failure(attempt: Callable[[], Any]) -> Exception | None:
    try:
        attempt()
    except Exception as error:
        return error
    return None


def launched(root: Path, tags: str, asynchronous: bool, port: int, tell: Tell) -> None:
    """As torchrun does: keep the store by which two ranks meet, and start them."""
    store = dist.TCPStore("127.0.0.1", port, 3, is_master=True, wait_for_workers=False)

    def work(rank: int) -> None:
        where = f"tcp://127.0.0.1:{port}"
        os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"  # so that rank 0 keeps none itself
        dist.init_process_group("gloo", init_method=where, rank=rank, world_size=2, timeout=timedelta(seconds=10))
        failure = _failure(
            lambda: train_and_save(root, tags, asynchronous, tell if rank == 0 else lambda text: None, steps=5)
        )
        if failure is not None:
            explained(failure, str(root))

    ranks = [Child(lambda _, rank=rank: work(rank)) for rank in range(2)]
    for child in ranks:
        tell(f"pid {child.pid}")
    for child in ranks:
        child.end()
    del store


def launcher_killed(draw: random.Random, folder: Path, tally: Tally) -> None:
    """The ranks go on without it, or stop with an error of ours; what they saved is whole."""
    root, digests = folder / "root", dict[int, str]()
    tags, asynchronous, port = draw.choice(["new", "same"]), draw.random() < 0.5, free_port()
    parent = Child(lambda tell: launched(root, tags, asynchronous, port, tell))
    lines = [parent.line() for _ in range(2 + draw.randint(1, 6))]
    time.sleep(draw.uniform(0, 0.03))
    parent.kill()
    tally.trials += 1
    pids = [int(line.split()[1]) for line in lines if line.startswith("pid")]
    guard = Timer(ORPHANS, lambda: [_kill_if_there(pid) for pid in pids])
    guard.start()
    began = time.monotonic()
    _, rest = parent.end()  # which comes when nobody can tell anything any more
    guard.cancel()
    if time.monotonic() - began >= ORPHANS:
        raise Hung(f"the ranks of a launcher that was killed ran for {ORPHANS} s")
    every = [line for line in [*lines, *rest] if not line.startswith("pid")]
    least = journal([line for line in every if line.startswith(("began", "ended"))], digests, None)
    check(root, digests, least)


def _kill_if_there(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


# ---- loads beside a saver ----


def values_of(run: Run) -> list[torch.Tensor]:
    """All weights and state of a training, as one can write into it."""
    state = [value for entry in run.optimizer.state.values() for value in entry.values() if value.is_floating_point()]
    return [*(parameter.data for parameter in run.module.parameters()), *state]


def saves_for_ever(root: Path, tags: str, tell: Tell) -> None:
    """Fill weights and state with the step's number and save, over one tag or with keep_last=2."""
    run, step = trained(1), 0
    while True:
        step += 1
        for value in values_of(run):
            value.fill_(float(step))
        run.save(root / tag_of(tags, step), step, keep_last=2)
        if step == 1:
            tell("there")
        time.sleep(0.01)


def load_beside(root: Path, count: int, tally: Tally) -> None:
    """Loads of the newest, by turns with and without checksums: a state that was saved, whole."""
    run = trained(1)
    for number in range(count):
        with tally.trial(f"load {number}"):
            try:
                step = run.load(root, verify=number % 2 == 0)
            except CheckpointError as error:
                if "load again" not in str(error):
                    raise Foreign(f"refused: {error}") from error
                tally.outcomes["refused"] += 1
                continue
            found = {float(value) for values in values_of(run) for value in values.unique()}
            if found != {float(step)}:
                raise Wrong(f"of step {step}, with values of {sorted(found)[:5]}")
            tally.outcomes["right"] += 1


def load_beside_savers(world: int, tags: str, count: int, folder: Path, tally: Tally) -> None:
    savers = children(world, folder, lambda rank, tell: saves_for_ever(folder / "root", tags, tell))
    try:
        assert savers[0].line() == "there"
        load_beside(folder / "root", count, tally)
    finally:
        for child in savers:
            child.kill()
    for child in savers:
        child.end()
