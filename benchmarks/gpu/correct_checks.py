"""Checks of `correct.py`: the optimizer on a device beside an oracle, or bit for bit beside a twin.

The oracle is the numpy one of tests/oracle.py. Each check is given a `Here`, returns in a line what
it found, and raises where something is wrong.

With several ranks each check runs on all of them: batches are cut by rank, and what is not data is
the same on each. A check asks nothing that a rank knows alone before a collective, so that the
ranks stay together while all goes well.

Everything also runs on CPU tensors, in a rehearsal.
"""

from __future__ import annotations

import dataclasses
import io
import itertools
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, redirect_stdout
from datetime import timedelta
from functools import cache, partial
from importlib.util import find_spec
from typing import Any, ClassVar

import models
import numpy as np
import torch
import torch.distributed as dist
from common_gpu import ROOT
from correct_blocks import blocks, dead_rows, gate, host, ladder, not_numbers, same_bits
from correct_runner import TIMEOUT, Check, Here, NotChecked
from models import SECOND_GROUP, distance, model, param_groups
from oracle import Oracle
from test_oracle import assert_blocks_agree
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import adafisher_dist
from adafisher_dist import AdaFisher
from adafisher_dist.comm import collectives
from adafisher_dist.comm.collectives import CommBuffer, Group, Waits
from adafisher_dist.stepping import found_inf
from adafisher_dist.stepping.metrics import NAMES

sys.path.insert(0, str(ROOT / "tests"))  # before launch/, which has modules of the same names

Arrays = dict[str, np.ndarray]
Settings = dict[str, Any]

PARAMS: Settings = {"lr": 1e-2, "block_size": 8, "damping": 0.2}
STEPS = 5
NAN, INF = float("nan"), float("inf")
FLOATS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}


# ---- trainings ----


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


def batch(step: int, here: Here) -> tuple[Tensor, Tensor]:
    x, y = models.batch(step, here.rank, here.world, size=samples(here))
    return x.to(here.device), y.to(here.device)


def same_on_all(found: Arrays, here: Here) -> None:
    """Raise where ranks hold other weights. A collective."""
    prints = collectives.host_group(None).gather([value.tobytes() for value in found.values()])
    assert all(other == prints[0] for other in prints), f"the weights on this rank, {here.rank}, or on others differ"


