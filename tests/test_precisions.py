"""The optimizer against the oracle: parameters and Fisher in float32 and in 16 bits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from beside_oracle import FEW, Settings, compare, gradients, to_numpy, to_torch, values
from oracle import Oracle
from torch import nn

from adafisher_dist import AdaFisher


@pytest.mark.parametrize(
    "setting",
    [
        {},
        {"grafting": "none", "lr": 1e-2},
        {"exponent": 0.5, "max_blocks": 3},
        {"inverse_update_freq": 5, "fisher_update_freq": 2},
        {"block_grid": "flat", "nesterov": False, "bias_correction": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("scale", [1e-12, 1e-6, 1.0, 1e6])
def test_float32(scale: float, setting: Settings) -> None:
    shapes = [*FEW, (65,), (4, 130), (17, 130)]
    # Rounding times the condition number: up to block_size/damping = 640; an inverse that is kept
    # has most of it.
    float32 = {
        "dtype": torch.float32,
        "fisher_dtype": torch.float32,
        "tolerance": 3e-4,
        "damping": 0.1,
        "block_size": 64,
    }
    start = values(shapes, scale=0.0 if scale < 1e-6 else 1e-2)
    compare(start, gradients(shapes, 12, scale=scale), **float32, **setting)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "setting", [{}, {"grafting": "none", "exponent": 0.5}, {"inverse_update_freq": 4, "max_blocks": 2}], ids=str
)
def test_low_precision_parameters_are_rounded_once(dtype: torch.dtype, setting: Settings) -> None:
    shapes = [*FEW, (65,)]
    parameters = [nn.Parameter(to_torch(v, dtype)) for v in values(shapes)]
    hyper = {"lr": 0.05, "block_size": 16, "damping": 0.1, **setting}
    optimizer = AdaFisher(parameters, **hyper)
    oracle = Oracle([to_numpy(p) for p in parameters], arithmetic=np.float32, **hyper)
    for step, row in enumerate(gradients(shapes, 12)):
        for index, (p, g) in enumerate(zip(parameters, row, strict=True)):
            p.grad = to_torch(g, dtype)
            oracle.params[index] = to_numpy(p)  # fed the rounded parameter, so that roundings do not add up
        changes = oracle.step([to_numpy(p.grad) for p in parameters])
        optimizer.step()
        for p, want, change in zip(parameters, oracle.params, changes, strict=True):
            got = to_numpy(p)
            half_an_ulp = 0.5 * np.maximum(np.abs(got), np.abs(want)) * torch.finfo(dtype).eps
            # float16 is coarser still near zero; the last term is what float32 may differ by before
            # rounding.
            slack = half_an_ulp + torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
            slack = slack * 1.001 + (2e-4 * np.abs(change).max() if change.size else 0.0)
            assert (np.abs(got - want) <= slack).all(), (step, p.shape)


@pytest.mark.parametrize("setting", [{}, {"grafting": "none"}, {"exponent": 0.5, "max_blocks": 2}], ids=str)
def test_a_bfloat16_fisher_is_close(setting: Settings) -> None:
    # bfloat16 rounds F̂ / d by up to about r / 250, and the damping says what that does to the
    # inverse.
    shapes = [*FEW, (33, 20)]
    dtypes = {"dtype": torch.float32, "fisher_dtype": torch.bfloat16}
    for damping, tolerance in ((0.1, 0.5), (1.0, 0.06)):
        own = {"damping": damping, "tolerance": tolerance, "block_size": 16, **dtypes, **setting}
        compare(values(shapes, scale=1e-2), gradients(shapes, 30), **own)
