"""A rank fails, is killed or is stopped at every point of a step, in each layout.

Both where hosts ask each other and where a device decides, which a CPU stands for here. The points
are found by tracing a step (`fault_points`).
"""

from __future__ import annotations

import os
import signal
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from datetime import timedelta
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch.distributed as dist
from fault_points import Points, watching
from layout_runs import Run
from ranks import run_ranks

from adafisher_dist import AdaFisher
from adafisher_dist.comm import timeouts
from adafisher_dist.stepping import found_inf

pytestmark = pytest.mark.dist

SETTINGS: dict[str, Any] = {"lr": 1e-2, "block_size": 8, "rows_per_block": 4}
LAYOUTS = ["ddp", "fsdp2", "hsdp", "zero0", "zero1", "zero2", "zero3"]
FAULTY = 0  # the rank that fails; it makes the callbacks too
LOST = 1  # the rank that is killed or stopped
TIMEOUT = 5.0
SLACK = 15.0  # where the processors are busy

# The call in which it happens. In the first the state is made; in 1, 2, 4, 8, … hosts ask each
# other whatever decides. "idle": the rank has failed before, and only keeps the other company.
SCENES = {"first": 1, "usual": 3, "idle": 3, "measured": 3}


class Training(Run):
    """A training in one of the layouts, call by call."""

    def __init__(self, layout: str, scene: str, rank: int, world: int) -> None:
        super().__init__(layout, rank, world, SETTINGS)
        base = self.optimizer if self.engine is None else self.engine.basic_optimizer
        assert isinstance(base, AdaFisher)
        self.adafisher, self.scene, self.calls = base, scene, 0
        if scene == "measured":
            base.report_metrics(lambda step, metrics: None, every=1)

    def call(self) -> str:
        """The next one; the error that it raised, or nothing."""
        self.calls += 1
        try:
            self.train(self.calls - 1, self.calls)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return ""

    def calls_until(self, number: int) -> None:
        for _ in range(self.calls, number):
            told = self.call()
            assert not told, told

    def fault(self) -> None:
        """What makes this rank idle in the next call."""
        self.adafisher.param_groups[0]["momentum"] = 1.5

    @property
    def is_incomplete(self) -> bool:
        """Whether the next step would be refused."""
        return bool(self.adafisher._registry.stepper.incomplete)

    def held(self) -> list[np.ndarray]:
        """This rank's weights and state."""
        tensors = [tensor for group in self.adafisher.param_groups for tensor in group["params"]]
        if self.engine is not None and self.engine.zero_optimization_stage() == 3:
            tensors = self.engine.optimizer.fp32_partitioned_groups_flat
        elif self.engine is not None and self.engine.zero_optimization_stage() > 0:
            tensors = self.engine.optimizer.single_partition_of_fp32_groups
        local = [tensor.to_local() if hasattr(tensor, "to_local") else tensor for tensor in tensors]
        shards = self.adafisher._registry.stepper.planned
        stacks = [tensor for shard in shards for stack in shard.stacks for tensor in stack.state.values()]
        every = [*local, *stacks, *(shard.counters for shard in shards)]
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
    """

    told: tuple[str, str]
    seconds: float
    unchanged: bool
    undisturbed: bool
    incomplete: bool
    lost: bool


def start(on_device: bool) -> None:
    """As on an accelerator, where a device decides."""
    warnings.simplefilter("ignore")  # DeepSpeed's of torch's new names
    found_inf.is_meant_for = lambda device: on_device


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


# ---- a rank fails ----


def sweep(
    rank: int, world: int, layout: str, on_device: bool, scene: str, operations: bool, begin: int, every: int
) -> tuple[list[tuple[str, list[Outcome]]], int]:
    """Let the rank fail at every n-th of its points, from the one with this index on.

    Returns:
        For each point what the ranks saw, and the index of the first point that is left: a process
        group that has lost a rank is not used again.
    """
    start(on_device)
    beside = dist.new_group(timeout=timedelta(seconds=300))  # by which the test keeps the ranks together
    traced(layout, scene, rank, world)  # makes what is made once in a process
    points = traced(layout, scene, rank, world)
    chosen: list[Any] = [[where for where in dict.fromkeys(points.passed) if not operations or can_tell(where)]]
    dist.broadcast_object_list(chosen, FAULTY, beside)
    places: list[str] = chosen[0]
    reference = Training(layout, scene, rank, world)
    reference.calls_until(SCENES[scene] + 1)
    after = reference.weights()
    found = []
    for index in range(begin, len(places), every):
        found.append((places[index], inject(Training(layout, scene, rank, world), places[index], rank, after, beside)))
        if any(outcome.lost for outcome in found[-1][1]):
            return found, index + every
    return found, len(places)


def inject(run: Training, where: str, rank: int, after: dict[str, np.ndarray], beside: Any) -> list[Outcome]:
    """Let the rank fail when it first comes to a point; what each rank saw of it."""
    run.calls_until(SCENES[run.scene] - 1)
    before = run.held()
    points, told, took = Points(lambda passed: passed[-1] == where and passed.count(where) == 1), ["", ""], 0.0
    if rank == FAULTY and run.scene == "idle":
        run.fault()
    for call in range(2):
        began = time.monotonic()
        with watching(points) if rank == FAULTY and call == 0 else nullcontext():
            told[call] = run.call()
        took = max(took, time.monotonic() - began)
        everyones: list[Any] = [None, None]
        dist.all_gather_object(everyones, told[call], beside)
        if any(everyones):
            break
    _ = run.adafisher.skipped_steps  # asks what the device has decided
    held = run.held()[: len(before)]  # in the first call there was no state before
    lost = any(known.failure is not None for known in timeouts._meetings.values())
    undisturbed = not any(everyones) and not lost and same(list(run.weights().values()), list(after.values()))
    own = Outcome((told[0], told[1]), took, same(held, before), undisturbed, run.is_incomplete, lost)
    assert rank != FAULTY or where in points.passed, where
    outcomes: list[Any] = [None, None]
    dist.all_gather_object(outcomes, own, beside)
    return outcomes


# What speaks to the other ranks cannot tell them that it fails; they miss it.
SPEAKS = ("comm.", "stepping.found_inf.")


def can_tell(where: str) -> bool:
    """Whether all ranks have to learn of a failure there without waiting for the timeout.

    That is so of all operations of torch. A function that is entered and does nothing cannot run
    out of memory, but have a bug.
    """
    what, _, place = where.partition(" in ")
    return what.startswith("op") and bool(place) and not place.startswith(SPEAKS)


def check(where: str, outcomes: list[Outcome]) -> None:
    """All ranks know in the same call, or miss the rank; nobody can train on half a step."""
    faulty, other = outcomes[FAULTY], outcomes[1 - FAULTY]
    context = f"{where}: {outcomes}"
    if not any(outcome.lost for outcome in outcomes) and not any((*faulty.told, *other.told)):
        assert faulty.undisturbed and other.undisturbed, context  # a metric, or a message, that could not be made
        return
    assert all(outcome.seconds < TIMEOUT + SLACK for outcome in outcomes), context
    if any(outcome.lost for outcome in outcomes):
        assert not can_tell(where), context
        assert any(f"Rank {FAULTY} " in told or "could not exchange" in told for told in other.told), context
        assert other.incomplete or other.unchanged, context
        return
    if any(faulty.told) and not any(other.told):  # after the last collective: it is missed in the next call
        assert not can_tell(where) and (faulty.incomplete or "stepping.metrics." in where), context
        return
    assert all(outcome.incomplete or outcome.unchanged for outcome in outcomes), context
    assert list(map(bool, faulty.told)) == list(map(bool, other.told)), context
    assert any("says the test" in told or "momentum" in told for told in faulty.told), context
    assert any(f"rank {FAULTY} failed" in told for told in other.told), context
    assert faulty.incomplete == other.incomplete, context


def fail_everywhere(layout: str, on_device: bool, scene: str, operations: bool, every: int) -> int:
    """See `sweep`; how many points there were."""
    begin, count = 0, 0
    while True:
        found, left = run_ranks(
            sweep, 2, layout, on_device, scene, operations, begin, every,
            timeout=1200, group_timeout=TIMEOUT, deepspeed=layout.startswith("zero"), lost=[2],
        )[0]  # fmt: skip
        for where, outcomes in found:
            check(where, outcomes)
        count += len(found)
        if not found or not any(outcome.lost for outcome in found[-1][1]):
            return count
        begin = left


ON = pytest.mark.parametrize("on_device", [False, True], ids=["hosts", "device"])
IN_LAYOUTS = pytest.mark.parametrize(
    "layout", [pytest.param(name, marks=pytest.mark.deepspeed) if "zero" in name else name for name in LAYOUTS]
)


@IN_LAYOUTS
@ON
def test_an_operation_fails(layout: str, on_device: bool) -> None:
    """Some of them: a step has 30 to 50, of which a function's arithmetic is one."""
    assert fail_everywhere(layout, on_device, "usual", True, 8) > 3


