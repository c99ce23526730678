"""What `correct.py` checks of stacked blocks: a step's arithmetic on a device beside numpy in float64.

The F, m and w that a step leaves are compared with their formulas; its update u with what the numpy oracle of
tests/oracle.py makes of the F, m and w that came out, however they were rounded.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import common_gpu  # noqa: F401  # it puts tests/ into sys.path
import numpy as np
import torch
from adafisher_dist.numerics.batch import Batch
from correct_runner import Here
from oracle import Block, dense_direction, refresh
from torch import Tensor

from adafisher_dist.blocks.grid import BlockShape
from adafisher_dist.numerics import batch as stacked
from adafisher_dist.numerics import fisher
from adafisher_dist.settings import DEFAULTS, normalize, state_config

Rows = np.ndarray[Any, np.dtype[np.float64]]

SIZES, DEPTHS = (1, 7, 16, 64, 128), (1, 5, 64)
DTYPES = (torch.float32, torch.float64, torch.bfloat16)
SCALES = (1e-6, 1.0, 1e6)  # of the gradients of three blocks
NAN = float("nan")
# How far u may be from numpy's. What is off is multiplied by up to 430, where A of 128 elements is as ill-conditioned
# as damping lets it be, or by up to 3.4445⁵ = 485 in small singular values. On a CPU the worst is 650.
U_ROUNDINGS = 4e3


def host(tensor: Tensor) -> Rows:
    """A tensor of any device as a float64 array."""
    return tensor.detach().double().cpu().numpy().copy()


def same_bits(got: Sequence[Tensor], want: Sequence[Tensor]) -> None:
    assert len(got) == len(want)
    for number, (a, b) in enumerate(zip(got, want, strict=True)):
        assert torch.equal(a, b), f"tensor {number}, {tuple(a.shape)} {a.dtype}, is not the same"


def far(got: Rows, want: Rows) -> float:
    """The largest distance of a block, relative to it."""
    assert np.isfinite(got).all(), "not finite"
    lengths = np.linalg.norm(want, axis=(1, 2))
    return float((np.linalg.norm(got - want, axis=(1, 2)) / np.where(lengths > 0, lengths, 1)).max())


@dataclass(frozen=True, slots=True)
class Case:
    """Blocks of one kind with settings of their own."""

    size: int
    depth: int
    dtype: torch.dtype = torch.float32
    packed: bool = False
    exponent: float = 0.5
    grafting: str = "rms"
    dense: bool = True

    def settings(self, **more: Any) -> dict[str, Any]:
        own = {"fisher_dtype": self.dtype, "packed": self.packed, "exponent": self.exponent, "grafting": self.grafting}
        # More damping than the default: a bfloat16 F is no longer positive semidefinite.
        result = {**DEFAULTS, **own, "damping": 0.3, **more}
        normalize(result)
        return result

    def make(self, device: torch.device) -> Batch:
        """Blocks that have seen nothing."""
        kind, number = BlockShape(self.size, self.depth, self.dense), np.arange(11, 11 + len(SCALES))
        return stacked.allocate(0, kind, state_config(self.settings()), number, device)

    def gradients(self, device: torch.device, steps: int) -> Tensor:
        """Of some steps, each (N, D, B), correlated from step to step."""
        rng = np.random.default_rng([self.size, self.depth])
        shape = (len(SCALES), self.depth, self.size)
        mean, spread = rng.standard_normal(shape), np.exp(rng.standard_normal(shape))
        values = spread * (0.5 * mean + rng.standard_normal((steps, *shape)))
        values *= np.array(SCALES)[:, None, None]
        return torch.tensor(values, dtype=state_config(self.settings()).compute_dtype, device=device)


def step(
    batch: Batch, gradient_NDB: Tensor, t: int, settings: dict[str, Any], should_step: Tensor | None = None
) -> None:
    batch.gradient_NDB.copy_(gradient_NDB)
    stacked.compute(batch, 0, len(batch.fisher), t, t, settings, should_step)


# ---- a step beside numpy ----


def blocks(here: Here) -> str:
    """Steps of dense blocks of all kinds: F, w, m and u."""
    kinds = list(itertools.product(SIZES, DEPTHS, (False, True), (1.0, 0.5), ("rms", "none")))
    told = []
    for dtype in DTYPES:
        apart = max(
            _beside(Case(size, depth, dtype, packed, p, grafting), here.device)
            for size, depth, packed, p, grafting in kinds
        )
        told.append(f"{str(dtype).removeprefix('torch.')} {apart:.1e}")
    return f"{len(kinds)} kinds of blocks; u is apart by at most {', '.join(told)}"


def _beside(case: Case, device: torch.device) -> float:
    """How far u is from numpy's, relative to the block."""
    h, batch, furthest = case.settings(), case.make(device), 0.0
    rounding = float(torch.finfo(batch.config.compute_dtype).eps)
    for t, gradient_NDB in enumerate(case.gradients(device, 2), start=1):
        where, g = f"{case}, step {t}", host(gradient_NDB)
        parts = h["momentum"] * host(batch.momentum_NDB), (1 - h["momentum"]) * g
        square_ND, want_NBB = _expected(batch, g, t, h)
        step(batch, gradient_NDB, t, h)
        apart_NDB = np.abs(host(batch.momentum_NDB) - sum(parts))
        assert (apart_NDB <= 4 * rounding * (np.abs(parts[0]) + np.abs(parts[1]))).all(), f"m, {where}"
        if batch.square_ND is not None and case.grafting == "rms":
            assert np.allclose(host(batch.square_ND), square_ND, 16 * rounding, 0), f"w, {where}"
        size_NB = np.sqrt(want_NBB.diagonal(axis1=1, axis2=2))
        bound = 2.0**-7 if case.dtype == torch.bfloat16 else 4 * (3 + case.depth) * rounding
        off_NBB = np.abs(_whole(batch) - want_NBB) > bound * size_NB[:, :, None] * size_NB[:, None, :]
        assert not np.tril(off_NBB).any(), f"F, {where}"
        apart = far(host(batch.gradient_NDB), _by_oracle(batch, g, t, h))
        assert apart < U_ROUNDINGS * rounding, f"u, {where}: {apart:.2g}"
        furthest = max(furthest, apart)
    return furthest


