"""What a plan costs each rank, from integers alone: memory, bytes sent in a step, arithmetic.

DESIGN.md, "Bytes", has the formulas.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import NamedTuple

from adafisher_dist.blocks import sharding
from adafisher_dist.blocks.fields import fields
from adafisher_dist.blocks.grid import Grid
from adafisher_dist.blocks.placement import Placement
from adafisher_dist.blocks.sharding import Assignment, Spans
from adafisher_dist.settings import StateConfig

MEMORY_KINDS = ("fisher", "momentum", "factors", "buffers")
_KINDS = {"momentum": "momentum", "fisher": "fisher", "square": "fisher", "factor": "factors", "curvature": "factors"}
TRAFFIC_KINDS = ("weights", "blocks")


class BlockCount(NamedTuple):
    """A rank's blocks, and elements of the workspace that the longest of its chunks takes."""

    total: sharding.Blocks
    workspace: int


@dataclass(frozen=True)
class PlanSummary:
    """A plan as far as it costs anything.

    Attributes:
        grids: of each parameter.
        configs: the settings of each parameter's state.
        groups: the number of each parameter's param group.
        stored_spans: for each rank, the spans that it stores.
        assignment: who owns which blocks.
        cut: for each rank, the row groups that it owns and does not store whole; empty where
            everything is replicated.
        replicated: whether every rank stores everything.
        weight_itemsize: bytes of an element that is gathered, where it is.
    """

    grids: Sequence[Grid]
    configs: Sequence[StateConfig]
    groups: Sequence[int]
    stored_spans: Placement
    assignment: Assignment
    cut: Sequence[Spans]
    replicated: bool
    weight_itemsize: int

    @property
    def world(self) -> int:
        """Ranks that share the blocks."""
        return len(self.assignment.owned)

    @cached_property
    def blocks(self) -> list[BlockCount]:
        """Of each rank."""
        return [_count(self, rank) for rank in range(self.world)]

    @cached_property
    def config_of_group(self) -> dict[int, StateConfig]:
        """The settings of each param group."""
        return dict(zip(self.groups, self.configs, strict=True))

    @cached_property
    def longest(self) -> list[int]:
        """Of each chunk, the elements of the rank that has most of them."""
        return [max(map(sharding.count, by_rank)) for by_rank in self.assignment.chunks]

    @cached_property
    def gathered(self) -> list[int]:
        """Elements of a rank in each all-gather of a step, where everything is replicated."""
        by_chunk = [sharding.slices(longest, self.world) for longest in self.longest]
        return [stop - start for slices in by_chunk for start, stop in slices]


def _count(plan: PlanSummary, rank: int) -> BlockCount:
    total, workspace = sharding.Blocks(), 0
    for by_rank in plan.assignment.chunks:
        if by_rank[rank]:
            blocks = sharding.blocks_of(by_rank[rank], plan.grids, plan.groups)
            total.update(blocks)
            workspace = max(workspace, sharding.room(blocks))
    return BlockCount(total, workspace)


def memory(plan: PlanSummary, rank: int, config: StateConfig | None = None) -> dict[str, int]:
    """Bytes of device memory of a rank, by kind, without the model's parameters and gradients.

    "buffers" are the workspace of a chunk, what is staged, sent, received and gathered, and where F
    is bfloat16 the seeds. `config`: as if all parameters were stored so.
    """
    sums = dict.fromkeys(MEMORY_KINDS, 0)
    wide = _wide(plan)
    for (group, shape), number in plan.blocks[rank].total.items():
        stored = config or plan.config_of_group[group]
        for field in fields(shape, stored):
            sums[_KINDS[field.name]] += number * prod(field.shape) * field.dtype.itemsize
        if stored.fisher_dtype.itemsize < wide:
            sums["buffers"] += 4 * number
    sums["buffers"] += _buffers(plan, rank, wide)
    return sums


