"""Metrics of every n-th step: conditioning of the blocks, size of the update, bytes sent.

What is computed on a device is read, compared over the ranks and told when the next step is taken,
without waiting for it; but of several ranks the host waits for the devices' decision in the two
steps after a measured one. Between measured steps nothing is done at all.
"""

from __future__ import annotations

import csv
import logging
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import torch
from torch import Tensor

from adafisher_dist.comm import collectives
from adafisher_dist.comm.collectives import Group, Waits
from adafisher_dist.comm.deferred_errors import DeferredErrors
from adafisher_dist.comm.host_groups import host_group
from adafisher_dist.numerics.block_stack import BlockStack
from adafisher_dist.numerics.block_step import damping
from adafisher_dist.numerics.factors import FALLBACKS, condition_number
from adafisher_dist.numerics.precision import full_precision
from adafisher_dist.stepping.exchange import Exchange
from adafisher_dist.stepping.inputs import Inputs
from adafisher_dist.stepping.updating import Observe

logger = logging.getLogger("adafisher_dist")

Callback = Callable[[int, dict[str, float]], None]
"""Called with the step and its metrics by name, on the first rank alone."""

LADDER = tuple(f"ladder_{fallback.replace(' ', '_')}" for fallback in FALLBACKS)

NAMES = {
    "condition_number_median": "1-norm condition number of the damped blocks A that were looked at, median",
    "condition_number_max": "the largest of them",
    "damping_min": "δ + ε in A, the smallest of all param groups",
    "damping_max": "the largest; blocks of a bfloat16 Fisher have more where its rounding needs it",
    "factor_age_mean": "steps since a block's factor was made, mean; 0 where they are made at every step",
    "factor_age_max": "the largest",
    **{
        name: f"factorisations so far that needed: {fallback}" for name, fallback in zip(LADDER, FALLBACKS, strict=True)
    },
    "update_to_weight": "‖change of the weights‖ / ‖weights‖, of all that had a gradient",
    "communication_bytes": "bytes sent in the step, by all ranks",
    "communication_ms": "milliseconds that the step waited for other ranks, the longest of all ranks",
    "skipped_steps": "steps so far that changed nothing",
}
"""Each metric, and what it is."""

SAMPLE = 32  # blocks of a stack whose condition is measured: others at each measured step


@dataclass(slots=True)
class _Measured:
    """What one rank has measured of a step; travels to the others."""

    conditions: list[float] = field(default_factory=list)
    change: float = 0.0  # the sum of the squares
    weights: float = 0.0  # likewise
    ladder: list[float] = field(default_factory=lambda: [0.0] * len(FALLBACKS))
    dampings: list[float] = field(default_factory=list)
    blocks: int = 0  # whose factors' ages are known
    age: int = 0  # of all of them together
    oldest: int = 0
    bytes: int = 0
    seconds: float = 0.0
    problem: str | None = None


class _Reading:
    """Numbers of a device, on their way to the host."""

    def __init__(self, numbers: Tensor, into: Callable[[list[float]], None]) -> None:
        self._into = into
        on_accelerator = numbers.device.type != "cpu"
        self._host = torch.empty(numbers.shape, dtype=numbers.dtype, device="cpu", pin_memory=on_accelerator)
        self._host.copy_(numbers, non_blocking=True)
        self._arrival = torch.Event(numbers.device) if on_accelerator else None
        if self._arrival is not None:
            self._arrival.record(torch.accelerator.current_stream(numbers.device))

    def read(self) -> None:
        """Take the numbers; they were asked for a step ago."""
        if self._arrival is not None:
            self._arrival.synchronize()
        self._into([float(number) for number in self._host.tolist()])


