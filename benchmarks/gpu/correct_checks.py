"""What `correct.py` checks: the package's paths on a device beside the numpy oracle of tests/oracle.py, bit for bit, or
beside a twin. Each check is given a `Here`, returns in a line what it found, and raises where something is wrong.

With several ranks each check runs on all of them: batches are cut by rank, and what is not data is the same on each. A
check asks nothing that a rank knows alone before a collective, so that the ranks stay together while all goes well.

Everything also runs on CPU tensors, in a rehearsal. The kernel is interpreted there, which takes seconds a step: so
only some checks use it, and on smaller shapes.
"""

from __future__ import annotations

import dataclasses
import io
import itertools
import logging
import os
import re
import signal
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout, suppress
from datetime import timedelta
from functools import cache, partial
from importlib.util import find_spec
from typing import Any, ClassVar

import numpy as np
import torch
import torch.distributed as dist
from common_gpu import ROOT
from correct_runner import TIMEOUT, Check, Here, NotChecked
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import adafisher_dist
from adafisher_dist import AdaFisher, comm, fisher, fused
from adafisher_dist import batch as stacked
from adafisher_dist.comm import Group, Waits, Wire
from adafisher_dist.grid import Kind
from adafisher_dist.metrics import NAMES
from adafisher_dist.settings import DEFAULTS, Structure

sys.path.insert(0, str(ROOT / "tests"))  # before launch/, which has modules of the same names

import models
import test_fused as kernels
from models import OWN_SETTINGS, distance, model, param_groups
from oracle import Oracle
from test_oracle import assert_blocks_agree

Arrays = dict[str, np.ndarray]
Settings = dict[str, Any]

PARAMS = {"lr": 1e-2, "block_size": 8, "damping": 0.2}
STEPS = 5
NAN, INF = float("nan"), float("inf")
FLOATS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}


# ---- trainings ----


def host(tensor: Tensor) -> np.ndarray:
    """A tensor of any device as a float64 array."""
    return tensor.detach().double().cpu().numpy().copy()


def weights(module: nn.Module) -> Arrays:
    return {name.removeprefix("module."): host(p) for name, p in module.named_parameters()}


def gradients_of(module: nn.Module) -> Arrays:
    named = module.named_parameters()
    return {name.removeprefix("module."): host(p.grad) for name, p in named if p.grad is not None}


def state_of(optimizer: AdaFisher) -> list[Tensor]:
    """Copies of all that this rank holds of the state."""
    return [value.clone() for entry in optimizer.state.values() for value in entry.values()]


def samples(here: Here) -> int:
    """In the batch of a step, over all ranks: as many on each."""
    return 12 if 12 % here.world == 0 else 2 * here.world


def usual(here: Here) -> Settings:
    """What most checks train with: on a GPU the kernel, if "auto" trusts it."""
    return {**PARAMS, "backend": "torch" if here.rehearsing else "auto"}


def needs_kernel(here: Here) -> None:
    """Raise NotChecked where the kernel cannot run."""
    obstacle = fused.obstacle(here.device)
    if obstacle is not None:
        raise NotChecked(obstacle)


def batch(step: int, here: Here) -> tuple[Tensor, Tensor]:
    x, y = models.batch(step, here.rank, here.world, size=samples(here))
    return x.to(here.device), y.to(here.device)


def same_on_all(found: Arrays, here: Here) -> None:
    """Raise where ranks hold other weights. A collective."""
    prints = comm.control(None).gather([value.tobytes() for value in found.values()])
    assert all(other == prints[0] for other in prints), f"the weights on this rank, {here.rank}, or on others differ"


def same_bits(got: Sequence[Tensor], want: Sequence[Tensor]) -> None:
    assert len(got) == len(want)
    for number, (a, b) in enumerate(zip(got, want, strict=True)):
        assert torch.equal(a, b), f"tensor {number}, {tuple(a.shape)} {a.dtype}, is not the same"


