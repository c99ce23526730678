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
from adafisher_dist.settings import DEFAULTS, Structure, normalize

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
INSTALLED = find_spec("triton") is not None

pytestmark = pytest.mark.skipif(not INSTALLED, reason="needs Triton: pip install triton")
kernel = pytest.mark.interpreted if DEVICE.type == "cpu" else pytest.mark.gpu

SIZES = (1, 7, 16, 32, 43, 64, 128)
DTYPES = (torch.float32, torch.bfloat16)

Rows = np.ndarray[Any, np.dtype[np.float64]]


def make(size: int, rows: int, dtype: torch.dtype, fill: float = 0.0, packed: bool = False) -> Batch:
    structure = Structure(size, "rows", None, dtype, 1.0, False, packed)
    batch = stacked.allocate(0, size, True, structure, np.arange(11, 11 + rows), rows, DEVICE)
    batch.momentum_NB.fill_(fill)
    batch.fisher.fill_(fill)
    return batch


def whole(batch: Batch) -> torch.Tensor:
    """F as whole blocks."""
    return fisher.unpack(batch.fisher, batch.size) if batch.structure.packed else batch.fisher


def settings(backend: str = "triton", **changes: Any) -> dict[str, Any]:
    result = {**DEFAULTS, "backend": backend, **changes}
    normalize(result)
    return result


def gradients(rows: int, size: int, steps: int, scale: float = 1.0) -> torch.Tensor:
    rng = np.random.default_rng([rows, size])
    mean, spread = rng.standard_normal((rows, size)), np.exp(rng.standard_normal((rows, size)))
    values = scale * spread * (0.5 * mean + rng.standard_normal((steps, rows, size)))
    return torch.tensor(values, dtype=torch.float32, device=DEVICE)


def assert_same_fisher(got: torch.Tensor, want: torch.Tensor) -> None:
    """But for the last bit, since torch may fuse a product with a sum; in bfloat16 that seldom tips a rounding."""
    diagonal = want.float().diagonal(dim1=1, dim2=2).sqrt()
    size = diagonal[:, :, None] * diagonal[:, None, :]  # |Fᵢⱼ| is at most that, and so is |hᵢ hⱼ|
    far = (got.float() - want.float()).abs() > 2**-22 * size
    if got.dtype == torch.bfloat16:
        assert far.float().mean() < 0.01
        far = (got.float() - want.float()).abs() > 2**-7 * size
    assert not far.any()


def double(x: torch.Tensor) -> Rows:
    return x.double().cpu().numpy()


def distance(got: torch.Tensor | Rows, want: torch.Tensor | Rows) -> float:
    """The largest relative error of a row."""
    got, want = (double(x) if isinstance(x, torch.Tensor) else x for x in (got, want))
    assert np.isfinite(got).all()
    lengths = np.linalg.norm(want, axis=1)
    return float((np.linalg.norm(got - want, axis=1) / np.where(lengths > 0, lengths, 1)).max())


def by_oracle(batch: Batch, gradient_NB: torch.Tensor, t: int, k: int, h: dict[str, Any]) -> Rows:
    """The oracle's u of the F and m that the batch has now."""
    hat_NB = double(batch.momentum_NB) / ((1 - h["momentum"] ** t) if h["bias_correction"] else 1)
    if h["nesterov"]:
        hat_NB = h["momentum"] * hat_NB + (1 - h["momentum"]) * double(gradient_NB)
    unbias = 1 / (1 - h["fisher_decay"] ** k) if h["bias_correction"] else 1
    u_NB = np.zeros_like(hat_NB)
    for row, f_hat in enumerate(double(whole(batch)) * unbias):
        block = Block(0, batch.size, 0, True, f_hat)
        refresh(block, f_hat, h)
        u_NB[row] = dense_direction(block, f_hat, hat_NB[row], h)
    return u_NB


def check_steps(batch: Batch, grads: torch.Tensor, h: dict[str, Any], first: int = 1) -> None:
    """Take steps, and compare each with the torch path on dense blocks from the same state, and with the oracle."""
    other = make(batch.size, len(batch.fisher), batch.fisher.dtype)
    # Rounding, times the largest condition number that A can have.
    tolerance = 3e-7 * (1 + batch.size / h["damping"])
    k = 0
    for t, gradient_NB in enumerate(grads, start=first):
        k += stacked.updates_fisher(t, h)
        for mine in (batch, other):
            mine.gradient_NB.copy_(gradient_NB)
        other.momentum_NB.copy_(batch.momentum_NB)
        other.fisher.copy_(whole(batch))
        stacked.compute(batch, 0, len(grads[0]), t, k, h)
        stacked.compute(other, 0, len(grads[0]), t, k, {**h, "backend": "torch"})

        assert_same_fisher(whole(batch), other.fisher)
        assert torch.equal(whole(batch), whole(batch).mT) and torch.equal(other.fisher, other.fisher.mT)
        assert distance(batch.momentum_NB, other.momentum_NB) < 1e-6
        assert distance(batch.gradient_NB, by_oracle(batch, gradient_NB, t, k, h)) < tolerance, f"u at step {t}"
        if batch.fisher.dtype != torch.bfloat16 or torch.equal(whole(batch), other.fisher):
            assert distance(batch.gradient_NB, other.gradient_NB) < tolerance, f"u at step {t}"


