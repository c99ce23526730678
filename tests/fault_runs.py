"""A training whose rank fails at a point of a step; what each rank sees of it."""

from __future__ import annotations

import faulthandler
import time
import warnings
from contextlib import nullcontext
from datetime import timedelta
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from fault_points import Points, watching
from layout_runs import Run

from adafisher_dist import AdaFisher
from adafisher_dist.blocks import sharding
from adafisher_dist.comm import timeouts
from adafisher_dist.stepping import found_inf

SETTINGS: dict[str, Any] = {"lr": 1e-2, "block_size": 8, "rows_per_block": 4}
FAULTY = 0  # the rank that fails; it makes the callbacks too
TIMEOUT = 5.0
SLACK = 15.0  # where the processors are busy

# The call in which it happens. In the first the state is made; in 1, 2, 4, 8, … hosts ask each
# other whatever decides. "idle": the rank has failed before, and only keeps the other company.
SCENES = {"first": 1, "second": 2, "usual": 3, "idle": 3, "measured": 3}

Place = tuple[str, int]
"""A point, and at which time that a rank comes to it."""


PARTS = {"zero1": 2, "zero2": 2, "zero3": 2}  # DeepSpeed steps one param group after the other

beside: list[Any] = []  # a process group by which the test keeps the ranks together


class Stopped(Exception):
    """Another rank has raised."""


class Training(Run):
    """A training in one of the layouts, call by call."""

    def __init__(self, layout: str, scene: str, rank: int, world: int) -> None:
        super().__init__(layout, rank, world, SETTINGS)
        base = self.optimizer if self.engine is None else self.engine.basic_optimizer
        assert isinstance(base, AdaFisher)
        self.adafisher, self.scene, self.calls = base, scene, 0
        self.beside = beside[0]
        self.parts_left = 0
        if self.engine is not None:
            base.step = self.step_of_wrapper  # type: ignore[method-assign, assignment]
        if scene == "measured":
            base.report_metrics(lambda step, metrics: None, every=1)

    def call(self) -> str:
        """The next one; the error that it raised, or nothing."""
        self.calls, self.parts_left = self.calls + 1, PARTS.get(self.layout, 1)
        try:
            self.train(self.calls - 1, self.calls)
        except Stopped:
            return ""
        except Exception as error:
            told = f"{type(error).__name__}: {error}"
            if self.engine is not None and self.parts_left:
                self.tell(told)
            return told
        return ""

    def step_of_wrapper(self, closure: Any = None) -> None:
        """A step; where a rank raises at its very end DeepSpeed would wait for half an hour."""
        type(self.adafisher).step(self.adafisher, closure)
        self.parts_left -= 1
        if self.parts_left == 0 and any(self.tell("")):
            raise Stopped

    def tell(self, told: Any) -> list[Any]:
        """What each rank tells, without AdaFisher."""
        everyones: list[Any] = [None] * self.world
        dist.all_gather_object(everyones, told, self.beside)
        return everyones

    def calls_until(self, number: int) -> None:
        for _ in range(self.calls, number):
            told = self.call()
            assert not told, told

    def fault(self) -> None:
        """What makes this rank idle in the next call."""
        self.adafisher.param_groups[0]["momentum"] = 1.5

    def begin_anew(self, state: list[np.ndarray]) -> str:
        """All ranks do what the error of an incomplete step asks for; what the next call says.

        Args:
            state: from `held`.
        """
        if self.engine is not None:
            return ""  # DeepSpeed's gradients are where its own step was left
        with torch.no_grad():
            for tensor, value in zip(self.local(), state, strict=False):
                tensor.copy_(torch.from_numpy(value))
        self.adafisher.param_groups[0]["momentum"] = self.adafisher.defaults["momentum"]
        self.adafisher.reset_state()
        return self.call()

    @property
    def is_incomplete(self) -> bool:
        """Whether the next step would be refused."""
        return bool(self.adafisher._registry.stepper.incomplete)

    def local(self) -> list[torch.Tensor]:
        """What this rank stores of the weights."""
        tensors = [tensor for group in self.adafisher.param_groups for tensor in group["params"]]
        if self.engine is not None and self.engine.zero_optimization_stage() == 3:
            tensors = self.engine.optimizer.fp32_partitioned_groups_flat
        elif self.engine is not None and self.engine.zero_optimization_stage() > 0:
            tensors = self.engine.optimizer.single_partition_of_fp32_groups
        return [tensor.to_local() if hasattr(tensor, "to_local") else tensor for tensor in tensors]

    def held(self) -> list[np.ndarray]:
        """This rank's weights and state."""
        shards = self.adafisher._registry.stepper.planned
        stacks = [tensor for shard in shards for stack in shard.stacks for tensor in stack.state.values()]
        every = [*self.local(), *stacks, *(shard.counters for shard in shards)]
        return [tensor.detach().clone().numpy() for tensor in every]


