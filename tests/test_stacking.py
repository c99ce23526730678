"""How elements get from stored tensors to the blocks of a chunk, and back."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from adafisher_dist.blocks import placement, sharding
from adafisher_dist.blocks.grid import grid_of
from adafisher_dist.layouts.storage import Parameter, ParameterInfo
from adafisher_dist.settings import DEFAULTS, normalized, state_config
from adafisher_dist.state.stacking import Chunk, Stacks, stack_blocks

_LAYER = [(12, 8), (8, 8), (16, 8), (8, 16), (8,)]


def _stacks(shapes: list[tuple[int, ...]], rank: int, world: int) -> tuple[Stacks, Tensor, list[int]]:
    """Of flat partitions that hold 0, 1, 2, …; also the elements that this rank stores and owns."""
    config = state_config(normalized({**DEFAULTS, "block_size": 8, "rows_per_block": 4}))
    numels = [int(np.prod(shape)) for shape in shapes]
    offsets = [sum(numels[:number]) for number in range(len(numels))]
    length = -(-sum(numels) // world)
    stored = placement.in_partitions(offsets, numels, length, world)
    grids = [grid_of(shape, config) for shape in shapes]
    assignment = sharding.assign(grids, stored, False)
    partition = torch.arange(rank * length, (rank + 1) * length, dtype=torch.float32)
    parameters = [Parameter(ParameterInfo(str(n), n, 0), shape, 0) for n, shape in enumerate(shapes)]
    chunks = [by_rank[rank] for by_rank in assignment.chunks]
    stacks = stack_blocks(chunks, stored[rank], grids, parameters, [0], [config], [partition], True)
    whole = []  # numbers of elements of which this rank owns and stores all of the row group
    for span in assignment.owned[rank]:
        for part, place in sharding.split_where_cut(
            span, sharding.by_parameter(stored[rank])[span.parameter], grids[span.parameter]
        ):
            if place is not None:
                whole += [offsets[span.parameter] + n for n in range(part.start, part.stop)]
    return stacks, partition, whole


def _views(chunk: Chunk) -> Iterator[Tensor]:
    for rows in chunk:
        yield from (run.in_work for run in rows.stored)
        yield from rows.staged


@pytest.mark.parametrize("world", [1, 2, 3, 5])
@pytest.mark.parametrize("order", ["layers", "alternating", "shuffled"])
def test_every_element_has_one_place(order: str, world: int) -> None:
    shapes: list[tuple[int, ...]] = _LAYER * 6
    if order == "alternating":  # of one form, at distances that alternate
        shapes = [(8, 8), (3,), (8, 8), (8, 8), (2, 8)] * 6
    elif order == "shuffled":
        shapes = [shapes[n] for n in np.random.default_rng(0).permutation(len(shapes))]
    for rank in range(world):
        stacks, partition, whole = _stacks(shapes, rank, world)
        read = []
        for chunk in stacks.chunks:
            for rows in chunk:
                for run in rows.stored:
                    run.in_work.copy_(run.of(partition))
                    read += run.in_work.flatten().tolist()
            covered = [rows.gradient_NRB.new_zeros(rows.gradient_NRB.shape) for rows in chunk]
            for rows, count in zip(chunk, covered, strict=True):
                rows.gradient_NRB.zero_()
                for view in (*(run.in_work for run in rows.stored), *rows.staged):
                    view.add_(1)
                count.copy_(rows.gradient_NRB)
                assert (count == 1).all()
        assert sorted(read) == sorted(whole)


def test_rows_of_a_block_are_rows_of_the_parameter() -> None:
    stacks, partition, _ = _stacks(_LAYER * 3, 0, 1)
    blocks: list[Tensor] = []
    for chunk in stacks.chunks:
        for rows in chunk:
            for run in rows.stored:
                run.in_work.copy_(run.of(partition))
            if rows.blocks.shape.dense:
                blocks += rows.gradient_NRB.clone().unbind()
    first = torch.arange(96.0).view(12, 8)  # the first parameter: three blocks of four rows
    for number in range(3):
        assert torch.equal(blocks[number], first[4 * number : 4 * number + 4])


def test_layers_that_repeat_take_few_copies() -> None:
    few, many = (sum(len(list(_views(chunk))) for chunk in _stacks(_LAYER * n, 0, 1)[0].chunks) for n in (4, 40))
    assert many == few <= 2 * len(_LAYER)
