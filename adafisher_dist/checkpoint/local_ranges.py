"""This rank's ranges of a model and its optimizer: what it writes, and what it reads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from math import prod

import torch

from adafisher_dist import layouts
from adafisher_dist.checkpoint import ranges
from adafisher_dist.checkpoint.ranges import Range
from adafisher_dist.checkpoint.targets import CheckpointTarget
from adafisher_dist.comm.collectives import Group
from adafisher_dist.layouts.storage import LocalShard, whole_shape
from adafisher_dist.state.shard import Shard


def weights(target: CheckpointTarget, names: Mapping[str, str], writing: bool) -> Iterator[Range]:
    """The weights and buffers that this rank holds, or of those that several hold, what it writes.

    Keys are weight/NAME, with DeepSpeed's fp32 values where it keeps some, and buffer/NAME.

    Args:
        target: the model.
        names: for each parameter and buffer that takes part, its name in the checkpoint.
        writing: leave out what other ranks write.
    """
    held, first = _held(target), target.hosts.first
    for number, (name, tensor) in enumerate([*target.parameters.items(), *target.buffers.items()]):
        if name in names:
            kind = "weight" if name in target.parameters else "buffer"
            if kind == "buffer" and writing and held[name].replicated and target.hosts.rank != _saver(target, name):
                continue  # nobody keeps buffers alike on all ranks, so one rank's are saved, as DDP and DeepSpeed do
            if writing and not _is_first_to_hold(target, name, held[name].group):
                continue
            if writing and not held[name].replicated and layouts.is_spare(tensor, first):
                continue
            alone = kind == "buffer"
            for range_ in _range(
                f"{kind}/{names[name]}", held[name], prod(whole_shape(tensor)), number, writing, alone
            ):
                yield replace(range_, parts=target.parts.get(name))


def _saver(target: CheckpointTarget, name: str) -> int:
    """The rank that saves a buffer."""
    return 0 if target.first_holders is None else target.first_holders[name]


def _is_first_to_hold(target: CheckpointTarget, name: str, group: Group) -> bool:
    """Whether these ranks save a parameter: the first that hold it, if it is tied over stages."""
    return target.first_holders is None or group.handle is None or target.first_holders[name] in group.members


def _held(target: CheckpointTarget) -> dict[str, LocalShard]:
    """This rank's part of each parameter and buffer: in a wrapper's fp32 tensors, or the model."""
    names, held = target.names, {}
    for storage in target.storages():
        group = storage.group
        for place in storage.stored_spans[group.rank]:
            span, values_ = place.span, storage.values(place.tensor)
            if not storage.replicated:
                values_ = values_.view(-1)[place.offset : place.offset + len(span)]
            name = names[storage.parameters[span.parameter].info.position]
            held[name] = LocalShard(values_, span.start, span.stop, group, storage.replicated)
        for parameter in storage.parameters:
            nothing = LocalShard(torch.empty(0, device="cpu"), 0, 0, group, replicated=False)
            held.setdefault(names[parameter.info.position], nothing)
    # The ranks that plain tensors are the same on.
    everyone = layouts.group_of_stage(target.module) or Group(None, target.hosts.rank, target.hosts.size)
    for name, tensor in [*target.parameters.items(), *target.buffers.items()]:
        if name not in held:
            held[name] = layouts.locate(tensor, layouts.group_of_expert(tensor) or everyone)
    return held


def _range(key: str, held: LocalShard, total: int, number: int, writing: bool, alone: bool) -> Iterator[Range]:
    start, stop, values_ = held.start, held.stop, held.values
    if writing and held.replicated and not alone:
        start, stop = ranges.share(values_, number, held.group.rank, held.group.size)
        values_ = values_.view(-1)[start:stop] if values_.is_contiguous() else values_
    found = list(ranges.of_tensor(key, values_, start, stop, total))
    yield from _of_this_replica(found, held.group, number) if writing else found


def _of_this_replica(found: list[Range], group: Group, number: int) -> list[Range]:
    """Of what all replicas hold, a part."""
    if group.replicas is None:
        return found
    count, own = group.replicas.size, group.replicas.rank
    return [range_ for index, range_ in enumerate(found) if (index + number) % count == own]


def state(target: CheckpointTarget, shards: list[Shard], names: Mapping[str, str], writing: bool) -> Iterator[Range]:
    """The optimizer's state on this rank; arguments as for `weights`."""
    first = target.hosts.first
    for shard in shards:
        group, chosen = shard.storage.group, {}
        for number, parameter in shard.active:
            name = target.names[parameter.info.position]
            tensor = shard.storage.tensors[parameter.tensor]
            elsewhere = not _is_first_to_hold(target, name, group) or layouts.is_spare(tensor, first)
            if name in names and not (writing and elsewhere):
                chosen[number] = names[name]
        found = list(ranges.of_state(shard, chosen))
        yield from _of_this_replica(found, group, 0) if writing else found
