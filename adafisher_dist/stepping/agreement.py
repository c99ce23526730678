"""Whether all ranks take a step, and the same one: known before anything of it changes.

Hosts tell each other, and wait for it, in calls 1, 2, 4, 8, …, and in every call where the
arithmetic has to wait for the device anyway. Else all of it rides on the device's verdict
(`found_inf`), and no host waits: either all ranks do what they did in the call before, or the step
changes nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from adafisher_dist.comm.collectives import Group
from adafisher_dist.comm.deferred_errors import DeferredErrors
from adafisher_dist.layouts.storage import UnsupportedLayoutError
from adafisher_dist.state import statistics
from adafisher_dist.state.shard import Shard, waits_for_nothing
from adafisher_dist.stepping import found_inf
from adafisher_dist.stepping.consistency import (
    Alike,
    Fingerprints,
    check_consistency,
    fingerprints_of,
    fingerprints_of_call,
    parts_of,
)
from adafisher_dist.stepping.exchange import Exchange
from adafisher_dist.stepping.found_inf import FoundInf
from adafisher_dist.stepping.inputs import Inputs, without_gradients

logger = logging.getLogger("adafisher_dist")


class OfAllParts(NamedTuple):
    """What holds for all parts of a wrapper's step, each of which is a call of its own.

    Attributes:
        gradient_limit: how large a gradient element may be in any of them.
        waits_for_nothing: whether no part's arithmetic has to wait for the device. If one does,
            hosts decide on all of them: a part by the device would not know of one by the hosts.
    """

    gradient_limit: float
    waits_for_nothing: bool


@dataclass(slots=True, eq=False)
class Collected:
    """What this rank knows of a call: who takes part, and how large gradients are and may be.

    Attributes:
        exchanges: of the tensors that have a gradient.
        inputs: for each; after an error some may be missing.
        largest: the largest absolute gradient elements, 0-d, and the limit of each.
        counters: of each shard, before the call.
        step: the coming one of the parameter with the most steps, where steps are measured; else 0.
        part: the number of this part of a wrapper's step; 0 where it is all of one.
        calls: how many parts there are.
        metrics: which steps are measured, and which one is still to be told of; None where none is.
        by_hosts: whether another part of the step waits for the device anyway.
    """

    exchanges: list[Exchange]
    part: int
    calls: int
    metrics: tuple[int, int | None] | None
    by_hosts: bool = False
    inputs: list[Inputs] = field(default_factory=list)
    largest: list[tuple[Tensor, float]] = field(default_factory=list)
    counters: list[Tensor] = field(default_factory=list)
    step: int = 0

    @property
    def shards(self) -> list[Shard]:
        """Those that take part."""
        return [exchange.shard for exchange in self.exchanges]

    def deciding_device(self) -> torch.device | None:
        """The one that decides whether to step, if nothing else in the step waits for it."""
        devices = {shard.device for shard in self.shards}
        waits = self.by_hosts or not all(map(waits_for_nothing, self.shards))
        if len(devices) != 1 or waits or not found_inf.is_meant_for(*devices):
            return None
        return devices.pop()

    def usable(self) -> bool:
        """Whether every gradient can be used. It waits for the device. A NaN is below no limit."""
        return all(bool(largest <= limit) for largest, limit in self.largest)


@dataclass(frozen=True, slots=True, eq=False)
class Decision:
    """What a call does.

    Attributes:
        calls: the collectives that this rank goes through, with what it brings.
        errors: of this rank in them; an error from the beginning has it leave everything as it is.
        found_inf: what decides on the device whether anything changes, where something does.
        should_step: its number; None: the step takes place.
        alike: what has to be the same on the ranks.
        error: of this rank, from before the decision.
        is_idle: whether this rank only keeps the others company.
    """

    calls: list[tuple[Exchange, Inputs]]
    errors: DeferredErrors
    found_inf: FoundInf | None = None
    should_step: Tensor | None = None
    alike: Alike = field(default_factory=Alike)
    error: Exception | None = None
    is_idle: bool = False

    def without_weights(self) -> DeferredErrors:
        """An error if this rank, being idle, could not send all weights that others wait for."""
        found = DeferredErrors()
        for exchange, inputs in self.calls:
            storage, removed = exchange.shard.storage, exchange.shard.removed
            lacking = [i for i, weight in enumerate(inputs.weights) if weight is None and i not in removed]
            if storage.replicated and lacking:
                found.error = self.error or RuntimeError(
                    f"The other ranks could not be sent the parameter {storage.name_of(lacking[0])}: it is not what it"
                    " was when its state was made, or there was no room for a copy. Load the last checkpoint on all"
                    " ranks."
                )
        return found


@dataclass(frozen=True, slots=True)
class _Agreed:
    """Of the last call of a part that all ranks took alike."""

    exchanges: list[Exchange]  # where a device decides
    device: torch.device | None  # that decides, where one does
    metrics: object


class Agreement:
    """Keeps the ranks together from call to call."""

    def __init__(self) -> None:
        self._calls = 0
        self._agreed: dict[int, _Agreed] = {}
        self._idle: list[FoundInf] = []  # made once, so that a step allocates nothing for it
        self._part_before: Tensor | None = None  # whether that part of the same step takes place, on the device

    def begin(self) -> None:
        """Another call."""
        self._calls += 1

    def expected(self, part: int) -> list[Shard]:
        """The shards that took part in the call before."""
        return [exchange.shard for exchange in self._agreed[part].exchanges] if part in self._agreed else []

    def reuse(self, own: FoundInf) -> None:
        """It has been read."""
        self._idle.append(own)

    def decide(self, collected: Collected, ranks: Group, errors: DeferredErrors) -> Decision | None:
        """What to do; None: nothing, since a gradient cannot be used. A collective.

        Raises:
            RuntimeError: on all ranks alike; see `check_consistency`.
        """
        before = self._agreed.get(collected.part)
        if self._calls.bit_count() == 1 or ranks.total_size == 1 or before is None or before.device is None:
            return self._by_hosts(collected, ranks, errors)
        return self._by_device(before, before.device, collected, ranks, errors)

    def _by_hosts(self, collected: Collected, ranks: Group, errors: DeferredErrors) -> Decision | None:
        device = collected.deciding_device()
        alike = _alike(collected, ranks, parts_of(collected.shards, ranks), errors)
        usable = True
        if device is None and errors.none:
            with errors:
                usable = collected.usable()
        # Ranks that drift apart, since somebody left out a synchronisation, are found at calls 1,
        # 2, 4, 8, …
        compare = self._calls.bit_count() == 1
        if device is not None:
            parts = [group for group, _ in alike.parts]
            errors.attempt(lambda: self._idle.append(self._found_inf(ranks, device, parts)))
        usable = self._checked(collected, ranks, usable, alike, errors, compare)
        # Kept for those that go on while this rank cannot: hosts tell each other beforehand.
        kept = [] if device is None else collected.exchanges
        self._agreed[collected.part] = _Agreed(kept, device, collected.metrics)
        if not usable:
            return None
        calls = list(zip(collected.exchanges, collected.inputs, strict=True))
        if device is None:
            return Decision(calls, errors)
        own = self._found_inf(ranks, device, parts)
        return Decision(calls, errors, own, self._decided(own, collected, alike, errors), alike)

    def _by_device(
        self, before: _Agreed, device: torch.device, collected: Collected, ranks: Group, errors: DeferredErrors
    ) -> Decision:
        parts = parts_of([exchange.shard for exchange in before.exchanges], ranks)
        own = self._found_inf(ranks, device, parts)
        changed = before.exchanges != collected.exchanges
        alike = _alike(collected, ranks, parts, errors, changed)
        should_step = self._decided(own, collected, alike, errors)
        error = errors.error
        tells = collected.metrics is not None and collected.metrics[1] is not None
        if errors.none and (changed or tells or before.metrics != collected.metrics):
            # Whether the others are about to do the same, the host has to know before it does.
            if own.read(settled=False).is_fault:
                errors = _idle("The ranks differ.")
            elif changed:
                now = _alike(collected, ranks, parts_of(collected.shards, ranks), errors)
                self._checked(collected, ranks, True, now, errors, compare=True)
        if not errors.none:
            # The others, who may not know yet, go through the collectives of the call before.
            calls = [(exchange, without_gradients(exchange.shard)) for exchange in before.exchanges]
            return Decision(calls, errors, own, should_step, alike, error, is_idle=True)
        self._agreed[collected.part] = _Agreed(collected.exchanges, device, collected.metrics)
        calls = list(zip(collected.exchanges, collected.inputs, strict=True))
        return Decision(calls, errors, own, should_step, alike)

    def _decided(self, own: FoundInf, collected: Collected, alike: Alike, errors: DeferredErrors) -> Tensor:
        """Whether to step, on the device; not if a part before it in the same step does not."""
        largest, before = list(collected.largest), self._part_before
        if collected.part and before is not None:
            errors.attempt(lambda: largest.append((1 - before, 0.0)))
        self._part_before = own.decide(largest, alike, errors)
        return self._part_before

    def _checked(
        self, collected: Collected, ranks: Group, usable: bool, alike: Alike, errors: DeferredErrors, compare: bool
    ) -> bool:
        """See `check_consistency`; tells of new shards."""
        fresh = [shard for shard in collected.shards if not shard.checked]
        usable = check_consistency(ranks, collected.shards, collected.inputs, usable, alike, errors, compare)
        if fresh and ranks.is_first:
            errors.rescue(partial(self._tell_of, fresh))
        return usable

    def _tell_of(self, shards: Sequence[Shard]) -> None:
        for shard in shards:
            logger.info(statistics.summary(shard))

    def _found_inf(self, ranks: Group, device: torch.device, parts: Sequence[Group]) -> FoundInf:
        idle = next((own for own in self._idle if own.is_for(ranks, device, parts)), None)
        if idle is None:
            return FoundInf(ranks, device, parts)
        self._idle.remove(idle)
        return idle


OF_SHARDS = len(fingerprints_of((), ()))
OF_CALL = len(fingerprints_of_call((), False, 1, False, None))


def _alike(
    collected: Collected, ranks: Group, parts: Sequence[Group], errors: DeferredErrors, changed: bool = False
) -> Alike:
    """What must be the same on all ranks, and on those of each part; zeros after an error.

    See `fingerprints_of_call` for `changed`.
    """
    if ranks.total_size == 1:
        return Alike()
    nothing = [(0, "")]
    zeros = Alike(nothing * (OF_SHARDS + OF_CALL), [(part, nothing * OF_SHARDS) for part in parts])

    def look() -> Alike:
        shared = {group: _fingerprints(collected, group, ranks) for group in (ranks, *parts)}
        on_device = collected.deciding_device() is not None
        of_call = fingerprints_of_call(parts, changed, collected.calls, on_device, collected.metrics)
        return Alike([*shared[ranks], *of_call], [(part, shared[part]) for part in parts])

    return errors.result(look, zeros)


def _fingerprints(collected: Collected, group: Group, ranks: Group) -> Fingerprints:
    """Of the shards that are a group's; of all `ranks`, those that are no part's."""
    own = [
        (shard, inputs)
        for shard, inputs in zip(collected.shards, collected.inputs, strict=True)
        if shard.storage.group == group or (group is ranks and shard.storage.group.total_size == ranks.total_size)
    ]
    return fingerprints_of([shard for shard, _ in own], [inputs for _, inputs in own])


def _idle(why: str) -> DeferredErrors:
    errors = DeferredErrors()
    errors.error = RuntimeError(why)
    return errors


def check_ranks(shards: Sequence[Shard], group: Group) -> None:
    """Refuse shards that are not spread over the ranks that take the step together.

    Raises:
        RuntimeError: the shards were made before there were other ranks.
        UnsupportedLayoutError: names the layout.
    """
    for shard in shards:
        own = shard.storage.group
        if own.handle is None and group.total_size > 1:
            raise RuntimeError(
                "AdaFisher took its first step, or loaded its state, before torch.distributed was initialised, and"
                " knows of no other rank. Initialise it first, then load the state."
            )
        alike = own.total_size == group.total_size
        try:
            within = own.members <= group.members
        except KeyError as error:
            raise RuntimeError(
                "The process group that AdaFisher's state is spread over was destroyed. Call reset_state(), or load the"
                " last checkpoint into a new optimizer."
            ) from error
        if not (within or (alike and group.replicas is not None)):
            raise UnsupportedLayoutError(
                f"The parameters of one optimizer are spread over different ranks: {own.total_size} in the layout"
                f" {shard.storage.layout}, and {group.total_size} take the step. Use an optimizer for each."
            )
