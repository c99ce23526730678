"""Clocks and memory of a device, and whether it still answers; rehearsals use the host clock."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

HEAD_START_CYCLES = 2_000_000  # about a millisecond, so that no launch is waited for between the events
SLOW_SECONDS = 2.5  # of counted steps, past which there are no more of them (but three)
LONGEST_HEAD_START_MS = 200.0

Step = Callable[[], Any]
Row = dict[str, Any]


class Effort(NamedTuple):
    """How often a thing is done before it is timed, and while."""

    warm_up: int
    repeats: int


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def answers(device: torch.device) -> bool:
    """Whether the device still does after an error: of some it never does again in this process."""
    try:
        synchronize(device)
        return bool(torch.ones(1, device=device).item() == 1)
    except RuntimeError:
        return False


def free(device: torch.device) -> None:
    """Give back what the last item held."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def median_ms(run: Step, prepare: Step, effort: Effort, device: torch.device) -> float:
    """Milliseconds on the device for `run`; `prepare` goes before each, and is not counted."""
    one = _one_by_clock if device.type == "cpu" else _one_by_events
    return statistics.median([one(run, prepare) for _ in range(sum(effort))][effort.warm_up :])


def _one_by_clock(run: Step, prepare: Step) -> float:
    prepare()
    began = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - began)


def _one_by_events(run: Step, prepare: Step, head_start: int = HEAD_START_CYCLES) -> float:
    """With the device kept busy for so many cycles, while the launches are queued."""
    prepare()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(head_start)
    begin.record()
    run()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end))


def time_step(step: Step, device: torch.device, effort: Effort, cycle: int = 1) -> Row:
    """Milliseconds of a step on the device, on the host, and of both.

    `device_ms` lies between two events, with the launches queued ahead; `host_ms` is until the call
    returns, and `wall_ms` until the device is done, both from an idle device. Medians, and a mean.

    Args:
        step: takes a step.
        device: the device.
        effort: steps; the first of all is reported apart, since it allocates, and may compile.
        cycle: counted steps come in so many.
    """
    synchronize(device)
    began = time.perf_counter()
    step()
    synchronize(device)
    first = time.perf_counter() - began
    began = time.perf_counter()
    for _ in range(effort.warm_up):
        step()
        synchronize(device)
        if time.perf_counter() - began > 0.5 * SLOW_SECONDS:
            break
    host, wall = _by_clock(step, device, effort, cycle)
    on_device = _by_events(step, statistics.median(host), effort) if device.type == "cuda" else wall
    return {
        "device_ms": statistics.median(on_device),
        "host_ms": statistics.median(host),
        "wall_ms": statistics.median(wall),
        "wall_ms_mean": statistics.fmean(wall),
        "steps": len(wall),
        "first_step_seconds": first,
    }


def _by_clock(step: Step, device: torch.device, effort: Effort, cycle: int) -> tuple[list[float], list[float]]:
    host, wall = [], []
    while len(wall) < effort.repeats and (sum(wall) < 1e3 * SLOW_SECONDS or len(wall) < 3 or len(wall) % cycle):
        synchronize(device)
        began = time.perf_counter()
        step()
        returned = time.perf_counter()
        synchronize(device)
        host.append(1e3 * (returned - began))
        wall.append(1e3 * (time.perf_counter() - began))
    return host, wall


def _by_events(step: Step, host_ms: float, effort: Effort) -> list[float]:
    """Times by events; the device stays busy while the host queues launches, for `host_ms`."""
    head_start = int(HEAD_START_CYCLES * min(LONGEST_HEAD_START_MS, 1 + 1.5 * host_ms))
    times: list[float] = []
    while len(times) < effort.repeats and (sum(times) < 1e3 * SLOW_SECONDS or len(times) < 3):
        times.append(_one_by_events(step, lambda: None, head_start))
    return times


class Memory:
    """Bytes that a device has given out since this was made; None on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
            self.before = torch.cuda.memory_allocated(device)

    def row(self) -> Row:
        if self.device.type != "cuda":
            return {"state_bytes": None, "peak_bytes": None}
        synchronize(self.device)
        return {
            "state_bytes": torch.cuda.memory_allocated(self.device) - self.before,
            "peak_bytes": torch.cuda.max_memory_allocated(self.device) - self.before,
        }


class Clock:
    """Seconds of training, except from `pause` to `start`; `mark` does not wait for the device."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds = device, 0.0
        self._marks: list[Any] = []

    def start(self) -> None:
        synchronize(self.device)
        self._marks = []
        self._began, self._first = time.perf_counter(), self._now()

    def mark(self) -> None:
        """Remember this moment of the device's work."""
        self._marks.append(self._now())

    def pause(self) -> list[float]:
        """Wait for the device; returns the marks since `start`, in seconds from the first start."""
        synchronize(self.device)
        marks = [self.seconds + self._between(mark) for mark in self._marks]
        self.seconds += time.perf_counter() - self._began
        return marks

    def _now(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _between(self, mark: Any) -> float:
        return mark - self._first if self.device.type != "cuda" else 1e-3 * self._first.elapsed_time(mark)
