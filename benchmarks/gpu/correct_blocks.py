"""Checks of stacked blocks for `correct.py`: a step's arithmetic on a device against float64 numpy.

The F, m and w that a step leaves are compared with their formulas; its update u with what the numpy
oracle of tests/oracle.py makes of the F, m and w that came out, however they were rounded.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import common_gpu  # noqa: F401  # it puts tests/ into sys.path
import numpy as np
import torch
from correct_runner import Here
from oracle import Block, dense_direction, refresh
from torch import Tensor

from adafisher_dist.blocks.grid import BlockShape
from adafisher_dist.numerics.block_stack import BlockStack, allocate
from adafisher_dist.numerics.block_step import StepContext, update_blocks
from adafisher_dist.numerics.packing import pack
from adafisher_dist.numerics.precision import full_precision
from adafisher_dist.settings import DEFAULTS, normalize, state_config, step_settings

Rows = np.ndarray[Any, np.dtype[np.float64]]

SIZES, ROWS = (1, 7, 16, 64, 128), (1, 5, 64)
DTYPES = (torch.float32, torch.float64, torch.bfloat16)
WORKERS = min(12, len(os.sched_getaffinity(0)))
SCALES = (1e-6, 1.0, 1e6)  # of the gradients of three blocks
NAN = float("nan")
# How far u may be from numpy's. What is off is multiplied by up to 430, where A of 128 elements is
# as ill-conditioned as damping lets it be, or by up to 3.4445⁵ = 485 in small singular values. On a
# CPU the worst is 650.
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
    rows: int
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

    def make(self, device: torch.device) -> BlockStack:
        """Blocks that have seen nothing."""
        shape, number = BlockShape(self.size, self.rows, self.dense), np.arange(11, 11 + len(SCALES))
        return allocate(0, shape, state_config(self.settings()), number, device)

    def gradients(self, device: torch.device, steps: int) -> Tensor:
        """Of some steps, each (N, D, B), correlated from step to step."""
        rng = np.random.default_rng([self.size, self.rows])
        shape = (len(SCALES), self.rows, self.size)
        mean, spread = rng.standard_normal(shape), np.exp(rng.standard_normal(shape))
        values = spread * (0.5 * mean + rng.standard_normal((steps, *shape)))
        values *= np.array(SCALES)[:, None, None]
        return torch.tensor(values, dtype=state_config(self.settings()).compute_dtype, device=device)


def step(
    stack: BlockStack, gradient_NRB: Tensor, t: int, settings: dict[str, Any], should_step: Tensor | None = None
) -> Tensor:
    """The update."""
    update_NRB = gradient_NRB.clone()
    context = StepContext(step_settings(settings), t, t, should_step)
    with full_precision(stack.device):
        for part, where in stack.parts(0, len(stack)):
            update_blocks(part, update_NRB[where], context)
    return update_NRB


# ---- a step beside numpy ----


def blocks(here: Here) -> str:
    """Steps of dense blocks of all kinds: F, w, m and u."""
    kinds = list(itertools.product(SIZES, ROWS, (False, True), (1.0, 0.5), ("rms", "none")))
    cases = [
        Case(size, rows, dtype, packed, p, grafting) for dtype in DTYPES for size, rows, packed, p, grafting in kinds
    ]
    # Processes of their own, since a kernel takes seconds to compile, and there are dozens.
    pool = ProcessPoolExecutor(WORKERS, multiprocessing.get_context("spawn"))
    limit = 0.6 * here.limit  # so that there is time for the other checks
    try:
        apart = list(pool.map(_beside, cases, itertools.repeat(here.device), timeout=limit))
    except TimeoutError as error:
        raise AssertionError(f"{len(cases)} kinds of blocks took longer than {limit:.0f} s") from error
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    told, kernels = [], 0
    for dtype in DTYPES:
        own = [one for case, one in zip(cases, apart, strict=True) if case.dtype == dtype]
        kernels += sum(one.by_kernel for one in own)
        told.append(f"{str(dtype).removeprefix('torch.')} {max(one.u for one in own):.1e}")
    by_kernel = f", {kernels} of them by the kernel" if kernels else ""
    return f"{len(cases)} kinds of blocks{by_kernel}; u is apart by at most {', '.join(told)}"


class Apart(NamedTuple):
    """How far u is from numpy's, relative to the block, and whether the kernel made it."""

    u: float
    by_kernel: bool


