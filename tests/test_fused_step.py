"""The kernel of a step, by Triton's interpreter, beside torch's products in float64.

Triton comes with the `dev` extra: where it is missing these tests fail, and are not skipped.
"""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from adafisher_dist import AdaFisher
from adafisher_dist.blocks.grid import BlockShape
from adafisher_dist.numerics import fused_step
from adafisher_dist.numerics.block_stack import BlockStack, allocate
from adafisher_dist.numerics.block_step import StepContext, update_blocks
from adafisher_dist.settings import DEFAULTS, normalize, state_config, step_settings

# Of both branches of tl.where, the interpreter works out the one that is not taken, too.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")

CPU = torch.device("cpu")
# The worst of what follows is 4e-4, where F has a condition of 10⁴ and gradients scales from 1 to
# 10⁻⁴; float32 has 5e-6 there, and as much as the kernel where gradients are of rank one.
CLOSE = 1e-3


@pytest.fixture
def by_kernel(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    monkeypatch.setenv("ADAFISHER_KERNEL", "1")
    yield monkeypatch


def settings_of(columns: int, rows: int, **own: Any) -> dict[str, Any]:
    result = {**DEFAULTS, "block_size": columns, "rows_per_block": rows, **own}
    normalize(result)
    return result


def stack_of(columns: int, rows: int, count: int, **own: Any) -> BlockStack:
    config = state_config(settings_of(columns, rows, **own))
    return allocate(0, BlockShape(columns, rows, True), config, np.arange(5, 5 + count), CPU)


def steps(
    stack: BlockStack, gradients: Sequence[Tensor], own: dict[str, Any], should_step: Tensor | None = None
) -> list[Tensor]:
    """The updates of some steps."""
    settings, updates = step_settings(own), []
    for t, gradient_NRB in enumerate(gradients, start=1):
        update_NRB = gradient_NRB.to(stack.momentum_NRB.dtype, copy=True)
        update_blocks(stack, update_NRB, StepContext(settings, t, t, should_step))
        updates.append(update_NRB)
    return updates


def compare(gradients: Sequence[Tensor], **own: Any) -> float:
    """How far the kernel's updates are from torch's, relative to a block; its state is as torch's.

    Torch's are in float64, but for a bfloat16 F, which has to be rounded alike.
    """
    count, rows, columns = gradients[0].shape
    settings = settings_of(columns, rows, **own)
    wide = own if settings["fisher_dtype"] == "bfloat16" else {**own, "fisher_dtype": "float64"}
    stack, other = stack_of(columns, rows, count, **own), stack_of(columns, rows, count, **wide)
    assert stack.fused
    other.fused = False
    found, want = steps(stack, gradients, settings), steps(other, gradients, settings)
    for name, state in stack.state.items():
        margin = 1e-6 * float(state.abs().max())
        assert torch.allclose(state.double(), other.state[name].double(), 2e-5, margin), name
    furthest = 0.0
    for update, wanted in zip(found, want, strict=True):
        lengths = wanted.double().norm(dim=(1, 2))
        distances = (update.double() - wanted.double()).norm(dim=(1, 2))
        furthest = max(furthest, float((distances / torch.where(lengths > 0, lengths, 1.0)).max()))
    return furthest


def normal(rows: int, columns: int, count: int = 2, number: int = 3) -> list[Tensor]:
    """Gradients of some steps, smaller from step to step, with columns of several scales."""
    generator = torch.Generator().manual_seed(rows * columns)
    scale = torch.logspace(0, -1.5, columns)
    return [
        torch.randn(count, rows, columns, generator=generator) * scale * 10 ** (-step / 3) for step in range(number)
    ]


@pytest.mark.parametrize(
    ("rows", "columns", "own"),
    [
        (16, 16, {}),
        (5, 33, {}),
        (3, 20, {"fisher_dtype": "bfloat16", "packed": True}),
        (4, 8, {"fisher_decay": 0.9999, "momentum": 0.999}),
        *(
            pytest.param(*case, marks=pytest.mark.ci)
            for case in (
                (40, 24, {"nesterov": False, "bias_correction": False}),
                (1, 64, {}),
                (1, 1, {}),
                (64, 16, {"packed": True}),
                (7, 33, {"fisher_dtype": "bfloat16"}),
                (9, 16, {"eps": 0.3, "momentum": 0.0}),
            )
        ),
    ],
)
def test_close_to_float64(by_kernel: pytest.MonkeyPatch, rows: int, columns: int, own: dict[str, Any]) -> None:
    assert compare(normal(rows, columns), **own) < CLOSE


@pytest.mark.ci
def test_the_default_block(by_kernel: pytest.MonkeyPatch) -> None:
    assert compare(normal(64, 128, count=1, number=2)) < CLOSE


@pytest.mark.parametrize("kind", ["one direction", "one column", "one row", "nothing", "scales", "huge", "subnormal"])
def test_gradients_of_every_kind(by_kernel: pytest.MonkeyPatch, kind: str) -> None:
    rows, columns = 24, 32
    make = {
        "one direction": lambda g: torch.randn(2, rows, 1, generator=g) @ torch.ones(1, columns),
        "one column": lambda g: torch.randn(2, rows, columns, generator=g) * (torch.arange(columns) == 5),
        "one row": lambda g: torch.randn(2, rows, columns, generator=g) * (torch.arange(rows) == 5)[:, None],
        "nothing": lambda g: torch.zeros(2, rows, columns),
        "scales": lambda g: torch.randn(2, rows, columns, generator=g) * torch.logspace(0, -4, columns),
        "huge": lambda g: torch.randn(2, rows, columns, generator=g) * 1e15,
        "subnormal": lambda g: torch.randn(2, rows, columns, generator=g) * 1e-40,
    }[kind]
    generator = torch.Generator().manual_seed(1)
    gradients = [make(generator) for _ in range(3)]
    if kind == "subnormal":  # squares are 0 in float32: no update, in torch neither
        updates = steps(stack_of(columns, rows, 2), gradients, settings_of(columns, rows))
        assert all(not update.any() for update in updates)
        return
    # Rounding errors of rank-one gradients are stretched by up to 113 · 485, in float32 as well.
    assert compare(gradients) < (3e-2 if kind == "one direction" else CLOSE)


def test_a_bad_block_leaves_the_others_alone(by_kernel: pytest.MonkeyPatch) -> None:
    gradients, own = normal(8, 16, count=3), settings_of(16, 8)
    want = steps(stack_of(16, 8, 3), gradients, own)
    spoilt = [gradient.clone() for gradient in gradients]
    for gradient in spoilt:
        gradient[1, 2, 3] = float("nan")
    found = steps(stack_of(16, 8, 3), spoilt, own)
    for update, wanted in zip(found, want, strict=True):
        assert torch.equal(update[::2], wanted[::2]) and not update[1].isfinite().all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_shut_gate_changes_nothing(by_kernel: pytest.MonkeyPatch, dtype: str) -> None:
    own, gradients = settings_of(16, 5, fisher_dtype=dtype), normal(5, 16)
    shut, is_open = (torch.tensor(should_step, dtype=torch.int32) for should_step in (0, 1))
    stack = stack_of(16, 5, 2, fisher_dtype=dtype)
    steps(stack, gradients[:1], own)
    before = {name: state.clone() for name, state in stack.state.items()}
    (update,) = steps(stack, [torch.full_like(gradients[0], float("nan"))], own, shut)
    assert not update.any()
    assert all(torch.equal(state, before[name]) for name, state in stack.state.items())
    free = stack_of(16, 5, 2, fisher_dtype=dtype)
    gated = stack_of(16, 5, 2, fisher_dtype=dtype)
    for one, other in zip(steps(free, gradients, own), steps(gated, gradients, own, is_open), strict=True):
        assert torch.equal(one, other)


def test_a_whole_optimizer(by_kernel: pytest.MonkeyPatch) -> None:
    def train(asked: str) -> list[Tensor]:
        by_kernel.setenv("ADAFISHER_KERNEL", asked)
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(8, 12), torch.nn.Tanh(), torch.nn.Linear(12, 4))
        optimizer = AdaFisher(model.parameters(), lr=1e-2, block_size=16, rows_per_block=8)
        for _ in range(2):
            optimizer.zero_grad()
            model(torch.randn(6, 8)).square().sum().backward()
            optimizer.step()
        return [parameter.detach().clone() for parameter in model.parameters()]

    by_torch = train("0")
    for own, other in zip(train("1"), by_torch, strict=True):
        assert torch.allclose(own, other, 1e-4, 1e-5)
        assert not torch.equal(own, other) or own.dim() == 1  # vectors have no blocks


