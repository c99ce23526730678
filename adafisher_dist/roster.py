"""Which parameters an optimizer was given, and which shards hold their state."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.optim import Optimizer

from adafisher_dist import comm, estimate, fisher, layouts, state
from adafisher_dist.engine import Engine
from adafisher_dist.layouts import Storage
from adafisher_dist.settings import normalize, structure
from adafisher_dist.shard import Shard, build

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup  # noqa: TID251 (a type)

logger = logging.getLogger("adafisher_dist")


class Roster:
    """Beside an optimizer's `param_groups` and `state`, which belong to torch: what stands behind them.

    Attributes:
        optimizer: whose parameters they are.
        process_group: the user's.
        registry: the parameters that it was given.
        groups: all its param groups; DeepSpeed takes some away while it steps one.
        engine: the shards that hold their state.
    """

    def __init__(self, optimizer: Optimizer, process_group: ProcessGroup | None) -> None:
        self.optimizer = optimizer
        self.process_group = process_group
        self.registry = layouts.Registry()
        self.groups: list[dict[str, Any]] = []
        self.engine = Engine()

    @property
    def shards(self) -> list[Shard]:
        """In the order in which their tensors first had a gradient."""
        return self.engine.shards

    def enlist(self, tensors: list[Tensor]) -> None:
        """Build shards for tensors that have none yet."""
        storages = self._storages(tensors)
        self._choose_block_size(storages)
        for shard in self._build(storages, self.optimizer.param_groups):
            # A copied or unpickled optimizer has a state, but no shard.
            for index, tensor in enumerate(shard.storage.tensors):
                state.restore(shard, index, self.optimizer.state.get(tensor, {}), own=True)
            self.install(shard)

    def _choose_block_size(self, storages: list[Storage]) -> None:
        """Put the largest block size that fits the memory budget in the place of "auto", alike on all ranks."""
        if not storages or all(group["block_size"] != "auto" for group in self.groups):
            return
        shapes: list[list[tuple[int, ...]]] = [[] for _ in self.groups]
        for parameter, given in self.registry.given():
            shapes[given.group].append(layouts.whole_shape(parameter))
        by_group = [(of_group, structure(group)) for of_group, group in zip(shapes, self.groups, strict=True)]
        storage, budget = storages[0], self.groups[0]["memory_budget_gb"]
        kind, dtype = estimate.layout_named(storage.layout), storage.values(0).dtype
        size = estimate.largest_block_size(by_group, kind, storage.group.size, dtype, budget * 1e9)
        for group in self.groups:
            if group["block_size"] == "auto":
                group["block_size"] = size
        if storage.group.is_first:
            logger.info("AdaFisher: block_size %d is the largest that takes at most %g GB a rank.", size, budget)

    def install(self, shard: Shard) -> None:
        """Take a shard in, and show its state in the optimizer's."""
        self.engine.add(shard)
        for index, tensor in enumerate(shard.storage.tensors):
            self.optimizer.state[tensor] = dict(shard.views[index])

    def _storages(self, tensors: list[Tensor]) -> list[Storage]:
        """What is stored where, also where a library has put other parameters in the place of those that were given.

        Accelerate does so: it builds the optimizer, shards the model by FSDP2, and writes the new parameters into
        `param_groups`, each where the old one stood. Shards and copies of parameters, as wrappers of other libraries
        put there, are no nn.Parameter or have another shape, and are refused.
        """
        own = [tensor for group in self.optimizer.param_groups for tensor in group["params"]]
        replaced = any(self.registry.find(tensor) is None for tensor in tensors)
        if replaced and self.registry.could_be(own) and not layouts.is_called_by_deepspeed(self.optimizer):
            self.register_all()
        return layouts.storages(self.optimizer, tensors, self.registry, self.process_group) if tensors else []

    def adopt(self, shards: list[Shard]) -> None:
        """Take over what the user has put into `state`: replaced entries are copied, removed ones start anew.

        Libraries move or reset an optimizer's state by replacing what is in there, and the shards hold the original.
        """
        for shard in shards:
            for index, tensor in enumerate(shard.storage.tensors):
                views, entry = shard.views[index], self.optimizer.state.get(tensor)
                if entry is None or not (entry.keys() == views.keys() and all(entry[k] is views[k] for k in views)):
                    if entry:
                        state.restore(shard, index, entry, own=True)
                    else:
                        state.clear(shard, index)
                    self.optimizer.state[tensor] = dict(views)

    def storages_of(self, tensors: list[Tensor], wrapper: Any) -> list[Storage]:
        """What is stored where in the parameters that were given, or in what a DeepSpeed wrapper has put there."""
        return layouts.storages(self.optimizer, tensors, self.registry, self.process_group, wrapper)

    def replan(self, tensors: list[Tensor], wrapper: Any, zeroed: bool) -> list[Shard]:
        """Shards without any step for these tensors, with the settings that the param groups have now.

        A tensor's group is that of its parameters: ZeRO-3 empties the param groups between steps. See
        `batch.allocate` for `zeroed`.
        """
        storages = self.storages_of(tensors, wrapper) if tensors else []
        numbers = {id(s.tensors[p.tensor]): p.given.group for s in storages for p in s.parameters}
        return self._build(storages, self.optimizer.param_groups, numbers, zeroed)

    def _build(
        self, storages: list[Storage], groups: list[dict[str, Any]], numbers: dict[int, int] | None = None,
        zeroed: bool = True,
    ) -> list[Shard]:  # fmt: skip
        """Plan and allocate shards, with the settings of `groups` (which may be about to be loaded).

        `numbers` tells each tensor's group, by default where it stands now: DeepSpeed hides some groups in a step.
        """
        if numbers is None:
            standing = enumerate(self.optimizer.param_groups)
            numbers = {id(tensor): number for number, group in standing for tensor in group["params"]}
        shards = []
        for storage in storages:
            mine = [numbers[id(tensor)] for tensor in storage.tensors]
            order = sorted(set(mine))
            structures = [structure(groups[number]) for number in order]
            shards.append(build(storage, [order.index(number) for number in mine], structures, zeroed))
        return shards

    def stage(self, saved: Mapping[str, Any]) -> list[Shard]:
        """Shards that hold a saved state; the optimizer itself is not touched."""
        state.check_format(saved)
        own = [tensor for group in self.optimizer.param_groups for tensor in group["params"]]
        numbers = [number for group in saved["param_groups"] for number in group["params"]]
        lengths, saved_lengths = (
            [len(group["params"]) for group in groups]
            for groups in (self.optimizer.param_groups, saved["param_groups"])
        )
        if lengths != saved_lengths and state.is_whole(saved):
            return []  # torch's own check reports it
        states = {id(t): saved["state"][n] for t, n in zip(own, numbers, strict=False) if n in saved["state"]}
        if not states:
            return []
        chosen = [tensor for tensor in own if id(tensor) in states]
        shards = self._build(self._storages(chosen), self.completed(saved["param_groups"]))
        state.check_part(saved, shards)
        for shard in shards:
            for index, tensor in enumerate(shard.storage.tensors):
                state.restore(shard, index, states[id(tensor)], own=not state.is_whole(saved))
        return shards

    def completed(self, saved: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Saved param groups, checked; what an older version did not save is taken from this optimizer's groups."""
        if len(saved) != len(self.optimizer.param_groups):
            return saved  # torch's own check reports it
        result = [{**now, **then} for now, then in zip(self.optimizer.param_groups, saved, strict=True)]
        for group in result:
            normalize(group)
        return result

    def largest_gradient(self) -> float:
        """The largest gradient element that the blocks of every param group can square and sum up."""
        own = [structure(group) for group in self.groups if group["block_size"] != "auto"]
        return min((fisher.largest_gradient(s.compute_dtype, s.block_size) for s in own), default=math.inf)

    def ranks(self) -> comm.Group:
        """The ranks that take each step together: of the device mesh where there is one, else of the process group."""
        return layouts.mesh_group(self.registry) or comm.join(self.process_group)

    def register_all(self) -> None:
        """Register anew what stands in the param groups now."""
        self.registry = layouts.Registry()
        for number, group in enumerate(self.optimizer.param_groups):
            for index, tensor in enumerate(group["params"]):
                layouts.check_parameter(tensor, self.name(number, index))
            self.register(number)

    def register(self, group: int) -> None:
        """Register the parameters of a param group."""
        self.groups = self.optimizer.param_groups
        for index, tensor in enumerate(self.optimizer.param_groups[group]["params"]):
            self.registry.add(tensor, self.name(group, index), group)

    def name(self, group: int, index: int) -> str:
        """The name of a parameter: the user's, or its place in the param groups."""
        names = self.optimizer.param_groups[group].get("param_names")
        return names[index] if names and index < len(names) else f"{group}.{index}"
