"""Singular, huge, tiny or non-finite gradients: the state stays finite, the remedy is reported."""

from __future__ import annotations

import logging
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from adafisher_dist import AdaFisher
from adafisher_dist.numerics.factors import factorize
from adafisher_dist.settings import LARGEST


def run(gradients: list[Tensor], **settings: object) -> tuple[nn.Parameter, AdaFisher]:
    parameter = nn.Parameter(torch.zeros(gradients[0].shape, dtype=gradients[0].dtype))
    optimizer = AdaFisher([("weight", parameter)], **{"lr": 0.1, "weight_decay": 0.0, **settings})
    for gradient in gradients:
        parameter.grad = gradient
        optimizer.step()
    return parameter, optimizer


def state_is_finite(optimizer: AdaFisher) -> bool:
    return all(torch.isfinite(v).all() for entry in optimizer.state.values() for v in entry.values())


@pytest.mark.parametrize("exponent", [1.0, 0.5])
@pytest.mark.parametrize("shape", [(64,), (8, 8)], ids=str)
def test_a_singular_fisher_costs_nothing(shape: tuple[int, ...], exponent: float) -> None:
    """For p = 1 it takes fallbacks, which are counted; for p = 1/2 there is no need."""
    # One gradient direction and no damping worth the name: A has rank one to float32's rounding.
    gradient = torch.sin(torch.arange(64.0)).view(shape)
    gradient = gradient[:1] * torch.linspace(1, 2, len(gradient))[:, None] if gradient.dim() > 1 else gradient
    settings = {"exponent": exponent, "block_grid": "flat" if gradient.dim() == 1 else "rows"}
    parameter, optimizer = run([gradient] * 5, damping=0.0, eps=1e-12, **settings)
    failures = sum(optimizer.fisher_stats()["weight"].ladder.values())
    assert (failures > 0) == (exponent == 1.0), "the factorisation did not fail: this test shows nothing"
    assert state_is_finite(optimizer) and torch.isfinite(parameter).all()
    assert (parameter.detach() * gradient).sum() < 0, "not a descent direction"


