"""A rank fails, is killed or is stopped at every point of a step, in each layout.

Both where hosts ask each other and where a device decides, which a CPU stands for here. The points
are found by tracing a step (`fault_points`).
"""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import pytest
from fault_points import Points, at_collective, count_of, watching
from fault_runs import FAULTY, PARTS, SCENES, SLACK, TIMEOUT, Outcome, Place, Training, passed, start, sweep, traced
from ranks import run_ranks

from adafisher_dist import AdaFisher

pytestmark = pytest.mark.dist

LAYOUTS = ["ddp", "zero1", "fsdp2", "hsdp", "zero3"]
LIKE = {"zero0": "ddp", "zero2": "zero1"}  # the very same points, as a test below has it
LOST = 1  # the rank that is killed or stopped


def in_layouts(names: Sequence[str]) -> pytest.MarkDecorator:
    marked = [pytest.param(name, marks=pytest.mark.deepspeed) if "zero" in name else name for name in names]
    return pytest.mark.parametrize("layout", marked)


ON = pytest.mark.parametrize("on_device", [False, True], ids=["hosts", "device"])


# ---- which points ----


@cache
def points_of(layout: str, on_device: bool, scene: str) -> tuple[str, ...]:
    """Those of the faulty rank, in its order."""
    return tuple(run_ranks(passed, 2, layout, on_device, scene, deepspeed=layout.startswith("zero"))[FAULTY])


def places_of(layout: str, on_device: bool, scene: str) -> list[Place]:
    """Where a rank has to fail in a layout that does not in one before it.

    All points of every layout and scene would be 32,000 and take days. A point that an earlier
    layout has too is the same line, called by the same, between the same collectives. Operations
    can run out of memory: all of them fail, those that are come to more than once, as in each
    chunk, also at the last time. A function that fails as it is entered has a bug, and half of them
    are waited for until the timeout: of these every tenth.
    """
    known = {point for other in LAYOUTS[: LAYOUTS.index(layout)] for point in points_of(other, on_device, scene)}
    if scene in ("second", "measured"):  # what is found there differs, so that all operations fail once more
        before = {*points_of(layout, on_device, "first"), *points_of(layout, on_device, "usual")}
        known |= {point for point in before if not can_tell(point)}
    times = Counter(points_of(layout, on_device, scene))
    new = [point for point in times if point not in known]
    operations = [point for point in new if point.startswith("op")]
    calls = [point for point in new if not point.startswith("op")]
    again = [(point, times[point]) for point in operations if times[point] > 1 and can_tell(point)]
    return [*((point, 1) for point in operations + calls[::10]), *again]


@pytest.mark.slow
@ON
@pytest.mark.parametrize("scene", SCENES)
@pytest.mark.parametrize("layout", LIKE)
def test_points_of_layouts_that_are_like_others(layout: str, on_device: bool, scene: str) -> None:
    """But that the search for a DDP, which may be in a `join()`, finds one or none."""

    def without_search(name: str) -> list[str]:
        return [point for point in points_of(name, on_device, scene) if "uneven_inputs._find" not in point]

    assert without_search(layout) == without_search(LIKE[layout])


# ---- a rank fails ----

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
    assert not faulty.anew and not other.anew, context
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


def fail_at(layout: str, on_device: bool, scene: str, places: list[Place], at_once: int = 1) -> None:
    """Let a rank fail at each of these places, on some pairs of processes at once."""
    with ThreadPoolExecutor(at_once) as pool:
        parts = [places[first::at_once] for first in range(at_once)]
        wrong = [
            text
            for found in pool.map(lambda part: fail_one_by_one(layout, on_device, scene, part), parts)
            for text in found
        ]
    assert not wrong, "\n".join([f"{len(wrong)} of {len(places)}:", *wrong])


def fail_one_by_one(layout: str, on_device: bool, scene: str, places: list[Place]) -> list[str]:
    """What was wrong; a process group that has lost a rank is followed by another."""
    wrong = []
    while places:
        found = run_ranks(
            sweep, 2, layout, on_device, scene, places,
            timeout=3000, group_timeout=TIMEOUT, deepspeed=layout.startswith("zero"), lost=[2],
        )[0]  # fmt: skip
        for place, outcomes in found:
            try:
                check(place[0], outcomes)
            except AssertionError as error:
                wrong.append(str(error))
        places = places[len(found) :]
    return wrong


