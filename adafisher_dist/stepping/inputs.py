"""What one call of `step` brings for a shard: weights, gradients and settings, checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from adafisher_dist.layouts.storage import UnsupportedLayoutError, local
from adafisher_dist.settings import StepSettings, normalized, state_config, step_settings
from adafisher_dist.state.shard import Shard

Groups = Mapping[int, dict[str, Any]]  # id of a stored tensor that has a gradient → its param group


@dataclass(slots=True, eq=False)
class Inputs:
    """What one call of step() brings for a shard.

    Attributes:
        settings: of each param group of the shard; None where none of its tensors has a gradient.
        weights: what this rank holds of each stored tensor, contiguous; None where it has no
            gradient in this call.
        gradients: likewise.
    """

    settings: list[StepSettings | None]
    weights: list[Tensor | None] = field(default_factory=list)
    gradients: list[Tensor | None] = field(default_factory=list)
    _copied: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    _flat: list[Tensor | None] = field(default_factory=list)

    @property
    def flat_weights(self) -> list[Tensor | None]:
        """`weights`, 1-d."""
        if not self._flat:
            self._flat = flattened(self.weights)
        return self._flat

    def add(self, weight: Tensor, gradient: Tensor) -> None:
        """The next stored tensor, which has a gradient."""
        if not weight.is_contiguous():
            copy = weight.contiguous()
            self._copied.append((weight, copy))
            weight = copy
        self.weights.append(weight)
        self.gradients.append(gradient if gradient.is_contiguous() else gradient.contiguous())

    def write_back(self) -> None:
        """Bring changed weights to where those are that were not contiguous."""
        for weight, copy in self._copied:
            weight.copy_(copy)


def flattened(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Contiguous tensors as 1-d views."""
    return [None if tensor is None else tensor.view(-1) for tensor in tensors]


def inputs_of(shard: Shard, groups: Groups) -> Inputs:
    """What the call brings for a shard.

    Raises:
        RuntimeError: a gradient cannot be used, or a tensor has been given another shape, device or
            dtype since the plan was made; or a setting that shapes the state was changed, or one
            asks for what these weights cannot have.
    """
    inputs = Inputs(settings=_settings(shard, groups))
    for index, (tensor, before) in enumerate(zip(shard.storage.tensors, shard.stored, strict=True)):
        given = tensor.grad if id(tensor) in groups else None
        if given is None:
            inputs.weights.append(None)
            inputs.gradients.append(None)
            continue
        weight, gradient = local(tensor), local(given)
        if (
            weight.shape != before.shape
            or weight.dtype != before.dtype
            or weight.device != before.device
            or gradient.shape != before.shape
            or gradient.layout != torch.strided
            or gradient.is_complex()
            or _overlaps(weight)
        ):
            _refuse(shard, index, weight, gradient)
        own = inputs.settings[shard.groups[index]]
        if own is not None and own.stochastic_rounding:
            _check_rounding(shard, index, weight.dtype)
        inputs.add(weight, gradient)
    return inputs


def without_gradients(shard: Shard) -> Inputs:
    """All weights and no gradient: for a rank that has no part of its own in a step.

    A weight that is not what it was when the state was made is left out, and one that cannot be
    copied: this rank has told of its error, and may not stop before the others.
    """
    inputs = Inputs([None for _ in shard.configs])
    for index, (tensor, before) in enumerate(zip(shard.storage.tensors, shard.stored, strict=True)):
        weight = None
        with suppress(Exception):
            here = local(tensor)
            if index not in shard.removed and (here.shape, here.device, here.dtype) == before:
                weight = here.contiguous()
        inputs.weights.append(weight)
        inputs.gradients.append(None)
    return inputs


def _check_rounding(shard: Shard, index: int, dtype: torch.dtype) -> None:
    """Refuse stochastic rounding of weights that have, or could have, none.

    Raises:
        ValueError: they are not in bfloat16.
        UnsupportedLayoutError: a tensor holds several parameters, whose elements would have to be
            told apart.
    """
    name, layout = shard.storage.name_of(index), shard.storage.layout
    if dtype != torch.bfloat16:
        raise ValueError(
            f"stochastic_rounding is for weights in bfloat16, and {name} is stepped in {dtype} (under {layout}): it"
            " would do nothing there. Leave it out, or give such parameters a param group without it."
        )
    if not shard.storage.one_each:
        raise UnsupportedLayoutError(
            f"stochastic_rounding is not supported under {layout}, whose tensors hold several parameters each (as"
            f" that of {name}). Leave it out, and bf16_master_weights_and_grads too, so that DeepSpeed keeps float32"
            " copies; or use DDP or FSDP2."
        )


