"""The order of a step: collect → agree → decide → exchange and compute → settle.

See `Stepper.step`.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from adafisher_dist.comm import collectives
from adafisher_dist.comm.collectives import Group
from adafisher_dist.comm.deferred_errors import DeferredErrors
from adafisher_dist.layouts.deepspeed_wrappers import PartOfStep
from adafisher_dist.layouts.storage import UnsupportedLayoutError
from adafisher_dist.numerics.block_step import StepContext
from adafisher_dist.state import statistics
from adafisher_dist.state.shard import Shard, compute_chunk, gradient_limit, waits_for_nothing
from adafisher_dist.stepping import found_inf
from adafisher_dist.stepping.consistency import check_consistency, raise_if_any_failed
from adafisher_dist.stepping.exchange import Exchange, exchange_for
from adafisher_dist.stepping.found_inf import FoundInf
from adafisher_dist.stepping.inputs import Groups, Inputs, inputs_of
from adafisher_dist.stepping.metrics import Meter

logger = logging.getLogger("adafisher_dist")


@dataclass(slots=True, eq=False)
class _Collected:
    """What this rank knows of a call's gradients: how large they are, and how large they may be.

    Attributes:
        inputs: of each shard; after an error some may be missing.
        largest: the largest absolute elements, 0-d, and the limit of each.
        found_inf: what compares them on the device, where nothing else of the step waits for it.
    """

    inputs: list[Inputs] = field(default_factory=list)
    largest: list[tuple[Tensor, float]] = field(default_factory=list)
    found_inf: FoundInf | None = None

    def usable(self) -> bool:
        """Whether every gradient can be used, as far as the host knows.

        It waits for no device. A NaN is below no limit.
        """
        return self.found_inf is not None or all(bool(largest <= limit) for largest, limit in self.largest)


@dataclass(frozen=True, slots=True, eq=False)
class _Pending:
    """A step whose outcome the host does not know yet: its shards, and their counters before."""

    found_inf: FoundInf
    shards: list[Shard]
    counters: list[Tensor]
    is_counted: bool  # as a skipped step, if it was one; of the parts of a step only the first


WHOLE = frozenset(("weights", "state"))


class Stepper:
    """Takes the steps of an optimizer's shards; knows only the settings of torch's param groups."""

    def __init__(self, meter: Meter | None = None) -> None:
        self._exchanges: list[Exchange] = []
        self._where: dict[int, tuple[Shard, int]] = {}  # id of a stored tensor → its shard, and its number there
        self.incomplete: frozenset[str] = frozenset()
        """Of "weights" and "state", what a step or a load began to write and did not complete."""
        self.skipped = 0
        """Steps that changed nothing, of those of which it is known."""
        self.sent: Counter[str] = Counter()
        """Bytes that this rank sent in the last step."""
        self.meter = meter
        """What measures some of the steps."""
        self._calls = 0
        self._pending: list[_Pending] = []
        self._idle: list[FoundInf] = []  # made once, so that a step allocates nothing for it
        self._bound: Tensor | None = None  # of the gradients of the step that a wrapper takes part by part

    # ---- shards ----

    def __contains__(self, tensor: Tensor) -> bool:
        return id(tensor) in self._where

    @property
    def shards(self) -> list[Shard]:
        """In the order in which their tensors first had a gradient; their counters are right."""
        self.resolve_pending()
        return self.planned

    @property
    def planned(self) -> list[Shard]:
        """The same without waiting for the device: the last step may turn out not to count."""
        return [exchange.shard for exchange in self._exchanges]

    def shards_of(self, tensors: Iterable[int]) -> list[Shard]:
        """The shards of tensors, by their ids."""
        return [exchange.shard for exchange in self._exchanges_of(tensors)]

    def _exchanges_of(self, tensors: Iterable[int]) -> list[Exchange]:
        wanted = {id(self._where[tensor][0]) for tensor in tensors if tensor in self._where}
        return [exchange for exchange in self._exchanges if id(exchange.shard) in wanted]

    def add(self, shard: Shard) -> None:
        """Take a shard's tensors in."""
        self._exchanges.append(exchange_for(shard))
        self._where |= {id(tensor): (shard, index) for index, tensor in enumerate(shard.storage.tensors)}

    def replace(self, old: Tensor, new: Tensor | None) -> None:
        """Know a stored tensor by another from now on, or none; a shard without any is dropped."""
        shard, index = self._where.pop(id(old))
        if new is not None:
            self._where[id(new)] = shard, index
        elif len(shard.removed) == len(shard.storage.tensors):
            self.drop([shard])

    def drop(self, shards: Sequence[Shard]) -> None:
        """Forget shards."""
        self.resolve_pending(shards)
        self._exchanges = [exchange for exchange in self._exchanges if exchange.shard not in shards]
        self._where = {tensor: place for tensor, place in self._where.items() if place[0] not in shards}

    # ---- what a failure, or the device, has left undone ----

    def resolve_pending(self, shards: Sequence[Shard] | None = None) -> None:
        """Undo the counting of steps that, as the device found, were to change nothing.

        Of these shards, or of all: DeepSpeed steps one param group after the other, and to ask
        about the one before would be to wait for it.
        """
        for pending in list(self._pending):
            if shards is None or any(shard in shards for shard in pending.shards):
                self._pending.remove(pending)
                self._idle.append(pending.found_inf)
                if not pending.found_inf.read():
                    self.skipped += pending.is_counted
                    for shard, counters in zip(pending.shards, pending.counters, strict=True):
                        shard.counters.copy_(counters)

    def check_complete(self) -> None:
        """Refuse to go on with a state that a failed step or load left incomplete.

        Raises:
            RuntimeError: on all ranks alike, since all of them know of the failure.
        """
        self.resolve_pending()
        self._refuse_incomplete()

    def _refuse_incomplete(self) -> None:
        if self.incomplete:
            raise RuntimeError(
                "AdaFisher's state and the parameters are incomplete, since a step or a load failed half-way. Load the"
                " last checkpoint into model and optimizer (or call reset_state() after restoring the model)."
            )

    # ---- a step ----

    def step(
        self, groups: Groups, ranks: Group, errors: DeferredErrors, part: PartOfStep | None, limit: Callable[[], float]
    ) -> None:  # fmt: skip
        """Update the tensors with a gradient, all of them in a shard, unless `errors` has one.

        1. Gradients go into the buffers from which they leave. Local; what goes wrong waits in
           `errors`.
        2. The ranks agree: nobody has failed, all have the same plan, and every gradient can be
           used, as far as hosts know. A step with one that is not finite, or too large to square,
           changes nothing; `skipped` counts it.
        3. What only a device knows of the gradients, it tells the other devices: `should_step`.
        4. Chunk by chunk, gradients reach the owners of their blocks, are turned into updates, and
           come back.
        5. The ranks tell each other whether all have done their part.

        Args:
            groups: those tensors' param groups.
            ranks: that take each step of this optimizer together, whatever any of them has to do in
                it.
            errors: of this rank, so far.
            part: which part of a wrapper's step this is, all of which change something or none;
                None for all of it.
            limit: tells how large a gradient element may be in any of the parts.

        Raises:
            RuntimeError: see `check_consistency` and `raise_if_any_failed`; also for a sparse
                gradient, a changed structural setting, or after a step that failed half-way.
        """
        self._refuse_incomplete()
        self._calls += 1
        sent_before = Counter(collectives.sent)
        exchanges = self._exchanges_of(groups)
        shards = [exchange.shard for exchange in exchanges]
        self.resolve_pending(shards)
        collected, is_counted = _Collected(), part is None or part.number == 0
        if errors.none:
            with errors.deferred():
                self._collect(exchanges, collected, groups, ranks, part, limit)
        if not self._ranks_agree(shards, collected, ranks, errors):
            self.skipped += is_counted
            return
        calls = list(zip(exchanges, collected.inputs, strict=True))
        self.incomplete = WHOLE  # until all ranks have done their part
        if self.meter is not None:
            self.meter.begin(_next_step(calls), ranks, self.skipped)
        inf = collected.found_inf
        should_step = None if inf is None else inf.decide(collected.largest, errors)
        counters = [shard.counters.clone() for shard in shards]
        for exchange, inputs in calls:
            contexts: list[StepContext | None] = []
            if errors.none:
                with errors.deferred():
                    contexts = _count_step(exchange.shard, inputs, should_step)
            for chunk in exchange.chunks(inputs, should_step, errors):
                if errors.none:
                    with errors.deferred():
                        compute_chunk(chunk, contexts)
                if not errors.none:
                    exchange.shard.flat_buffer[chunk.start : chunk.stop].zero_()
            errors.attempt(inputs.write_back)
        raise_if_any_failed(ranks, errors)
        self.incomplete = frozenset()
        self.sent = collectives.sent - sent_before
        if self.meter is not None:
            self.meter.end(calls, self.sent)
        if inf is not None:
            self._pending.append(_Pending(inf, shards, counters, is_counted))

    def _collect(
        self, exchanges: Sequence[Exchange], into: _Collected, groups: Groups, ranks: Group, part: PartOfStep | None,
        limit: Callable[[], float],
    ) -> None:  # fmt: skip
        """All of a call that this rank can do by itself, before the others have to know of it."""
        shards = [exchange.shard for exchange in exchanges]
        _check_ranks(shards, ranks)
        for shard in shards:
            into.inputs.append(inputs_of(shard, groups))
        pairs = zip(exchanges, into.inputs, strict=True)
        into.largest += [(exchange.collect(inputs), gradient_limit(exchange.shard)) for exchange, inputs in pairs]
        if part is not None:
            self._bound = part.largest() if part.number == 0 else self._bound
            assert self._bound is not None
            device = into.largest[0][0].device if into.largest else self._bound.device
            into.largest.append((self._bound.to(device, non_blocking=True), limit()))
        into.found_inf = self._found_inf(shards, ranks)

    def _found_inf(self, shards: Sequence[Shard], ranks: Group) -> FoundInf | None:
        """What decides on the device whether to step, if nothing else in the step waits for it."""
        devices = {shard.flat_buffer.device for shard in shards}
        if len(devices) != 1 or not all(map(waits_for_nothing, shards)) or not found_inf.is_meant_for(*devices):
            return None
        (device,) = devices
        idle = next((own for own in self._idle if own.is_for(ranks, device)), None)
        if idle is None:
            return FoundInf(ranks, device)
        self._idle.remove(idle)
        return idle

    def _ranks_agree(
        self, shards: Sequence[Shard], collected: _Collected, ranks: Group, errors: DeferredErrors
    ) -> bool:
        """Whether all ranks take the step. A collective; raises on all ranks where they cannot."""
        fresh = [shard for shard in shards if not shard.checked]
        # Ranks that drift apart, since somebody left out a synchronisation, are found at calls 1,
        # 2, 4, 8, …
        compare_copies = self._calls.bit_count() == 1
        plan = self.meter.plan if self.meter is not None else None
        on_device = collected.found_inf is not None
        try:
            finite = check_consistency(
                ranks, shards, collected.inputs, collected.usable(), on_device, plan, errors, compare_copies
            )
        except Exception:
            # What was planned in this step may not be what the other ranks planned.
            self._exchanges = [exchange for exchange in self._exchanges if exchange.shard.checked]
            self._where = {tensor: place for tensor, place in self._where.items() if place[0].checked}
            raise
        for shard in fresh if ranks.is_first else ():
            logger.info(statistics.summary(shard))
        return finite


