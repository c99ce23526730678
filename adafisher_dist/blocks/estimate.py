"""What AdaFisher will cost a model on some ranks, from its shapes, before anything is built.

It makes the plan that training makes, by the same functions, so the figures are exact where the
layout is. Partitions are padded as DeepSpeed pads them; tests compare with real engines.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from itertools import accumulate
from math import prod
from typing import Any

import torch

from adafisher_dist.blocks import cost, placement, sharding
from adafisher_dist.blocks.cost import PlanSummary
from adafisher_dist.blocks.grid import grid_of
from adafisher_dist.blocks.placement import Placement
from adafisher_dist.settings import StateConfig

Shapes = Sequence[tuple[int, ...]]
Groups = Sequence[tuple[Shapes, StateConfig]]

LAYOUTS = ("ddp", "zero0", "zero1", "zero2", "zero3", "fsdp2")

AUTO: Any = "auto"  # a block size that is still to be chosen

# What `block_size="auto"` chooses from.
AUTO_BLOCK_SIZES = (128, 96, 64, 48, 32, 24, 16, 8, 4, 2, 1)


@dataclass(frozen=True, slots=True)
class Estimate:
    """Of one setting, for the rank that has the most of each.

    Attributes:
        memory: bytes on the device by kind, and "total"; without the model's own parameters and
            gradients.
        least: bytes in all on the rank that has the least.
        rank_total: with the model, bytes in all on the rank that has the most.
        sent: bytes sent in a step, but for what the ranks agree on.
        collectives: of a step, the two by which the ranks agree among them.
        flops: floating-point operations in a step.
        chunks: in which a step is taken.
        blocks: on all ranks.
    """

    memory: dict[str, int]
    least: int
    rank_total: int
    sent: int
    collectives: int
    flops: int
    chunks: int
    blocks: int


def layout_named(name: str) -> str:
    """Which of `LAYOUTS` the layout of a `layouts.Storage` is."""
    return {
        "one process": "ddp", "replicated": "ddp", "ZeRO-1": "zero1", "BF16_Optimizer": "zero1", "ZeRO-2": "zero2",
        "ZeRO-3": "zero3", "FSDP2": "fsdp2", "HSDP": "fsdp2",
    }[name]  # fmt: skip


def plan_of(groups: Groups, layout: str, world: int, weight_dtype: torch.dtype) -> PlanSummary:
    """The plan for parameters of these shapes, as one shard has them.

    Args:
        groups: of each param group the shapes of its parameters, in order, and the settings that
            shape their state.
        layout: one of `LAYOUTS`.
        world: ranks that share the blocks.
        weight_dtype: of the tensors that the optimizer steps, where they are gathered ("ddp",
            "zero0"): that which holds all of theirs.

    Raises:
        ValueError: the layout is unknown, or there is no rank.
    """
    if world < 1:
        raise ValueError(f"The world size should be at least 1, got {world}.")
    replicated = layout in ("ddp", "zero0")
    shapes = [shape for of_group, _ in groups for shape in of_group]
    configs = [config for of_group, config in groups for _ in of_group]
    numbers = [number for number, (of_group, _) in enumerate(groups) for _ in of_group]
    stored_spans = _stored_spans([prod(shape) for shape in shapes], shapes, layout, world)
    grids = [grid_of(shape, config) for shape, config in zip(shapes, configs, strict=True)]
    assignment = sharding.assign(grids, stored_spans, replicated)
    cut = () if replicated else sharding.cut_by_boundaries(assignment, stored_spans, grids)
    return PlanSummary(grids, configs, numbers, stored_spans, assignment, cut, replicated, weight_dtype.itemsize)


def _stored_spans(numels: Sequence[int], shapes: Shapes, layout: str, world: int) -> Placement:
    if layout in ("ddp", "zero0"):
        return placement.everywhere(numels, world)
    if layout in ("zero1", "zero2"):
        # DeepSpeed pads the flat buffer to a multiple of 2 W elements.
        offsets = [end - numel for end, numel in zip(accumulate(numels), numels, strict=True)]
        return placement.in_partitions(offsets, numels, max(1, -(-sum(numels) // (2 * world))) * 2, world)
    if layout == "zero3":
        return placement.one_by_one(numels, [-(-numel // world) for numel in numels], world)
    if layout == "fsdp2":
        return placement.by_rows(shapes, world)
    raise ValueError(f"The layout should be one of {', '.join(LAYOUTS)}, got {layout!r}.")


def estimate(
    shapes: Shapes, layout: str, world: int, config: StateConfig, weight_dtype: torch.dtype = torch.float32,
    inverse_update_freq: int = 1,
) -> Estimate:  # fmt: skip
    """What a setting costs with one param group; see `plan_of` for the rest and what is raised."""
    return estimate_of(plan_of([(shapes, config)], layout, world, weight_dtype), inverse_update_freq)


def estimate_of(plan: PlanSummary, inverse_update_freq: int = 1, model: Sequence[int] = (0,)) -> Estimate:
    """What a plan costs; `model`: bytes of each rank besides, or of all alike."""
    return Estimate(
        **memory_of(plan, model),
        sent=max(sum(cost.traffic(plan, rank).values()) for rank in range(plan.world)),
        collectives=cost.collectives(plan),
        flops=max(cost.arithmetic(plan, rank, inverse_update_freq) for rank in range(plan.world)),
        chunks=len(plan.assignment.chunks),
        blocks=sum(grid.num_blocks for grid in plan.grids),
    )


def memory_of(plan: PlanSummary, model: Sequence[int] = (0,), config: StateConfig | None = None) -> dict[str, Any]:
    """`memory`, `least` and `rank_total` of an `Estimate`; see `cost.memory` for `config`."""
    by_rank = [cost.memory(plan, rank, config) for rank in range(plan.world)]
    totals = [sum(kinds.values()) for kinds in by_rank]
    return {
        "memory": {**by_rank[totals.index(max(totals))], "total": max(totals)},
        "least": min(totals),
        "rank_total": max(total + model[rank % len(model)] for rank, total in enumerate(totals)),
    }


def shapes_of(factory: str) -> list[tuple[int, ...]]:
    """The shapes of the parameters of a model that need a gradient.

    Args:
        factory: "package.module:function", which is called without arguments and returns the model.
            It is built on torch's meta device, so that its parameters take no memory.

    Raises:
        ValueError: there is no such function, or it fails, or it returns no model with parameters.
    """
    module, colon, name = factory.partition(":")
    if not (module and colon and name):
        raise ValueError(f"A model is given as package.module:function, got {factory!r}.")
    try:
        build = getattr(import_module(module), name)
        with torch.device("meta"):
            model = build()
    except Exception as error:
        raise ValueError(f"{factory} gave no model: {type(error).__name__}: {error}") from error
    if not isinstance(model, torch.nn.Module):
        raise ValueError(f"{factory} returned a {type(model).__name__}, and not a torch.nn.Module.")
    shapes = [tuple(p.shape) for p in model.parameters() if p.requires_grad]
    if not shapes:
        raise ValueError(f"The model of {factory} has no parameter that needs a gradient.")
    return shapes


def transformer_shapes(parameters: int) -> list[tuple[int, ...]]:
    """The matrix shapes of a decoder with about `parameters` parameters.

    It has d/128 layers of 12 d² parameters each, and an embedding that takes what is left; d is a
    multiple of 128. Norms and biases, which cost little, are left out.

    Raises:
        ValueError: fewer parameters than the smallest such model has.
    """
    width: int = max(128, round(float(128 * parameters / 12) ** (1 / 3) / 128) * 128)
    while width > 128 and 12 * width**2 > parameters:
        width -= 128
    layers = max(1, min(width // 128, parameters // (12 * width**2)))
    rest = (parameters - layers * 12 * width**2) // width
    if rest < 0:
        raise ValueError(f"A model that is made up has at least {12 * 128**2:,} parameters, got {parameters:,}.")
    layer: list[tuple[int, ...]] = [(3 * width, width), (width, width), (4 * width, width), (width, 4 * width)]
    return ([(rest, width)] if rest else []) + layer * layers


def largest_block_size(groups: Groups, layout: str, world: int, weight_dtype: torch.dtype, budget: float) -> int:
    """The largest block size with which no rank needs more than `budget` bytes.

    Args:
        groups: see `plan_of`; those whose block_size is a number keep it.
        layout: likewise. ZeRO has a shard for each group, and the others one for all.
        world: likewise.
        weight_dtype: likewise.
        budget: bytes a rank.

    Raises:
        ValueError: not even blocks of one element fit; names what they need.
    """
    filled = [(shapes, config) for shapes, config in groups if shapes]
    for size in AUTO_BLOCK_SIZES:
        sized = [(s, c._replace(block_size=size) if c.block_size == AUTO else c) for s, c in filled]
        shards = [[group] for group in sized] if layout in ("zero1", "zero2", "zero3") else [sized]
        plans = [plan_of(shard, layout, world, weight_dtype) for shard in shards]
        needed = sum(memory_of(plan)["memory"]["total"] for plan in plans)
        if needed <= budget:
            return size
    raise ValueError(
        f"AdaFisher needs {needed / 1e9:.3g} GB a rank even with blocks of one element, and memory_budget_gb is"
        f" {budget / 1e9:.3g}. Use more ranks, or fisher_dtype=torch.bfloat16."
    )
