"""AdaFisher as DESIGN.md section 2 words it, in plain numpy: one process, float64, a loop over blocks, no cleverness.

Every fast path of the package is compared with this file, so it shares no line with the package. It walks no ladder:
a block that cannot be inverted is an error here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

DEFAULTS: dict[str, Any] = {
    "lr": 1e-3,  # α
    "momentum": 0.9,  # μ
    "nesterov": True,
    "fisher_decay": 0.95,  # ρ
    "damping": 0.1,  # δ
    "eps": 1e-8,  # ε
    "block_size": 64,  # b
    "block_grid": "rows",
    "weight_decay": 0.01,  # λ
    "bias_correction": True,
    "max_blocks": None,
    "fisher_update_freq": 1,
    "inverse_update_freq": 1,  # f
    "exponent": 1.0,  # p
    "grafting": "rms",
}


def block_ranges(shape: Sequence[int], block_size: int, block_grid: str = "rows") -> list[tuple[int, int]]:
    """The (start, stop) of each block of a parameter, in elements of its row-major flattening."""
    n = math.prod(shape)
    if n == 0:
        return []
    if block_grid == "flat":
        return [(start, min(start + block_size, n)) for start in range(0, n, block_size)]
    assert block_grid == "rows", block_grid
    rows = shape[0] if len(shape) >= 2 else 1
    length = n // rows
    ranges = []
    if length >= block_size:
        for row in range(rows):
            elements = np.arange(row * length, (row + 1) * length)
            for piece in np.array_split(elements, math.ceil(length / block_size)):
                ranges.append((int(piece[0]), int(piece[-1]) + 1))
    else:
        rows_in_a_block = block_size // length
        for row in range(0, rows, rows_in_a_block):
            ranges.append((row * length, min(row + rows_in_a_block, rows) * length))
    return ranges


def refresh_interval(decay: float, fisher_updates: int, freq: int) -> int:
    """n of DESIGN.md: a factor is refreshed every n steps; 1 at first, `freq` when the Fisher is full."""
    return max(1, min(fisher_updates, math.floor(freq * (1 - decay**fisher_updates) + 0.5)))


@dataclass
class Block:
    """A block of one parameter: F is a matrix, or past `max_blocks` its diagonal alone."""

    start: int
    stop: int
    number: int  # q: its index, plus the position of its parameter
    dense: bool
    fisher: np.ndarray
    inverse: np.ndarray | None = None  # A^(−p), as it was at the last refresh
    d: float = 0.0  # tr(F̂) / r, as it was at the last refresh


@dataclass
class State:
    """What one parameter keeps between steps."""

    m: np.ndarray
    blocks: list[Block]
    t: int = 0  # steps
    k: int = 0  # Fisher updates


class Oracle:
    """AdaFisher over a list of parameters, each an array, or an array with the settings of its own group.

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
            blocks = []
            for start, stop in block_ranges(np.shape(theta), setting["block_size"], setting["block_grid"]):
                r, index = stop - start, len(blocks)
                dense = setting["max_blocks"] is None or index < setting["max_blocks"]
                blocks.append(Block(start, stop, position + index, dense, np.zeros((r, r) if dense else r)))
            self.params.append(np.array(theta, dtype=np.float64))
            self.settings.append(setting)
            self.states.append(State(np.zeros(np.size(theta)), blocks))

    def step(self, grads: Sequence[np.ndarray | None]) -> list[np.ndarray]:
        """One step; returns what was added to each parameter. A parameter whose gradient is None is left alone."""
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
                    squares = np.sum(g[block.start : block.stop] ** 2)
                if not squares <= self.largest:  # so worded that NaN is too large as well
                    return True
        return False

    @staticmethod
    def _direction(g: np.ndarray, h: Mapping[str, Any], state: State) -> np.ndarray:
        """Moves the state by one gradient; returns u, flat."""
        mu, rho = h["momentum"], h["fisher_decay"]
        state.t += 1
        state.m = mu * state.m + (1 - mu) * g
        if (state.t - 1) % h["fisher_update_freq"] == 0:
            state.k += 1
            for block in state.blocks:
                part = g[block.start : block.stop]
                square = np.outer(part, part) if block.dense else part**2
                block.fisher = rho * block.fisher + (1 - rho) * square

        m_hat = state.m / (1 - mu**state.t) if h["bias_correction"] else state.m
        if h["nesterov"]:
            m_hat = mu * m_hat + (1 - mu) * g
        n = refresh_interval(rho, state.k, h["inverse_update_freq"])
        u = np.zeros_like(g)
        for block in state.blocks:
            f_hat = block.fisher / (1 - rho**state.k) if h["bias_correction"] else block.fisher
            part = m_hat[block.start : block.stop]
            if block.dense:
                if state.t == 1 or (block.number + state.t) % n == 0:
                    refresh(block, f_hat, h)
                u[block.start : block.stop] = dense_direction(block, f_hat, part, h)
            else:
                u[block.start : block.stop] = part / (np.sqrt(f_hat) + h["eps"])
        return u


def refresh(block: Block, f_hat: np.ndarray, h: Mapping[str, Any]) -> None:
    """Makes A^(−p) anew, and the d that goes with it."""
    r = len(f_hat)
    block.d = float(np.trace(f_hat)) / r
    if block.d == 0:
        block.inverse = np.eye(r)  # no direction is stiffer than another; the scale is never used
        return
    a = f_hat / block.d + (h["damping"] + h["eps"]) * np.eye(r)
    if h["exponent"] == 1:
        block.inverse = np.linalg.inv(a)
        unit = a @ block.inverse
    else:
        assert h["exponent"] == 0.5, h["exponent"]
        values, vectors = np.linalg.eigh(a)
        assert (values > 0).all(), "the block is singular: nothing to compare with"
        block.inverse = vectors @ np.diag(values**-0.5) @ vectors.T
        unit = a @ block.inverse @ block.inverse
    assert np.abs(unit - np.eye(r)).max() < 1e-4, "the block is singular: nothing to compare with"


def dense_direction(block: Block, f_hat: np.ndarray, m_hat: np.ndarray, h: Mapping[str, Any]) -> np.ndarray:
    """The u of a dense block."""
    s = block.inverse @ m_hat
    if h["grafting"] == "none":
        return block.d ** -h["exponent"] * s if block.d > 0 else np.zeros_like(s)
    assert h["grafting"] == "rms", h["grafting"]
    diagonal = np.diag(f_hat)
    if not diagonal.any() or not s.any():
        return np.zeros_like(s)
    return s * np.linalg.norm(m_hat / (np.sqrt(diagonal) + h["eps"])) / np.linalg.norm(s)