def _check_ranks(shards: Sequence[Shard], group: Group) -> None:
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
        if own.total_size != group.total_size or not (own.members <= group.members or group.replicas is not None):
            raise UnsupportedLayoutError(
                f"The parameters of one optimizer are spread over different ranks: {own.total_size} in the layout"
                f" {shard.storage.layout}, and {group.total_size} take the step. Use an optimizer for each."
            )


def _active(shard: Shard, inputs: Inputs) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """For each parameter, whether it has a gradient."""
    tensors = [parameter.tensor for parameter in shard.storage.parameters]
    return np.array([gradient is not None for gradient in inputs.gradients], dtype=bool)[tensors]


def _next_step(calls: Sequence[tuple[Exchange, Inputs]]) -> int:
    """The coming step t of the parameter with the most steps; 0 where none has a gradient."""
    counts = [own.shard.counters.numpy()[_active(own.shard, inputs), 0] for own, inputs in calls]
    return 1 + max((int(steps.max()) for steps in counts if steps.size), default=-1)


def _count_step(shard: Shard, inputs: Inputs, should_step: Tensor | None) -> list[StepContext | None]:
    """Count the step of the parameters that have a gradient; what each takes it with."""
    groups = [shard.groups[parameter.tensor] for parameter in shard.storage.parameters]
    active = _active(shard, inputs)
    every = np.array([1 if settings is None else settings.fisher_update_freq for settings in inputs.settings])
    counts = shard.counters.numpy()
    counts[:, 0] += active
    counts[:, 1] += active & ((counts[:, 0] - 1) % every[groups] == 0)
    known: dict[tuple[int, int, int], StepContext] = {}
    contexts: list[StepContext | None] = []
    for group, (step, updates), having in zip(groups, counts.tolist(), active.tolist(), strict=True):
        settings = inputs.settings[group]
        if not having or settings is None:
            contexts.append(None)
            continue
        key = group, step, updates
        if key not in known:
            known[key] = StepContext(settings, step, updates, should_step)
        contexts.append(known[key])
    return contexts
