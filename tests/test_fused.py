"""The Triton kernel against the torch path, and against the numpy oracle.

Without a GPU the kernel is interpreted: those tests run in a pytest of their own (test_interpreted.py).
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracle import Block, Oracle, dense_direction, refresh

from adafisher_dist import AdaFisher, fisher
from adafisher_dist import batch as stacked
from adafisher_dist.batch import Batch
from adafisher_dist.grid import Kind
from adafisher_dist.settings import DEFAULTS, Structure, normalize

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
INSTALLED = find_spec("triton") is not None

pytestmark = pytest.mark.skipif(not INSTALLED, reason="needs Triton: pip install triton")
kernel = pytest.mark.interpreted if DEVICE.type == "cpu" else pytest.mark.gpu

SIZES = (1, 7, 16, 32, 43, 64, 128)
SHARED = ((1, 16), (7, 2), (7, 16), (16, 5), (43, 5), (43, 16), (64, 2), (64, 16))  # sizes and depths
DTYPES = (torch.float32, torch.bfloat16)

Rows = np.ndarray[Any, np.dtype[np.float64]]


def make(
    size: int, rows: int, dtype: torch.dtype, fill: float = 0.0, packed: bool = False, depth: int = 1
) -> Batch:  # fmt: skip
    structure = Structure(size, depth, "rows", None, dtype, 1.0, False, packed)
    lengths = size * 10 ** (np.arange(rows) % 5)  # at lr 1e-3 the stretch is bounded by 16 down to less than 1
    batch = stacked.allocate(0, Kind(size, depth, True), structure, np.arange(11, 11 + rows), lengths, DEVICE)
    for tensor in batch.tensors().values():
        tensor.fill_(fill)
    return batch


def whole(batch: Batch) -> torch.Tensor:
    """F as whole blocks."""
    return fisher.unpack(batch.fisher, batch.size) if batch.structure.packed else batch.fisher


def settings(backend: str = "triton", **changes: Any) -> dict[str, Any]:
    result = {**DEFAULTS, "backend": backend, **changes}
    normalize(result)
    return result


def gradients(rows: int, size: int, steps: int, scale: float = 1.0, depth: int = 1) -> torch.Tensor:
    rng = np.random.default_rng([rows, size])
    shape = (rows, depth, size)
    mean, spread = rng.standard_normal(shape), np.exp(rng.standard_normal(shape))
    values = scale * spread * (0.5 * mean + rng.standard_normal((steps, *shape)))
    return torch.tensor(values, dtype=torch.float32, device=DEVICE)


def assert_same_fisher(got: torch.Tensor, want: torch.Tensor, depth: int) -> None:
    """But for the last bit, since torch may fuse a product with a sum; in bfloat16 that seldom tips a rounding.

    Of blocks that vectors share, but for that many bits: a sum in another order.
    """
    diagonal = want.float().diagonal(dim1=1, dim2=2).sqrt()
    size = diagonal[:, :, None] * diagonal[:, None, :]  # |Fᵢⱼ| is at most that, and so is |hᵢ hⱼ|
    far = (got.float() - want.float()).abs() > (3 + depth) * 2**-24 * size
    if got.dtype == torch.bfloat16:
        assert far.float().mean() < 0.01
        far = (got.float() - want.float()).abs() > 2**-7 * size
    assert not far.any()


def double(x: torch.Tensor) -> Rows:
    return x.double().cpu().numpy()


def distance(got: torch.Tensor | Rows, want: torch.Tensor | Rows) -> float:
    """The largest relative error of a vector."""
    got, want = (double(x) if isinstance(x, torch.Tensor) else x for x in (got, want))
    assert np.isfinite(got).all()
    lengths = np.linalg.norm(want, axis=-1)
    return float((np.linalg.norm(got - want, axis=-1) / np.where(lengths > 0, lengths, 1)).max())


def by_oracle(batch: Batch, gradient_NDB: torch.Tensor, t: int, k: int, h: dict[str, Any]) -> Rows:
    """The oracle's u of the F, w and m that the batch has now."""
    hat_NDB = double(batch.momentum_NDB) / ((1 - h["momentum"] ** t) if h["bias_correction"] else 1)
    if h["nesterov"]:
        hat_NDB = h["momentum"] * hat_NDB + (1 - h["momentum"]) * double(gradient_NDB)
    unbias = 1 / (1 - h["fisher_decay"] ** k) if h["bias_correction"] else 1
    f_hat_NBB = double(whole(batch)) * unbias
    if batch.square_ND is None:
        square_ND = np.trace(f_hat_NBB, axis1=1, axis2=2)[:, None] / batch.size
    else:
        square_ND = double(batch.square_ND) * unbias
    u_NDB = np.zeros_like(hat_NDB)
    for row, (f_hat, square) in enumerate(zip(f_hat_NBB, square_ND, strict=True)):
        block = Block(np.empty(0), 0, True, int(batch.length_N[row]), f_hat, square)
        refresh(block, f_hat, h)
        u_NDB[row] = dense_direction(block, f_hat, square, hat_NDB[row], h)
    return u_NDB


