"""What all of DeepSpeed's wrappers have in common: how they are found, named, and refused."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import FrameType, ModuleType
from typing import Any, NamedTuple
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from adafisher_dist.layouts.storage import GivenParameters, ParameterInfo, UnsupportedLayoutError

_ENGINE = "deepspeed.runtime.engine"


def calling_wrapper(optimizer: Optimizer) -> tuple[Any, str]:
    """The DeepSpeed object that wraps this optimizer and calls it, and the calling function's name.

    DeepSpeed keeps no reference from the base optimizer, or from its tensors, to the wrapper, so
    this looks on the call stack: what calls `step` or `load_state_dict` is the wrapper, by
    construction. (None, "") where there is none.
    """
    for frame in _deepspeed_frames():
        owner = frame.f_locals.get("self")
        if getattr(owner, "optimizer", None) is optimizer:
            return owner, frame.f_code.co_name
    return None, ""


def frames() -> Iterator[FrameType]:
    """The call stack, from the function that asks to the outermost.

    Before Python 3.13 `f_locals` puts a copy of them into the frame. That of a function with frames
    among its locals keeps all of the stack alive, with what is deleted there, until Python looks
    for cycles: ask a frame of another's code alone.
    """
    frame = sys._getframe().f_back
    while frame is not None:
        yield frame
        frame = frame.f_back


def _deepspeed_frames() -> Iterator[FrameType]:
    """Those of DeepSpeed's functions."""
    return (frame for frame in frames() if str(frame.f_globals.get("__name__")).startswith("deepspeed."))


class PartOfStep(NamedTuple):
    """One of the calls that a wrapper makes of the optimizer's step() in each of its own steps.

    Attributes:
        number: 0 for the first.
        calls: how many there are.
        largest: to be called in the first: a 0-d bound of this rank's gradient elements in all the
            calls; ∞ or NaN where one is not finite.
        empties_groups: whether what is stepped stands in a param group for the call alone.
    """

    number: int
    calls: int
    largest: Callable[[], Tensor]
    empties_groups: bool


def part_of_step(optimizer: Optimizer, parts: Mapping[str, str | None]) -> PartOfStep | None:
    """See `layouts.part_of_step`.

    `parts` has, for each wrapper, the name of the part's number in its `_optimizer_step`.
    """
    for frame in _deepspeed_frames():
        if frame.f_code.co_name != "_optimizer_step":
            continue
        owner = frame.f_locals.get("self")
        if owner is not None and getattr(owner, "optimizer", None) is optimizer:
            known = parts.get(type(owner).__name__)
            if known is None:
                return None
            number = frame.f_locals.get(known)
            if not isinstance(number, int):
                raise unexpected(owner, f"has no {known} in its _optimizer_step")
            of_zero3 = hasattr(owner, "fp16_groups")
            members = owner.fp16_groups if of_zero3 else owner.bit16_groups
            return PartOfStep(number, len(members), partial(_largest_gradient, owner), of_zero3)
    return None


def _largest_gradient(wrapper: Any) -> Tensor:
    """A bound of the gradient elements of all the parts, before the first is stepped."""
    norm, clip = wrapper._global_grad_norm, float(wrapper.clip_grad)
    if norm is not None:
        norm = norm.float() if isinstance(norm, Tensor) else torch.tensor(norm, dtype=torch.float32, device="cpu")
        # DeepSpeed writes -1 or ∞ where the norm is not finite. What is clipped is no longer than
        # clip_grad.
        usable = norm.isfinite() & (norm >= 0)
        return torch.where(usable, norm.clamp(max=clip) if clip > 0 else norm, torch.inf)
    # compute_grad_norm is off, and so is clipping: what DeepSpeed is about to step, some of it
    # still in 16 bits.
    first = wrapper.single_partition_of_fp32_groups[0].grad
    rest = [gradient for part in wrapper.averaged_gradients.values() if part is not None for gradient in part]
    norms = torch._foreach_norm([gradient for gradient in rest if gradient.numel()], torch.inf)
    scaled = [value.to(first.device, torch.float32) / wrapper.loss_scale for value in norms]
    return torch.stack([torch.linalg.vector_norm(first, torch.inf), *scaled]).max()


def engine_that_builds() -> Any:
    """The DeepSpeed engine on the call stack that is building its configured optimizer, or None."""
    for frame in _deepspeed_frames():
        owner = frame.f_locals.get("self")
        if owner is not None and hasattr(owner, "monitor"):
            return owner
    return None


# AdaFishers that were built here, as opposed to copies, by which a program notices one that nobody
# uses.
_built: WeakSet[Optimizer] = WeakSet()
_classes: list[type] = []

registered: WeakSet[Optimizer] = WeakSet()
"""All AdaFishers, copies too: DeepSpeed's functions on a parameter do not say whose it is."""


