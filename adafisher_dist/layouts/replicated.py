"""Every rank holds all parameters and all averaged gradients: one process, DDP, DeepSpeed ZeRO-0.

In bf16 and fp16 DeepSpeed's FP16_UnfusedOptimizer puts fp32 copies in their own shapes in the
parameters' place.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from adafisher_dist.blocks import placement
from adafisher_dist.comm.collectives import Group
from adafisher_dist.layouts.deepspeed_wrappers import info_of, refuse_modes, unexpected
from adafisher_dist.layouts.storage import GivenParameters, Parameter, ParameterInfo, Storage, UnsupportedLayoutError


def storage(members: Sequence[tuple[Tensor, ParameterInfo]], group: Group) -> Storage:
    """Each tensor is one whole parameter, the same on every rank."""
    tensors = [tensor for tensor, _ in members]
    return Storage(
        layout="replicated" if group.size > 1 else "one process",
        group=group,
        tensors=tensors,
        parameters=[Parameter(info, tuple(tensor.shape), i) for i, (tensor, info) in enumerate(members)],
        stored_spans=placement.everywhere([tensor.numel() for tensor in tensors], group.size),
        replicated=True,
    )


def _refuse_loss_scale(wrapper: Any) -> None:
    """Refuse a loss scale at stage 0, where DeepSpeed 0.19.8 does not multiply the loss by it.

    `engine.backward` leaves the loss as it is, but `step` divides the gradients by the scale, so
    they are too small by that factor. Since nothing overflows, a dynamic scale doubles every
    thousand steps without end: the gradients shrink to nothing.
    """
    scale = wrapper.loss_scale_config
    if scale.dynamic_loss_scale or scale.cur_scale != 1.0:
        raise UnsupportedLayoutError(
            "fp16 at ZeRO stage 0 with a loss scale is not supported: DeepSpeed divides the gradients by the scale"
            ' there without having multiplied the loss by it. Use ZeRO stage 1, or bf16, or "fp16": {"loss_scale": 1}.'
        )


def refresh(wrapper: Any) -> None:
    """Copy FP16_UnfusedOptimizer's fp32 copies into the model's own weights."""
    for masters, members in zip(wrapper.fp32_groups, wrapper.fp16_groups, strict=True):
        for master, parameter in zip(masters, members, strict=True):
            parameter.data.copy_(master.data)


def master_of(wrapper: Any, tensor: Tensor, given_parameters: GivenParameters) -> tuple[Tensor, ParameterInfo]:
    """Which parameter DeepSpeed's FP16_UnfusedOptimizer keeps an fp32 copy of in `tensor`.

    Raises:
        UnsupportedLayoutError: the wrapper is in a mode that is not supported, or not laid out as
            expected.
    """
    # DeepSpeed knows an mpu of sequence parallelism by this function.
    parallel = wrapper.mpu is not None and not hasattr(wrapper.mpu, "initialize_sequence_parallel")
    refuse_modes(wrapper, {"model or pipeline parallelism": parallel, "fused_lamb_legacy": wrapper.fused_lamb_legacy})
    _refuse_loss_scale(wrapper)
    for masters, members in zip(wrapper.fp32_groups, wrapper.fp16_groups, strict=True):
        for master, parameter in zip(masters, members, strict=True):
            if master is tensor:
                return parameter, info_of(wrapper, parameter, given_parameters)
    raise unexpected(wrapper, "steps a tensor that is none of its fp32 copies")
