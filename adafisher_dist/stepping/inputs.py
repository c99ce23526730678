"""What one call of `step` brings for a shard: weights, gradients and settings, checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from adafisher_dist.settings import StepSettings, normalized, state_config, step_settings
from adafisher_dist.state.shard import Shard

Groups = Mapping[int, dict[str, Any]]  # id of a stored tensor that has a gradient → its param group


@dataclass(slots=True, eq=False)
class Inputs:
    """What one call of step() brings for a shard.

    Attributes:
        settings: of each param group of the shard; None where none of its tensors has a gradient.
        weights: what this rank holds of each stored tensor, flattened; None where it has no
            gradient in this call.
        gradients: likewise.
    """

    settings: list[StepSettings | None]
    weights: list[Tensor | None] = field(default_factory=list)
    gradients: list[Tensor | None] = field(default_factory=list)
    _copied: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def add(self, weight: Tensor | None, gradient: Tensor | None) -> None:
        """The next stored tensor: both, or neither."""
        flat = None if weight is None else weight.reshape(-1)
        if weight is not None and flat is not None and not weight.is_contiguous():
            self._copied.append((weight, flat))
        self.weights.append(flat)
        self.gradients.append(None if gradient is None else gradient.reshape(-1))

    def write_back(self) -> None:
        """Bring changed weights to where those are that could not be flattened in place."""
        for weight, flat in self._copied:
            weight.copy_(flat.view(weight.shape))


def inputs_of(shard: Shard, groups: Groups) -> Inputs:
    """What the call brings for a shard.

    Raises:
        RuntimeError: a gradient cannot be used, or a tensor has been given another shape, device or
            dtype since the plan was made; or a setting that shapes the state was changed.
    """
    inputs = Inputs(settings=_settings(shard, groups))
    for index, tensor in enumerate(shard.storage.tensors):
        gradient = shard.storage.gradient(index) if id(tensor) in groups else None
        if gradient is None:
            inputs.add(None, None)
        else:
            weight = shard.storage.values(index)
            _check_tensor(shard, index, weight, gradient)
            inputs.add(weight, gradient)
    return inputs


def _check_tensor(shard: Shard, index: int, weight: Tensor, gradient: Tensor) -> None:
    before = shard.stored[index]
    if gradient.layout != torch.strided or gradient.is_complex():
        kind = "complex" if gradient.is_complex() else "sparse"
        problem = f"has a {kind} gradient, which AdaFisher does not support. For embeddings, use sparse=False."
    elif (weight.shape, weight.device, weight.dtype) != before:
        problem = (
            f"was {tuple(before.shape)}, {before.dtype}, on {before.device} when its state was made, and is"
            f" {tuple(weight.shape)}, {weight.dtype}, on {weight.device} now. Move or replace parameters before the"
            " first step; or reset_state(), or save and load the state_dict."
        )
    elif gradient.shape != weight.shape:
        problem = f"has a gradient of shape {tuple(gradient.shape)}, but is {tuple(weight.shape)}."
    else:
        return
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
            names = [name for name in before._fields if getattr(now, name) != getattr(before, name)]
            raise RuntimeError(
                f"{', '.join(names)} changed after the first step (from {before} to {now}); the state has the old"
                " shape. Call reset_state() first, or build a new optimizer."
            )
    return result
