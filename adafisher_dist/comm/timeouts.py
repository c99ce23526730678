"""How long a rank waits for the others, and the names of those that did not come.

The ranks of a process group meet in the same order, so each of them numbers their meetings by
itself. A rank that has waited for a while, or whose collective failed, tells the store of
torch.distributed at which meeting it is: who has not come as far is missed. Nothing is told, and
nothing asked, where nobody waits.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from datetime import timedelta
from hashlib import sha256
from threading import Thread
from time import monotonic, sleep
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch.distributed as dist
from torch.distributed import distributed_c10d

T = TypeVar("T")

_PATIENCE = 0.5  # seconds, after which a rank that waits says so
_GRACE = 1.5  # seconds that a rank whose collective failed gives the others to say where they are
_MARGIN = 2.0  # seconds that the backend has, past the timeout, to end a collective by itself: it then tells its peers


def timeout_of(group: dist.ProcessGroup | None) -> float:
    """Seconds that ranks may wait for each other in a process group, by default in the world.

    A group that was given no timeout (torch's DeviceMesh and DeepSpeed make such) has that of the
    world.
    """
    world = dist.group.WORLD
    for candidate in (group, world):
        seconds = _given(candidate)
        if seconds is not None:
            return seconds
    return _default(dist.get_backend(world))


def _given(group: dist.ProcessGroup | None) -> float | None:
    """The timeout a process group was made with; None if it is torch's default or unreadable."""
    found = []
    for device in getattr(group, "_device_types", ()):
        with suppress(RuntimeError, AttributeError):  # not every backend has options
            backend: Any = group._get_backend(device)  # type: ignore[union-attr]
            seconds = backend.options._timeout.total_seconds()
            if seconds != _default(backend.name()):
                found.append(seconds)
    return min(found, default=None)


def _default(backend: Any) -> float:
    return float(distributed_c10d._get_default_timeout(backend).total_seconds())


def _store(prefix: str) -> Any:
    """A part of the store by which the ranks found each other; None where there is none (MPI)."""
    store = distributed_c10d._get_default_store()
    return None if store is None else distributed_c10d.PrefixStore(f"adafisher_dist/{prefix}", store)


class Meetings:
    """The collectives that the ranks of a process group come to together.

    Attributes:
        ranks: the group's, by their global numbers.
        timeout: seconds; see `timeout_of`.
        failure: why the first one that failed did, where one has.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.ranks = dist.get_process_group_ranks(group)
        self.timeout = timeout_of(group)
        self.failure: str | None = None
        self._number = 0
        self._store = _store(f"meetings/{group.group_name}")

    def begin(self) -> None:
        """This rank starts the next one."""
        self._number += 1

    def announce(self) -> None:
        """Tell the store at which one this rank is; does not wait for an answer."""
        if self._store is not None and not any(thread.is_alive() for thread in _asking):
            with suppress(RuntimeError):
                self._store.set(str(dist.get_rank()), str(self._number))

    def wait(self, work: Any, purpose: str, error: type[Exception], under_way: bool = False) -> None:
        """Wait for a collective on the CPU, as long as the timeout allows.

        Args:
            work: the collective.
            purpose: what it belongs to, for the message.
            error: what is raised.
            under_way: whether all ranks have come to it already, and some only have to end their
                part.

        Raises:
            Exception: `error`: names the ranks that did not come.
        """
        patience = min(_PATIENCE, self.timeout / 2)
        problem: Exception = TimeoutError()
        try:
            if _ends(work, patience):
                return
            self.announce()
            if _ends(work, self.timeout + _MARGIN - patience):
                return
        except RuntimeError as failure:
            problem = failure
        raise error(self.explain(problem, purpose, under_way)) from problem

    def explain(self, problem: Exception, purpose: str, under_way: bool = False) -> str:
        """Why a collective failed, in words.

        The first answer stays, since a group that failed once cannot be used again.
        """
        if self.failure is None:
            self.announce()
            others = set(self.ranks) - {dist.get_rank()}
            absent = _within(2 * _GRACE, lambda: self._absent(others)) if self._store is not None else None
            if absent is None and len(others) == 1:
                absent = sorted(others)
            if absent == []:  # all came, and it failed for another reason
                self.failure = f"The ranks could not exchange what {purpose} needs. {problem}"
            else:
                late = isinstance(problem, TimeoutError) or "timed out" in str(problem).lower()
                self.failure = missed(absent, purpose, self.timeout if late else None, under_way)
        return self.failure

    def _absent(self, others: set[int]) -> list[int]:
        """Who of them has not come as far as this rank, when they had a moment to say so."""
        deadline = monotonic() + _GRACE
        absent = set(others)
        while absent and monotonic() < deadline:
            sleep(0.05)
            absent -= {rank for rank in absent if self._reached(rank)}
        return sorted(absent)

    def _reached(self, rank: int) -> bool:
        return self._store.check([str(rank)]) and int(self._store.get(str(rank))) >= self._number


_meetings: WeakKeyDictionary[Any, Meetings] = WeakKeyDictionary()


def meetings(group: Any) -> Meetings:
    """Those of a process group."""
    if group not in _meetings:
        _meetings[group] = Meetings(group)
    return _meetings[group]


def assemble(ranks: Collection[int], name: str, timeout: float, error: type[Exception]) -> Callable[[], None]:
    """Wait until all of these ranks have come to make a process group together.

    Making the group waits too, but does not name the ranks that are missing.

    Returns:
        What has to be called when they have made it.

    Raises:
        Exception: `error`: names the ranks that did not come.
    """
    own = dist.get_rank()
    others = [str(rank) for rank in ranks if rank != own]
    store = _store(f"assemble/{name}/{sha256(repr(sorted(ranks)).encode()).hexdigest()}")
    if store is None or not others:
        return lambda: None
    absent = _within(timeout + _MARGIN, lambda: _missing(store, str(own), others, timeout))
    if absent is None or absent:
        raise error(missed(absent, name, timeout, under_way=False))
    return lambda: _within(_GRACE, lambda: store.delete_key(str(own)))


def _missing(store: Any, own: str, others: Sequence[str], timeout: float) -> list[int]:
    """The ranks that have not come in time: those that never came, else those that gave up."""
    store.set(own, "here")
    try:
        store.wait(others, timedelta(seconds=timeout))
    except RuntimeError:
        absent = [key for key in others if not store.check([key])]
        never = [key for key in absent if not store.check([f"{key} gave up"])]
        store.set(f"{own} gave up", "")
        store.delete_key(own)
        return [int(key) for key in never or absent]
    return []


def missed(absent: Sequence[int] | None, purpose: str, timeout: float | None, under_way: bool) -> str:
    """What to say of ranks that did not come: within the timeout, or since their connections broke.

    Args:
        absent: those ranks; None where they are not known.
        purpose: what they did not come to.
        timeout: in seconds; None where connections broke.
        under_way: whether they had come, and did not get any further.
    """
    who = f"Rank {absent[0]}" if absent and len(absent) == 1 else f"Ranks {', '.join(map(str, absent or ()))}"
    if not absent:
        who = "A rank (which one is not known: the store of torch.distributed, on rank 0 or its launcher, is silent)"
    if timeout is None:
        text = f"{who} ended, or was lost, before the end of {purpose}."
    elif under_way:
        text = f"{who} made no progress in {purpose} for {timeout:g} s (the timeout of the process group)."
    else:
        text = f"{who} did not come to {purpose} within {timeout:g} s (the timeout of the process group)."
    return text + (
        " See what happened there, and start all ranks again from the last checkpoint. All ranks have to make the same"
        " calls; if one is only slow, give init_process_group a longer timeout."
    )


def _ends(work: Any, seconds: float) -> bool:
    """Whether a collective ends in time.

    Raises:
        RuntimeError: it failed.
    """
    with suppress(RuntimeError):  # it failed, or there was not enough time
        work.wait(timedelta(seconds=seconds))
    if not work.is_completed():
        return False
    work.wait()
    return True


_asking: list[Thread] = []  # the store; another thread that needs it would have to wait for them


def _within(seconds: float, ask: Callable[[], T]) -> T | None:
    """The answer of a store; None if none comes in time, as its process may be gone or stopped."""
    answers: list[T] = []

    def run() -> None:
        with suppress(Exception):
            answers.append(ask())

    _asking[:] = [thread for thread in _asking if thread.is_alive()]
    thread = Thread(target=run, daemon=True)
    _asking.append(thread)
    try:
        thread.start()
    except RuntimeError:  # Python shuts down
        return None
    thread.join(seconds)
    return answers[0] if answers else None
