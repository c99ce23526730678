"""The order of tensor-parallel parts in a checkpoint, beside an enumeration of all elements."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from itertools import product
from math import prod
from typing import Any

import numpy as np
import pytest
import torch

from adafisher_dist.blocks.fields import SAVED, saved_numel
from adafisher_dist.blocks.grid import BlockShape, Grid, make_grid
from adafisher_dist.blocks.parts import Parts, saved_offsets, saved_parts
from adafisher_dist.checkpoint import orders
from adafisher_dist.checkpoint.orders import Order

SETTINGS = {"block_size": 8, "rows_per_block": 4, "block_grid": "rows", "max_blocks": None}
CUTS = [  # shape, dimension, parts
    ((32, 16), 0, 2),
    ((32, 16), 1, 2),
    ((16, 32), 1, 4),
    ((20, 16), 0, 2),  # edges off the grid of rows
    ((16, 20), 1, 2),  # and of columns
    ((10, 12), 0, 4),  # the last part is smaller
    ((6, 16), 0, 4),  # the last one is empty
    ((24,), 0, 2),
    ((80, 8), 0, 2),  # a table
    ((8, 80), 1, 4),
    ((4, 8, 40), 0, 2),  # stacked matrices
    ((4, 8, 40), 1, 2),
    ((4, 8, 40), 2, 2),
    ((16, 8, 3), 1, 2),  # a convolution
    ((16, 8, 4), 2, 2),  # cut through its window
]


def elements(parts: Parts | None, shape: Sequence[int]) -> np.ndarray:
    """The whole's numbers of the elements, in the order of the parts."""
    numbers = np.arange(prod(shape)).reshape(shape)
    if parts is None:
        return numbers.ravel()
    return np.concatenate([own.ravel() for own in torch.from_numpy(numbers).chunk(parts.count, parts.dim)])


def blocks(grid: Grid) -> list[tuple[BlockShape, np.ndarray]]:
    """Of each block, in the grid's order, its shape and its elements."""
    found = []
    for run in grid.runs(0, grid.numel):
        columns, rows, dense = run.shape
        for s, c in product(range(run.row_groups), range(run.count)):
            first = run.start + s * run.stride + c * columns
            own = first + np.arange(rows)[:, None] * run.row_stride + np.arange(columns)
            number = run.first_block + s * run.blocks_per_row_group + c if dense else first
            found.append((number, run.shape, own.ravel()))
    return [(shape, own) for _, shape, own in sorted(found, key=lambda block: block[0])]


def values_of(parts: Parts | None, shape: Sequence[int], settings: Mapping[str, Any], field: str) -> np.ndarray:
    """What a field's tensor has, each value being made of its block's elements in the whole."""
    if field == "momentum":
        return elements(parts, shape)
    grids = [make_grid(shape, **settings)] if parts is None else parts.grids(settings)
    numbers, values, before = elements(parts, shape), [], 0
    for grid in grids:
        for block, own in blocks(grid):
            which = hash(tuple(numbers[before + own]))
            values += [hash((which, place)) for place in range(saved_numel(field, block))]
        before += grid.numel
    return np.array(values, dtype=np.int64)


def moved(here: Order, there: Order, values: np.ndarray, start: int, stop: int) -> np.ndarray:
    """Elements [start, stop) in the order of `here`, of values in the order of `there`."""
    result = np.full(stop - start, -1, dtype=np.int64)
    last = 0
    for group in orders.read_together(orders.runs(here, there, start, stop, len(values))):
        for place, at, numel in group:
            assert at >= last and numel > 0
            result[place - start : place - start + numel] = values[at : at + numel]
            last = at + numel
    return result


@pytest.mark.parametrize(("shape", "dim", "count"), CUTS)
def test_parts_are_those_of_torch(shape: tuple[int, ...], dim: int, count: int) -> None:
    parts = Parts(shape, dim, count)
    chunks = list(torch.empty(shape).chunk(count, dim))
    empty = [torch.empty(parts.shapes[-1])] * (count - len(chunks))
    assert parts.shapes == [tuple(chunk.shape) for chunk in (*chunks, *empty)]
    assert parts.offset(count) == prod(shape) and parts.offset(1) == chunks[0].numel()
    assert saved_parts({"shape": [*shape], **parts.facts()}) == parts and saved_parts({"shape": [*shape]}) is None


@pytest.mark.parametrize(("shape", "dim", "count"), CUTS)
@pytest.mark.parametrize("settings", [{}, {"block_grid": "flat"}, {"rows_per_block": 1}, {"max_blocks": 0}])
def test_each_element_and_block_is_found_in_any_other_order(
    shape: tuple[int, ...], dim: int, count: int, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(orders, "_GAP", dim * 40)  # some runs are read together, some apart
    settings, choose = {**SETTINGS, **settings}, random.Random(0)
    ways = [None, Parts(shape, dim, count), Parts(shape, len(shape) - 1 - dim, 2)]
    for field in SAVED:
        found = [
            (order, values_of(parts, shape, settings, field))
            for parts in ways
            if (order := orders.of_field(field, shape, parts, settings)) is not None
        ]
        for (here, wanted), (there, values) in product(found, repeat=2):
            assert len(wanted) == len(values)
            start, stop = sorted(choose.choices(range(len(wanted) + 1), k=2))
            for first, last in ((0, len(wanted)), (start, stop)):
                np.testing.assert_array_equal(moved(here, there, values, first, last), wanted[first:last])


@pytest.mark.parametrize(("shape", "dim", "count"), CUTS)
@pytest.mark.parametrize("settings", [{}, {"block_grid": "flat"}, {"rows_per_block": 1}, {"max_blocks": 0}])
def test_blocks_are_the_wholes_just_where_none_goes_over_an_edge(
    shape: tuple[int, ...], dim: int, count: int, settings: dict[str, Any]
) -> None:
    """What is refused has other blocks; what is not has the same."""
    settings, parts = {**SETTINGS, **settings}, Parts(shape, dim, count)
    whole = sorted(values_of(None, shape, settings, "fisher"))
    cut = sorted(values_of(parts, shape, settings, "fisher"))
    assert (orders.of_field("fisher", shape, parts, settings) is not None) == (whole == cut)


def test_lengths_of_all_parts() -> None:
    parts = Parts((20, 16), 0, 2)
    grids = parts.grids(SETTINGS)
    assert saved_offsets("momentum", grids) == [0, 160, 320]
    assert saved_offsets("fisher", grids)[-1] == len(values_of(parts, parts.whole, SETTINGS, "fisher"))


def test_some_blocks_and_some_diagonal_elements_are_not_carried_over() -> None:
    """`max_blocks` counts within a part."""
    settings = {**SETTINGS, "max_blocks": 5}
    assert orders.of_field("fisher", (32, 16), Parts((32, 16), 0, 2), settings) is None


def test_large_parameters_take_little() -> None:
    """Of Llama-70B's down_proj over 8 ranks, 28,672 blocks."""
    shape, settings = (8192, 28672), {**SETTINGS, "block_size": 128, "rows_per_block": 64}
    order = orders.of_field("fisher", shape, Parts(shape, 1, 8), settings)
    assert order is not None and len(order.whole) == 128 * 8
    assert len(orders.of_elements(Parts(shape, 1, 8)).whole) == 8192 * 8
    assert len(orders.of_elements(Parts(shape, 0, 8)).whole) == 1
