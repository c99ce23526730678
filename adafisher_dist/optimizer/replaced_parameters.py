"""Parameters that replace others in the param groups after the first step, and those that leave.

Libraries put a new parameter where an old one stood and hand its state on: `state[new] =
state.pop(old)`. The blocks of the old one, which ranks may share, then belong to the new one, if it
has the same shape. What is taken out of the groups is removed: its state is forgotten.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from adafisher_dist.layouts.storage import GivenParameters
from adafisher_dist.state import offload
from adafisher_dist.state.shard import Shard, TensorSpec

# A stored tensor that has left the param groups: its shard, its number there, and a fitting
# successor, if there is one.
Replacement = tuple[Shard, int, Tensor | None]


def find_replacements(
    shards: Sequence[Shard],
    given_parameters: GivenParameters,
    groups: Sequence[Mapping[str, Any]],
    state: Mapping[Tensor, Any],
) -> list[Replacement]:
    """The stored tensors that have left the param groups, and who follows them.

    That is the parameter of the same shape, dtype and device that has their state, as the very
    tensors that the shard has, or else the one that stands at their place: whether it has a copy of
    the state, or nothing, and so starts anew.

    Args:
        shards: all of them.
        given_parameters: what stood in the param groups before.
        groups: the param groups.
        state: of the optimizer.

    Raises:
        RuntimeError: the state is offloaded.
    """
    offload.refuse(shards)
    standing = {id(tensor) for group in groups for tensor in group["params"]}
    new = {id(t): t for group in groups for t in group["params"] if given_parameters.find(t) is None}
    vacant = [
        (shard, index)
        for shard in shards
        for index, tensor in enumerate(shard.storage.tensors)
        if index not in shard.removed and id(tensor) not in standing
    ]
    heirs = {id(value): tensor for tensor in new.values() for value in state.get(tensor, {}).values()}
    places = given_parameters.places()
    found: dict[tuple[int, int], Tensor] = {}

    def assign(shard: Shard, index: int, tensor: Tensor | None) -> None:
        if tensor is not None and id(tensor) in new and fits(shard, index, tensor):
            found[id(shard), index] = new.pop(id(tensor))

    for shard, index in vacant:
        assign(shard, index, next((heirs[id(v)] for v in shard.views[index].values() if id(v) in heirs), None))
    for shard, index in vacant:
        if (id(shard), index) not in found:
            group, number = places[id(shard.storage.tensors[index])]
            members = groups[group]["params"] if group < len(groups) else []
            assign(shard, index, members[number] if number < len(members) else None)
    return [(shard, index, found.get((id(shard), index))) for shard, index in vacant]


def fits(shard: Shard, index: int, tensor: Tensor) -> bool:
    """Whether a tensor can stand in the place of a stored one."""
    old = shard.storage.tensors[index]
    here = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    alike = getattr(tensor, "device_mesh", None) == getattr(old, "device_mesh", None) and tensor.shape == old.shape
    return alike and TensorSpec(here.shape, here.device, here.dtype) == shard.stored[index]


def replace_tensor(shard: Shard, index: int, successor: Tensor | None) -> None:
    """Put the successor into the vacant place, or retire it."""
    tensors = list(shard.storage.tensors)
    if successor is None:
        shard.removed.add(index)
        successor = torch.empty(0, device="cpu")  # so that the parameter itself can be freed
    tensors[index] = successor
    shard.storage = replace(shard.storage, tensors=tensors)


def rename(shard: Shard, given_parameters: GivenParameters) -> None:
    """Let a shard know its parameters' places in the param groups as they stand now."""
    found = {p.tensor: given_parameters.find(shard.storage.tensors[p.tensor]) for p in shard.storage.parameters}
    parameters = [replace(p, info=found[p.tensor] or p.info) for p in shard.storage.parameters]
    shard.storage = replace(shard.storage, parameters=parameters)