class Meter:
    """Measures an optimizer's steps, and tells a callback.

    A call of `step` may be a part of one: DeepSpeed makes one for each param group or sub-group.
    What the calls of a step measure is put together, and told when the first call of another step
    has come.
    """

    def __init__(self, callback: Callback, every: int) -> None:
        """Tell the callback of every n-th step.

        Raises:
            ValueError: `every` is no whole number, or below 1.
        """
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ValueError(f"Metrics are taken every so many steps, a whole number from 1 on, and not {every!r}.")
        self._callback, self._every = callback, every
        self._step: int | None = None  # that is being measured
        self._void = False  # whether that step, as the device found, changed nothing
        self._measured = _Measured()
        self._readings: list[_Reading] = []
        self._waits: list[Waits] = []
        self._warned = False

    @property
    def plan(self) -> tuple[int, int | None]:
        """What must be the same on all ranks to deliver together: interval and pending step."""
        return self._every, self._step

    def begin(self, step: int, group: Group, skipped: int) -> None:
        """Before the work of a call that belongs to this step; 0 where no parameter has a gradient.

        A collective when another step's metrics are due.
        """
        if step != self._step or self._void:
            self.deliver(group, skipped)
        if step > 0 and step % self._every == 0:
            self._step = step
            self._waits.append(Waits())
            collectives.measure_waits(self._waits[-1])

    @property
    def observer(self) -> Observe | None:
        """What wants to see the changes of the weights in this call, if anything does. Local."""
        return None if self._step is None else self._observe

    def _observe(self, weights: list[Tensor], changes: list[Tensor]) -> None:
        """An error is told with the metrics, and stops nobody."""

        def ask() -> None:
            self._readings.append(_Reading(torch.stack([_square(weights), _square(changes)]), self._take_squares))

        if weights:
            self._attempt(ask)

    def end(self, calls: Sequence[tuple[Exchange, Inputs]], sent: Counter[str]) -> None:
        """After the work of a call. Local; an error is told with the metrics, and stops nobody."""
        if self._step is None:
            return
        collectives.measure_waits(None)
        self._measured.bytes += sum(sent.values())
        self._attempt(partial(self._take, calls, self._step))

    def deliver(self, group: Group, skipped: int) -> None:
        """Combine what the ranks measured, if anything; call back on the first. A collective."""
        if self._void:
            self.forget()
        if self._step is None:
            return
        self._attempt(self._read)
        step, measured = self._step, self._measured
        self.forget()
        ranks = host_group(sorted(group.members), group.handle).gather(measured) if group.size > 1 else [measured]
        if not group.is_first:
            return
        problems = [f"rank {number}: {rank.problem}" for number, rank in enumerate(ranks) if rank.problem is not None]
        if not problems:
            try:  # an error here would leave the other ranks waiting for this one
                self._callback(step, _metrics(ranks, skipped))
            except Exception as error:
                problems = [f"the callback failed: {type(error).__name__}: {error}"]
        if problems and not self._warned:
            self._warned = True
            logger.warning("AdaFisher's metrics of step %d are left out; %s.", step, "; ".join(problems))

    def void(self) -> None:
        """Note that the last step changed nothing: if it was measured, it will not be told of."""
        self._void = self._step is not None

    def forget(self) -> None:
        """Do not tell of what has been measured, as of a step that failed. All ranks call it."""
        self._step, self._void, self._measured, self._readings, self._waits = None, False, _Measured(), [], []
        collectives.measure_waits(None)

    def _attempt(self, work: Callable[[], object]) -> None:
        """Do it; an error goes to the other ranks with what was measured."""
        errors = DeferredErrors()
        if not errors.attempt(work):
            self._measured.problem = f"{type(errors.error).__name__}: {errors.error}"

    def _read(self) -> None:
        """What the device has been asked for."""
        for reading in self._readings:
            reading.read()
        self._measured.seconds = sum(waits.seconds() for waits in self._waits)

    def _take(self, calls: Sequence[tuple[Exchange, Inputs]], step: int) -> None:
        measured = self._measured
        for exchange, inputs in calls:
            shard = exchange.shard
            conditions: list[Tensor] = []
            for stack in shard.stacks:
                settings = inputs.settings[stack.group]
                if not stack.shape.dense or settings is None:
                    continue
                own, noise = damping(stack.config, settings)
                measured.dampings.append(own)
                conditions.append(_conditions(stack, own, noise, step // self._every).double())
                for counts in stack.fallback_counts.values():
                    measured.ladder = [a + b for a, b in zip(measured.ladder, counts, strict=True)]
                ages = stack.ages(step)
                measured.blocks += len(ages)
                measured.age += int(ages.sum())
                measured.oldest = max(measured.oldest, int(ages.max(initial=0)))
            if conditions:
                self._readings.append(_Reading(torch.cat(conditions), self._take_conditions))

    def _take_conditions(self, numbers: list[float]) -> None:
        self._measured.conditions += numbers

    def _take_squares(self, numbers: list[float]) -> None:
        self._measured.weights += numbers[0]
        self._measured.change += numbers[1]


def _square(tensors: list[Tensor]) -> Tensor:
    """The sum of the squares of all elements, 0-d float64."""
    return torch.stack(torch._foreach_norm(tensors)).double().square().sum()


def _conditions(stack: BlockStack, own: float, noise: float, turn: int) -> Tensor:
    """Condition numbers of some blocks, spread evenly over a stack; others at the next turn."""
    count = len(stack)
    sample = min(SAMPLE, count)
    # Made on the device: to copy them there would be to wait for it.
    rows = (torch.arange(sample, device=stack.device) * count // max(1, sample) + turn) % max(1, count)
    whole_NBB = stack.whole(stack.fisher.index_select(0, rows))
    with full_precision(stack.device):
        return condition_number(whole_NBB, own, noise, stack.config.compute_dtype)


def _metrics(ranks: Sequence[_Measured], skipped: int) -> dict[str, float]:
    """What is told, by the names of NAMES; without those that nothing was measured of."""
    conditions = [number for rank in ranks for number in rank.conditions if np.isfinite(number)]
    dampings = [number for rank in ranks for number in rank.dampings]
    blocks = sum(rank.blocks for rank in ranks)
    weights = sum(rank.weights for rank in ranks)
    ladder = [sum(counts) for counts in zip(*(rank.ladder for rank in ranks), strict=True)]
    found: dict[str, float] = {}
    if conditions:
        found |= {"condition_number_median": median(conditions), "condition_number_max": max(conditions)}
    if dampings:
        found |= {"damping_min": min(dampings), "damping_max": max(dampings)}
    if blocks:
        found["factor_age_mean"] = sum(rank.age for rank in ranks) / blocks
        found["factor_age_max"] = float(max(rank.oldest for rank in ranks))
    found |= {name: count for name, count in zip(LADDER, ladder, strict=True)}
    if weights > 0:
        found["update_to_weight"] = (sum(rank.change for rank in ranks) / weights) ** 0.5
    found["communication_bytes"] = float(sum(rank.bytes for rank in ranks))
    found["communication_ms"] = 1e3 * max(rank.seconds for rank in ranks)
    found["skipped_steps"] = float(skipped)
    return found


class CsvLog:
    """A callback that logs to a CSV file, a line a step."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Appends to a file that is there; its folder is made."""
        self._path = Path(path)

    def __call__(self, step: int, metrics: dict[str, float]) -> None:
        """Append one line; a file that is new gets its heading first."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        new = not self._path.exists() or self._path.stat().st_size == 0
        with self._path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["step", *NAMES], restval="")
            if new:
                writer.writeheader()
            writer.writerow({"step": step, **{name: f"{value:.6g}" for name, value in metrics.items()}})
