"""The order of a step: collect gradients → agree → route to owners → compute → route back and apply → settle."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from adafisher_dist.comm import collectives
from adafisher_dist.comm.collectives import Group
from adafisher_dist.comm.deferred_errors import DeferredErrors
from adafisher_dist.layouts import PartOfStep, UnsupportedLayoutError
from adafisher_dist.settings import DEFAULTS, normalize, structure
from adafisher_dist.state import statistics
from adafisher_dist.state.shard import Shard, Time, compute, largest_gradient, waits_for_nothing
from adafisher_dist.stepping import found_inf
from adafisher_dist.stepping.consistency import check_consistency, raise_if_any_failed
from adafisher_dist.stepping.exchange import Exchange, Inputs, transfer
from adafisher_dist.stepping.found_inf import FoundInf
from adafisher_dist.stepping.metrics import Meter

logger = logging.getLogger("adafisher_dist")

Groups = Mapping[int, dict[str, Any]]  # id of a stored tensor that has a gradient → its param group


@dataclass(frozen=True, slots=True, eq=False)
class _Pending:
    """A step whose verdict the host has not read: its shards, and their counters as they were before it."""

    verdict: FoundInf
    shards: list[Shard]
    counters: list[Tensor]
    counts: bool  # as a skipped step; of the parts of one, only the first


class Engine:
    """The shards of an optimizer's parameters. It knows nothing of torch.optim but the param groups' settings."""

    def __init__(self) -> None:
        self._transfers: list[Exchange] = []
        self._where: dict[int, tuple[Shard, int]] = {}  # id of a stored tensor → its shard, and its number there
        self.incomplete = False
        """Whether a step or the loading of a checkpoint began and did not end."""
        self.skipped = 0
        """Steps that changed nothing, of those whose verdict is known."""
        self.sent: Counter[str] = Counter()
        """Bytes that this rank sent in the last step."""
        self.meter: Meter | None = None
        """What measures some of the steps."""
        self._calls = 0
        self._verdicts: dict[tuple[int, ...], FoundInf] = {}  # by the ids of the shards of a call
        self._pending: list[_Pending] = []
        self._bound: Tensor | None = None  # of the gradients of the step that a wrapper takes part by part

    def __contains__(self, tensor: Tensor) -> bool:
        return id(tensor) in self._where

    @property
    def shards(self) -> list[Shard]:
        """In the order in which their tensors first had a gradient; their counters are right."""
        self.resolve_pending()
        return self.planned

    @property
    def planned(self) -> list[Shard]:
        """The same without a wait for the device: the last step may turn out to have counted for nothing."""
        return [way.shard for way in self._transfers]

    def resolve_pending(self, shards: Sequence[Shard] | None = None) -> None:
        """Take back that steps were counted, where the device has found that they were to change nothing.

        Of these shards, or of all. DeepSpeed steps one param group after the other: to ask of the one before would be
        to wait for it.
        """
        for pending in list(self._pending):
            if shards is None or any(shard in shards for shard in pending.shards):
                self._pending.remove(pending)
                if not pending.verdict.read():
                    self.skipped += pending.counts
                    for shard, counters in zip(pending.shards, pending.counters, strict=True):
                        shard.counters.copy_(counters)

    def add(self, shard: Shard) -> None:
        """Take a shard's tensors in."""
        self._transfers.append(transfer(shard))
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
        gone = set(map(id, shards))
        self.resolve_pending(shards)
        self._transfers = [way for way in self._transfers if id(way.shard) not in gone]
        self._where = {key: place for key, place in self._where.items() if id(place[0]) not in gone}
        self._verdicts = {key: verdict for key, verdict in self._verdicts.items() if not gone & set(key)}

    def _drop_unchecked(self) -> None:
        self._transfers = [way for way in self._transfers if way.shard.checked]
        self._where = {tensor: place for tensor, place in self._where.items() if place[0].checked}

    def check(self) -> None:
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

    def shards_of(self, tensors: Iterable[int]) -> list[Shard]:
        """The shards of tensors, by their ids."""
        return [way.shard for way in self._transfers_of(tensors)]

    def _transfers_of(self, tensors: Iterable[int]) -> list[Exchange]:
        wanted = {id(self._where[tensor][0]) for tensor in tensors if tensor in self._where}
        return [way for way in self._transfers if id(way.shard) in wanted]

    def step(self, groups: Groups, group: Group, errors: DeferredErrors, part: PartOfStep | None, limit: float) -> None:
        """Update the tensors that have a gradient, all of which are in a shard, unless `errors` tells of an error.

        A step in which a gradient is not finite, or too large to square, changes nothing on any rank; `skipped` counts.

        Args:
            groups: those tensors' param groups.
            group: the ranks that take each step of this optimizer together, whatever any of them has to do in it.
            errors: of this rank, so far.
            part: which part of a wrapper's step this is, all of which change something or none; None for all of it.
            limit: how large a gradient element may be in any of the parts.

        Raises:
            RuntimeError: see `agreement.check_consistency` and `raise_if_any_failed`; also for a sparse gradient, a changed structural setting,
                or after a step that failed half-way.
        """
        self._refuse_incomplete()
        self._calls += 1
        before = Counter(collectives.sent)
        transfers = self._transfers_of(groups)
        shards = [way.shard for way in transfers]
        self.resolve_pending(shards)
        inputs: list[Inputs] = []
        largest: list[Tensor] = []
        verdicts: list[FoundInf] = []
        fresh = [shard for shard in shards if not shard.checked]

        def collect() -> None:
            _check_ranks(shards, group)
            inputs.extend(_inputs(shard, groups) for shard in shards)
            largest.extend(way.collect(own) for way, own in zip(transfers, inputs, strict=True))
            if part is not None:
                self._bound = part.largest() if part.number == 0 else self._bound
                assert self._bound is not None
                largest.append(self._bound.to(largest[0].device, non_blocking=True) if largest else self._bound)
            verdicts.extend(self._verdict_on_device(shards, group))

        errors.attempt(collect)
        limits = [largest_gradient(shard) for shard in shards]
        if part is not None:
            limits.append(limit)
        counts = part is None or part.number == 0
        try:
            # NaN is not below the limit. Where the device decides, nobody asks here.
            finite = bool(verdicts) or all(bool(norm <= limit) for norm, limit in zip(largest, limits, strict=False))
            # Ranks that drift apart, since somebody left out a synchronisation, are found at calls 1, 2, 4, 8, …
            compare_copies = self._calls.bit_count() == 1
            metrics = self.meter.plan if self.meter is not None else None
            finite = check_consistency(group, shards, inputs, finite, bool(verdicts), metrics, errors, compare_copies)
        except Exception:
            self._drop_unchecked()  # what was planned in this step may not be what the other ranks planned
            raise
        for shard in fresh if group.is_first else ():
            logger.info(statistics.summary(shard))
        if not finite:
            self.skipped += counts
            return
        self.incomplete = True  # until all ranks have done their part
        if self.meter is not None:
            self.meter.begin(_step(shards, inputs), group, self.skipped)
        should_step = verdicts[0].decide(largest, limits, errors) if verdicts else None
        counters = [shard.counters.clone() for shard in shards]
        for way, own in zip(transfers, inputs, strict=True):
            times: list[Time] = []
            errors.attempt(partial(_advance, way.shard, own, times))
            way.run(
                own, partial(compute, times=times, settings=own.settings, should_step=should_step), should_step, errors
            )
            errors.attempt(own.write_back)
        raise_if_any_failed(group, errors)
        self.incomplete = False
        self.sent = collectives.sent - before
        if self.meter is not None:
            self.meter.end(list(zip(transfers, inputs, strict=True)), self.sent)
        if verdicts:
            self._pending.append(_Pending(verdicts[0], shards, counters, counts))

    def _verdict_on_device(self, shards: Sequence[Shard], group: Group) -> list[FoundInf]:
        """What decides on the device whether the step goes on, if nothing else of the step waits for the device."""
        devices = {shard.flat_buffer.device for shard in shards}
        if len(devices) != 1 or not all(map(waits_for_nothing, shards)) or not found_inf.is_meant_for(*devices):
            return []
        key = tuple(map(id, shards))
        if key not in self._verdicts:
            self._verdicts[key] = FoundInf(group, *devices)
        return [self._verdicts[key]]


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


