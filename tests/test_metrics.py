"""Metrics against numpy, equal on any ranks and layout; callbacks, DeepSpeed and pictures."""

from __future__ import annotations

import contextlib
import copy
import csv
import logging
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engines import BATCH, PARAMS, backward, config, engine_of, fp16_on_the_cpu
from engines import train as train_engine
from models import batch, model, weights
from ranks import run_ranks
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from adafisher_dist import AdaFisher, ds
from adafisher_dist.comm import collectives
from adafisher_dist.comm.host_groups import HostGroup
from adafisher_dist.numerics.factors import condition_number
from adafisher_dist.numerics.packing import pack, unpack
from adafisher_dist.stepping import found_inf, metrics, updating
from adafisher_dist.stepping.metrics import NAMES, CsvLog

Told = list[tuple[int, dict[str, float]]]
SETTINGS: dict[str, Any] = {"lr": 1e-2, "block_size": 8, "rows_per_block": 4}
KEPT: dict[str, Any] = {**SETTINGS, "inverse_update_freq": 4}


def train(
    rank: int, world: int, settings: dict[str, Any], steps: int = 7, every: int = 3, dtype: torch.dtype = torch.float64,
    before: Callable[[AdaFisher], object] | None = None,
) -> tuple[Told, list[dict[str, np.ndarray]]]:  # fmt: skip
    """What was told, and the weights after each step, those before the first included."""
    module = model(dtype)
    wrapped = DistributedDataParallel(module) if world > 1 else module
    optimizer = AdaFisher(module.parameters(), **settings)
    told: Told = []
    optimizer.report_metrics(lambda step, found: told.append((step, found)), every)
    history = [weights(module)]
    for step in range(steps):
        x, y = batch(step, rank, world, dtype=dtype)
        optimizer.zero_grad()
        nn.functional.mse_loss(wrapped(x), y).backward()
        if before is not None and step == 3:
            before(optimizer)
        optimizer.step()
        history.append(weights(module))
    optimizer.flush_metrics()
    return told, history


def norm(tensors: dict[str, np.ndarray]) -> float:
    return float(np.sqrt(sum((value**2).sum() for name, value in tensors.items() if name != "frozen")))


# ---- what they are ----


