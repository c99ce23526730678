"""The numpy oracle by itself, against what is known without it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
from beside_oracle import FEW, SHAPES, Settings, gradients, values
from oracle import DEFAULTS, Oracle, blocks_of, by_element, matrices_of, polar_factor, refresh_interval


@pytest.mark.parametrize("grid", ["rows", "flat"])
@pytest.mark.parametrize("rows", [1, 2, 16])
@pytest.mark.parametrize("size", [1, 2, 7, 16, 64, 1000])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_oracle_blocks_are_a_partition(shape: tuple[int, ...], size: int, rows: int, grid: str) -> None:
    for limit in (None, 10**6):  # which tells whether there are tables
        blocks = blocks_of(shape, size, grid, rows, limit)
        ranges = list(itertools.chain.from_iterable(blocks))
        covered = [element for start, stop in ranges for element in range(start, stop)]
        assert sorted(covered) == list(range(int(np.prod(shape))))
        assert all(0 < stop - start <= size for start, stop in ranges)
        if not covered or grid == "flat" or by_element(shape, limit):
            assert blocks == [[(start, min(start + size, len(covered)))] for start in range(0, len(covered), size)]
        else:
            assert_blocks_are_of_rows(blocks, len(matrices_of(shape)[0][0]), rows)


def assert_blocks_are_of_rows(blocks: list[list[tuple[int, int]]], length: int, rows: int) -> None:
    """Rows have this length, and at most `rows` of them share a block, or are one together."""
    for block in blocks:
        assert len(block) <= rows and len({stop - start for start, stop in block}) == 1
        steps = {after - before for (before, _), (after, _) in itertools.pairwise(block)}
        assert steps <= {length}, "the same columns of consecutive rows"
        for start, stop in block:
            inside_a_row = start // length == (stop - 1) // length
            whole_rows = start % length == 0 and stop % length == 0
            assert inside_a_row or whole_rows


def test_oracle_blocks_by_hand() -> None:
    def alone(*ranges: tuple[int, int]) -> list[list[tuple[int, int]]]:
        return [[pair] for pair in ranges]

    assert blocks_of((2, 10), 4) == alone((0, 4), (4, 8), (8, 10), (10, 14), (14, 18), (18, 20))
    assert blocks_of((2, 10), 4, "flat") == alone((0, 4), (4, 8), (8, 12), (12, 16), (16, 20))
    assert blocks_of((2, 10), 6, rows_per_block=2) == [[(0, 5), (10, 15)], [(5, 10), (15, 20)]]
    assert blocks_of((5, 3), 7) == alone((0, 6), (6, 12), (12, 15))
    assert blocks_of((5, 3), 7, rows_per_block=4) == [[(0, 3), (3, 6), (6, 9)], [(9, 12), (12, 15)]]
    assert blocks_of((5, 3), 7, "flat", 4) == alone((0, 7), (7, 14), (14, 15))
    assert blocks_of((), 64) == blocks_of((), 1, "flat", 16) == alone((0, 1))
    assert blocks_of((7,), 3) == blocks_of((1, 7), 3, rows_per_block=16) == alone((0, 3), (3, 6), (6, 7))
    assert blocks_of((2, 8), 4) == blocks_of((2, 8), 4, "flat")
    # Two matrices: the first one's last row shares nothing with the second one's first.
    first, second = ([[(a, a + 33), (a + 33, a + 66)], [(a + 66, a + 99)]] for a in (0, 99))
    assert blocks_of((2, 3, 33), 33, rows_per_block=2, max_blocks=4) == first + second


def test_oracle_tables_by_hand() -> None:
    for shape in ((2, 17), (17, 2), (3, 1, 25), (25, 3, 1), (2, 3, 2, 5), (5, 2, 40), (2, 10, 1, 3)):
        assert by_element(shape, None) and not by_element(shape, 10**6)
        n = int(np.prod(shape))
        assert blocks_of(shape, n, rows_per_block=2) == [[(0, n)]]
    for shape in ((2, 16), (16, 2), (3, 24, 1), (3, 3, 2, 4), (5, 5, 40)):
        assert not by_element(shape, None)
        assert blocks_of(shape, 4, rows_per_block=2) == blocks_of(shape, 4, rows_per_block=2, max_blocks=10**6)


def test_oracle_refresh_intervals_by_hand() -> None:
    # f (1 − 0.5^k) for f = 10 is 5, 7.5, 8.75, 9.4, 9.7, ..., and k holds it back at first.
    assert [refresh_interval(0.5, k, 10) for k in (1, 2, 3, 8, 9, 10, 11, 50)] == [1, 2, 3, 8, 9, 10, 10, 10]
    # For ρ = 0.95 it rises by about f / 20 a step; 10 (1 − 0.95^3) = 1.43 and 10 (1 − 0.95^4) =
    # 1.85.
    assert [refresh_interval(0.95, k, 10) for k in (1, 3, 4, 200)] == [1, 1, 2, 10]
    assert {refresh_interval(0.95, k, 1) for k in range(1, 100)} == {1}
    assert refresh_interval(0.5, 2, 2) == 2  # 1.5: halves go up


def test_oracle_first_step_by_hand() -> None:
    # t = 1, so m̂ = g and F̂ = g gᵀ = [[9, 12], [12, 16]], d = 25/2, A = F̂/12.5 + 0.1 I, whose
    # inverse along g is 1/2.1.
    plain = {"eps": 0.0, "weight_decay": 0.0, "lr": 1.0, "damping": 0.1, "block_grid": "flat"}
    oracle = Oracle([np.zeros(2)], grafting="none", exponent=1.0, **plain)
    oracle.step([np.array([3.0, 4.0])])
    np.testing.assert_allclose(oracle.params[0], -np.array([3.0, 4.0]) / (2.1 * 12.5), rtol=1e-13)
    oracle = Oracle([np.zeros(2)], grafting="none", exponent=0.5, **plain)
    oracle.step([np.array([3.0, 4.0])])
    np.testing.assert_allclose(oracle.params[0], -np.array([3.0, 4.0]) / (2.1 * 12.5) ** 0.5, rtol=1e-13)
    oracle = Oracle([np.zeros(2)], **plain)  # of one vector, the polar factor is its direction
    oracle.step([np.array([3.0, 4.0])])
    np.testing.assert_allclose(oracle.params[0], -np.array([0.6, 0.8]) * 2**0.5, rtol=1e-13)  # as long as (1, 1)


def test_oracle_of_two_rows_that_share_a_block_by_hand() -> None:
    g = np.array([[3.0, 0.0], [0.0, 4.0]])
    # F̂ is the mean of diag(9, 0) and diag(0, 16); d = 6.25; A = diag(0.72, 1.28) + 0.1 I.
    oracle = Oracle([np.zeros((2, 2))], eps=0.0, weight_decay=0.0, lr=1.0, damping=0.1, grafting="none", exponent=1.0)
    oracle.step([g])
    np.testing.assert_allclose(oracle.params[0], -np.array([[3 / 0.82, 0], [0, 4 / 1.38]]) / 6.25, rtol=1e-13)
    # ŵ = 4.5, 8, so F̂ is the mean of diag(2, 0) and diag(0, 2), and A = 1.1 I: the polar factor's
    # iteration sees diag(√2, √2) / 2.
    oracle = Oracle([np.zeros((2, 2))], eps=0.0, weight_decay=0.0, lr=1.0, damping=0.1)
    oracle.step([g])
    x = np.full(2, 0.5**0.5)
    for _ in range(5):
        x = 3.4445 * x - 4.7750 * x**3 + 2.0315 * x**5
    # v is 4.5 · 1 where the 3 is, and 8 · 1 where the 4 is: Adafactor's update is diag(√2, √2), of
    # norm 2.
    np.testing.assert_allclose(oracle.params[0], -2 * np.diag(x) / np.linalg.norm(x), rtol=1e-13)
    np.testing.assert_allclose(oracle.states[0].blocks[0].fisher, 0.03 * np.eye(2), rtol=1e-13)


def test_the_iteration_finds_the_polar_factor() -> None:
    rng = np.random.default_rng(0)
    left, right = (np.linalg.qr(rng.standard_normal((20, 20)))[0] for _ in range(2))
    for singular_values in (np.linspace(0.1, 1, 20), np.geomspace(0.02, 1, 20)):
        found = np.linalg.svd(polar_factor(left * singular_values @ right), compute_uv=False)
        assert found.min() > 0.65 and found.max() < 1.25, found


def adamw_in_numpy(theta: np.ndarray, grads: Sequence[np.ndarray], h: Settings) -> np.ndarray:
    m = v = np.zeros_like(theta)
    for t, g in enumerate(grads, 1):
        m = h["momentum"] * m + (1 - h["momentum"]) * g
        v = h["fisher_decay"] * v + (1 - h["fisher_decay"]) * g * g
        hats = m / (1 - h["momentum"] ** t), v / (1 - h["fisher_decay"] ** t)
        theta = theta - h["lr"] * (h["weight_decay"] * theta + hats[0] / (np.sqrt(hats[1]) + h["eps"]))
    return theta


@pytest.mark.parametrize(("shape", "setting"), [((5, 7), {"max_blocks": 0}), ((1, 35, 1), {}), ((), {})], ids=str)
def test_oracle_is_adamw(shape: tuple[int, ...], setting: Settings) -> None:
    """Without blocks, as vectors are."""
    start, grads = values([shape])[0], [row[0] for row in gradients([shape], 12)]
    oracle = Oracle([start], nesterov=False, **setting)
    for g in grads:
        oracle.step([g])
    np.testing.assert_allclose(oracle.params[0], adamw_in_numpy(start, grads, DEFAULTS), rtol=1e-12)


def test_oracle_with_a_gradient_missing_or_not_finite() -> None:
    start, grads = values(FEW), gradients(FEW, 3)
    a, b = Oracle(start, block_size=16), Oracle(start, block_size=16)
    bad = [g.copy() for g in grads[2]]
    bad[1][0, 0] = np.nan
    for row in (grads[0], bad, [None] * len(FEW), grads[1]):
        a.step(row)
    for row in grads[:2]:
        b.step(row)
    assert a.skipped == 1 and all(np.array_equal(x, y) for x, y in zip(a.params, b.params, strict=True))