def register_with_deepspeed(optimizer: Optimizer, built: bool = True) -> None:
    """Make an optimizer known to DeepSpeed, whether that is loaded already or will be.

    Args:
        optimizer: an AdaFisher.
        built: whether its constructor calls, as opposed to copy or pickle.
    """
    if type(optimizer) not in _classes:
        _classes.append(type(optimizer))
    registered.add(optimizer)
    if built:
        _built.add(optimizer)
    if not any(isinstance(finder, _Watch) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watch())
    if hasattr(sys.modules.get(_ENGINE), "DeepSpeedEngine"):
        _meet()


def _meet() -> None:
    """Tell DeepSpeed that these optimizers know ZeRO, and have its engines keep their state.

    It otherwise demands `zero_allow_untested_optimizer`. The list is read when an engine is built.
    """
    supported = getattr(sys.modules.get("deepspeed.runtime.zero.utils"), "ZERO_SUPPORTED_OPTIMIZERS", None)
    if isinstance(supported, list):
        supported += [known for known in _classes if known not in supported]
    import_module("adafisher_dist.ds").adopt_engine()  # by its name, since that module is made of this one


class _Watch(MetaPathFinder):
    """Calls `_meet` when DeepSpeed's engine has been imported.

    An optimizer may be built before DeepSpeed is imported, as with Accelerate, which does so late;
    and a checkpoint may be loaded before the first step. So nothing later would do.
    """

    _busy = False

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """The module's own spec with a loader that calls `_meet`; None for all other modules."""
        if name != _ENGINE or self._busy:
            return None
        self._busy = True
        try:
            spec = find_spec(name)
        finally:
            self._busy = False
        if spec is not None and spec.loader is not None:
            spec.loader = _Then(spec.loader)
        return spec


class _Then(Loader):
    """Does what another loader does, and calls `_meet`."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """As the other."""
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """As the other, which the module then knows as its loader."""
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        _meet()


def left_idle(module: nn.Module, used: Optimizer, given_to: Callable[[Optimizer], Iterable[Tensor]]) -> list[Optimizer]:
    """Live AdaFishers that were built for a module and that no engine uses; each reported once.

    Args:
        module: the model of an engine.
        used: the optimizer that the engine has.
        given_to: the parameters that an AdaFisher was built for. Its param groups may hold others
            by now: Accelerate hands them, not a copy, to the optimizer that it takes instead, and
            DeepSpeed puts its own tensors there.
    """
    _built.discard(used)
    own = {id(parameter) for parameter in module.parameters()}
    found = []
    for optimizer in list(_built):
        info = [id(parameter) for parameter in given_to(optimizer)]
        if info and own.issuperset(info):
            found.append(optimizer)
            _built.discard(optimizer)
    return found


def info_of(wrapper: Any, parameter: Tensor, given_parameters: GivenParameters) -> ParameterInfo:
    """How a model parameter was given, with DeepSpeed's name for it.

    DeepSpeed's own engine passes parameters without names.

    Raises:
        UnsupportedLayoutError: it was not given to the optimizer, or is itself a part of a parallel
            layer.
    """
    info = given_parameters.find(parameter)
    if info is None:
        raise UnsupportedLayoutError(
            f"{type(wrapper).__name__} holds a parameter of shape {tuple(parameter.shape)} that was not given to"
            " AdaFisher. Pass the same parameters to both."
        )
    names = getattr(wrapper, "param_names", {})
    return replace(info, name=names.get(parameter, info.name))


def expert_group(parameter: Tensor) -> Any:
    """The ranks that hold the same expert of DeepSpeed's MoE, as a process group.

    None for what is no expert's.
    """
    if getattr(parameter, "allreduce", True):
        return None
    from deepspeed.utils import groups

    return groups._get_expert_data_parallel_group(getattr(parameter, "group_name", None))


def stage_group(module: nn.Module) -> Any:
    """The ranks that hold the same stage of DeepSpeed's pipeline, as a process group.

    None where the module is no pipeline of several stages.
    """
    is_pipeline = any(kind.__module__ == "deepspeed.runtime.pipe.module" for kind in type(module).__mro__)
    if not is_pipeline or module.num_stages == 1:
        return None
    return module._grid.get_data_parallel_group()  # type: ignore[union-attr, operator]


def expert_names(module: nn.Module) -> dict[str, str]:
    """By the beginning of the names of an expert of DeepSpeed's MoE here, that of all ranks' names.

    Each rank numbers the experts that it holds from 0 on. Empty where there are none.
    """
    found: dict[str, str] = {}
    for name, part in module.named_modules():
        experts = getattr(part, "deepspeed_experts", None)
        first = next(iter(experts.parameters()), None) if isinstance(experts, nn.ModuleList) else None
        if experts is not None and first is not None and not getattr(first, "allreduce", True):
            from deepspeed.utils import groups

            begin = groups._get_expert_parallel_rank(getattr(first, "group_name", None)) * len(experts)
            prefix = f"{name}.deepspeed_experts." if name else "deepspeed_experts."
            found |= {f"{prefix}{number}.": f"{prefix}{begin + number}." for number in range(len(experts))}
    return found


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
