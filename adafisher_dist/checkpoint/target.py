"""A model and its optimizer as a checkpoint sees them: named tensors, the ranges that this rank holds, and facts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from adafisher_dist import layouts
from adafisher_dist.checkpoint import encoding, ranges
from adafisher_dist.checkpoint.manifest import LEFT_OUT
from adafisher_dist.checkpoint.ranges import Range
from adafisher_dist.comm.collectives import Group
from adafisher_dist.comm.control_group import Control
from adafisher_dist.layouts import Held, Storage
from adafisher_dist.optimizer.adafisher import AdaFisher
from adafisher_dist.settings import Structure
from adafisher_dist.state.shard import Shard

# What an optimizer keeps of its own when it loads: settings that shape the state, and the one that says what computes.
OWN_SETTINGS = (
    *("block_size", "rows_per_block", "block_grid", "max_blocks"),
    *("fisher_dtype", "exponent", "grafting", "inverse_update_freq", "packed", "memory_budget_gb"),
)

# What torch puts into the names of parameters when it wraps a module in place.
_IN_NAMES = ("_orig_mod.", "_checkpoint_wrapped_module.", "_fsdp_wrapped_module.")


@dataclass(frozen=True, slots=True, eq=False)
class Training:
    """See the module's docstring.

    Attributes:
        module: the model, without a wrapper around it.
        optimizer: AdaFisher.
        wrapper: DeepSpeed's, where it has put other tensors in the parameters' place; else None.
        control: the ranks that save and load together.
        names: of the optimizer's parameters, by their positions.
        parameters: by name; a tied one by its first.
        buffers: the persistent ones, by name; a shared one by its first.
        aliases: the other names of tied parameters and shared buffers.
        left_out: the names of parameters whose values are not saved.
    """

    module: nn.Module
    optimizer: AdaFisher
    wrapper: Any
    control: Control
    names: Mapping[int, str]
    parameters: Mapping[str, Tensor]
    buffers: Mapping[str, Tensor]
    aliases: Mapping[str, str]
    left_out: frozenset[str] = frozenset()

    def storages(self) -> list[Storage]:
        """Of the fp32 tensors of DeepSpeed's wrapper; none where the parameters are their own."""
        if self.wrapper is None:
            return []
        return self.optimizer._roster.storages_of(layouts.wrapped_tensors(self.wrapper), self.wrapper)

    def plain_group(self) -> Group:
        """The ranks that plain tensors are the same on."""
        return Group(None, self.control.rank, self.control.size)


def observe(module: nn.Module, optimizer: AdaFisher, wrapper: Any, control: Control) -> Training:
    """Name everything.

    Raises:
        ValueError: the optimizer has a parameter that is not in the model.
    """
    for part in module.modules():
        if hasattr(part, "reshard") and hasattr(part, "unshard"):  # FSDP2, which keeps a root whole after evaluation
            part.reshard()  # type: ignore[operator]
    first: dict[int, str] = {}
    aliases: dict[str, str] = {}
    parameters = _by_first_name(module.named_parameters(remove_duplicate=False), first, aliases)
    buffers = _by_first_name(_persistent_buffers(module), first, aliases)
    roster = optimizer._roster
    foreign = [given.name for tensor, given in roster.registry.given() if id(tensor) not in first]
    if foreign:
        raise ValueError(
            f"The optimizer has {len(foreign)} parameters that are not in the model, as {foreign[0]}. Save and load the"
            " model that it was built for (after fully_shard, where that is used)."
        )
    names = {given.position: first[id(tensor)] for tensor, given in roster.registry.given()}
    return Training(module, optimizer, wrapper, control, names, parameters, buffers, aliases)


def without_frozen(training: Training) -> Training:
    """The same, to be saved without the values of the parameters that need no gradient."""
    frozen = frozenset(name for name, parameter in training.parameters.items() if not parameter.requires_grad)
    return replace(training, left_out=frozen)


def _by_first_name(
    named: Iterable[tuple[str, Tensor]], first: dict[int, str], aliases: dict[str, str]
) -> dict[str, Tensor]:
    """Tensors by name, each once; `first` and `aliases` take the first name of each, by its id, and the other names."""
    found: dict[str, Tensor] = {}
    for raw, tensor in named:
        name = clean(raw)
        if first.setdefault(id(tensor), name) == name:
            found[name] = tensor
        else:
            aliases[name] = first[id(tensor)]
    return found


