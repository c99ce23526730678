"""Tries the Triton kernel on random blocks before `backend="auto"` trusts it.

A kernel is compiled for the card, the driver and the Triton that are there, so what was right elsewhere may be wrong
here. At the first step with state on a device, the kernel and the torch path take the same steps of the same blocks, of
each size and depth in use, with the settings asked for; both are held against the torch path in float64. Where the
kernel is not within rounding, torch computes: slower, and right.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from adafisher_dist import batch as stacked
from adafisher_dist import fisher, fused
from adafisher_dist.batch import Batch
from adafisher_dist.grid import Kind
from adafisher_dist.settings import DEFAULTS, Structure

MULTIPLE = 16
"""How many times κ ε the update of a block may be off, κ being its condition number and ε float32's rounding."""

# Blocks of a kind each; the first and the last of the stack are none of the step's, and the rest is usual.
_SHARP, _FRESH, _EMPTY, _INDEFINITE, _BARELY, _TINY, _STRETCHED, _SHORT = range(1, 9)
_GIVEN = [_INDEFINITE, _BARELY, _STRETCHED, _SHORT]  # whose F and m are as they are told, and whose gradient is zero
_ON_A_GPU = 300  # blocks, so that programs run side by side
_STEPS = 2
_RUNTIME = ("momentum", "nesterov", "fisher_decay", "damping", "eps", "bias_correction")


class _Case(NamedTuple):
    """What decides which code the kernel runs, and on which numbers."""

    device: torch.device
    kind: Kind
    fisher_dtype: torch.dtype
    packed: bool
    code: tuple[str, bool]
    runtime: tuple[Any, ...]


def code_key(settings: Mapping[str, Any]) -> tuple[str, bool]:
    """What of a param group's settings is compiled into the kernel: with other ones it is other code."""
    return settings["grafting"], settings["fisher_update_freq"] > 1


def refusal(batches: Iterable[Batch], settings: Mapping[str, Any], device: torch.device) -> str | None:
    """Why the kernel cannot be trusted with the dense blocks of these batches; None where it can.

    Waits for the device. What was tried once in this process is not tried again. The user's random state is not used.

    Args:
        batches: with dense blocks of one param group.
        settings: of the group.
        device: where the blocks are.
    """
    obstacle = fused.obstacle(device)
    if obstacle is not None:
        return obstacle
    runtime = tuple(settings[name] for name in _RUNTIME)
    for batch in batches:
        structure = batch.structure
        found = _try(_Case(device, batch.kind, structure.fisher_dtype, structure.packed, code_key(settings), runtime))
        if found is not None:
            return found
    return None


_tried: dict[_Case, str | None] = {}


def _try(case: _Case) -> str | None:
    if case in _tried:
        return _tried[case]
    name = f"blocks of {case.kind.name}, {str(case.fisher_dtype).removeprefix('torch.')}"
    name += ", packed" if case.packed else ""
    try:
        problem = _problem(case)
    except torch.OutOfMemoryError as error:  # which may pass
        return f"it found no room to try {name}: {_first_line(error)}"
    except Exception as error:  # a compiler has many
        _tried[case] = f"it failed on {name}: {type(error).__name__}: {_first_line(error)}"
    else:
        _tried[case] = None if problem is None else f"{problem} ({name})"
    return _tried[case]


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0][:300]


def _problem(case: _Case) -> str | None:
    """What is wrong with the kernel's steps, or with torch's."""
    by_torch, by_kernel = _Trial(case, "torch"), _Trial(case, "triton")
    problem = by_kernel.closed_gate()
    for step in range(2, 2 + _STEPS):
        problem = problem or by_torch.step(step) or by_kernel.step(step)
        if step == 2 and problem is None and case.fisher_dtype == torch.bfloat16:
            problem = by_kernel.rounds_like(by_torch)
    return problem


