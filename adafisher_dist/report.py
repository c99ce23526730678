"""What the optimizer tells of itself: statistics by parameter, memory, and the line at the first step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from adafisher_dist import fisher, plan
from adafisher_dist.grid import Grid
from adafisher_dist.shard import Shard, arena_numel
from adafisher_dist.span import Span


@dataclass(frozen=True, slots=True)
class ParameterStats:
    """Of one parameter.

    Attributes:
        blocks: dense and diagonal blocks, on all ranks.
        dense_blocks: those with a dense Fisher.
        fisher_updates: updates of its Fisher.
        mean_block_size: elements a block.
        ladder: how often one of this rank's blocks needed each rung of the fallback ladder.
    """

    blocks: int
    dense_blocks: int
    fisher_updates: int
    mean_block_size: float
    ladder: dict[str, int]


def fisher_stats(shard: Shard) -> dict[str, ParameterStats]:
    """By parameter name."""
    ladders = [[0] * len(fisher.RUNGS) for _ in shard.storage.parameters]
    for batch, segments in zip(shard.batches, shard.by_parameter, strict=True):
        counted = batch.counted()
        for segment in segments if counted else ():
            for row, counts in counted.items():
                if segment.start <= row < segment.stop:
                    ladders[segment.owner] = [a + b for a, b in zip(ladders[segment.owner], counts, strict=True)]
    result = {}
    updates_of = shard.counters[:, 1].tolist()
    for parameter, grid, ladder, updates in zip(
        shard.storage.parameters, shard.grids, ladders, updates_of, strict=True
    ):
        blocks = grid.num_blocks
        result[parameter.name] = ParameterStats(
            blocks=blocks,
            dense_blocks=grid.dense_blocks,
            fisher_updates=updates,
            mean_block_size=grid.numel / blocks if blocks else 0.0,
            ladder=dict(zip(fisher.RUNGS, ladder, strict=True)),
        )
    return result


def memory_usage(shards: Sequence[Shard]) -> dict[str, dict[str, int]]:
    """Bytes by kind, of this rank and of all; from the plan, so no collective is needed."""
    usage = {scope: dict.fromkeys(("fisher", "momentum", "factors", "buffers"), 0) for scope in ("rank", "all")}
    for shard in shards:
        for rank in range(shard.storage.group.size):
            bytes_by_kind = _bytes(shard, rank)
            for kind, amount in bytes_by_kind.items():
                usage["all"][kind] += amount
                if rank == shard.storage.group.rank:
                    usage["rank"][kind] += amount
    for kinds in usage.values():
        kinds["total"] = sum(kinds.values())
    return usage


def _bytes(shard: Shard, rank: int) -> dict[str, int]:
    sums = dict.fromkeys(("fisher", "momentum", "factors", "buffers"), 0)
    group = shard.storage.group
    for span in shard.owned[rank]:
        grid = shard.grids[span.parameter]
        structure = shard.structures[shard.groups[shard.storage.parameters[span.parameter].tensor]]
        wide = structure.compute_dtype.itemsize
        sums["fisher"] += _stored(span, grid, structure.packed) * structure.fisher_dtype.itemsize
        sums["momentum"] += len(span) * wide
        sums["buffers"] += len(span) * wide  # the stacked gradient
        if structure.keeps_factors:
            for strip in grid.strips(span.start, span.stop):
                if strip.dense:
                    sums["factors"] += strip.rows * (strip.size**2 + 1) * wide
    wide = shard.arena.element_size()
    longest = [max(plan.count(spans) for spans in by_rank) for by_rank in shard.pieces]
    sums["buffers"] += arena_numel(shard.pieces, rank) * wide
    if shard.storage.replicated and group.size > 1:
        sums["buffers"] += min(2, len(longest)) * max(longest) * group.size * wide
    return sums


def _stored(span: Span, grid: Grid, packed: bool) -> int:
    """Elements of the Fisher as they are stored for the blocks of a span."""
    upto = grid.triangle_numel if packed else grid.fisher_numel
    return upto(grid.block_from(span.stop)) - upto(grid.block_from(span.start))


def summary(shard: Shard) -> str:
    """One line: layout, world size, blocks, the share of elements on dense blocks, bytes a rank."""
    elements = sum(grid.numel for grid in shard.grids)
    dense = sum(grid.start(grid.dense_blocks) for grid in shard.grids)
    per_rank = [sum(_bytes(shard, rank).values()) for rank in range(shard.storage.group.size)]
    return (
        f"AdaFisher: layout {shard.storage.layout}, {shard.storage.group.size} rank(s), {len(shard.grids)} parameters,"
        f" {elements} elements in {sum(grid.num_blocks for grid in shard.grids)} blocks,"
        f" {100 * dense / max(1, elements):.1f} % of the elements on dense blocks,"
        f" {min(per_rank) / 2**20:.1f} to {max(per_rank) / 2**20:.1f} MiB a rank"
    )
