"""What the ranks agree on, before any of them changes state and at the end of the step.

Each agreement is one small all-reduce. A rank that raised alone would leave the others waiting in
the next collective; so an error of one rank, like a gradient that is not finite, first becomes
known to all.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from adafisher_dist.blocks import sharding
from adafisher_dist.comm import collectives
from adafisher_dist.comm.collectives import Group
from adafisher_dist.comm.deferred_errors import DeferredErrors
from adafisher_dist.comm.host_groups import STEP
from adafisher_dist.state.shard import Shard
from adafisher_dist.stepping.inputs import Inputs
from adafisher_dist.version import __version__

logger = logging.getLogger("adafisher_dist")

# Elements whose bits are added up at a time: torch makes int64 copies of them for it.
SUMMED_AT_ONCE = 2**24

Fingerprints = Sequence[tuple[int, str]]
"""What must be the same on all ranks, and what to say if it is not."""


@dataclass(frozen=True, slots=True)
class Alike:
    """What must be the same before a step.

    Attributes:
        everywhere: on all ranks that take it.
        parts: on the ranks of each group that has parameters of its own, as of experts.
    """

    everywhere: Fingerprints = ()
    parts: Sequence[tuple[Group, Fingerprints]] = ()


def parts_of(shards: Sequence[Shard], ranks: Group) -> list[Group]:
    """The groups that hold some of the parameters, where the other ranks hold others instead."""
    groups = dict.fromkeys(shard.storage.group for shard in shards)
    return [
        group
        for group in groups
        if group.total_size < ranks.total_size or (group.replicas is not None and group != ranks)
    ]


def check_consistency(
    group: Group, shards: Sequence[Shard], inputs: Sequence[Inputs], finite: bool, alike: Alike,
    errors: DeferredErrors, compare_copies: bool,
) -> bool:  # fmt: skip
    """Whether all ranks' gradients are finite and small enough to square, as far as hosts know.

    Args:
        group: the ranks.
        shards: those that take part in the step.
        inputs: for each shard; after an error some may be missing.
        finite: whether that is so of this rank's gradients.
        alike: fingerprints of this rank; see `fingerprints_of`.
        errors: what went wrong on this rank while its gradients were collected.
        compare_copies: whether parameters and gradients are compared bit by bit where ranks hold
            the same ones, as they always are in the first step of a shard. Alike on all ranks.

    Raises:
        RuntimeError: on all ranks alike: the ranks differ in plan, gradients, parameters or
            settings, or one failed. Or some did not come within the timeout of the process group;
            it names them.
        Exception: the error itself, on the rank that had it.
    """
    values = [int(finite), failed(errors)]
    if group.total_size == 1:
        stop(errors.error, values[1], "")
    else:
        prints = [*alike.everywhere, *_of_copies(group, shards, inputs, errors, compare_copies)]
        same_replicas = _same_in_replicas(group, shards, inputs, errors, compare_copies) if group.replicas else 1
        values = [int(finite), failed(errors), same_replicas, *_with_negatives(prints)]
        # On the CPU on every rank, whatever went wrong on this one: ranks that chose different
        # devices would all wait.
        values = collectives.minimum(group, values)
        stop(errors.error, values[1], "before anything changed")
        difference = _first_difference(values[3:], prints)
        if difference is not None:
            raise RuntimeError(difference)
        if not values[2]:
            raise RuntimeError(_REPLICAS_DIFFER)
        if alike.parts:
            _check_parts(group, shards, inputs, alike.parts, compare_copies)
    for shard in shards:
        shard.checked = True
    return bool(values[0])


def _check_parts(
    group: Group, shards: Sequence[Shard], inputs: Sequence[Inputs], parts: Sequence[tuple[Group, Fingerprints]],
    compare_copies: bool,
) -> None:  # fmt: skip
    """The same of each group that has parameters of its own; `group`: all ranks, which may stop."""
    errors = DeferredErrors()
    for part, fingerprints in parts:
        prints = [*fingerprints, *_of_copies(part, shards, inputs, errors, compare_copies)]
        alike = _same_in_replicas(part, shards, inputs, errors, compare_copies) if part.replicas else 1
        lowest = collectives.minimum(part, [alike, *_with_negatives(prints)])
        difference = _first_difference(lowest[1:], prints) or (None if lowest[0] else _REPLICAS_DIFFER)
        if difference is not None and errors.none:
            errors.error = RuntimeError(difference)
    raise_if_any_failed(group, errors, "before anything changed")


def _with_negatives(prints: Fingerprints) -> list[int]:
    return list(chain.from_iterable((print_, -print_) for print_, _ in prints))


def _first_difference(lowest: Sequence[int], prints: Fingerprints) -> str | None:
    """What to say of the first fingerprint that differs, by the minimum of `_with_negatives`."""
    pairs = zip(lowest[::2], lowest[1::2], prints, strict=True)
    return next((message for low, minus_high, (_, message) in pairs if low != -minus_high), None)


def difference(group: Group, alike: Alike) -> str:
    """In what the ranks differ, which they know that they do. A collective of the hosts."""
    found = None
    for ranks, prints in ((group, alike.everywhere), *alike.parts):
        lowest = collectives.minimum(ranks, _with_negatives(prints))
        found = found or _first_difference(lowest, prints)
    return found or "The ranks were about to take different steps of AdaFisher."


def fingerprint(prints: Fingerprints) -> int:
    """All of them as one."""
    return sharding.digest([print_ for print_, _ in prints])


_SYNCHRONISE = (
    " Leave gradient synchronisation on in the last backward before step(): under DDP no no_sync(), and no local SGD."
    " Where some parameters take no part in a loss, DDP averages others neither without find_unused_parameters=True."
)

_REPLICAS_DIFFER = "The replicas of an HSDP mesh hold different parameters or gradients." + _SYNCHRONISE


def fingerprints_of(shards: Sequence[Shard], inputs: Sequence[Inputs]) -> Fingerprints:
    """What must be the same on ranks that share these shards.

    Args:
        shards: those of them that take part in the step.
        inputs: for each shard.
    """
    active = [bytes(gradient is not None for gradient in own.gradients) for own in inputs]
    which = [(s.storage.group.size, [p.info.position for p in s.storage.parameters[:1]]) for s in shards]
    return [
        (
            sharding.digest(which, active),
            "The ranks differ in which parameters have a gradient. Under DDP use find_unused_parameters=True, or give"
            " the same parameters a gradient on every rank.",
        ),
        (
            sharding.digest(
                [
                    (__version__, shard.digest(), [p.name for p in shard.storage.parameters])
                    for shard in shards
                    if not shard.checked
                ]
            ),
            "The ranks planned different blocks: their parameters' shapes, order, or block settings differ (or one of"
            " them has begun anew, by reset_state() or load_state_dict()). Build, reset and load the same model and"
            f" optimizer on every rank. Or they run different versions of adafisher_dist, this one {__version__}:"
            " install the same everywhere. Ranks that are to hold different parameters (stages of a pipeline, say) need"
            " a process_group each, of the ranks that hold the same; inside ZeroRedundancyOptimizer, which shards by"
            " itself, use AdaFisher alone instead.",
        ),
        (
            sharding.digest([shard.counters.numpy().tobytes() for shard in shards]),
            "The ranks have taken different numbers of steps. Load the optimizer's state on every rank, not on one"
            " alone, and reset it on all.",
        ),
        (
            sharding.digest([own.settings for own in inputs]),
            "The ranks' param groups have different settings (lr, momentum, damping, …). Change them alike on every"
            " rank; a scheduler that follows a metric, as ReduceLROnPlateau, needs the same metric on all.",
        ),
    ]


def fingerprints_of_call(
    parts: Sequence[Group], changed: bool, calls: int, on_device: bool, metrics: object
) -> Fingerprints:
    """What must be the same on all ranks, whatever parameters each has.

    Args:
        parts: the groups with parameters of their own that this rank is in.
        changed: whether, where devices decide, other shards take part than in the call before: then
            hosts have to ask each other, all or none.
        calls: of step() that a wrapper makes in this step.
        on_device: whether gradients are looked at on the device.
        metrics: which steps are measured, and which is being; None where none is.
    """
    return [
        (
            calls,
            "The ranks have different numbers of param groups, as stages of a pipeline do of which one lacks the"
            " parameters of a group: use one param group, or give each stage parameters of all.",
        ),
        (
            sharding.digest([part.size for part in parts], changed),
            "The ranks differ in which parameters have a gradient, or, where they hold different ones (experts, stages,"
            " tensor-parallel parts), in the step in which some first have one. Give parameters their first gradient in"
            " the same step on all ranks.",
        ),
        (
            int(on_device),
            "Some ranks keep AdaFisher's state on a GPU and others on the CPU. Use one kind of device on all.",
        ),
        (
            sharding.digest(metrics),
            "Some ranks report AdaFisher's metrics and others do not, or of other steps. Call"
            " optimizer.report_metrics(callback, every) alike on all of them; only the first one calls back.",
        ),
    ]


def _of_copies(
    ranks: Group, shards: Sequence[Shard], inputs: Sequence[Inputs], errors: DeferredErrors, everything: bool
) -> list[tuple[int, str]]:
    """The same of parameters and gradients replicated on these ranks, bit by bit.

    Of new shards, or of all.
    """
    chosen = [
        own
        for shard, own in zip(shards, inputs, strict=False)
        if shard.storage.replicated
        and shard.storage.group.size > 1
        and (
            shard.storage.group.members == ranks.members
            or (ranks.replicas is not None and shard.storage.group.total_size == ranks.total_size)
        )
        and (everything or not shard.checked)
    ]
    sums = _checksums(chosen, errors)
    return [
        (
            sums[0],
            "The ranks hold different parameters, though AdaFisher was told that they are replicated. Synchronise them"
            " before the first step (DDP and DeepSpeed do), or pass the process group whose ranks share the parameters"
            " as process_group (independent replicas: a group of one rank). Inside ZeroRedundancyOptimizer, which"
            " shards by itself, use AdaFisher alone instead.",
        ),
        (
            sums[1],
            "The ranks hold different gradients, though AdaFisher was told that they are averaged. Wrap the model in"
            " DDP, or all-reduce the gradients before step() (independent replicas: pass a process_group of one rank)."
            + _SYNCHRONISE,
        ),
    ]


def _same_in_replicas(
    group: Group, shards: Sequence[Shard], inputs: Sequence[Inputs], errors: DeferredErrors, compare: bool
) -> int:
    """Whether this rank's replicas hold the same parts of parameters and gradients, bit by bit.

    A collective whether or not they are compared, so that ranks which differ on that do not hang.
    """
    assert group.replicas is not None
    pairs_of = zip(shards, inputs, strict=False)
    sharded = [own for shard, own in pairs_of if compare and shard.storage.group.members == group.members]
    sums = _checksums(sharded, errors)
    low = collectives.minimum(group.replicas, list(chain.from_iterable((value, -value) for value in sums)))
    return int(low[0] == -low[1] and low[2] == -low[3])


def raise_if_any_failed(
    group: Group, errors: DeferredErrors, when: str = "in the middle of a step", purpose: str = STEP
) -> None:
    """Let all ranks know whether each of them did its own work.

    Raises:
        RuntimeError: on all ranks alike: one of them failed, so what they did together is
            incomplete. Or some did not come to `purpose` within the timeout of the process group.
        Exception: the error itself, on the rank that had it.
    """
    failure = failed(errors)
    if group.total_size > 1:
        (failure,) = collectives.minimum(group, [failure], purpose)
    stop(errors.error, failure, when)


def failed(errors: DeferredErrors) -> int:
    """0, or a negative number that tells which rank failed."""
    return 0 if errors.error is None else -1 - collectives.own_rank()


def stop(error: Exception | None, failure: int, when: str) -> None:
    """Raise this rank's error, or tell of another's; nothing where no rank failed.

    Raises:
        RuntimeError: names the rank that failed.
        Exception: `error`.
    """
    if error is not None:
        raise error
    if failure:
        raise RuntimeError(
            f"AdaFisher stops on all ranks, since rank {-1 - failure} failed {when}; its error tells why."
        )


def _checksums(chosen: Sequence[Inputs], errors: DeferredErrors) -> list[int]:
    """Of the parameters that have a gradient, and of those gradients; zeros after an error."""
    sums = [0, 0]

    def add_up() -> None:
        weights = [weight for own in chosen for weight in own.weights if weight is not None]
        gradients = [gradient for own in chosen for gradient in own.gradients if gradient is not None]
        sums[:] = _checksum(weights), _checksum(gradients)

    errors.attempt(add_up)
    return sums


def _checksum(tensors: Sequence[Tensor]) -> int:
    """The sum of all bit patterns, each tensor's times its own odd number, modulo 2^62."""
    sums = [_sum_of_bits(tensor) for tensor in tensors]
    by_device: dict[torch.device, list[int]] = {}
    for index, value in enumerate(sums):
        by_device.setdefault(value.device, []).append(index)
    total = 0
    for indices in by_device.values():  # one transfer a device
        read = torch.stack([sums[index] for index in indices]).tolist()
        total += sum(value * (2 * index + 1) for index, value in zip(indices, read, strict=True))
    return int(total % (1 << 62))


def _sum_of_bits(tensor: Tensor) -> Tensor:
    kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    flat = tensor.contiguous().view(-1).view(kind)
    if flat.numel() <= SUMMED_AT_ONCE:
        return flat.sum(dtype=torch.int64)
    return torch.stack([part.sum(dtype=torch.int64) for part in torch.split(flat, SUMMED_AT_ONCE)]).sum()