class _Trial:
    """Steps of one path, each held against float64 from where it began."""

    def __init__(self, case: _Case, backend: str) -> None:
        self.case, self.name = case, "the kernel" if backend == "triton" else "torch's own path"
        grafting, seldom = case.code
        self.settings = {**DEFAULTS, **dict(zip(_RUNTIME, case.runtime, strict=True)), "grafting": grafting}
        # Every second step updates F where not each does; which code runs is compiled in.
        self.settings |= {"backend": backend, "fisher_update_freq": 2 if seldom else 1}
        decay = self.settings["fisher_decay"]
        # A float64 Fisher has to be told what damping one of the case's dtype has.
        self.delta = fisher.damping(self.settings["damping"], 0.0, decay, case.kind.size, case.fisher_dtype)
        self.numbers = _Numbers(case, self.delta + self.settings["eps"])
        self.batch = _stack(case, self.numbers, case.fisher_dtype)

    def closed_gate(self) -> str | None:
        """What a step changes that is to change nothing."""
        before = {name: tensor.clone() for name, tensor in self.batch.tensors().items()}
        gradient_NDB = self.batch.gradient_NDB.clone()
        self._run(self.batch, 2, torch.zeros((), dtype=torch.int32, device=self.case.device))
        same = all(torch.equal(tensor, before[name]) for name, tensor in self.batch.tensors().items())
        counted = self.batch.rungs_N3 is not None and bool(self.batch.rungs_N3.any())
        if not same or counted or bool(self.batch.gradient_NDB[1:-1].any()):
            return "the kernel changed something in a step that was to change nothing"
        self.batch.gradient_NDB.copy_(gradient_NDB)
        return None

    def step(self, step: int) -> str | None:
        """Take it; what of it is farther from float64's than rounding explains."""
        self.batch.gradient_NDB.copy_(self.numbers.gradient(step))
        exact, again = (_widened(self.batch) for _ in range(2))
        before = {name: tensor.clone() for name, tensor in self.batch.tensors().items()}
        before["gradient"] = self.batch.gradient_NDB.clone()
        self._run(self.batch, step)
        self._run(exact, step)
        found = self._beside(before) or self._compare(before, exact, again, step) or self._ladder(step - 1)
        return None if found is None else f"{self.name} is wrong: {found}"

    def rounds_like(self, other: _Trial) -> str | None:
        """What is odd in how a bfloat16 F is rounded; by torch, from the same seeds, hardly an element is otherwise."""
        ours, theirs = self.batch.fisher[1:-1], other.batch.fisher[1:-1]
        apart = int((ours != theirs).sum())
        allowed = 1 + ours.numel() // 50
        return None if apart <= allowed else f"the kernel rounds {apart} of {ours.numel()} elements of F otherwise"

    def _run(self, batch: Batch, step: int, go: Tensor | None = None) -> None:
        """A step of the blocks between the first and the last."""
        wide = batch.structure.fisher_dtype == torch.float64
        settings = {**self.settings, "damping": self.delta, "backend": "torch"} if wide else self.settings
        stacked.compute(batch, 1, len(batch.fisher) - 1, step, step, settings, go)

    def _beside(self, before: Mapping[str, Tensor]) -> str | None:
        for name, tensor in (*self.batch.tensors().items(), ("gradient", self.batch.gradient_NDB)):
            if not torch.equal(tensor[[0, -1]], before[name][[0, -1]]):
                return f"{name} of blocks beside those of the step changed"
        return None

    def _compare(self, before: Mapping[str, Tensor], exact: Batch, again: Batch, step: int) -> str | None:
        batch, kind = self.batch, self.case.kind
        whole_NBB = stacked.whole(batch, batch.fisher)[1:-1]
        wide_NBB = stacked.whole(exact, exact.fisher)[1:-1]
        if not all(tensor[1:-1].isfinite().all() for tensor in (batch.gradient_NDB, *batch.tensors().values())):
            return "a result is not finite"
        # The kernel reads both halves of what it has stored; torch only the lower one.
        if self.name == "the kernel" and not torch.equal(whole_NBB, whole_NBB.mT):
            return "F is not symmetric"
        rounding = torch.finfo(torch.float32).eps
        root_NB = wide_NBB.diagonal(dim1=1, dim2=2).sqrt()
        size_NBB = torch.maximum(wide_NBB.abs(), root_NB[:, :, None] * root_NB[:, None, :])
        bound = (4 + kind.depth) * rounding if self.case.fisher_dtype == torch.float32 else 2**-7
        errors = {"F": _largest((whole_NBB.double() - wide_NBB).tril(), size_NBB, bound)}
        size_NDB = (before["momentum"].abs() + before["gradient"].abs())[1:-1]
        errors["m"] = _largest((batch.momentum_NDB.double() - exact.momentum_NDB)[1:-1], size_NDB, 4 * rounding)
        if batch.square_ND is not None and exact.square_ND is not None and again.square_ND is not None:
            bound = (4 + kind.size) * rounding
            errors["w"] = _largest((batch.square_ND.double() - exact.square_ND)[1:-1], exact.square_ND[1:-1], bound)
            again.square_ND.copy_(exact.square_ND)
        # The update that goes with this F, rounded as it is: by a step that finds it made, and leaves it.
        again.fisher[1:-1] = whole_NBB.double()
        leave = {**self.settings, "damping": self.delta, "backend": "torch", "fisher_update_freq": step}
        stacked.compute(again, 1, len(again.fisher) - 1, step, step, leave)
        apart_ND = (batch.gradient_NDB.double() - again.gradient_NDB).norm(dim=2)
        size_ND = again.gradient_NDB.norm(dim=2) * self._condition(again)[:, None]
        errors["u"] = _largest(apart_ND[1:-1], size_ND[1:-1], MULTIPLE * rounding)
        far = [f"{name} by {error:.2g} of what rounding allows" for name, error in errors.items() if not error <= 1]
        return f"off in {', '.join(far)}" if far else None

    def _condition(self, again: Batch) -> Tensor:
        """κ of each block, in the form in which it is solved; ∞ where there is nothing to hold u against."""
        delta = self.delta + self.settings["eps"]
        condition_N = fisher.condition_number(again.fisher, delta, torch.float64)
        numbers, size = self.numbers, self.case.kind.size
        condition_N[[_EMPTY, _INDEFINITE]] = float(size)  # a quotient for each element
        if size > 1:
            condition_N[_BARELY] = 4 * (1 + numbers.more) / (numbers.more - delta)  # as the ladder mends it
        if self.settings["grafting"] == "none" or self.case.fisher_dtype == torch.bfloat16:
            condition_N[_SHORT] = torch.inf  # by the diagonal in float32 alone, which gives the same where F is I
        return condition_N.nan_to_num(torch.inf, torch.inf).clamp_min(1.0)

    def _ladder(self, steps: int) -> str | None:
        """Whether the blocks that need more than one factorisation were counted, and the sound ones were not."""
        if self.case.kind.size == 1 or self.settings["fisher_decay"] == 0:  # then F is what the gradient says, zero
            return None
        counts = self.batch.counted()
        wanted = {_INDEFINITE: [0, 0, steps], _BARELY: [steps, 0, 0], _SHARP: None, _EMPTY: None, 0: None}
        for row, count in wanted.items():
            if counts.get(row) != count:
                return f"the fallback ladder counted {counts.get(row)} for a block, and {count} is right"
        return None


