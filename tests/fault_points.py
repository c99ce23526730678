"""Every point of a step at which a rank can fail or be lost: found by tracing, not listed by hand.

A point is a call of one of the package's functions in a step, or an operation of torch in it (an
allocation, a copy, a collective). They are numbered in the order in which a rank comes to them. A
call of `step` that is a part of one (DeepSpeed makes them) has points of its own.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

from adafisher_dist import AdaFisher

OWN = "adafisher_dist."
# What keeps the order when something else fails cannot keep it when it fails itself.
TRUSTED = ("adafisher_dist.comm.deferred_errors", "adafisher_dist.comm.timeouts")

# Of functions that only compute, one point each is enough.
PURE = ("numerics.", "blocks.", "settings.")


class OutOfMemory(RuntimeError):
    """What torch.OutOfMemoryError is on a GPU."""


def fail() -> None:
    raise OutOfMemory("out of memory, says the test")


@dataclass(slots=True)
class Points:
    """The points that this rank has come to.

    Attributes:
        when: whether it is at the last one that something happens; by default it never does.
        act: what.
        passed: a description of each.
        part: the number of calls of `step` so far.
    """

    when: Callable[[list[str]], bool] = lambda passed: False
    act: Callable[[], None] = fail
    passed: list[str] = field(default_factory=list)
    part: int = 0

    def reach(self, what: str, frame: FrameType | None) -> None:
        """Come to the next one."""
        while frame is not None and not _is_own(frame):
            frame = frame.f_back
        if frame is not None:  # else it is torch's own, around the step
            self.passed.append(_place(what, frame) + (f", part {self.part}" if self.part > 1 else ""))
            if self.when(self.passed):
                self.act()


def _place(what: str, frame: FrameType) -> str:
    if _name(frame).startswith(PURE):
        return f"{what.split()[0]} in {_name(frame)}"
    return f"{what} in {_name(frame)}:{frame.f_lineno}"


def _is_own(frame: FrameType) -> bool:
    return str(frame.f_globals.get("__name__")).startswith(OWN)


def _name(frame: FrameType) -> str:
    return f"{frame.f_globals['__name__'].removeprefix(OWN)}.{frame.f_code.co_name}"


class _Operations(TorchDispatchMode):
    def __init__(self, points: Points) -> None:
        super().__init__()
        self._points = points

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._points.reach(f"op {func}", sys._getframe(1))
        return func(*args, **(kwargs or {}))


@contextmanager
def watching(points: Points) -> Iterator[Points]:
    """Number the points of the steps that AdaFisher takes within."""
    real = AdaFisher.step

    def see(frame: FrameType, event: str, argument: Any) -> None:
        """Python calls it, and what it raises, the function seems to raise."""
        if event != "call" or not _is_own(frame) or frame.f_globals["__name__"] in TRUSTED:
            return
        if not frame.f_code.co_flags & inspect.CO_GENERATOR:  # entered again and again; what it calls has its points
            points.reach(f"call {_name(frame)}", frame.f_back)

    def step(self: AdaFisher, closure: Any = None) -> Any:
        points.part += 1
        with _Operations(points):
            sys.setprofile(see)
            try:
                return real(self, closure)
            finally:
                sys.setprofile(None)

    step.hooked = True  # type: ignore[attr-defined]  # torch.optim wraps it no second time
    AdaFisher.step = step  # type: ignore[method-assign]
    try:
        yield points
    finally:
        AdaFisher.step = real  # type: ignore[method-assign]


def count_of(passed: list[str]) -> int:
    return sum(map(is_collective, passed))


def is_collective(what: str) -> bool:
    return what.startswith("op c10d.")


def at_collective(number: int, begun: bool) -> Callable[[list[str]], bool]:
    """Whether a rank is right before its n-th collective, or at the first point after it began."""

    def is_there(passed: list[str]) -> bool:
        now, last = count_of(passed), passed[-2 if begun and len(passed) > 1 else -1]
        return now == number and is_collective(last) and not (begun and is_collective(passed[-1]))

    return is_there