class Given(nn.Module):
    """Parameters of a few shapes, whose gradients are given, and no model's."""

    SHAPES: ClassVar = {"a": (37, 11), "b": (37,), "c": (3, 1, 3), "d": (1,)}
    SMALL: ClassVar = {"a": (3, 6), "b": (3,)}

    def __init__(self, here: Here, device: torch.device | None = None, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        for number, (name, shape) in enumerate((self.SMALL if here.rehearsing else self.SHAPES).items()):
            value = torch.from_numpy(np.random.default_rng(number).standard_normal(shape))
            setattr(self, name, nn.Parameter(value.to(device or here.device, dtype)))

    def take_gradients(self, step: int) -> Arrays:
        """Those of a step, alike on all ranks and devices, as they are in the parameters' dtype."""
        for number, p in enumerate(self.parameters()):
            size = np.exp(np.random.default_rng([number, 1]).standard_normal(p.shape))
            value = torch.from_numpy(size * np.random.default_rng([number, 2, step]).standard_normal(p.shape))
            p.grad = value.to(p.device, p.dtype)
        return gradients_of(self)

    def train(self, optimizer: AdaFisher, steps: Iterable[int]) -> Given:  # type: ignore[override]
        for step in steps:
            self.take_gradients(step)
            optimizer.step()
        return self


class Beside:
    """The oracle beside a training: each step is judged by what it added to the weights, block by block."""

    def __init__(
        self, start: Arrays, own: Mapping[str, Settings], dtype: torch.dtype = torch.float32, tolerance: float = 3e-4,
        **hyper: Any,
    ) -> None:  # fmt: skip
        """Args: the weights in the order of the param groups, by name what a group has set otherwise, and the rest."""
        self.names, self.tolerance = list(start), tolerance
        self.rounding = float(torch.finfo(dtype).eps)
        arithmetic: type = np.float64 if dtype == torch.float64 else np.float32
        for name in ("fisher_dtype", "packed", "backend"):
            hyper.pop(name, None)
        self.oracle = Oracle([(start[name], own.get(name, {})) for name in self.names], arithmetic, **hyper)
        self.steps = 0

    def step(self, gradients: Arrays, before: Arrays, after: Arrays) -> None:
        changes = self.oracle.step([gradients.get(name) for name in self.names])
        for name, change, setting in zip(self.names, changes, self.oracle.settings, strict=True):
            if name in after:
                where = f"step {self.steps}, {name}"
                floor = 4 * self.rounding * np.maximum(np.abs(before[name]), np.abs(after[name]))
                scale = self.tolerance * np.abs(change) + 1e-12
                assert_blocks_agree(after[name] - before[name], change, scale, floor, where, setting)
        self.steps += 1


def beside_groups(module: nn.Module, start: Arrays, **more: Any) -> Beside:
    """The oracle for a model whose optimizer was given `param_groups(module)`, and PARAMS."""
    names = {id(p): name.removeprefix("module.") for name, p in module.named_parameters()}
    groups = [[names[id(p)] for p in group["params"]] for group in param_groups(module)]
    own = {name: OWN_SETTINGS for name in groups[1]}
    return Beside({name: start[name] for group in groups for name in group}, own, **{**PARAMS, **more})


@cache
def other_group(name: str) -> Any:
    """Another group of all ranks, whose backend sends tensors of the host too, where the default one is NCCL."""
    return dist.new_group(backend=name, timeout=timedelta(seconds=TIMEOUT))


def both(here: Here) -> Any:
    return other_group("gloo" if here.device.type == "cpu" else "cpu:gloo,cuda:nccl")


# ---- the kernel, by its own tests ----


def kernel(here: Here) -> str:
    """tests/test_fused.py, which takes the GPU where there is one; on the first rank."""
    needs_kernel(here)
    if here.rank:
        return ""
    chosen = ["-k", "test_no_gradient_yet and rms-1"] if here.rehearsing else ["-m", "gpu"]
    workers = min(12, len(os.sched_getaffinity(0)))
    if not here.rehearsing and workers > 1 and find_spec("xdist") is not None:  # it compiles most of the time
        chosen += ["-n", str(workers), "--dist", "worksteal"]
    kept = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "RANK", "WORLD_SIZE")}
    kept |= {"TRITON_INTERPRET": "1"} if here.rehearsing else {"DS_ACCELERATOR": "cuda"}
    command = [sys.executable, "-m", "pytest", "-q", "-rfE", "-p", "no:cacheprovider", "tests/test_fused.py", *chosen]
    output, status = _in_time(command, kept, min(90.0, 0.9 * here.limit))
    wrong = [text for text in output.splitlines() if text.startswith(("FAILED", "ERROR"))]
    assert status == 0, "\n".join([*wrong, "", output[-6000:]])
    last = output.strip().splitlines()[-1].strip("= ")
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (passed|skipped)", last)}
    assert counts.get("passed", 0) > 0 and "skipped" not in counts, last
    return f"{' '.join(command[2:])}: {last}"


def _in_time(command: Sequence[str], env: Mapping[str, str], seconds: float) -> tuple[str, int | str]:
    """What a command says, and its status; with all that it started it is ended when the time is over.

    Into a file, so that what it had said by then is kept.
    """
    with tempfile.TemporaryFile("w+") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, text=True, cwd=ROOT, env=env, start_new_session=True
        )  # fmt: skip
        try:
            status: int | str = process.wait(seconds)
        except subprocess.TimeoutExpired:
            status = f"cut after {seconds:.0f} s"
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        file.seek(0)
        return f"{file.read()}\n{status if isinstance(status, str) else ''}", status


# ---- the torch path ----


SIZES, DEPTHS = (1, 7, 16, 64, 128), (1, 5, 64)


def blocks(here: Here) -> str:
    """Steps of dense blocks of all kinds by torch: F, m and u beside numpy in float64."""
    kernels.DEVICE = here.device
    kinds = list(itertools.product(SIZES, DEPTHS, (False, True)))
    told = []
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        apart = max(_blocks(size, depth, dtype, packed) for size, depth, packed in kinds)
        told.append(f"{str(dtype).removeprefix('torch.')} {apart:.1e}")
    return f"{len(kinds)} kinds of blocks; u is apart by at most {', '.join(told)}"


