"""The host's time of a step, by lines through what was measured.

The numbers are those of docs/host_time.json, which benchmarks/host_time.py writes and a test
compares: of one core of the processor that it names.
"""

from __future__ import annotations

# By case of the benchmark: milliseconds of a step, and microseconds for each parameter, or run of
# one, that the rank stores.
LINES = {
    "one process": (0.2012, 20.42),
    "DDP": (2.974, 21.09),
    "FSDP2": (4.106, 38.45),
    "ZeRO-1": (2.212, 11.72),
    "ZeRO-2": (2.397, 4.417),
    "ZeRO-3": (2.727, 11.25),
}
US_A_CHUNK = 53.12  # measured under DDP

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