def _beside(case: Case, device: torch.device) -> Apart:
    """Two steps, each beside numpy's."""
    h, stack, furthest = case.settings(), case.make(device), 0.0
    rounding = float(torch.finfo(stack.config.compute_dtype).eps)
    for t, gradient_NRB in enumerate(case.gradients(device, 2), start=1):
        where, g = f"{case}, step {t}", host(gradient_NRB)
        parts = h["momentum"] * host(stack.momentum_NRB), (1 - h["momentum"]) * g
        square_NR, want_NBB = _expected(stack, g, t, h)
        gate = None if t == 1 else torch.ones((), dtype=torch.int32, device=device)
        update_NRB = step(stack, gradient_NRB, t, h, gate)
        apart_NRB = np.abs(host(stack.momentum_NRB) - sum(parts))
        assert (apart_NRB <= 4 * rounding * (np.abs(parts[0]) + np.abs(parts[1]))).all(), f"m, {where}"
        if stack.square_NR is not None and case.grafting == "rms":
            assert np.allclose(host(stack.square_NR), square_NR, 16 * rounding, 0), f"w, {where}"
        size_NB = np.sqrt(want_NBB.diagonal(axis1=1, axis2=2))
        bound = 2.0**-7 if case.dtype == torch.bfloat16 else 4 * (3 + case.rows) * rounding
        off_NBB = np.abs(_whole(stack) - want_NBB) > bound * size_NB[:, :, None] * size_NB[:, None, :]
        assert not np.tril(off_NBB).any(), f"F, {where}"
        apart = far(host(update_NRB), _by_oracle(stack, g, t, h))
        assert apart < U_ROUNDINGS * rounding, f"u, {where}: {apart:.2g}"
        furthest = max(furthest, apart)
    return Apart(furthest, stack.fused)


def _whole(stack: BlockStack) -> Rows:
    """F as whole blocks, of which the lower triangle counts."""
    return host(stack.whole(stack.fisher))


def _expected(stack: BlockStack, g: Rows, t: int, h: dict[str, Any]) -> tuple[Rows, Rows]:
    """w and F after another step."""
    rho = h["fisher_decay"]
    square_NR = (1 - rho) * np.mean(g**2, axis=2)
    if stack.square_NR is not None and h["grafting"] == "rms":
        square_NR += rho * host(stack.square_NR)
        g = g / np.sqrt(square_NR / (1 - rho**t))[:, :, None]
    return square_NR, rho * _whole(stack) + (1 - rho) / g.shape[1] * g.swapaxes(1, 2) @ g


def _by_oracle(stack: BlockStack, g: Rows, t: int, h: dict[str, Any]) -> Rows:
    """The oracle's u of the F, w and m that the stack has now."""
    mu, unbias = h["momentum"], 1 / (1 - h["fisher_decay"] ** t)
    hat_NRB = mu / (1 - mu**t) * host(stack.momentum_NRB) + (1 - mu) * g
    square_NR = np.ones(g.shape[:2]) if stack.square_NR is None else host(stack.square_NR) * unbias
    noise = 0.005 / (1 - h["fisher_decay"] ** 2) ** 0.5 if stack.config.fisher_dtype == torch.bfloat16 else 0.0
    u_NRB = np.zeros_like(hat_NRB)
    for row, f_hat in enumerate(_whole(stack) * unbias):
        block = Block(np.empty(0), 0, True, f_hat, square_NR[row])
        refresh(block, f_hat, h, noise)
        u_NRB[row] = dense_direction(block, f_hat, square_NR[row], hat_NRB[row], h)
    return u_NRB


# ---- blocks that cannot be factorised, or are no numbers ----


def ladder(here: Here) -> str:
    """Blocks without a Cholesky factor fall back as on a CPU, and leave their neighbours alone."""
    for packed, rows in itertools.product((False, True), (1, 3)):
        both = [_fall_back(device, packed, rows) for device in (here.device, torch.device("cpu"))]
        (found, update_NRB), (want, wanted_NRB) = both
        assert found.fallback_counts == want.fallback_counts == {1: [1, 0, 0], 2: [0, 0, 1]}, (
            f"{found.fallback_counts}, on a CPU {want.fallback_counts}"
        )
        apart = far(host(update_NRB), host(wanted_NRB))
        assert apart < 1e-4, f"packed {packed}, {rows} rows: u apart by {apart:.2g}"
    return f"as on a CPU: fallbacks {found.fallback_counts}"


