"""What devices decide about ranks that fail or differ: nobody waits, nothing is trained on.

A CPU stands for the device, as in test_found_inf. Calls 3, 5, 6 and 7 are those in which no host
asks another.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from engines import config, engine_of, masters, train
from fault_points import Points, watching
from models import batch, model, weights
from ranks import run_ranks
from torch import nn

from adafisher_dist import AdaFisher
from adafisher_dist.comm import collectives
from adafisher_dist.numerics import block_step
from adafisher_dist.optimizer import adafisher
from adafisher_dist.stepping import found_inf, updating

pytestmark = pytest.mark.dist

SETTINGS: dict[str, Any] = {"lr": 1e-2, "block_size": 8, "rows_per_block": 4}
FAULTY = 1


class Run:
    """A model without a wrapper, whose gradients are made alike on all ranks; counts its calls."""

    def __init__(self, frozen: str | None = None) -> None:
        found_inf.is_meant_for = lambda device: True
        self.module = model()
        self.frozen = frozen
        self.optimizer = AdaFisher(self.module.parameters(), **SETTINGS)
        self.calls = 0

    def gradients(self) -> None:
        x, y = batch(self.calls, 0, 1)
        self.module.zero_grad()
        nn.functional.mse_loss(self.module(x), y).backward()
        if self.frozen is not None:
            self.module.get_parameter(self.frozen).grad = None

    def step(self) -> None:
        self.gradients()
        self.calls += 1
        self.optimizer.step()

    def everything(self) -> list[np.ndarray]:
        shards = self.optimizer._registry.shards
        state = [tensor for shard in shards for stack in shard.stacks for tensor in stack.state.values()]
        counters = [shard.counters for shard in shards]
        return [*weights(self.module).values(), *(tensor.clone().numpy() for tensor in (*state, *counters))]


def raises(run: Run) -> str:
    with pytest.raises(Exception) as caught:
        run.step()
    return f"{type(caught.value).__name__}: {caught.value}"


def sparse(run: Run) -> None:
    """A gradient that cannot be used."""
    gradients = run.gradients

    def with_sparse() -> None:
        gradients()
        parameter = run.module.mix.weight
        parameter.grad = parameter.grad.to_sparse()
        run.gradients = gradients  # type: ignore[method-assign]

    run.gradients = with_sparse  # type: ignore[method-assign]


def other_rate(run: Run) -> None:
    run.optimizer.set_lr(3e-3)


def other_gradients(run: Run) -> None:
    """One of a shard's parameters has no gradient here, and has one elsewhere."""
    run.frozen = "mix.weight"


def other_counts(run: Run) -> None:
    run.optimizer._registry.shards[0].counters += 1


def measuring(run: Run) -> None:
    run.optimizer.report_metrics(lambda step, metrics: None, every=1)


def bad_setting(run: Run) -> None:
    run.optimizer.param_groups[0]["momentum"] = 1.5


def captured(run: Run) -> None:
    """What fails before anything else is looked at."""

    def fails() -> None:
        raise RuntimeError("CUDA graph")

    adafisher._refuse_capture = fails  # type: ignore[assignment]


def other_shape(run: Run) -> None:
    """What the others wait for is not there any more."""
    run.module.mix.weight.data = torch.zeros(3, 2)
    run.gradients = lambda: setattr(run.module.mix.weight, "grad", torch.zeros(3, 2))  # type: ignore[method-assign]


def weights_are_gone(rank: int, world: int) -> tuple[str, str]:
    run = Run()
    for _ in range(4):
        run.step()
    if rank == FAULTY:
        other_shape(run)
    run.step()
    return raises(run), raises(run)


def test_weights_that_cannot_be_sent_are_missed_by_all() -> None:
    for rank, (first, second) in enumerate(run_ranks(weights_are_gone, 3)):
        assert ("was (5, 37)" if rank == FAULTY else f"rank {FAULTY} failed in the middle of a step") in first
        assert "incomplete" in second


def no_room_to_keep_company(rank: int, world: int) -> tuple[int, str, str]:
    """A rank that has failed cannot copy a weight, which is not contiguous, for the others."""
    run = Run()
    weight = run.module.mix.weight
    weight.data = weight.t().contiguous().t()
    for _ in range(4):
        run.step()
    points = Points(lambda passed: passed[-1].startswith("op aten.clone") and "without_gradients" in passed[-1])
    if rank == FAULTY:
        bad_setting(run)
        with watching(points):
            run.step()
    else:
        run.step()
    return sum(map(points.when, ([what] for what in points.passed))), raises(run), raises(run)


