"""The order of a step: collect gradients → agree → route to owners → compute → route back and apply → settle."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from adafisher_dist.agreement import agree, settle
from adafisher_dist.batch import updates_fisher
from adafisher_dist.comm import Group
from adafisher_dist.faults import Faults
from adafisher_dist.layouts import UnsupportedLayoutError
from adafisher_dist.settings import DEFAULTS, normalize, structure
from adafisher_dist.shard import Shard, compute
from adafisher_dist.transfer import Transfer, transfer

Groups = Mapping[int, dict[str, Any]]  # id of a stored tensor that has a gradient → its param group


class Engine:
    """The shards of an optimizer's parameters. It knows nothing of torch.optim but the param groups' settings."""

    def __init__(self) -> None:
        self._transfers: list[Transfer] = []
        self._where: dict[int, tuple[Shard, int]] = {}  # id of a stored tensor → its shard, and its number there
        self.incomplete = False
        """Whether a step or the loading of a checkpoint began and did not end."""
        self._calls = 0

    def __contains__(self, tensor: Tensor) -> bool:
        return id(tensor) in self._where

    @property
    def shards(self) -> list[Shard]:
        """In the order in which their tensors first had a gradient."""
        return [way.shard for way in self._transfers]

    def add(self, shard: Shard) -> None:
        """Take a shard's tensors in."""
        self._transfers.append(transfer(shard))
        self._where |= {id(tensor): (shard, index) for index, tensor in enumerate(shard.storage.tensors)}

    def _drop_unchecked(self) -> None:
        self._transfers = [way for way in self._transfers if way.shard.checked]
        self._where = {tensor: place for tensor, place in self._where.items() if place[0].checked}

    def check(self) -> None:
        """Refuse to go on with a state that a failed step or load left incomplete.

        Raises:
            RuntimeError: on all ranks alike, since all of them know of the failure.
        """
        if self.incomplete:
            raise RuntimeError(
                "AdaFisher's state and the parameters are incomplete, since a step or a load failed half-way. Load the"
                " last checkpoint into model and optimizer (or call reset_state() after restoring the model)."
            )

    def shards_of(self, tensors: Iterable[int]) -> list[Shard]:
        """The shards of tensors, by their ids."""
        return [way.shard for way in self._transfers_of(tensors)]

    def _transfers_of(self, tensors: Iterable[int]) -> list[Transfer]:
        wanted = {id(self._where[tensor][0]) for tensor in tensors if tensor in self._where}
        return [way for way in self._transfers if id(way.shard) in wanted]

    def step(self, groups: Groups, group: Group, faults: Faults) -> bool:
        """Update the tensors that have a gradient, all of which are in a shard, unless `faults` tells of an error.

        Args:
            groups: those tensors' param groups.
            group: the ranks that take each step of this optimizer together, whatever any of them has to do in it.
            faults: of this rank, so far.

        Returns:
            False if the step was skipped on all ranks, for a gradient that is not finite or too large to square.

        Raises:
            RuntimeError: see `agreement.agree` and `settle`; also for a sparse gradient, a changed structural setting,
                or after a step that failed half-way.
        """
        self.check()
        self._calls += 1
        transfers = self._transfers_of(groups)
        shards = [way.shard for way in transfers]
        active = [[id(tensor) in groups for tensor in shard.storage.tensors] for shard in shards]
        settings: list[list[dict[str, Any]]] = []
        largest: list[Tensor] = []

        def collect() -> None:
            _check_ranks(shards, group)
            settings.extend(_settings(shard, groups) for shard in shards)
            for shard in shards:
                _check_tensors(shard)
            largest.extend(way.collect(having) for way, having in zip(transfers, active, strict=True))

        faults.attempt(collect)
        try:
            # Ranks that drift apart, since somebody left out a synchronisation, are found at calls 1, 2, 4, 8, …
            compare_copies = self._calls.bit_count() == 1
            if not agree(group, shards, active, largest, settings, faults, compare_copies):
                return False
        except Exception:
            self._drop_unchecked()  # what was planned in this step may not be what the other ranks planned
            raise
        self.incomplete = True  # until all ranks have done their part
        for way, having, hyper in zip(transfers, active, settings, strict=True):
            way.to_owners(faults)
            times: list[tuple[int, int] | None] = []
            faults.attempt(partial(_advance, way.shard, having, hyper, times))
            way.run(partial(compute, times=times, settings=hyper), having, hyper, faults)
        settle(group, faults)
        self.incomplete = False
        return True