def _inputs(shard: Shard, groups: Groups) -> Inputs:
    """What the call brings for a shard.

    Raises:
        RuntimeError: a gradient cannot be used, or a tensor has been given another shape, device or dtype since the
            plan was made; or a setting that shapes the state was changed.
    """
    inputs = Inputs(settings=_settings(shard, groups))
    for index, tensor in enumerate(shard.storage.tensors):
        gradient = shard.storage.gradient(index) if id(tensor) in groups else None
        if gradient is None:
            inputs.add(None, None)
        else:
            weight = shard.storage.values(index)
            _check_tensor(shard, index, weight, gradient)
            inputs.add(weight, gradient)
    return inputs


def _check_tensor(shard: Shard, index: int, weight: Tensor, gradient: Tensor) -> None:
    before = shard.stored[index]
    if gradient.layout != torch.strided or gradient.is_complex():
        kind = "complex" if gradient.is_complex() else "sparse"
        problem = f"has a {kind} gradient, which AdaFisher does not support. For embeddings, use sparse=False."
    elif (weight.shape, weight.device, weight.dtype) != before:
        problem = (
            f"was {tuple(before.shape)}, {before.dtype}, on {before.device} when its state was made, and is"
            f" {tuple(weight.shape)}, {weight.dtype}, on {weight.device} now. Move or replace parameters before the"
            " first step; or reset_state(), or save and load the state_dict."
        )
    elif gradient.shape != weight.shape:
        problem = f"has a gradient of shape {tuple(gradient.shape)}, but is {tuple(weight.shape)}."
    else:
        return
    name = next(p.name for p in shard.storage.parameters if p.tensor == index)
    raise RuntimeError(f"The parameter {name} {problem}")


def _active(shard: Shard, inputs: Inputs) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """For each parameter, whether it has a gradient."""
    tensors = [parameter.tensor for parameter in shard.storage.parameters]
    return np.array([gradient is not None for gradient in inputs.gradients], dtype=bool)[tensors]


def _step(shards: Sequence[Shard], inputs: Sequence[Inputs]) -> int:
    """The step t that is about to be taken, of the parameter that has taken most; 0 where none has a gradient."""
    counts = [shard.counters.numpy()[_active(shard, own), 0] for shard, own in zip(shards, inputs, strict=True)]
    return 1 + max((int(steps.max()) for steps in counts if steps.size), default=-1)


def _advance(shard: Shard, inputs: Inputs, times: list[Time]) -> None:
    """Count the step of the active tensors' parameters; appends each one's t and k to `times`, or None."""
    tensors = [parameter.tensor for parameter in shard.storage.parameters]
    active = _active(shard, inputs)
    every = np.array([settings.get("fisher_update_freq", 1) for settings in inputs.settings])
    counts = shard.counters.numpy()
    counts[:, 0] += active
    counts[:, 1] += active & ((counts[:, 0] - 1) % every[np.array(shard.groups)[tensors]] == 0)
    times += [(t, k) if having else None for (t, k), having in zip(counts.tolist(), active.tolist(), strict=True)]
