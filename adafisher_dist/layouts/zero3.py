"""DeepSpeed ZeRO stage 3: every parameter is cut over the ranks by itself.

Rank r of `p.ds_process_group` holds elements [r·n, min((r+1)·n, p.ds_numel)) of p, n =
`p.partition_numel()`. A rank's pieces of a sub-group lie in a row in its flat fp32 tensor, where
each parameter takes n elements, so padding follows each of them. Found by running DeepSpeed 0.19.8,
pinned by tests/test_zero.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from adafisher_dist.blocks import placement
from adafisher_dist.comm.collectives import join
from adafisher_dist.layouts.deepspeed_wrappers import info_of, refuse_modes, unexpected
from adafisher_dist.layouts.storage import GivenParameters, LocalShard, Parameter, Storage


def storage(wrapper: Any, flat: Tensor, given_parameters: GivenParameters) -> Storage:
    """What the ranks store of the sub-group whose pieces on this rank are `flat`.

    Args:
        wrapper: DeepSpeed's DeepSpeedZeroOptimizer_Stage3.
        flat: one of its `fp32_partitioned_groups_flat`; 1-d fp32.
        given_parameters: the parameters that the optimizer was given.

    Raises:
        UnsupportedLayoutError: the wrapper is in a mode that is not supported, or not laid out as
            expected.
    """
    refuse_modes(
        wrapper,
        {
            "NVMe offload of the optimizer (offload_optimizer.device cpu works)": wrapper.swap_optimizer,
            "NVMe offload of the parameters (offload_param.device cpu works)": wrapper.params_in_nvme_and_cpu,
            "ZenFlow": wrapper.zenflow,
            "elastic_checkpoint (its files cannot be loaded)": wrapper.elastic_checkpoint,
            "model parallelism": wrapper.model_parallel_group is not None,
            "fp16 master weights": wrapper.master_weights_and_grads_dtype == torch.float16,
            "torch_autocast with fp16": wrapper.torch_autocast_gradscaler is not None,
            "expert parallelism (AutoEP)": wrapper._zero3_partition_group_metadata() is not None,
        },
    )
    index = next((i for i, own in enumerate(wrapper.fp32_partitioned_groups_flat) if own is flat), None)
    if index is None:
        raise unexpected(wrapper, "steps a tensor that is none of its fp32 partitions")
    members = wrapper.fp16_groups[index]
    group = join(wrapper.sub_group_process_groups[index])
    parameters = [Parameter(info_of(wrapper, p, given_parameters), tuple(p.ds_shape), 0) for p in members]
    lengths, numels = [p.partition_numel() for p in members], [p.ds_numel for p in members]
    for length, numel in zip(lengths, numels, strict=True):
        if length * group.size < numel:
            raise unexpected(wrapper, f"holds {numel} elements in {group.size} parts of only {length}")
    if sum(lengths) != flat.numel():
        raise unexpected(wrapper, f"has {flat.numel()} elements in a sub-group whose parameters need {sum(lengths)}")
    stored_spans = placement.one_by_one(numels, lengths, group.size)
    return Storage("ZeRO-3", group, [flat], parameters, stored_spans, replicated=False)


def refresh(wrapper: Any) -> None:
    """Copy the fp32 partitions into the model's, as DeepSpeed's `_rigid_load_state_dict` does."""
    for index, master in enumerate(wrapper.fp32_partitioned_groups_flat):
        flat = wrapper.fp16_partitioned_groups_flat[index]
        flat.data.copy_(master.data)
        members = wrapper.fp16_partitioned_groups[index]
        for partition, part in zip(members, wrapper.unflatten(flat, members), strict=True):
            partition.data = part.data
    if wrapper.persistent_parameters:  # they are kept gathered: let the next gathering read the new partitions
        wrapper.persistent_parameters[0].partition(wrapper.persistent_parameters)


def masters_to_host(wrapper: Any, pin_memory: bool) -> None:
    """Move the fp32 partitions to the host; the wrapper's `reload_states` brings them back."""
    for flat in wrapper.fp32_partitioned_groups_flat:
        pinned = pin_memory and flat.device.type != "cpu"
        flat.data = torch.empty(flat.shape, dtype=flat.dtype, device="cpu", pin_memory=pinned).copy_(flat)


def locate(parameter: Any) -> LocalShard:
    """What this rank holds of a partitioned parameter, in the model's precision."""
    group = join(parameter.ds_process_group)
    length, numel = parameter.partition_numel(), parameter.ds_numel
    start, stop = min(numel, group.rank * length), min(numel, (group.rank + 1) * length)
    return LocalShard(parameter.ds_tensor.data[: stop - start], start, stop, group, replicated=False)