def _persistent_buffers(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, buffer in module.named_buffers(remove_duplicate=False):
        owner, _, own = name.rpartition(".")
        if own not in module.get_submodule(owner)._non_persistent_buffers_set:
            yield name, buffer


def clean(name: str) -> str:
    """A parameter's name without what torch.compile, activation checkpointing and the like put into it."""
    for part in _IN_NAMES:
        name = name.replace(part, "")
    return name


def shape_of(tensor: Tensor) -> tuple[int, ...]:
    """The whole shape, also of a partitioned parameter."""
    return tuple(getattr(tensor, "ds_shape", tensor.shape))


# ---- ranges ----


def weights(training: Training, names: Mapping[str, str], writing: bool) -> Iterator[Range]:
    """The weights and buffers that this rank holds, or of those that several hold, what it writes.

    Keys are weight/NAME, with DeepSpeed's fp32 values where it keeps some, and buffer/NAME.

    Args:
        training: the model.
        names: for each parameter and buffer that takes part, its name in the checkpoint.
        writing: leave out what other ranks write.
    """
    held = _held(training)
    for number, (name, tensor) in enumerate([*training.parameters.items(), *training.buffers.items()]):
        if name in names:
            kind = "weight" if name in training.parameters else "buffer"
            if kind == "buffer" and writing and held[name].replicated and training.control.rank:
                continue  # nobody keeps buffers alike on all ranks, so one rank's are saved, as DDP and DeepSpeed do
            alone = kind == "buffer"
            yield from _range(f"{kind}/{names[name]}", held[name], prod(shape_of(tensor)), number, writing, alone)


def _held(training: Training) -> dict[str, Held]:
    """Where this rank has what of each parameter and buffer: in a wrapper's fp32 tensors, or in the model itself."""
    names, held = training.names, {}
    for storage in training.storages():
        group = storage.group
        for place in storage.placed[group.rank]:
            span, values_ = place.span, storage.values(place.tensor)
            if not storage.replicated:
                values_ = values_.view(-1)[place.offset : place.offset + len(span)]
            name = names[storage.parameters[span.parameter].given.position]
            held[name] = Held(values_, span.start, span.stop, group, storage.replicated)
        for parameter in storage.parameters:
            nothing = Held(torch.empty(0), 0, 0, group, replicated=False)
            held.setdefault(names[parameter.given.position], nothing)
    group = training.plain_group()
    for name, tensor in [*training.parameters.items(), *training.buffers.items()]:
        if name not in held:
            held[name] = layouts.locate(tensor, group)
    return held


def _range(key: str, held: Held, total: int, number: int, writing: bool, alone: bool) -> Iterator[Range]:
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


def state(training: Training, shards: list[Shard], names: Mapping[str, str], writing: bool) -> Iterator[Range]:
    """The optimizer's state on this rank; arguments as for `weights`."""
    known = training.names
    for shard in shards:
        chosen = {}
        for number, parameter in shard.living:
            name = known[parameter.given.position]
            if name in names:
                chosen[number] = names[name]
        found = list(ranges.of_state(shard, chosen))
        yield from _of_this_replica(found, shard.storage.group, 0) if writing else found


# ---- facts ----


def describe(training: Training, tensors: list[Tensor]) -> dict[str, Any]:
    """The model and the optimizer's settings and counters, as JSON."""
    return {
        "model": {
            "parameters": {
                name: {
                    "shape": shape_of(p),
                    "dtype": str(p.dtype),
                    "trainable": p.requires_grad,
                    **({LEFT_OUT: True} if name in training.left_out else {}),
                }
                for name, p in training.parameters.items()
            },
            "buffers": {name: {"shape": tuple(b.shape), "dtype": str(b.dtype)} for name, b in training.buffers.items()},
            "aliases": dict(training.aliases),
            "extra_state": {
                name: encoding.encode(part.get_extra_state(), f"the extra state of {name}", tensors)
                for name, part in with_extra_state(training)
            },
        },
        "optimizer": {
            "skipped_steps": training.optimizer.skipped_steps,
            "groups": _groups(training, tensors),
            "state": _counters(training),
        },
    }


def with_extra_state(training: Training) -> Iterator[tuple[str, nn.Module]]:
    """The modules that have some, by name."""
    for name, part in training.module.named_modules():
        if type(part).get_extra_state is not nn.Module.get_extra_state:
            yield clean(name), part


def _groups(training: Training, tensors: list[Tensor]) -> list[dict[str, Any]]:
    members = members_of_groups(training)
    return [
        {
            "names": members[number],
            "settings": {
                key: encoding.encode(value, f"the setting {key!r} of a param group", tensors)
                for key, value in group.items()
                if key not in ("params", "param_names")
            },
        }
        for number, group in enumerate(training.optimizer.param_groups)
    ]


def members_of_groups(training: Training) -> list[list[str]]:
    """The names of the parameters of each param group, in order."""
    names = training.names
    members: list[list[str]] = [[] for _ in training.optimizer.param_groups]
    for _, given in training.optimizer._roster.registry.given():
        members[given.group].append(names[given.position])
    return members


def _counters(training: Training) -> dict[str, dict[str, Any]]:
    names, found = training.names, {}
    for shard in training.optimizer._roster.shards:
        for number, parameter in shard.living:
            grid, (step, updates) = shard.grids[number], shard.counters[number].tolist()
            structure = shard.structures[shard.groups[parameter.tensor]]
            found[names[parameter.given.position]] = {
                "step": step,
                "fisher_updates": updates,
                "blocks": grid.num_blocks,
                "dense_blocks": grid.dense_blocks,
                "structure": structure_of(structure),
            }
    return found


def structure_of(structure: Structure) -> dict[str, Any]:
    """What state was built for, as JSON."""
    return {
        "block_size": structure.block_size,
        "rows_per_block": structure.rows_per_block,
        "block_grid": structure.block_grid,
        "max_blocks": structure.max_blocks,
        "exponent": structure.exponent,
        "grafting": structure.grafting,
        "keeps_factors": structure.keeps_factors,
    }


def layout_of(training: Training) -> str:
    """The name of the layout, for reports."""
    shards = training.optimizer._roster.shards
    storages = [shard.storage for shard in shards] or training.storages()
    if storages:
        return storages[0].layout
    return "replicated" if training.control.size > 1 else "one process"


@contextmanager
def partitioned(wrapper: Any) -> Iterator[None]:
    """While ZeRO-3 has every parameter partitioned, as DeepSpeed's own checkpoints ask for. A collective there."""
    if hasattr(wrapper, "checkpoint_event_prologue"):
        wrapper.checkpoint_event_prologue()
    try:
        yield
    finally:
        if hasattr(wrapper, "checkpoint_event_epilogue"):
            wrapper.checkpoint_event_epilogue()