def _whole(batch: Batch) -> Rows:
    """F as whole blocks, of which the lower triangle counts."""
    return host(stacked.whole(batch, batch.fisher))


def _expected(batch: Batch, g: Rows, t: int, h: dict[str, Any]) -> tuple[Rows, Rows]:
    """w and F after another step."""
    rho = h["fisher_decay"]
    square_ND = (1 - rho) * np.mean(g**2, axis=2)
    if batch.square_ND is not None and h["grafting"] == "rms":
        square_ND += rho * host(batch.square_ND)
        g = g / np.sqrt(square_ND / (1 - rho**t))[:, :, None]
    return square_ND, rho * _whole(batch) + (1 - rho) / g.shape[1] * g.swapaxes(1, 2) @ g


def _by_oracle(batch: Batch, g: Rows, t: int, h: dict[str, Any]) -> Rows:
    """The oracle's u of the F, w and m that the batch has now."""
    mu, unbias = h["momentum"], 1 / (1 - h["fisher_decay"] ** t)
    hat_NDB = mu / (1 - mu**t) * host(batch.momentum_NDB) + (1 - mu) * g
    square_ND = np.ones(g.shape[:2]) if batch.square_ND is None else host(batch.square_ND) * unbias
    noise = 0.005 / (1 - h["fisher_decay"] ** 2) ** 0.5 if batch.config.fisher_dtype == torch.bfloat16 else 0.0
    u_NDB = np.zeros_like(hat_NDB)
    for row, f_hat in enumerate(_whole(batch) * unbias):
        block = Block(np.empty(0), 0, True, f_hat, square_ND[row])
        refresh(block, f_hat, h, noise)
        u_NDB[row] = dense_direction(block, f_hat, square_ND[row], hat_NDB[row], h)
    return u_NDB


# ---- blocks that cannot be factorised, or are no numbers ----


def ladder(here: Here) -> str:
    """Blocks that have no Cholesky factor climb as far as on a CPU, and their neighbours do not notice."""
    for packed, depth in itertools.product((False, True), (1, 3)):
        found, want = (_fall_back(device, packed, depth) for device in (here.device, torch.device("cpu")))
        assert found.fallback_counts == want.fallback_counts == {1: [1, 0, 0], 2: [0, 0, 1]}, (
            f"{found.fallback_counts}, on a CPU {want.fallback_counts}"
        )
        apart = far(host(found.gradient_NDB), host(want.gradient_NDB))
        assert apart < 1e-4, f"packed {packed}, {depth} rows: u apart by {apart:.2g}"
    return f"as on a CPU: rungs {found.fallback_counts}"


