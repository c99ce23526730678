"""The optimizer against the oracle: settings, param groups, shapes."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from beside_oracle import FEW, SHAPES, SMALL, Settings, compare, gradients, some_missing, values
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import DEFAULTS, Oracle

from adafisher_dist import AdaFisher

COMBINATIONS = [
    dict(zip(("exponent", "grafting", "max_blocks", "block_grid", "bias_correction", "nesterov"), chosen, strict=True))
    for chosen in itertools.product(
        (1.0, 0.5), ("rms", "none"), (None, 0, 1, 3), ("rows", "flat"), (True, False), (True, False)
    )
]


@pytest.mark.parametrize("setting", COMBINATIONS, ids=lambda setting: "-".join(map(str, setting.values())))
def test_every_combination(setting: Settings) -> None:
    compare(values(FEW), gradients(FEW, 12), block_size=16, **setting)


@pytest.mark.parametrize("rows_per_block", [1, 2, 3, 16])
@pytest.mark.parametrize("exponent", [1.0, 0.5])
@pytest.mark.parametrize("grafting", ["rms", "none"])
def test_rows_per_block(grafting: str, exponent: float, rows_per_block: int) -> None:
    shapes = [*FEW, (3, 6, 34), (2, 45)]
    setting = {"grafting": grafting, "exponent": exponent, "rows_per_block": rows_per_block, "damping": 0.1}
    for max_blocks in (None, 9):
        compare(values(shapes), gradients(shapes, 8), block_size=16, max_blocks=max_blocks, **setting)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    "setting",
    [
        {},
        {"grafting": "none", "nesterov": False},
        {"exponent": 0.5, "inverse_update_freq": 5, "fisher_update_freq": 2},
        {"max_blocks": 3, "bias_correction": False},
        {"block_grid": "flat", "inverse_update_freq": 3},
    ],
    ids=str,
)
def test_packed(setting: Settings, dtype: torch.dtype) -> None:
    shapes = [*FEW, *SMALL, (65,)]
    own = {
        "dtype": dtype,
        "fisher_dtype": dtype,
        "tolerance": 2e-4 if dtype == torch.float32 else 1e-10,
        "damping": 0.1,
    }
    compare(values(shapes), gradients(shapes, 16), packed=True, block_size=16, fisher_decay=0.8, **own, **setting)


@pytest.mark.parametrize("block_grid", ["rows", "flat"])
@pytest.mark.parametrize("block_size", [1, 3, 7, 20, 64, 128, 2000])
def test_shapes_and_block_sizes(block_size: int, block_grid: str) -> None:
    # Thousands of blocks of one would take the oracle long and show nothing new.
    shapes = [s for s in SHAPES if block_size > 3 or np.prod(s) < 1000]
    if block_size == 2000:
        shapes = [s for s in shapes if np.prod(s) <= 130]
    for rows in (1, DEFAULTS["rows_per_block"]):
        setting = {"block_size": block_size, "block_grid": block_grid, "rows_per_block": rows, "damping": 0.1}
        compare(values(shapes), gradients(shapes, 6), **setting)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_each_shape_alone(shape: tuple[int, ...]) -> None:
    # Alone, so that a parameter without elements or blocks is all that the optimizer has.
    compare(values([shape]), gradients([shape], 12), grafting="none", max_blocks=5, damping=0.1)


@pytest.mark.parametrize(
    "setting",
    [
        {},
        {"grafting": "none"},
        {"exponent": 0.5, "nesterov": False},
        {"exponent": 0.5, "grafting": "none", "max_blocks": 2},
        {"bias_correction": False, "block_grid": "flat", "fisher_decay": 0.8},
    ],
    ids=str,
)
@pytest.mark.parametrize("inverse_update_freq", [1, 2, 5, 10])
@pytest.mark.parametrize("fisher_update_freq", [1, 2, 3])
def test_frequencies(fisher_update_freq: int, inverse_update_freq: int, setting: Settings) -> None:
    grads = gradients(SMALL, 34)
    for step in (3, 4, 11):  # its count falls behind the others', and the numbers of its blocks do not
        grads[step][2] = None
    freqs = {"fisher_update_freq": fisher_update_freq, "inverse_update_freq": inverse_update_freq, "rows_per_block": 1}
    compare(values(SMALL), grads, block_size=4, **{"fisher_decay": 0.9, **freqs, **setting})


@pytest.mark.parametrize("grafting", ["rms", "none"])
@pytest.mark.parametrize("shape", [(1, 60), (40, 6)], ids=str)
def test_rare_updates_are_of_plain_blocks_alone(
    shape: tuple[int, ...], grafting: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Where F bounds the update it is updated in every step, and the setting is told of."""
    found = []
    for freq in (1, 5):
        parameter = torch.nn.Parameter(torch.from_numpy(values([shape])[0]))
        optimizer = AdaFisher([("a", parameter)], fisher_update_freq=freq, grafting=grafting)
        for (gradient,) in gradients([shape], 12):
            parameter.grad = torch.from_numpy(gradient)
            optimizer.step()
        updates = optimizer.fisher_stats()["a"].fisher_updates
        assert updates == (12 if freq == 1 or grafting == "rms" else 3)
        found.append(parameter.detach())
    is_plain = grafting == "none" and shape[0] > 1  # a vector has no blocks
    assert torch.equal(*found) == (not is_plain)
    assert ("fisher_update_freq=5 has no effect" in caplog.text) == (grafting == "rms")


