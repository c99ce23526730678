"""Work that every rank does by itself, and whose failure on one is an error on all."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

from adafisher_dist.checkpoint.errors import CheckpointError, os_problem
from adafisher_dist.comm.host_groups import HostGroup

T = TypeVar("T")


def run_on_all_ranks(hosts: HostGroup, work: Callable[[], T]) -> list[T]:
    """What `work` returns on each rank, in the order of the ranks; it may not call a collective.

    Raises:
        Exception: what `work` raised here; a CheckpointError in the place of an OSError.
        CheckpointError: what it raised elsewhere, with the number of the rank; or which ranks did
            not come, or no further, within the timeout of the process group.
    """
    with hosts.at_work():
        value, error = attempt(work)
    if isinstance(error, OSError):
        error = _as_ours(error)
    answers = hosts.gather((value, None if error is None else f"{type(error).__name__}: {error}"))
    if error is not None:
        raise error
    for rank, (_, problem) in enumerate(answers):
        if problem is not None:
            raise CheckpointError(f"Rank {rank} failed, so all stop. {problem}")
    return [answer for answer, _ in answers]  # type: ignore[misc]


def attempt(work: Callable[[], T]) -> tuple[T | None, Exception | None]:
    """What it returns, or what it raised."""
    try:
        return work(), None
    except Exception as error:
        return None, error


def _as_ours(error: OSError) -> CheckpointError:
    ours = CheckpointError(os_problem(error))
    ours.__cause__ = error
    return ours


def told(error: BaseException) -> str:
    """An error for the other ranks: its text, with its type where it is not told of as ours."""
    if isinstance(error, OSError):
        return os_problem(error)
    return f"{error}" if isinstance(error, CheckpointError) else f"{type(error).__name__}: {error}"


def by_cause(problems: Mapping[int, str | None]) -> str:
    """In one line, what went wrong on which ranks; empty where nothing did."""
    causes: dict[str, list[int]] = {}
    for rank, text in problems.items():
        if text is not None:
            causes.setdefault(text, []).append(rank)
    return "; ".join(f"Rank {', '.join(map(str, ranks))}: {text}" for text, ranks in causes.items())