@pytest.mark.parametrize(
    "own",
    [
        {"exponent": 1.0},
        {"grafting": "none"},
        {"inverse_update_freq": 4},
        {"fisher_dtype": "float64"},
        {"block_size": 256},
        {"rows_per_block": 128},
    ],
)
def test_torch_steps_what_the_kernel_does_not(by_kernel: pytest.MonkeyPatch, own: dict[str, Any]) -> None:
    settings = settings_of(**{"columns": own.get("block_size", 128), "rows": own.get("rows_per_block", 64)}) | own
    normalize(settings)
    shape = BlockShape(settings["block_size"], settings["rows_per_block"], True)
    assert not fused_step.can_step(shape, state_config(settings), CPU)
    assert fused_step.can_step(BlockShape(128, 64, True), state_config(settings_of(128, 64)), CPU)


def test_little_damping_is_torch_s(by_kernel: pytest.MonkeyPatch) -> None:
    """The same bits: at so little damping, the kernel's 22 bits would not do."""
    gradients = normal(5, 16)
    little = settings_of(16, 5, damping=0.004)
    found = steps(stack_of(16, 5, 2), gradients, little)
    plain = stack_of(16, 5, 2)
    plain.fused = False
    for update, wanted in zip(found, steps(plain, gradients, little), strict=True):
        assert torch.equal(update, wanted)


