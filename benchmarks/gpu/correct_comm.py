"""Checks of all that ranks send each other, on the device and on the host."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from correct_runner import TIMEOUT, Here

from adafisher_dist.comm import collectives
from adafisher_dist.comm.collectives import CommBuffer, Group, Waits


def communication(here: Here, group: Callable[[Here], Any] = lambda here: None) -> str:
    """Every function of comm over all ranks, and also what a single rank would not send.

    Tensors are on the device and on the host, which with NCCL alone travel through the device.
    """
    real = collectives.join(group(here))
    forced = dataclasses.replace(real, size=max(2, real.size))  # past "there is nobody to tell"
    collectives.measure_waits(waits := Waits())
    try:
        lowest = collectives.minimum(forced, [5 - here.rank, here.rank])
        assert lowest == [5 - (here.world - 1), 0], lowest
        for device in {here.device, torch.device("cpu")}:
            _all_of_comm(real, forced, device, here)
    finally:
        collectives.measure_waits(None)
    seconds = waits.seconds()
    assert 0 < seconds < TIMEOUT, seconds
    again = collectives.host_group(None)
    assert again.gather(here.rank) == list(range(here.world)) and collectives.host_group(None) is again
    assert real.members == frozenset(range(here.world))
    return f"{real.devices}: waited {1e3 * seconds:.2f} ms in all"


def _all_of_comm(real: Group, forced: Group, device: torch.device, here: Here) -> None:
    ranks, own = range(here.world), float(here.rank + 1)

    def full(value: float, numel: int, dtype: torch.dtype = torch.float32) -> CommBuffer:
        comm_buffer = real.comm_buffer(torch.full((numel,), value, dtype=dtype, device=device))
        assert comm_buffer.sent.device.type in real.devices, "a wire that the backend cannot send"
        return comm_buffer

    flag = full(own, 1, torch.int32)
    collectives.minimum_on_device(forced, flag)
    assert flag.tensor.tolist() == [1], flag
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        out = full(0.0, 3 * here.world, dtype)
        collectives.all_gather(real, full(own, 4, dtype).part(1, 4), out)()
        assert out.tensor.tolist() == [rank + 1.0 for rank in ranks for _ in range(3)], (device, out.tensor)
    counts = [1 + rank for rank in ranks]  # so many to each rank
    received = full(0.0, here.world * (1 + here.rank))
    collectives.all_to_all(real, full(own, sum(counts)), counts, received, [1 + here.rank] * here.world)()
    assert received.tensor.tolist() == [rank + 1.0 for rank in ranks for _ in range(1 + here.rank)], received.tensor
    for source in {0, here.world - 1}:
        value = torch.full((2, 3), own, device=device)
        got = collectives.broadcast(forced, value, source, "a check")
        assert got.device.type == device.type and set(got.flatten().tolist()) == {source + 1.0}, got