class _Numbers:
    """The blocks before a step and their gradients: alike in all dtypes, on all devices and ranks."""

    def __init__(self, case: _Case, damping: float) -> None:
        self.case = case
        size, depth, _ = case.kind
        # As many as two programs of the kernel take, and one more, so that the last is not full.
        self.rows = max(_SHORT + 2, 2 * fused.constants(size, depth)["NUMBER"] + 1) + 2
        if case.device.type == "cuda":
            self.rows = max(self.rows, _ON_A_GPU)
        self.more = max(10 * damping, 1e-2)  # of the ladder
        rng = np.random.default_rng([size, depth])
        self.spread = np.exp(rng.standard_normal(size))  # which makes blocks as ill-conditioned as real ones
        seen = rng.standard_normal((self.rows, 2 * size, size)) * self.spread
        self.fisher = seen.transpose(0, 2, 1) @ seen / (2 * size)
        self.momentum = rng.standard_normal((self.rows, depth, size)) * self.spread
        self.square = np.full((self.rows, depth), np.mean(self.spread**2))
        # What rows are like is told beside _SHARP: κ near 1; no F yet; no gradient ever; indefinite by far, and by so
        # little that more damping helps; gradients of 1e-8; an update that its direction would make more than 16 times
        # as long; one whose length underflows.
        sharp = rng.standard_normal((8 * size, size))
        self.fisher[_SHARP] = sharp.T @ sharp / (8 * size)
        self.fisher[_FRESH], self.momentum[_FRESH], self.square[_FRESH] = 0, 0, 0
        self.fisher[_EMPTY], self.momentum[_EMPTY], self.square[_EMPTY] = 0, 0, 0
        for row, beyond in ((_INDEFINITE, 3 + self.more), (_BARELY, (damping + self.more) / 2)):
            self.fisher[row] = np.eye(size)
            if size > 1:
                self.fisher[row, 0, 1] = self.fisher[row, 1, 0] = 1 + beyond
        self.fisher[_TINY] *= 1e-16
        self.momentum[_TINY] *= 1e-8
        self.square[_TINY] *= 1e-16
        self.fisher[_STRETCHED] = 1.0  # stiff in the direction of ones alone
        self.momentum[_STRETCHED] = 1.0 + (damping / (size + damping)) ** 0.5 * (-1.0) ** np.arange(size)
        self.fisher[_SHORT], self.momentum[_SHORT] = np.eye(size), 1e-30
        self.square[_GIVEN] = 1.0
        self.length = size * 10 ** (np.arange(self.rows) % 5)  # some updates meet their bound, some do not
        self.length[[_STRETCHED, _SHORT]] = 1

    def gradient(self, step: int) -> Tensor:
        """The gradients of a step."""
        rng = np.random.default_rng([*self.case.kind[:2], step])
        # Of the momentum's signs, since what cancels has rounding that is large beside it.
        g_NDB = self.momentum * np.exp(rng.standard_normal(self.momentum.shape))
        g_NDB[_FRESH] = rng.standard_normal(self.momentum.shape[1:]) * self.spread
        g_NDB[_GIVEN] = 0
        return torch.from_numpy(g_NDB).float()


