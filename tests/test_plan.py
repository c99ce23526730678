"""Properties of the plan, for up to 64 ranks in one process: nothing here needs a process group."""

from __future__ import annotations

import itertools
from bisect import bisect_left
from math import prod
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import by_element, row_groups

from adafisher_dist import AdaFisher
from adafisher_dist.blocks import cost, placement, sharding
from adafisher_dist.blocks.estimate import plan_of
from adafisher_dist.blocks.fields import saved_offset
from adafisher_dist.blocks.grid import Grid, doubtful_tables, make_grid
from adafisher_dist.blocks.placement import Placement
from adafisher_dist.blocks.sharding import Span, StoredSpan
from adafisher_dist.settings import DEFAULTS, normalize, state_config

shapes = st.lists(st.integers(0, 40), max_size=4).filter(lambda shape: prod(shape) <= 3000).map(tuple)
block_sizes = st.sampled_from([1, 2, 3, 7, 16, 64])
grid_names = st.sampled_from(["rows", "flat"])
row_counts = st.sampled_from([1, 2, 3, 16])
limits = st.sampled_from([None, 0, 1, 5])
worlds = st.integers(1, 64)
many = settings(max_examples=150, deadline=None)


@st.composite
def grids(draw: st.DrawFn) -> list[Grid]:
    """The grids of a model with a few parameters."""
    size, rows, name, limit = draw(block_sizes), draw(row_counts), draw(grid_names), draw(limits)
    return [make_grid(shape, size, rows, name, limit) for shape in draw(st.lists(shapes, min_size=1, max_size=5))]


def elements(spans: sharding.Spans) -> list[tuple[int, int]]:
    return [(span.parameter, element) for span in spans for element in range(span.start, span.stop)]


def all_elements(grids: list[Grid]) -> list[tuple[int, int]]:
    return elements(sharding.whole(grids))


def starts(grid: Grid) -> set[int]:
    return {grid.start(row_group) for row_group in range(grid.row_groups + 1)}


@many
@given(shapes, block_sizes, row_counts, grid_names, limits, st.randoms())
def test_runs_are_the_blocks_of_the_oracle(
    shape: tuple[int, ...], size: int, rows: int, name: str, limit: int | None, random: Random
) -> None:
    grid = make_grid(shape, size, rows, name, limit)
    wanted = row_groups(shape, size, name, rows, limit)
    assert (grid.row_groups, grid.num_blocks) == (len(wanted), sum(map(len, wanted)))
    first = random.randint(0, grid.row_groups)
    last = random.randint(first, grid.row_groups)
    dense_last = max(first, min(last, grid.dense_row_groups))
    blocks, rest = {}, []
    for run in grid.runs(grid.start(first), grid.start(last)):
        for row_group, piece in itertools.product(range(run.row_groups), range(run.count)):
            begin = run.start + row_group * run.stride + piece * run.shape.columns
            rows_of = [begin + v * run.row_stride for v in range(run.shape.rows)]
            vectors = [range(start, start + run.shape.columns) for start in rows_of]
            if run.shape.dense:
                blocks[run.first_block + row_group * run.blocks_per_row_group + piece] = vectors
            else:
                rest += vectors[0]
    number = first * grid.pieces
    assert [blocks.pop(number + i) for i, _ in enumerate(itertools.chain(*wanted[first:dense_last]))] == list(
        itertools.chain(*wanted[first:dense_last])
    )
    assert not blocks
    assert rest == list(range(grid.start(dense_last), grid.start(last)))
    if limit is not None:
        assert grid.dense_blocks <= limit
    elif name == "rows" and prod(shape) and by_element(shape, limit):
        assert grid.dense_blocks == 0
    else:
        assert grid.dense_blocks == grid.num_blocks


TABLES = [
    (8, 65), (65, 8), (1, 3, 1, 25), (25, 1, 3), (2, 3, 2, 5), (5, 2, 40), (50257, 768), (16, 4096), (32000, 4096),
    (7499, 30000), (32768, 6144), (33000, 8249),
]  # fmt: skip
MATRICES = [
    (8, 64), (64, 8), (1, 3, 1, 24), (24, 1, 3), (3, 3, 2, 4), (5, 5, 40), (4096, 1024), (16, 128), (29999, 4096),
    (30000, 7500), (33001, 8249), (36864, 4608), (35840, 5120), (57344, 8192),
]  # fmt: skip


