"""Which elements of which parameters the optimizer's tensors hold, in each library's layout."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor, nn

from adafisher_dist.blocks.parts import Parts
from adafisher_dist.comm.collectives import Group, join
from adafisher_dist.comm.host_groups import HostGroup, host_group
from adafisher_dist.layouts import deepspeed_wrappers, flat_partitions, replicated, zero3
from adafisher_dist.layouts.deepspeed_wrappers import (
    PartOfStep,
    calling_wrapper,
    expert_group,
    frames,
    refuse_modes,
    stage_group,
    unexpected,
)
from adafisher_dist.layouts.storage import GivenParameters, LocalShard, ParameterInfo, Storage, UnsupportedLayoutError
from adafisher_dist.layouts.uneven_inputs import JoinContexts as JoinContexts

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.optim import Optimizer

_SUPPORTED = (
    "one process, DDP, FSDP2 (fully_shard), and DeepSpeed with ZeRO stage 0, 1, 2 or 3 in fp32, bf16 or fp16, with or"
    " without CPU offload of the optimizer"
)


class _Wrapper(NamedTuple):
    """What is known of one of DeepSpeed's wrappers that shard the optimizer's tensors.

    Attributes:
        storage: what a tensor of it holds.
        tensors: the attribute that lists all of them.
        refresh: brings the model's own weights up to date with them.
        part: where it steps a part after the other, what its `_optimizer_step` calls the part's
            number; else None.
    """

    storage: Callable[[Any, Tensor, GivenParameters], Storage]
    tensors: str
    refresh: Callable[[Any], None]
    part: str | None


_SHARDED_WRAPPERS = {
    "DeepSpeedZeroOptimizer": _Wrapper(
        flat_partitions.zero12, "single_partition_of_fp32_groups", flat_partitions.refresh, "group_no"
    ),
    "BF16_Optimizer": _Wrapper(
        flat_partitions.bf16_optimizer, "fp32_groups_flat_partition", flat_partitions.refresh, None
    ),
    "DeepSpeedZeroOptimizer_Stage3": _Wrapper(
        zero3.storage, "fp32_partitioned_groups_flat", zero3.refresh, "sub_group_id"
    ),
}
_REPLICATED_WRAPPER = "FP16_UnfusedOptimizer"

# What marks a tensor as a part of a parameter, set by the library that cut it.
_MARKS = {
    "_fsdp_flattened": (
        "FSDP1 (FullyShardedDataParallel)",
        "FSDP2 (fully_shard; with Accelerate `fsdp_version: 2`, with Lightning ModelParallelStrategy)",
    ),
    "tensor_model_parallel": (
        "tensor parallelism (Megatron's, or DeepSpeed's AutoTP)",
        "data parallelism, or torch's parallelize_module with FSDP2",
    ),
}


def storages(
    optimizer: Optimizer, tensors: Sequence[Tensor], given_parameters: GivenParameters,
    process_group: ProcessGroup | None, wrapper: Any = None,
) -> list[Storage]:  # fmt: skip
    """What each rank stores, for the tensors in the optimizer's param groups.

    The same on all ranks; no collective.

    Args:
        optimizer: who asks; under DeepSpeed, the wrapper that called it is found by this.
        tensors: the tensors.
        given_parameters: which the user gave to the optimizer, as opposed to what a wrapper put in
            their place.
        process_group: the user's, for the replicated layout.
        wrapper: the DeepSpeed object that put the tensors there, where it is known; else it is the
            one that calls.

    Raises:
        UnsupportedLayoutError: the layout is unknown or not supported; names it and what to use
            instead.
    """
    info = [(tensor, given_parameters.find(tensor)) for tensor in tensors]
    own = [(tensor, origin) for tensor, origin in info if origin is not None]
    if len(own) == len(tensors):
        _refuse_stages(optimizer)
        return _given_tensors(own, process_group)
    if wrapper is None:
        wrapper, _ = calling_wrapper(optimizer)
    name = type(wrapper).__name__
    try:
        if wrapper is not None and name in _SHARDED_WRAPPERS:
            storage_of = _SHARDED_WRAPPERS[name].storage
            return [storage_of(wrapper, tensor, given_parameters) for tensor in tensors]
        if wrapper is not None and name == _REPLICATED_WRAPPER:
            masters = [replicated.master_of(wrapper, tensor, given_parameters) for tensor in tensors]
            members = [(tensor, info, parameter) for tensor, (parameter, info) in zip(tensors, masters, strict=True)]
            return _plain(members, process_group)
    except AttributeError as error:
        raise unexpected(wrapper, f"lacks what it is recognised by ({error})") from error
    what = f"DeepSpeed's {name}, which AdaFisher does not know" if wrapper is not None else "others"
    raise UnsupportedLayoutError(
        f"The parameters that AdaFisher was given were replaced by {what}. Supported are {_SUPPORTED}. New parameters"
        " of your own need add_param_group()."
    )


def wrapped_tensors(wrapper: Any) -> list[Tensor]:
    """All fp32 tensors that a wrapper of DeepSpeed has put in the parameters' place.

    Raises:
        UnsupportedLayoutError: the wrapper is unknown.
    """
    name = type(wrapper).__name__
    if name in _SHARDED_WRAPPERS:
        return list(getattr(wrapper, _SHARDED_WRAPPERS[name].tensors))
    if name == _REPLICATED_WRAPPER:
        return [tensor for group in wrapper.fp32_groups for tensor in group]
    raise UnsupportedLayoutError(f"AdaFisher does not know DeepSpeed's {name}. Supported are {_SUPPORTED}.")


def refresh_module(wrapper: Any) -> None:
    """Update the model's own weights from a wrapper's fp32 tensors after a load. A collective."""
    name = type(wrapper).__name__
    refresh = replicated.refresh if name == _REPLICATED_WRAPPER else _SHARDED_WRAPPERS[name].refresh
    refresh(wrapper)


def part_of_step(optimizer: Optimizer) -> PartOfStep | None:
    """Which part of DeepSpeed's step this call of step() is; None where one call is all of it.

    ZeRO-1 and 2 step one param group after the other, and ZeRO-3 one sub-group. DeepSpeed mostly
    discards a step with a gradient that is not finite before any of these calls, but not in bf16
    with check_grad_overflow off, nor with compute_grad_norm off; and what is finite may be too
    large to square.

    Raises:
        UnsupportedLayoutError: the wrapper is not what AdaFisher knows.
    """
    return deepspeed_wrappers.part_of_step(optimizer, {name: own.part for name, own in _SHARDED_WRAPPERS.items()})


def locate(tensor: Tensor, group: Group) -> LocalShard:
    """Locate this rank's elements of a parameter or buffer without an fp32 copy in a wrapper.

    Args:
        tensor: the parameter or buffer.
        group: the ranks that it is the same on, where it is a plain tensor.
    """
    if hasattr(tensor, "device_mesh"):
        from adafisher_dist.layouts import fsdp2

        return fsdp2.locate(tensor, group)
    if hasattr(tensor, "ds_id"):
        return zero3.locate(tensor)
    return LocalShard(tensor.detach(), 0, tensor.numel(), group, replicated=True)


def parts_of(tensor: Tensor) -> Parts | None:
    """How tensor parallelism cuts a parameter; None where it is in one part."""
    if not hasattr(tensor, "device_mesh"):
        return None
    from adafisher_dist.layouts import fsdp2

    return fsdp2.parts_of(tensor)


def is_spare(tensor: Tensor, first: int) -> bool:
    """See `fsdp2.is_spare`; False of what is no DTensor."""
    if not hasattr(tensor, "device_mesh"):
        return False
    from adafisher_dist.layouts import fsdp2

    return fsdp2.is_spare(tensor, first)


def group_of_expert(tensor: Tensor) -> Group | None:
    """The ranks that hold the same expert, for a parameter of one; else None."""
    handle = expert_group(tensor)
    return None if handle is None else join(handle)


def group_of_stage(module: nn.Module) -> Group | None:
    """The ranks that hold the same stage of a pipeline, for a module that is one; else None."""
    handle = stage_group(module)
    return None if handle is None else join(handle)


def is_state_init_call(optimizer: Optimizer) -> bool:
    """Whether DeepSpeed itself makes this call of step(), which is no training step.

    The name of the calling function tells. FP16_UnfusedOptimizer makes one at start-up, with
    gradients of zero, to have other optimizers allocate their state.
    """
    return calling_wrapper(optimizer)[1] == "initialize_optimizer_states"


def is_called_by_deepspeed(optimizer: Optimizer) -> bool:
    """Whether a wrapper of DeepSpeed, whose base optimizer this is, is on the call stack."""
    return calling_wrapper(optimizer)[0] is not None


def is_called_by_torch_checkpoint() -> bool:
    """Whether torch.distributed.checkpoint is on the call stack.

    Its get_optimizer_state_dict and the like call `step()`, with gradients of zero, where an
    optimizer has no state, and then `state_dict()`; and `dcp.save` and `dcp.load` call
    `state_dict()` of an optimizer that they are given.
    """
    return any(str(f.f_globals.get("__name__")).startswith("torch.distributed.checkpoint.") for f in frames())


def is_dtensor(value: object) -> bool:
    """Whether it is a DTensor; their module is not imported for those who have none."""
    return hasattr(value, "device_mesh")


def dtensor(local: Tensor, shape: Sequence[int], storage: Storage) -> Tensor:
    """See `dtensors.dtensor`."""
    from adafisher_dist.layouts import dtensors

    return dtensors.dtensor(local, shape, storage)


def rows_here(value: Tensor, group: Group, what: str) -> Tensor:
    """See `dtensors.rows_here`."""
    from adafisher_dist.layouts import dtensors

    return dtensors.rows_here(value, group, what)


def mesh_group(given_parameters: GivenParameters) -> Group | None:
    """The ranks of the device mesh that shards the given parameters; None without DTensors."""
    if not any(hasattr(kind, "device_mesh") for kind in set(map(type, given_parameters))):  # looked at in each step
        return None
    from adafisher_dist.layouts import fsdp2

    return fsdp2.ranks_of(given_parameters)


def host_group_of(
    given_parameters: GivenParameters, process_group: ProcessGroup | None, purpose: str, error: type[Exception]
) -> HostGroup:
    """The ranks that save and load together: the device mesh's, or else the process group's.

    See `host_group` for `purpose` and `error`.
    """
    meshes = [tensor.device_mesh for tensor in given_parameters if hasattr(tensor, "device_mesh")]
    if meshes:
        return host_group(max(meshes, key=lambda mesh: mesh.size()).mesh.flatten().tolist(), None, purpose, error)
    ranks = None if process_group is None else sorted(join(process_group).members)
    return host_group(ranks, process_group, purpose, error)


def check_parameter(tensor: Tensor, name: str) -> None:
    """Refuse a parameter that its library has marked as sharded in a way that is not supported.

    Raises:
        UnsupportedLayoutError: names the layout, and the nearest that is supported.
    """
    for mark, (layout, instead) in _MARKS.items():
        if getattr(tensor, mark, None) not in (None, False):
            raise UnsupportedLayoutError(f"{name} is laid out by {layout}, which is not supported; use {instead}.")
    if getattr(tensor, "allreduce", True) is False and not hasattr(tensor, "group_name"):
        raise UnsupportedLayoutError(
            f"{name} is marked as an expert's (allreduce=False), and has no group_name as DeepSpeed's MoE gives one."
        )
    if hasattr(tensor, "device_mesh"):
        from adafisher_dist.layouts import fsdp2

        fsdp2.check(tensor, name)


def _refuse_stages(optimizer: Optimizer) -> None:
    """Refuse an engine that steps the parameters themselves, but not the same on all ranks.

    That is ZeRO stage 0 in fp32 with pipeline or model parallelism.
    """
    engine, _ = calling_wrapper(optimizer)
    refuse_modes(
        engine,
        {
            "pipeline parallelism at ZeRO stage 0 (stage 1 works)": getattr(engine, "is_pipe_parallel", False),
            "model parallelism": getattr(engine, "is_model_parallel", False),
        },
    )


def _given_tensors(
    members: Sequence[tuple[Tensor, ParameterInfo]], process_group: ProcessGroup | None
) -> list[Storage]:
    """Storages of the given parameters: plain tensors replicated, DTensors sharded over a mesh."""
    plain: list[tuple[Tensor, ParameterInfo, Tensor]] = []
    sharded: list[tuple[Tensor, ParameterInfo]] = []
    for tensor, info in members:
        check_parameter(tensor, info.name)
        if hasattr(tensor, "ds_id"):
            raise UnsupportedLayoutError(
                f"{info.name} is laid out by DeepSpeed ZeRO stage 3, but step() was not called by DeepSpeed's engine;"
                " call engine.step()."
            )
        if hasattr(tensor, "device_mesh"):
            sharded.append((tensor, info))
        else:
            plain.append((tensor, info, tensor))
    result = _plain(plain, process_group)
    if sharded:
        from adafisher_dist.layouts import fsdp2

        result += fsdp2.storages(sharded)
    return result


def _plain(
    members: Sequence[tuple[Tensor, ParameterInfo, Tensor]], process_group: ProcessGroup | None
) -> list[Storage]:
    """Storages of whole tensors, each with the model's parameter that it stands for.

    One for each device, and for each group of ranks that hold the same experts.
    """
    alike: dict[Any, list[tuple[Tensor, ParameterInfo]]] = {}
    for tensor, info, parameter in members:
        group = join(expert_group(parameter) or process_group)
        alike.setdefault((tensor.device, group), []).append((tensor, info))
    return [replicated.storage(same, group) for (_, group), same in alike.items()]