def _blocks(size: int, depth: int, dtype: torch.dtype, packed: bool) -> float:
    """How far u is from numpy's, relative to the vector."""
    h = kernels.settings("torch", damping=0.3)
    blocks_ = kernels.make(size, 3, dtype, packed=packed, depth=depth)
    rounding = 1e-15 if dtype == torch.float64 else 3e-7
    # Of u, times the largest condition number that A can have. In float64 numpy's own rounding shows.
    tolerance = (1e-13 if dtype == torch.float64 else 1e-6) * (1 + size / h["damping"])
    where, furthest = f"size {size}, {depth} rows, {dtype}, packed {packed}", 0.0
    for t, gradient_NDB in enumerate(kernels.gradients(3, size, 2, depth=depth), start=1):
        g = kernels.double(gradient_NDB)
        rho, mu = h["fisher_decay"], h["momentum"]
        want = rho * kernels.double(kernels.whole(blocks_)) + (1 - rho) / depth * g.swapaxes(1, 2) @ g
        parts = mu * kernels.double(blocks_.momentum_NDB), (1 - mu) * g
        blocks_.gradient_NDB.copy_(gradient_NDB)
        stacked.compute(blocks_, 0, 3, t, t, h)
        got = kernels.double(kernels.whole(blocks_))
        diagonal = np.sqrt(want.diagonal(axis1=1, axis2=2))
        bound = 2.0**-7 if dtype == torch.bfloat16 else 2 * (3 + depth) * rounding
        off = np.abs(got - want) > bound * diagonal[:, :, None] * diagonal[:, None, :]
        assert not np.tril(off).any(), f"F, {where}, step {t}"
        apart_NDB = np.abs(kernels.double(blocks_.momentum_NDB) - sum(parts))
        assert (apart_NDB <= 4 * rounding * (np.abs(parts[0]) + np.abs(parts[1]))).all(), f"m, {where}, step {t}"
        # The u that goes with the F that came out, however that was rounded.
        apart = kernels.distance(blocks_.gradient_NDB, kernels.by_oracle(blocks_, gradient_NDB, t, t, h))
        assert apart < tolerance, f"u, {where}, step {t}: {apart:.2g}"
        furthest = max(furthest, apart)
    return furthest


def ladder(here: Here) -> str:
    """Blocks that cannot be factorised climb as far as on a CPU, and their neighbours do not notice."""
    for exponent, packed, depth in itertools.product((1.0, 0.5), (False, True), (1, 3)):
        found, want = (_climb(device, exponent, packed, depth) for device in (here.device, torch.device("cpu")))
        assert found.rungs == want.rungs and found.rungs, f"exponent {exponent}: {found.rungs}, on a CPU {want.rungs}"
        apart = kernels.distance(found.gradient_NDB.flatten(1), want.gradient_NDB.flatten(1))
        assert apart < 1e-4, f"exponent {exponent}, packed {packed}, {depth} rows: u apart by {apart:.2g}"
    return f"as on a CPU: rungs {found.rungs}"


def _climb(device: torch.device, exponent: float, packed: bool, depth: int) -> stacked.Batch:
    structure = Structure(7, depth, "rows", None, torch.float32, exponent, False, packed)
    blocks_ = stacked.allocate(0, Kind(7, depth, True), structure, np.arange(5), np.full(5, 7), device)
    if blocks_.square_ND is not None:
        blocks_.square_ND.fill_(1.0)
    whole_NBB = torch.eye(7).repeat(5, 1, 1)
    whole_NBB[1, 0, 1] = whole_NBB[1, 1, 0] = 1.05  # indefinite by little: more damping helps
    whole_NBB[3, 0, 1] = whole_NBB[3, 1, 0] = 3.0  # by much: the diagonal
    blocks_.fisher.copy_(fisher.pack(whole_NBB) if packed else whole_NBB)
    blocks_.gradient_NDB.copy_(torch.arange(35 * depth).view(5, depth, 7) % 11)
    settings = {**DEFAULTS, "backend": "torch", "damping": 0.01, "fisher_update_freq": 2}  # F is used as it is
    stacked.compute(blocks_, 0, 5, 2, 1, settings)
    return blocks_


VARIANTS: list[Settings] = [
    {},
    {"packed": True, "rows_per_block": 1},
    {"exponent": 0.5},
    {"inverse_update_freq": 3, "fisher_decay": 0.8},
    {"exponent": 0.5, "inverse_update_freq": 3, "fisher_update_freq": 2, "packed": True},
    {"max_blocks": 3, "grafting": "none", "nesterov": False},
    {"block_grid": "flat", "block_size": 5, "bias_correction": False},
]


def optimizer(here: Here) -> str:
    """The whole optimizer by torch, with settings of every kind, in float32 and float64."""
    for dtype, variant in itertools.product((torch.float32, torch.float64), VARIANTS):
        _beside_given(here, dtype, {**PARAMS, **variant})
    return f"{len(VARIANTS)} settings in float32 and float64, {STEPS + 3} steps each"


def _beside_given(here: Here, dtype: torch.dtype, settings: Settings) -> Given:
    tolerance = 1e-9 if dtype == torch.float64 else 3e-4
    module = Given(here, dtype=dtype)
    beside = Beside(weights(module), {}, dtype, tolerance, **settings)
    trained = AdaFisher(module.named_parameters(), backend="torch", fisher_dtype=dtype, **settings)
    for step in range(STEPS + 3):
        gradients, before = module.take_gradients(step), weights(module)
        trained.step()
        beside.step(gradients, before, weights(module))
    return module


