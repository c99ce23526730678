"""Which elements of which parameters the optimizer's tensors hold, declared by whoever laid them out."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import FrameType
from typing import TYPE_CHECKING, Any

from torch import Tensor

from adafisher_dist.comm import join
from adafisher_dist.layouts import replicated, zero12
from adafisher_dist.layouts.replicated import check_parameter
from adafisher_dist.layouts.storage import Given, Parameter, Registry, Storage, UnsupportedLayoutError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.optim import Optimizer

__all__ = [
    "Parameter",
    "Registry",
    "Storage",
    "UnsupportedLayoutError",
    "allow_under_zero",
    "check_parameter",
    "storages",
]

_ZERO12 = "DeepSpeedZeroOptimizer"
_NOT_YET = {
    "FP16_UnfusedOptimizer": "DeepSpeed ZeRO stage 0 in bf16 or fp16 (FP16_UnfusedOptimizer)",
    "BF16_Optimizer": "DeepSpeed ZeRO stage 1 in bf16 with fp32 gradient accumulation (BF16_Optimizer)",
    "DeepSpeedZeroOptimizer_Stage3": "DeepSpeed ZeRO stage 3 (DeepSpeedZeroOptimizer_Stage3)",
}


def storages(
    optimizer: Optimizer,
    tensors: Sequence[Tensor],
    registry: Registry,
    process_group: ProcessGroup | None,
) -> list[Storage]:
    """What is stored where, for tensors that stand in the optimizer's param groups.

    Args:
        optimizer: who asks; under DeepSpeed, the wrapper that called it is found by this.
        tensors: the tensors.
        registry: which parameters the user gave to the optimizer, as opposed to what a wrapper put in their place.
        process_group: the user's, for the replicated layout.

    Raises:
        UnsupportedLayoutError: the layout is unknown or not supported; names it and what to use instead.
    """
    given = [registry.find(tensor) for tensor in tensors]
    if None not in given:
        by_device: dict[Any, list[tuple[Tensor, Given]]] = {}
        for tensor, origin in zip(tensors, given, strict=True):
            assert origin is not None
            check_parameter(tensor, origin.name)
            by_device.setdefault(tensor.device, []).append((tensor, origin))
        group = join(process_group)
        return [replicated.storage(members, group) for members in by_device.values()]
    wrapper = _calling_wrapper(optimizer)
    name = type(wrapper).__name__
    if wrapper is None or name != _ZERO12:
        layout = (
            _NOT_YET.get(name) or f"a wrapper that AdaFisher does not know ({name if wrapper else 'not DeepSpeed'})"
        )
        raise UnsupportedLayoutError(
            f"The optimizer's parameters were replaced by {layout}, which is not supported yet. Supported are one"
            " process, DDP, and DeepSpeed with ZeRO stage 0 in fp32 or stage 1 or 2 in fp32, bf16 or fp16"
            " (stage 1 in bf16 needs data_types.grad_accum_dtype to be bf16, or stage 2)."
        )
    return [zero12.storage(wrapper, tensor, registry) for tensor in tensors]


def allow_under_zero(optimizer_class: type) -> None:
    """Tell DeepSpeed, where it is loaded, that this optimizer knows its ZeRO layouts.

    It otherwise demands `zero_allow_untested_optimizer`. The list is read after the optimizer was built.
    """
    zero_utils = sys.modules.get("deepspeed.runtime.zero.utils")
    supported = getattr(zero_utils, "ZERO_SUPPORTED_OPTIMIZERS", None)
    if isinstance(supported, list) and optimizer_class not in supported:
        supported.append(optimizer_class)


def _calling_wrapper(optimizer: Optimizer) -> Any:
    """The DeepSpeed object on the call stack whose base optimizer this is.

    DeepSpeed keeps no reference from the base optimizer, or from its tensors, to the wrapper. Whoever calls `step`
    or `load_state_dict` is that wrapper, by construction.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        owner = frame.f_locals.get("self")
        if type(owner).__module__.startswith("deepspeed.") and getattr(owner, "optimizer", None) is optimizer:
            return owner
        frame = frame.f_back
    return None