class Given(nn.Module):
    """Parameters of a few shapes, whose gradients are given, and no model's."""

    SHAPES: ClassVar = {"a": (37, 11), "b": (37,), "c": (3, 1, 3), "d": (1,)}

    def __init__(self, here: Here, device: torch.device | None = None, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        for number, (name, shape) in enumerate(self.SHAPES.items()):
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
    """The oracle beside a training: compares what each step added to the weights, by block."""

    def __init__(
        self, start: Arrays, own: Mapping[str, Settings], dtype: torch.dtype = torch.float32, tolerance: float = 3e-4,
        **hyper: Any,
    ) -> None:  # fmt: skip
        """`start`: weights in param-group order; `own`: by name, what its group sets otherwise."""
        self.names, self.tolerance = list(start), tolerance
        self.rounding = float(torch.finfo(dtype).eps)
        arithmetic: type = np.float64 if dtype == torch.float64 else np.float32
        for name in ("fisher_dtype", "packed"):
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
    own = {name: SECOND_GROUP for name in groups[1]}
    return Beside({name: start[name] for group in groups for name in group}, own, **{**PARAMS, **more})


@cache
def other_group(name: str) -> Any:
    """Another group of all ranks, for a backend that also sends CPU tensors (NCCL does not)."""
    return dist.new_group(backend=name, timeout=timedelta(seconds=TIMEOUT))


def both(here: Here) -> Any:
    return other_group("gloo" if here.device.type == "cpu" else "cpu:gloo,cuda:nccl")


# ---- the whole optimizer ----


VARIANTS: list[Settings] = [
    {},
    {"packed": True, "rows_per_block": 1},
    {"exponent": 1.0},
    {"inverse_update_freq": 3, "fisher_decay": 0.8},
    {"exponent": 1.0, "inverse_update_freq": 3, "fisher_update_freq": 2, "packed": True},
    {"max_blocks": 3, "grafting": "none", "nesterov": False},
    {"block_grid": "flat", "block_size": 5, "bias_correction": False},
]


def optimizer(here: Here) -> str:
    """Settings of every kind, in float32 and float64."""
    for dtype, variant in itertools.product((torch.float32, torch.float64), VARIANTS):
        _beside_given(here, dtype, {**PARAMS, **variant})
    return f"{len(VARIANTS)} settings in float32 and float64, {STEPS + 3} steps each"


def _beside_given(here: Here, dtype: torch.dtype, settings: Settings) -> Given:
    tolerance = 1e-9 if dtype == torch.float64 else 3e-4
    module = Given(here, dtype=dtype)
    beside = Beside(weights(module), {}, dtype, tolerance, **settings)
    trained = AdaFisher(module.named_parameters(), fisher_dtype=dtype, **settings)
    for step in range(STEPS + 3):
        gradients, before = module.take_gradients(step), weights(module)
        trained.step()
        beside.step(gradients, before, weights(module))
    return module


def tf32(here: Here) -> str:
    """TF32 for the model's products, by old and new names, does not affect the optimizer's."""
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


@contextmanager
def deciding_on_the_device() -> Iterator[None]:
    """On a CPU too, as tests/test_found_inf.py does."""
    before, found_inf.is_meant_for = found_inf.is_meant_for, lambda device: True
    try:
        yield
    finally:
        found_inf.is_meant_for = before


@deciding_on_the_device()
def bad_gradients(here: Here, **more: Any) -> str:
    """A bad gradient on the last rank alone leaves weights, state, counters like a twin's."""
    module, twin = Given(here), Given(here)
    ours, other = (AdaFisher(m.named_parameters(), **PARAMS, **more) for m in (module, twin))
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
    return f"{len(PLAN)} calls, 3 of them skipped without a trace"


def _spoil(module: Given, bad: float, everywhere: bool) -> None:
    """Write `bad` into one element, or `everywhere`, so that each rank's own blocks get some."""
    assert module.a.grad is not None
    if not everywhere:
        module.a.grad[2, 3] = bad
        return
    for p in module.parameters():
        assert p.grad is not None
        p.grad.fill_(bad)


# ---- nothing waits for the device ----


@deciding_on_the_device()
def waiting(here: Here, **more: Any) -> str:
    """Calls 3, 5, 6, 7, where ranks compare nothing, do not wait; nor does 9, on a busy device."""
    module = Given(here)
    ours = AdaFisher(module.named_parameters(), **PARAMS, **more)
    for call in range(1, 9):
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
    which = "3, 5, 6, 7" + (" and, beside a busy device, 9" if here.device.type == "cuda" else "")
    return f"in calls {which} the host waits for nothing on the device"


@contextmanager
def no_waiting(here: Here, where: str) -> Iterator[None]:
    """Raise if the host waits for the device, as torch sees it; on a CPU, if it reads a result."""
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
        raise NotChecked("tests/test_found_inf.py, which knows what waits, needs DeepSpeed")
    import test_found_inf

    with test_found_inf.Waits() as noted:
        yield
    assert not noted.seen, f"{where} waits: {noted.seen}"


# ---- metrics ----


def metrics(here: Here) -> str:
    """A measured step's numbers arrive on the first rank, all of them, and are finite."""
    found: list[tuple[int, dict[str, float]]] = []
    module = Given(here)
    ours = AdaFisher(module.named_parameters(), **PARAMS)
    ours.report_metrics(lambda step, values: found.append((step, values)), every=2)
    module.train(ours, range(2))
    ours.flush_metrics()
    assert [step for step, _ in found] == ([] if here.rank else [2]), found
    for _, values in found:
        assert values.keys() == NAMES.keys(), NAMES.keys() ^ values.keys()
        assert all(np.isfinite(value) for value in values.values()), values
    told = ", ".join(f"{name} {value:.3g}" for _, values in found for name, value in values.items())
    return f"of step 2: {told}"


@deciding_on_the_device()
def metrics_wait(here: Here) -> str:
    """Nor does the host wait in a step that is measured, the third one."""
    module = Given(here)
    ours = AdaFisher(module.named_parameters(), **PARAMS)
    ours.report_metrics(lambda step, values: None, every=3)
    module.train(ours, range(2))
    module.take_gradients(2)
    with no_waiting(here, "a measured step"):
        ours.step()
    ours.flush_metrics()
    return "the host waits for nothing on the device in a measured step"


# ---- one process, or DDP ----


def wrapped(module: nn.Module, here: Here, group: Any = None) -> nn.Module:
    """In DDP where there are several ranks."""
    if here.world == 1:
        return module
    ids = None if here.device.type == "cpu" else [here.device.index]
    return DistributedDataParallel(module, device_ids=ids, process_group=group)


def replicated(here: Here, precision: str, group: Callable[[Here], Any] = lambda here: None, **more: Any) -> str:
    """Steps with a model's own gradients, in param groups; in one step a parameter has none."""
    dtype, chosen = FLOATS[precision], group(here)
    module = model(dtype).to(here.device)
    net = wrapped(module, here, chosen)
    ours = AdaFisher(param_groups(module), **{**PARAMS, **more}, process_group=chosen)
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
    """GradScaler, fp16 autocast; a step whose gradients overflow on the last rank is skipped."""
    module = model().to(here.device)
    net, ours = wrapped(module, here), AdaFisher(param_groups(module), **PARAMS)
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
        stage, here.world, PARAMS, precision=precision, offload=offload, accumulate=accumulate
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
    """An engine's steps beside numpy, of two micro-steps; in fp16 the last rank overflows once."""
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
        devices = {str(shard.device.type) for shard in engine.basic_optimizer._registry.shards}
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
    ours = AdaFisher(param_groups(module), **PARAMS)
    whole = partial(_whole, module, here)
    beside = beside_groups(module, whole())
    for step in range(STEPS):
        x, y = batch(step, here)
        ours.zero_grad()
        nn.functional.mse_loss(module(x).float(), y).backward()
        gradients, before = whole(gradients=True), whole()
        ours.step()
        beside.step(gradients, before, whole())
    devices = {shard.device.type for shard in ours._registry.shards}
    assert devices == {"cpu" if policy == "offload" else kind}, devices
    same_on_all(whole(), here)
    return f"{STEPS} steps beside numpy over {here.world} rank(s); the optimizer's state is on {devices.pop()}"


def _whole(module: nn.Module, here: Here, gradients: bool = False) -> Arrays:
    """Full weights or gradients; those on the CPU are gathered on the device, as NCCL needs it."""
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
    """Every function of comm over all ranks, and also what a single rank would not send.

    Tensors are on the device and on the host, which with NCCL alone travel through the device.
    """
    real = collectives.join(group(here))
    forced = dataclasses.replace(real, size=max(2, real.size))  # past "there is nobody to tell"
    collectives.measure_waits(waits := Waits())
    try:
        lowest = collectives.minimum(forced, [5 - here.rank, here.rank])
        assert lowest == [5 - (here.world - 1), 0], lowest
        for device in {here.device, torch.device("cpu")}:
            _all_of_comm(real, forced, device, here)
    finally:
        collectives.measure_waits(None)
    seconds = waits.seconds()
    assert 0 < seconds < TIMEOUT, seconds
    again = collectives.host_group(None)
    assert again.gather(here.rank) == list(range(here.world)) and collectives.host_group(None) is again
    assert real.members == frozenset(range(here.world))
    return f"{real.devices}: waited {1e3 * seconds:.2f} ms in all"


def _all_of_comm(real: Group, forced: Group, device: torch.device, here: Here) -> None:
    ranks, own = range(here.world), float(here.rank + 1)

    def full(value: float, numel: int, dtype: torch.dtype = torch.float32) -> CommBuffer:
        comm_buffer = real.comm_buffer(torch.full((numel,), value, dtype=dtype, device=device))
        assert comm_buffer.sent.device.type in real.devices, "a wire that the backend cannot send"
        return comm_buffer

    flag = full(own, 1, torch.int32)
    collectives.minimum_on_device(forced, flag)
    assert flag.tensor.tolist() == [1], flag
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        out = full(0.0, 3 * here.world, dtype)
        collectives.all_gather(real, full(own, 4, dtype).part(1, 4), out)()
        assert out.tensor.tolist() == [rank + 1.0 for rank in ranks for _ in range(3)], (device, out.tensor)
    counts = [1 + rank for rank in ranks]  # so many to each rank
    received = full(0.0, here.world * (1 + here.rank))
    collectives.all_to_all(real, full(own, sum(counts)), counts, received, [1 + here.rank] * here.world)()
    assert received.tensor.tolist() == [rank + 1.0 for rank in ranks for _ in range(1 + here.rank)], received.tensor
    for source in {0, here.world - 1}:
        value = torch.full((2, 3), own, device=device)
        got = collectives.broadcast(forced, value, source, "a check")
        assert got.device.type == device.type and set(got.flatten().tolist()) == {source + 1.0}, got


# ---- checkpoints ----


def checkpoint(here: Here) -> str:
    """Saved at once and in the background; a fresh model and optimizer go on bit for bit."""
    variants: list[Settings] = [
        {},
        {"inverse_update_freq": 2, "packed": True, "fisher_dtype": torch.bfloat16, "rows_per_block": 2},
    ]
    for (number, variant), asynchronous in itertools.product(enumerate(variants), (False, True)):
        settings = {**PARAMS, **variant}
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
        ours, other = (AdaFisher(m.named_parameters(), **PARAMS) for m in (module, again))
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


def all_checks() -> dict[str, Check]:
    """By name, in the order in which they are made: what is most likely to be wrong first."""
    checks: dict[str, Check] = {
        "blocks": blocks,
        "ladder": ladder,
        "not-numbers": not_numbers,
        "dead-rows": dead_rows,
        "gate": gate,
        "optimizer": optimizer,
        "tf32": tf32,
        "skipped": bad_gradients,
        "skipped-bf16": partial(bad_gradients, max_blocks=3, fisher_dtype=torch.bfloat16),
        "skipped-by-hosts": partial(bad_gradients, exponent=1.0, inverse_update_freq=2),
        "waiting": waiting,
        "waiting-bf16": partial(waiting, packed=True, max_blocks=3, fisher_dtype=torch.bfloat16),
        "waiting-plain": partial(waiting, grafting="none", fisher_update_freq=2),
        "metrics": metrics,
        "waiting-metrics": metrics_wait,
        "comm": communication,
        "comm-both": partial(communication, group=both),
    }
    for precision in ("fp32", "bf16", "fp16"):
        checks[f"train-{precision}"] = partial(replicated, precision=precision)
    checks["train-fp32-both"] = partial(replicated, precision="fp32", group=both)
    checks["train-fp32-p1"] = partial(replicated, precision="fp32", exponent=1.0, inverse_update_freq=2)
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
