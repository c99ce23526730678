"""`backend="auto"`: the Triton kernel is tried before it is trusted, and all ranks decide alike.

Triton's interpreter stands for the device, so that harmed kernels can be seen to be refused without a GPU.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import batch, distance, model, param_groups, weights
from ranks import run_ranks
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from adafisher_dist import AdaFisher, fused, kernel_check
from adafisher_dist import batch as stacked
from adafisher_dist.batch import Batch
from adafisher_dist.grid import Kind
from adafisher_dist.settings import DEFAULTS, Structure, normalize

interpreted = pytest.mark.interpreted
CPU = torch.device("cpu")
SETTINGS: dict[str, Any] = {"lr": 1e-2, "block_size": 8}


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    """Each test tries anew."""
    kernel_check._tried.clear()
    yield
    kernel_check._tried.clear()


def make(size: int, depth: int = 1, dtype: torch.dtype = torch.float32, packed: bool = False) -> Batch:
    structure = Structure(size, depth, "rows", None, dtype, 1.0, False, packed)
    return stacked.allocate(0, Kind(size, depth, True), structure, np.arange(1), np.full(1, size), CPU)


def settings(**changes: Any) -> dict[str, Any]:
    result = {**DEFAULTS, **changes}
    normalize(result)
    return result


def refusal(batch: Batch, **changes: Any) -> str | None:
    return kernel_check.refusal([batch], settings(**changes), CPU)


# ---- an unharmed kernel ----


@interpreted
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("size", "depth"), [(1, 1), (1, 16), (7, 1), (7, 5), (16, 1), (16, 64), (20, 5)])
def test_an_unharmed_kernel_is_taken(size: int, depth: int, dtype: torch.dtype, packed: bool) -> None:
    assert refusal(make(size, depth, dtype, packed)) is None


@interpreted
@pytest.mark.slow
def test_the_default_blocks() -> None:
    assert refusal(make(128, 64)) is None


@interpreted
@pytest.mark.parametrize(
    "changes",
    [
        {"damping": 0.0},
        {"damping": 1e-6},
        {"damping": 10.0},
        {"nesterov": False, "grafting": "none"},
        {"bias_correction": False, "momentum": 0.0},
        {"fisher_decay": 0.0},
        {"fisher_decay": 0.9999},
        {"fisher_update_freq": 3},
        {"eps": 1e-30},
        {"eps": 1.0},
    ],
    ids=str,
)
def test_whatever_the_settings(changes: dict[str, Any]) -> None:
    for size, depth, dtype in ((16, 1, torch.float32), (7, 5, torch.float32), (16, 3, torch.bfloat16)):
        assert refusal(make(size, depth, dtype), **changes) is None


# ---- harmed ones ----

# What is harmed, and what the refusal says.
HARMS: dict[str, tuple[dict[str, str], str]] = {
    "wrong damping": ({"_element(c_NJ, k) + damping)": "_element(c_NJ, k) + 1.02 * damping)"}, "off in u"),
    "missing transpose of F": (
        {
            "f_INJ = decay * f_INJ + tl.trans(h_NJ)[:, :, None] * h_NJ[None]": "f_INJ = decay * f_INJ + h_NJ * h_NJ",
            "f_INJ = _fma(tl.trans(h_NJ)[:, :, None], h_NJ[None]": "f_INJ = _fma(h_NJ[None], h_NJ[None]",
        },
        "",
    ),
    "missing transpose in the elimination": (
        {"_fma(tl.trans(c_NJ)[:, :, None], w_NJ[None], a_INJ)": "_fma(c_NJ[None], w_NJ[None], a_INJ)"},
        "off in u",
    ),
    "stale momentum": (
        {
            "m_DNJ = _lerp(m_DNJ, g_DNJ, weight)": "stale_DNJ = m_DNJ; m_DNJ = _lerp(m_DNJ, g_DNJ, weight)",
            "hat_DNJ = m_DNJ * momentum_scale": "hat_DNJ = stale_DNJ * momentum_scale",
        },
        "off in u",
    ),
    "stale F": (
        {
            "    if UPDATES:": "    stale_INJ = f_INJ\n    if UPDATES:",
            "    diagonal_NJ = tl.sum(": "    f_INJ = stale_INJ\n    diagonal_NJ = tl.sum(",
        },
        "",
    ),
    "upper half of F stays as it was": (
        {"stored_INJ = at_INJ, there_INJ": "stored_INJ = at_INJ, there_INJ & (i_I11 >= j_11J)"},
        "F is not symmetric",
    ),
    "NaN in one element": (
        {"u_DNJ = s_DNJ * (tl.div_rn(": "u_DNJ = tl.where(j_1J == 0, float('nan'), 1.0) * s_DNJ * (tl.div_rn("},
        "not finite",
    ),
    "a gate that lets all through": ({"if go == 0:": "if go == 7:"}, "a step that was to change nothing"),
    "one row too many": ({"there_N = row_N < stop": "there_N = row_N <= stop"}, "blocks beside those of the step"),
    "rows past the sixth": ({"there_N = row_N < stop": "there_N = (row_N < stop) & (row_N < 7)"}, "the kernel"),
    "a later program": (
        {"right_DNJ = hat_DNJ * unit_N1": "right_DNJ = hat_DNJ * unit_N1 + tl.program_id(0) * g_DNJ"},
        "off in u",
    ),
    "the ladder's first rung": (
        {"tl.where(mended_N[:, None], more_DNJ,": "tl.where(mended_N[:, None], 2 * more_DNJ + right_DNJ,"},
        "off in u",
    ),
    "the ladder's counts": (
        {"rungs_ptr + row_N * 3 + rung_N, 1": "rungs_ptr + row_N * 3 + 1, 1"},
        "the fallback ladder counted",
    ),
    "ε left out": ({"root_DNJ + eps)": "root_DNJ)"}, "the kernel is wrong"),
    "small gradients flushed": (
        {"    m_DNJ = _lerp(m_DNJ,": "    g_DNJ = tl.where(tl.abs(g_DNJ) < 1e-4, 0, g_DNJ)\n    m_DNJ = _lerp(m_DNJ,"},
        "off in",
    ),
    "does not compile": ({"hat_DNJ = m_DNJ *": "hat_DNJ = no_such_name *"}, "it failed on"),
}
# What only some blocks can show.
ROUNDED = {
    "bfloat16 truncated": ({"& 0xFFFF\n": "& 0\n"}, "rounds"),
    "one seed for all blocks": ({"_hash((number_N * 0x9E3779B + offset)": "_hash((number_N * 0)"}, "rounds"),
}
LARGEST = {
    "no largest stretch": (
        {"tl.minimum(tl.div_rn(reach, length_N), LARGEST_STRETCH)": "tl.div_rn(reach, length_N) + 0 * LARGEST_STRETCH"},
        "off in u",
    )
}


def harm(name: str) -> tuple[dict[str, str], str]:
    return {**HARMS, **ROUNDED, **LARGEST}[name]


@pytest.fixture
def harmed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, request: pytest.FixtureRequest) -> str:
    """A copy of the kernel with the harm in it takes its place; what the refusal is to say."""
    replacements, words = harm(request.param)
    source = (Path(fused.__file__).parent / "fused_kernel.py").read_text()
    for old, new in replacements.items():
        assert source.count(old) == 1, (source.count(old), old)
        source = source.replace(old, new)
    path = tmp_path / "harmed_kernel.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location("harmed_kernel", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setitem(sys.modules, "adafisher_dist.fused_kernel", module)
    return words


CASES = [
    *((name, 7, 5, torch.float32, False) for name in HARMS),
    *((name, 5, 1, torch.bfloat16, False) for name in HARMS if name != "ε left out"),
    *((name, 7, 2, torch.bfloat16, packed) for name in ROUNDED for packed in (False, True)),
    *((name, 16, 1, torch.float32, False) for name in LARGEST),
]


@interpreted
@pytest.mark.parametrize(("harmed", "size", "depth", "dtype", "packed"), CASES, indirect=["harmed"])
def test_a_harmed_kernel_is_refused(harmed: str, size: int, depth: int, dtype: torch.dtype, packed: bool) -> None:
    found = refusal(make(size, depth, dtype, packed))
    assert found is not None and harmed in found and "torch's own path" not in found
    assert Kind(size, depth, True).name in found


# ---- in a training ----


def train(module: nn.Module, optimizer: AdaFisher, steps: int, rank: int = 0, world: int = 1) -> None:
    for step in range(steps):
        x, y = batch(step, rank, world)
        optimizer.zero_grad()
        nn.functional.mse_loss(module(x), y).backward()
        optimizer.step()


def backends(optimizer: AdaFisher) -> set[str | None]:
    return {entry.backend for entry in optimizer.fisher_stats().values()}


@interpreted
def test_auto_takes_the_kernel_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="adafisher_dist")
    results = []
    torch.manual_seed(5)
    drawn = torch.rand(3)
    for backend in ("auto", "triton"):
        module = model()
        torch.manual_seed(5)
        optimizer = AdaFisher(param_groups(module), backend=backend, **SETTINGS)
        train(module, optimizer, 4)
        assert torch.equal(torch.rand(3), drawn), "the check drew from the user's random state"
        assert backends(optimizer) == {"triton"}
        results.append(weights(module))
    assert all(np.array_equal(value, results[1][name]) for name, value in results[0].items())
    lines = [record.message for record in caplog.records if "layout" in record.message]
    assert lines and all(line.endswith("computed by the Triton kernel") for line in lines)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


@interpreted
@pytest.mark.parametrize("harmed", ["wrong damping", "does not compile"], indirect=True)
def test_auto_with_a_harmed_kernel_is_torch(harmed: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="adafisher_dist")
    results = []
    for backend in ("auto", "torch"):
        module = model()
        optimizer = AdaFisher(param_groups(module), backend=backend, **SETTINGS)
        train(module, optimizer, 4)
        assert backends(optimizer) == {"torch"}
        results.append(weights(module))
    assert all(np.array_equal(value, results[1][name]) for name, value in results[0].items())
    warnings = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1 and harmed in warnings[0] and 'backend="torch"' in warnings[0]
    assert all("computed by torch" in record.message for record in caplog.records if "layout" in record.message)


def test_on_a_cpu_auto_is_torch_without_a_word(caplog: pytest.LogCaptureFixture) -> None:
    module = model()
    optimizer = AdaFisher(module.parameters(), **SETTINGS)
    train(module, optimizer, 2)
    assert backends(optimizer) == {"torch"} and not caplog.records


def test_no_triton_is_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "obstacle", lambda device: "Triton is not installed. pip install triton")
    found = refusal(make(8))
    assert found is not None and found.startswith("Triton is not installed")


@interpreted
def test_other_settings_are_tried_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []
    monkeypatch.setattr(kernel_check, "_problem", lambda case: tried.append(case))
    for changes in ({}, {}, {"damping": 0.5}, {"fisher_update_freq": 2}, {"fisher_update_freq": 3}, {"lr": 3.0}):
        assert refusal(make(8), **changes) is None
    assert len(tried) == 3  # where F is updated seldom, other code is compiled


@interpreted
def test_what_is_compiled_anew_is_tried_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """A setting that is changed in a param group runs no code that nobody has tried."""
    tried: list[tuple[str, bool]] = []
    monkeypatch.setattr(kernel_check, "_problem", lambda case: tried.append(case.code))
    parameter = nn.Parameter(torch.ones(2, 3))
    optimizer = AdaFisher([parameter], block_size=3)
    for changes in ({}, {"damping": 0.5}, {"grafting": "none"}, {"fisher_update_freq": 3}, {"grafting": "rms"}, {}):
        optimizer.param_groups[0].update(changes)
        parameter.grad = torch.ones(2, 3)
        optimizer.step()
    assert tried == [("rms", False), ("none", False), ("none", True), ("rms", True)]
    assert backends(optimizer) == {"triton"}


@interpreted
def test_no_room_to_try_is_not_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(case: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(kernel_check, "_problem", fail)
        found = refusal(make(8))
        assert found is not None and "no room" in found
    assert refusal(make(8)) is None


def test_a_triton_that_cannot_be_imported_is_a_refusal(tmp_path: Path) -> None:
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "__init__.py").write_text("raise ImportError('libcuda is gone')")
    code = """