def test_a_rank_that_keeps_company_may_fail_again() -> None:
    for rank, (failures, first, second) in enumerate(run_ranks(no_room_to_keep_company, 3)):
        assert failures == (rank == FAULTY)
        assert ("momentum" if rank == FAULTY else f"rank {FAULTY} failed in the middle of a step") in first
        assert "incomplete" in second


def after_the_last_collective(rank: int, world: int) -> list[str]:
    run = Run()
    for _ in range(4):
        run.step()
    with watching(Points()) as points:
        run.step()
    passed = points.passed
    last = max(index for index, what in enumerate(passed) if what.startswith("op c10d."))
    return [what.partition(":")[0] for what in passed[last + 1 :] if what.startswith("op ")]


def test_little_can_fail_after_the_last_collective() -> None:
    """A rank that fails there stops alone; what else is needed is made before."""
    for operations in run_ranks(after_the_last_collective, 2):
        assert operations == ["op aten.copy_.default in stepping.found_inf._notice"]


BEFORE: dict[Callable[[Run], None], tuple[str, str]] = {  # what the rank itself says, what the others say
    sparse: ("sparse", f"rank {FAULTY} failed before anything changed"),
    bad_setting: ("momentum", f"rank {FAULTY} failed before anything changed"),
    captured: ("CUDA graph", f"rank {FAULTY} failed before anything changed"),
    other_rate: ("different settings", "different settings"),
    other_gradients: ("which parameters have a gradient", "which parameters have a gradient"),
    other_counts: ("different numbers of steps", "different numbers of steps"),
    measuring: ("report AdaFisher's metrics", "report AdaFisher's metrics"),
}


def before_anything_changes(rank: int, world: int, fault: str, call: int) -> tuple[bool, str]:
    run = Run()
    for _ in range(call - 1):
        run.step()
    before = run.everything()
    if rank == FAULTY:
        globals()[fault](run)
        before = run.everything() if fault == "other_counts" else before
    run.step()  # nobody is told yet
    told = raises(run)
    return all(map(np.array_equal, before, run.everything())), told


@pytest.mark.parametrize("fault", BEFORE, ids=lambda fault: fault.__name__)
@pytest.mark.parametrize("call", [3, 5])
def test_ranks_that_fail_or_differ_change_nothing(fault: Callable[[Run], None], call: int) -> None:
    """All ranks raise in the next call, and weights, state and counters are what they were."""
    for rank, (same, told) in enumerate(run_ranks(before_anything_changes, 3, fault.__name__, call)):
        assert same
        assert BEFORE[fault][0 if rank == FAULTY else 1] in told


def goes_on(rank: int, world: int, every: int | None) -> bool:
    run, twin = Run(), Run()
    measured: list[list[Any]] = [[], []]
    for one, told in zip((run, twin), measured, strict=True):
        if every is not None:
            one.optimizer.report_metrics(lambda step, metrics, told=told: told.append((step, dict(metrics))), every)
    for _ in range(4):
        run.step()
        twin.step()
    if rank == FAULTY:
        sparse(run)
    run.step()
    raises(run)
    run.calls -= 2
    for _ in range(3):
        run.step()
        twin.step()
    for metrics in (metrics for told in measured for _, metrics in told):
        metrics.pop("communication_ms")
    assert [step for step, _ in measured[0]] == ([5] if every is not None and rank == 0 else [])
    return measured[0] == measured[1] and all(map(np.array_equal, run.everything(), twin.everything()))


@pytest.mark.parametrize("every", [None, 5], ids=["", "in a measured step"])
def test_training_goes_on_after_a_fault_that_changed_nothing(every: int | None) -> None:
    assert all(run_ranks(goes_on, 2, every))


def amid(rank: int, world: int, place: str) -> tuple[str, str, str]:
    run = Run()
    for _ in range(4):
        run.step()
    real = block_step.factorize, updating.add_all
    if rank == FAULTY:

        def fail(*arguments: Any, **more: Any) -> Any:
            raise RuntimeError("says the test")

        block_step.factorize, updating.add_all = (fail, real[1]) if place == "blocks" else (real[0], fail)
    run.step()
    block_step.factorize, updating.add_all = real
    with pytest.raises(RuntimeError) as asked:
        run.optimizer.state_dict()
    return raises(run), raises(run), str(asked.value)