@kernel
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_every_size(size: int, dtype: torch.dtype, packed: bool) -> None:
    steps, rows = (2, 1) if size == 128 else (3, 3 if size <= 16 else 2)
    # In bfloat16 F is no longer positive semidefinite; more damping, so that no block needs the ladder.
    check_steps(make(size, rows, dtype, packed=packed), gradients(rows, size, steps), settings(damping=0.3))


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
    check_steps(make(7, 2, torch.float32), gradients(2, 7, 3), settings(grafting=grafting, **changes))
    check_steps(
        make(16, 2, torch.bfloat16), gradients(2, 16, 3), settings(**{"damping": 0.3, "grafting": grafting, **changes})
    )


@kernel
@pytest.mark.parametrize("grafting", ["rms", "none"])
@pytest.mark.parametrize("scale", [1e-12, 1e-6, 1e3, 1e6])
def test_gradients_of_any_scale(scale: float, grafting: str) -> None:
    for dtype in DTYPES:
        check_steps(make(16, 2, dtype), gradients(2, 16, 2, scale), settings(grafting=grafting, damping=0.3))


@kernel
@pytest.mark.parametrize("scale", [1e-22, 1e-19])
def test_gradients_whose_squares_underflow(scale: float) -> None:
    """F is zero or barely a number; u is finite, and the torch path's."""
    for grafting in ("rms", "none"):
        batch, other = make(7, 2, torch.float32), make(7, 2, torch.float32)
        for mine, backend in ((batch, "triton"), (other, "torch")):
            mine.gradient_NB.copy_(gradients(2, 7, 1, scale)[0])
            stacked.compute(mine, 0, 2, 1, 1, settings(backend, grafting=grafting))
        assert distance(batch.gradient_NB, other.gradient_NB) < 1e-4


@kernel
@pytest.mark.parametrize("grafting", ["rms", "none"])
def test_no_gradient_yet(grafting: str) -> None:
    for dtype in DTYPES:
        batch = make(16, 5, dtype)
        batch.gradient_NB[2] = 1.0  # beside blocks of zeros, in one program
        stacked.compute(batch, 0, 5, 1, 1, settings(grafting=grafting))
        assert batch.gradient_NB[2].isfinite().all() and batch.gradient_NB[2].all()
        for tensor in (batch.gradient_NB, batch.momentum_NB, batch.fisher):
            assert not tensor[[0, 1, 3, 4]].any()
        assert batch.rungs_N3 is not None and not batch.rungs_N3.any()


@kernel
@pytest.mark.parametrize("grafting", ["rms", "none"])
def test_a_gradient_that_the_fisher_has_not_seen(grafting: str) -> None:
    batch = make(7, 2, torch.float32)
    batch.gradient_NB.fill_(1.0)
    stacked.compute(batch, 0, 2, 2, 1, settings(grafting=grafting, fisher_update_freq=2))
    assert batch.momentum_NB.all() and not batch.gradient_NB.any()


@kernel
@pytest.mark.parametrize("packed", [False, True])
def test_whole_optimizer(packed: bool) -> None:
    """From the first step on, against the oracle, over rows that are cut into blocks of several sizes."""
    rng = np.random.default_rng(0)
    shapes = [(2, 45), (3,), (5, 7)]  # blocks of 12, 11; 3; 14, 7
    start = [rng.standard_normal(shape).astype(np.float32) for shape in shapes]
    parameters = [torch.nn.Parameter(torch.tensor(value, device=DEVICE)) for value in start]
    hyper: dict[str, Any] = {"block_size": 14, "lr": 1e-2, "fisher_update_freq": 2, "max_blocks": 7}
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
    optimizer = AdaFisher({"a": parameters[0], "b": parameters[1]}.items(), backend="triton", block_size=7)

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
@pytest.mark.parametrize(("size", "damping", "beyond"), [(7, 0.01, 1.05), (16, 0.0, 1.005), (20, 0.01, 1.05)])
def test_the_ladder(size: int, damping: float, beyond: float, packed: bool) -> None:
    """A block that cannot be factorised takes the torch path's update and rung; its neighbours do not notice."""
    rows, grads = 5, gradients(5, size, 1)[0]
    diagonal = torch.linspace(0.5, 1.5, size, device=DEVICE)
    diagonal[:2] = 1.0
    batch, other, healthy = (make(size, rows, torch.float32) for _ in range(3))
    for mine in (batch, other, healthy):
        mine.fisher.copy_(diagonal.diag().expand(rows, size, size))
        mine.gradient_NB.copy_(grads)
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
    assert distance(batch.gradient_NB, other.gradient_NB) < 1e-4
    assert torch.equal(batch.gradient_NB[[0, 2, 4]], healthy.gradient_NB[[0, 2, 4]])
    assert not healthy.rungs_N3.any()


