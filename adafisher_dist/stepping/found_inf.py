"""What ranks must know of each other in a step, exchanged on the device; hosts read it later.

A host that looked at the gradients would wait for the device, and one that asked the other hosts
would wait for them; the device would then wait for the host to queue new work. So the arithmetic is
gated by a number on the device, and changes nothing where a gradient of any rank cannot be used,
where a rank has failed, or where the ranks differ in what they are about to do. The host, which has
counted the step, learns of it at the next call (`Stepper.resolve_pending`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from adafisher_dist.comm import collectives
from adafisher_dist.comm.collectives import Group
from adafisher_dist.comm.deferred_errors import DeferredErrors
from adafisher_dist.state.shard import Shard
from adafisher_dist.stepping.consistency import Alike, failed, fingerprint


def is_meant_for(device: torch.device) -> bool:
    """Whether a host would have to wait for this device."""
    return device.type != "cpu"


class Verdict(NamedTuple):
    """What all ranks together know of a step.

    Attributes:
        usable: every gradient could be used.
        before: 0, or −1 − a rank that had failed before anything changed.
        alike: all ranks were about to do the same.
        amid: 0, or −1 − a rank that failed in the middle of the step.
    """

    usable: bool
    before: int
    alike: bool
    amid: int

    @property
    def took_place(self) -> bool:
        """Whether the step changed anything."""
        return self.usable and self.alike and not self.before

    @property
    def is_fault(self) -> bool:
        """Whether the ranks have to stop."""
        return not self.alike or self.before < 0 or self.amid < 0


class FoundInf:
    """Decides for one step at a time, on a group's ranks; reused, so that no step allocates it."""

    def __init__(self, group: Group, device: torch.device, parts: Sequence[Group] = ()) -> None:
        self._group = group
        # Of each the minimum over the ranks: 0 or −1 if a gradient cannot be used; 0 or −1 − the
        # rank that failed; fingerprint; its negative; 0, or less if the ranks of a part differ.
        # Their sum is 0 if all is well, and else less.
        self._votes = group.comm_buffer(torch.zeros(5, dtype=torch.int64, device=device))
        # Of each part: fingerprint, and its negative.
        self._parts = {part: part.comm_buffer(torch.zeros(2, dtype=torch.int64, device=device)) for part in parts}
        self._amid = group.comm_buffer(torch.zeros(1, dtype=torch.int64, device=device))
        self._should_step = torch.ones(1, dtype=torch.int32, device=device)
        on_accelerator = device.type != "cpu"
        self._seen = torch.zeros(6, dtype=torch.int64, device="cpu", pin_memory=on_accelerator)
        # Made here, since a rank that failed after the last collective of a step would stop alone.
        self._seen_votes, self._seen_amid = self._seen[:5], self._seen[5:]
        self._arrivals = [torch.Event(device) for _ in range(2)] if on_accelerator else []

    def is_for(self, group: Group, device: torch.device, parts: Sequence[Group]) -> bool:
        """Whether it is of these ranks, parts of them, and of this kind of device."""
        return self._group == group and self._should_step.device == device and list(self._parts) == list(parts)

    def decide(self, largest: Sequence[tuple[Tensor, float]], alike: Alike, errors: DeferredErrors) -> Tensor:
        """Tell all ranks whether the step may take place. A collective; no host waits for it.

        Args:
            largest: the largest absolute gradient elements of this rank, 0-d, and how large each
                may be.
            alike: what must be the same on all ranks, and on those of each part.
            errors: of this rank.

        Returns:
            0-d int32 on the device: 0 if the step is to change nothing.
        """
        votes = self._votes.tensor

        def look() -> None:
            votes[:1].zero_()
            if largest:
                unusable = torch.stack([element <= limit for element, limit in largest]).logical_not_()
                votes[:1].sub_(unusable.any().to(torch.int64))

        errors.attempt(look)
        own = fingerprint(alike.everywhere)
        for index, value in enumerate((failed(errors), own, -own, 0), start=1):
            votes[index].fill_(value)
        for part, prints in alike.parts:
            buffer, own = self._parts[part], fingerprint(prints)
            for index, value in enumerate((own, -own)):
                buffer.tensor[index].fill_(value)
            collectives.minimum_on_device(part, buffer)
            votes[4:].add_(buffer.tensor.sum())
        collectives.minimum_on_device(self._group, self._votes)
        self._should_step.copy_(votes.sum() == 0)
        self._notice(self._seen_votes, votes, 0)
        return self._should_step.squeeze(0)

    def settle(self, errors: DeferredErrors) -> None:
        """Tell all ranks whether this one has done its part. A collective, as `decide`."""
        self._amid.tensor.fill_(failed(errors))
        collectives.minimum_on_device(self._group, self._amid)
        self._notice(self._seen_amid, self._amid.tensor, 1)

    def _notice(self, seen: Tensor, of_device: Tensor, number: int) -> None:
        seen.copy_(of_device, non_blocking=True)
        if self._arrivals:
            self._arrivals[number].record(torch.accelerator.current_stream(of_device.device))

    def read(self, settled: bool = True) -> Verdict:
        """What came out of the last step; waits until the device has come to it.

        Args:
            settled: whether it has been settled too.
        """
        if self._arrivals:
            self._arrivals[int(settled)].synchronize()
        usable, before, low, minus_high, parts, amid = self._seen.numpy().tolist()  # no operation of torch: on the host
        return Verdict(usable == 0, before, low == -minus_high and parts == 0, amid if settled else 0)


@dataclass(frozen=True, slots=True, eq=False)
class Pending:
    """A step whose outcome the host does not know yet.

    Attributes:
        found_inf: what knows it.
        shards: that took part.
        counters: theirs before the step; none where nothing was counted.
        part: the number of this part of a wrapper's step: only the first counts as a skipped step.
        alike: what was to be the same on the ranks.
        error: of this rank.
    """

    found_inf: FoundInf
    shards: list[Shard]
    counters: list[Tensor]
    part: int
    alike: Alike
    error: Exception | None
