"""The only module that calls collectives.

Every function is called by all ranks of a group in the same order. With one rank, nothing is sent.
Data on the CPU with a backend that knows accelerators alone (NCCL) travels through the device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Group:
    """The ranks that share the blocks. `handle` is None for one process without torch.distributed."""

    handle: dist.ProcessGroup | None
    rank: int
    size: int
    devices: str = ""  # the device types that the backend can send from, as torch writes them: "cpu:gloo,cuda:nccl"
    replicas: Group | None = None  # the ranks that hold the same blocks as this one, in other copies of the group

    @property
    def together(self) -> int:
        """How many ranks take each step together."""
        return self.size * (self.replicas.size if self.replicas is not None else 1)

    @property
    def is_first(self) -> bool:
        """Whether this rank is the one of them that logs."""
        return self.rank == 0 and (self.replicas is None or self.replicas.rank == 0)

    def wire(self, tensor: Tensor) -> Tensor:
        """The tensor itself, or a copy on a device that the group's backend can send from."""
        if self.handle is None or tensor.device.type in self.devices:
            return tensor
        return tensor.to(torch.accelerator.current_accelerator() or "cpu")


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


def is_distributed() -> bool:
    """Whether there are other ranks."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def own_rank() -> int:
    """This process's rank among all; 0 for one process alone."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def minimum(group: Group, values: Tensor) -> Tensor:
    """The elementwise minimum over the ranks of the group and of its replicas."""
    if group.size > 1:
        values = group.wire(values).clone()
        dist.all_reduce(values, dist.ReduceOp.MIN, group.handle)
    return values if group.replicas is None else minimum(group.replicas, values)


def gather(group: Group, mine: Tensor, out: Tensor) -> Callable[[], None]:
    """Start an all-gather of equally long 1-d tensors into `out`; the result waits for it.

    `mine` and `out` may not be touched before that.
    """
    wire_out, wire = group.wire(out), group.wire(mine)
    # Its name from torch 2.13 on; the old one warns there.
    all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    work = all_gather(wire_out, wire, group.handle, async_op=True)

    def wait() -> None:
        work.wait()
        if wire_out is not out:
            out.copy_(wire_out)

    return wait


def exchange(
    group: Group, send: Tensor, send_counts: Sequence[int], receive: Tensor, receive_counts: Sequence[int]
) -> None:
    """Send consecutive stretches of a 1-d tensor to the ranks, one each, and receive what the ranks sent here.

    All ranks take part or none: whether anything is sent at all must be known alike on all of them.
    """
    wire, wire_receive = group.wire(send), group.wire(receive)
    dist.all_to_all_single(wire_receive, wire, list(receive_counts), list(send_counts), group.handle)
    if wire_receive is not receive:
        receive.copy_(wire_receive)


def broadcast(group: Group, tensor: Tensor, source: int) -> Tensor:
    """The tensor of the group's rank `source`; the others pass one of the same shape and dtype."""
    if group.size == 1:
        return tensor
    wire = group.wire(tensor).contiguous()
    assert group.handle is not None
    dist.broadcast(wire, dist.get_global_rank(group.handle, source), group.handle)
    return wire.to(tensor.device)
