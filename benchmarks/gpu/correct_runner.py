"""Runs checks on all ranks together, and ends a run in which a rank would hang. For `correct.py`.

A rank that fails in the middle of a collective leaves the others waiting in it. On GPUs no rank may
ever come out of that: NCCL's own watchdog ends the process when the group's time is up, and with it
whatever the rank had to tell. So a rank that fails first writes its traceback into a folder that
all ranks see. The first rank looks there, gives the others `PATIENCE` seconds to end the check, and
then writes what it has and ends the run; the launcher ends the others.
"""

from __future__ import annotations

import gc
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

TIMEOUT = 60.0  # of the process groups, in seconds
PATIENCE = 30.0  # for ranks that go on after another has failed: less, so that this comes before NCCL's watchdog


class NotChecked(Exception):
    """Why something cannot be checked here; raised on all ranks alike."""


@dataclass(frozen=True)
class Here:
    """Where a check runs.

    Attributes:
        rank: of this process.
        world: how many there are.
        device: of this rank.
        folder: for files; all ranks see it.
        limit: seconds that a check may take.
    """

    rank: int
    world: int
    device: torch.device
    folder: Path
    limit: float = 240.0

    @property
    def is_last(self) -> bool:
        return self.rank == self.world - 1


Check = Callable[[Here], str]
"""Returns in a line what it found; raises where something is wrong."""


@dataclass(frozen=True)
class Outcome:
    """Of a check on one rank; `ok` is None if not checked; `useless`: the device has failed."""

    ok: bool | None
    said: str
    seconds: float
    useless: bool = False
    too_late: bool = False


class Report:
    """What the first rank keeps of the checks and prints; the other ranks keep and print nothing.

    Attributes:
        checks: for each, in order: name, ok, seconds, said.
    """

    def __init__(self, rank: int, save: Callable[[list[dict[str, Any]], str | None], None]) -> None:
        """`save` is given the checks, and the name of the one that runs, before and after each."""
        self.checks: list[dict[str, Any]] = []
        self._is_first, self._save = rank == 0, save

    def begin(self, name: str) -> None:
        if self._is_first:
            self._save(self.checks, name)

    def end(self, name: str, ok: bool | None, seconds: float, said: str) -> None:
        if self._is_first:
            self.checks.append({"name": name, "ok": ok, "seconds": round(seconds, 2), "said": said})
            print(line(self.checks[-1]), flush=True)
            self._save(self.checks, None)

    @property
    def failed(self) -> bool:
        return any(check["ok"] is False for check in self.checks)


def line(check: Mapping[str, Any]) -> str:
    """A check as it is printed; after a failure come several lines."""
    mark = {True: "ok", None: "--", False: "FAIL"}[check["ok"]]
    said = {True: check["said"], None: f"not checked: {check['said']}", False: f"\n{check['said'].rstrip()}"}[
        check["ok"]
    ]
    return f"{mark:4} {check['name']:24} {check['seconds']:5.1f} s  {said}"


def run_checks(
    checks: Mapping[str, Check], here: Here, report: Report, *, patience: float = PATIENCE,
    left: Callable[[], float] = lambda: float("inf"),
) -> int:  # fmt: skip
    """Run the checks one after the other; all ranks call this with the same ones.

    What is known on all ranks to have failed on some does not keep the other checks from running. A
    run ends early where a rank would wait for another in vain, where a device computes no more, and
    where no time is left.

    Args:
        checks: by name.
        here: the same but for rank and device.
        report: takes what was found.
        patience: seconds that other ranks may go on after one has failed.
        left: how many seconds are left for all of them.

    Returns:
        The exit status: 1 if a check failed. The process ends by itself with that status where a
        rank hangs.
    """
    control = None
    if here.world > 1:
        control = dist.new_group(backend="gloo", timeout=timedelta(seconds=here.limit + 2 * patience))
    names, stopped = list(checks), ""
    watch = _Watch(here, report, names, patience)
    for number, (name, check) in enumerate(checks.items()):
        report.begin(name)
        with watch.over(number):
            own = _attempt(check, here, left)
            if own.ok is False:
                _tell(here, number, own.said)
            outcomes = [own] * here.world
            if control is not None:
                dist.all_gather_object(outcomes, own, control)
        report.end(name, *_together(outcomes))
        gc.collect()  # engines and their hooks hold each other
        if any(outcome.useless for outcome in outcomes):
            stopped = f"after {name} a device computes no more"
        elif any(outcome.too_late for outcome in outcomes):
            stopped = "no time was left"
        if stopped:
            _leave_out(names[number + 1 :], report, stopped)
            break
    return int(report.failed)


