"""What all of DeepSpeed's wrappers have in common: how they are found, named, and refused."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from adafisher_dist.layouts.storage import Given, Registry, UnsupportedLayoutError


def calling_wrapper(optimizer: Optimizer) -> tuple[Any, str]:
    """The DeepSpeed object on the call stack whose base optimizer this is, and which of its functions calls.

    DeepSpeed keeps no reference from the base optimizer, or from its tensors, to the wrapper. Whoever calls `step`
    or `load_state_dict` is that wrapper, by construction. (None, "") where nobody is.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        owner = frame.f_locals.get("self")
        if type(owner).__module__.startswith("deepspeed.") and getattr(owner, "optimizer", None) is optimizer:
            return owner, frame.f_code.co_name
        frame = frame.f_back
    return None, ""


class PartOfStep(NamedTuple):
    """One of the calls that a wrapper makes of the optimizer's step() in each of its own steps.

    Attributes:
        number: 0 for the first.
        largest: to be called in the first: a 0-d bound of this rank's gradient elements in all the calls; ∞ or NaN
            where one is not finite.
    """

    number: int
    largest: Callable[[], Tensor]


# Of each wrapper that steps a part after the other: what its `_optimizer_step` calls the part's number.
_PARTS = {"DeepSpeedZeroOptimizer": "group_no", "DeepSpeedZeroOptimizer_Stage3": "sub_group_id"}


def part_of_step(optimizer: Optimizer) -> PartOfStep | None:
    """Which part of DeepSpeed's step this call of step() is; None where one call is all of it.

    ZeRO-1 and 2 step one param group after the other, and ZeRO-3 one sub-group. DeepSpeed mostly discards a step with a
    gradient that is not finite before any of these calls, but not in bf16 with check_grad_overflow off, nor with
    compute_grad_norm off; and what is finite may be too large to square.

    Raises:
        UnsupportedLayoutError: the wrapper is not what AdaFisher knows.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        owner, function = frame.f_locals.get("self"), frame.f_code.co_name
        if function == "_optimizer_step" and getattr(owner, "optimizer", None) is optimizer:
            known = _PARTS.get(type(owner).__name__)
            if known is None:
                return None
            number = frame.f_locals.get(known)
            if not isinstance(number, int):
                raise unexpected(owner, f"has no {known} in its _optimizer_step")
            return PartOfStep(number, partial(_largest_gradient, owner))
        frame = frame.f_back
    return None


def _largest_gradient(wrapper: Any) -> Tensor:
    """A bound of the gradient elements of all the parts, before the first is stepped."""
    norm, clip = wrapper._global_grad_norm, float(wrapper.clip_grad)
    if norm is not None:
        norm = torch.as_tensor(norm, dtype=torch.float32)
        # DeepSpeed writes -1 or ∞ where the norm is not finite. What is clipped is no longer than clip_grad.
        usable = norm.isfinite() & (norm >= 0)
        return torch.where(usable, norm.clamp(max=clip) if clip > 0 else norm, torch.inf)
    # compute_grad_norm is off, and so is clipping: what DeepSpeed is about to step, some of it still in 16 bits.
    first = wrapper.single_partition_of_fp32_groups[0].grad
    rest = [gradient for part in wrapper.averaged_gradients.values() if part is not None for gradient in part]
    norms = torch._foreach_norm([gradient.float() for gradient in rest if gradient.numel()], torch.inf)
    scaled = [value.to(first.device) / wrapper.loss_scale for value in norms]
    return torch.stack([torch.linalg.vector_norm(first, torch.inf), *scaled]).max()


def engine_that_builds() -> Any:
    """The DeepSpeed engine on the call stack, which is building its optimizer from its config; None where none is."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        owner = frame.f_locals.get("self")
        if type(owner).__module__.startswith("deepspeed.") and hasattr(owner, "monitor"):
            return owner
        frame = frame.f_back
    return None


_callbacks: list[Callable[[], None]] = []


def when_deepspeed_is_loaded(callback: Callable[[], None]) -> None:
    """Have a function called whenever an optimizer is built where DeepSpeed is loaded."""
    _callbacks.append(callback)


def meet_deepspeed(optimizer_class: type) -> None:
    """Where DeepSpeed is loaded: tell it that this optimizer knows its ZeRO layouts, and whoever waits for it.

    It otherwise demands `zero_allow_untested_optimizer`. The list is read after the optimizer was built.
    """
    for callback in _callbacks if "deepspeed" in sys.modules else ():
        callback()
    zero_utils = sys.modules.get("deepspeed.runtime.zero.utils")
    supported = getattr(zero_utils, "ZERO_SUPPORTED_OPTIMIZERS", None)
    if isinstance(supported, list) and optimizer_class not in supported:
        supported.append(optimizer_class)


def known_as(wrapper: Any, parameter: Tensor, registry: Registry) -> Given:
    """How a model parameter was given, with DeepSpeed's name for it: its own engine passes parameters without names.

    Raises:
        UnsupportedLayoutError: it was not given to the optimizer, or is itself a part of a parallel layer.
    """
    given = registry.find(parameter)
    if given is None:
        raise UnsupportedLayoutError(
            f"{type(wrapper).__name__} holds a parameter of shape {tuple(parameter.shape)} that was not given to"
            " AdaFisher. Pass the same parameters to both."
        )
    names = getattr(wrapper, "param_names", {})
    return replace(given, name=names.get(parameter, given.name))


def refuse_modes(wrapper: Any, modes: Mapping[str, object]) -> None:
    """Refuse the first mode that is on.

    Raises:
        UnsupportedLayoutError: names it.
    """
    for mode, on in modes.items():
        if on:
            raise UnsupportedLayoutError(
                f"{type(wrapper).__name__} with {mode} is not supported by AdaFisher; turn {mode} off."
            )


def unexpected(wrapper: Any, what: str) -> UnsupportedLayoutError:
    """The error for a wrapper that is not laid out as in the versions that AdaFisher knows."""
    import deepspeed

    return UnsupportedLayoutError(
        f"{type(wrapper).__name__} of DeepSpeed {deepspeed.__version__} is not what AdaFisher knows: it {what}."
        " Use a version of DeepSpeed that AdaFisher's README lists."
    )