def test_a_momentum_that_outlasts_the_fisher_is_told_of(caplog: pytest.LogCaptureFixture) -> None:
    """√V would shrink faster than M where gradients end; the remedy keeps it from that."""
    left = []
    for own in ({"momentum": 0.99}, {"momentum": 0.99, "fisher_decay": 0.99}, {"betas": (0.99, 0.999)}):
        caplog.clear()
        parameter = torch.nn.Parameter(torch.zeros(16, 16))
        optimizer = AdaFisher([parameter], lr=1.0, weight_decay=0.0, **own)
        assert ("Set fisher_decay to 0.99 or more" in caplog.text) == (own == {"momentum": 0.99})
        for step in range(900):
            parameter.grad = torch.ones(16, 16) * (step < 100)
            optimizer.step()
        left.append(float(parameter.detach().abs().max()))
    assert left[0] > 5 * left[1] and left[2] == left[1]
    assert AdaFisher([parameter], betas=(0.9, 0.999)).defaults["fisher_decay"] == 0.97
    assert AdaFisher([parameter], betas=(0.99, 0.999), fisher_decay=0.98).defaults["fisher_decay"] == 0.98


def test_old_factors_differ_from_fresh_ones() -> None:
    # Without this, the test above could pass with factors that are never old.
    settings = {"block_size": 4, "rows_per_block": 1, "fisher_decay": 0.9}
    oracles = [Oracle(values(SMALL), inverse_update_freq=f, **settings) for f in (1, 5)]
    apart = []
    for row in gradients(SMALL, 12):
        a, b = (oracle.step(row)[0] for oracle in oracles)
        apart.append(float(np.abs(a - b).max() / np.abs(a).max()))
    assert apart[0] == 0 and apart[-1] > 0.01


@pytest.mark.parametrize("block_grid", ["rows", "flat"])
@pytest.mark.parametrize("max_blocks", [0, 1, 3, 4, 7, 100])
def test_old_factors_and_max_blocks(max_blocks: int, block_grid: str) -> None:
    # q counts the blocks of the grid, dense or not: a wrong count shows in whose turn it is.
    setting = {"inverse_update_freq": 5, "fisher_decay": 0.8, "max_blocks": max_blocks, "block_grid": block_grid}
    compare(values(SMALL), gradients(SMALL, 30), block_size=4, rows_per_block=1, **setting)