def traffic(plan: PlanSummary, rank: int) -> dict[str, int]:
    """Bytes that a rank sends in a step, by kind, where every parameter has a gradient.

    Verdicts (what the ranks agree on) are not counted. "weights": its new weights, to each of the
    others. "blocks": of blocks that a boundary between ranks cuts, gradients to their owner and
    updates back.
    """
    sums = dict.fromkeys(TRAFFIC_KINDS, 0)
    if plan.replicated:
        sums["weights"] = (plan.world - 1) * sum(plan.longest) * plan.weight_itemsize
    else:
        sent, received = _crossing(plan, rank)
        sums["blocks"] = (sent + received) * _wide(plan)
    return sums


def collectives(plan: PlanSummary) -> int:
    """How many a step has, where every parameter has a gradient.

    Two by which the ranks agree, before it and after it (in calls 1, 2, 4, 8, … there may be more);
    the all-gathers of new weights, or what is cut to its owners and back.
    """
    if plan.world == 1:
        return 0
    return 2 + (len(plan.gathered) if plan.replicated else 2 * any(plan.cut))


def arithmetic(plan: PlanSummary, rank: int, inverse_update_freq: int = 1) -> int:
    """Floating-point operations of a rank in a step, once the Fisher is full.

    Additions and products count one each. For a block of D vectors of r elements: (2D + 1) r² for
    F, and for S = M̂ A^(−1/2), in k steps, r² + 2 (3k − 2) r³ + 2kD r²; where A^(−1/2) is kept, r² +
    2 (4k − 3) r³ to make it and 2D r² to multiply by it (p = 1: r² + r³/3 for a Cholesky factor,
    and for an inverse that is kept 3r³ more; 2D r² for the solutions). For the polar factor 5
    (4s²l + 2s³), s being the smaller and l the larger of D and r; grafting="none" has none, and an
    exact A^(−1/2) by 33 products.
    """
    total = 0.0
    for (group, (r, rows, dense)), number in plan.blocks[rank].total.items():
        config = plan.config_of_group[group]
        small, large = sorted((rows, r))
        polar = 5 * (4 * small**2 * large + 2 * small**3) if config.grafting == "rms" else 0
        making, applying = _preconditioning(r, rows, config)
        each = (2 * rows + 1) * r**2 + making / inverse_update_freq + applying + polar if dense else 8
        total += number * each
    return round(total)


def _preconditioning(r: int, rows: int, config: StateConfig) -> tuple[float, float]:
    """Floating-point operations for a block's A^(−p), and to multiply its rows by it."""
    if config.exponent == 1.0:
        return r**2 + r**3 / 3 + (3 * r**3 if config.keeps_factors else 0), 2 * rows * r**2
    if config.grafting == "none":
        return r**2 + 66 * r**3, 2 * rows * r**2
    k = root_steps(r)
    if config.keeps_factors:
        return r**2 + 2 * (4 * k - 3) * r**3, 2 * rows * r**2
    return r**2 + 2 * (3 * k - 2) * r**3, 2 * k * rows * r**2


def root_steps(r: int) -> int:
    """Steps to A^(−1/2) of blocks of r columns with the default damping.

    They are those of `numerics.factors.root_steps`, which tells how they are found.
    """
    return 2 + sum(r >= size for size in (9, 148))


def _wide(plan: PlanSummary) -> int:
    """Bytes of an element of the arithmetic: one for the whole optimizer."""
    return plan.configs[0].compute_dtype.itemsize


def _buffers(plan: PlanSummary, rank: int, wide: int) -> int:
    """Workspace, staging and communication."""
    own = plan.blocks[rank].workspace * wide
    if not plan.replicated:
        return own + (sharding.count(plan.cut[rank]) + sum(_crossing(plan, rank))) * wide
    if plan.world == 1:
        return own
    made = min(2, len(plan.longest)) * max(plan.longest)
    gathered = min(2, len(plan.gathered)) * max(plan.gathered, default=0) * plan.world
    return own + (made + gathered) * plan.weight_itemsize


def _crossing(plan: PlanSummary, rank: int) -> tuple[int, int]:
    """Elements that the rank stores and does not own, and that it owns and does not store."""
    both, owned = 0, plan.assignment.owned[rank]
    for span in owned:
        start, stop = plan.stored_spans.parts[span.parameter].bounds(rank)
        both += max(0, min(stop, span.stop) - max(start, span.start))
    return plan.stored_spans.numels[rank] - both, sharding.count(owned) - both