def test_every_rung_of_the_ladder() -> None:
    fine = torch.eye(3)
    slightly_negative = torch.diag(torch.tensor([1.0, 1.0, 0.5]))
    slightly_negative[2, 2] = -0.005  # 10 × damping repairs it
    hopeless = torch.tensor([[1.0, 5.0, 0.0], [5.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    stack = torch.stack([fine, slightly_negative, hopeless])
    factor = factorize(stack, 1.0, 1e-3, 0.0, 1.0, torch.float32, exact=False)
    assert factor.fallback_N is not None and factor.fallback_N.tolist() == [0, 1, 3]
    assert torch.isfinite(factor.root_NBB).all()
    diagonal = stack[2].diagonal() / factor.d_N[2] + 1e-2
    assert torch.allclose(factor.root_NBB[2], torch.diag(diagonal.sqrt()))


def test_float64_is_the_second_rung(monkeypatch: pytest.MonkeyPatch) -> None:
    real = torch.linalg.cholesky_ex

    def only_in_float64(a: Tensor) -> tuple[Tensor, Tensor]:
        root, info = real(a)
        return root, info if a.dtype == torch.float64 else torch.ones_like(info)

    monkeypatch.setattr(torch.linalg, "cholesky_ex", only_in_float64)
    _, optimizer = run([torch.randn(10)] * 3, exponent=1.0, block_grid="flat")
    assert optimizer.fisher_stats()["weight"].ladder == {"more damping": 0, "float64": 3, "diagonal": 0}


# As a vector, whose elements are alone, as pieces of one, and as a matrix, whose rows share a block
# or do not.
STORED: list[tuple[tuple[int, ...], dict[str, Any]]] = [
    ((100,), {}),
    ((100,), {"block_grid": "flat"}),
    ((10, 10), {"rows_per_block": 1, "block_size": 10}),
    ((20, 5), {}),
]
stored = pytest.mark.parametrize(("shape", "blocks"), STORED, ids=str)


@stored
@pytest.mark.parametrize("scale", [1e-30, 1e-22, 1e-19, 1e-12, 1e6, 1e12, 1e17])
@pytest.mark.parametrize("grafting", ["rms", "none"])
@pytest.mark.parametrize("exponent", [1.0, 0.5])
def test_tiny_and_huge_gradients(
    scale: float, grafting: str, exponent: float, shape: tuple[int, ...], blocks: dict[str, Any]
) -> None:
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(shape, generator=generator) * scale for _ in range(6)]
    parameter, optimizer = run(gradients, grafting=grafting, exponent=exponent, **blocks)
    assert optimizer.skipped_steps == 0
    assert state_is_finite(optimizer)
    assert not parameter.isnan().any()
    if grafting == "rms":
        assert parameter.square().mean().sqrt() < 2, "longer than six steps of lr 0.1 can be"


@stored
@pytest.mark.parametrize("exponent", [1.0, 0.5])
def test_a_jump_in_scale(exponent: float, shape: tuple[int, ...], blocks: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(shape, generator=generator) * scale for scale in (1e17, 1e-12, 1e-12, 1.0, 1e17, 1e-30)]
    parameter, optimizer = run(gradients, fisher_update_freq=2, inverse_update_freq=2, exponent=exponent, **blocks)
    assert state_is_finite(optimizer) and torch.isfinite(parameter).all()


@stored
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e19])
def test_a_bad_gradient_leaves_no_trace(
    value: float, dtype: torch.dtype, shape: tuple[int, ...], blocks: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    good = [torch.sin(torch.arange(100.0) + step).view(shape).to(dtype) for step in range(4)]
    bad = good[0].clone()
    bad.view(-1)[17] = value
    clean, _ = run(good, **blocks)
    with caplog.at_level(logging.WARNING, "adafisher_dist"):
        parameter, optimizer = run([bad, good[0], good[1], bad, bad, good[2], good[3]], **blocks)
    assert torch.equal(parameter, clean)
    assert optimizer.skipped_steps == 3
    assert [record.args for record in caplog.records] == [(1,), (2,)]


@stored
def test_float64_takes_larger_gradients(shape: tuple[int, ...], blocks: dict[str, Any]) -> None:
    _, optimizer = run([torch.full(shape, 1e100, dtype=torch.float64)], fisher_dtype=torch.float64, **blocks)
    assert optimizer.skipped_steps == 0 and state_is_finite(optimizer)


@pytest.mark.parametrize("rows", [1, 3, 64])
@pytest.mark.parametrize("settings", [{}, {"grafting": "none"}, {"inverse_update_freq": 5}, {"max_blocks": 0}])
def test_a_block_that_never_saw_a_gradient_does_not_move(settings: dict[str, object], rows: int) -> None:
    gradient = torch.zeros(4, 10)
    gradient[1] = 1.0
    parameter, optimizer = run([gradient] * 4, block_size=10, rows_per_block=rows, **settings)
    assert torch.equal(parameter.detach().abs().sum(1) > 0, torch.tensor([False, True, False, False]))
    assert state_is_finite(optimizer)


def test_the_report_at_the_first_step(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "adafisher_dist"):
        run([torch.ones(10, 10)] * 3, max_blocks=1, rows_per_block=6)
    assert len(caplog.records) == 1
    message = caplog.records[0].getMessage()
    assert (
        "layout one process, 1 rank(s), 1 parameters, 100 elements in 2 blocks, 50.0 % of the elements on dense"
        in message
    )


@pytest.mark.parametrize("decay", [0.99, pytest.param(0.999, marks=pytest.mark.ci)])
@pytest.mark.parametrize("max_blocks", [None, 0])
def test_a_bfloat16_fisher_fills_and_decays(decay: float, max_blocks: int | None) -> None:
    # Rounded to nearest it would stop at 0.8 for ρ = 0.99 and at 0.25 for 0.999, and stay there.
    parameter = nn.Parameter(torch.zeros(30))
    settings = {"fisher_decay": decay, "block_size": 10, "block_grid": "flat", "max_blocks": max_blocks}
    optimizer = AdaFisher([parameter], fisher_dtype=torch.bfloat16, **settings)
    for size, expected in ((1.0, 1 - decay**1500), (1e-6, (1 - decay**1500) * decay**1500)):
        for _ in range(1500):
            parameter.grad = torch.full((30,), size)
            optimizer.step()
        stored = optimizer.state[parameter]["fisher_diagonal" if max_blocks == 0 else "fisher_10"].float()
        assert stored.mean() == pytest.approx(expected, rel=0.1)
    if max_blocks is None:
        assert torch.equal(stored, stored.mT)


@pytest.mark.parametrize("exponent", [1.0, 0.5])
@pytest.mark.parametrize("scale", [1e-19, 1e-20, 1e-21, 3e-22, 1e-22])
@stored
def test_kept_factors_of_tiny_gradients_are_finite(
    scale: float, exponent: float, shape: tuple[int, ...], blocks: dict[str, Any]
) -> None:
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(shape, generator=generator) * scale for _ in range(6)]
    _, optimizer = run(gradients, inverse_update_freq=3, exponent=exponent, **blocks)
    assert state_is_finite(optimizer)
    assert sum(optimizer.fisher_stats()["weight"].ladder.values()) == 0


