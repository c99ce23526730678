"""Tries the Triton kernel on a few random blocks before `backend="auto"` trusts it.

A kernel is compiled for the card, the driver and the Triton that are there, so what was right elsewhere may be wrong
here. At the first step with state on a device, the kernel and the torch path take the same step of the same blocks, of
each size and depth in use, with the settings asked for; both are held against the torch path in float64. Where the
kernel is not within rounding, torch computes: slower, and right.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache
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

# Blocks that are tried, the first and last of which the step must leave alone; the rest have seen many gradients. Five
# are no multiple of what a program of the kernel takes, where it takes several.
_ROWS, _FRESH, _EMPTY, _INDEFINITE = 7, 2, 3, 4
_STEP = 2  # with `fisher_update_freq` 1 it updates F, with 2 it does not


class _Case(NamedTuple):
    """What decides which code the kernel runs, and on which numbers."""

    device: torch.device
    kind: Kind
    fisher_dtype: torch.dtype
    packed: bool
    settings: tuple[tuple[str, Any], ...]


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
    # Whether F is updated in a step is compiled in; where it is not in each, both are tried.
    frequencies = (1,) if settings["fisher_update_freq"] == 1 else (1, 2)
    names = ("momentum", "nesterov", "fisher_decay", "damping", "eps", "bias_correction", "grafting")
    for batch in batches:
        structure = batch.structure
        for frequency in frequencies:
            chosen = (*((name, settings[name]) for name in names), ("fisher_update_freq", frequency))
            found = _try(_Case(device, batch.kind, structure.fisher_dtype, structure.packed, chosen))
            if found is not None:
                return found
    return None


@cache
def _try(case: _Case) -> str | None:
    name = f"blocks of {case.kind.name}, {str(case.fisher_dtype).removeprefix('torch.')}"
    name += ", packed" if case.packed else ""
    try:
        problem = _problem(case)
    except Exception as error:  # a compiler has many; of a long message the first line tells
        first = (str(error).strip().splitlines() or [""])[0]
        return f"it failed on {name}: {type(error).__name__}: {first[:300]}"
    return None if problem is None else f"{problem} ({name})"


def _problem(case: _Case) -> str | None:
    """What is wrong with the kernel's step, or with torch's."""
    settings = {**DEFAULTS, **dict(case.settings)}
    exact = _stack(case, torch.float64)
    kernel, plain = (_stack(case, case.fisher_dtype) for _ in range(2))
    _run(exact, {**settings, "damping": _damping(case, settings), "backend": "torch"})
    for batch, backend, what in ((plain, "torch", "torch's own path"), (kernel, "triton", "the kernel")):
        if backend == "triton":
            gate = torch.zeros((), dtype=torch.int32, device=case.device)
            before = {name: tensor.clone() for name, tensor in batch.tensors().items()}
            gradient_NDB = batch.gradient_NDB.clone()
            _run(batch, {**settings, "backend": backend}, gate)
            same = all(torch.equal(tensor, before[name]) for name, tensor in batch.tensors().items())
            if not same or bool(batch.gradient_NDB[1:-1].any()):
                return "the kernel changed something in a step that was to change nothing"
            batch.gradient_NDB.copy_(gradient_NDB)
        _run(batch, {**settings, "backend": backend})
        found = _compare(batch, exact, case, settings)
        if found is not None:
            return f"{what} is wrong: {found}"
    return None


def _stack(case: _Case, dtype: torch.dtype) -> Batch:
    """The blocks before the step: the same numbers in each dtype that can hold them."""
    size, depth, _ = case.kind
    structure = Structure(size, depth, "rows", None, dtype, 1.0, False, case.packed and dtype == case.fisher_dtype)
    lengths = size * 10 ** np.arange(_ROWS)  # at the default learning rate some updates meet their bound, some do not
    batch = stacked.allocate(0, case.kind, structure, np.arange(7, 7 + _ROWS), lengths, case.device)
    rng = np.random.default_rng([size, depth])
    scale = np.exp(rng.standard_normal(size))
    gradient_NDB = rng.standard_normal((_ROWS, depth, size)) * scale
    momentum_NDB = gradient_NDB + rng.standard_normal((_ROWS, depth, size)) * scale
    seen = rng.standard_normal((_ROWS, 2 * size, size)) * scale
    fisher_NBB = seen.transpose(0, 2, 1) @ seen / (2 * size)
    square_ND = np.mean(gradient_NDB**2, axis=2)
    fisher_NBB[_FRESH], square_ND[_FRESH], momentum_NDB[_FRESH] = 0.0, 0.0, 0.0
    for value in (fisher_NBB, square_ND, momentum_NDB, gradient_NDB):
        value[_EMPTY] = 0.0
    if size > 1:  # so far from positive definite that only the diagonal is left
        fisher_NBB[_INDEFINITE] = np.eye(size)
        fisher_NBB[_INDEFINITE, 0, 1] = fisher_NBB[_INDEFINITE, 1, 0] = 3.0
    numbers = {"gradient": gradient_NDB, "momentum": momentum_NDB, "fisher": fisher_NBB, "square": square_ND}
    narrow = {name: torch.from_numpy(value).float() for name, value in numbers.items()}
    stored = narrow["fisher"].to(case.fisher_dtype).to(dtype)
    batch.fisher.copy_(fisher.pack(stored) if structure.packed else stored)
    batch.gradient_NDB.copy_(narrow["gradient"])
    batch.momentum_NDB.copy_(narrow["momentum"])
    if batch.square_ND is not None:
        batch.square_ND.copy_(narrow["square"])
    return batch


def _run(batch: Batch, settings: Mapping[str, Any], go: Tensor | None = None) -> None:
    """A step of the blocks between the first and the last."""
    stacked.compute(batch, 1, _ROWS - 1, _STEP, _STEP, settings, go)


def _damping(case: _Case, settings: Mapping[str, Any]) -> float:
    """δ of a Fisher of the case's dtype, which a float64 one has to be told."""
    return fisher.damping(settings["damping"], 0.0, settings["fisher_decay"], case.kind.size, case.fisher_dtype)