def _check_ranks(shards: Sequence[Shard], group: Group) -> None:
    """Refuse shards that are not spread over the ranks that take the step together.

    Raises:
        RuntimeError: the shards were made before there were other ranks.
        UnsupportedLayoutError: names the layout.
    """
    for shard in shards:
        own = shard.storage.group
        if own.handle is None and group.together > 1:
            raise RuntimeError(
                "AdaFisher took its first step, or loaded its state, before torch.distributed was initialised, and"
                " knows of no other rank. Initialise it first, then load the state."
            )
        if own.together != group.together or not (own.members <= group.members or group.replicas is not None):
            raise UnsupportedLayoutError(
                f"The parameters of one optimizer are spread over different ranks: {own.together} in the layout"
                f" {shard.storage.layout}, and {group.together} take the step. Use an optimizer for each."
            )


def _settings(shard: Shard, groups: Groups) -> list[dict[str, Any]]:
    """The settings of each of the shard's param groups that has a tensor with a gradient (of the others, none)."""
    found: list[dict[str, Any] | None] = [None for _ in shard.structures]
    result: list[dict[str, Any]] = [{} for _ in shard.structures]
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
        result[number] = {name: group[name] for name in DEFAULTS}
        normalize(result[number])  # whatever the user has set since the last step
        now, before = structure(result[number]), shard.structures[number]
        if now != before:
            names = [name for name in before._fields if getattr(now, name) != getattr(before, name)]
            raise RuntimeError(
                f"{', '.join(names)} changed after the first step (from {before} to {now}); the state has the old"
                " shape. Call reset_state() first, or build a new optimizer."
            )
    return result


def _check_tensors(shard: Shard) -> None:
    """Refuse gradients that cannot be used, and tensors that were given another shape or device since the plan."""
    for index, (shape, device) in enumerate(shard.stored):
        gradient, values = shard.storage.gradient(index), shard.storage.values(index)
        problem = None
        if gradient is not None and (gradient.layout != torch.strided or gradient.is_complex()):
            kind = "complex" if gradient.is_complex() else "sparse"
            problem = f"has a {kind} gradient, which AdaFisher does not support. For embeddings, use sparse=False."
        elif (values.shape, values.device) != (shape, device):
            problem = (
                f"was {tuple(shape)} on {device} when its state was made, and is {tuple(values.shape)} on"
                f" {values.device} now. Move or replace parameters before the first step; or reset_state(), or save and"
                " load the state_dict."
            )
        elif gradient is not None and gradient.shape != shape:
            problem = f"has a gradient of shape {tuple(gradient.shape)}, but is {tuple(shape)}."
        if problem:
            name = next(p.name for p in shard.storage.parameters if p.tensor == index)
            raise RuntimeError(f"The parameter {name} {problem}")


def _advance(
    shard: Shard, active: Sequence[bool], settings: Sequence[Mapping[str, Any]], times: list[tuple[int, int] | None]
) -> None:
    """Count the step of the active tensors' parameters; appends each one's t and k to `times`, or None."""
    counts: list[list[int]] = shard.counters.tolist()
    for count, parameter in zip(counts, shard.storage.parameters, strict=True):
        having = active[parameter.tensor]
        if having:
            count[0] += 1
            count[1] += updates_fisher(count[0], settings[shard.groups[parameter.tensor]])
        times.append((count[0], count[1]) if having else None)
    shard.counters.copy_(torch.tensor(counts))
