"""The collectives of a step.

Every function is called by all ranks of a group in the same order. With one rank, nothing is sent.
Data on the CPU with a backend that knows accelerators alone (NCCL) travels through the device; what
a host has to know before it goes on travels in a gloo group, since reading it from the device would
wait for all the work that is queued there. A host waits for no rank longer than the timeout of the
process group (`timeouts`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from adafisher_dist.comm.host_groups import STEP, host_group
from adafisher_dist.comm.timeouts import meetings

sent: Counter[str] = Counter()
"""Bytes that this process has sent in steps: weights, blocks, verdicts (DESIGN.md, "Bytes")."""


class Waits:
    """How long a step waits for other ranks: on the host, or on the stream of an accelerator."""

    def __init__(self) -> None:
        self._on_host = 0.0
        self._on_device: list[tuple[torch.Event, torch.Event]] = []

    def measure(self, wait: Callable[[], object], device: torch.device) -> None:
        """Wait for a collective that has been started."""
        if device.type == "cpu":
            began = perf_counter()
            wait()
            self._on_host += perf_counter() - began
            return
        events = torch.Event(device, enable_timing=True), torch.Event(device, enable_timing=True)
        stream = torch.accelerator.current_stream(device)  # which need not be of the current device
        events[0].record(stream)
        wait()
        events[1].record(stream)
        self._on_device.append(events)

    def seconds(self) -> float:
        """All together; waits for what the accelerator has not done yet."""
        total = self._on_host
        for before, after in self._on_device:
            after.synchronize()
            total += before.elapsed_time(after) / 1e3
        return total


_measuring: Waits | None = None


def measure_waits(waits: Waits | None) -> None:
    """From now on add to these how long steps wait; None: to none."""
    global _measuring
    _measuring = waits


@dataclass(frozen=True, slots=True)
class Group:
    """The ranks that share the blocks; `handle` is None where torch.distributed is not used."""

    handle: dist.ProcessGroup | None
    rank: int
    size: int
    devices: str = ""  # the device types that the backend can send from, as torch writes them: "cpu:gloo,cuda:nccl"
    replicas: Group | None = None  # the ranks that hold the same blocks as this one, in other copies of the group

    @property
    def total_size(self) -> int:
        """How many ranks take each step together."""
        return self.size * (self.replicas.size if self.replicas is not None else 1)

    @property
    def is_first(self) -> bool:
        """Whether this rank is the one of them that logs."""
        return self.rank == 0 and (self.replicas is None or self.replicas.rank == 0)

    @property
    def members(self) -> frozenset[int]:
        """The global ranks that share the blocks, replicas left out."""
        return frozenset(dist.get_process_group_ranks(self.handle)) if self.handle is not None else frozenset({0})

    def comm_buffer(self, tensor: Tensor) -> CommBuffer:
        """What of a tensor the group's backend can send; allocates where that is a copy."""
        if self.handle is None or tensor.device.type in self.devices:
            return CommBuffer(tensor, tensor)
        return CommBuffer(tensor, tensor.to(torch.accelerator.current_accelerator() or "cpu"))


@dataclass(frozen=True, slots=True, eq=False)
class CommBuffer:
    """A 1-d tensor and what is sent: the tensor itself, or a copy on a device the backend knows.

    Made once, since allocating may fail, and a rank that fails between two collectives leaves the
    others waiting.
    """

    tensor: Tensor
    sent: Tensor

    def part(self, start: int, stop: int) -> CommBuffer:
        """Elements [start, stop)."""
        tensor = self.tensor[start:stop]
        return CommBuffer(tensor, tensor if self.sent is self.tensor else self.sent[start:stop])

    def load(self) -> Tensor:
        """What is sent, with the tensor's values."""
        return self.sent if self.sent is self.tensor else self.sent.copy_(self.tensor)

    def unload(self) -> Tensor:
        """The tensor, with the values that arrived."""
        return self.tensor if self.sent is self.tensor else self.tensor.copy_(self.sent)


def join(process_group: dist.ProcessGroup | None, replicas: Group | None = None) -> Group:
    """The given process group, by default all ranks, or one process alone.

    Args:
        process_group: the ranks that share the blocks; all of them where None.
        replicas: the ranks that hold the same blocks as this one.

    Raises:
        ValueError: this process is not a member.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return Group(None, 0, 1)
    handle = process_group if process_group is not None else dist.group.WORLD
    rank, size = dist.get_rank(handle), dist.get_world_size(handle)
    if rank < 0:
        raise ValueError("process_group: this rank is not a member of the process group given to AdaFisher.")
    return Group(handle, rank, size, dist.get_backend_config(handle), replicas)


def own_rank() -> int:
    """This process's rank among all; 0 for one process alone."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def minimum(group: Group, values: Sequence[int], purpose: str = STEP) -> list[int]:
    """The elementwise minimum over a group and its replicas, of some numbers of the host.

    The host waits for the other hosts, and not for its device. Each sends its values to each of the
    others at once: one hop, where gloo's all-reduce makes 2 (W − 1) one after the other.

    Raises:
        RuntimeError: names the ranks that did not come to `purpose`.
    """
    if group.size > 1:
        handle = group.handle if "cpu" in group.devices else host_group(sorted(group.members), group.handle).handle
        mine = torch.tensor(values, device="cpu").repeat(group.size)
        everyones = torch.empty_like(mine)
        meetings(handle).begin()
        work = dist.all_to_all_single(everyones, mine, group=handle, async_op=True)
        _wait(work, mine.device, handle, purpose)
        sent["verdicts"] += (group.size - 1) * mine.nbytes // group.size
        values = everyones.view(group.size, -1).amin(dim=0).tolist()
    return list(values) if group.replicas is None else minimum(group.replicas, values, purpose)