def tf32(here: Here) -> str:
    """What a user allows the model's products does not round the optimizer's, by the old names and the new."""
    matmul, names = torch.backends.cuda.matmul, ["allow_tf32"]
    if hasattr(matmul, "fp32_precision"):
        names.append("fp32_precision")  # torch 2.9
    before = {name: getattr(matmul, name) for name in names}
    try:
        for name in names:
            allowed = True if name == "allow_tf32" else "tf32"
            setattr(matmul, name, allowed)
            for variant in VARIANTS:
                _beside_given(here, torch.float32, {**PARAMS, "damping": 0.02, **variant})
            assert getattr(matmul, name) == allowed, (
                f"{name} is {getattr(matmul, name)} after a step, and was {allowed}"
            )
    finally:
        for name in reversed(names):
            setattr(matmul, name, before[name])
    return f"within the same bounds with TF32 allowed by {' and by '.join(names)}"


# ---- gradients that are not finite ----


PLAN = [None, None, NAN, None, INF, 3e19, None]  # bad at calls 3, 5, 6: at 1, 2, 4, 8, … ranks compare gradients


def bad_gradients(here: Here, backend: str, **more: Any) -> str:
    """One bad gradient, on the last rank alone: weights, state and counters are those of a twin that never saw it."""
    if backend != "torch":
        needs_kernel(here)
    module, twin = Given(here), Given(here)
    settings = {**PARAMS, "backend": backend, **more}
    ours, other = (AdaFisher(m.named_parameters(), **settings) for m in (module, twin))
    for step, bad in enumerate(PLAN):
        before = [p.detach().clone() for p in module.parameters()]
        module.take_gradients(step)
        if bad is None:
            ours.step()
            twin.take_gradients(step)
            other.step()
            continue
        if here.is_last:
            _spoil(module, bad, everywhere=here.world > 1)
        ours.step()
        same_bits([p.detach() for p in module.parameters()], before)
    same_bits([p.detach() for p in module.parameters()], [p.detach() for p in twin.parameters()])
    assert (ours.skipped_steps, other.skipped_steps) == (3, 0), (ours.skipped_steps, other.skipped_steps)
    same_bits(state_of(ours), state_of(other))
    same_on_all(weights(module), here)
    return f"{len(PLAN)} calls, 3 of them skipped without a trace, backend {backend}"


def _spoil(module: Given, bad: float, everywhere: bool) -> None:
    """Where every rank has its own blocks, all elements, so that one of this rank's is among them."""
    assert module.a.grad is not None
    if not everywhere:
        module.a.grad[2, 3] = bad
        return
    for p in module.parameters():
        assert p.grad is not None
        p.grad.fill_(bad)


# ---- nothing waits for the device ----


def waiting(here: Here, backend: str, **more: Any) -> str:
    """Calls 3, 5, 6 and 7, in which ranks compare nothing; in call 9 the device is busy, and the host comes back."""
    needs_kernel(here)
    module = Given(here)
    ours = AdaFisher(module.named_parameters(), **{**PARAMS, "backend": backend, "max_blocks": 3, **more})
    for call in range(1, 4 if here.rehearsing else 9):
        module.take_gradients(call)
        with nullcontext() if call.bit_count() == 1 else no_waiting(here, f"call {call}"):
            ours.step()
    if here.device.type == "cuda":
        module.take_gradients(9)
        torch.cuda._sleep(1_000_000_000)  # cycles: about half a second
        slept = torch.cuda.Event()
        slept.record()
        ours.step()
        assert not slept.query(), "step() came back after the work that was queued before it"
    same_on_all(weights(module), here)
    which = "call 3" if here.rehearsing else "calls 3, 5, 6, 7 and, beside a busy device, 9"
    return f"in {which} the host waits for nothing on the device; backend {backend}"


@contextmanager
def no_waiting(here: Here, where: str) -> Iterator[None]:
    """Raise where the host waits for the device, as far as torch knows; on a CPU, where it looks at a result."""
    if here.device.type == "cuda":
        torch.cuda.synchronize(here.device)
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return
    if here.world > 1:
        raise NotChecked("on CPUs the hosts' own numbers, which several ranks compare, look like the device's")
    if find_spec("deepspeed") is None:
        raise NotChecked("tests/test_verdict.py, which knows what waits, needs DeepSpeed")
    import test_verdict

    with test_verdict.Waits() as noted:
        yield
    assert not noted.seen, f"{where} waits: {noted.seen}"


# ---- metrics, and what "auto" chooses ----


def metrics(here: Here) -> str:
    """A measured step's numbers arrive on the first rank, all of them, and are finite."""
    found: list[tuple[int, dict[str, float]]] = []
    module = Given(here)
    ours = AdaFisher(module.named_parameters(), **usual(here))
    ours.report_metrics(lambda step, values: found.append((step, values)), every=2)
    module.train(ours, range(2))
    ours.flush_metrics()
    assert [step for step, _ in found] == ([] if here.rank else [2]), found
    for _, values in found:
        assert values.keys() == NAMES.keys(), NAMES.keys() ^ values.keys()
        assert all(np.isfinite(value) for value in values.values()), values
    told = ", ".join(f"{name} {value:.3g}" for _, values in found for name, value in values.items())
    return f"of step 2: {told}"


