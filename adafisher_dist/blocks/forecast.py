"""What the command `estimate` tells: AdaFisher beside AdamW, each with the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

import torch

from adafisher_dist.blocks.cost import PlanSummary
from adafisher_dist.blocks.estimate import AUTO, Shapes, estimate_of, largest_block_size, memory_of, plan_of
from adafisher_dist.blocks.host_time import host_ms
from adafisher_dist.blocks.model_memory import ModelMemory, model_memory
from adafisher_dist.settings import DEFAULTS, StateConfig, normalize, state_config

STORAGES = [(dtype, packed) for dtype in (torch.float32, torch.bfloat16) for packed in (False, True)]


@dataclass(frozen=True, slots=True)
class Asked:
    """What an estimate is asked for.

    Attributes:
        shapes: of the parameters.
        layout: see `estimate.plan_of`.
        world: likewise.
        weight_dtype: of the model's weights and gradients.
        settings: AdaFisher's, those that are the same in all rows.
        budget: GB (10⁹ bytes) a rank for AdaFisher's state and buffers; then the largest block size
            that fits is told too.
        device_tflops: how fast a device is taken to be, in 10¹² operations a second.
        network_gbs: how much a rank is taken to send, in 10⁹ bytes a second.
    """

    shapes: Shapes
    layout: str
    world: int
    weight_dtype: torch.dtype
    settings: Mapping[str, Any]
    budget: float | None = None
    device_tflops: float | None = None
    network_gbs: float | None = None

    def __post_init__(self) -> None:
        for name in ("device_tflops", "network_gbs"):
            rate = getattr(self, name)
            if rate is not None and not 0 < rate < float("inf"):
                raise ValueError(f"--{name.replace('_', '-')} should be a number above 0, got {rate}.")

    @property
    def stepped_dtype(self) -> torch.dtype:
        """Of the tensors that the optimizer steps: DeepSpeed's are fp32."""
        return torch.float32 if self.layout.startswith("zero") else self.weight_dtype

    def config(self, **more: Any) -> StateConfig:
        """The settings that shape the state."""
        group = {**DEFAULTS, **self.settings, **more}
        normalize(group)
        return state_config(group)


def forecast_of(asked: Asked, block_sizes: Sequence[int]) -> dict[str, Any]:
    """Estimates for these block sizes, float32 and bfloat16, packed or not, for json.dumps.

    Returns:
        elements and parameters of the model, layout, world_size, weight_dtype, the assumed
        device_tflops and network_gbs, memory_budget_gb; adamw: of the rank that has most the
        bytes of its `ModelMemory`, and rank_total; settings: of each row what is varied
        (block_size, fisher_dtype, packed), its `Estimate`, rank_total, host_ms, and where rates
        are given device_ms and network_ms; largest_block_size: of each storage the one that fits
        the budget, None where none does, and no storage without a budget.

    Raises:
        TypeError: a setting has the wrong type.
        ValueError: a setting is out of bounds.
    """
    rows: list[dict[str, Any]] = []
    model: list[ModelMemory] = []
    for size in block_sizes:
        plan = plan_of([(asked.shapes, asked.config(block_size=size))], asked.layout, asked.world, asked.stepped_dtype)
        numels = [grid.numel for grid in plan.grids]
        model = [
            model_memory(numels, asked.layout, plan.stored_spans, rank, asked.weight_dtype)
            for rank in range(plan.world if asked.layout == "fsdp2" else 1)  # else of all ranks alike
        ]
        rows += _rows(asked, plan, size, [own.without_optimizer for own in model])
    most = max(model, key=lambda own: own.without_optimizer + own.moments)
    return {
        "elements": sum(map(prod, asked.shapes)),
        "parameters": len(asked.shapes),
        "layout": asked.layout,
        "world_size": asked.world,
        "weight_dtype": str(asked.weight_dtype).removeprefix("torch."),
        "device_tflops": asked.device_tflops,
        "network_gbs": asked.network_gbs,
        "adamw": {**asdict(most), "rank_total": most.without_optimizer + most.moments},
        "settings": rows,
        "memory_budget_gb": asked.budget,
        "largest_block_size": _largest(asked) if asked.budget is not None else [],
    }


def _rows(asked: Asked, plan: PlanSummary, size: int, model: Sequence[int]) -> list[dict[str, Any]]:
    """Of one block size: all storages have the same blocks and owners, other memory."""
    found = asdict(estimate_of(plan, asked.settings["inverse_update_freq"], model))
    slices = len(plan.gathered) if plan.replicated else found["chunks"]
    found["host_ms"] = host_ms(asked.layout, asked.world, plan.stored_spans.most_pieces, slices)
    if asked.device_tflops is not None:
        found["device_ms"] = found["flops"] / asked.device_tflops / 1e9
    if asked.network_gbs is not None:
        found["network_ms"] = found["sent"] / asked.network_gbs / 1e6
    configs = [asked.config(block_size=size, fisher_dtype=dtype, packed=packed) for dtype, packed in STORAGES]
    return [{**found, **_varied(config), **memory_of(plan, model, config)} for config in configs]


def _varied(config: StateConfig) -> dict[str, Any]:
    dtype = str(config.fisher_dtype).removeprefix("torch.")
    return {"block_size": config.block_size, "fisher_dtype": dtype, "packed": config.packed}


def _largest(asked: Asked) -> list[dict[str, Any]]:
    fits: list[dict[str, Any]] = []
    for dtype, packed in STORAGES:
        config = asked.config(block_size=AUTO, memory_budget_gb=asked.budget, fisher_dtype=dtype, packed=packed)
        largest: int | None = None
        with suppress(ValueError):  # none fits
            groups, budget = [(asked.shapes, config)], (asked.budget or 0) * 1e9
            largest = largest_block_size(groups, asked.layout, asked.world, asked.stepped_dtype, budget)
        fits.append({**_varied(config), "block_size": largest})
    return fits