def check_steps(batch: Batch, grads: torch.Tensor, h: dict[str, Any], first: int = 1) -> None:
    """Take steps, and compare each with the torch path on dense blocks from the same state, and with the oracle."""
    depth = batch.kind.depth
    other = make(batch.size, len(batch.fisher), batch.fisher.dtype, depth=depth)
    # Rounding, times the largest condition number that A can have.
    tolerance = 3e-7 * (1 + batch.size / h["damping"])
    k = 0
    for t, gradient_NDB in enumerate(grads, start=first):
        k += stacked.updates_fisher(t, h)
        for mine in (batch, other):
            mine.gradient_NDB.copy_(gradient_NDB)
        other.fisher.copy_(whole(batch))
        for name in ("momentum", "square") if depth > 1 else ("momentum",):
            other.tensors()[name].copy_(batch.tensors()[name])
        stacked.compute(batch, 0, len(grads[0]), t, k, h)
        stacked.compute(other, 0, len(grads[0]), t, k, {**h, "backend": "torch"})

        assert_same_fisher(whole(batch), other.fisher, depth)
        assert torch.equal(whole(batch), whole(batch).mT)
        assert depth > 1 or torch.equal(other.fisher, other.fisher.mT)
        for name in ("momentum", "square") if depth > 1 else ("momentum",):
            assert distance(batch.tensors()[name].flatten(1), other.tensors()[name].flatten(1)) < 1e-6, name
        assert distance(batch.gradient_NDB, by_oracle(batch, gradient_NDB, t, k, h)) < tolerance, f"u at step {t}"
        if batch.fisher.dtype != torch.bfloat16 or torch.equal(whole(batch), other.fisher):
            assert distance(batch.gradient_NDB, other.gradient_NDB) < tolerance, f"u at step {t}"


@kernel
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("size", "depth"), [*((size, 1) for size in SIZES), *SHARED])
def test_every_size(size: int, depth: int, dtype: torch.dtype, packed: bool) -> None:
    steps = 3 if size <= 16 else 2
    rows = 3 if size <= 16 else 2 if size < 128 and depth == 1 else 1
    # In bfloat16 F is no longer positive semidefinite; more damping, so that no block needs the ladder.
    batch = make(size, rows, dtype, packed=packed, depth=depth)
    check_steps(batch, gradients(rows, size, steps, depth=depth), settings(damping=0.3))


@kernel
@pytest.mark.parametrize("depth", [3, 64])
def test_largest(depth: int) -> None:
    check_steps(make(128, 1, torch.float32, depth=depth), gradients(1, 128, 1, depth=depth), settings(damping=0.3))


@kernel
@pytest.mark.parametrize("grafting", ["rms", "none"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"nesterov": False},
        {"bias_correction": False},
        {"momentum": 0.0},
        {"momentum": 0.6, "nesterov": False},
        {"fisher_update_freq": 2},
        {"eps": 1e-3, "damping": 1.0, "fisher_decay": 0.5},
    ],
    ids=str,
)
def test_settings(changes: dict[str, Any], grafting: str) -> None:
    for size, depth, dtype in ((7, 1, torch.float32), (16, 1, torch.bfloat16), (7, 5, torch.float32)):
        h = settings(**{"damping": 0.1 if dtype == torch.float32 else 0.3, "grafting": grafting, **changes})
        check_steps(make(size, 2, dtype, depth=depth), gradients(2, size, 3, depth=depth), h)