@kernel
@pytest.mark.parametrize("value", [3e37, float("inf"), float("nan")])
@pytest.mark.parametrize("grafting", ["rms", "none"])
def test_a_fisher_out_of_range(value: float, grafting: str) -> None:
    """As in the torch path; above all, neighbours in the same program are as they would be."""
    size, rows = 16, 4
    grads = gradients(rows, size, 1)[0]
    batch, other = make(size, rows, torch.float32, 1.0), make(size, rows, torch.float32, 1.0)
    for mine, backend in ((batch, "triton"), (other, "torch")):
        mine.fisher[2] = value
        mine.gradient_NB.copy_(grads)
        stacked.compute(mine, 0, rows, 2, 1, settings(backend, fisher_update_freq=2, grafting=grafting))
    for row in range(rows):
        torch.testing.assert_close(batch.gradient_NB[row], other.gradient_NB[row], rtol=1e-4, atol=1e-5, equal_nan=True)


@kernel
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("size", "ranges"), [(16, [(1, 6), (0, 1), (6, 9)]), (33, [(1, 2), (0, 1)])])
def test_ranges_of_rows(size: int, ranges: Sequence[tuple[int, int]], dtype: torch.dtype, packed: bool) -> None:
    """Rows do not depend on the range that they are worked on with, and no others are touched."""
    h, rows = settings(), max(stop for _, stop in ranges)
    alone, parts = make(size, rows, dtype, 0.5, packed), make(size, rows, dtype, 0.5, packed)
    grads = gradients(rows, size, 1)[0]
    alone.gradient_NB.copy_(grads)
    parts.gradient_NB.copy_(grads)
    stacked.compute(alone, 0, rows, 3, 3, h)
    done: set[int] = set()
    for start, stop in ranges:
        stacked.compute(parts, start, stop, 3, 3, h)
        done |= set(range(start, stop))
        left = [row for row in range(rows) if row not in done]
        assert torch.equal(parts.gradient_NB[left], grads[left])
        assert (parts.momentum_NB[left] == 0.5).all() and (parts.fisher[left] == 0.5).all()
    for name in ("gradient_NB", "momentum_NB", "fisher"):
        assert torch.equal(getattr(parts, name), getattr(alone, name)), name


@kernel
@pytest.mark.parametrize("packed", [False, True])
def test_more_than_2_to_the_31_elements(packed: bool) -> None:
    size = 64
    # 4 GiB in bfloat16, of which the last rows are touched
    rows = 2**31 // (fisher.packed_numel(size) if packed else size**2) + 2
    structure = Structure(size, "rows", None, torch.bfloat16, 1.0, False, packed)
    big = stacked.allocate(0, size, True, structure, np.arange(rows), rows, DEVICE, zeroed=False)
    big.rungs_N3 = torch.empty(rows, 3, dtype=torch.int32, device=DEVICE)
    small = stacked.allocate(0, size, True, structure, np.arange(rows - 1, rows), 1, DEVICE)
    gradient = gradients(1, size, 1)[0]
    for mine in (big, small):
        for tensor in (mine.fisher, mine.momentum_NB):
            tensor[-1].zero_()
        mine.gradient_NB[-1:] = gradient
        stacked.compute(mine, len(mine.fisher) - 1, len(mine.fisher), 1, 1, settings())
    for name in ("gradient_NB", "momentum_NB", "fisher"):
        assert torch.equal(getattr(big, name)[-1:], getattr(small, name)), name


