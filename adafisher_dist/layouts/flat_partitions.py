"""DeepSpeed ZeRO-1 and 2, BF16_Optimizer: each rank has a flat fp32 partition of each param group.

All trainable parameters of a group are views of one flat buffer, parameter p at
`p.storage_offset()`; rank r's partition is elements [r·k, (r+1)·k) of it, k the partition's length,
and padding belongs to no parameter. Found by running DeepSpeed 0.19.8, pinned by
tests/test_zero.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from adafisher_dist.blocks import placement
from adafisher_dist.blocks.grid import GRID_SETTINGS, make_grid
from adafisher_dist.comm.collectives import join
from adafisher_dist.layouts.deepspeed_wrappers import info_of, refuse_modes, unexpected
from adafisher_dist.layouts.storage import GivenParameters, Parameter, Storage, UnsupportedLayoutError
from adafisher_dist.settings import normalized


def zero12(wrapper: Any, partition: Tensor, given_parameters: GivenParameters) -> Storage:
    """What the ranks store of the param group whose partition on this rank is `partition`.

    Args:
        wrapper: DeepSpeed's DeepSpeedZeroOptimizer.
        partition: one of its `single_partition_of_fp32_groups`; (k,) fp32.
        given_parameters: the parameters that the optimizer was given.

    Raises:
        UnsupportedLayoutError: the wrapper is in a mode that is not supported, or not laid out as
            expected.
    """
    refuse_modes(
        wrapper,
        {
            "ZenFlow": wrapper.zenflow,
            "elastic_checkpoint (its files cannot be loaded)": wrapper.elastic_checkpoint,
            "tensor parallelism": _is_tensor_parallel(wrapper),
            "fp16 master weights": wrapper.master_weights_and_grads_dtype == torch.float16,
            "torch_autocast with fp16": wrapper.torch_autocast_gradscaler is not None,
        },
    )
    _refuse_unaveraged(wrapper)
    stage = 2 if wrapper.partition_gradients else 1
    groups = (wrapper.single_partition_of_fp32_groups, wrapper.bit16_groups_flat, wrapper.bit16_groups)
    return _storage(f"ZeRO-{stage}", wrapper, partition, groups, given_parameters)


def _is_tensor_parallel(wrapper: Any) -> bool:
    """Whether ranks hold parts of layers; those of a pipeline hold layers of their own."""
    from deepspeed.utils.bwc import bwc_tensor_model_parallel_world_size

    # DeepSpeed too knows an mpu of sequence parallelism by this: its other groups are of sequences.
    if wrapper.mpu is None or hasattr(wrapper.mpu, "initialize_sequence_parallel"):
        return False
    return bool(bwc_tensor_model_parallel_world_size(wrapper.mpu) > 1)


def _refuse_tied(wrapper: Any, members: Sequence[Tensor], parameters: Sequence[Parameter]) -> None:
    """Refuse a weight that several stages of a pipeline hold, where it has blocks.

    Each stage steps its copy by itself, beside other blocks in each, so that copies would drift
    apart by rounding. Elements that are alone do not.
    """
    for tensor, parameter in zip(members, parameters, strict=True):
        if not getattr(tensor, "ds_pipe_replicated", False):
            continue
        # Not the optimizer's `param_groups`, of which DeepSpeed shows it one at a time in a step.
        group = normalized(wrapper.optimizer._registry.groups[parameter.info.group])
        settings = {key: group[key] for key in GRID_SETTINGS if group[key] != "auto"}
        if make_grid(parameter.shape, **{"block_size": 1, **settings}).dense_row_groups:
            raise UnsupportedLayoutError(
                f"{parameter.name} is tied over stages of the pipeline (TiedLayerSpec), which is supported of elements"
                f" without blocks alone, and one of shape {parameter.shape} has blocks with this param group's"
                " settings. Put its layers into one stage, or give it a param group with max_blocks=0."
            )


def _refuse_unaveraged(wrapper: Any) -> None:
    """Refuse sequence parallelism that DeepSpeed 0.19.8 does not average gradients over.

    With `mesh_param` its group for the gradients leaves the other ranks of a sequence out, and
    their weights drift apart (AdamW's too).
    """
    from deepspeed.utils import groups

    if groups._get_sequence_parallel_world_size() == 1:
        return
    if not join(groups._get_sequence_parallel_group()).members <= join(wrapper.dp_process_group).members:
        raise UnsupportedLayoutError(
            "DeepSpeed does not average the gradients of ZeRO stages 1 and 2 over the sequence-parallel ranks of"
            " mesh_param. Pass initialize() an mpu instead (deepspeed.runtime.sequence_parallel.parallel_state_sp,"
            " after its initialize_sequence_parallel), or use stage 3."
        )


def refresh(wrapper: Any) -> None:
    """Copy the fp32 partitions into the model's own weights. A collective."""
    wrapper.update_lp_params()


def bf16_optimizer(wrapper: Any, partition: Tensor, given_parameters: GivenParameters) -> Storage:
    """The same for DeepSpeed's BF16_Optimizer: stage 1 in bf16 with gradients accumulated in fp32.

    Raises:
        UnsupportedLayoutError: the wrapper is in a mode that is not supported, or not laid out as
            expected.
    """
    refuse_modes(wrapper, {"tensor parallelism": _is_tensor_parallel(wrapper)})
    _refuse_unaveraged(wrapper)
    groups = (wrapper.fp32_groups_flat_partition, wrapper.bf16_groups_flat, wrapper.bf16_groups)
    return _storage("BF16_Optimizer", wrapper, partition, groups, given_parameters)


def _storage(
    layout: str,
    wrapper: Any,
    partition: Tensor,
    groups: tuple[Sequence[Tensor], Sequence[Tensor], Sequence[list[Tensor]]],
    given_parameters: GivenParameters,
) -> Storage:
    index = next((i for i, flat in enumerate(groups[0]) if flat is partition), None)
    if index is None:
        raise unexpected(wrapper, "steps a tensor that is none of its fp32 partitions")
    buffer, members = groups[1][index], groups[2][index]
    group = join(wrapper.real_dp_process_group[index])
    _check_buffer(wrapper, buffer, members, partition, group.size)
    parameters = [Parameter(info_of(wrapper, p, given_parameters), tuple(p.shape), 0) for p in members]
    _refuse_tied(wrapper, members, parameters)
    offsets = [int(p.storage_offset() - buffer.storage_offset()) for p in members]
    stored_spans = placement.in_partitions(offsets, [p.numel() for p in members], partition.numel(), group.size)
    return Storage(layout, group, [partition], parameters, stored_spans, replicated=False)


def _check_buffer(wrapper: Any, buffer: Tensor, members: list[Tensor], partition: Tensor, world_size: int) -> None:
    start = buffer.untyped_storage().data_ptr()
    inside = all(p.untyped_storage().data_ptr() == start and p.is_contiguous() for p in members)
    ends = sorted((p.storage_offset(), p.storage_offset() + p.numel()) for p in members)
    apart = all(a[1] <= b[0] for a, b in pairwise(ends))
    if not inside or not apart or partition.numel() * world_size != buffer.numel():
        raise unexpected(
            wrapper,
            f"does not keep a param group in one flat buffer cut into {world_size} equal partitions"
            f" ({buffer.numel()} elements, partitions of {partition.numel()})",
        )
