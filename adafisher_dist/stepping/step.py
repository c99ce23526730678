"""The order of a step: collect → agree → decide → exchange and compute → settle.

See `Stepper.step`.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from torch import Tensor

from adafisher_dist.comm import collectives
from adafisher_dist.comm.collectives import Group
from adafisher_dist.comm.deferred_errors import DeferredErrors
from adafisher_dist.layouts.deepspeed_wrappers import PartOfStep
from adafisher_dist.numerics.block_step import StepContext
from adafisher_dist.numerics.precision import full_precision
from adafisher_dist.state.shard import Shard, compute_chunk, gradient_limit
from adafisher_dist.stepping import consistency
from adafisher_dist.stepping.agreement import Agreement, Collected, Decision, OfAllParts, check_ranks
from adafisher_dist.stepping.consistency import raise_if_any_failed
from adafisher_dist.stepping.counting import count_step, next_step
from adafisher_dist.stepping.exchange import Exchange, exchange_for
from adafisher_dist.stepping.found_inf import Pending, Verdict
from adafisher_dist.stepping.inputs import Groups, inputs_of
from adafisher_dist.stepping.metrics import Meter
from adafisher_dist.stepping.updating import Observe

logger = logging.getLogger("adafisher_dist")

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
        self._agreement = Agreement()
        self._pending: list[Pending] = []
        self._faults: list[tuple[Pending, Verdict]] = []  # of which no call has told yet
        # Of the gradients of the step that a wrapper takes part by part, and what they may be.
        self._bound: tuple[Tensor, OfAllParts] | None = None

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
        if len(self._exchanges) == 1:
            return list(self._exchanges) if any(tensor in self._where for tensor in tensors) else []
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

    def buffers_of(self, shard: Shard) -> list[Tensor]:
        """The memory of what travels in a shard's steps."""
        own = next(exchange.buffers for exchange in self._exchanges if exchange.shard is shard)
        return [tensor for buffer in own for tensor in (buffer.tensor, buffer.sent)]

    # ---- what a failure, or the device, has left undone ----

    def resolve_pending(self, shards: Sequence[Shard] | None = None) -> None:
        """Undo the counting of steps that, as the device found, were to change nothing.

        Of these shards, or of all: DeepSpeed steps one param group after the other, and to ask
        about the one before would be to wait for it.
        """
        for pending in list(self._pending):
            if shards is None or any(shard in shards for shard in pending.shards):
                verdict = pending.found_inf.read()
                if not verdict.took_place:
                    for shard, counters in zip(pending.shards, pending.counters, strict=False):
                        shard.counters.copy_(counters)
                self._pending.remove(pending)
                self._agreement.reuse(pending.found_inf)
                if verdict.is_fault:
                    self._faults.append((pending, verdict))
                    # Half a step: this part to its middle, or the parts before it.
                    self.incomplete |= WHOLE if verdict.amid or pending.part else frozenset()
                elif not verdict.took_place:
                    self.skipped += pending.part == 0
                    if self.meter is not None:
                        self.meter.void()

    def check_complete(self) -> None:
        """Refuse to go on with a state that a failed step or load left incomplete.

        Raises:
            RuntimeError: it is; or the last step could not be taken. All of the ranks know.
        """
        self.resolve_pending()
        for pending, verdict in self._faults:
            self._stop(pending, verdict, None)
        self._refuse_incomplete()

    def _stop_at_faults(self, shards: Sequence[Shard], ranks: Group) -> None:
        """Raise what became known of an earlier step of these shards.

        All ranks do so in the same call: none may stop alone while others wait for it. It is a
        collective where the ranks differed.
        """
        for fault in list(self._faults):
            if any(shard in shards for shard in fault[0].shards):
                self._faults.remove(fault)
                self._forget_unchecked()
                if self.meter is not None:  # the ranks that had not failed have begun to measure
                    self.meter.forget()
                self._stop(*fault, ranks)

    def _stop(self, pending: Pending, verdict: Verdict, ranks: Group | None) -> None:
        when = "in the middle of a step" if verdict.amid else "before anything changed"
        consistency.stop(pending.error, verdict.amid or verdict.before, when)
        if ranks is None:
            raise RuntimeError("AdaFisher took no step, since the ranks differ; the next step() tells in what.")
        raise RuntimeError(consistency.difference(ranks, pending.alike))

    def _forget_unchecked(self) -> None:
        """What was planned in a failed step may not be what the other ranks planned."""
        self.drop([exchange.shard for exchange in self._exchanges if not exchange.shard.checked])

    def _refuse_incomplete(self) -> None:
        if self.incomplete:
            raise RuntimeError(
                "AdaFisher's state and the parameters are incomplete, since a step or a load failed half-way. Load the"
                " last checkpoint into model and optimizer (or call reset_state() after restoring the model)."
            )

    # ---- a step ----

    def step(
        self, groups: Groups, ranks: Group, errors: DeferredErrors, part: PartOfStep | None,
        of_all: Callable[[], OfAllParts],
    ) -> None:  # fmt: skip
        """Update the tensors with a gradient, all of them in a shard, unless `errors` has one.

        1. What the device found in earlier steps becomes known to the host, and to the user.
        2. Gradients are looked at, and those of cut blocks go into the buffers from which they
           leave. Local; what goes wrong waits in `errors`.
        3. The ranks agree (`agreement`): nobody has failed, all are about to do the same, and every
           gradient can be used. A step with one that is not finite, or too large to square, changes
           nothing; `skipped` counts it.
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
            of_all: tells what holds for all parts.

        Raises:
            RuntimeError: see `check_consistency` and `raise_if_any_failed`; also for a sparse
                gradient, a changed structural setting, or after a step that failed half-way.
        """
        sent_before = Counter(collectives.sent)
        collected, decision = self._prepare(groups, ranks, errors, part, of_all)
        if decision is None:
            self.skipped += collected.part == 0
            return
        errors, should_step = decision.errors, decision.should_step
        self.incomplete = WHOLE  # until all ranks have done their part
        observe = self._begin_to_measure(decision, collected, ranks)
        for exchange, inputs in decision.calls:
            contexts: list[StepContext | None] = []
            if errors.none:
                with errors:
                    contexts = count_step(exchange.shard, inputs, should_step)
            with full_precision(exchange.shard.device):
                for chunk in exchange.chunks(inputs, should_step, errors, observe):
                    if errors.none:
                        with errors:
                            compute_chunk(chunk, contexts)
            errors.attempt(inputs.write_back)
        self._settle(decision, collected, ranks)
        self.incomplete = frozenset()
        self.sent = collectives.sent - sent_before
        if self.meter is not None and not decision.is_idle:
            self.meter.end(decision.calls, self.sent)

    def _prepare(
        self,
        groups: Groups,
        ranks: Group,
        errors: DeferredErrors,
        part: PartOfStep | None,
        of_all: Callable[[], OfAllParts],
    ) -> tuple[Collected, Decision | None]:
        """All that comes before anything changes."""
        self._agreement.begin()
        number = 0 if part is None else part.number
        calls = 1 if part is None else part.calls
        plan = None if self.meter is None else self.meter.plan
        collected = Collected(self._exchanges_of(groups), number, calls, plan, self._by_hosts(part))
        concerned = [*collected.shards, *self._agreement.expected(number)]
        errors.insist(lambda: self.resolve_pending(concerned))  # or this rank alone would not stop at a fault
        self._stop_at_faults(concerned, ranks)
        self._refuse_incomplete()
        if errors.none:
            with errors:
                self._collect(collected, groups, ranks, part, of_all)
        try:
            return collected, self._agreement.decide(collected, ranks, errors)
        except Exception:
            self._forget_unchecked()
            self.incomplete |= WHOLE if number else frozenset()  # the parts before it have changed something
            raise

    def _by_hosts(self, part: PartOfStep | None) -> bool:
        """As in the step before, where a call cannot tell: settings of blocks do not change."""
        return part is not None and self._bound is not None and not self._bound[1].waits_for_nothing

    def _collect(
        self, into: Collected, groups: Groups, ranks: Group, part: PartOfStep | None,
        of_all: Callable[[], OfAllParts],
    ) -> None:  # fmt: skip
        """All of a call that this rank can do by itself, before the others have to know of it."""
        check_ranks(into.shards, ranks)
        for shard in into.shards:
            into.inputs.append(inputs_of(shard, groups))
        pairs = list(zip(into.exchanges, into.inputs, strict=True))
        if self.meter is not None:
            into.step = max((next_step(exchange.shard, inputs) for exchange, inputs in pairs), default=0)
        into.counters += [shard.counters.clone() for shard in into.shards]
        into.largest += [(exchange.collect(inputs), gradient_limit(exchange.shard)) for exchange, inputs in pairs]
        if part is not None:
            self._bound = (part.largest(), of_all()) if part.number == 0 else self._bound
            assert self._bound is not None
            into.by_hosts = self._by_hosts(part)
            bound, own = self._bound
            device = into.largest[0][0].device if into.largest else bound.device
            # To a CPU it would be read before it has come.
            into.largest.append((bound.to(device, non_blocking=device.type != "cpu"), own.gradient_limit))

    def _begin_to_measure(self, decision: Decision, collected: Collected, ranks: Group) -> Observe | None:
        if self.meter is None or decision.is_idle:
            return None
        self.meter.begin(collected.step, ranks, self.skipped)
        return self.meter.observer

    def _settle(self, decision: Decision, collected: Collected, ranks: Group) -> None:
        """Let all ranks know whether each has done its part."""
        inf, errors = decision.found_inf, decision.errors
        if inf is None or ranks.total_size == 1:
            raise_if_any_failed(ranks, errors)
        if inf is None:
            return
        amid = decision.without_weights() if decision.is_idle else errors
        shards = [exchange.shard for exchange, _ in decision.calls]
        counters = [] if decision.is_idle else collected.counters
        error = decision.error or amid.error
        pending = Pending(inf, shards, counters, collected.part, decision.alike, error)
        inf.settle(amid)
        self._pending.append(pending)
        if error is not None:
            logger.error("AdaFisher failed on this rank; all ranks stop at their next step(). %s", error)
