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
    settings: Sequence[Sequence[Mapping[str, Any]]], faults: Faults,
) -> bool:  # fmt: skip
    """Whether the step may go on: every gradient of every rank is finite and small enough to square.

    Args:
        group: the ranks.
        shards: those that take part in the step.
        active: for each shard and stored tensor, whether it has a gradient.
        largest: for each shard, the largest absolute gradient element on this rank, 0-d.
        settings: for each shard and param group, its settings; empty where the group has no gradient.
        faults: what went wrong on this rank while its gradients were collected.

    Raises:
        RuntimeError: on all ranks alike: the ranks differ in plan, gradients, parameters or settings, or one failed.
        Exception: the fault itself, on the rank that had it.
    """
    sums = [0, 0]

    def compare() -> None:
        sums[:] = _checksums(shards, active)

    if group.together > 1:
        faults.attempt(compare)
    finite = all(bool(norm <= _limit(shard)) for norm, shard in zip(largest, shards, strict=False))  # NaN is not
    values = [int(finite), _failed(faults.error)]
    if group.together > 1:
        fingerprints = [
            plan.digest([shard.storage.group.size for shard in shards], active),
            plan.digest([shard.digest() for shard in shards if not shard.checked]),
            *sums,
            plan.digest([_values(group) for groups in settings for group in groups]),
        ]
        values += chain.from_iterable((value, -value) for value in fingerprints)
        # On the CPU on every rank, whatever went wrong on this one: ranks that chose different backends would all wait.
        values = comm.minimum(group, torch.tensor(values)).tolist()
    finite_everywhere, failure, *agreed = values
    _raise(faults.error, failure, "before anything changed")
    same = [low == -high for low, high in zip(agreed[::2], agreed[1::2], strict=True)]
    for equal, message in zip(same, _DIFFERENCES, strict=False):
        if not equal:
            raise RuntimeError(message)
    for shard in shards:
        shard.checked = True
    return bool(finite_everywhere)


def settle(group: Group, error: Exception | None) -> None:
    """Let all ranks know whether each of them did its own work.

    Raises:
        RuntimeError: on all ranks alike: one of them failed, so the step is incomplete.
        Exception: `error` itself, on the rank that passed it.
    """
    failure = _failed(error)
    if group.together > 1:
        failure = int(comm.minimum(group, torch.tensor([failure])).item())
    _raise(error, failure, "in the middle of a step")


def _failed(error: Exception | None) -> int:
    """0, or a negative number that tells which rank failed."""
    return 0 if error is None else -1 - comm.own_rank()


def _raise(error: Exception | None, failure: int, when: str) -> None:
    if error is not None:
        raise error
    if failure:
        raise RuntimeError(
            f"AdaFisher stops on all ranks, since rank {-1 - failure} failed {when}; its error tells why."
        )


_DIFFERENCES = (
    "The ranks differ in which parameters have a gradient. Under DDP use find_unused_parameters=True, or give the same"
    " parameters a gradient on every rank.",
    "The ranks planned different blocks: their parameters' shapes, order, or block settings differ. Build the same"
    " model and optimizer on every rank.",
    "The ranks hold different parameters, though AdaFisher was told that they are replicated. Synchronise them before"
    " the first step (DDP and DeepSpeed do), or pass the process group whose ranks share the parameters as"
    " process_group (independent replicas: a group of one rank).",
    "The ranks hold different gradients, though AdaFisher was told that they are averaged. Wrap the model in DDP, or"
    " all-reduce the gradients before step() (independent replicas: pass a process_group of one rank).",
    "The ranks' param groups have different settings (lr, momentum, damping, …). Change them alike on every rank; a"
    " scheduler that follows a metric, as ReduceLROnPlateau, needs the same metric on all.",
)


def _values(group: Mapping[str, Any]) -> list[tuple[str, object]]:
    """A param group's settings, in a form whose repr is exact."""
    return [(name, float(value) if name == "lr" else value) for name, value in group.items() if name in DEFAULTS]


def _limit(shard: Shard) -> float:
    return min(fisher.largest_gradient(s.compute_dtype, s.block_size) for s in shard.structures)


def _checksums(shards: Sequence[Shard], active: Sequence[Sequence[bool]]) -> tuple[int, int]:
    """Of the replicated parameters, and of their gradients, in shards that the ranks have not compared yet."""
    weights: list[Tensor] = []
    gradients: list[Tensor] = []
    for shard, has_gradient in zip(shards, active, strict=True):
        if shard.storage.replicated and shard.storage.group.size > 1 and not shard.checked:
            for tensor, takes_part in zip(shard.storage.tensors, has_gradient, strict=True):
                if takes_part and tensor.grad is not None:
                    weights.append(tensor.detach())
                    gradients.append(tensor.grad)
    return _checksum(weights), _checksum(gradients)


def _checksum(tensors: Sequence[Tensor]) -> int:
    """The sum of all bit patterns, each tensor's times its own odd number, modulo 2^62."""
    if not tensors:
        return 0
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    sums = [tensor.contiguous().view(-1).view(bits[tensor.element_size()]).sum(dtype=torch.int64) for tensor in tensors]
    total = sum(value * (2 * index + 1) for index, value in enumerate(torch.stack(sums).tolist()))
    return int(total % (1 << 62))
