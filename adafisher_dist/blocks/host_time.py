"""The host's time of a step, by lines through what was measured.

The numbers are those of docs/host_time.json, which benchmarks/host_time.py writes and a test
compares: of one core of the processor that it names.
"""

from __future__ import annotations

# By case of the benchmark: milliseconds of a step, and microseconds for each parameter, or run of
# one, that the rank stores.
LINES = {
    "one process": (1.807, 18.16),
    "DDP": (1.662, 30.59),
    "FSDP2": (2.612, 37.51),
    "ZeRO-1": (3.458, 11.66),
    "ZeRO-2": (3.925, 4.655),
    "ZeRO-3": (3.72, 23.95),
}
US_A_CHUNK = 106.1  # measured under DDP

_CASES = {"ddp": "DDP", "zero0": "DDP", "zero1": "ZeRO-1", "zero2": "ZeRO-2", "zero3": "ZeRO-3", "fsdp2": "FSDP2"}


def host_ms(layout: str, world: int, pieces: int, chunks: int) -> float:
    """Milliseconds of a step, but for what the arithmetic of the blocks takes.

    Args:
        layout: one of `estimate.LAYOUTS`.
        world: ranks.
        pieces: parameters, or runs of one, that the rank stores.
        chunks: of the step.
    """
    alone = world == 1 and layout in ("ddp", "zero0")
    fixed, us_a_piece = LINES["one process" if alone else _CASES[layout]]
    return fixed + (us_a_piece * pieces + US_A_CHUNK * (chunks - 1)) / 1e3