@pytest.mark.parametrize("shape", TABLES + MATRICES, ids=str)
def test_tables_are_those_of_the_oracle(shape: tuple[int, ...]) -> None:
    """If one side is over 8 times the other (4 from 30,000 to 33,000), without max_blocks."""
    grid, limited = (make_grid(shape, 16, 4, "rows", limit) for limit in (None, 10**9))
    assert by_element(shape, None) == (grid.dense_blocks == 0) == (shape in TABLES)
    assert limited.dense_blocks == limited.num_blocks and not by_element(shape, 10**9)
    assert make_grid(shape, 16, 4, "flat").dense_blocks == -(-prod(shape) // 16)
    if shape in MATRICES:
        assert grid == limited
    elif prod(shape) < 10_000:
        assert (grid.row_groups, grid.num_blocks) == (len(row_groups(shape, 16, "rows", 4)),) * 2
        elements = [range(run.start, run.start + run.num_blocks) for run in grid.runs(0, grid.numel)]
        assert elements == [range(prod(shape))]


def test_tables_that_may_be_hidden_layers() -> None:
    """Fused projections are in each layer; adapters and routers are narrow, vocabularies few."""
    layer = [(24576, 1536), (7168, 7168), (16, 4096), (256, 7168), (7168,), (50, 1, 700)]
    assert doubtful_tables([(129280, 7168)] * 2 + layer * 3) == [((24576, 1536), 3)]
    assert not doubtful_tables([(129280, 7168)] * 2 + layer * 2)


@many
@given(shapes, block_sizes, row_counts)
def test_matrices_of_few_rows_keep_no_more(shape: tuple[int, ...], size: int, rows: int) -> None:
    """A block's F takes no more per element than with rows_per_block rows that share it, or 2."""
    grid = make_grid(shape, size, rows)
    first = next(grid.runs(0, grid.numel), None)
    if first is not None and first.shape.dense:
        assert first.shape.columns <= max(size / rows, 2) * first.shape.rows


@many
@given(shapes, block_sizes, row_counts, grid_names, limits)
def test_closed_forms_count_what_runs_have(
    shape: tuple[int, ...], size: int, rows: int, name: str, limit: int | None
) -> None:
    grid = make_grid(shape, size, rows, name, limit)
    fisher_numels = [grid.fisher_numel(row_group) for row_group in range(grid.row_groups)]
    for amount in {0, 1, *fisher_numels, *(numel + 1 for numel in fisher_numels), grid.fisher_numel(grid.row_groups)}:
        assert grid.row_group_of_fisher_numel(amount) == bisect_left(fisher_numels, amount)
    for row_group in range(grid.row_groups + 1):
        runs = list(grid.runs(0, grid.start(row_group)))
        assert grid.row_group_from(grid.start(row_group)) == row_group
        assert grid.fisher_numel(row_group) == sum(run.num_blocks * run.shape.columns**2 for run in runs)
        elements = sum(run.num_blocks * run.shape.rows * run.shape.columns for run in runs)
        assert grid.start(row_group) == saved_offset("momentum", grid, row_group) == elements


@many
@given(grids(), worlds)
def test_every_element_has_one_owner_and_work_is_even(grids: list[Grid], world: int) -> None:
    runs = sharding.cut(sharding.whole(grids), grids, world)
    assert [element for run in runs for element in elements(run)] == all_elements(grids)
    for run in runs:
        for span in run:
            assert {span.start, span.stop} <= starts(grids[span.parameter]), "a block with two owners"
    work = [sharding.work(run, grids) for run in runs]
    largest = max(max(grid.pieces * grid.columns**2, grid.rows * grid.row_numel) for grid in grids)
    assert max(work) <= sum(work) / world + largest


@many
@given(grids(), worlds, st.integers(1, 9))
def test_cutting_a_run_again_keeps_its_order(grids: list[Grid], world: int, parts: int) -> None:
    run = sharding.cut(sharding.whole(grids), grids, world)[world // 2]
    chunks = sharding.cut(run, grids, parts)
    assert [element for chunk in chunks for element in elements(chunk)] == elements(run)


@many
@given(grids(), worlds, st.integers(0, 5))
def test_routes_bring_each_element_to_its_owner_and_back(grids: list[Grid], world: int, padding: int) -> None:
    stored = flat_partitions(grids, world, padding)
    owned = sharding.owned_where_stored(stored, grids)
    assert sorted(e for run in owned for e in elements(run)) == all_elements(grids)
    tensors = [np.full(10_000, -1.0) for _ in range(world)]
    value = {element: float(index) for index, element in enumerate(all_elements(grids))}
    for rank, places in enumerate(stored):
        for place in places:
            for offset, element in enumerate(elements((place.span,))):
                tensors[rank][place.offset + offset] = value[element]
    routes = [sharding.route(stored, owned, rank) for rank in range(world)]
    arenas = [np.full(sharding.count(run), -1.0) for run in owned]
    for rank, route in enumerate(routes):
        for piece in route.local:
            arenas[rank][piece.buffer_offset :][: piece.numel] = tensors[rank][piece.tensor_offset :][: piece.numel]
        for owner in range(world):
            sent = [p for p in route.send if p.rank == owner]
            received = [p for p in routes[owner].receive if p.rank == rank]
            assert [p.numel for p in sent] == [p.numel for p in received], "the two ends disagree"
            for out, into in zip(sent, received, strict=True):
                data = tensors[rank][out.tensor_offset :][: out.numel]
                arenas[owner][into.buffer_offset :][: into.numel] = data
    for run, flat_buffer in zip(owned, arenas, strict=True):
        assert flat_buffer.tolist() == [value[element] for element in elements(run)]
    cut = sharding.cut_by_boundaries(sharding.Assignment(owned, (owned,)), stored, grids)
    assert any(cut) == any(route.receive for route in routes)
    for rank, (run, spans) in enumerate(zip(owned, cut, strict=True)):
        held = set(elements(tuple(place.span for place in stored[rank])))
        groups = {
            (s.parameter, grids[s.parameter].start(grids[s.parameter].row_group_from(e + 1) - 1))
            for s in run
            for e in range(s.start, s.stop)
            if (s.parameter, e) not in held
        }
        assert [(s.parameter, s.start) for s in spans] == sorted(groups)


@many
@given(grids(), worlds, st.integers(0, 5))
def test_a_cut_row_group_goes_to_the_least_loaded_of_its_ranks(grids: list[Grid], world: int, padding: int) -> None:
    stored = flat_partitions(grids, world, padding)
    owned = sharding.owned_where_stored(stored, grids)
    held = [set(elements(tuple(place.span for place in places))) for places in stored]
    loads, shared = [0] * world, []
    for parameter, grid in enumerate(grids):
        for row_group in range(grid.row_groups):
            group = {(parameter, element) for element in range(grid.start(row_group), grid.start(row_group + 1))}
            ranks = [rank for rank in range(world) if group & held[rank]]
            load = grid.fisher_numel(row_group + 1) - grid.fisher_numel(row_group)
            if len(ranks) == 1:
                loads[ranks[0]] += load
            elif group:
                shared.append((-load, parameter, row_group, ranks, [-len(group & held[rank]) for rank in ranks]))
    owners = {element: rank for rank, spans in enumerate(owned) for element in elements(spans)}
    for minus_load, parameter, row_group, ranks, minus_stored in sorted(shared):
        wanted = min(zip((loads[rank] for rank in ranks), minus_stored, ranks, strict=True))[2]
        assert owners[parameter, grids[parameter].start(row_group)] == wanted
        loads[wanted] -= minus_load
    for rank, spans in enumerate(owned):
        assert loads[rank] == sharding.work(spans, grids)
        assert len({span.parameter for span in spans}) == len(spans), "state dicts of torch's need one run each"


LLAMA_7B = [(32000, 4096), *[(4096, 4096)] * 128, *[(11008, 4096)] * 64, *[(4096, 11008)] * 32, (32000, 4096)]
EXPERTS = [(32000, 4096), *[(4096, 4096)] * 64, *[(8, 28672, 4096)] * 32, *[(8, 4096, 14336)] * 32]


@pytest.mark.parametrize("layout", ["zero1", "zero3", "fsdp2"])
@pytest.mark.parametrize(
    "world", [8, pytest.param(64, marks=pytest.mark.ci), pytest.param(512, marks=pytest.mark.ci), 1024]
)
def test_no_rank_of_a_thousand_owns_much_more_than_another(layout: str, world: int) -> None:
    """Where who stores a row group's first element owned it, one of 1,024 had 11 times the mean."""
    assert _largest_to_mean(LLAMA_7B, layout, world) <= 1.1


@pytest.mark.parametrize("world", [2, 8, pytest.param(64, marks=pytest.mark.ci), 1024])
def test_replicas_gather_little_more_than_the_weights_in_little_room(world: int) -> None:
    """A chunk with a row group of each of 1,024 ranks took 5.8 GB, and sent 8 times the weights."""
    plan = _planned(LLAMA_7B, "ddp", world)
    numel, sent = sum(map(prod, LLAMA_7B)), cost.traffic(plan, 0)["weights"]
    assert sent <= 1.3 * 4 * numel * (world - 1) / world
    gathered = 2 * 4 * sharding.GATHERED_NUMEL
    assert cost.memory(plan, 0)["buffers"] <= 1.01 * gathered + 2 * 4 * max(plan.longest) + 4 * 2**25


@many
@given(st.integers(0, 1000), st.integers(1, 9), st.integers(1, 300))
def test_slices_cover_the_longest_part(longest: int, ranks: int, most: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "GATHERED_NUMEL", most)
        slices = sharding.slices(longest, ranks)
    assert [element for start, stop in slices for element in range(start, stop)] == list(range(longest))
    assert all(stop - start == 1 or (stop - start) * ranks <= most + ranks for start, stop in slices)


@many
@given(grids(), st.data())
def test_elements_of_spans_are_counted_in_a_row(grids: list[Grid], data: st.DataObject) -> None:
    spans = sharding.cut(sharding.whole(grids), grids, 2)[1]
    start = data.draw(st.integers(0, sharding.count(spans)))
    stop = data.draw(st.integers(start, sharding.count(spans) + 5))
    assert elements(sharding.elements(spans, start, stop)) == elements(spans)[start:stop]


@pytest.mark.parametrize("world", [8, 64, 512])
def test_stacked_experts_are_spread_over_the_ranks_too(world: int) -> None:
    assert _largest_to_mean(EXPERTS, "zero3", world) <= 1.1


def _largest_to_mean(shapes: list[tuple[int, ...]], layout: str, world: int) -> float:
    """Of the elements that the ranks own; their bytes are less than 1.5 times an even share."""
    plan = _planned(shapes, layout, world)
    owned = [sharding.count(spans) for spans in plan.assignment.owned]
    assert sum(owned) == sum(map(prod, shapes))
    some = sorted(range(world), key=owned.__getitem__)[:: max(1, world // 8)]
    some.append(owned.index(max(owned)))
    total = [sum(cost.memory(plan, rank).values()) for rank in some]
    assert max(total) <= 1.5 * sum(total) / len(total)
    return max(owned) * world / sum(owned)


def _planned(shapes: list[tuple[int, ...]], layout: str, world: int) -> cost.PlanSummary:
    group: dict[str, Any] = {**DEFAULTS}
    normalize(group)
    return plan_of([(shapes, state_config(group))], layout, world, torch.float32)


def flat_partitions(grids: list[Grid], world: int, padding: int) -> Placement:
    """ZeRO-1/2's storage: one flat buffer, `padding` after each parameter, in equal partitions."""
    length = max(1, -(-sum(grid.numel + padding for grid in grids) // world))
    offsets = [sum(grid.numel + padding for grid in grids[:number]) for number in range(len(grids))]
    placed = placement.in_partitions(offsets, [grid.numel for grid in grids], length, world)
    assert [list(placed[rank]) for rank in range(world)] == flat_partitions_one_by_one(grids, world, padding)
    return placed


def flat_partitions_one_by_one(grids: list[Grid], world: int, padding: int) -> list[list[StoredSpan]]:
    total = sum(grid.numel + padding for grid in grids)
    length = max(1, -(-total // world))
    stored: list[list[StoredSpan]] = [[] for _ in range(world)]
    offset = 0
    for number, grid in enumerate(grids):
        for rank in range(world):
            start, stop = max(0, rank * length - offset), min(grid.numel, (rank + 1) * length - offset)
            if start < stop:
                span = Span(number, grid.numel, start, stop)
                stored[rank].append(StoredSpan(span, 0, offset + start - rank * length))
        offset += grid.numel + padding
    return stored


def test_a_large_model_is_planned_in_closed_form() -> None:
    grids = [make_grid(shape, 64, 16) for shape in [(50257, 4096), *[(4096, 11008), (11008, 4096)] * 64]]
    runs = sharding.cut(sharding.whole(grids), grids, 64)
    assert sum(sharding.count(run) for run in runs) == sum(grid.numel for grid in grids)
    work = [sharding.work(run, grids) for run in runs]
    assert max(work) - min(work) <= 2 * 11008 // 64 * 64**2, "each end may be off by less than a row group"


def test_the_fingerprint_of_a_plan_stays() -> None:
    """State dicts keep it: a module or class by another name must not change it."""
    optimizer = AdaFisher([torch.nn.Parameter(torch.ones(12, 10))], block_size=8, rows_per_block=4)
    (parameter,) = optimizer.param_groups[0]["params"]
    parameter.grad = torch.ones(12, 10)
    optimizer.step()
    (shard,) = optimizer._registry.shards
    assert shard.digest() == 621549894667185628
