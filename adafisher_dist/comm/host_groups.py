"""The ranks that save and load together, or agree in a step on the host, and their gloo groups.

A rank that is done with its part waits for the others as long as they go on with theirs: what they
do may take longer than the timeout of the process group, but nobody may keep still for as long as
that.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from time import monotonic
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from adafisher_dist.comm.timeouts import assemble, meetings, timeout_of

T = TypeVar("T")

STEP = "a step of AdaFisher"


@dataclass(frozen=True, slots=True)
class HostGroup:
    """The ranks that save and load together, or agree in a step on the host, and their gloo group.

    It is apart from the groups that training uses, so that a save can go on in the background.
    `handle` is None for one process without torch.distributed. `purpose` and `error` are for the
    message of a rank that waits in vain.
    """

    handle: dist.ProcessGroup | None
    rank: int
    size: int
    purpose: str = STEP
    error: type[Exception] = RuntimeError

    @property
    def first(self) -> int:
        """The global number of the first of these ranks."""
        return self.members[0]

    @property
    def members(self) -> list[int]:
        """The global numbers of these ranks, in order."""
        return [0] if self.handle is None else dist.get_process_group_ranks(self.handle)

    @property
    def is_lost(self) -> bool:
        """Whether a rank did not come: who waits for it once more waits in vain."""
        return self.handle is not None and meetings(self.handle).failure is not None

    def gather(self, value: T) -> list[T]:
        """What each rank gives, in the order of the ranks.

        Raises:
            Exception: `error`: names the ranks that did not come within the timeout of the process
                group.
        """
        if self.handle is None:
            return [value]
        with self.at_work():
            pass
        result: list[Any] = [None] * self.size
        try:
            dist.all_gather_object(result, value, self.handle)
        except RuntimeError as problem:
            raise self.error(self.explain(problem)) from problem
        return result

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Work that each rank does by itself, without collectives; ends when all have done it.

        Ranks that are done wait for the others as long as those go on, which `beat` tells.

        Raises:
            Exception: `error`: names the ranks that did not come, or that came no further, for the
                timeout. Else what the work raised, after all are done.
        """
        if self.handle is None:
            yield
            return
        failure = None
        _here.rounds = rounds = _Rounds(self)
        try:
            yield
        except Exception as error:
            failure = error
        finally:
            _here.rounds = None
        rounds.finish()
        if failure is not None:
            raise failure

    def explain(self, problem: Exception) -> str:
        """Why something that uses this group's collectives failed, naming the lost ranks."""
        if self.handle is None or not isinstance(problem, RuntimeError):
            return f"{type(problem).__name__}: {problem}"
        return meetings(self.handle).explain(problem, self.purpose)


class _Rounds:
    """Small all-reduces that tell ranks that are done that others still work: one for each `beat`.

    A rank at work starts one and looks at it again at a later beat; only ranks that are done wait
    for it. A rank that comes to no beat lets the others wait in the collective, which has the
    timeout of the process group.
    """

    def __init__(self, hosts: HostGroup) -> None:
        assert hosts.handle is not None
        self._hosts, self._meetings = hosts, meetings(hosts.handle)
        self._interval = min(1.0, self._meetings.timeout / 10)
        self._began = monotonic()
        self._all_done = torch.zeros((), dtype=torch.int64, device="cpu")
        self._open: Any = None  # the collective
        self._ended = 0

    def beat(self) -> None:
        """This rank is at work."""
        if monotonic() - self._began < self._interval or (self._open is not None and not self._open.is_completed()):
            return
        if self._open is not None:
            self._end()
        self._start(0)
        self._meetings.announce()

    def finish(self) -> None:
        """This rank is done: wait until all are."""
        if self._open is not None:
            self._end()
        self._start(1)
        while not self._end():
            self._start(1)

    def _start(self, done: int) -> None:
        if self._meetings.failure is not None:  # the group cannot be used any more
            raise self._hosts.error(self._meetings.failure)
        self._began = monotonic()
        self._meetings.begin()
        self._all_done.fill_(done)
        self._open = dist.all_reduce(self._all_done, dist.ReduceOp.MIN, self._hosts.handle, async_op=True)

    def _end(self) -> bool:
        """Wait for the others to come to the collective; whether all are done."""
        opened, self._open = self._open, None
        self._meetings.wait(opened, self._hosts.purpose, self._hosts.error, under_way=self._ended > 0)
        self._ended += 1
        return bool(self._all_done)


_here = threading.local()  # an asynchronous save works beside the training


def beat() -> None:
    """Tell ranks that wait in `HostGroup.at_work` that this one still works; does not wait itself.

    Raises:
        Exception: another rank was lost, so that the work is in vain.
    """
    rounds = getattr(_here, "rounds", None)
    if rounds is not None:
        rounds.beat()


_Key = tuple[str, tuple[int, ...], float]  # purpose, global ranks, timeout
_host_groups: dict[_Key, tuple[Any, HostGroup]] = {}  # beside the world that they are of


def host_group(
    ranks: Sequence[int] | None,
    stands_for: dist.ProcessGroup | None = None,
    purpose: str = STEP,
    error: type[Exception] = RuntimeError,
) -> HostGroup:
    """The group of the hosts of these global ranks, by default of all.

    The first call is a collective of these ranks.

    Args:
        ranks: the global numbers.
        stands_for: the process group whose timeout it has, by default the world.
        purpose: each has a group of its own, so that a save in the background and a step do not
            meet in one.
        error: what is raised where ranks do not come.

    Raises:
        ValueError: this process is not among them.
        Exception: `error`: names the ranks that did not come to make it.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return HostGroup(None, 0, 1, purpose, error)
    everyone = range(dist.get_world_size())
    members = tuple(sorted(ranks) if ranks is not None else everyone)  # new_group sorts them too
    if dist.get_rank() not in members:
        raise ValueError(f"This is rank {dist.get_rank()}, and only the ranks {list(members)} share the parameters.")
    timeout = timeout_of(stands_for)
    key = purpose, members, timeout
    world, known = _host_groups.get(key, (None, None))
    # One that has lost a rank cannot be used again; if all ranks are there after all, they make
    # another one.
    if known is None or world is not dist.group.WORLD or meetings(known.handle).failure is not None:
        leave = assemble(members, purpose, timeout, error)
        try:
            handle = dist.new_group(
                list(members),
                timeout=timedelta(seconds=timeout),
                backend="gloo",
                use_local_synchronization=len(members) < len(everyone),
            )
            known = HostGroup(handle, members.index(dist.get_rank()), len(members), purpose, error)
            with known.at_work():  # all have made it
                pass
        except RuntimeError as problem:
            raise error(
                f"The ranks could not make a gloo group for {purpose}. {problem} Where they cannot reach each other,"
                " GLOO_SOCKET_IFNAME names the interface that all hosts share."
            ) from problem
        finally:
            leave()
        _host_groups[key] = dist.group.WORLD, known
    return known