@kernel
@pytest.mark.parametrize("grafting", ["rms", "none"])
@pytest.mark.parametrize("scale", [1e-12, 1e-6, 1e3, 1e6])
def test_gradients_of_any_scale(scale: float, grafting: str) -> None:
    for dtype in DTYPES:
        for depth in (1, 3):
            batch, grads = make(16, 2, dtype, depth=depth), gradients(2, 16, 2, scale, depth)
            check_steps(batch, grads, settings(grafting=grafting, damping=0.3))


@kernel
@pytest.mark.parametrize("depth", [1, 5])
@pytest.mark.parametrize("scale", [1e-22, 1e-19])
def test_gradients_whose_squares_underflow(scale: float, depth: int) -> None:
    """F is zero or barely a number; u is finite, and the torch path's."""
    for grafting in ("rms", "none"):
        batch, other = (make(7, 2, torch.float32, depth=depth) for _ in range(2))
        for mine, backend in ((batch, "triton"), (other, "torch")):
            mine.gradient_NDB.copy_(gradients(2, 7, 1, scale, depth)[0])
            stacked.compute(mine, 0, 2, 1, 1, settings(backend, grafting=grafting))
        assert distance(batch.gradient_NDB, other.gradient_NDB) < 1e-4


@kernel
@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("grafting", ["rms", "none"])
def test_no_gradient_yet(grafting: str, depth: int) -> None:
    for dtype in DTYPES:
        batch = make(16, 5, dtype, depth=depth)
        batch.gradient_NDB[2] = 1.0  # beside blocks of zeros, in one program
        stacked.compute(batch, 0, 5, 1, 1, settings(grafting=grafting))
        assert batch.gradient_NDB[2].isfinite().all() and batch.gradient_NDB[2].all()
        for tensor in (batch.gradient_NDB, *batch.tensors().values()):
            assert not tensor[[0, 1, 3, 4]].any()
        assert batch.rungs_N3 is not None and not batch.rungs_N3.any()


@kernel
@pytest.mark.parametrize("grafting", ["rms", "none"])
@pytest.mark.parametrize(("size", "depth"), [(7, 2), (16, 5)])
def test_a_vector_without_a_gradient(size: int, depth: int, grafting: str) -> None:
    """Its length is 0, whatever the block's Fisher says; without grafting only its momentum counts."""
    grads = gradients(2, size, 3, depth=depth)
    grads[:, 1, 1] = 0.0
    batch, h = make(size, 2, torch.float32, depth=depth), settings(grafting=grafting)
    check_steps(batch, grads, h)
    assert batch.square_ND is not None
    assert not batch.square_ND[1, 1] and not batch.gradient_NDB[1, 1].any() and batch.gradient_NDB[1, 0].all()
    # Momentum that no gradient accounts for: by the diagonal alone it would be divided by ε.
    batch.momentum_NDB[1, 1] = 1.0
    check_steps(batch, grads[:1], h, first=4)
    assert bool(batch.gradient_NDB[1, 1].any()) == (grafting == "none")


@kernel
@pytest.mark.parametrize("grafting", ["rms", "none"])
@pytest.mark.parametrize("value", [1e-30, 1e30])
def test_a_vector_whose_direction_has_no_length(value: float, grafting: str) -> None:
    """Squares of s leave float32's range: the diagonal's update, of that vector alone."""
    batch, other = (make(7, 3, torch.float32, depth=3) for _ in range(2))
    grads = gradients(3, 7, 1, depth=3)[0]
    for mine, backend in ((batch, "triton"), (other, "torch")):
        mine.fisher.copy_(torch.eye(7, device=DEVICE).expand(3, 7, 7))
        mine.square_ND.fill_(1.0)
        mine.momentum_NDB.copy_(grads)
        mine.momentum_NDB[1, 2] = value
        mine.gradient_NDB.copy_(grads)
        mine.gradient_NDB[1, 2] = 0.0
        # F is used as it is.
        h = settings(backend, grafting=grafting, fisher_update_freq=2, bias_correction=False, nesterov=False)
        stacked.compute(mine, 0, 3, 2, 1, h)
    assert distance(batch.gradient_NDB, other.gradient_NDB) < 1e-5
    torch.testing.assert_close(batch.gradient_NDB[1, 2], batch.momentum_NDB[1, 2])


