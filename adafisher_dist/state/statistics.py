"""What the optimizer reports: parameter statistics, memory, traffic, a line at the first step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from adafisher_dist.blocks import cost
from adafisher_dist.blocks.cost import PlanSummary
from adafisher_dist.numerics.factors import FALLBACKS
from adafisher_dist.state.shard import Shard


@dataclass(frozen=True, slots=True)
class ParameterStats:
    """Statistics of one parameter.

    Attributes:
        blocks: on all ranks, dense ones and diagonal ones: of elements that are updated as by Adam
            (vectors, tables, what lies past max_blocks) each run of up to block_size counts as one.
        dense_blocks: those with a dense Fisher.
        fisher_updates: updates of its Fisher.
        mean_block_size: elements a block.
        ladder: how often one of this rank's blocks had no Cholesky factor (exponent=1.0), by the
            fallback that gave one; they are tried in the order of the keys: "more damping",
            "float64", "diagonal".
    """

    blocks: int
    dense_blocks: int
    fisher_updates: int
    mean_block_size: float
    ladder: dict[str, int]


def fisher_stats(shard: Shard) -> dict[str, ParameterStats]:
    """By parameter name."""
    ladders = [[0] * len(FALLBACKS) for _ in shard.storage.parameters]
    for stack, segments in zip(shard.stacks, shard.by_parameter, strict=True):
        for segment in segments if stack.fallback_counts else ():
            for row, counts in stack.fallback_counts.items():
                if segment.start <= row < segment.stop:
                    ladders[segment.owner] = [a + b for a, b in zip(ladders[segment.owner], counts, strict=True)]
    result = {}
    updates_of = shard.counters[:, 1].tolist()
    for parameter, grid, ladder, updates in zip(
        shard.storage.parameters, shard.grids, ladders, updates_of, strict=True
    ):
        if not shard.stands(parameter.tensor):
            continue
        blocks = grid.num_blocks
        result[parameter.name] = ParameterStats(
            blocks=blocks,
            dense_blocks=grid.dense_blocks,
            fisher_updates=updates,
            mean_block_size=grid.numel / blocks if blocks else 0.0,
            ladder=dict(zip(FALLBACKS, ladder, strict=True)),
        )
    return result


def usage(
    shards: Sequence[Shard], kinds: Sequence[str], of_rank: Callable[[PlanSummary, int], dict[str, int]]
) -> dict[str, dict[str, int]]:
    """Bytes by kind, of this rank and of all; from the plan, so no collective is needed."""
    found = {scope: dict.fromkeys(kinds, 0) for scope in ("rank", "all")}
    for shard in shards:
        plan = shard.plan_summary
        for rank in range(plan.world):
            for kind, amount in of_rank(plan, rank).items():
                found["all"][kind] += amount
                if rank == shard.storage.group.rank:
                    found["rank"][kind] += amount
    for scope in found.values():
        scope["total"] = sum(scope.values())
    return found


def summary(shard: Shard) -> str:
    """One line: layout, world size, blocks, the share of elements on dense blocks, bytes a rank."""
    elements = sum(grid.numel for grid in shard.grids)
    dense = sum(grid.start(grid.dense_row_groups) for grid in shard.grids)
    plan = shard.plan_summary
    per_rank = [sum(cost.memory(plan, rank).values()) for rank in range(plan.world)]
    return (
        f"AdaFisher: layout {shard.storage.layout}, {shard.storage.group.size} rank(s), {len(shard.grids)} parameters,"
        f" {elements} elements in {sum(grid.num_blocks for grid in shard.grids)} blocks,"
        f" {100 * dense / max(1, elements):.1f} % of the elements on dense blocks,"
        f" {min(per_rank) / 2**20:.1f} to {max(per_rank) / 2**20:.1f} MiB a rank"
    )