def _fall_back(device: torch.device, packed: bool, depth: int) -> Batch:
    case = Case(7, depth, packed=packed, exponent=1.0)
    batch = case.make(device)
    if batch.square_ND is not None:
        batch.square_ND.fill_(1.0)
    whole_NBB = torch.eye(7, device=device).repeat(3, 1, 1)
    whole_NBB[1, 0, 1] = whole_NBB[1, 1, 0] = 1.05  # indefinite by little: more damping helps
    whole_NBB[2, 0, 1] = whole_NBB[2, 1, 0] = 3.0  # by much: the diagonal
    batch.fisher.copy_(fisher.pack(whole_NBB) if packed else whole_NBB)
    # F is used as it is.
    step(batch, case.gradients(device, 1)[0], 2, case.settings(damping=0.01, fisher_update_freq=2))
    return batch


def not_numbers(here: Here) -> str:
    """A block whose F is not finite leaves its neighbours as they would be."""
    for exponent, grafting, depth in itertools.product((1.0, 0.5), ("rms", "none"), (1, 5)):
        case = Case(16, depth, exponent=exponent, grafting=grafting)
        gradient_NDB, updates = case.gradients(here.device, 1)[0], []
        for value in (1.0, 3e37, float("inf"), NAN):
            batch = case.make(here.device)
            step(batch, gradient_NDB, 1, case.settings())
            batch.fisher[1] = value
            step(batch, gradient_NDB, 2, case.settings(fisher_update_freq=2))
            updates.append(host(batch.gradient_NDB)[::2])
        apart = max(far(update, updates[0]) for update in updates)
        assert apart < 1e-6, f"{case}: u of the neighbours apart by {apart:.2g}"
    return "of ∞, NaN and 3e37 in a block's F its neighbours notice nothing"


# ---- the verdict's gate ----


def gate(here: Here) -> str:
    """Shut, it lets nothing change, whatever is in the gradient; open, it changes nothing but roundings."""
    kinds = [(16, 1), (7, 5), (64, 64)]
    cases = [Case(*kind, dtype, packed) for kind in kinds for dtype in DTYPES for packed in (False, True)]
    cases += [Case(7, 5, exponent=1.0), Case(7, 5, grafting="none")]
    cases += [Case(1, 1, dtype, dense=False) for dtype in DTYPES]
    for case in cases:
        _if_stepping(case, here.device)
    return f"{len(cases)} kinds of blocks: shut, all stays as it was; open, a step is as without it"


def _if_stepping(case: Case, device: torch.device) -> None:
    h, wide = case.settings(), torch.finfo(torch.float64 if case.dtype == torch.float64 else torch.float32)
    shut, is_open = (torch.tensor(should_step, dtype=torch.int32, device=device) for should_step in (0, 1))
    gated, twin, free = (case.make(device) for _ in range(3))
    for t, gradient_NDB in enumerate(case.gradients(device, 3), start=1):
        bad_NDB = gradient_NDB.clone()
        bad_NDB[0, 0, 0], bad_NDB[1], bad_NDB[2] = NAN, float("inf"), wide.max / 2
        before = [tensor.clone() for tensor in gated.tensors().values()]
        step(gated, bad_NDB, t, h, shut)
        assert not gated.gradient_NDB.any(), f"{case}: the gate was shut, and u is not 0"
        same_bits(list(gated.tensors().values()), before)
        for batch, should_step in ((gated, is_open), (twin, is_open), (free, None)):
            step(batch, gradient_NDB, t, h, should_step)
        same_bits([gated.gradient_NDB, *gated.tensors().values()], [twin.gradient_NDB, *twin.tensors().values()])
        if case.dtype != torch.bfloat16:  # where a rounding more or less tips another
            apart = far(host(gated.gradient_NDB), host(free.gradient_NDB))
            assert apart < U_ROUNDINGS * wide.eps, f"{case}: with the gate open u is apart by {apart:.2g}"
