"""What the ranks agree on, in one small all-reduce before any of them changes state and one at the end of the step.

A rank that raised alone would leave the others waiting in the next collective; so an error of one rank, like a gradient
that is not finite, first becomes known to all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from adafisher_dist import comm, fisher, plan
from adafisher_dist.comm import Group
from adafisher_dist.faults import Faults
from adafisher_dist.settings import DEFAULTS
from adafisher_dist.shard import Shard


def agree(
    group: Group, shards: Sequence[Shard], active: Sequence[Sequence[bool]], largest: Sequence[Tensor],
    settings: Sequence[Sequence[Mapping[str, Any]]], faults: Faults, compare_copies: bool,
) -> bool:  # fmt: skip
    """Whether the step may go on: every gradient of every rank is finite and small enough to square.

    Args:
        group: the ranks.
        shards: those that take part in the step.
        active: for each shard and stored tensor, whether it has a gradient.
        largest: for each shard, the largest absolute gradient element on this rank, 0-d.
        settings: for each shard and param group, its settings; empty where the group has no gradient.
        faults: what went wrong on this rank while its gradients were collected.
        compare_copies: whether parameters and gradients are compared bit by bit where ranks hold the same ones, as
            they always are in the first step of a shard. Alike on all ranks.

    Raises:
        RuntimeError: on all ranks alike: the ranks differ in plan, gradients, parameters or settings, or one failed.
        Exception: the fault itself, on the rank that had it.
    """
    finite = all(bool(norm <= _limit(shard)) for norm, shard in zip(largest, shards, strict=False))  # NaN is not
    values = [int(finite), _failed(faults)]
    if group.together == 1:
        _raise(faults, values[1], "")
    else:
        prints = [*_fingerprints(shards, active, settings), *_of_copies(shards, active, faults, compare_copies)]
        same_replicas = _same_in_replicas(group, shards, active, faults, compare_copies) if group.replicas else 1
        values = [int(finite), _failed(faults), same_replicas]
        values += chain.from_iterable((print_, -print_) for print_, _ in prints)
        # On the CPU on every rank, whatever went wrong on this one: ranks that chose different backends would all wait.
        values = comm.minimum(group, torch.tensor(values)).tolist()
        _raise(faults, values[1], "before anything changed")
        for low, minus_high, (_, message) in zip(values[3::2], values[4::2], prints, strict=True):
            if low != -minus_high:
                raise RuntimeError(message)
        if not values[2]:
            raise RuntimeError("The replicas of an HSDP mesh hold different parameters or gradients." + _SYNCHRONISE)
    for shard in shards:
        shard.checked = True
    return bool(values[0])


_SYNCHRONISE = (
    " Leave gradient synchronisation on in the last backward before step(): under DDP no no_sync(), and no local SGD."
)


def _fingerprints(
    shards: Sequence[Shard], active: Sequence[Sequence[bool]], settings: Sequence[Sequence[Mapping[str, Any]]]
) -> list[tuple[int, str]]:
    """What must be the same on all ranks, and what to say if it is not."""
    return [
        (
            plan.digest([shard.storage.group.size for shard in shards], active),
            "The ranks differ in which parameters have a gradient. Under DDP use find_unused_parameters=True, or give"
            " the same parameters a gradient on every rank.",
        ),
        (
            plan.digest([shard.digest() for shard in shards if not shard.checked]),
            "The ranks planned different blocks: their parameters' shapes, order, or block settings differ (or one of"
            " them has begun anew, by reset_state() or load_state_dict()). Build, reset and load the same model and"
            " optimizer on every rank.",
        ),
        (
            plan.digest([shard.counters.tolist() for shard in shards]),
            "The ranks have taken different numbers of steps. Load the optimizer's state on every rank, not on one"
            " alone, and reset it on all.",
        ),
        (
            plan.digest([_values(group) for groups in settings for group in groups]),
            "The ranks' param groups have different settings (lr, momentum, damping, …). Change them alike on every"
            " rank; a scheduler that follows a metric, as ReduceLROnPlateau, needs the same metric on all.",
        ),
    ]


def _of_copies(
    shards: Sequence[Shard], active: Sequence[Sequence[bool]], faults: Faults, everything: bool
) -> list[tuple[int, str]]:
    """The same of the replicated parameters and of their gradients, bit by bit: of new shards, or of all."""
    chosen = [
        (shard, having)
        for shard, having in zip(shards, active, strict=True)
        if shard.storage.replicated and shard.storage.group.size > 1 and (everything or not shard.checked)
    ]
    sums = _checksums(chosen, faults)
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
    group: Group, shards: Sequence[Shard], active: Sequence[Sequence[bool]], faults: Faults, compare: bool
) -> int:
    """Whether the replicas of this rank hold the same parts of parameters and gradients, bit by bit.

    A collective whether they are compared or not, so that ranks which are not of one mind on that do not hang.
    """
    assert group.replicas is not None
    sharded = [pair for pair in zip(shards, active, strict=True) if compare and not pair[0].storage.replicated]
    sums = _checksums(sharded, faults)
    pairs = torch.tensor(list(chain.from_iterable((value, -value) for value in sums)))
    low = comm.minimum(group.replicas, pairs).tolist()
    return int(low[0] == -low[1] and low[2] == -low[3])


def settle(group: Group, faults: Faults, when: str = "in the middle of a step") -> None:
    """Let all ranks know whether each of them did its own work.

    Raises:
        RuntimeError: on all ranks alike: one of them failed, so what they did together is incomplete.
        Exception: the fault itself, on the rank that had it.
    """
    failure = _failed(faults)
    if group.together > 1:
        failure = int(comm.minimum(group, torch.tensor([failure])).item())
    _raise(faults, failure, when)


def _failed(faults: Faults) -> int:
    """0, or a negative number that tells which rank failed."""
    return 0 if faults.error is None else -1 - comm.own_rank()


def _raise(faults: Faults, failure: int, when: str) -> None:
    if faults.error is not None:
        raise faults.error
    if failure:
        raise RuntimeError(
            f"AdaFisher stops on all ranks, since rank {-1 - failure} failed {when}; its error tells why."
        )


def _values(group: Mapping[str, Any]) -> list[tuple[str, object]]:
    """A param group's settings, in a form whose repr is exact."""
    return [(name, float(value) if name == "lr" else value) for name, value in group.items() if name in DEFAULTS]