def _overlaps(weight: Tensor) -> bool:
    """Whether elements share memory, as those of an expanded tensor."""
    return not weight.is_contiguous() and any(
        size > 1 and stride == 0 for size, stride in zip(weight.shape, weight.stride(), strict=True)
    )


def _refuse(shard: Shard, index: int, weight: Tensor, gradient: Tensor) -> None:
    before = shard.stored[index]
    if gradient.layout != torch.strided or gradient.is_complex():
        kind = "complex" if gradient.is_complex() else "sparse"
        problem = f"has a {kind} gradient, which AdaFisher does not support. For embeddings, use sparse=False."
    elif _overlaps(weight):
        problem = "has elements that share memory (as after expand()), so that they cannot change. Clone it."
    elif gradient.shape != weight.shape:
        problem = f"has a gradient of shape {tuple(gradient.shape)}, but is {tuple(weight.shape)}."
    else:
        problem = (
            f"was {tuple(before.shape)}, {before.dtype}, on {before.device} when its state was made, and is"
            f" {tuple(weight.shape)}, {weight.dtype}, on {weight.device} now. Move or replace parameters before the"
            " first step; or reset_state(), or save and load the state_dict."
        )
    raise RuntimeError(f"The parameter {shard.storage.name_of(index)} {problem}")


def _settings(shard: Shard, groups: Groups) -> list[StepSettings | None]:
    """The settings of each of the shard's param groups that has a tensor with a gradient."""
    found: list[dict[str, Any] | None] = [None for _ in shard.configs]
    result: list[StepSettings | None] = [None for _ in shard.configs]
    for tensor, number in zip(shard.storage.tensors, shard.groups, strict=True):
        group = groups.get(id(tensor))
        if group is None or group is found[number]:
            continue
        if found[number] is not None:
            raise RuntimeError(
                "The param groups were rearranged after the first step: tensors that shared one are now in several."
                " Call reset_state() first, or build a new optimizer."
            )
        found[number] = group
        checked = normalized(group)
        result[number] = step_settings(checked)
        now, before = state_config(checked), shard.configs[number]
        if now != before:
            pairs = {name: (old, new) for name, old, new in zip(before._fields, before, now, strict=True) if old != new}
            if pairs.pop("keeps_factors", None):
                pairs["inverse_update_freq"] = ("1", "more") if now.keeps_factors else ("more than 1", "1")
            told = ", ".join(f"{name} from {old} to {new}" for name, (old, new) in pairs.items())
            raise ValueError(
                f"{', '.join(pairs)} changed after the first step ({told}), and the state has the old shape. Call"
                " reset_state() first, or build a new optimizer."
            )
    return result


_SMALL = 4096  # elements

Stretch = tuple[int, int, int]  # number of a stored tensor, first element, the one after the last


def stored_stretches(shard: Shard) -> list[Stretch]:
    """Where stored tensors hold elements of parameters; what is padding has no gradient."""
    found: list[Stretch] = []
    for place in shard.storage.stored_spans[shard.storage.group.rank]:
        start, stop = place.offset, place.offset + len(place.span)
        if found and found[-1][0] == place.tensor and found[-1][2] == start:
            start = found.pop()[1]
        found.append((place.tensor, start, stop))
    return found


def _stretches(stored: Sequence[Stretch], flats: Sequence[Tensor | None]) -> list[Tensor]:
    found = []
    for tensor, start, stop in stored:
        whole = flats[tensor]
        if whole is not None:
            found.append(whole if whole.numel() == stop - start else whole.view(-1)[start:stop])
    return found


def largest_gradient(inputs: Inputs, stored: Sequence[Stretch], shard: Shard) -> Tensor:
    """The largest absolute element of this rank's gradients, 0-d; NaN where there is one.

    In the dtype of the arithmetic: a limit would be infinite in float16, and not below infinity.
    """
    dtype = shard.blocks.staging.dtype
    gradients = [gradient for gradient in _stretches(stored, inputs.gradients) if gradient.numel()]
    if not gradients:
        return torch.zeros((), dtype=dtype, device=shard.device)
    if shard.device.type != "cpu":
        return torch.stack(torch._foreach_norm(gradients, torch.inf)).amax().to(dtype)
    # On a CPU 20 times as fast as a norm; many small ones are put together.
    small = [gradient.view(-1) for gradient in gradients if gradient.numel() <= _SMALL]
    looked_at = [gradient for gradient in gradients if gradient.numel() > _SMALL] + (
        [torch.cat(small)] if small else []
    )
    return torch.stack([end for gradient in looked_at for end in torch.aminmax(gradient)]).abs().amax().to(dtype)
