"""What a whole training step takes with each of convergence.py's optimizers, relative to AdamW's.

Apart from the trainings, which share the machine: here one process steps all optimizers in turns,
each on a model of its own, so that a machine whose speed drifts slows all alike. Ratios only, since
the tasks run on the CPU.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import common
import torch
from optimizers import BASE, Contender
from tasks import Task
from torch import nn
from torch.optim import Optimizer
from trainings import train_step

# What is refreshed every few steps is counted over whole cycles of this many steps.
CYCLE, CYCLES = 10, 3
# AdaFisher's interval between refreshes grows from 1 to inverse_update_freq while the Fisher fills:
# step_time.py.
WARM_UP, FILLED = 10, 60
LR = 3e-4  # safe for all: a model that diverges computes with other numbers, some of them slow


@dataclass(slots=True)
class Runner:
    """An optimizer with its own model; `seconds` of each counted step."""

    model: nn.Module
    optimizers: list[Optimizer]
    warm_up: int
    seconds: list[float] = field(default_factory=list)

    @classmethod
    def of(cls, task: Task, contender: Contender) -> Runner:
        torch.manual_seed(0)
        model = task.build()
        return cls(model, contender.build(model, task, LR), FILLED if contender.slow_start else WARM_UP)


def step_to_adamw(task: Task, chosen: Mapping[str, Contender]) -> dict[str, dict[str, float]]:
    """Smallest, median and largest ratio of each over the cycles. `chosen` must contain AdamW."""
    runners = {name: Runner.of(task, contender) for name, contender in chosen.items()}
    longest = max(runner.warm_up for runner in runners.values())
    for number in range(-longest, CYCLE * CYCLES):
        for runner in runners.values():
            if number >= -runner.warm_up:
                began = time.perf_counter()
                train_step(task, runner.model, runner.optimizers, 0, number + longest)
                if number >= 0:
                    runner.seconds.append(time.perf_counter() - began)
    base = runners[BASE].seconds
    return {name: ratios(runner.seconds, base) for name, runner in runners.items()}


def ratios(seconds: Sequence[float], base: Sequence[float]) -> dict[str, float]:
    """Of each cycle's mean step, so that both sides met the same machine."""
    own, other = ([statistics.fmean(s[at : at + CYCLE]) for at in range(0, len(s), CYCLE)] for s in (seconds, base))
    return common.spread([a / b for a, b in zip(own, other, strict=True)])