def test_a_rank_that_keeps_the_others_company_fails() -> None:
    assert fail_everywhere("ddp", True, "idle", True, 1) > 1


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("scene", SCENES)
@IN_LAYOUTS
@ON
def test_each_point_fails(layout: str, on_device: bool, scene: str) -> None:
    if scene == "idle" and not on_device:
        pytest.skip("where hosts decide, all ranks stop at once")
    assert fail_everywhere(layout, on_device, scene, False, 1) > 50


# ---- a rank is killed, or stopped ----


def collectives_of(rank: int, world: int, layout: str, on_device: bool, scene: str) -> int:
    start(on_device)
    return count_of(traced(layout, scene, rank, world).passed)


def count_of(passed: list[str]) -> int:
    return sum(map(is_collective, passed))


def is_collective(what: str) -> bool:
    return what.startswith("op c10d.")


def lost(
    rank: int, world: int, layout: str, on_device: bool, scene: str, how: str, at: int, begun: bool
) -> tuple[float, str]:
    """A rank is lost right before its n-th collective of a step, or right after it has begun it.

    More points there are not, as far as other ranks can see. Returns how long a rank that is left
    took, and what it was told; nothing where it came to the end of the optimizer's step.
    """
    start(on_device)
    run = Training(layout, scene, rank, world)
    run.calls_until(SCENES[scene] - 1)
    if rank == LOST:

        def is_there(passed: list[str]) -> bool:
            now, last = count_of(passed), passed[-2 if begun and len(passed) > 1 else -1]
            return now == at and is_collective(last) and not (begun and is_collective(passed[-1]))

        with watching(Points(is_there, lambda: os.kill(os.getpid(), SIGNALS[how]))):
            run.call()
    # What a wrapper does after the optimizer's step is its own; and each part is a call of its own.
    real, began, answers = AdaFisher.step, time.monotonic(), []

    def step(self: AdaFisher, closure: Any = None) -> Any:
        try:
            result = real(self, closure)
        except Exception as error:
            answers.append(str(error))
            raise SystemExit from error
        answers.append("")
        if len(answers) == PARTS.get(layout, 1):
            raise SystemExit
        return result

    AdaFisher.step = step  # type: ignore[method-assign]
    with pytest.raises(SystemExit):
        run.call()
    return time.monotonic() - began, answers[-1]


