"""What a model and AdamW's state take on a rank, by layout: bytes, from integers alone.

What the wrappers hold was seen in torch's and DeepSpeed's own tensors; tests/test_estimate.py
compares.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from adafisher_dist.blocks.placement import Placement

MASTER_BYTES = 4


@dataclass(frozen=True, slots=True)
class ModelMemory:
    """Bytes of parameters that need a gradient, on one rank.

    Attributes:
        weights: in the model's dtype.
        masters: DeepSpeed's fp32 copies of what the optimizer steps.
        gradients: at most, from the end of a backward to the end of the step.
        moments: AdamW's two, in the dtype of the tensors that it steps.
    """

    weights: int
    masters: int
    gradients: int
    moments: int

    @property
    def without_optimizer(self) -> int:
        """Weights, masters and gradients."""
        return self.weights + self.masters + self.gradients


def model_memory(
    numels: Sequence[int], layout: str, placement: Placement, rank: int, dtype: torch.dtype
) -> ModelMemory:
    """What a rank holds of a model that is in `dtype`.

    | layout | weights | masters | gradients |
    | --- | --- | --- | --- |
    | ddp | whole | – | whole |
    | zero0 | whole | whole, of a 16-bit model | whole; of a 16-bit model also in fp32 |
    | zero1 | whole | shared out | whole until they are reduced; then fp32, shared out |
    | zero2 | whole | shared out | shared out; in the step in fp32 |
    | zero3 | shared out | shared out | shared out; in the step also in fp32 |
    | fsdp2 | shared out | – | shared out |

    Buckets for communication, and parameters that are gathered for a forward or backward, are not
    counted.

    Args:
        numels: elements of each parameter.
        layout: see `estimate.plan_of`.
        placement: which of them each rank stores.
        rank: of those.
        dtype: of the model's weights and gradients.
    """
    size, world = dtype.itemsize, len(placement)
    whole = sum(numels)
    if layout == "ddp":
        return ModelMemory(whole * size, 0, whole * size, 2 * whole * size)
    if layout == "zero0":
        in_fp32 = 0 if size == MASTER_BYTES else whole * MASTER_BYTES
        return ModelMemory(whole * size, in_fp32, whole * size + in_fp32, 2 * whole * MASTER_BYTES)
    if layout == "fsdp2":
        own = placement.numels[rank] * size
        return ModelMemory(own, 0, own, 2 * own)
    # With DeepSpeed's padding: behind a flat buffer, at stage 3 behind each parameter.
    padded = sum(-(-numel // world) for numel in numels) if layout == "zero3" else placement.parts[0].length
    in_fp32 = padded * MASTER_BYTES
    if layout == "zero3":
        return ModelMemory(padded * size, in_fp32, padded * size + in_fp32, 2 * in_fp32)
    gradients = max(whole * size if layout == "zero1" else padded * size, in_fp32)
    return ModelMemory(padded * world * size, in_fp32, gradients, 2 * in_fp32)
