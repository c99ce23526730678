"""Every rank holds all parameters and all averaged gradients: one process, DDP, DeepSpeed ZeRO-0 in fp32."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from adafisher_dist.comm import Group
from adafisher_dist.layouts.storage import Given, Parameter, Storage, UnsupportedLayoutError
from adafisher_dist.plan import Placed
from adafisher_dist.span import Span

# What marks a tensor as a part of a parameter, set by the library that cut it.
_MARKS = {
    "_fsdp_flattened": ("FSDP1", "DDP, or DeepSpeed ZeRO stage 1 or 2"),
    "ds_id": ("DeepSpeed ZeRO stage 3", "stage 1 or 2"),
    "device_mesh": ("DTensor (FSDP2 or tensor parallelism)", "DDP, or DeepSpeed ZeRO stage 1 or 2"),
    "tensor_model_parallel": ("tensor parallelism (Megatron)", "data parallelism"),
}


def check_parameter(tensor: Tensor, name: str) -> None:
    """Refuse a tensor that is marked as one part of a parameter.

    Raises:
        UnsupportedLayoutError: names the layout, and the nearest that is supported.
    """
    for mark, (layout, instead) in _MARKS.items():
        if getattr(tensor, mark, None) not in (None, False):
            raise UnsupportedLayoutError(f"{name} is laid out by {layout}, which is not supported yet; use {instead}.")
    if getattr(tensor, "allreduce", True) is False:
        raise UnsupportedLayoutError(f"{name} belongs to a DeepSpeed MoE expert; expert parallelism is not supported.")


def storage(members: Sequence[tuple[Tensor, Given]], group: Group) -> Storage:
    """Each tensor is one whole parameter, the same on every rank."""
    tensors = [tensor for tensor, _ in members]
    spans = [Span(index, tensor.numel(), 0, tensor.numel()) for index, tensor in enumerate(tensors)]
    placed = tuple(Placed(span, index, 0) for index, span in enumerate(spans) if len(span))
    return Storage(
        layout="replicated" if group.size > 1 else "one process",
        group=group,
        tensors=tensors,
        parameters=[Parameter(given, tuple(tensor.shape), i) for i, (tensor, given) in enumerate(members)],
        placed=[placed] * group.size,
        replicated=True,
    )
