"""The optimizer against AdamW and a linear solve: no oracle needed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from beside_oracle import Settings, gradients, to_numpy, to_torch, values
from torch import nn

from adafisher_dist import AdaFisher


@pytest.mark.parametrize("setting", [{"max_blocks": 0}, {}], ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=str)
def test_elements_without_blocks_are_adamws(dtype: torch.dtype, tolerance: float, setting: Settings) -> None:
    shapes: list[tuple[int, ...]] = [(), (33,), (1, 300), (7, 1), (1, 1, 6, 1), (3, 28), (28, 3), (2, 3, 4, 5)]
    shapes += [(5, 7), (4, 3, 2, 5)] if "max_blocks" in setting else []
    # From zero, so that the change is exact.
    ours, theirs = ([nn.Parameter(to_torch(v, dtype)) for v in values(shapes, scale=0.0)] for _ in range(2))
    setting = {"momentum": 0.9, "fisher_decay": 0.99, "nesterov": False, "fisher_dtype": dtype, **setting}
    optimizer = AdaFisher(ours, lr=1e-2, weight_decay=0.1, **setting)
    adamw = torch.optim.AdamW(theirs, lr=1e-2, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1)
    for row in gradients(shapes, 25):
        before = [(p.detach().clone(), q.detach().clone()) for p, q in zip(ours, theirs, strict=True)]
        for p, q, g in zip(ours, theirs, row, strict=True):
            p.grad, q.grad = to_torch(g, dtype), to_torch(g, dtype)
        optimizer.step()
        adamw.step()
        for p, q, (p_before, q_before) in zip(ours, theirs, before, strict=True):
            floor = 8 * torch.finfo(dtype).eps * float(q.detach().abs().max())
            difference = float(((p.detach() - p_before) - (q.detach() - q_before)).abs().max())
            assert difference <= tolerance * float((q.detach() - q_before).abs().max()) + floor


@pytest.mark.parametrize("shape", [(4, 6), (2, 11)], ids=str)
def test_the_natural_gradient_is_a_linear_solve(shape: tuple[int, ...]) -> None:
    setting = {"lr": 0.1, "momentum": 0.0, "nesterov": False, "bias_correction": False, "weight_decay": 0.0}
    parameter = nn.Parameter(torch.zeros(shape, dtype=torch.float64))
    optimizer = AdaFisher(
        [parameter],
        grafting="none",
        exponent=1.0,
        fisher_decay=0.95,
        block_size=12,
        rows_per_block=1,
        damping=0.1,
        fisher_dtype=torch.float64,
        **setting,
    )
    seen: list[np.ndarray] = []
    for (g,) in gradients([shape], 12):
        seen.append(g.reshape(-1))
        before = to_numpy(parameter)
        parameter.grad = to_torch(g, torch.float64)
        optimizer.step()
        u = ((before - to_numpy(parameter)) / 0.1).reshape(-1)
        for start in range(0, u.size, 12 if shape != (2, 11) else 11):
            block = slice(start, start + (12 if shape != (2, 11) else 11))
            ages = range(len(seen) - 1, -1, -1)
            f = sum(0.05 * 0.95**age * np.outer(past[block], past[block]) for age, past in zip(ages, seen, strict=True))
            damping = (0.1 + 1e-8) * np.trace(f) / len(f)
            want = np.linalg.solve(f + damping * np.eye(len(f)), g.reshape(-1)[block])
            np.testing.assert_allclose(u[block], want, atol=1e-10 * np.abs(want).max(), rtol=0)