@kernel
@pytest.mark.parametrize("depth", [1, 5])
@pytest.mark.parametrize("grafting", ["rms", "none"])
def test_a_gradient_that_the_fisher_has_not_seen(grafting: str, depth: int) -> None:
    batch = make(7, 2, torch.float32, depth=depth)
    batch.gradient_NDB.fill_(1.0)
    stacked.compute(batch, 0, 2, 2, 1, settings(grafting=grafting, fisher_update_freq=2))
    assert batch.momentum_NDB.all() and not batch.gradient_NDB.any()


@kernel
@pytest.mark.parametrize(("packed", "rows_per_block"), [(False, 1), (True, 1), (False, 3), (True, 16)])
def test_whole_optimizer(packed: bool, rows_per_block: int) -> None:
    """From the first step on, against the oracle, over rows that are cut into blocks of several kinds."""
    rng = np.random.default_rng(0)
    # By one row: blocks of 12, 9; 3; 14, 7. By three: 12 × 2, 9 × 2; 3; 7 × 3, 7 × 2. By sixteen: 7 × 5 in the end.
    shapes = [(2, 45), (3,), (5, 7)]
    start = [rng.standard_normal(shape).astype(np.float32) for shape in shapes]
    parameters = [torch.nn.Parameter(torch.tensor(value, device=DEVICE)) for value in start]
    hyper: dict[str, Any] = {"block_size": 14, "lr": 1e-2, "fisher_update_freq": 2, "max_blocks": 7}
    hyper["rows_per_block"] = rows_per_block
    optimizer, oracle = AdaFisher(parameters, backend="triton", packed=packed, **hyper), Oracle(start, **hyper)
    for _ in range(3):
        grads = [rng.standard_normal(shape).astype(np.float32) for shape in shapes]
        for parameter, gradient in zip(parameters, grads, strict=True):
            parameter.grad = torch.tensor(gradient, device=DEVICE)
        optimizer.step()
        oracle.step(grads)
    for parameter, want in zip(parameters, oracle.params, strict=True):
        np.testing.assert_allclose(double(parameter.detach()), want, rtol=0, atol=1e-5)
    assert not any(sum(entry.ladder.values()) for entry in optimizer.fisher_stats().values())


@kernel
def test_the_ladder_in_the_statistics() -> None:
    parameters = [torch.nn.Parameter(torch.ones(shape, device=DEVICE)) for shape in ((2, 7), (3, 7))]
    names = {"a": parameters[0], "b": parameters[1]}
    optimizer = AdaFisher(names.items(), backend="triton", block_size=7, rows_per_block=1)

    def ladder_after_a_step() -> dict[str, dict[str, int]]:
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        return {name: entry.ladder for name, entry in optimizer.fisher_stats().items()}

    none = {"more damping": 0, "float64": 0, "diagonal": 0}
    assert ladder_after_a_step() == {"a": none, "b": none}
    fisher_NBB = optimizer.state[parameters[1]]["fisher_7"]
    fisher_NBB[2, 0, 1] = fisher_NBB[2, 1, 0] = 9.0
    assert ladder_after_a_step() == {"a": none, "b": {**none, "diagonal": 1}}
    assert ladder_after_a_step() == {"a": none, "b": {**none, "diagonal": 2}}


@kernel
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("size", "depth", "damping", "beyond"),
    [(7, 1, 0.01, 1.05), (16, 1, 0.0, 1.005), (20, 1, 0.01, 1.05), (7, 5, 0.01, 1.05), (16, 2, 0.0, 1.005)],
)
def test_the_ladder(size: int, depth: int, damping: float, beyond: float, packed: bool) -> None:
    """A block that cannot be factorised takes the torch path's update and rung; its neighbours do not notice."""
    rows, grads = 5, gradients(5, size, 1, depth=depth)[0]
    diagonal = torch.linspace(0.5, 1.5, size, device=DEVICE)
    diagonal[:2] = 1.0
    batch, other, healthy = (make(size, rows, torch.float32, 1.0, depth=depth) for _ in range(3))
    for mine in (batch, other, healthy):
        mine.momentum_NDB.zero_()
        mine.fisher.copy_(diagonal.diag().expand(rows, size, size))
        mine.gradient_NDB.copy_(grads)
    for mine in (batch, other):
        mine.fisher[1, 0, 1] = mine.fisher[1, 1, 0] = beyond  # indefinite by little: more damping helps
        mine.fisher[3, 0, 1] = mine.fisher[3, 1, 0] = 3.0  # by much: the diagonal
    if packed:
        batch.structure, batch.fisher = batch.structure._replace(packed=True), fisher.pack(batch.fisher)
    for mine, backend in ((batch, "triton"), (other, "torch"), (healthy, "triton")):
        # F is used as it is.
        stacked.compute(mine, 0, rows, 2, 1, settings(backend, damping=damping, fisher_update_freq=2))
    assert batch.rungs_N3 is not None and healthy.rungs_N3 is not None
    assert other.rungs == {1: [1, 0, 0], 3: [0, 0, 1]}
    assert batch.rungs_N3.tolist() == [other.rungs.get(row, [0, 0, 0]) for row in range(rows)]
    assert distance(batch.gradient_NDB, other.gradient_NDB) < 1e-4
    assert torch.equal(batch.gradient_NDB[[0, 2, 4]], healthy.gradient_NDB[[0, 2, 4]])
    assert not healthy.rungs_N3.any()


