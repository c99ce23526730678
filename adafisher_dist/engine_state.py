"""What DeepSpeed's own functions do with an optimizer's state: read, write and offload it.

`safe_get_full_optimizer_state` and its kind look for tensors that lie as the weights do, which
AdaFisher's blocks do not; `engine.offload_states` moves what `optimizer.state` shows, and not the
memory behind it, or knows Adam's alone.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from adafisher_dist.comm import collectives
from adafisher_dist.comm.deferred_errors import DeferredErrors
from adafisher_dist.layouts import zero3
from adafisher_dist.layouts.deepspeed_wrappers import registered
from adafisher_dist.optimizer.adafisher import AdaFisher
from adafisher_dist.state.shard import Shard
from adafisher_dist.stepping.consistency import raise_if_any_failed

if TYPE_CHECKING:
    from adafisher_dist.checkpoint.ranges import Range

# By what names the momentum is known; the second is AdamW's, whose momentum is the same average.
KEYS = ("momentum", "exp_avg")

_READ = "safe_get_full_optimizer_state"


def adopt(engine_class: Any) -> None:
    """Change what all engines share, once: their offload, and what reads and writes state."""
    offload, reload = engine_class.offload_states, engine_class.reload_states

    @wraps(offload)
    def offload_states(
        self: Any, include: Any = None, device: Any = None, pin_memory: bool = True, non_blocking: bool = False
    ) -> None:
        to = {} if device is None else {"device": device}
        more = {**to, "pin_memory": pin_memory, "non_blocking": non_blocking}
        if not isinstance(self.basic_optimizer, AdaFisher) or (device is not None and device.value != "cpu"):
            offload(self, include, **more)
        else:
            _offload(self, offload, include, more)

    @wraps(reload)
    def reload_states(self: Any, non_blocking: bool = False) -> None:
        if isinstance(self.basic_optimizer, AdaFisher):
            _check_offloads(self)
        reload(self, non_blocking)
        if isinstance(self.basic_optimizer, AdaFisher):
            self.basic_optimizer.reload_state()

    engine_class.offload_states, engine_class.reload_states = offload_states, reload_states
    _adopt_flat_partitions(sys.modules.get("deepspeed.utils.mixed_precision_linkage"))
    _adopt_stage3(getattr(sys.modules.get("deepspeed.runtime.zero.stage3"), "DeepSpeedZeroOptimizer_Stage3", None))


# ---- state by parameter ----


def full_momentum(optimizer: AdaFisher, parameter: Tensor, key: str) -> Tensor:
    """The momentum in the parameter's shape, fp32; zeros before its first step.

    A collective of the ranks that share the parameter.

    Raises:
        ValueError: another key than those in KEYS; on every rank that asks.
        RuntimeError: on all ranks: the state is offloaded, or a step or a load failed half-way.
    """
    _check_key(key)
    shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
    full = torch.zeros(shape, dtype=torch.float32, device=parameter.device)
    shard, number = _shard_of(optimizer, parameter)
    if shard is None:
        return full
    errors = DeferredErrors()
    errors.attempt(lambda: _prepare(optimizer, shard))
    raise_if_any_failed(shard.storage.group, errors, f"in {_READ}")
    flat = full.view(-1)
    for own in _momentum(shard, number):
        flat[own.start : own.start + own.numel].copy_(own.pack())
    return collectives.total(shard.storage.group, shard.storage.group.comm_buffer(flat), _READ).view(shape)


def set_full_momentum(optimizer: AdaFisher, parameter: Tensor, value: Tensor, key: str) -> None:
    """Each rank takes its own blocks' part of the value, of the parameter's shape. Local.

    Raises:
        ValueError: another key than those in KEYS, or a value of another size.
        RuntimeError: there is no state before the first step; or it is offloaded, or a step or a
            load failed half-way.
    """
    _check_key(key)
    shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
    if value.numel() != torch.Size(shape).numel():
        raise ValueError(f"The momentum of a parameter of shape {shape} has no {value.numel()} elements.")
    shard, number = _shard_of(optimizer, parameter)
    if shard is None:
        raise RuntimeError("AdaFisher has no state of this parameter before its first step: take one, then set it.")
    _prepare(optimizer, shard)
    flat = value.detach().reshape(-1)
    for own in _momentum(shard, number):
        own.unpack(flat[own.start : own.start + own.numel].to(shard.device, own.dtype))


def _check_key(key: str) -> None:
    if key not in KEYS:
        raise ValueError(
            f"AdaFisher keeps no {key!r} in a parameter's shape, only 'momentum' (or, as AdamW calls it, 'exp_avg');"
            " its second moments are matrices, each on the rank that owns the block. Save a checkpoint"
            " (engine.save_checkpoint) and read fisher/NAME and square/NAME there; optimizer.fisher_stats() and"
            " report_metrics() tell of them in training."
        )


def _shard_of(optimizer: AdaFisher, parameter: Tensor) -> tuple[Shard | None, int]:
    """Where its state is, and its number there; (None, 0) before its first step."""
    info = optimizer._registry.given_parameters.find(parameter)
    assert info is not None
    for shard in optimizer._registry.shards:
        for number, own in shard.active:
            if own.info.position == info.position:
                return shard, number
    return None, 0


def _prepare(optimizer: AdaFisher, shard: Shard) -> None:
    """Refuse a state that is not whole, and take over what the user has put into it."""
    optimizer._registry.stepper.check_complete()
    optimizer._registry.sync_user_state([shard])


def _momentum(shard: Shard, number: int) -> list[Range]:
    """What this rank owns of a parameter's."""
    from adafisher_dist.checkpoint.ranges import of_state  # who only trains need not spend the time that it takes

    return [own for own in of_state(shard, {number: ""}) if own.key == "momentum/"]