def _compare(batch: Batch, exact: Batch, case: _Case, settings: Mapping[str, Any]) -> str | None:
    """What of a step is farther from float64's than rounding explains; None where nothing is."""
    fisher_NBB = stacked.whole(batch, batch.fisher).double()
    untouched = _stack(case, case.fisher_dtype)
    for name, tensor in (*batch.tensors().items(), ("gradient", batch.gradient_NDB)):
        start = untouched.gradient_NDB if name == "gradient" else untouched.tensors()[name]
        if not torch.equal(tensor[[0, -1]], start[[0, -1]]):
            return f"{name} of blocks beside those of the step changed"
    rounding = torch.finfo(torch.float32).eps
    diagonal_NB = exact.fisher.diagonal(dim1=1, dim2=2).sqrt()
    size_NBB = torch.maximum(exact.fisher.abs(), diagonal_NB[:, :, None] * diagonal_NB[:, None, :])
    bound = (4 + case.kind.depth) * rounding if case.fisher_dtype == torch.float32 else 2**-7
    errors = {"F": _largest((fisher_NBB - exact.fisher).tril(), size_NBB, bound)}
    size_NDB = untouched.momentum_NDB.abs() + untouched.gradient_NDB.abs()
    errors["m"] = _largest(batch.momentum_NDB.double() - exact.momentum_NDB, size_NDB, 4 * rounding)
    if batch.square_ND is not None and exact.square_ND is not None:
        bound = (4 + case.kind.size) * rounding
        errors["w"] = _largest(batch.square_ND.double() - exact.square_ND, exact.square_ND, bound)
    # The update that goes with this F, rounded as it is: a step that finds it made, and leaves it.
    again = _stack(case, torch.float64)
    again.fisher.copy_(fisher_NBB)
    if again.square_ND is not None and exact.square_ND is not None:
        again.square_ND.copy_(exact.square_ND)
    delta = _damping(case, settings)
    _run(again, {**settings, "damping": delta, "backend": "torch", "fisher_update_freq": _STEP})
    condition_N = fisher.condition_number(fisher_NBB, delta + settings["eps"], torch.float64)
    condition_N[[_EMPTY, _INDEFINITE]] = float(case.kind.size)  # the ladder's diagonal is as good as any
    condition_N = condition_N.nan_to_num(torch.inf, torch.inf).clamp_min(1.0)
    apart_ND = (batch.gradient_NDB.double() - again.gradient_NDB).norm(dim=2)
    size_ND = again.gradient_NDB.norm(dim=2) * condition_N[:, None]
    errors["u"] = _largest(apart_ND[1:-1], size_ND[1:-1], MULTIPLE * rounding)
    if not all(tensor[1:-1].isfinite().all() for tensor in (batch.gradient_NDB, fisher_NBB, batch.momentum_NDB)):
        return "a result is not finite"
    far = [f"{name} by {error:.2g} of what rounding allows" for name, error in errors.items() if not error <= 1]
    return f"off in {', '.join(far)}" if far else None


def _largest(apart: Tensor, size: Tensor, bound: float) -> float:
    """The largest ratio of a difference to what is allowed there; NaN where a difference is."""
    allowed = size.broadcast_to(apart.shape) * bound
    ratio = torch.where(apart == 0, 0.0, apart.abs() / allowed)
    return float(ratio.nan_to_num(nan=float("inf")).max()) if ratio.numel() else 0.0