def metrics_wait(here: Here) -> str:
    """Nor does the host wait in a step that is measured, the third one."""
    needs_kernel(here)
    module = Given(here)
    ours = AdaFisher(module.named_parameters(), **PARAMS, backend="triton")
    ours.report_metrics(lambda step, values: None, every=3)
    module.train(ours, range(2))
    module.take_gradients(2)
    with no_waiting(here, "a measured step"):
        ours.step()
    ours.flush_metrics()
    return "the host waits for nothing on the device in a measured step"


def auto(here: Here) -> str:
    """That backend="auto" finds nothing wrong with the kernel, and that its steps are the torch path's."""
    needs_kernel(here)
    steps = 2 if here.rehearsing else STEPS
    records: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: records.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("adafisher_dist").addHandler(handler)
    try:
        modules, chosen = [Given(here), Given(here)], set()
        for module, backend in zip(modules, ("auto", "torch"), strict=True):
            ours = AdaFisher(module.named_parameters(), **PARAMS, backend=backend)
            module.train(ours, range(steps))
            chosen |= {entry.backend for entry in ours.fisher_stats().values()} if backend == "auto" else set()
    finally:
        logging.getLogger("adafisher_dist").removeHandler(handler)
    apart = distance(*map(weights, modules))
    assert apart < 1e-4, f"{steps} steps by {chosen} and by torch: the weights are {apart:.2g} apart"
    assert chosen == {"triton"}, f"it chose {chosen}: {records}"
    return f"it trusts the kernel; after {steps} steps {apart:.1e} from the torch path's weights"


# ---- one process, or DDP ----


def wrapped(module: nn.Module, here: Here, group: Any = None) -> nn.Module:
    """In DDP where there are several ranks."""
    if here.world == 1:
        return module
    ids = None if here.device.type == "cpu" else [here.device.index]
    return DistributedDataParallel(module, device_ids=ids, process_group=group)


def replicated(here: Here, precision: str, group: Callable[[Here], Any] = lambda here: None, **more: Any) -> str:
    """Steps on a model's own gradients, in param groups, one without a gradient of one parameter."""
    dtype, chosen = FLOATS[precision], group(here)
    module = model(dtype).to(here.device)
    net = wrapped(module, here, chosen)
    ours = AdaFisher(param_groups(module), **{**usual(here), **more}, process_group=chosen)
    beside = beside_groups(module, weights(module), dtype=dtype, **more)
    for step in range(STEPS):
        x, y = batch(step, here)
        ours.zero_grad()
        nn.functional.mse_loss(net(x.to(dtype)).float(), y).backward()
        if step == 3:
            module.mix.weight.grad = None
        gradients, before = gradients_of(module), weights(module)
        ours.step()
        beside.step(gradients, before, weights(module))
    same_on_all(weights(module), here)
    return f"{STEPS} steps beside numpy, {'one process' if here.world == 1 else f'DDP over {here.world} ranks'}"


def scaler(here: Here) -> str:
    """torch.amp's GradScaler and autocast in fp16; it skips a step whose gradients overflow on the last rank."""
    module = model().to(here.device)
    net, ours = wrapped(module, here), AdaFisher(param_groups(module), **usual(here))
    beside, bad = beside_groups(module, weights(module)), 2
    grad_scaler = torch.amp.GradScaler(here.device.type, init_scale=2.0**10, growth_interval=100)
    for step in range(STEPS):
        x, y = batch(step, here)
        ours.zero_grad()
        with torch.autocast(here.device.type, torch.float16):
            loss = nn.functional.mse_loss(net(x).float(), y)
        grad_scaler.scale(loss * (1e9 if step == bad and here.is_last else 1.0)).backward()
        grad_scaler.unscale_(ours)
        gradients, before, state = gradients_of(module), weights(module), state_of(ours)
        grad_scaler.step(ours)
        grad_scaler.update()
        if step != bad:
            beside.step(gradients, before, weights(module))
            continue
        assert not all(np.isfinite(value).all() for value in gradients.values()), (
            "the step that was to overflow did not"
        )
        same_bits(state_of(ours), state)
        assert all(np.array_equal(value, before[name]) for name, value in weights(module).items())
    assert grad_scaler.get_scale() == 2.0**9 and ours.skipped_steps == 0
    same_on_all(weights(module), here)
    return f"{STEPS - 1} steps beside numpy, and one that the scaler skipped"


# ---- DeepSpeed ----


@cache
def with_deepspeed() -> Any:
    """tests/engines.py, once DeepSpeed has joined the process group that there is."""
    if find_spec("deepspeed") is None:
        raise NotChecked("DeepSpeed is not installed")
    warnings.filterwarnings("ignore", "`torch.distributed", FutureWarning)  # old names of what torch 2.13 renamed
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else it is compiled at the first use
    deepspeed.init_distributed(dist_backend=dist.get_backend(), auto_mpi_discovery=False, verbose=False)
    import engines

    return engines