import torch
from adafisher_dist import AdaFisher
parameter = torch.nn.Parameter(torch.ones(3, 4))
optimizer = AdaFisher([("w", parameter)])
parameter.grad = torch.ones(3, 4)
optimizer.step()
assert optimizer.fisher_stats()["w"].backend == "torch"
"""
    env = {**os.environ, "PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}", "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "Triton cannot be imported" in done.stderr and "libcuda is gone" in done.stderr


def disagreeing(rank: int, world: int) -> tuple[set[str | None], dict[str, Any], list[str]]:
    """The kernel is refused on the last rank alone."""
    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("adafisher_dist")
    logger.addHandler(handler)
    fused.is_meant_for = lambda device: True
    kernel_check.refusal = lambda batches, settings, device: "it is odd" if rank == world - 1 else None
    module = model()
    optimizer = AdaFisher(module.parameters(), **SETTINGS)
    train(DistributedDataParallel(module), optimizer, 4, rank, world)
    return backends(optimizer), weights(module), records


@pytest.mark.dist
def test_all_ranks_decide_alike() -> None:
    """What one rank refuses, no rank runs; the rank that found it warns, once."""
    results = run_ranks(disagreeing, 2)
    alone = model()
    train(alone, AdaFisher(alone.parameters(), **SETTINGS), 4)
    for found, trained, _ in results:
        assert found == {"torch"}
        assert distance(trained, weights(alone)) < 1e-4
    warnings = [[text for text in records if "it is odd" in text] for *_, records in results]
    assert [len(texts) for texts in warnings] == [0, 1] and "on rank 1" in warnings[1][0]


# ---- what a user allows their model ----


@pytest.mark.parametrize("how", ["nothing", "old", "new", "high", "medium", "all"])
def test_torch_computes_in_full_precision(how: str) -> None:
    """Whichever of torch's two names for TF32 the user has set, it is off in a step, and as it was after it."""
    code = f"""
import torch
from adafisher_dist import fisher
matmul = torch.backends.cuda.matmul
how = {how!r}
if how == "old": matmul.allow_tf32 = True
if how == "new": matmul.fp32_precision = "tf32"
if how in ("high", "medium"): torch.set_float32_matmul_precision(how)
if how == "all": torch.backends.fp32_precision = "tf32"
def read(ask):
    try:
        return ask()
    except RuntimeError:
        return "torch refuses"
def state():
    return [
        read(lambda: matmul.allow_tf32), read(lambda: matmul.fp32_precision), read(torch.get_float32_matmul_precision)
    ]
before = state()
with fisher.full_precision(torch.device("cuda")):
    assert state()[0] is False, state()
assert state() == before, (state(), before)
assert (before[0] is False) == (how == "nothing"), before
if how == "nothing":  # what is set later still counts
    torch.backends.fp32_precision = "tf32"
    assert matmul.fp32_precision == "tf32"
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