@pytest.mark.parametrize("packed", [False, True])
def test_condition_numbers_are_numpys(packed: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    half = torch.randn(5, 6, 9, generator=generator, dtype=torch.float64)
    f = half.mT @ half
    f[2] = 0  # has seen no gradient
    stored = unpack(pack(f), 9) if packed else f.triu(1) * 7 + f.tril()  # only the lower triangle counts
    found = condition_number(stored, 0.01, 0.0, torch.float64)
    for block, number in zip(f.numpy(), found.tolist(), strict=True):
        mean = np.trace(block) / 9
        a = block / (mean if mean else 1) + 0.01 * np.eye(9)
        assert number == pytest.approx(np.linalg.cond(a, 1), rel=1e-9)


def test_each_metric_of_one_process() -> None:
    settings = {**KEPT, "damping": 0.2, "fisher_decay": 0.95, "fisher_dtype": torch.float64}
    told, history = train(0, 1, settings)
    assert [step for step, _ in told] == [3, 6]
    for step, found in told:
        assert list(found) == list(NAMES)
        change = {name: value - history[step - 1][name] for name, value in history[step].items()}
        assert found["update_to_weight"] == pytest.approx(norm(change) / norm(history[step]), rel=1e-9)
        assert found["damping_min"] == found["damping_max"] == 0.2 + 1e-8
        assert found["communication_bytes"] == found["communication_ms"] == found["skipped_steps"] == 0
        assert 1 < found["condition_number_median"] <= found["condition_number_max"] < 9 * 9 / 0.2
    # All factors are new at steps 1 to 8, when the Fisher is filling: its interval is round(4 (1 -
    # 0.95^k)).
    assert told[0][1]["factor_age_max"] == 0


def test_the_age_of_factors() -> None:
    """With an interval of 4 from the start, a quarter of blocks each is 0, 1, 2, 3 steps old."""
    settings = {**KEPT, "fisher_decay": 0.1, "bias_correction": False, "damping": 1.0}
    told, _ = train(0, 1, settings, steps=24, every=12)
    for _, found in told:
        assert found["factor_age_max"] == 3 and found["factor_age_mean"] == pytest.approx(1.5, abs=0.3)


def test_the_damping_of_two_groups() -> None:
    module = model(torch.float32)
    first = module.inner.weight
    groups = [{"params": [first], "damping": 0.5}, {"params": [p for p in module.parameters() if p is not first]}]
    optimizer = AdaFisher(groups, **SETTINGS, damping=1e-3, fisher_dtype=torch.bfloat16)
    told: Told = []
    optimizer.report_metrics(lambda step, found: told.append((step, found)), 1)
    x, y = batch(0, 0, 1, dtype=torch.float32)
    nn.functional.mse_loss(module(x), y).backward()
    optimizer.step()
    optimizer.flush_metrics()
    assert told[0][1]["damping_max"] == 0.5 + 1e-8
    assert told[0][1]["damping_min"] == 1e-3 + 1e-8


def test_the_ladder_is_counted() -> None:
    parameter = nn.Parameter(torch.ones(2, 2))
    optimizer = AdaFisher([parameter], exponent=1.0, rows_per_block=1, damping=0.0, block_size=2)
    told: Told = []
    optimizer.report_metrics(lambda step, found: told.append((step, found)), 2)
    for _ in range(4):
        parameter.grad = torch.ones(2, 2)  # F has rank 1
        optimizer.step()
    optimizer.flush_metrics()
    needed = sum(stats.ladder["more damping"] for stats in optimizer.fisher_stats().values())
    assert needed > 0 and told[-1][1]["ladder_more_damping"] == needed >= told[0][1]["ladder_more_damping"] > 0


# ---- on several ranks ----


@pytest.mark.dist
@pytest.mark.parametrize("world", [2, 3])
def test_ranks_tell_what_one_process_does(world: int) -> None:
    settings = {**KEPT, "fisher_dtype": torch.float64}
    alone, _ = train(0, 1, settings)
    results = run_ranks(train, world, settings)
    assert all(told == [] for told, _ in results[1:]), "only the first rank tells"
    compare(results[0][0], alone)
    assert results[0][0][0][1]["communication_bytes"] > 0 and results[0][0][0][1]["communication_ms"] > 0


def compare(found: Told, expected: Told, rel: float = 1e-9) -> None:
    assert [step for step, _ in found] == [step for step, _ in expected]
    for (_, ours), (_, theirs) in zip(found, expected, strict=True):
        for name in NAMES:
            if not name.startswith("communication"):
                assert ours[name] == pytest.approx(theirs[name], rel=rel), name


def broken(rank: int, world: int) -> tuple[Told, str]:
    """One rank fails while it measures."""
    log = []
    handler = logging.Handler()
    handler.emit = lambda record: log.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("adafisher_dist").addHandler(handler)

    def fail(*_: Any) -> Any:
        raise RuntimeError("no room")

    def breaks(_: AdaFisher) -> None:
        if rank == 1:
            metrics._conditions = fail

    told, _ = train(rank, world, SETTINGS, before=breaks)
    return told, "\n".join(log)


@pytest.mark.dist
def test_an_error_on_a_rank_stops_nobody() -> None:
    (told, log), _ = run_ranks(broken, 2)
    assert [step for step, _ in told] == [3]
    assert "metrics of step 6 are left out; rank 1: RuntimeError: no room" in log


def on_one_rank(rank: int, world: int, every: int | None) -> str:
    """What a step says where the ranks do not report alike."""

    def differs(optimizer: AdaFisher) -> None:
        if rank == 0:
            optimizer.report_metrics(None if every is None else print, every or 1)

    try:
        train(rank, world, SETTINGS, before=differs)
    except RuntimeError as error:
        return str(error)
    return ""


@pytest.mark.dist
@pytest.mark.parametrize("every", [None, 2, 3])
def test_ranks_that_do_not_report_alike_are_refused(every: int | None) -> None:
    """Also of the same interval, where one rank has forgotten a step that is being measured."""
    for message in run_ranks(on_one_rank, 2, every):
        assert "Some ranks report AdaFisher's metrics and others do not" in message


def unread(rank: int, world: int) -> Told:
    """One rank cannot read what its device has measured."""

    def fail(self: Any) -> Any:
        raise RuntimeError("device lost")

    def breaks(_: AdaFisher) -> None:
        if rank == 1:
            metrics._Reading.read = fail  # type: ignore[method-assign]

    return train(rank, world, SETTINGS, before=breaks)[0]


@pytest.mark.dist
def test_what_cannot_be_read_stops_nobody() -> None:
    assert run_ranks(unread, 2) == [[], []]


def test_a_callback_that_fails_stops_nothing(caplog: pytest.LogCaptureFixture) -> None:
    def fail(step: int, found: dict[str, float]) -> None:
        raise OSError("no network")

    def breaks(optimizer: AdaFisher) -> None:
        optimizer.report_metrics(fail, 1)

    with caplog.at_level(logging.WARNING, "adafisher_dist"):
        _, history = train(0, 1, SETTINGS, before=breaks)
    assert len(history) == 8
    assert [record.getMessage() for record in caplog.records] == [
        "AdaFisher's metrics of step 4 are left out; the callback failed: OSError: no network."
    ]


@pytest.mark.parametrize("begin", ["reset", "load"])
def test_a_step_that_failed_is_not_told_of(begin: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is it put together with the step of the same number that is taken in its place."""
    undisturbed, _ = train(0, 1, SETTINGS, steps=3, every=1)
    module, told = model(torch.float64), []
    optimizer = AdaFisher(module.parameters(), **SETTINGS)
    optimizer.report_metrics(lambda step, found: told.append((step, found)), 1)

    def step(number: int) -> None:
        x, y = batch(number, 0, 1, dtype=torch.float64)
        optimizer.zero_grad()
        nn.functional.mse_loss(module(x), y).backward()
        optimizer.step()

    add_all, calls = updating.add_all, count()

    def out_of_memory(*given: Any) -> None:
        if next(calls) > 0:  # when some of the step has been measured
            raise RuntimeError("says the test")
        add_all(*given)

    step(0)
    before = copy.deepcopy((module.state_dict(), optimizer.state_dict()))
    with monkeypatch.context() as patched, pytest.raises(RuntimeError, match="says the test"):
        patched.setattr(updating, "add_all", out_of_memory)
        step(1)
    if begin == "reset":
        module.load_state_dict(model(torch.float64).state_dict())
        optimizer.reset_state()
        step(0)
    else:
        module.load_state_dict(before[0])
        optimizer.load_state_dict(before[1])
    step(1)
    step(2)
    optimizer.flush_metrics()
    assert [number for number, _ in told] == ([1, 1, 2, 3] if begin == "reset" else [1, 2, 3])
    assert [{**found, "communication_ms": 0.0} for _, found in told[-2:]] == [
        {**found, "communication_ms": 0.0} for _, found in undisturbed[-2:]
    ]


def count_collectives(rank: int, world: int) -> list[int]:
    """How many collectives of the control group each step makes."""
    count = [0]
    gather = HostGroup.gather

    def counted(self: HostGroup, value: Any) -> Any:
        count[0] += 1
        return gather(self, value)

    HostGroup.gather = counted  # type: ignore[method-assign]
    module = model(torch.float32)
    optimizer = AdaFisher(module.parameters(), **SETTINGS)
    optimizer.report_metrics(lambda step, found: None, 3)
    seen = []
    for step in range(8):
        x, y = batch(step, rank, world, dtype=torch.float32)
        nn.functional.mse_loss(module(x), y).backward()
        for p in module.parameters():
            if p.grad is not None:
                torch.distributed.all_reduce(p.grad)
        optimizer.step()
        optimizer.zero_grad()
        seen.append(count[0])
        assert (collectives._measuring is None) or (step + 1) % 3 == 0
    return seen


@pytest.mark.dist
def taken_anew(rank: int, world: int, skipped: bool, sparse: bool) -> tuple[Told, list[str]]:
    """Seven steps, of which the third is measured; whether it is skipped and then taken anew."""
    found_inf.is_meant_for = lambda device: True
    parameter = nn.Parameter(torch.ones(64, 64))
    optimizer = AdaFisher([parameter], **SETTINGS)
    told: Told = []
    optimizer.report_metrics(lambda step, found: told.append((step, found)), every=3)
    errors = []
    for call in [1, 2, *([-3] if skipped else []), 3, 4, 5, 6, 7]:
        gradient = torch.randn(64, 64, generator=torch.Generator().manual_seed(abs(call)))
        parameter.grad = gradient * float("nan") if call < 0 else gradient
        if sparse and rank == 1 and call == 4:
            parameter.grad = gradient.to_sparse()
        try:
            optimizer.step()
        except Exception as error:
            errors.append(str(error))
            break
    return told, errors


def test_a_measured_step_that_is_taken_anew_is_measured_once() -> None:
    (straight, _), (anew, _) = (run_ranks(taken_anew, 2, skipped, False)[0] for skipped in (False, True))
    for (step, found), (_, wanted) in zip(anew, straight, strict=True):
        assert (step, found.pop("skipped_steps"), wanted.pop("skipped_steps")) == (step, 1, 0)
        assert found.pop("communication_bytes") < 1.1 * wanted.pop("communication_bytes"), "verdicts are not all alike"
        assert {**found, "communication_ms": 0} == {**wanted, "communication_ms": 0}, step


@pytest.mark.parametrize("then", ["reset", "flush"])
def test_a_measured_step_that_was_not_taken_is_not_told_of(then: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(found_inf, "is_meant_for", lambda device: True)
    parameter = nn.Parameter(torch.ones(8, 8))
    optimizer = AdaFisher([parameter], **SETTINGS)
    told: list[int] = []
    optimizer.report_metrics(lambda step, found: told.append(step), every=3)
    for call in range(1, 8):
        parameter.grad = torch.full((8, 8), float("nan") if call == 3 else 1.0)
        optimizer.step()
        if call == 3 and then == "reset":
            optimizer.state.clear()
        elif call == 3:
            optimizer.flush_metrics()
            assert told == []
    optimizer.flush_metrics()
    assert told == ([3] if then == "reset" else [3, 6])


@pytest.mark.parametrize("skipped", [False, True])
def test_an_error_after_a_measured_step_stops_all(skipped: bool) -> None:
    (_, first), (_, second) = run_ranks(taken_anew, 2, skipped, True)
    assert len(first) == 1 and "rank 1 failed" in first[0]
    assert len(second) == 1 and "sparse gradient" in second[0]


def test_between_measured_steps_nothing_is_done() -> None:
    for seen in run_ranks(count_collectives, 2):
        assert seen == [0, 0, 0, 1, 1, 1, 2, 2]


# ---- DeepSpeed ----


def monitored(rank: int, world: int, stage: int, folder: str, zero: dict[str, Any], accumulate: int) -> Told:
    """By config alone, then by report_metrics; with two param groups a step is several calls."""
    kinds = ("csv_monitor", "tensorboard")
    monitor = {kind: {"enabled": True, "output_path": folder, "job_name": kind} for kind in kinds}
    params = {**PARAMS, "metrics_every": 2}
    engine = engine_of(config(stage, world, params, zero=zero, accumulate=accumulate, **monitor), groups=True)
    train_engine(engine, 0, 5, rank, world)
    told: Told = []
    engine.basic_optimizer.report_metrics(lambda step, found: told.append((step, found)), 2)
    train_engine(engine, 5, 8, rank, world)
    engine.basic_optimizer.flush_metrics()
    ds.report_metrics(engine, 1)
    with contextlib.suppress(ValueError):
        ds.report_metrics(engine, 0)
        raise AssertionError("0 was accepted")
    return told


@pytest.mark.dist
@pytest.mark.deepspeed
@pytest.mark.parametrize(
    ("stage", "zero"), [(0, {}), (1, {}), (2, {}), (3, {"sub_group_size": 60, "stage3_param_persistence_threshold": 0})]
)
def test_deepspeeds_monitors(stage: int, zero: dict[str, Any], tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (told, other) = run_ranks(monitored, 2, stage, str(tmp_path), zero, 2, deepspeed=True)
    assert [step for step, _ in told] == [6, 8] and other == []
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    for name in NAMES:
        heading, *lines = (tmp_path / "csv_monitor" / f"AdaFisher_{name}.csv").read_text().split()
        assert heading == f"step,{name}"
        assert [line.split(",")[0] for line in lines] == ["48", "96"], "steps 2 and 4 of 24 samples"
        events = [(event.step, event.value) for event in board.Scalars(f"AdaFisher/{name}")]
        assert events == [
            (int(step), pytest.approx(float(value))) for step, value in (line.split(",") for line in lines)
        ]
    # Stages differ in what they hold where, and not in what they compute.
    expected = run_ranks(monitored, 1, 0, str(tmp_path / "alone"), {}, 2, deepspeed=True)[0]
    compare(told, expected, rel=2e-3)


def written(rank: int, world: int, folder: str) -> list[tuple[str, float, int]]:
    """All events of eight steps, also DeepSpeed's own; after the measured step 2, two overflow."""
    monitor = {"csv_monitor": {"enabled": True, "output_path": folder}}
    with fp16_on_the_cpu():
        engine = engine_of(config(1, world, {**PARAMS, "metrics_every": 2}, precision="fp16", **monitor))
    events: list[tuple[str, float, int]] = []
    engine.monitor.write_events = events.extend
    for step in range(8):
        backward(engine, step, rank, world, factor=float("inf") if step in (2, 3) else 1.0)
        engine.step()
    assert engine.skipped_steps == 2
    return events


@pytest.mark.dist
@pytest.mark.deepspeed
def test_samples_are_counted_as_deepspeed_does(tmp_path: Path) -> None:
    """W&B drops what is of fewer samples than the last event."""
    events, _ = run_ranks(written, 2, str(tmp_path), deepspeed=True)
    samples = [event[2] for event in events]
    assert samples == sorted(samples)
    assert {event[0] for event in events} >= {"Train/Samples/lr", *(f"AdaFisher/{name}" for name in NAMES)}
    assert [event[2] // BATCH for event in events if event[0] == "AdaFisher/damping_max"] == [4, 6]


def refused(rank: int, world: int) -> str:
    try:
        engine_of(config(1, world, {**PARAMS, "metrics_every": 2}))
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.dist
@pytest.mark.deepspeed
def test_no_monitor_is_an_error() -> None:
    assert "DeepSpeed has no monitor on" in run_ranks(refused, 1, deepspeed=True)[0]


def test_metrics_every_is_deepspeeds() -> None:
    with pytest.raises(ValueError, match=r"use optimizer\.report_metrics"):
        ds.from_config(model().parameters(), metrics_every=3)
    with pytest.raises(ValueError, match="a whole number from 1 on, and not 0"):
        AdaFisher(model().parameters()).report_metrics(print, 0)


# ---- logs ----


def test_a_log_is_a_table(tmp_path: Path) -> None:
    path = tmp_path / "runs" / "metrics.csv"
    for _ in range(2):  # a second run appends
        log = CsvLog(path)
        for step, found in train(0, 1, KEPT, dtype=torch.float32)[0]:
            log(step, found)
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4 and rows[0].keys() == {"step", *NAMES}
    assert rows[:2] == rows[2:] and float(rows[1]["update_to_weight"]) == pytest.approx(found["update_to_weight"], 1e-5)
