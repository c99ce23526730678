"""A shard's memory given back to its device while nobody trains, as between phases of RLHF.

The tensors of a stack are seen by many views, so they stay, and what is taken is the memory under
them: the views are right again when it is back. Only those that users see, in `optimizer.state` and
in state dicts, show the copies on the host meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from adafisher_dist.state.shard import Shard


@dataclass(frozen=True, slots=True, eq=False)
class Offloaded:
    """What a shard has on the host instead.

    Attributes:
        state: tensors without memory, whole allocations, and for each its copy. What cannot be
            freed is not in it: a numpy array shares its memory, as after a save or a load, so that
            it is on the host as it is.
        buffers: tensors without memory whose values no step needs, and its bytes.
        shown: what users see of the state, which shows the copies, and what it shows otherwise.
    """

    state: list[tuple[Tensor, Tensor]]
    buffers: list[tuple[Tensor, int]]
    shown: list[tuple[Tensor, Tensor]]


def to_host(shard: Shard, buffers: Iterable[Tensor], pin_memory: bool) -> None:
    """Copy the state to the host, and free it and the buffers on the device.

    Args:
        shard: whose state is on the device.
        buffers: what its exchange holds.
        pin_memory: whether copies of an accelerator's memory are page-locked.
    """
    state = [tensor for stack in shard.stacks for tensor in stack.state.values() if _can_be_freed(tensor)]
    pairs = [(tensor, _on_host(tensor, pin_memory)) for tensor in state]  # may fail, and then nothing has changed
    copies = {tensor.untyped_storage().data_ptr(): copy for tensor, copy in pairs}
    views = [(value, _view(value, copies)) for entry in shard.views for value in entry.values()]
    work = [rows.gradient_NRB for chunk in shard.blocks.chunks for rows in chunk]
    scratch = {t.untyped_storage().data_ptr(): t for t in (*work, shard.blocks.staging, *buffers) if _can_be_freed(t)}
    sizes = [(tensor, tensor.untyped_storage().nbytes()) for tensor in scratch.values()]
    shard.offloaded = Offloaded(pairs, sizes, [(value, value.data) for value, _ in views])
    for value, copy in views:
        value.data = copy
    for tensor in (*state, *scratch.values()):
        tensor.untyped_storage().resize_(0)


def to_device(shard: Shard) -> None:
    """The inverse of `to_host`; one that failed for want of memory may be called again."""
    offloaded = shard.offloaded
    assert offloaded is not None
    for tensor, copy in offloaded.state:
        tensor.untyped_storage().resize_(copy.nbytes)
        tensor.copy_(copy)
    for tensor, nbytes in offloaded.buffers:
        storage = tensor.untyped_storage()
        storage.resize_(nbytes)
        torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage).zero_()  # as when it was made
    for value, on_device in offloaded.shown:
        value.data = on_device
    shard.offloaded = None


def refuse(shards: Iterable[Shard]) -> None:
    """Refuse to use a state that is on the host.

    Raises:
        RuntimeError: it is.
    """
    if any(shard.offloaded is not None for shard in shards):
        raise RuntimeError(
            "AdaFisher's state is offloaded to the host. Bring it back on all ranks first: by"
            " optimizer.reload_state(), or by engine.reload_states() where DeepSpeed moved it."
        )


def _can_be_freed(tensor: Tensor) -> bool:
    return tensor.numel() > 0 and tensor.untyped_storage().resizable()


def _on_host(tensor: Tensor, pin_memory: bool) -> Tensor:
    pinned = pin_memory and tensor.device.type != "cpu"
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=pinned)
    return copy.copy_(tensor)


def _view(value: Tensor, copies: dict[int, Tensor]) -> Tensor:
    """The same elements of the copy; what has none (counters) itself."""
    copy = copies.get(value.untyped_storage().data_ptr()) if value.numel() else None
    return value if copy is None else copy.as_strided(value.shape, value.stride(), value.storage_offset())