def engine_config(here: Here, stage: int, precision: str, offload: bool = False, accumulate: int = 1) -> Settings:
    engines = with_deepspeed()
    config = engines.config(
        stage, here.world, usual(here), precision=precision, offload=offload, accumulate=accumulate
    )  # fmt: skip
    config["train_batch_size"] = samples(here) * accumulate
    config["train_micro_batch_size_per_gpu"] = samples(here) // here.world
    return config


def new_engine(config: Settings, **more: Any) -> Any:
    """An engine, without the lines on memory that DeepSpeed prints for some."""
    with redirect_stdout(io.StringIO()):
        return with_deepspeed().engine_of(config, **more)


def backward(engine: Any, step: int, here: Here, factor: float = 1.0) -> None:
    x, y = batch(step, here)
    dtype = next(engine.module.parameters()).dtype
    engine.backward(nn.functional.mse_loss(engine(x.to(dtype)).float(), y) * factor)


def zero(here: Here, stage: int, precision: str, offload: bool) -> str:
    """An engine's steps beside numpy, two micro-steps each; in fp16 one overflows on the last rank."""
    engines, accumulate = with_deepspeed(), 2
    bad = 2 if precision == "fp16" else None
    with engines.fp16_on_the_cpu() if here.device.type == "cpu" else nullcontext():
        engine = new_engine(engine_config(here, stage, precision, offload, accumulate), groups=True)
        start = model()
        beside = beside_groups(start, {**weights(start), **engines.masters(engine)})
        for step in range(STEPS):
            for micro in range(accumulate):
                backward(engine, step * accumulate + micro, here, 1e9 if step == bad and here.is_last else 1.0)
                if micro == accumulate - 1:
                    gradients, before = engines.gradients(engine), engines.masters(engine)
                engine.step()
            after = engines.masters(engine)
            overflow = bool(getattr(engine.optimizer, "overflow", False))
            assert overflow == (step == bad), f"step {step}: DeepSpeed says overflow {overflow}"
            if overflow:
                assert all(np.array_equal(value, after[name]) for name, value in before.items()), "a skipped step moved"
            else:
                beside.step(gradients, before, after)
        updates = {entry.fisher_updates for entry in engine.basic_optimizer.fisher_stats().values()}
        devices = {str(shard.arena.device.type) for shard in engine.basic_optimizer._roster.shards}
    assert updates == {beside.steps}, updates
    assert devices == {"cpu" if offload else here.device.type}, devices
    same_on_all(after, here)
    skipped = ", one skipped" if bad is not None else ""
    return f"{beside.steps} steps beside numpy{skipped}; the optimizer's state is on {devices.pop()}"


def zero_bad_gradient(here: Here, stage: int) -> str:
    """A NaN that DeepSpeed does not look for, in fp32, on the last rank alone."""
    engines = with_deepspeed()
    engine = new_engine(engine_config(here, stage, "fp32"))
    ours, before = engine.basic_optimizer, {}

    def spoil(*_: Any) -> None:
        for tensor in ours.param_groups[0]["params"] if here.is_last else ():
            if tensor.grad is not None:
                tensor.grad.fill_(NAN)

    for step in range(STEPS):
        hook = ours.register_step_pre_hook(spoil) if step == 2 else None
        before = engines.masters(engine)
        backward(engine, step, here)
        engine.step()
        if hook is not None:
            hook.remove()
            after = engines.masters(engine)
            assert all(np.array_equal(value, after[name]) for name, value in before.items()), "the skipped step moved"
    assert ours.skipped_steps == 1, ours.skipped_steps
    assert all(np.isfinite(value).all() for value in engines.masters(engine).values())
    return "skipped without a trace, and counted"


def zero_checkpoint(here: Here, stage: int) -> str:
    """engine.save_checkpoint and load_checkpoint, and ds.save_checkpoint in the background."""
    from adafisher_dist import ds

    engines = with_deepspeed()
    config = engine_config(here, stage, "bf16")

    def steps(engine: Any, first: int, last: int) -> Arrays:
        for step in range(first, last):
            backward(engine, step, here)
            engine.step()
        return engines.masters(engine)

    engine = new_engine(config)
    middle = steps(engine, 0, 3)
    state = state_of(engine.basic_optimizer)
    folders = [here.folder / f"zero{stage}-{kind}" for kind in ("deepspeed", "background")]
    engine.save_checkpoint(str(folders[0]), client_state={"step": 3})
    saving = ds.save_checkpoint(engine, folders[1], client_state={"step": 3}, asynchronous=True)
    straight = steps(engine, 3, STEPS)
    saving.wait()
    apart = 0.0
    for folder in folders:
        resumed = new_engine(config)
        assert resumed.load_checkpoint(str(folder))[1]["step"] == 3
        assert distance(engines.masters(resumed), middle) == 0, "the weights that were loaded are not those saved"
        same_bits([_known(value) for value in state_of(resumed.basic_optimizer)], [_known(value) for value in state])
        apart = max(apart, distance(steps(resumed, 3, STEPS), straight))
    assert apart < 1e-5, f"two steps later the weights are {apart:.2g} apart"
    return f"loaded bit for bit; two steps later {'the same' if apart == 0 else f'{apart:.1e} apart'}"