@kernel
@pytest.mark.parametrize("value", [3e37, float("inf"), float("nan")])
@pytest.mark.parametrize("depth", [1, 5])
@pytest.mark.parametrize("grafting", ["rms", "none"])
def test_a_fisher_out_of_range(value: float, grafting: str, depth: int) -> None:
    """As in the torch path; above all, neighbours in the same program are as they would be."""
    size, rows = 16, 4
    grads = gradients(rows, size, 1, depth=depth)[0]
    batch, other = (make(size, rows, torch.float32, 1.0, depth=depth) for _ in range(2))
    for mine, backend in ((batch, "triton"), (other, "torch")):
        mine.fisher[2] = value
        mine.gradient_NDB.copy_(grads)
        stacked.compute(mine, 0, rows, 2, 1, settings(backend, fisher_update_freq=2, grafting=grafting))
    for row in range(rows):
        mine_DB, other_DB = batch.gradient_NDB[row], other.gradient_NDB[row]
        torch.testing.assert_close(mine_DB, other_DB, rtol=1e-4, atol=1e-5, equal_nan=True)


@kernel
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("size", "depth", "ranges"),
    [(16, 1, [(1, 6), (0, 1), (6, 9)]), (33, 1, [(1, 2), (0, 1)]), (7, 5, [(1, 6), (0, 1), (6, 9)])],
)
def test_ranges_of_rows(
    size: int, depth: int, ranges: Sequence[tuple[int, int]], dtype: torch.dtype, packed: bool
) -> None:
    """Rows do not depend on the range that they are worked on with, and no others are touched."""
    h, rows = settings(), max(stop for _, stop in ranges)
    alone, parts = (make(size, rows, dtype, 0.5, packed, depth) for _ in range(2))
    grads = gradients(rows, size, 1, depth=depth)[0]
    alone.gradient_NDB.copy_(grads)
    parts.gradient_NDB.copy_(grads)
    stacked.compute(alone, 0, rows, 3, 3, h)
    done: set[int] = set()
    for start, stop in ranges:
        stacked.compute(parts, start, stop, 3, 3, h)
        done |= set(range(start, stop))
        left = [row for row in range(rows) if row not in done]
        assert torch.equal(parts.gradient_NDB[left], grads[left])
        assert all((tensor[left] == 0.5).all() for tensor in parts.tensors().values())
    assert torch.equal(parts.gradient_NDB, alone.gradient_NDB)
    assert all(torch.equal(tensor, alone.tensors()[name]) for name, tensor in parts.tensors().items())


@kernel
@pytest.mark.parametrize(("packed", "depth"), [(False, 1), (True, 1), (False, 2)])
def test_more_than_2_to_the_31_elements(packed: bool, depth: int) -> None:
    size = 64
    kind = Kind(size, depth, True)
    # 4 GiB in bfloat16, of which the last rows are touched
    rows = 2**31 // (fisher.packed_numel(size) if packed else size**2) + 2
    structure = Structure(size, depth, "rows", None, torch.bfloat16, 1.0, False, packed)
    big = stacked.allocate(0, kind, structure, np.arange(rows), np.arange(rows) + 1, DEVICE, zeroed=False)
    big.rungs_N3 = torch.empty(rows, 3, dtype=torch.int32, device=DEVICE)
    small = stacked.allocate(0, kind, structure, np.arange(rows - 1, rows), np.arange(rows, rows + 1), DEVICE)
    gradient_NDB = gradients(1, size, 1, depth=depth)[0]
    for mine in (big, small):
        for tensor in mine.tensors().values():
            tensor[-1].zero_()
        mine.gradient_NDB[-1:] = gradient_NDB
        stacked.compute(mine, len(mine.fisher) - 1, len(mine.fisher), 1, 1, settings())
    assert torch.equal(big.gradient_NDB[-1:], small.gradient_NDB)
    assert all(torch.equal(big.tensors()[name][-1:], tensor) for name, tensor in small.tensors().items())