class Allocations(TorchDispatchMode):
    """The bytes of the largest tensor that an operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        old = {
            tensor.untyped_storage().data_ptr() for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)
        }
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in old:
                self.largest = max(self.largest, tensor.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("rows", [1, 16, 64])
@pytest.mark.parametrize("settings", [{}, {"inverse_update_freq": 3}, {"packed": True}, {"exponent": 1.0}], ids=str)
def test_a_step_makes_nothing_of_the_size_of_the_state(settings: dict[str, Any], rows: int) -> None:
    """After the first step, temporaries are those of a tile: 2 MiB, whatever the model."""
    layer = nn.Linear(1024, 256 * rows, bias=False)
    optimizer = AdaFisher(layer.parameters(), block_size=64, rows_per_block=rows, max_blocks=10**6, **settings)
    layer.weight.grad = torch.randn_like(layer.weight)
    optimizer.step()
    with Allocations() as noted:
        optimizer.step()
    assert optimizer.memory_usage()["rank"]["fisher"] >= 2**25
    assert 2**20 < noted.largest <= 2**21


# ---- whose blocks they were, and what no Fisher has seen ----


def test_the_ladder_is_counted_by_parameter() -> None:
    parameters = [nn.Parameter(torch.ones(shape)) for shape in ((2, 7), (3, 7))]
    optimizer = AdaFisher(zip("ab", parameters, strict=True), exponent=1.0, block_size=7, rows_per_block=1)

    def diagonals_after_a_step() -> dict[str, int]:
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        ladders = {name: entry.ladder for name, entry in optimizer.fisher_stats().items()}
        assert all(sum(ladder.values()) == ladder["diagonal"] for ladder in ladders.values())
        return {name: ladder["diagonal"] for name, ladder in ladders.items()}

    assert diagonals_after_a_step() == {"a": 0, "b": 0}
    fisher_NBB = optimizer.state[parameters[1]]["fisher_7"]
    fisher_NBB[2, 0, 1] = fisher_NBB[2, 1, 0] = 9.0
    assert [diagonals_after_a_step() for _ in range(2)] == [{"a": 0, "b": 1}, {"a": 0, "b": 2}]


@pytest.mark.parametrize("exponent", [0.5, 1.0])
@pytest.mark.parametrize("grafting", ["rms", "none"])
@pytest.mark.parametrize("eps", [1e-20, 1e-24, 1e-37])
def test_rows_without_gradient_and_hardly_any_damping(eps: float, grafting: str, exponent: float) -> None:
    gradient = torch.ones(128, 64)
    gradient[:64] = 0
    parameter, optimizer = run([gradient] * 2, damping=0.0, eps=eps, grafting=grafting, exponent=exponent)
    assert not parameter[:64].any() and parameter.isfinite().all() and state_is_finite(optimizer)


@pytest.mark.parametrize("grafting", ["rms", "none"])
@pytest.mark.parametrize("max_blocks", [None, 0])
@pytest.mark.parametrize("rows", [1, 5])
def test_a_gradient_that_the_fisher_has_not_seen(rows: int, max_blocks: int | None, grafting: str) -> None:
    """It would be divided by ε."""
    gradients = [torch.zeros(5, 7), torch.ones(5, 7)]
    settings = {"rows_per_block": rows, "max_blocks": max_blocks, "grafting": grafting, "fisher_update_freq": 2}
    parameter, optimizer = run(gradients, **settings)
    sees_every_one = max_blocks == 0 or grafting == "rms"
    assert parameter.any() == sees_every_one
    assert parameter.abs().max() <= 0.1 and state_is_finite(optimizer)


@pytest.mark.parametrize("where", ["nowhere", "all", "rows", "columns"])
@pytest.mark.parametrize(
    "blocks", [{"max_blocks": 0}, {"block_grid": "flat"}, {}, *({"rows_per_block": rows} for rows in (1, 8))], ids=str
)
def test_rare_fisher_updates_bound_the_update(blocks: dict[str, Any], where: str) -> None:
    """No element is divided by a square of long ago, or by what 400 updates have left of it."""
    generator = torch.Generator().manual_seed(0)
    # Gradients come back at a step in which F would not be updated.
    freq, away, steps = (10, range(0), 24) if where == "nowhere" else (2, range(12, 813), 825)
    absent = torch.zeros(32, 32, dtype=torch.bool)
    absent[{"nowhere": [], "all": slice(None), "rows": slice(0, 20), "columns": (slice(None), slice(0, 20))}[where]] = 1
    parameter = nn.Parameter(torch.zeros(32, 32))
    optimizer = AdaFisher([parameter], lr=0.1, fisher_update_freq=freq, weight_decay=0.0, **blocks)
    for step in range(steps):
        gradient = torch.randn(32, 32, generator=generator)
        parameter.grad = gradient.masked_fill_(absent, 0.0) if step in away else gradient
        before = parameter.detach().clone()
        optimizer.step()
        assert (parameter - before).abs().max() < 0.1 * 8


@pytest.mark.parametrize("exponent", [0.5, 1.0])
def test_old_factors_bound_the_update_after_a_time_without_gradients(exponent: float) -> None:
    """Without grafting it is divided by the mean curvature, of which 300 steps leave little."""
    generator = torch.Generator().manual_seed(0)
    largest = []
    for inverse_update_freq in (1, 10):
        parameter = nn.Parameter(torch.zeros(16, 16))
        own = {"grafting": "none", "exponent": exponent, "inverse_update_freq": inverse_update_freq}
        optimizer = AdaFisher([parameter], lr=1e-3, weight_decay=0.0, **own)
        for step in range(450):
            parameter.grad = torch.randn(16, 16, generator=generator) * (0.0 if 100 <= step < 420 else 1e-2)
            optimizer.step()
        largest.append(float(parameter.detach().abs().max()))
    assert largest[1] < 10 * largest[0]


@pytest.mark.parametrize("noise", [1e-18, 1e-12, 1e-9])
def test_rows_of_rounding_errors_hardly_move(noise: float) -> None:
    """As by Adam, whose ε they are below: they take nothing from the others' length."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.full((64, 1), noise)
    scale[:4] = 1e-3
    gradients = [torch.randn(64, 64, generator=generator) * scale for _ in range(40)]
    moved = [run(gradients, weight_decay=0.0, **own)[0].abs() for own in ({}, {"max_blocks": 0})]
    assert moved[0][:4].mean() > 0.7 * moved[1][:4].mean()
    assert moved[0][4:].max() < 10 * moved[1][4:].max()


