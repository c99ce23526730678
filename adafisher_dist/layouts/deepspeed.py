"""What all of DeepSpeed's wrappers have in common: how they are found, named, and refused."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import FrameType
from typing import Any

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
