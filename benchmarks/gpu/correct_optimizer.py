"""Checks of the optimizer by itself: settings, bad gradients, waits for the device, metrics."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from correct_blocks import same_bits
from correct_runner import Here, NotChecked
from correct_trainings import INF, NAN, PARAMS, STEPS, Beside, Given, Settings, same_on_all, state_of, weights

from adafisher_dist import AdaFisher
from adafisher_dist.numerics.rounding import Elements, add_stochastically
from adafisher_dist.stepping import found_inf
from adafisher_dist.stepping.metrics import NAMES

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


def rounding(here: Here) -> str:
    """Weights in bfloat16 that are rounded by chance have the bits that they have on a CPU."""
    generator = torch.Generator().manual_seed(3)
    shape = (3, 257, 129)
    cut = Elements((257, 129), (129, 1), 257 * 129, 1, 7)
    for dims, elements in ((shape, Elements(shape, (257 * 129, 129, 1), 2**31 - 9, 0, 7)), (shape[1:], cut)):
        weight = torch.randn(dims, generator=generator).bfloat16()
        update = 1e-3 * torch.randn(dims, generator=generator)
        moved = [weight.to(here.device, copy=True), update.to(here.device)]
        add_stochastically([weight], [update], [elements])
        add_stochastically(moved[:1], moved[1:], [elements])
        same_bits([moved[0].cpu()], [weight])
    return "the same bits as on a CPU"


def moved_away(here: Here) -> str:
    """State on the host between steps, and a learning rate on the device, change nothing."""
    module, twin = Given(here), Given(here)
    lr = torch.tensor(PARAMS["lr"], dtype=torch.float64, device=here.device)
    ours = AdaFisher(module.named_parameters(), **{**PARAMS, "lr": lr})
    other = AdaFisher(twin.named_parameters(), **PARAMS)
    for step in range(STEPS):
        for given, trained in ((module, ours), (twin, other)):
            given.take_gradients(step)
            trained.step()
        ours.offload_state(pin_memory=step % 2 == 0)
        ours.reload_state()
    same_bits([p.detach() for p in module.parameters()], [p.detach() for p in twin.parameters()])
    same_bits(state_of(ours), state_of(other))
    return f"{STEPS} steps, the same bits as without"


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
