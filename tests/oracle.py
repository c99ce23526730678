"""AdaFisher as in DESIGN.md section 2, in plain numpy: one process, float64, a loop over blocks.

Every fast path of the package is compared with this file, so it shares no line with the package
but the coefficients of the steps to A^(−1/2), which test_newton_schulz.py checks. It has no
fallbacks: a block that cannot be inverted is an error here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from adafisher_dist.numerics.factors import root_steps

DEFAULTS: dict[str, Any] = {
    "lr": 1e-3,  # α
    "momentum": 0.9,  # μ
    "nesterov": True,
    "fisher_decay": 0.97,  # ρ
    "damping": 0.01,  # δ
    "eps": 1e-8,  # ε
    "block_size": 128,  # b
    "rows_per_block": 64,
    "block_grid": "rows",
    "weight_decay": 0.01,  # λ
    "bias_correction": True,
    "max_blocks": None,
    "fisher_update_freq": 1,
    "inverse_update_freq": 1,  # f
    "exponent": 0.5,  # p
    "grafting": "rms",
}


def row_groups(
    shape: Sequence[int], block_size: int, block_grid: str = "rows", rows_per_block: int = 1,
    max_blocks: int | None = None,
) -> list[list[list[range]]]:  # fmt: skip
    """A parameter's row groups of blocks of vectors, each a range of its row-major elements."""
    n = math.prod(shape)
    if n == 0:
        return []
    if block_grid == "flat":
        return [[[piece]] for piece in cut(range(n), block_size)]
    assert block_grid == "rows", block_grid
    matrices = matrices_of(shape)
    if by_element(shape, max_blocks):  # cut as the elements that it is, none of them dense
        return [[[piece]] for piece in cut(range(n), block_size)]
    length = len(matrices[0][0])
    if rows_per_block == 1 and len(matrices) == 1 and length < block_size:
        return [[[piece]] for piece in cut(range(n), block_size // length * length)]
    result = []
    for rows in matrices:
        depth = even(len(rows), rows_per_block)
        size = even(length, min(block_size, math.floor(depth * max(block_size / rows_per_block, 2))))
        for members in cut(rows, depth):
            pieces = [cut(row, size) for row in members]
            result.append([list(block) for block in zip(*pieces, strict=True)])
    return result


def by_element(shape: Sequence[int], max_blocks: int | None) -> bool:
    """Whether a parameter is a vector, or a table: a matrix with one side over 8 times the other.

    Of those with a side of 30,000 to 33,000, as of vocabularies, more than 4 times.
    """
    matrix = matrices_of(shape)[0]
    short, long = sorted((len(matrix), len(matrix[0])))
    return len(matrix) == 1 or (max_blocks is None and long > (4 if 30_000 <= long <= 33_000 else 8) * short)


def matrices_of(shape: Sequence[int]) -> list[list[range]]:
    """The matrices that a parameter consists of, each a list of its rows; a vector is one row."""
    sizes = [size for size in shape if size != 1]
    if len(sizes) < 2:
        return [[range(math.prod(shape))]]
    inputs = 1  # what ends a shape: a convolution's window, then the inputs
    while len(sizes) > 2 and sizes[-1] <= 32:
        inputs *= sizes.pop()
    inputs *= sizes.pop()
    rows = cut(range(math.prod(shape)), inputs)
    return cut(rows, sizes[-1])


def blocks_of(
    shape: Sequence[int], block_size: int, block_grid: str = "rows", rows_per_block: int = 1,
    max_blocks: int | None = None,
) -> list[list[tuple[int, int]]]:  # fmt: skip
    """The blocks in order, each as (start, stop) of its vectors in row-major elements."""
    every = row_groups(shape, block_size, block_grid, rows_per_block, max_blocks)
    return [[(vector.start, vector.stop) for vector in block] for row_group in every for block in row_group]


def cut(things: Sequence[Any], length: int) -> list[Any]:
    """Parts of this length; the last one may be shorter."""
    return [things[start : start + length] for start in range(0, len(things), length)]


def even(total: int, most: int) -> int:
    """The length of parts of at most `most`, as few and as equal as can be."""
    return math.ceil(total / math.ceil(total / most))


def refresh_interval(decay: float, fisher_updates: int, freq: int) -> int:
    """n of DESIGN.md: a factor is refreshed every n steps; 1 at first, `freq` when F is full."""
    return max(1, min(fisher_updates, math.floor(freq * (1 - decay**fisher_updates) + 0.5)))


@dataclass
class Block:
    """A block of one parameter: F is a matrix that its vectors share; if not dense, a diagonal."""

    where: np.ndarray  # (vectors, r), elements of the flattened parameter
    number: int  # q: its index, plus the position of its parameter
    dense: bool
    fisher: np.ndarray
    square: np.ndarray  # w of each vector: mean g², averaged as F is
    k: int = 0  # updates of F
    inverse: np.ndarray | None = None  # A^(−p), as it was at the last refresh
    d: float = 0.0  # tr(F̂) / r, as it was at the last refresh


@dataclass
class State:
    """What one parameter keeps between steps."""

    m: np.ndarray
    blocks: list[Block]
    t: int = 0  # steps
    k: int = 0  # updates of F


class Oracle:
    """AdaFisher over a list of parameters, each an array or (array, settings of its own group).

    Attributes:
        params: the parameters as they stand, float64 arrays of their own shapes.
        settings: one dictionary a parameter; change an entry to change it from the next step on.
        skipped: how many calls of `step` were skipped for their gradients.
    """

    def __init__(
        self,
        params: Sequence[np.ndarray | tuple[np.ndarray, Mapping[str, Any]]],
        arithmetic: type = np.float64,
        **hyper: Any,
    ) -> None:
        self.params: list[np.ndarray] = []
        self.settings: list[dict[str, Any]] = []
        self.states: list[State] = []
        self.skipped = 0
        self.largest = float(np.finfo(arithmetic).max)  # of the implementation that this stands behind
        for position, item in enumerate(params):
            theta, own = item if isinstance(item, tuple) else (item, {})
            assert {**hyper, **own}.keys() <= DEFAULTS.keys(), (hyper, own)
            setting = {**DEFAULTS, **hyper, **own}
            blocks: list[Block] = []
            shape, rows = np.shape(theta), setting["rows_per_block"]
            limit = setting["max_blocks"]
            for row_group in row_groups(shape, setting["block_size"], setting["block_grid"], rows, limit):
                alone = setting["block_grid"] == "rows" and by_element(shape, limit)
                dense = not alone and (limit is None or len(blocks) + len(row_group) <= limit)
                for vectors in row_group:
                    where = np.array(vectors)
                    r = where.shape[1]
                    fisher = np.zeros((r, r) if dense else where.shape)
                    blocks.append(Block(where, position + len(blocks), dense, fisher, np.zeros(len(where))))
            self.params.append(np.array(theta, dtype=np.float64))
            self.settings.append(setting)
            self.states.append(State(np.zeros(np.size(theta)), blocks))

    def step(self, grads: Sequence[np.ndarray | None]) -> list[np.ndarray]:
        """Take a step; returns what it added to each parameter. A None gradient changes nothing."""
        assert len(grads) == len(self.params)
        flat = [None if g is None else np.asarray(g, dtype=np.float64).reshape(-1) for g in grads]
        changes = [np.zeros_like(theta) for theta in self.params]
        if self._too_large(flat):
            self.skipped += 1
            return changes
        for theta, g, h, state, change in zip(self.params, flat, self.settings, self.states, changes, strict=True):
            if g is None:
                continue
            assert g.size == theta.size
            u = self._direction(g, h, state).reshape(theta.shape)
            change[...] = -h["lr"] * h["weight_decay"] * theta - h["lr"] * u
            theta += change
        return changes

    def _too_large(self, grads: Sequence[np.ndarray | None]) -> bool:
        for g, state in zip(grads, self.states, strict=True):
            for block in state.blocks if g is not None else []:
                with np.errstate(over="ignore", invalid="ignore"):
                    squares = np.sum(g[block.where] ** 2)
                if not squares <= self.largest:  # so worded that NaN is too large as well
                    return True
        return False

    @staticmethod
    def _direction(g: np.ndarray, h: Mapping[str, Any], state: State) -> np.ndarray:
        """Moves the state by one gradient; returns u, flat."""
        mu, rho = h["momentum"], h["fisher_decay"]
        state.t += 1
        state.m = mu * state.m + (1 - mu) * g
        due = h["grafting"] == "rms" or (state.t - 1) % h["fisher_update_freq"] == 0
        state.k += due
        for block in state.blocks:
            block.k = state.k if block.dense else state.t
            if due or not block.dense:
                part = g[block.where]
                block.square = rho * block.square + (1 - rho) * np.mean(part**2, axis=1)
                if h["grafting"] == "rms" and block.dense and len(part) > 1:
                    w_hat = block.square / ((1 - rho**block.k) if h["bias_correction"] else 1)
                    part = np.divide(part, np.sqrt(w_hat)[:, None], np.zeros_like(part), where=w_hat[:, None] > 0)
                square = part.T @ part / len(part) if block.dense else part**2
                block.fisher = rho * block.fisher + (1 - rho) * square

        m_hat = state.m / (1 - mu**state.t) if h["bias_correction"] else state.m
        if h["nesterov"]:
            m_hat = mu * m_hat + (1 - mu) * g
        u = np.zeros_like(g)
        for block in state.blocks:
            n = refresh_interval(rho, block.k, h["inverse_update_freq"])
            unbias = 1 / (1 - rho**block.k) if h["bias_correction"] else 1
            f_hat, part = block.fisher * unbias, m_hat[block.where]
            if block.dense:
                if state.t == 1 or (block.number + state.t) % n == 0:
                    refresh(block, f_hat, h)
                u[block.where] = dense_direction(block, f_hat, block.square * unbias, part, h)
            else:
                u[block.where] = by_diagonal(part, f_hat, h)
        return u


def by_diagonal(m_hat: np.ndarray, moment: np.ndarray, h: Mapping[str, Any]) -> np.ndarray:
    """Adam's update; none where no gradient has been seen."""
    return np.where(moment > 0, m_hat / (np.sqrt(moment) + h["eps"]), 0)


def refresh(block: Block, f_hat: np.ndarray, h: Mapping[str, Any], noise: float = 0.0) -> None:
    """Recompute A^(−p) and its d; `noise`: relative error that an element of F may have."""
    r = len(f_hat)
    block.d = float(np.trace(f_hat)) / r
    if block.d == 0:
        block.inverse = np.eye(r)  # no direction is stiffer than another; the scale is never used
        return
    a = f_hat / block.d
    a += max(h["damping"] + h["eps"], noise * np.sqrt((a**2).sum(axis=1)).max()) * np.eye(r)
    if h["exponent"] == 1:
        block.inverse = np.linalg.inv(a)
        unit = a @ block.inverse
    else:
        assert h["exponent"] == 0.5, h["exponent"]
        if h["grafting"] == "rms":
            block.inverse = rough_inverse_root(a, h["damping"] + h["eps"])
            return
        values, vectors = np.linalg.eigh(a)
        assert (values > 0).all(), "the block is singular: nothing to compare with"
        block.inverse = vectors @ np.diag(values**-0.5) @ vectors.T
        unit = a @ block.inverse @ block.inverse
    assert np.abs(unit - np.eye(r)).max() < 1e-4, "the block is singular: nothing to compare with"


def dense_direction(
    block: Block, f_hat: np.ndarray, square: np.ndarray, m_hat: np.ndarray, h: Mapping[str, Any]
) -> np.ndarray:
    """The u of a dense block, (vectors, r)."""
    if h["grafting"] == "none":
        s = m_hat @ block.inverse
        d = max(block.d, np.trace(f_hat) / len(f_hat))
        return d ** -h["exponent"] * s if block.d > 0 else np.zeros_like(s)
    assert h["grafting"] == "rms", h["grafting"]
    s = (m_hat if len(m_hat) == 1 else scaled_rows(m_hat, square, h["exponent"])) @ block.inverse
    if not s.any():
        return s
    w = polar_factor(s)
    moment = np.diag(f_hat)[None, :]
    if len(m_hat) > 1:
        root = np.sqrt(square)[:, None]
        w = w * root / (root + h["eps"])
        moment = square[:, None] * moment / (np.mean(moment) or 1)
    a = by_diagonal(m_hat, moment, h)
    return w * np.linalg.norm(a) / np.linalg.norm(w)


def scaled_rows(m_hat: np.ndarray, square: np.ndarray, exponent: float) -> np.ndarray:
    """Rows times ŵ^(−p); 0 where no gradient has been seen."""
    seen = square > 0
    factor = np.zeros_like(square)
    factor[seen] = square[seen] ** -exponent
    return factor[:, None] * m_hat


def rough_inverse_root(a: np.ndarray, damping: float) -> np.ndarray:
    """A^(−1/2) as far as the steps come that the package takes, on A's eigenvalues.

    That each step's coefficients are those nearest to 1 is tested by test_newton_schulz.
    """
    values, vectors = np.linalg.eigh(a)
    root = np.sqrt(values / np.linalg.norm(a))
    x = root
    for first, third, fifth in root_steps(len(a), damping):
        x = first * x + third * x**3 + fifth * x**5
    return vectors @ np.diag(x / np.sqrt(values)) @ vectors.T


def polar_factor(x: np.ndarray) -> np.ndarray:
    """Five steps of Newton and Schulz, with the coefficients of Jordan et al. (2024)."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = x / np.linalg.norm(x)
    for _ in range(5):
        gram = x @ x.T
        x = a * x + b * gram @ x + c * gram @ gram @ x
    return x