@pytest.mark.parametrize("place", ["blocks", "weights"])
def test_half_a_step_is_not_trained_on(place: str) -> None:
    for rank, (first, second, asked) in enumerate(run_ranks(amid, 3, place)):
        own = "says the test" if rank == FAULTY else f"rank {FAULTY} failed in the middle of a step"
        assert own in first and own in asked
        assert "incomplete" in second


def a_new_plan(rank: int, world: int, where: str) -> tuple[list[str], dict[str, np.ndarray], dict[str, np.ndarray]]:
    run, twin = Run(frozen="mix.weight"), Run(frozen="mix.weight")
    for _ in range(4):
        run.step()
    if where == "all" or rank == FAULTY:
        run.frozen = None
    before = weights(run.module)
    run.step()
    if where != "all":
        return [raises(run)], before, weights(run.module)
    found_inf.is_meant_for = lambda device: False  # hosts agree on each call
    for _ in range(5):
        twin.frozen = "mix.weight" if twin.calls < 4 else None
        twin.step()
    return [], weights(twin.module), weights(run.module)


@pytest.mark.parametrize("where", ["all", "one"])
def test_a_parameter_whose_first_gradient_comes_later(where: str) -> None:
    """On all ranks it is trained from then on; on one alone it is an error, and weights stay."""
    for told, before, after in run_ranks(a_new_plan, 3, where):
        assert all("which parameters have a gradient" in message for message in told)
        assert len(told) == (where == "one")
        for name, value in after.items():
            assert np.allclose(value, before[name], rtol=0, atol=0 if where == "one" else 1e-5), name


def none_at_all(rank: int, world: int) -> str:
    run = Run()
    for _ in range(4):
        run.step()
    run.gradients()
    run.calls += 1
    if rank == FAULTY:
        run.module.zero_grad()
    run.optimizer.step()
    return raises(run)


def test_a_rank_without_any_gradient() -> None:
    assert all("which parameters have a gradient" in told for told in run_ranks(none_at_all, 3))


def hosts_asked(rank: int, world: int) -> list[int]:
    run, asked = Run(), []
    real = collectives.minimum

    def noting(*arguments: Any, **more: Any) -> Any:
        asked.append(run.calls)
        return real(*arguments, **more)

    collectives.minimum = noting
    for _ in range(17):
        run.step()
    return asked


def test_no_host_waits_for_another_but_in_calls_1_2_4_8() -> None:
    for asked in run_ranks(hosts_asked, 2):
        assert asked == [1, 2, 4, 8, 16]


def in_an_engine(rank: int, world: int, stage: int, when: str) -> tuple[bool, list[str]]:
    found_inf.is_meant_for = lambda device: True
    engine = engine_of(config(stage, world, SETTINGS), groups=True)
    train(engine, 0, 4, rank, world)
    before = copy.deepcopy(masters(engine))
    if rank == FAULTY and when == "before":
        engine.basic_optimizer.param_groups[-1]["momentum"] = 1.5
    if rank == FAULTY and when == "differ":  # in the first part alone: the second may not change anything either
        engine.basic_optimizer.param_groups[0]["lr"] *= 0.3
    real = block_step.factorize
    if rank == FAULTY and when == "amid":

        def fail(*arguments: Any, **more: Any) -> Any:
            raise RuntimeError("says the test about momentum")

        block_step.factorize = fail
    told: list[str] = []
    for number in range(4, 8):
        try:
            train(engine, number, number + 1, rank, world)
        except Exception as error:
            told.append(str(error))
            break
        block_step.factorize = real
    dist.barrier()
    after = masters(engine)
    return all(np.array_equal(value, after[name]) for name, value in before.items()), told


@pytest.mark.deepspeed
@pytest.mark.parametrize("stage", [1, 3])
@pytest.mark.parametrize("when", ["before", "differ", "amid"])
def test_zero_in_parts(stage: int, when: str) -> None:
    """DeepSpeed steps one param group after the other; all ranks stop, and know why."""
    results = run_ranks(in_an_engine, 2, stage, when, deepspeed=True)
    for rank, (same, told) in enumerate(results):
        assert len(told) == 1, results
        assert same or when == "amid"
        if when == "differ":
            assert "different settings" in told[0]
            continue
        assert ("momentum" in told[0]) if rank == FAULTY else (f"rank {FAULTY} failed" in told[0])