@kernel
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("size", "depth"), [(7, 1), (16, 1), (7, 5)])
def test_the_gate(size: int, depth: int, dtype: torch.dtype, packed: bool) -> None:
    """Open, it changes nothing; shut, u is 0 and all else stays, whatever the gradient holds."""
    grads, h = gradients(3, size, 3, depth=depth), settings(damping=0.3)
    gated, free = (make(size, 3, dtype, packed=packed, depth=depth) for _ in range(2))
    for t, gradient_NDB in enumerate(grads, start=1):
        gated.gradient_NDB.copy_(gradient_NDB)
        gated.gradient_NDB[1, :, ::2] = float("nan")
        gated.gradient_NDB[2] = 3e38
        before = {name: tensor.clone() for name, tensor in gated.tensors().items()}
        stacked.compute(gated, 0, 3, t, t, h, go=torch.tensor(0, dtype=torch.int32, device=DEVICE))
        assert not gated.gradient_NDB.any()
        assert all(torch.equal(tensor, before[name]) for name, tensor in gated.tensors().items())
        for mine, go in ((gated, torch.tensor(1, dtype=torch.int32, device=DEVICE)), (free, None)):
            mine.gradient_NDB.copy_(gradient_NDB)
            stacked.compute(mine, 0, 3, t, t, h, go=go)
        assert torch.equal(gated.gradient_NDB, free.gradient_NDB)
        assert all(torch.equal(tensor, free.tensors()[name]) for name, tensor in gated.tensors().items())
    assert gated.rungs_N3 is not None and not gated.rungs_N3.any()


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_the_gate_of_diagonal_blocks(dtype: torch.dtype) -> None:
    structure = Structure(16, 3, "rows", 0, dtype, 1.0, False, True)
    gated, free = (
        stacked.allocate(0, Kind(1, 1, False), structure, np.arange(5), np.ones(5), DEVICE) for _ in range(2)
    )
    for t in (1, 2, 3):
        gradient_N11 = gradients(5, 1, 1)[0].to(structure.compute_dtype)
        gated.gradient_NDB.copy_(gradient_N11)
        gated.gradient_NDB[1] = float("nan")
        before = {name: tensor.clone() for name, tensor in gated.tensors().items()}
        stacked.compute(gated, 0, 5, t, t, settings("auto"), go=torch.tensor(0, dtype=torch.int32, device=DEVICE))
        assert not gated.gradient_NDB.any()
        assert all(torch.equal(tensor, before[name]) for name, tensor in gated.tensors().items())
        for mine, go in ((gated, torch.tensor(1, dtype=torch.int32, device=DEVICE)), (free, None)):
            mine.gradient_NDB.copy_(gradient_N11)
            stacked.compute(mine, 0, 5, t, t, settings("auto"), go=go)
        assert torch.equal(gated.gradient_NDB, free.gradient_NDB) and gated.gradient_NDB.all()
        assert all(torch.equal(tensor, free.tensors()[name]) for name, tensor in gated.tensors().items())


def test_the_torch_path_of_dense_blocks_has_no_gate() -> None:
    with pytest.raises(AssertionError, match="no gate"):
        stacked.compute(make(7, 1, torch.float32), 0, 1, 1, 1, settings("torch"), go=torch.ones((), dtype=torch.int32))


FITTING = Structure(16, 16, "rows", None, torch.float32, 1.0, False, False)
MISFITS = [
    ({"rows_per_block": 65}, "rows_per_block is 65.*hold up to 64.*Use rows_per_block=64"),
    ({"block_size": 129}, "block_size is 129.*Use block_size=128"),
    ({"fisher_dtype": torch.float64}, "fisher_dtype is torch.float64.*Use torch.float32"),
    ({"exponent": 0.5}, "exponent is 0.5.*Use exponent=1.0"),
    ({"keeps_factors": True}, "inverse_update_freq is above 1.*Use inverse_update_freq=1"),
]


