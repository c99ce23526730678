"""The optimizer against the oracle: gradients that are missing, zero, huge, bad, or strided."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from beside_oracle import FEW, SMALL, Settings, compare, gradients, some_missing, values


@pytest.mark.parametrize("grafting", ["rms", "none"])
@pytest.mark.parametrize("max_blocks", [None, 1])
@pytest.mark.parametrize("freqs", [(1, 1), (1, 10), (3, 10), (2, 1)], ids=str)
@pytest.mark.parametrize("zeros", [1, 4, 21, 99])
def test_zero_gradients_at_first(zeros: int, freqs: tuple[int, int], max_blocks: int | None, grafting: str) -> None:
    # 99: never anything else. 21: factors come seldom by then, so blocks go on with the factor of
    # an empty Fisher.
    shapes = [(3, 4), (7,), ()]
    grads = gradients(shapes, 10 if zeros == 99 else zeros + 12)
    for row in grads[:zeros]:
        for g in row:
            g[...] = 0.0
    setting = {"fisher_update_freq": freqs[0], "inverse_update_freq": freqs[1], "fisher_decay": 0.9}
    compare(values(shapes), grads, block_size=4, max_blocks=max_blocks, grafting=grafting, **setting)


@pytest.mark.parametrize("setting", [{}, {"grafting": "none"}, {"max_blocks": 1}, {"exponent": 0.5}], ids=str)
def test_some_elements_never_see_a_gradient(setting: Settings) -> None:
    # An embedding: rows that were never looked up. Blocks that are all zero, and blocks that are
    # partly zero.
    shapes = [(9, 6)]
    grads = gradients(shapes, 12)
    for step, row in enumerate(grads):
        row[0][[1, 2, 3, 7] if step < 6 else [2, 3]] = 0.0
    for block_size, rows, block_grid in ((4, 1, "rows"), (12, 1, "rows"), (4, 64, "rows"), (7, 1, "flat")):
        cuts = {"block_size": block_size, "rows_per_block": rows, "block_grid": block_grid}
        compare(values(shapes), grads, **cuts, **setting)


@pytest.mark.parametrize("exponent", [1.0, 0.5])
@pytest.mark.parametrize("grafting", ["rms", "none"])
@pytest.mark.parametrize("scale", [1e-12, 1e-9, 1e-6, 1e-3, 1e3, 1e6])
def test_scale_of_the_gradient(scale: float, grafting: str, exponent: float) -> None:
    shapes = [(5, 7), (65,), (3,)]
    setting = {"grafting": grafting, "exponent": exponent, "max_blocks": 6, "weight_decay": 0.0}
    # From zero, so that the parameter's own rounding does not hide updates this small.
    compare(values(shapes, scale=0.0), gradients(shapes, 12, scale=scale), block_size=16, **setting)


def test_a_large_parameter_does_not_hide_the_update() -> None:
    # The tests above allow the rounding of a stored parameter. From zero and with a large lr there
    # is none to speak of.
    setting = {"lr": 1.0, "weight_decay": 0.0, "block_size": 16}
    start = values(FEW, scale=0.0)
    for row in gradients(FEW, 12):
        compare(start, [row], **setting)


@pytest.mark.parametrize("inverse_update_freq", [1, 6])
@pytest.mark.parametrize("seed", range(3))
def test_parameters_without_gradients_at_some_steps(seed: int, inverse_update_freq: int) -> None:
    grads = some_missing(gradients(SMALL + FEW, 24, seed), seed)
    for row in grads:
        row[3] = None  # never has one
    for row in grads[:9]:
        row[0] = None  # comes late, and is the first to be counted
    grads[4] = [None] * len(grads[4])
    setting = {"inverse_update_freq": inverse_update_freq, "fisher_decay": 0.8, "fisher_update_freq": 1 + seed}
    compare(values(SMALL + FEW), grads, block_size=4, rows_per_block=1 + 63 * (seed % 2), **setting)


def transposed(tensor: torch.Tensor) -> torch.Tensor:
    """The same values, laid out column by column."""
    return tensor.t().contiguous().t() if tensor.ndim == 2 else tensor


def channels_last(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.ndim == 4 else tensor


def sliced(tensor: torch.Tensor) -> torch.Tensor:
    """Every second column of a wider tensor: not dense."""
    return torch.stack([tensor, tensor + 1], dim=-1)[..., 0]


def plain(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


STRIDES = [plain, transposed, channels_last, sliced]


@pytest.mark.parametrize("block_grid", ["rows", "flat"])
@pytest.mark.parametrize("grad_layout", STRIDES)
@pytest.mark.parametrize("layout", STRIDES)
def test_strides(layout: Any, grad_layout: Any, block_grid: str) -> None:
    shapes = [(5, 7), (2, 3, 4, 5), (9,), (12, 3)]
    setting = {"layout": layout, "grad_layout": grad_layout, "block_grid": block_grid, "max_blocks": 4}
    oracle = compare(values(shapes), gradients(shapes, 4), block_size=10, **setting)
    assert [theta.shape for theta in oracle.params] == shapes


def test_expanded_gradients() -> None:
    # The gradient of a sum is one number with strides of 0.
    compare(
        values([(5, 7)]),
        [[np.ones((5, 7))]] * 3,
        grad_layout=lambda g: g[:1, :1].expand(5, 7),
        block_size=7,
    )


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e160])
@pytest.mark.parametrize("setting", [{}, {"max_blocks": 0}, {"grafting": "none", "exponent": 0.5}], ids=str)
def test_a_bad_gradient_skips_the_whole_call(bad: float, setting: Settings) -> None:
    grads = gradients(SMALL, 20)
    for step in (0, 1, 7, 13):
        grads[step][step % 3] = grads[step][step % 3].copy()
        grads[step][step % 3].flat[-1] = bad
    grads[7][0] = None
    oracle = compare(values(SMALL), grads, block_size=4, inverse_update_freq=5, **setting)
    assert oracle.skipped == 4


@pytest.mark.parametrize(
    ("dtype", "fine", "too_large"), [(torch.float32, 1e17, 2e19), (torch.float64, 1e152, 2e154)], ids=str
)
def test_large_gradients_are_used_as_long_as_squares_do_not_overflow(
    dtype: torch.dtype, fine: float, too_large: float
) -> None:
    # DESIGN.md leaves open how much below the overflow of a block's sum the bound lies; these two
    # are far from it.
    setting = {"dtype": dtype, "fisher_dtype": dtype, "tolerance": 2e-4, "weight_decay": 0.0}
    for size, skipped in ((fine, 0), (too_large, 1)):
        grads = gradients(SMALL, 8)
        grads[0][0][0, :2] = size
        assert compare(values(SMALL, scale=0.0), grads, **setting).skipped == skipped
