"""The optimizer and the numpy oracle over the same gradients.

A step is judged by what it added to the parameter, block by block, so that neither a large
parameter nor a large neighbour hides a wrong update.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from oracle import Oracle, blocks_of
from torch import nn

from adafisher_dist import AdaFisher

Gradients = list[list[np.ndarray | None]]  # [step][parameter]

Settings = dict[str, Any]

SHAPES = [(), (1,), (3,), (5, 7), (64,), (65,), (4, 3, 2, 5), (17, 130), (33, 20), (4, 1), (1, 9), (0,), (3, 0)]


SHAPES += [(3, 6, 34), (2, 3, 4, 5), (40, 2), (10, 130)]  # three matrices; tables


FEW = [(3,), (5, 7), (), (4, 3, 2, 5), (6, 45)]  # at blocks of 16: vectors, whole rows, cut ones, a short last block

SMALL = [(4, 6), (11,), (3, 2, 2)]  # at blocks of 4 and one row each: 8 + 3 (elements alone) + 3 blocks


def values(shapes: Sequence[tuple[int, ...]], seed: int = 0, scale: float = 0.1) -> list[np.ndarray]:
    rng = np.random.default_rng([seed, 1])
    return [np.asarray(scale * rng.standard_normal(shape)) for shape in shapes]


def gradients(shapes: Sequence[tuple[int, ...]], steps: int, seed: int = 0, scale: float = 1.0) -> Gradients:
    """Random gradients, correlated from step to step, with another scale for each row."""
    rng = np.random.default_rng([seed, 2])
    mean = [rng.standard_normal(shape) for shape in shapes]
    size = [scale * np.exp(1.5 * rng.standard_normal(shape[:1] + (1,) * (len(shape) - 1))) for shape in shapes]
    return [
        [np.asarray(s * (0.5 * m + rng.standard_normal(shape))) for s, m, shape in zip(size, mean, shapes, strict=True)]
        for _ in range(steps)
    ]


def to_torch(array: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    return torch.tensor(array, dtype=torch.float64).to(dtype)


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().double().numpy().copy()


def assert_blocks_agree(
    got: np.ndarray, want: np.ndarray, scale: np.ndarray, floor: np.ndarray, where: str, setting: Settings
) -> None:
    """|got − want| ≤ the vector's largest `scale` + `floor`, in each vector of each block."""
    assert np.isfinite(got).all(), where
    shape = want.shape
    got, want, scale, floor = (a.reshape(-1) for a in (got, want, scale, floor))
    cuts = [setting[name] for name in ("block_size", "block_grid", "rows_per_block", "max_blocks")]
    for start, stop in itertools.chain.from_iterable(blocks_of(shape, *cuts)):
        vector = slice(start, stop)
        error, bound = np.abs(got - want)[vector], scale[vector].max() + floor[vector]
        assert (error <= bound).all(), (
            f"{where}, elements [{start}, {stop}): error {error.max():.3g} > {bound.max():.3g}, "
            f"largest expected {np.abs(want[vector]).max():.3g}"
        )


def compare(
    start: Sequence[np.ndarray],
    grads: Gradients,
    *,
    groups: Sequence[tuple[int, Settings]] | None = None,
    schedule: Callable[[int], Settings] = lambda step: {},
    dtype: torch.dtype = torch.float64,
    fisher_dtype: torch.dtype = torch.float64,
    packed: bool = False,
    tolerance: float = 1e-10,
    layout: Callable[[torch.Tensor], torch.Tensor] | None = None,
    grad_layout: Callable[[torch.Tensor], torch.Tensor] | None = None,
    **hyper: Any,
) -> Oracle:
    """Runs both over the same gradients and compares every step; returns the oracle.

    Args:
        start: the parameters, first rounded to `dtype`.
        groups: (number of parameters, settings) of each group, in order.
        schedule: settings for all groups at a step.
        layout: what strides the parameters get; `grad_layout` likewise.
    """
    layout = layout or torch.Tensor.clone
    grad_layout = grad_layout or layout
    parameters = [nn.Parameter(layout(to_torch(value, dtype))) for value in start]
    groups = groups or [(len(parameters), {})]
    assert sum(number for number, _ in groups) == len(parameters)
    own = [setting for number, setting in groups for _ in range(number)]
    rest = iter(parameters)
    torch_groups = [{"params": list(itertools.islice(rest, number)), **setting} for number, setting in groups]
    optimizer = AdaFisher(torch_groups, **hyper, fisher_dtype=fisher_dtype, packed=packed)
    oracle = Oracle(
        [(to_numpy(p), setting) for p, setting in zip(parameters, own, strict=True)],
        arithmetic=np.float64 if dtype == torch.float64 else np.float32,
        **hyper,
    )
    moved = [np.zeros(value.shape) for value in start]
    roundings = torch.finfo(dtype).eps  # what storing the parameter costs, relative to it
    for step, row in enumerate(grads):
        for group in optimizer.param_groups:
            group.update(schedule(step))
        for setting in oracle.settings:
            setting.update(schedule(step))
        before = [to_numpy(p) for p in parameters]
        for p, g in zip(parameters, row, strict=True):
            p.grad = None if g is None else grad_layout(to_torch(g, dtype))
        changes = oracle.step([None if p.grad is None else to_numpy(p.grad) for p in parameters])
        optimizer.step()
        for index, (p, change) in enumerate(zip(parameters, changes, strict=True)):
            after, where = to_numpy(p), f"step {step}, parameter {index} {tuple(p.shape)}"
            assert p.dtype == dtype and p.shape == start[index].shape
            if not change.any():
                assert np.array_equal(after, before[index]), f"{where} moved; it should not"
                continue
            moved[index] += np.abs(change)
            floor = 4 * roundings * np.maximum(np.abs(before[index]), np.abs(after))
            scale = tolerance * np.abs(change)
            assert_blocks_agree(after - before[index], change, scale, floor, where, oracle.settings[index])
            scale = tolerance * moved[index]
            assert_blocks_agree(
                after, oracle.params[index], scale, (step + 1) * floor, f"{where}, in all", oracle.settings[index]
            )
    return oracle


def some_missing(grads: Gradients, seed: int) -> Gradients:
    rng = np.random.default_rng([seed, 3])
    return [[None if rng.random() < 0.3 else g for g in row] for row in grads]
