"""Parameters that replace others in the param groups after the first step, and those that leave.

Libraries put a new parameter where an old one stood and hand its state on: `state[new] =
state.pop(old)`. The blocks of the old one, which ranks may share, then belong to the new one, if it
has the same shape. What is taken out of the groups may come back, as where layers are trained in
turns: its state stays, as with torch's optimizers, until it is deleted from `state`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from adafisher_dist.layouts.storage import GivenParameters
from adafisher_dist.settings import is_auto, normalized, state_config
from adafisher_dist.state import offload
from adafisher_dist.state.shard import Shard, TensorSpec

# A stored tensor that has left the param groups: its shard, its number there, and a fitting
# successor, if there is one.
Replacement = tuple[Shard, int, Tensor | None]

KEPT = (
    "AdaFisher keeps the state of %d parameter(s) that stand in no param group now, as %s, for when they come back;"
    " state dicts and checkpoints leave it out. `del optimizer.state[parameter]` gives it up; memory is freed when that"
    " is so of all whose first gradients came in the same step."
)
FORGOTTEN = (
    "AdaFisher forgets the state of %d parameter(s), as %s: they have come back in another param group than those that"
    " they shared one with, with other block settings, or in another shape, dtype or device."
)


def find_replacements(
    shards: Sequence[Shard],
    given_parameters: GivenParameters,
    groups: Sequence[Mapping[str, Any]],
    newcomers: Sequence[Tensor],
    state: Mapping[Tensor, Any],
) -> list[Replacement]:
    """The stored tensors that have left the param groups and `state`, and who follows them.

    That is the parameter of the same shape, dtype and device that has their state, as the very
    tensors that the shard has, or else the one that stands at their place: whether it has a copy of
    the state, or nothing, and so starts anew. While `state` has the old one's, nobody follows it by
    place.

    Args:
        shards: all of them.
        given_parameters: what stood in the param groups before.
        groups: the param groups.
        newcomers: what stands in them and neither stood there before nor has blocks.
        state: of the optimizer.

    Raises:
        RuntimeError: the state is offloaded.
    """
    offload.refuse(shards)
    standing = {id(tensor) for group in groups for tensor in group["params"]}
    new = {id(tensor): tensor for tensor in newcomers}
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
        old = shard.storage.tensors[index]
        if (id(shard), index) not in found and id(old) in places and not state.get(old):
            group, number = places[id(old)]
            members = groups[group]["params"] if group < len(groups) else []
            assign(shard, index, members[number] if number < len(members) else None)
    followed = [(shard, index, found.get((id(shard), index))) for shard, index in vacant]
    return [(s, i, heir) for s, i, heir in followed if heir is not None or not state.get(s.storage.tensors[i])]


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


def misfits(
    shards: Sequence[Shard], given_parameters: GivenParameters, groups: Sequence[dict[str, Any]]
) -> list[Replacement]:
    """What comes back, and cannot go on with its blocks, with nobody in its place.

    Its shape, dtype or device has changed; or it stands in a param group with other block settings
    (where `block_size` is "auto", that of the blocks is taken), or in another than those with which
    it shared one, and whose blocks are stepped with one group's settings.
    """
    found: list[Replacement] = []
    for shard in shards:
        infos = [given_parameters.find(tensor) for tensor in shard.storage.tensors]
        stand = {shard.groups[i]: info.group for i, info in enumerate(infos) if info and i not in shard.absent}
        for index in sorted(shard.absent):
            info, config = infos[index], shard.configs[shard.groups[index]]
            if info is None:
                continue
            group = groups[info.group]
            if is_auto(group["block_size"]):
                group["block_size"] = config.block_size
            same_group = stand.setdefault(shard.groups[index], info.group) == info.group
            same_blocks = fits(shard, index, shard.storage.tensors[index]) and state_config(normalized(group)) == config
            if not (same_group and same_blocks):
                found.append((shard, index, None))
    return found


def settle(shards: Sequence[Shard], given_parameters: GivenParameters) -> list[str]:
    """Let shards know what stands in the param groups now, and where; names what does not."""
    for shard in shards:
        infos = [given_parameters.find(tensor) for tensor in shard.storage.tensors]
        shard.absent = {i for i, info in enumerate(infos) if info is None and i not in shard.removed}
        parameters = [replace(p, info=infos[p.tensor] or p.info) for p in shard.storage.parameters]
        shard.storage = replace(shard.storage, parameters=parameters)
    return [shard.storage.name_of(index) for shard in shards for index in sorted(shard.absent)]


def absence_ended(shards: Sequence[Shard], given_parameters: GivenParameters, state: Mapping[Tensor, Any]) -> bool:
    """Whether a parameter that stood in no param group has come back, or its state was deleted."""
    absent = [shard.storage.tensors[index] for shard in shards for index in shard.absent]
    return any(given_parameters.find(tensor) is not None or not state.get(tensor) for tensor in absent)
