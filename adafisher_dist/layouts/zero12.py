"""DeepSpeed ZeRO stages 1 and 2: each rank holds one flat fp32 partition of every param group.

All trainable parameters of a group are views of one flat buffer, parameter p at `p.storage_offset()`; rank r's
partition is elements [r·k, (r+1)·k) of it, k the partition's length, and padding belongs to no parameter. Found by
running DeepSpeed 0.19.8 (shared DEEPSPEED.md), pinned by tests/test_deepspeed.py.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from torch import Tensor

from adafisher_dist.comm import join
from adafisher_dist.layouts.storage import Given, Parameter, Registry, Storage, UnsupportedLayoutError
from adafisher_dist.plan import Placed
from adafisher_dist.span import Span


def storage(wrapper: Any, partition: Tensor, registry: Registry) -> Storage:
    """What the ranks store of the param group whose partition on this rank is `partition`.

    Args:
        wrapper: DeepSpeed's DeepSpeedZeroOptimizer.
        partition: one of its `single_partition_of_fp32_groups`; (k,) fp32.
        registry: the parameters that the optimizer was given.

    Raises:
        UnsupportedLayoutError: the wrapper is in a mode that is not supported, or not laid out as expected.
    """
    _refuse_unsupported_modes(wrapper)
    index = next(i for i, flat in enumerate(wrapper.single_partition_of_fp32_groups) if flat is partition)
    group = join(wrapper.real_dp_process_group[index])
    buffer, members = wrapper.bit16_groups_flat[index], wrapper.bit16_groups[index]
    _check_buffer(buffer, members, partition, group.size)
    parameters = [Parameter(_origin(wrapper, p, registry), tuple(p.shape), 0) for p in members]
    offsets = [(p.storage_offset() - buffer.storage_offset(), i) for i, p in enumerate(members)]
    placed: list[list[Placed]] = [[] for _ in range(group.size)]
    length = partition.numel()
    for offset, number in sorted(offsets):
        numel = members[number].numel()
        for rank in range(offset // length, -(-(offset + numel) // length)):
            start, stop = max(0, rank * length - offset), min(numel, (rank + 1) * length - offset)
            placed[rank].append(Placed(Span(number, numel, start, stop), 0, offset + start - rank * length))
    stage = 2 if wrapper.partition_gradients else 1
    return Storage(f"ZeRO-{stage}", group, [partition], parameters, placed, replicated=False)


def _origin(wrapper: Any, parameter: Tensor, registry: Registry) -> Given:
    """How a model parameter was given, with DeepSpeed's name for it: its own engine passes parameters without names."""
    given = registry.find(parameter)
    if given is None:
        raise UnsupportedLayoutError(
            f"{type(wrapper).__name__} holds a parameter of shape {tuple(parameter.shape)} that was not given to"
            " AdaFisher. Pass the same parameters to both."
        )
    return Given(wrapper.param_names.get(parameter, given.name), given.position)


def _refuse_unsupported_modes(wrapper: Any) -> None:
    modes = {
        "ZenFlow": wrapper.zenflow,
        "mixture of experts": wrapper.has_moe_layers,
        "model parallelism": wrapper.model_parallel_world_size > 1,
        "sequence parallelism": wrapper.sequence_parallel_size > 1,
        "16-bit master weights": wrapper.low_precision_master_weights_and_grads,
        "torch_autocast with fp16": wrapper.torch_autocast_gradscaler is not None,
    }
    for mode, on in modes.items():
        if on:
            raise UnsupportedLayoutError(
                f"DeepSpeed ZeRO stage 1 or 2 with {mode} is not supported by AdaFisher yet; turn {mode} off."
            )


def _check_buffer(buffer: Tensor, members: list[Tensor], partition: Tensor, world_size: int) -> None:
    start = buffer.untyped_storage().data_ptr()
    inside = all(p.untyped_storage().data_ptr() == start and p.is_contiguous() for p in members)
    ends = sorted((p.storage_offset(), p.storage_offset() + p.numel()) for p in members)
    apart = all(a[1] <= b[0] for a, b in pairwise(ends))
    if not inside or not apart or partition.numel() * world_size != buffer.numel():
        import deepspeed

        raise UnsupportedLayoutError(
            f"DeepSpeed {deepspeed.__version__} does not keep a param group of ZeRO stage 1 or 2 in one flat buffer cut"
            f" into {world_size} equal partitions ({buffer.numel()} elements, partitions of {partition.numel()}), as"
            " DeepSpeed 0.19 does. Use a DeepSpeed version that AdaFisher's README lists."
        )
