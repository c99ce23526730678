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

# Its name from torch 2.13 on; the old one warns there.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


@dataclass(frozen=True, slots=True)
class Group:
    """The ranks that share the blocks. `handle` is None for one process without torch.distributed."""

    handle: dist.ProcessGroup | None
    rank: int
    size: int
    devices: str = ""  # the device types that the backend can send from, as torch writes them: "cpu:gloo,cuda:nccl"

    def wire(self, tensor: Tensor) -> Tensor:
        """The tensor itself, or a copy on a device that the group's backend can send from."""
        if self.handle is None or tensor.device.type in self.devices:
            return tensor
        return tensor.to(torch.accelerator.current_accelerator() or "cpu")


def join(process_group: dist.ProcessGroup | None) -> Group:
    """The given process group, by default all ranks, or one process alone.

    Raises:
        ValueError: this process is not a member.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return Group(None, 0, 1)
    handle = process_group if process_group is not None else dist.group.WORLD
    rank, size = dist.get_rank(handle), dist.get_world_size(handle)
    if rank < 0:
        raise ValueError("process_group: this rank is not a member of the process group given to AdaFisher.")
    return Group(handle, rank, size, dist.get_backend_config(handle))


def is_main_process() -> bool:
    """Whether this process is the one that logs."""
    return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0


def minimum(group: Group, values: Tensor) -> Tensor:
    """The elementwise minimum over ranks."""
    if group.size == 1:
        return values
    wire = group.wire(values).clone()
    dist.all_reduce(wire, dist.ReduceOp.MIN, group.handle)
    return wire


def gather(group: Group, mine: Tensor, out: Tensor) -> Callable[[], None]:
    """Start an all-gather of equally long 1-d tensors into `out`; the result waits for it.

    `mine` and `out` may not be touched before that.
    """
    wire_out, wire = group.wire(out), group.wire(mine)
    work = _all_gather(wire_out, wire, group.handle, async_op=True)

    def wait() -> None:
        work.wait()
        if wire_out is not out:
            out.copy_(wire_out)

    return wait


def exchange(group: Group, send: Tensor, send_counts: Sequence[int], receive_counts: Sequence[int]) -> Tensor:
    """Send consecutive stretches of a 1-d tensor to the ranks, one each, and return what the ranks sent here.

    All ranks take part or none: whether anything is sent at all must be known alike on all of them.
    """
    wire = group.wire(send)
    out = wire.new_empty(sum(receive_counts))
    dist.all_to_all_single(out, wire, list(receive_counts), list(send_counts), group.handle)
    return out.to(send.device)


def broadcast(group: Group, tensor: Tensor, source: int) -> Tensor:
    """The tensor of the group's rank `source`; the others pass one of the same shape and dtype."""
    if group.size == 1:
        return tensor
    wire = group.wire(tensor).contiguous()
    assert group.handle is not None
    dist.broadcast(wire, dist.get_global_rank(group.handle, source), group.handle)
    return wire.to(tensor.device)