# ---- FSDP2 ----


def fsdp2(here: Here, policy: str, group: Callable[[Here], Any] = lambda here: None) -> str:
    """fully_shard over all ranks, beside numpy."""
    from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

    if here.device.type == "cpu" and not hasattr(torch.cpu.Stream, "record_event"):
        raise NotChecked("fully_shard of torch 2.6 does not work on CPUs")
    policies: dict[str, Settings] = {
        "fp32": {},
        "bf16": {"mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)},
        "offload": {"offload_policy": CPUOffloadPolicy(pin_memory=here.device.type == "cuda")},
    }
    kind, chosen = here.device.type, group(here)
    mesh = init_device_mesh(kind, (here.world,)) if chosen is None else DeviceMesh.from_group(chosen, kind)
    module = model()
    for part in (module.inner, module.conv, module):
        fully_shard(part, mesh=mesh, **policies[policy])
    ours = AdaFisher(param_groups(module), **usual(here))
    whole = partial(_whole, module, here)
    beside = beside_groups(module, whole())
    for step in range(STEPS):
        x, y = batch(step, here)
        ours.zero_grad()
        nn.functional.mse_loss(module(x).float(), y).backward()
        gradients, before = whole(gradients=True), whole()
        ours.step()
        beside.step(gradients, before, whole())
    devices = {shard.arena.device.type for shard in ours._roster.shards}
    assert devices == {"cpu" if policy == "offload" else kind}, devices
    same_on_all(whole(), here)
    return f"{STEPS} steps beside numpy over {here.world} rank(s); the optimizer's state is on {devices.pop()}"


def _whole(module: nn.Module, here: Here, gradients: bool = False) -> Arrays:
    """Whole weights or gradients; what the host holds is gathered on the device, as NCCL needs it."""
    from torch.distributed.tensor import DTensor

    found = {}
    for name, p in module.named_parameters():
        tensor = p.grad if gradients else p
        if tensor is not None:
            assert isinstance(tensor, DTensor)
            local = tensor.detach().to_local().to(here.device)
            there = DTensor.from_local(
                local, tensor.device_mesh, tensor.placements, run_check=False, shape=tensor.shape,
                stride=tensor.stride(),
            )  # fmt: skip
            found[name] = host(there.full_tensor())
    return found


# ---- comm ----


def communication(here: Here, group: Callable[[Here], Any] = lambda here: None) -> str:
    """Every function of comm over the ranks that there are, also what one rank alone would not send.

    Tensors are on the device and on the host, which with NCCL alone travel through the device.
    """
    real = comm.join(group(here))
    forced = dataclasses.replace(real, size=max(2, real.size))  # past "there is nobody to tell"
    comm.measure_waits(waits := Waits())
    try:
        lowest = comm.minimum(forced, torch.tensor([5 - here.rank, here.rank]))
        assert lowest.tolist() == [5 - (here.world - 1), 0], lowest
        for device in {here.device, torch.device("cpu")}:
            _all_of_comm(real, forced, device, here)
    finally:
        comm.measure_waits(None)
    seconds = waits.seconds()
    assert 0 < seconds < TIMEOUT, seconds
    again = comm.control(None)
    assert again.gather(here.rank) == list(range(here.world)) and comm.control(None) is again
    assert real.members == frozenset(range(here.world))
    return f"{real.devices}: waited {1e3 * seconds:.2f} ms in all"


def _all_of_comm(real: Group, forced: Group, device: torch.device, here: Here) -> None:
    ranks, own = range(here.world), float(here.rank + 1)

    def full(value: float, numel: int, dtype: torch.dtype = torch.float32) -> Wire:
        wire = real.wire(torch.full((numel,), value, dtype=dtype, device=device))
        assert wire.sent.device.type in real.devices, "a wire that the backend cannot send"
        return wire

    flag = full(own, 1, torch.int32)
    comm.minimum_on_device(forced, flag)
    assert flag.tensor.tolist() == [1], flag
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        out = full(0.0, 3 * here.world, dtype)
        comm.gather(real, full(own, 4, dtype).part(1, 4), out)()
        assert out.tensor.tolist() == [rank + 1.0 for rank in ranks for _ in range(3)], (device, out.tensor)
    counts = [1 + rank for rank in ranks]  # so many to each rank
    received = full(0.0, here.world * (1 + here.rank))
    comm.exchange(real, full(own, sum(counts)), counts, received, [1 + here.rank] * here.world)()
    assert received.tensor.tolist() == [rank + 1.0 for rank in ranks for _ in range(1 + here.rank)], received.tensor
    for source in {0, here.world - 1}:
        value = torch.full((2, 3), own, device=device)
        got = comm.broadcast(forced, value, source, "a check")
        assert got.device.type == device.type and set(got.flatten().tolist()) == {source + 1.0}, got


# ---- checkpoints ----


def checkpoint(here: Here) -> str:
    """Saved at once and in the background; a fresh model and optimizer go on bit for bit."""
    variants: list[Settings] = [
        {},
        {"inverse_update_freq": 2, "packed": True, "fisher_dtype": torch.bfloat16, "rows_per_block": 2},
    ]
    for (number, variant), asynchronous in itertools.product(enumerate(variants), (False, True)):
        settings = {**usual(here), **variant}
        module = Given(here)
        ours = AdaFisher(module.named_parameters(), **settings)
        module.train(ours, range(3))
        path = here.folder / f"checkpoint-{number}-{int(asynchronous)}" / "step3"
        extra = {"step": 3, "seen": torch.arange(4, device=here.device)}
        saving = adafisher_dist.save_checkpoint(path, module, ours, extra=extra, asynchronous=asynchronous)
        module.train(ours, range(3, 6))  # while it may still be written
        saving.wait()
        with torch.no_grad():
            again = Given(here)
            for p in again.parameters():
                p.zero_()
        resumed = AdaFisher(again.named_parameters(), **settings)
        restored = adafisher_dist.load_checkpoint(path, again, resumed)
        assert restored.extra["step"] == 3 and restored.extra["seen"].tolist() == [0, 1, 2, 3], restored.extra
        again.train(resumed, range(3, 6))
        same_bits([p.detach() for p in again.parameters()], [p.detach() for p in module.parameters()])
        same_bits([_known(value) for value in state_of(resumed)], [_known(value) for value in state_of(ours)])
    return f"{len(variants)} settings, at once and in the background: the same bits three steps later"


def _known(value: Tensor) -> Tensor:
    """Of whole blocks the lower triangle, which is all that counts and that a checkpoint holds."""
    return value.tril() if value.dim() == 3 and value.shape[1] == value.shape[2] > 1 else value


def checkpoint_elsewhere(here: Here) -> str:
    """Saved on the device, loaded on the CPU, and the other way round."""
    cpu, apart = torch.device("cpu"), 0.0
    for name, first, second in (("to-cpu", here.device, cpu), ("from-cpu", cpu, here.device)):
        module, again = Given(here, first), Given(here, second)
        ours, other = (AdaFisher(m.named_parameters(), **usual(here)) for m in (module, again))
        module.train(ours, range(3))
        path = here.folder / name / "step3"
        adafisher_dist.save_checkpoint(path, module, ours)
        adafisher_dist.load_checkpoint(path, again, other)
        saved, loaded = ([_known(value.cpu()) for value in state_of(o)] for o in (ours, other))
        same_bits(loaded, saved)
        module.train(ours, range(3, 6))
        again.train(other, range(3, 6))
        apart = max(apart, distance(weights(module), weights(again)))
        assert apart < 1e-4, f"{name}: three steps later the weights are {apart:.2g} apart"
    return f"the same state; three steps later the weights are {apart:.1e} apart"


# ---- all of them ----


def all_checks(rehearsing: bool) -> dict[str, Check]:
    """By name, in the order in which they are made: what is most likely to be wrong first."""
    checks: dict[str, Check] = {
        "kernel": kernel,
        "auto": auto,
        "blocks": blocks,
        "ladder": ladder,
        "optimizer": optimizer,
        "tf32": tf32,
        "skipped-torch": partial(bad_gradients, backend="torch", inverse_update_freq=2, exponent=0.5),
        "skipped-kernel": partial(bad_gradients, backend="triton"),
        "waiting-kernel": partial(waiting, backend="triton"),
        "waiting-auto": partial(waiting, backend="auto"),
        "metrics": metrics,
        "waiting-metrics": metrics_wait,
        "comm": communication,
        "comm-both": partial(communication, group=both),
    }
    if not rehearsing:
        bf16 = {"fisher_dtype": torch.bfloat16}
        checks["skipped-kernel-bf16"] = partial(bad_gradients, backend="triton", max_blocks=3, **bf16)
        checks["waiting-kernel-bf16"] = partial(waiting, backend="triton", packed=True, **bf16)
    for precision in ("fp32", "bf16", "fp16"):
        checks[f"train-{precision}"] = partial(replicated, precision=precision)
    checks["train-fp32-both"] = partial(replicated, precision="fp32", group=both)
    checks["train-fp32-torch"] = partial(replicated, precision="fp32", backend="torch", inverse_update_freq=2)
    checks["scaler"] = scaler
    for policy in ("fp32", "bf16", "offload"):
        checks[f"fsdp2-{policy}"] = partial(fsdp2, policy=policy)
    checks["fsdp2-offload-both"] = partial(fsdp2, policy="offload", group=both)
    checks["checkpoint"] = checkpoint
    checks["checkpoint-elsewhere"] = checkpoint_elsewhere
    for stage, precision, offload in itertools.product(range(4), ("fp32", "bf16", "fp16"), (False, True)):
        if stage or not offload:
            name = f"zero{stage}-{precision}{'-offload' if offload else ''}"
            checks[name] = partial(zero, stage=stage, precision=precision, offload=offload)
    for stage, precision in ((1, "bf16-fp32"), (3, "bf16-fp32")):
        checks[f"zero{stage}-{precision}"] = partial(zero, stage=stage, precision=precision, offload=False)
    for stage in (1, 3):
        checks[f"zero{stage}-skipped"] = partial(zero_bad_gradient, stage=stage)
        checks[f"zero{stage}-checkpoint"] = partial(zero_checkpoint, stage=stage)
    return checks