def _stack(case: _Case, numbers: _Numbers, dtype: torch.dtype) -> Batch:
    """The blocks before the first step."""
    size, depth, _ = case.kind
    structure = Structure(size, depth, "rows", None, dtype, 1.0, False, case.packed)
    number = np.arange(7, 7 + numbers.rows)
    batch = stacked.allocate(0, case.kind, structure, number, numbers.length, case.device)
    stored = torch.from_numpy(numbers.fisher).to(dtype)
    batch.fisher.copy_(fisher.pack(stored) if structure.packed else stored)
    batch.momentum_NDB.copy_(torch.from_numpy(numbers.momentum))
    batch.gradient_NDB.copy_(numbers.gradient(2))
    if batch.square_ND is not None:
        batch.square_ND.copy_(torch.from_numpy(numbers.square))
    return batch


def _widened(batch: Batch) -> Batch:
    """The same blocks in float64."""
    structure = batch.structure._replace(fisher_dtype=torch.float64, packed=False)
    assert batch.length_N is not None
    length = batch.length_N.cpu().numpy().astype(np.int64)
    wide = stacked.allocate(0, batch.kind, structure, batch.number_N, length, batch.fisher.device)
    wide.fisher.copy_(stacked.whole(batch, batch.fisher))
    wide.momentum_NDB.copy_(batch.momentum_NDB)
    wide.gradient_NDB.copy_(batch.gradient_NDB)
    if wide.square_ND is not None and batch.square_ND is not None:
        wide.square_ND.copy_(batch.square_ND)
    return wide


def _largest(apart: Tensor, size: Tensor, bound: float) -> float:
    """The largest ratio of a difference to what is allowed there."""
    ratio = torch.where(apart == 0, 0.0, apart.abs() / (size.broadcast_to(apart.shape).double() * bound))
    return float(ratio.nan_to_num(nan=torch.inf).max()) if ratio.numel() else 0.0