def _limit(shard: Shard) -> float:
    return min(fisher.largest_gradient(s.compute_dtype, s.block_size) for s in shard.structures)


def _checksums(chosen: Sequence[tuple[Shard, Sequence[bool]]], faults: Faults) -> list[int]:
    """Of the parameters that have a gradient, and of those gradients; zeros after a fault."""
    sums = [0, 0]

    def add_up() -> None:
        weights: list[Tensor] = []
        gradients: list[Tensor] = []
        for shard, having in chosen:
            for index in range(len(shard.storage.tensors)):
                gradient = shard.storage.gradient(index)
                if having[index] and gradient is not None:
                    weights.append(shard.storage.values(index))
                    gradients.append(gradient)
        sums[:] = _checksum(weights), _checksum(gradients)

    faults.attempt(add_up)
    return sums


def _checksum(tensors: Sequence[Tensor]) -> int:
    """The sum of all bit patterns, each tensor's times its own odd number, modulo 2^62."""
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    sums = [tensor.contiguous().view(-1).view(bits[tensor.element_size()]).sum(dtype=torch.int64) for tensor in tensors]
    by_device: dict[torch.device, list[int]] = {}
    for index, value in enumerate(sums):
        by_device.setdefault(value.device, []).append(index)
    total = 0
    for indices in by_device.values():  # one transfer a device
        read = torch.stack([sums[index] for index in indices]).tolist()
        total += sum(value * (2 * index + 1) for index, value in zip(indices, read, strict=True))
    return int(total % (1 << 62))
