"""The steps of Newton and Schulz: each is the best of its kind, and A^(−1/2) comes out so."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adafisher_dist.blocks import cost
from adafisher_dist.numerics.factors import LEAST, root_steps
from adafisher_dist.numerics.newton_schulz import ROUGH, inverse_root, steps_from, times_inverse_root


def after(x: np.ndarray, steps: tuple[tuple[float, float, float], ...]) -> np.ndarray:
    for a, b, c in steps:
        x = a * x + b * x**3 + c * x**5
    return x


@pytest.mark.parametrize("least", [2e-3, 8.8e-3, 0.05, 0.3, 0.6])
def test_each_step_is_the_polynomial_nearest_to_one(least: float) -> None:
    """By Chebyshev's alternation: equally far from 1 at four points, on either side in turn.

    No polynomial of the three terms can be nearer everywhere: the difference would change its sign
    three times on positive numbers, and one of three odd terms has at most two such roots.
    """
    low, high = least, 1.0
    for step in steps_from(least):
        x = np.unique(np.concatenate([np.linspace(low, high, 200_001), np.geomspace(low, high, 200_001)]))
        error = after(x, (step,)) - 1
        largest = np.abs(error).max()
        extremes = [value for value in np.split(error, np.flatnonzero(np.diff(np.sign(error))) + 1)]
        found = [part[np.abs(part).argmax()] for part in extremes]
        assert len(found) == 4
        assert np.allclose(np.abs(found), largest, rtol=1e-6)
        low, high = 1 - largest, 1 + largest


@given(st.floats(1e-4, 1.0))
def test_all_from_the_least_on_end_within_the_spread(least: float) -> None:
    x = after(np.geomspace(least, 1, 20_001), steps_from(least))
    assert x.max() / x.min() <= ROUGH * (1 + 1e-11)
    assert abs(x.max() - 1) <= 1 / 3 + 1e-11


@given(st.floats(2e-3, 0.99))
def test_no_step_is_too_many(least: float) -> None:
    steps = steps_from(least)
    x = after(np.geomspace(least, 1, 2001), steps[:-1])
    assert len(steps) == 1 or x.max() / x.min() > ROUGH


@pytest.mark.parametrize("size", [1, 8, 9, 16, 64, 128, 147, 148, 512])
def test_the_estimate_counts_the_same_steps(size: int) -> None:
    assert cost.root_steps(size) == len(root_steps(size, 0.01 + 1e-8))


def block(size: int, rank: int, damping: float, dtype: torch.dtype) -> torch.Tensor:
    """A as it is made of a gradient average of this rank."""
    g = torch.randn(rank, size, generator=torch.Generator().manual_seed(size + rank), dtype=torch.float64)
    f = g.mT @ g
    return (f / f.diagonal().mean() + damping * torch.eye(size, dtype=torch.float64)).to(dtype)


@pytest.mark.parametrize("damping", [1e-3, 0.01, 0.3, 10.0])
@pytest.mark.parametrize(("size", "rank"), [(1, 1), (5, 1), (16, 3), (128, 1), (128, 7), (128, 500), (300, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_inverse_root_of_a_block(size: int, rank: int, damping: float, dtype: torch.dtype) -> None:
    a = block(size, rank, damping, dtype)
    values, vectors = torch.linalg.eigh(a.double())
    x = torch.randn(1, 7, size, generator=torch.Generator().manual_seed(1), dtype=dtype)
    steps, precise = root_steps(size, damping), dtype == torch.float64
    rough, exact = times_inverse_root(None, a[None], steps), inverse_root(a[None])
    for root, spread in ((rough, ROUGH), (exact, 1.0)):
        assert root.dtype == dtype
        # In A's eigenvectors it is diagonal, up to rounding, and by so much the right one.
        by_value = (vectors.mT @ root[0].double() @ vectors * values.sqrt()).diagonal()
        if (damping / (size * (1 + damping))) ** 0.5 >= LEAST:
            assert by_value.min() > 0
            assert by_value.max() / by_value.min() <= spread + (1e-8 if precise else 2e-3)
    product = times_inverse_root(x, a[None], steps)
    assert (product - x @ rough).abs().max() <= (1e-11 if precise else 1e-4) * product.norm()


def test_a_block_that_is_its_damping_alone() -> None:
    a = 0.01 * torch.eye(6)
    assert torch.allclose(inverse_root(a[None]), 10 * torch.eye(6), rtol=1e-5)


@pytest.mark.parametrize("damping", [1e-8, 1e-6, 1e-5, 3e-5, 1e-4, 3e-4])
@pytest.mark.parametrize("size", [32, 64, 128, 512, 1024])
@pytest.mark.parametrize("kind", ["ones", "relu", "normal"])
@pytest.mark.parametrize("exact", [False, True])
def test_what_rounding_leaves_does_not_grow(size: int, kind: str, damping: float, exact: bool) -> None:
    """Of rank one, A's eigenvalues are the damping but for one: some may come out negative."""
    u = torch.randn(size, generator=torch.Generator().manual_seed(size), dtype=torch.float64)
    u = {"ones": torch.ones_like(u), "relu": u.relu(), "normal": u}[kind]
    f = torch.outer(u, u)
    a = (f / f.diagonal().mean() + damping * torch.eye(size, dtype=torch.float64)).float()
    x = torch.randn(1, 7, size, generator=torch.Generator().manual_seed(1))
    steps = root_steps(size, damping)
    found = x @ inverse_root(a[None]) if exact else times_inverse_root(x, a[None], steps)
    # Exactly, by Sherman and Morrison's way: each direction but u's is divided by √δ.
    right = x[0].double() / damping**0.5
    along, norm = u / u.norm(), u.norm().square() / f.diagonal().mean()
    right += torch.outer(right @ along, along) * ((damping / (norm + damping)) ** 0.5 - 1)
    assert torch.isfinite(found).all()
    assert (found[0] - right).norm() <= 1.01 * right.norm()
    assert torch.nn.functional.cosine_similarity(found.double().flatten(), right.flatten(), dim=0) > 0.9
