"""Trials and what went wrong in them, as tests and the harness (`fuzz`) count it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from adafisher_dist import CheckpointError, UnsupportedLayoutError

OURS = (CheckpointError, UnsupportedLayoutError, TypeError, ValueError)

# What tells a reader what to do, or what is allowed instead.
REMEDY = re.compile(
    r"\b(should|must|may|needs?|at (least|most)|below|instead|save|load|give|use|take|set|write|choose|call|update|free"
    r"|raise|copy|put|switch|delete|restore|rename|pass|leave|did you mean)\b| are: ",
    re.IGNORECASE,
)


class Lost(AssertionError):
    """A checkpoint that was saved is not there any more, or an older one is the last."""


class Wrong(AssertionError):
    """A state is none of those that were saved, or an error changed it."""


class Hung(AssertionError):
    """Longer than the timeout allows."""


class Foreign(AssertionError):
    """An error that is none of ours, or names neither what is wrong nor what to do."""


BAD = {"lost": Lost, "wrong": Wrong, "hung": Hung, "foreign": Foreign}


def column_of(error: Exception) -> str:
    """Under which of them an error of a trial is counted; a plain assertion is a wrong state."""
    for column, kind in BAD.items():
        if isinstance(error, kind):
            return column
    return "wrong" if isinstance(error, AssertionError) else "foreign"


@dataclass(slots=True)
class Tally:
    """Of one kind of trials.

    Attributes:
        trials: how many.
        outcomes: of those that went well, how they ended.
        problems: of the others, the column and what was wrong.
    """

    trials: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    problems: list[tuple[str, str]] = field(default_factory=list)

    @contextmanager
    def trial(self, what: str) -> Iterator[None]:
        """One of them; whatever it raises is noted, and the next one goes on."""
        self.trials += 1
        with self.noting(what):
            yield

    @contextmanager
    def noting(self, what: str) -> Iterator[None]:
        """The same, around what counts its trials itself."""
        try:
            yield
        except Exception as error:
            told = f"{what}: {type(error).__name__}: {error}"
            shown = told if len(told) < 3000 else f"{told[:1000]} … {told[-2000:]}"
            self.problems.append((column_of(error), shown))

    def count(self, column: str) -> int:
        return sum(own == column for own, _ in self.problems)

    def check(self) -> None:
        """For tests: nothing went wrong."""
        told = [f"{column}: {text}" for column, text in self.problems[:40]]
        assert not self.problems, f"{dict(self.outcomes)}\n" + "\n".join(told)


def explained(error: Exception, *names: str) -> None:
    """Check that an error is one of ours, can be shown, names these, and says what to do.

    Raises:
        Foreign: it is not, or does not.
    """
    told = str(error)
    if not isinstance(error, OURS):
        raise Foreign(f"{type(error).__name__}: {told[:300]}") from error
    if missing := [name for name in names if name not in told]:
        raise Foreign(f"does not name {missing[0]}: {told[:600]}") from error
    if not told.replace("\n", "").isprintable() or max(map(len, told.split("\n"))) > 3000:
        raise Foreign(f"cannot be shown: {told[:300]!r}") from error
    rest = told
    for name in names:
        rest = rest.replace(name, "")
    if not REMEDY.search(rest):
        raise Foreign(f"says not what to do: {told[:600]}") from error


def refused(attempt: Callable[[], Any], *names: str) -> bool:
    """Whether it raises, which has to be an error as `explained` checks it."""
    try:
        attempt()
    except Exception as error:
        explained(error, *names)
        return True
    return False