@kernel
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [7, 16])
def test_the_gate(size: int, dtype: torch.dtype, packed: bool) -> None:
    """Open, it changes nothing; shut, u is 0 and all else stays, whatever the gradient holds."""
    grads, h = gradients(3, size, 3), settings(damping=0.3)
    gated, free = (make(size, 3, dtype, packed=packed) for _ in range(2))
    for t, gradient_NB in enumerate(grads, start=1):
        gated.gradient_NB.copy_(gradient_NB)
        gated.gradient_NB[1, ::2] = float("nan")
        gated.gradient_NB[2] = 3e38
        before = {name: tensor.clone() for name, tensor in gated.tensors().items()}
        stacked.compute(gated, 0, 3, t, t, h, go=torch.tensor(0, dtype=torch.int32, device=DEVICE))
        assert not gated.gradient_NB.any()
        assert all(torch.equal(tensor, before[name]) for name, tensor in gated.tensors().items())
        for mine, go in ((gated, torch.tensor(1, dtype=torch.int32, device=DEVICE)), (free, None)):
            mine.gradient_NB.copy_(gradient_NB)
            stacked.compute(mine, 0, 3, t, t, h, go=go)
        assert torch.equal(gated.gradient_NB, free.gradient_NB)
        assert all(torch.equal(tensor, free.tensors()[name]) for name, tensor in gated.tensors().items())
    assert gated.rungs_N3 is not None and not gated.rungs_N3.any()


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_the_gate_of_diagonal_blocks(dtype: torch.dtype) -> None:
    structure = Structure(16, "rows", 0, dtype, 1.0, False, True)
    gated, free = (stacked.allocate(0, 1, False, structure, np.arange(5), 5, DEVICE) for _ in range(2))
    for t in (1, 2, 3):
        gradient_N1 = gradients(5, 1, 1)[0].to(structure.compute_dtype)
        gated.gradient_NB.copy_(gradient_N1)
        gated.gradient_NB[1] = float("nan")
        before = {name: tensor.clone() for name, tensor in gated.tensors().items()}
        stacked.compute(gated, 0, 5, t, t, settings("auto"), go=torch.tensor(0, dtype=torch.int32, device=DEVICE))
        assert not gated.gradient_NB.any()
        assert all(torch.equal(tensor, before[name]) for name, tensor in gated.tensors().items())
        for mine, go in ((gated, torch.tensor(1, dtype=torch.int32, device=DEVICE)), (free, None)):
            mine.gradient_NB.copy_(gradient_N1)
            stacked.compute(mine, 0, 5, t, t, settings("auto"), go=go)
        assert torch.equal(gated.gradient_NB, free.gradient_NB) and gated.gradient_NB.all()
        assert all(torch.equal(tensor, free.tensors()[name]) for name, tensor in gated.tensors().items())


def test_the_torch_path_of_dense_blocks_has_no_gate() -> None:
    with pytest.raises(AssertionError, match="no gate"):
        stacked.compute(make(7, 1, torch.float32), 0, 1, 1, 1, settings("torch"), go=torch.ones((), dtype=torch.int32))


FITTING = Structure(16, "rows", None, torch.float32, 1.0, False, False)
MISFITS = [
    ({"block_size": 129}, "block_size is 129.*Use block_size=128"),
    ({"fisher_dtype": torch.float64}, "fisher_dtype is torch.float64.*Use torch.float32"),
    ({"exponent": 0.5}, "exponent is 0.5.*Use exponent=1.0"),
    ({"keeps_factors": True}, "inverse_update_freq is above 1.*Use inverse_update_freq=1"),
]


def test_what_fits() -> None:
    assert stacked.fits(FITTING)
    for change in ({"block_size": 128}, {"fisher_dtype": torch.bfloat16}, {"packed": True}, {"max_blocks": 3}):
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
    assert stacked.uses_kernel(FITTING, "auto", DEVICE) == (DEVICE.type == "cuda")


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

size, dtype, packed, gated = int(sys.argv[1]), sys.argv[2], sys.argv[3] == "True", sys.argv[4] == "True"
constants = fused.constants(size) | dict(
    GATED=gated, UPDATES=True, ROUNDED=dtype == "bf16", PACKED=packed, BY_DIAGONAL=True
)
types = dict(fisher_ptr="*" + dtype, momentum_ptr="*fp32", gradient_ptr="*fp32", number_ptr="*i32", rungs_ptr="*i32",
             go_ptr="*i32", start="i32", stop="i32", offset="i32")
names = step_kernel.arg_names
source = ASTSource(
    fn=step_kernel, signature={name: "constexpr" if name in constants else types.get(name, "fp32") for name in names},
    constexprs=constants,
    attrs={(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name.endswith("_ptr")},
)
made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=fused.options(size))
assert made.asm["cubin"]
tile = "tensor<{WIDTH}x{NUMBER}x{WIDTH}x".format(**constants)
moved = [line for line in made.asm["ttgir"].splitlines() if "convert_layout" in line and tile in line]
assert not moved, moved
assert made.metadata.shared <= 4096, made.metadata.shared
"""


@pytest.mark.parametrize(
    ("size", "dtype", "packed", "gated"),
    [(16, "fp32", False, False), (43, "bf16", True, False), (64, "fp32", False, True), (64, "fp32", True, True)],
)
def test_compiles_for_an_h100(size: int, dtype: str, packed: bool, gated: bool, tmp_path: Path) -> None:
    """The compiler needs no GPU. A tile stays in the layout in which it is loaded: nothing is sent round by it."""
    env = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, *map(str, (size, dtype, packed, gated))], env=env, capture_output=True,
        text=True, timeout=200, cwd=Path(__file__).parent.parent,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