def _leave_out(names: Sequence[str], report: Report, why: str) -> None:
    for name in names:
        report.end(name, None, 0.0, why)


def _attempt(check: Check, here: Here, left: Callable[[], float]) -> Outcome:
    began = time.monotonic()
    ok: bool | None
    useless = False
    try:
        ok, said = True, check(here)
        _synchronize(here)  # an error of a kernel belongs to the check that started it
    except NotChecked as reason:
        ok, said = None, str(reason)
    except (Exception, SystemExit) as error:
        ok, said = False, f"{_in_a_line(error)}\n{traceback.format_exc()}"
        try:
            _synchronize(here)
        except Exception as error:  # such an error stays with a process
            useless = True
            said += f"After that, the device computes no more: {type(error).__name__}: {error}\n"
    return Outcome(ok, said, time.monotonic() - began, useless, left() <= 0)


def _in_a_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _synchronize(here: Here) -> None:
    if here.device.type == "cuda":
        torch.cuda.synchronize(here.device)


def _together(outcomes: list[Outcome]) -> tuple[bool | None, float, str]:
    """ok, seconds and said of all ranks: what the first rank said, or what all that failed said."""
    seconds = max(outcome.seconds for outcome in outcomes)
    failures = {rank: outcome for rank, outcome in enumerate(outcomes) if outcome.ok is False}
    if failures:
        first_to_fail = sorted(failures, key=lambda rank: failures[rank].seconds)
        return False, seconds, "".join(_of_rank(rank, len(outcomes), failures[rank].said) for rank in first_to_fail)
    absent = [outcome for outcome in outcomes if outcome.ok is None]
    chosen = absent[0] if absent else outcomes[0]
    return chosen.ok, seconds, chosen.said


def _of_rank(rank: int, world: int, said: str) -> str:
    return f"rank {rank} of {world}: {said.rstrip()}\n" if world > 1 else said


# ---- what ends a run in which a rank waits in vain ----


def _tell(here: Here, number: int, said: str) -> None:
    """Let the first rank know, whatever the ranks are doing."""
    path = here.folder / f"failed-{number}-{here.rank}"
    hidden = path.with_name(f".{path.name}")
    hidden.write_text(said, encoding="utf-8")
    os.replace(hidden, path)


class _Watch:
    """On the first rank, a thread that looks after the check that runs."""

    def __init__(self, here: Here, report: Report, names: Sequence[str], patience: float) -> None:
        self._here, self._report, self._names, self._patience = here, report, names, patience
        self._lock = threading.Lock()
        self._current: tuple[int, float] | None = None  # its number, and when it began
        self._seen: float | None = None  # when the first failure was
        self._main = threading.get_ident()
        if here.rank == 0:
            threading.Thread(target=self._look, name="watch", daemon=True).start()

    @contextmanager
    def over(self, number: int) -> Iterator[None]:
        with self._lock:
            self._current, self._seen = (number, time.monotonic()), None
        try:
            yield
        finally:
            with self._lock:  # held for ever by a thread that ends the run
                self._current = None

    def _look(self) -> None:
        while True:
            time.sleep(0.1)
            with self._lock:
                if self._current is not None:
                    self._judge(*self._current)

    def _judge(self, number: int, began: float) -> None:
        failed = sorted(self._here.folder.glob(f"failed-{number}-*"), key=lambda path: path.stat().st_mtime)
        if failed and self._seen is None:
            self._seen = time.monotonic()
        if self._seen is not None and time.monotonic() - self._seen > self._patience:
            texts = [
                _of_rank(int(path.name.rpartition("-")[2]), self._here.world, path.read_text(encoding="utf-8"))
                for path in failed
            ]
            why = f"{self._patience:.0f} s later other ranks had not ended this check, so the run ends here."
            self._end(number, began, f"{''.join(texts)}{why}\n")
        if time.monotonic() - began > self._here.limit:
            stack = "".join(traceback.format_stack(sys._current_frames()[self._main]))
            self._end(number, began, f"It has not ended in {self._here.limit:.0f} s. Rank 0 is here:\n{stack}")

    def _end(self, number: int, began: float, said: str) -> None:
        self._report.end(self._names[number], False, time.monotonic() - began, said)
        _leave_out(self._names[number + 1 :], self._report, f"the run ended in {self._names[number]}")
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)
