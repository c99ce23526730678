"""The host's time of a step, by lines through what was measured.

The numbers are those of docs/host_time.json, which benchmarks/host_time.py writes and a test
compares: of one core of the processor that it names.
"""

from __future__ import annotations

# By case of the benchmark: milliseconds of a step, and microseconds for each parameter, or run of
# one, that the rank stores.
LINES = {
    "one process": (1.43, 9.212),
    "DDP": (2.242, 23.93),
    "FSDP2": (2.523, 35.31),
    "ZeRO-1": (2.201, 18.13),
    "ZeRO-2": (3.02, 5.629),
    "ZeRO-3": (2.842, 16.04),
}
US_A_SLICE = 12.28  # that is gathered, or chunk; measured under DDP
US_A_PART = 2.1  # of a rank, in a slice

_CASES = {"ddp": "DDP", "zero0": "DDP", "zero1": "ZeRO-1", "zero2": "ZeRO-2", "zero3": "ZeRO-3", "fsdp2": "FSDP2"}


def host_ms(layout: str, world: int, pieces: int, slices: int) -> float:
    """Milliseconds of a step, but for what the arithmetic of the blocks takes.

    Args:
        layout: one of `estimate.LAYOUTS`.
        world: ranks.
        pieces: parameters, or runs of one, that the rank stores.
        slices: chunks of the step; where weights are gathered, the slices that they come in.
    """
    replicated = layout in ("ddp", "zero0")
    fixed, us_a_piece = LINES["one process" if replicated and world == 1 else _CASES[layout]]
    parts = slices * world if replicated else 0
    return fixed + (us_a_piece * pieces + US_A_SLICE * (slices - 1) + US_A_PART * parts) / 1e3