@pytest.mark.parametrize(
    "setting",
    [
        {"damping": 0.01},
        {"damping": 3.0, "eps": 0.5},
        {"momentum": 0.0},
        {"momentum": 0.99, "fisher_decay": 0.999},
        {"fisher_decay": 0.5, "weight_decay": 0.0},
        {"fisher_decay": 0.0},
        {"damping": 0.0, "block_size": 1},
        {"lr": 0.0},
        {"weight_decay": 10.0, "lr": 0.5},
        {"eps": 1e-15},
        {"eps": 1.0, "grafting": "none"},
    ],
    ids=str,
)
@pytest.mark.parametrize("nesterov", [True, False])
def test_other_values_of_the_settings(setting: Settings, nesterov: bool) -> None:
    compare(values(FEW), gradients(FEW, 12), **{"block_size": 16, "nesterov": nesterov, **setting})


GROUPS = [
    (2, {}),
    (1, {"lr": 0.1, "weight_decay": 0.0, "damping": 1.0}),
    (0, {"lr": 5.0}),
    (2, {"momentum": 0.5, "fisher_decay": 0.7, "block_size": 5, "nesterov": False, "eps": 1e-3}),
    (1, {"block_grid": "flat", "grafting": "none", "exponent": 0.5, "max_blocks": 2}),
    (2, {"bias_correction": False, "fisher_update_freq": 2, "inverse_update_freq": 4, "max_blocks": 0}),
    (2, {"fisher_update_freq": 2, "inverse_update_freq": 7, "fisher_decay": 0.8, "block_size": 4, "rows_per_block": 2}),
]

GROUP_SHAPES = [(5, 7), (), (3, 9), (2, 3, 4, 5), (11,), (4, 9), (0,), (2, 18), (6, 3), (13,)]


@pytest.mark.parametrize("missing", [False, True])
def test_groups_with_their_own_settings(missing: bool) -> None:
    groups = [group for group in GROUPS if group[0]]
    grads = gradients(GROUP_SHAPES, 24)
    compare(values(GROUP_SHAPES), some_missing(grads, 1) if missing else grads, groups=groups, block_size=8)


def test_learning_rate_and_weight_decay_may_change() -> None:
    def schedule(step: int) -> Settings:
        return {"lr": 0.1 * np.cos(step / 4) ** 2, "weight_decay": 0.01 * (step % 3)}

    compare(values(FEW), gradients(FEW, 12), schedule=schedule, block_size=16)


random_settings = st.fixed_dictionaries(
    {
        "lr": st.sampled_from([1e-3, 0.1, 1.0]),
        "momentum": st.sampled_from([0.0, 0.5, 0.9, 0.99]),
        "nesterov": st.booleans(),
        "fisher_decay": st.sampled_from([0.0, 0.5, 0.9, 0.95, 0.99]),
        "damping": st.sampled_from([0.03, 0.1, 1.0]),
        "eps": st.sampled_from([1e-15, 1e-8, 1e-2]),
        "block_size": st.integers(1, 40),
        "rows_per_block": st.sampled_from([1, 2, 3, 64]),
        "block_grid": st.sampled_from(["rows", "flat"]),
        "weight_decay": st.sampled_from([0.0, 0.01, 0.5]),
        "bias_correction": st.booleans(),
        "max_blocks": st.sampled_from([None, None, 0, 1, 2, 5]),
        "fisher_update_freq": st.integers(1, 3),
        "inverse_update_freq": st.integers(1, 8),
        "exponent": st.sampled_from([1.0, 0.5]),
        "grafting": st.sampled_from(["rms", "none"]),
    }
)

random_shape = st.lists(st.integers(0, 12), max_size=4).map(tuple).filter(lambda shape: np.prod(shape) <= 200)

random_group = st.tuples(st.lists(random_shape, min_size=1, max_size=3), random_settings)


@settings(max_examples=120, deadline=None)
@given(
    groups=st.lists(random_group, min_size=1, max_size=3),
    steps=st.integers(1, 12),
    seed=st.integers(0, 1000),
    missing=st.booleans(),
)
def test_random_settings(groups: Any, steps: int, seed: int, missing: bool) -> None:
    shapes = [shape for group_shapes, _ in groups for shape in group_shapes]
    grads = gradients(shapes, steps, seed)
    sizes = [(len(group_shapes), setting) for group_shapes, setting in groups]
    compare(values(shapes, seed), some_missing(grads, seed) if missing else grads, groups=sizes)
