"""The whole state where a rank holds only its blocks: for `state_dict` and torch's checkpoints."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from adafisher_dist.comm.collectives import Group
from adafisher_dist.comm.deferred_errors import DeferredErrors
from adafisher_dist.optimizer import state_dicts
from adafisher_dist.optimizer.registry import ParameterRegistry
from adafisher_dist.state.shard import Shard
from adafisher_dist.stepping.consistency import raise_if_any_failed

Entries = dict[int, dict[str, Tensor]]  # by the id of the stored tensor

UNDER_TENSOR_PARALLELISM = (
    "torch.distributed.checkpoint cannot carry AdaFisher's state under tensor parallelism. Use"
    " adafisher_dist.save_checkpoint and load_checkpoint; or save optimizer.state_dict() of each rank by torch.save,"
    " and load it in the same layout."
)


@dataclass(frozen=True, slots=True)
class Consolidated:
    """The whole state in CPU memory.

    Attributes:
        entries: of every stored tensor; none on the other ranks.
        on_rank: the rank that has it, where that is another one; None where it is here.
    """

    entries: Entries = field(default_factory=dict)
    on_rank: int | None = None

    @property
    def about(self) -> dict[str, Any]:
        """What a state dict tells of it."""
        return state_dicts.about("whole" if self.on_rank is None else f"none, rank {self.on_rank} has the whole")


def consolidate(registry: ParameterRegistry, to: int | None) -> Consolidated:
    """Gather the state of replicated parameters; see `consolidate_state_dict`. A collective."""
    group, errors = registry.ranks(), DeferredErrors()
    errors.attempt(registry.stepper.check_complete)
    errors.attempt(registry.sync_param_groups)
    errors.attempt(lambda: registry.sync_user_state(registry.shards))
    errors.attempt(lambda: _check(registry, group, to))
    keep = to is None or to == group.rank
    every = [(shard, index, id(tensor)) for shard, index, tensor in registry.current_tensors()]
    rooms: Entries = {}
    if keep:
        errors.attempt(lambda: rooms.update({key: state_dicts.room(shard, index) for shard, index, key in every}))
    # Before others wait for this rank's part.
    raise_if_any_failed(group, errors, "to gather the whole state", state_dicts.CONSOLIDATE)
    for shard, index, key in every:
        state_dicts.consolidate(shard, index, rooms.get(key))
    return Consolidated(rooms, None if keep else to)


def _check(registry: ParameterRegistry, group: Group, to: int | None) -> None:
    if state_dicts.is_partial(registry.shards):
        raise RuntimeError(
            "consolidate_state_dict() is for parameters that are the same on every rank. These are sharded"
            f" ({state_dicts.describe(registry.shards)['part']}), and state_dict() is this rank's part."
        )
    if to is not None and not 0 <= to < group.size:
        raise ValueError(f"consolidate_state_dict(to={to}): the process group has ranks 0 to {group.size - 1}.")


def for_torch_checkpoint(registry: ParameterRegistry, known: Consolidated | None) -> Consolidated:
    """The whole state of all trainable parameters, in the form of torch's checkpoint functions.

    Where parameters are sharded, it is made of DTensors, and all ranks have to call this. Under DDP
    it has to be `known`, except for parameters that have seen no step. Whatever is loaded into it
    comes back to `load_state_dict`.

    Raises:
        RuntimeError: this rank holds a part, and the whole was not consolidated.
    """
    if registry.is_sharded:
        return Consolidated(as_dtensors(registry))
    registry.init_missing_shards()
    registry.sync_user_state(registry.shards)
    if known is not None and known.on_rank is not None:
        return Consolidated(on_rank=known.on_rank)
    entries: Entries = {}
    for shard, index, tensor in registry.current_tensors():
        if not shard.storage.on_ranks:
            entries[id(tensor)] = dict(shard.views[index])
        elif known is not None and id(tensor) in known.entries:
            entries[id(tensor)] = known.entries[id(tensor)]
        elif not shard.stepped:
            room = state_dicts.room(shard, index)
            entries[id(tensor)] = {key: value.zero_() for key, value in room.items()}  # every rank knows it
        else:
            raise RuntimeError(
                "This rank holds only its own blocks, and torch.distributed.checkpoint asks for the whole state."
                " Before a save call optimizer.consolidate_state_dict(to=None) on all ranks, after the last step,"
                " and before a load optimizer.reset_state(); or give dcp.save and dcp.load"
                " adafisher_dist.OptimizerState(model, optimizer), which is saved in parts."
            )
    return Consolidated(entries)


def as_dtensors(registry: ParameterRegistry) -> Entries:
    """The whole state as DTensors, by the id of the stored tensor. A collective.

    Raises:
        RuntimeError: on all ranks: one of them has no room for it, or the layout cannot be cut so.
    """
    errors = DeferredErrors()
    rooms: Entries = {}

    def make_room() -> None:
        registry.init_missing_shards()
        registry.sync_user_state(registry.shards)
        _check_one_each(registry.shards)
        for shard, index, tensor in registry.current_tensors():
            if shard.storage.on_ranks:
                rooms[id(tensor)] = state_dicts.dtensor_room(shard, index)

    errors.attempt(make_room)
    raise_if_any_failed(registry.ranks(), errors, "to make room for the whole state")
    return {
        id(tensor): state_dicts.as_dtensors(shard, index, rooms[id(tensor)])
        if shard.storage.on_ranks
        else dict(shard.views[index])
        for shard, index, tensor in registry.current_tensors()
    }


def _check_one_each(shards: list[Shard]) -> None:
    """Refuse a state that torch's checkpoint functions cannot carry.

    Raises:
        RuntimeError: a tensor holds pieces of several parameters.
    """
    for shard in shards:
        if not shard.storage.one_each:
            raise RuntimeError(
                f"torch.distributed.checkpoint cannot carry AdaFisher's state under {shard.storage.layout}, and would"
                " save one rank's part for all. Use adafisher_dist.ds.save_checkpoint and load_checkpoint."
            )
        if shard.storage.tensor_parallel:
            raise RuntimeError(UNDER_TENSOR_PARALLELISM)
