"""Blocks are stepped while collectives are under way, where a layout allows it.

On a GPU a collective runs on a stream of NCCL's own, and waiting for it makes the stream of the
arithmetic wait, not the host: so the order in which the host starts, computes and waits, which is
looked at here, is what can run side by side.
"""

from __future__ import annotations

from typing import Any

import pytest
from layout_runs import SETTINGS, Run
from ranks import run_ranks

from adafisher_dist.blocks import sharding
from adafisher_dist.comm import collectives
from adafisher_dist.state import shard
from adafisher_dist.stepping.updating import PiecesByGroup


def events(rank: int, world: int, layout: str, chunk: int) -> list[tuple[str, int]]:
    """Of the third step: ("start" or "wait", number of the collective), blocks and weights."""
    sharding.CHUNK_FISHER_NUMEL = chunk
    run = Run(layout, rank, world, {**SETTINGS, "inverse_update_freq": 1})
    run.train(0, 2)
    seen: list[tuple[str, int]] = []
    real_update = shard.update_blocks

    def watch(name: str) -> None:
        real = getattr(collectives, name)

        def started(*args: Any) -> Any:
            number = sum(kind == "start" for kind, _ in seen)
            seen.append(("start", number))
            wait = real(*args)

            def waited() -> None:
                seen.append(("wait", number))
                wait()

            return waited

        setattr(collectives, name, started)

    def update(*args: Any) -> None:
        seen.append(("blocks", 0))
        real_update(*args)

    def change(*args: Any) -> Any:
        seen.append(("change", 0))
        return real_change(*args)

    real_change = PiecesByGroup.change
    PiecesByGroup.change = change
    watch("all_gather")
    watch("all_to_all")
    shard.update_blocks = update
    run.train(2, 3)
    return seen


def computed_during(seen: list[tuple[str, int]], number: int) -> int:
    """How often blocks are stepped between the start of a collective and the wait for it."""
    start, wait = seen.index(("start", number)), seen.index(("wait", number))
    assert start < wait
    return seen[start:wait].count(("blocks", 0))


@pytest.mark.dist
def test_ddp_gathers_a_chunk_while_the_next_is_computed() -> None:
    by_rank = run_ranks(events, 2, "ddp", 150)
    gathers = sum(kind == "start" for kind, _ in by_rank[0])
    assert gathers == 6  # five of the first param group's parameters, one of the second's
    for number in range(4):
        for seen in by_rank:
            assert seen.index(("start", number + 1)) < seen.index(("wait", number))
        # A rank may own nothing of a chunk.
        assert any(computed_during(seen, number) for seen in by_rank)


@pytest.mark.dist
@pytest.mark.deepspeed
@pytest.mark.parametrize("layout", ["zero3", "fsdp2"])
def test_blocks_that_are_here_are_stepped_while_gradients_of_others_travel(layout: str) -> None:
    overlapped = []
    for seen in run_ranks(events, 2, layout, 100, deepspeed=layout == "zero3"):
        assert sum(kind == "start" for kind, _ in seen) % 2 == 0  # gradients there, updates back
        overlapped.append(computed_during(seen, 0))
        # Own weights of blocks that are cut change while the others' updates travel.
        start, wait = seen.index(("start", 1)), seen.index(("wait", 1))
        assert ("change", 0) in seen[start:wait]
    assert any(overlapped), "of no rank blocks were whole"