def _adopt_flat_partitions(linkage: Any) -> None:
    """ZeRO-1, 2 and BF16_Optimizer give each parameter methods that are functions of a module."""
    if not hasattr(linkage, "get_full_hp_param") or not hasattr(linkage, "set_full_hp_param"):
        return
    get, put = linkage.get_full_hp_param, linkage.set_full_hp_param

    @wraps(get)
    def get_full_hp_param(self: Tensor, optim_state_key: str | None = None) -> Any:
        own = None if optim_state_key is None else _optimizer_of(self)
        return get(self, optim_state_key) if own is None else full_momentum(own, self, str(optim_state_key))

    @wraps(put)
    def set_full_hp_param(self: Tensor, value: Tensor, optim_state_key: str | None = None) -> None:
        own = None if optim_state_key is None else _optimizer_of(self)
        if own is None:
            put(self, value, optim_state_key)
        else:
            set_full_momentum(own, self, value, str(optim_state_key))

    linkage.get_full_hp_param, linkage.set_full_hp_param = get_full_hp_param, set_full_hp_param


def _optimizer_of(parameter: Tensor) -> AdaFisher | None:
    """The AdaFisher that trains a parameter with a wrapper of DeepSpeed, or None."""
    known = [own for own in registered if isinstance(own, AdaFisher)]
    return next((own for own in known if own._registry.given_parameters.find(parameter) is not None), None)


def _adopt_stage3(wrapper_class: Any) -> None:
    """The same for ZeRO-3, whose wrapper has the methods."""
    names = ("get_full_hp_param", "set_full_hp_param", "get_local_fp32_param", "set_local_hp_param")
    if not all(hasattr(wrapper_class, name) for name in (*names, "get_hp_param_device")):
        return

    def replace(name: str, place: int, ours: Callable[..., Any]) -> None:
        """`place`: of the parameter among the arguments, which the key follows."""
        theirs = getattr(wrapper_class, name)

        @wraps(theirs)
        def method(self: Any, *arguments: Any, **more: Any) -> Any:
            key = more.get("optim_state_key") if len(arguments) == place + 1 else arguments[place + 1]
            if key is None or not isinstance(self.optimizer, AdaFisher):
                return theirs(self, *arguments, **more)
            *value, parameter = arguments[: place + 1]
            return ours(self.optimizer, parameter, *value, key) if parameter.requires_grad else None

        setattr(wrapper_class, name, method)

    replace("get_full_hp_param", 0, full_momentum)
    replace("set_full_hp_param", 1, set_full_momentum)
    replace("get_local_fp32_param", 0, _refuse_local)
    replace("set_local_hp_param", 1, _refuse_local)
    replace("get_hp_param_device", 0, _device)


def _refuse_local(*_: Any) -> None:
    raise RuntimeError(
        "AdaFisher's blocks go over the edges of what a rank stores of a parameter, so that its state has no local"
        f" partition. Use {_READ} and safe_set_full_optimizer_state, on all ranks, with the key 'momentum'."
    )


def _device(optimizer: AdaFisher, parameter: Tensor, _: str) -> torch.device:
    """Where this rank's state is: what DeepSpeed's get_state_devices asks for."""
    shard, _number = _shard_of(optimizer, parameter)
    if shard is None:
        return parameter.device
    return torch.device("cpu") if shard.offloaded is not None else shard.device


# ---- offload ----


def _check_offloads(engine: Any) -> None:
    """Refuse where DeepSpeed has no such function.

    Raises:
        RuntimeError: at stage 0, and of BF16_Optimizer; says what moves AdaFisher's state.
    """
    if not hasattr(engine.optimizer, "offload_states"):
        raise RuntimeError(
            f"DeepSpeed's {type(engine.optimizer).__name__} has no offload_states: that is for ZeRO stages 1 to 3. The"
            " optimizer's state alone moves by engine.basic_optimizer.offload_state() and reload_state()."
        )


def _offload(engine: Any, theirs: Callable[..., None], include: Any, more: dict[str, Any]) -> None:
    """Move what DeepSpeed moves by itself, then the optimizer's state, which it cannot.

    At stage 3 it moves no fp32 weights either where the optimizer is not its own Adam.
    """
    from deepspeed.accelerator import get_accelerator
    from deepspeed.runtime.zero.offload_config import OffloadStateTypeEnum as Kind

    _check_offloads(engine)
    optimizer, wrapper = engine.basic_optimizer, engine.optimizer
    optimizer._registry.stepper.check_complete()
    wanted = engine._refine_include_states(include)
    ours = [Kind.optim_states, *([Kind.hp_params] if engine.zero_optimization_partition_weights() else [])]
    theirs(engine, [kind for kind in wanted if kind not in ours], **more)
    if Kind.hp_params in wanted and Kind.hp_params in ours and Kind.hp_params not in wrapper.offloaded_states:
        zero3.masters_to_host(wrapper, more["pin_memory"])
        wrapper.offloaded_states.add(Kind.hp_params)
    if Kind.optim_states in wanted:
        optimizer.offload_state(more["pin_memory"])
    get_accelerator().empty_cache()