def _fall_back(device: torch.device, packed: bool, rows: int) -> tuple[BlockStack, Tensor]:
    case = Case(7, rows, packed=packed, exponent=1.0)
    stack = case.make(device)
    if stack.square_NR is not None:
        stack.square_NR.fill_(1.0)
    whole_NBB = torch.eye(7, device=device).repeat(3, 1, 1)
    whole_NBB[1, 0, 1] = whole_NBB[1, 1, 0] = 1.05  # indefinite by little: more damping helps
    whole_NBB[2, 0, 1] = whole_NBB[2, 1, 0] = 3.0  # by much: the diagonal
    stack.fisher.copy_(pack(whole_NBB) if packed else whole_NBB)
    as_it_is = {"fisher_decay": 1 - 2**-53, "bias_correction": False}  # F
    return stack, step(stack, case.gradients(device, 1)[0], 2, case.settings(damping=0.01, **as_it_is))


def not_numbers(here: Here) -> str:
    """A block whose F is not finite leaves its neighbours as they would be."""
    for exponent, grafting, rows in itertools.product((1.0, 0.5), ("rms", "none"), (1, 5)):
        case = Case(16, rows, exponent=exponent, grafting=grafting)
        gradient_NRB, updates = case.gradients(here.device, 1)[0], []
        for value in (1.0, 3e37, float("inf"), NAN):
            stack = case.make(here.device)
            step(stack, gradient_NRB, 1, case.settings())
            stack.fisher[1] = value
            updates.append(host(step(stack, gradient_NRB, 2, case.settings()))[::2])
        apart = max(far(update, updates[0]) for update in updates)
        assert apart < 1e-6, f"{case}: u of the neighbours apart by {apart:.2g}"
    return "of ∞, NaN and 3e37 in a block's F its neighbours notice nothing"


def dead_rows(here: Here) -> str:
    """A row whose gradients ended long ago has a subnormal w: blocks are as on a CPU."""
    cases = [Case(*kind, packed=packed) for kind in ((16, 5), (128, 64)) for packed in (False, True)]
    furthest = 0.0
    for case in cases:
        updates = []
        for device in (here.device, torch.device("cpu")):
            stack = case.make(device)
            for t, gradient_NRB in enumerate(case.gradients(device, 2), start=1):
                if t == 2:
                    assert stack.square_NR is not None
                    stack.square_NR[:, 2] = 1e-40
                    gradient_NRB[:, 2] = 0.0
                update_NRB = step(stack, gradient_NRB, t, case.settings(damping=0.01))
            updates.append(host(update_NRB))
            assert np.isfinite(host(stack.fisher)).all(), f"{case}: F is not finite"
        furthest = max(furthest, far(*updates))
    assert furthest < 1e-2, f"u is apart from a CPU's by {furthest:.2g}"
    return f"{len(cases)} kinds of blocks; u is apart from a CPU's by at most {furthest:.1e}"


# ---- the gate ----


def gate(here: Here) -> str:
    """A shut gate changes nothing, whatever the gradient; an open one changes only roundings."""
    kinds = [(16, 1), (7, 5), (64, 64)]
    cases = [Case(*kind, dtype, packed) for kind in kinds for dtype in DTYPES for packed in (False, True)]
    cases += [Case(7, 5, exponent=1.0), Case(7, 5, grafting="none")]
    cases += [Case(1, 1, dtype, dense=False) for dtype in DTYPES]
    for case in cases:
        _shut_and_open(case, here.device)
    return f"{len(cases)} kinds of blocks: shut, all stays as it was; open, a step is as without it"


def _shut_and_open(case: Case, device: torch.device) -> None:
    h, wide = case.settings(), torch.finfo(torch.float64 if case.dtype == torch.float64 else torch.float32)
    shut, is_open = (torch.tensor(should_step, dtype=torch.int32, device=device) for should_step in (0, 1))
    gated, twin, free = (case.make(device) for _ in range(3))
    for t, gradient_NRB in enumerate(case.gradients(device, 3), start=1):
        bad_NRB = gradient_NRB.clone()
        bad_NRB[0, 0, 0], bad_NRB[1], bad_NRB[2] = NAN, float("inf"), wide.max / 2
        before = [tensor.clone() for tensor in gated.state.values()]
        assert not step(gated, bad_NRB, t, h, shut).any(), f"{case}: the gate was shut, and u is not 0"
        same_bits(list(gated.state.values()), before)
        first, second, third = (
            step(stack, gradient_NRB, t, h, gate) for stack, gate in ((gated, is_open), (twin, is_open), (free, None))
        )
        same_bits([first, *gated.state.values()], [second, *twin.state.values()])
        if case.dtype != torch.bfloat16:  # where a rounding more or less tips another
            apart = far(host(first), host(third))
            assert apart < U_ROUNDINGS * wide.eps, f"{case}: with the gate open u is apart by {apart:.2g}"