def test_what_fits() -> None:
    assert stacked.fits(FITTING)
    for change in (
        {"block_size": 128}, {"rows_per_block": 1}, {"rows_per_block": 64}, {"fisher_dtype": torch.bfloat16},
        {"packed": True}, {"max_blocks": 3},
    ):  # fmt: skip
        assert stacked.fits(FITTING._replace(**change))


@pytest.mark.parametrize(("change", "words"), MISFITS, ids=str)
def test_what_does_not_fit_is_an_error_where_the_kernel_is_asked_for(change: dict[str, Any], words: str) -> None:
    structure = FITTING._replace(**change)
    assert not stacked.fits(structure)
    for backend in ("auto", "torch"):
        assert not stacked.uses_kernel(structure, backend, DEVICE)
    with pytest.raises(RuntimeError, match=f'backend="triton" cannot run here: {words}.* Or use backend="auto"'):
        stacked.uses_kernel(structure, "triton", DEVICE)


@kernel
def test_where_it_runs() -> None:
    assert stacked.uses_kernel(FITTING, "triton", DEVICE)
    assert not stacked.uses_kernel(FITTING, "auto", DEVICE)  # before it was tried: test_kernel_check.py


def test_on_a_cpu_the_kernel_is_refused() -> None:
    cpu = torch.device("cpu")
    assert not stacked.uses_kernel(FITTING, "auto", cpu)
    with pytest.raises(RuntimeError, match=r"the state is on the CPU.*TRITON_INTERPRET=1.*Use a CUDA device"):
        stacked.uses_kernel(FITTING, "triton", cpu)
    with pytest.raises(RuntimeError, match="the state is on meta"):
        stacked.uses_kernel(FITTING, "triton", torch.device("meta"))
    parameter = torch.nn.Parameter(torch.ones(3))
    parameter.grad = torch.ones(3)
    with pytest.raises(RuntimeError, match="the state is on the CPU"):
        AdaFisher([parameter], backend="triton").step()


def test_triton_is_not_imported_with_the_package() -> None:
    code = "import adafisher_dist, adafisher_dist.fused, sys; assert 'triton' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


COMPILE = """
import sys, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from adafisher_dist import fused
from adafisher_dist.fused_kernel import step_kernel

size, depth, dtype, packed = *map(int, sys.argv[1:3]), sys.argv[3], sys.argv[4] == "True"
constants = fused.constants(size, depth) | dict(
    UPDATES=True, ROUNDED=dtype == "bf16", PACKED=packed, BY_DIAGONAL=True, LARGEST_STRETCH=16.0
)
types = dict(fisher_ptr="*" + dtype, momentum_ptr="*fp32", gradient_ptr="*fp32", square_ptr="*fp32",
             length_ptr="*fp32", number_ptr="*i32", rungs_ptr="*i32", go_ptr="*i32", start="i32", stop="i32",
             offset="i32")
names = step_kernel.arg_names
source = ASTSource(
    fn=step_kernel, signature={name: "constexpr" if name in constants else types.get(name, "fp32") for name in names},
    constexprs=constants,
    attrs={(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name.endswith("_ptr")},
)
made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=fused.options(size, depth))
assert made.asm["cubin"]
tile = "tensor<{WIDTH}x{NUMBER}x{WIDTH}x".format(**constants)
moved = [line for line in made.asm["ttgir"].splitlines() if "convert_layout" in line and tile in line]
assert not moved, moved
assert made.metadata.shared <= 4096, made.metadata.shared
"""


@pytest.mark.parametrize(
    ("size", "depth", "dtype", "packed"),
    [
        (16, 1, "fp32", False),
        (43, 1, "bf16", True),
        (64, 1, "fp32", False),
        (64, 1, "fp32", True),
        (16, 16, "bf16", True),
        (43, 5, "fp32", False),
        (64, 16, "fp32", False),
    ],
)
def test_compiles_for_an_h100(size: int, depth: int, dtype: str, packed: bool, tmp_path: Path) -> None:
    """The compiler needs no GPU. A tile stays in the layout in which it is loaded: nothing is sent round by it."""
    env = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, *map(str, (size, depth, dtype, packed))], env=env, capture_output=True,
        text=True, timeout=200, cwd=Path(__file__).parent.parent,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