@pytest.mark.parametrize(
    "own", [{"damping": LARGEST}, {"damping": LARGEST, "eps": LARGEST, "block_size": 600}], ids=str
)
def test_the_largest_damping_leaves_the_direction(own: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(0)
    parameter, _ = run([torch.randn(64, 600, generator=generator) * 1e9], weight_decay=0.0, **{"eps": 1e-8, **own})
    assert parameter.any()


# ---- what a user allows their model ----


ORDERS = """
import itertools, torch
from adafisher_dist.numerics.precision import full_precision
cuda, cpu = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
ways = [
    *((torch.set_float32_matmul_precision, value) for value in ("highest", "high", "medium")),
    *((lambda value: setattr(cuda, "allow_tf32", value), value) for value in (True, False)),
    *((lambda value: setattr(cuda, "fp32_precision", value), value) for value in ("tf32", "ieee", "none")),
    *((lambda value: setattr(cpu, "fp32_precision", value), value) for value in ("bf16", "tf32", "ieee", "none")),
    *((lambda value: setattr(torch.backends, "fp32_precision", value), value) for value in ("tf32", "ieee", "none")),
]
def read(ask):
    try:
        return ask()
    except RuntimeError:
        return "torch refuses"
def state():
    own = [cuda.fp32_precision, cpu.fp32_precision, torch.backends.fp32_precision]
    return [read(lambda: cuda.allow_tf32), *own, read(torch.get_float32_matmul_precision)]
changed = 0
for number in (0, 1, 2, 3):
    for order in itertools.product(ways, repeat=number):
        for device, matmul in (("cuda", cuda), ("cpu", cpu)):
            torch.set_float32_matmul_precision("highest")
            torch.backends.fp32_precision = cuda.fp32_precision = cpu.fp32_precision = "none"
            for setter, value in order:
                setter(value)
            before, own = state(), matmul.fp32_precision
            with full_precision(torch.device(device)):
                assert matmul.fp32_precision in ("none", "ieee"), ([value for _, value in order], state())
                if device == "cuda":
                    assert read(lambda: cuda.allow_tf32) in (False, "torch refuses"), [value for _, value in order]
                changed += matmul.fp32_precision != own
            assert state() == before, ([value for _, value in order], before, state())
            if not order:  # what is set later still counts
                torch.backends.fp32_precision = "tf32"
                assert matmul.fp32_precision == "tf32"
assert changed > 1000, "there was something to switch off"
"""


def test_products_are_in_full_precision() -> None:
    """TF32 and bfloat16, set by either of torch's names in any order, are as before after it."""
    subprocess.run([sys.executable, "-W", "ignore", "-c", ORDERS], check=True, timeout=120)


def test_products_stay_in_full_precision_until_the_last_thread_leaves() -> None:
    """The setting is the process's, and two optimizers may step in two threads."""
    code = """
import torch
from adafisher_dist.numerics.precision import full_precision
torch.set_float32_matmul_precision("medium")
own = lambda: torch.backends.mkldnn.matmul.fp32_precision
before = own()
for _ in range(2):
    first, second = (full_precision(torch.device("cpu")) for _ in range(2))
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert own() in ("none", "ieee") != before, own()
    second.__exit__(None, None, None)
    assert own() == before == "bf16", own()
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, timeout=60)


@pytest.mark.parametrize(
    "settings", [{}, {"grafting": "none"}, {"exponent": 1.0}, {"inverse_update_freq": 3}, {"max_blocks": 0}], ids=str
)
def test_a_step_inside_of_autocast(settings: dict[str, Any]) -> None:
    """It is that of outside: autocast is for the model's products."""
    generator = torch.Generator().manual_seed(0)
    rank_4 = [torch.randn(64, 4, generator=generator) @ torch.randn(4, 96, generator=generator) for _ in range(5)]

    def train() -> tuple[Tensor, dict[str, float]]:
        parameter, optimizer = run(rank_4, **settings)
        told: list[dict[str, float]] = []
        optimizer.report_metrics(lambda _, metrics: told.append(metrics), every=1)
        optimizer.step()
        optimizer.flush_metrics()
        return parameter.detach(), {name: number for name, number in told[0].items() if name != "communication_ms"}

    weights, metrics = train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside, metrics_inside = train()
    assert torch.equal(inside, weights) and metrics_inside == metrics


@pytest.mark.parametrize("grafting", ["rms", "none"])
@pytest.mark.parametrize("rank", [1, 4])
def test_a_bfloat16_fisher_of_uneven_columns_stays_positive_definite(rank: int, grafting: str) -> None:
    """Despite rounding noise of F's large elements, updates stay in the gradients' directions."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(rank, 128, generator=generator) * torch.randn(128, generator=generator).exp()
    gradients = [torch.randn(64, rank, generator=generator) @ directions for _ in range(40)]
    settings = {"lr": 1e-3, "weight_decay": 0.0, "grafting": grafting, "max_blocks": 10**6}
    moved = []
    for dtype in (torch.float32, torch.bfloat16):
        parameter = nn.Parameter(torch.zeros(64, 128))
        optimizer = AdaFisher([parameter], fisher_dtype=dtype, **settings)
        for gradient in gradients:
            parameter.grad = gradient.clone()
            optimizer.step()
        assert torch.isfinite(parameter).all()
        span = torch.linalg.qr(directions.T)[0]
        moved.append(float((parameter.detach() @ span).norm() / parameter.detach().norm()))
    assert moved[1] > 0.9 * moved[0], "the update lies where the gradients are"