def minimum_on_device(group: Group, value: CommBuffer) -> None:
    """The same of a 1-d tensor where it is, in place; on an accelerator nothing waits for it."""
    if group.size > 1:
        mine = value.load()
        meetings(group.handle).begin()
        _wait(dist.all_reduce(mine, dist.ReduceOp.MIN, group.handle, async_op=True), mine.device, group.handle)
        sent["verdicts"] += mine.nbytes
        value.unload()
    if group.replicas is not None:
        minimum_on_device(group.replicas, value)


def total(group: Group, values: CommBuffer, purpose: str) -> Tensor:
    """The elementwise sum of all ranks' 1-d tensors, in place.

    Raises:
        RuntimeError: names the ranks that did not come to `purpose`.
    """
    if group.size > 1:
        mine = values.load()
        meetings(group.handle).begin()
        work = dist.all_reduce(mine, dist.ReduceOp.SUM, group.handle, async_op=True)
        _wait(work, mine.device, group.handle, purpose)
    return values.unload()


def all_gather(group: Group, mine: CommBuffer, out: CommBuffer) -> Callable[[], None]:
    """Start an all-gather of equally long 1-d tensors into `out`; the result waits for it.

    `mine` and `out` may not be touched before that.
    """
    # Its name from torch 2.13 on; the old one warns there.
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    meetings(group.handle).begin()
    work = gather(out.sent, mine.load(), group.handle, async_op=True)
    sent["weights"] += (group.size - 1) * mine.tensor.nbytes
    return _waiting(work, out, group)


def all_to_all(
    group: Group, send: CommBuffer, send_counts: Sequence[int], receive: CommBuffer, receive_counts: Sequence[int]
) -> Callable[[], None]:
    """Start to send consecutive stretches of a 1-d tensor, one to each rank, and to receive theirs.

    The result waits for it; neither tensor may be touched before that. All ranks take part or none:
    whether anything is sent at all must be known alike on all of them.
    """
    counts = list(receive_counts), list(send_counts)
    meetings(group.handle).begin()
    work = dist.all_to_all_single(receive.sent, send.load(), *counts, group.handle, async_op=True)
    sent["blocks"] += send.tensor.nbytes
    return _waiting(work, receive, group)


def move_rows(
    group: Group, mine: Tensor, have: Sequence[tuple[int, int]], into: Tensor, want: Sequence[tuple[int, int]]
) -> None:
    """Bring rows of a tensor from the ranks that have them to those that want them, bit for bit.

    Both cut the rows into one run a rank, in the order of the ranks, so that what a rank sends to
    the others, one after the other, is what it has, and what it receives is what it wants. All
    ranks take part.

    Args:
        group: the ranks.
        mine: the rows that this rank has, contiguous.
        have: by rank, the first row and the one after the last; empty where they are the same.
        into: room for the rows that this rank wants, contiguous, of the same dtype and device.
        want: as `have`.
    """
    if group.size == 1:
        into.copy_(mine)
        return
    size = mine.shape[1:].numel() * mine.element_size()
    send = [_common(have[group.rank], theirs) * size for theirs in want]
    receive = [_common(theirs, want[group.rank]) * size for theirs in have]
    wires = [group.comm_buffer(tensor.reshape(-1).view(torch.uint8)) for tensor in (mine, into)]
    all_to_all(group, wires[0], send, wires[1], receive)()


def _common(one: tuple[int, int], other: tuple[int, int]) -> int:
    return max(0, min(one[1], other[1]) - max(one[0], other[0]))


def _waiting(work: Any, received: CommBuffer, group: Group) -> Callable[[], None]:
    def wait() -> None:
        _wait(work, received.sent.device, group.handle)
        received.unload()

    return wait


def _wait(work: Any, device: torch.device, handle: dist.ProcessGroup | None, purpose: str = STEP) -> None:
    """Wait for a collective: on the CPU, for as long as the timeout allows.

    An accelerator's stream waits by itself, and its backend watches the timeout.
    """

    def wait() -> None:
        if device.type == "cpu":
            meetings(handle).wait(work, purpose, RuntimeError)
        else:
            work.wait()

    if _measuring is None:
        wait()
    else:
        _measuring.measure(wait, device)


def broadcast(group: Group, tensor: Tensor, source: int, purpose: str) -> Tensor:
    """The tensor of the group's rank `source`; the others pass one of the same shape and dtype.

    Raises:
        RuntimeError: names the ranks that did not come to `purpose`.
    """
    if group.size == 1:
        return tensor
    comm_buffer = group.comm_buffer(tensor.contiguous())
    assert group.handle is not None
    meetings(group.handle).begin()
    work = dist.broadcast(comm_buffer.sent, dist.get_global_rank(group.handle, source), group.handle, async_op=True)
    _wait(work, comm_buffer.sent.device, group.handle, purpose)
    return comm_buffer.unload()
