"""What keeps a rank in step with the others when its own work fails."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import TypeVar

T = TypeVar("T")


class DeferredErrors:
    """The first error of this rank's own work in a step.

    A rank that raised between two collectives would leave the others waiting in the second. So its
    work runs through `attempt`, which remembers an error instead of raising it, and does nothing
    after that; the rank goes on to the next collective that tells all ranks of it
    (`stepping.consistency`).

        if errors.none:
            with errors:
                ...  # the same as `attempt`, without a function of its own
    """

    def __init__(self) -> None:
        self.error: Exception | None = None

    @property
    def none(self) -> bool:
        """Whether nothing has failed so far."""
        return self.error is None

    def __enter__(self) -> None:
        """Remember an error of the block instead of raising it."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if isinstance(error, Exception):
            self.error = error
            return True
        return False

    def attempt(self, work: Callable[[], object]) -> bool:
        """Do it, unless something failed before; returns whether it was done."""
        if self.error is None:
            with self:
                work()
        return self.error is None

    def insist(self, work: Callable[[], object]) -> None:
        """Do it even after an error, which then is the one that is remembered."""
        first = self.error
        with self:
            work()
        self.error = first or self.error

    def result(self, work: Callable[[], T], otherwise: T) -> T:
        """What it returns; after an error, something else."""
        if self.error is None:
            with self:
                return work()
        return otherwise

    def rescue(self, work: Callable[[], object]) -> None:
        """Do it even after an error, if possible, to improve what the other ranks are sent."""
        with suppress(Exception):
            work()