def same(one: list[np.ndarray], other: list[np.ndarray]) -> bool:
    return len(one) == len(other) and all(np.array_equal(a, b, equal_nan=True) for a, b in zip(one, other, strict=True))


class Outcome(NamedTuple):
    """What one rank saw of a fault.

    Attributes:
        told: the errors of the call and of the next one.
        seconds: of the longer of them.
        unchanged: whether weights and state are what they were before the call.
        undisturbed: whether nobody stopped, and weights are as after calls without a fault.
        incomplete: whether the next step would be refused.
        lost: whether a collective failed, so that the process group cannot be used again.
        anew: where none did, the error of a step that all ranks take after `begin_anew`.
    """

    told: tuple[str, str]
    seconds: float
    unchanged: bool
    undisturbed: bool
    incomplete: bool
    lost: bool
    anew: str


def start(on_device: bool) -> None:
    """As on an accelerator, where a device decides; in chunks and slices, as of large models."""
    warnings.simplefilter("ignore")  # DeepSpeed's of torch's new names
    found_inf.is_meant_for = lambda device: on_device
    sharding.CHUNK_FISHER_NUMEL = 2**10
    sharding.GATHERED_NUMEL = 2**7
    beside[:] = [dist.new_group(timeout=timedelta(seconds=300))]


def traced(layout: str, scene: str, rank: int, world: int) -> Points:
    """The points of the faulty rank in the call of a scene."""
    run = Training(layout, scene, rank, world)
    run.calls_until(SCENES[scene] - 1)
    points = Points()
    if rank == FAULTY and scene == "idle":
        run.fault()
    with watching(points):
        run.call()
    run.call()
    return points


def passed(rank: int, world: int, layout: str, on_device: bool, scene: str) -> list[str]:
    """All points in their order; without those of what is made once in a process."""
    start(on_device)
    traced(layout, scene, rank, world)
    return traced(layout, scene, rank, world).passed


def sweep(
    rank: int, world: int, layout: str, on_device: bool, scene: str, places: list[Place]
) -> list[tuple[Place, list[Outcome]]]:
    """Let the rank fail at each of these places, in trainings of their own.

    Returns:
        For each what the ranks saw; the last are missing where a process group has lost a rank: it
        is not used again.
    """
    start(on_device)
    reference = Training(layout, scene, rank, world)
    reference.calls_until(SCENES[scene] + 1)  # makes what is made once in a process, too
    after, found = reference.weights(), []
    for place in places:
        faulthandler.dump_traceback_later(TIMEOUT + 4 * SLACK, exit=True)  # a hang ends the test, and says where
        found.append((place, inject(Training(layout, scene, rank, world), place, rank, after)))
        faulthandler.cancel_dump_traceback_later()
        if any(outcome.lost for outcome in found[-1][1]):
            break
    return found


def inject(run: Training, place: Place, rank: int, after: dict[str, np.ndarray]) -> list[Outcome]:
    """Let the rank fail when it comes to a place; what each rank saw of it."""
    where, time_ = place
    run.calls_until(SCENES[run.scene] - 1)
    before = run.held()
    points, told, took = Points(lambda passed: passed[-1] == where and passed.count(where) == time_), ["", ""], 0.0
    if rank == FAULTY and run.scene == "idle":
        run.fault()
    for call in range(2):
        began = time.monotonic()
        with watching(points) if rank == FAULTY and call == 0 else nullcontext():
            told[call] = run.call()
        took = max(took, time.monotonic() - began)
        stopped = any(run.tell(told[call]))
        if stopped:
            break
    _ = run.adafisher.skipped_steps  # asks what the device has decided
    held = run.held()[: len(before)]  # in the first call there was no state before
    lost = any(known.failure is not None for known in timeouts._meetings.values())
    undisturbed = not stopped and not lost and same(list(run.weights().values()), list(after.values()))
    incomplete = run.is_incomplete
    anew = run.begin_anew(before) if stopped and not any(run.tell(lost)) else ""
    own = Outcome((told[0], told[1]), took, same(held, before), undisturbed, incomplete, lost, anew)
    assert rank != FAULTY or points.passed.count(where) >= time_, place
    return run.tell(own)