def test_it_has_to_be_asked_for_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for asked in ("", "0"):
        monkeypatch.setenv("ADAFISHER_KERNEL", asked)
        assert not stack_of(16, 5, 1).fused
    monkeypatch.setenv("ADAFISHER_KERNEL", "true")
    with pytest.raises(ValueError, match="ADAFISHER_KERNEL should be 0 or 1, got 'true'"):
        stack_of(16, 5, 1)


def test_where_triton_cannot_compile_torch_takes_the_step(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As in an image without a C compiler: here, without a CUDA device."""
    for interpreted, told in (("1", "is for CPUs"), ("0", "cannot run here")):
        monkeypatch.setenv("TRITON_INTERPRET", interpreted)
        fused_step._runs_on.cache_clear()
        with caplog.at_level(logging.WARNING, logger="adafisher_dist"):
            assert not fused_step._runs_on(torch.device("cuda", 0), "1")
        assert told in caplog.text
    fused_step._runs_on.cache_clear()


def test_only_the_lower_triangle_counts(by_kernel: pytest.MonkeyPatch) -> None:
    own, gradients = settings_of(16, 5), normal(5, 16)
    updates = []
    for value in (None, float("nan")):
        stack = stack_of(16, 5, 2)
        steps(stack, gradients[:1], own)
        if value is not None:
            upper = torch.ones(16, 16).triu(1).bool()
            stack.fisher[:, upper] = value
        updates += steps(stack, gradients[1:2], own)
        assert torch.equal(stack.fisher, stack.fisher.mT)
    assert torch.equal(*updates)


COMPILE = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from adafisher_dist.numerics.fused_kernel import step_kernel

names = step_kernel.arg_names
consts = dict(R=16, B=16, SQUARES=True, PACKED=False, ROUNDED=True, GATED=True, TINY=1.2e-38)
consts |= dict(STEPS=3, WHOLE=False, PA=3.4445, PB=-4.775, PC=2.0315)
kinds = {name: "*fp32" for name in names if name.endswith("_ptr")} | {"rows": "i32", "columns": "i32"}
kinds |= {"fisher_ptr": "*bf16", "seed_ptr": "*i32", "should_step_ptr": "*i32"}
signature = {name: "constexpr" if name in consts else kinds.get(name, "fp32") for name in names}
source = ASTSource(step_kernel, signature, {(names.index(name),): value for name, value in consts.items()})
print(compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"])
"""


@pytest.mark.ci
def test_nothing_takes_a_subnormal_for_zero() -> None:
    """A row that has had gradients and has none now has a subnormal w: 1/√w has to be finite.

    The interpreter cannot tell: `tl.sqrt` is numpy's there, and `sqrt.approx.ftz` on a GPU.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", COMPILE], env=environment, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "sqrt.rn" in done.stdout and ".ftz" not in done.stdout


STACK = COMPILE.replace("R=16, B=16", "R=64, B=128").replace("ROUNDED=True", "ROUNDED=False")
STACK = STACK.replace("GATED=True", "GATED=False").replace("WHOLE=False", "WHOLE=True").replace('"*bf16"', '"*fp32"')
STACK = (
    STACK[: STACK.rindex("print(")]
    + """
import os, subprocess, sys, tempfile, triton
aligned = {(index,): [["tt.divisibility", 16]] for index, name in enumerate(names) if name.endswith("_ptr")}
source = ASTSource(step_kernel, signature, source.constants, aligned)
compiled = compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8})
with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
    file.write(compiled.asm["cubin"])
    file.flush()
    tool = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
    print(subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout)
"""
)


@pytest.mark.ci
def test_the_default_block_hardly_spills() -> None:
    """A program of the default block has 64 times 128 elements and no register to spare."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", STACK], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (stack,) = map(int, re.findall(r"STACK:(\d+)", done.stdout))
    assert stack <= 800  # bytes: 1,824 with masks for padding, which a whole block does not have