@in_layouts([*LAYOUTS, *LIKE])
@ON
def test_an_operation_fails(layout: str, on_device: bool) -> None:
    """Some of them: a step has 30 to 50, of which a function's arithmetic is one."""
    operations = [point for point in dict.fromkeys(points_of(layout, on_device, "usual")) if can_tell(point)]
    assert len(operations) > 24
    fail_at(layout, on_device, "usual", [(point, 1) for point in operations[::8]])


def test_a_rank_that_keeps_the_others_company_fails() -> None:
    operations = [point for point in dict.fromkeys(points_of("ddp", True, "idle")) if can_tell(point)]
    assert len(operations) > 1
    fail_at("ddp", True, "idle", [(point, 1) for point in operations])


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("scene", SCENES)
@in_layouts(LAYOUTS)
@ON
def test_each_point_fails(layout: str, on_device: bool, scene: str) -> None:
    if scene == "idle" and not on_device:
        pytest.skip("where hosts decide, all ranks stop at once")
    places = places_of(layout, on_device, scene)
    if not places:
        pytest.skip("all of its points are those of the layouts before it")
    fail_at(layout, on_device, scene, places, at_once=4)


# ---- a rank is killed, or stopped ----


def collectives_of(rank: int, world: int, layout: str, on_device: bool, scene: str) -> int:
    start(on_device)
    return count_of(traced(layout, scene, rank, world).passed)


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
        with watching(Points(at_collective(at, begun), lambda: os.kill(os.getpid(), SIGNALS[how]))):
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


def lose(layout: str, on_device: bool, scene: str, how: str, at: int, begun: bool, last: bool) -> None:
    """What the rank that is left has to be told; `last`: whether it may come to the end."""
    more: dict[str, Any] = {"group_timeout": TIMEOUT, "deepspeed": layout.startswith("zero")}
    seconds, told = run_ranks(lost, 2, layout, on_device, scene, how, at, begun, lost=[LOST], timeout=120, **more)[0]
    context = f"{how} {'after' if begun else 'before'} collective {at}: {seconds:.1f} s, {told}"
    assert seconds < TIMEOUT + SLACK, context
    named = f"Rank {LOST} " in told or "could not exchange" in told  # it came, and was lost before it was done
    assert named or (last and not told), context


def lose_everywhere(layout: str, on_device: bool, scene: str) -> int:
    """Before and after all of the collectives, killed and stopped in turns; how many there are.

    Right after one and right before the next are the same to the other ranks, but for what has been
    sent, so that each is met by both.
    """
    count = max(run_ranks(collectives_of, 2, layout, on_device, scene, deepspeed=layout.startswith("zero")))
    with ThreadPoolExecutor(4) as pool:  # most of them wait for a timeout
        tasks = [
            pool.submit(lose, layout, on_device, scene, how, at, begun, begun and at == count)
            for at in range(1, count + 1)
            for begun, how in zip((False, True), SIGNALS if at % 2 else reversed(SIGNALS), strict=True)
        ]
        wrong = [str(task.exception()) for task in tasks if task.exception() is not None]
    assert not wrong, "\n".join(wrong)
    return count


@pytest.mark.parametrize("how", SIGNALS)
@ON
def test_a_rank_is_lost(how: str, on_device: bool) -> None:
    lose("fsdp2", on_device, "usual", how, 2, begun=False, last=False)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@in_layouts(["ddp", "zero0", "zero1", "fsdp2", "hsdp", "zero3"])
@ON
def test_a_rank_is_lost_anywhere(layout: str, on_device: bool) -> None:
    assert lose_everywhere(layout, on_device, "usual") > 1


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("scene", ["first", "measured"])
@in_layouts(["ddp", "zero1"])  # which have all kinds of collectives
@ON
def test_a_rank_is_lost_in_a_first_or_measured_step(layout: str, on_device: bool, scene: str) -> None:
    assert lose_everywhere(layout, on_device, scene) > 2