SIGNALS = {"killed": signal.SIGKILL, "stopped": signal.SIGSTOP}
PARTS = {"zero1": 2, "zero2": 2, "zero3": 2}  # DeepSpeed steps one param group after the other


def lose(layout: str, on_device: bool, scene: str, how: str, at: int, begun: bool, last: bool) -> None:
    """What the rank that is left has to be told; `last`: whether it may come to the end."""
    more: dict[str, Any] = {"group_timeout": TIMEOUT, "deepspeed": layout.startswith("zero")}
    seconds, told = run_ranks(lost, 2, layout, on_device, scene, how, at, begun, lost=[LOST], timeout=120, **more)[0]
    context = f"{how} {'after' if begun else 'before'} collective {at}: {seconds:.1f} s, {told}"
    assert seconds < TIMEOUT + SLACK, context
    named = f"Rank {LOST} " in told or "could not exchange" in told  # it came, and was lost before it was done
    assert named or (last and not told), context


def lose_everywhere(layout: str, on_device: bool, scene: str, every: int) -> int:
    """At every n-th of the collectives, before and after; how many there are."""
    count = max(run_ranks(collectives_of, 2, layout, on_device, scene, deepspeed=layout.startswith("zero")))
    with ThreadPoolExecutor(4) as pool:  # most of them wait for a timeout
        tasks = [
            pool.submit(lose, layout, on_device, scene, how, at, begun, begun and at == count)
            for at in range(1, count + 1, every)
            for begun in (False, True)
            for how in SIGNALS
        ]
        for task in tasks:
            task.result()
    return count


@pytest.mark.parametrize("how", SIGNALS)
@ON
def test_a_rank_is_lost(how: str, on_device: bool) -> None:
    lose("fsdp2", on_device, "usual", how, 2, begun=False, last=False)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("scene", ["first", "usual", "measured"])
@IN_LAYOUTS
@ON
def test_a_rank_is_lost_anywhere(layout: str, on_device: bool, scene: str) -> None:
    assert lose_everywhere(layout, on_device, scene, 1) > 2
