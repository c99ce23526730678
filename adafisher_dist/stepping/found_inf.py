"""Whether a step may change anything, decided and kept on the device; the host reads it later.

A host that looked at the gradients would wait for the device, which would then wait for the host to
queue new work. So the arithmetic is gated by a number on the device, and changes nothing where a
gradient of any rank is not finite. The host, which has counted the step, learns of it at the next
call, and rolls its counters back (`Stepper.resolve_pending`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from adafisher_dist.comm import collectives
from adafisher_dist.comm.collectives import Group
from adafisher_dist.comm.deferred_errors import DeferredErrors


def is_meant_for(device: torch.device) -> bool:
    """Whether a host would have to wait for this device."""
    return device.type != "cpu"


class FoundInf:
    """Decides for one step at a time, on a group's ranks; reused, so that no step allocates it."""

    def __init__(self, group: Group, device: torch.device) -> None:
        self._group = group
        self._should_step = group.comm_buffer(torch.ones(1, dtype=torch.int32, device=device))
        on_accelerator = device.type != "cpu"
        self._seen = torch.ones(1, dtype=torch.int32, pin_memory=on_accelerator)
        self._arrival = torch.Event(device) if on_accelerator else None

    def is_for(self, group: Group, device: torch.device) -> bool:
        """Whether it is of these ranks and of this kind of device."""
        return self._group == group and self._should_step.tensor.device == device

    def decide(self, largest: Sequence[tuple[Tensor, float]], errors: DeferredErrors) -> Tensor:
        """Tell all ranks whether every gradient can be used. A collective; no host waits for it.

        Args:
            largest: the largest absolute gradient elements of this rank, 0-d, and how large each
                may be.
            errors: of this rank.

        Returns:
            0-d int32 on the device: 0 if the step is to change nothing.
        """
        flag = self._should_step.tensor
        errors.attempt(lambda: flag.copy_(torch.stack([element <= limit for element, limit in largest]).all()))
        collectives.minimum_on_device(self._group, self._should_step)
        self._seen.copy_(flag, non_blocking=True)
        if self._arrival is not None:
            self._arrival.record()
        return flag.squeeze(0)

    def read(self) -> bool:
        """Whether the last step counted; waits until the device has come to it."""
        if self._arrival is not None:
            self._arrival.synchronize()
        return bool(self._seen.numpy()[0])  # no operation of torch: it is on the host
