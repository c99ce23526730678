"""Processes that carry out trainings, and what the console shows meanwhile."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import statistics
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from trainings import Curve, Run, append, train

Wanted = Callable[[Mapping[Run, Curve]], list[Run]]


def carry_out(wanted: Wanted, done: dict[Run, Curve], path: Path, workers: int) -> None:
    """Train until `wanted` asks for no more; what is finished goes into `done` and the file.

    Args:
        wanted: the trainings to do that are not in what it is given, the first first. It is asked
            again after each.
        done: the finished trainings.
        path: the file.
        workers: processes.

    Raises:
        Exception: a worker's own, with its traceback; the others are ended.
    """
    others = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _prepare)
    running: dict[Future[tuple[Curve, float]], Run] = {}
    try:
        with Board(workers) as board:
            while True:
                todo = [run for run in wanted(done) if run not in running.values()]
                while todo and len(running) < workers:
                    run = todo.pop(0)
                    running[pool.submit(perform, run, path)] = run
                board.show(len(done), todo, running.values())
                if not running:
                    break
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    run = running.pop(future)
                    done[run], seconds = future.result()
                    board.finished(run, done[run], seconds)
        pool.shutdown()
    except BaseException:
        # A training may have minutes to go, and what it has is not kept.
        for process in set(multiprocessing.active_children()) - others:
            process.terminate()
        pool.shutdown(wait=False, cancel_futures=True)
        raise


def perform(run: Run, path: Path) -> tuple[Curve, float]:
    """In a worker: train, and keep it; also the seconds, for the estimate of those that remain."""
    began = time.monotonic()
    try:
        curve = train(run)
    except Exception as error:
        raise RuntimeError(f"This training failed: {run}") from error
    append(path, run, curve)
    return curve, time.monotonic() - began


def _prepare() -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all of a terminal's processes; the parent decides
    logging.getLogger("adafisher_dist").setLevel(logging.ERROR)  # a warning of each step skipped while it diverges
    threading.Thread(target=_leave_with, args=(multiprocessing.parent_process(),), daemon=True).start()


def _leave_with(parent: multiprocessing.process.BaseProcess) -> None:
    """A parent that is killed cannot end its workers, and they would train on."""
    parent.join()
    os._exit(1)


class Board:
    """A bar on a terminal, a line a training elsewhere."""

    def __init__(self, workers: int) -> None:
        console = Console(width=None if sys.stdout.isatty() else 150)
        columns = (TextColumn("Trainings"), BarColumn(20), MofNCompleteColumn(), TimeElapsedColumn())
        more = TextColumn("{task.description}")
        self.progress = Progress(*columns, more, console=console, disable=not console.is_terminal)
        self.task = self.progress.add_task("", total=None)
        self.workers, self.console = workers, console
        self.seconds: dict[tuple[str, str], list[float]] = defaultdict(list)
        self.count, self.total, self.left = 0, 0, ""

    def __enter__(self) -> Board:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def show(self, done: int, todo: list[Run], running: Collection[Run]) -> None:
        """How many are finished, and how long those take that are known to remain."""
        self.count, self.total = done, done + len(todo) + len(running)
        if self.seconds:  # those that are running are taken to be half done
            left = (sum(map(self.expected, todo)) + sum(map(self.expected, running)) / 2) / self.workers
            self.left = f"about {duration(left)} left"
        self.progress.update(self.task, completed=done, total=self.total, description=self.left)

    def finished(self, run: Run, curve: Curve, seconds: float) -> None:
        self.seconds[run.task, run.optimizer].append(seconds)
        self.count += 1
        if not self.console.is_terminal:
            loss = "diverged" if curve.diverged else f"{curve.final:.4g}"
            self.console.print(f"{self.count}/{self.total}  {run}: {loss}  {self.left}", highlight=False)

    def expected(self, run: Run) -> float:
        """Mean seconds of similar runs: same task and optimizer, else same task, else all."""
        alike = self.seconds.get((run.task, run.optimizer))
        alike = alike or [s for (task, _), own in self.seconds.items() if task == run.task for s in own]
        return statistics.fmean(alike or [s for own in self.seconds.values() for s in own])


def duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if minutes < 1:
        return f"{seconds:.0f} s"
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min"
