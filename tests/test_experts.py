"""Mixtures of experts in DeepSpeed: each rank holds some of the experts, and all hold the rest."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from engines import PARAMS, PRECISIONS, UNSCALED, fp16_on_the_cpu, masters
from models import same
from ranks import run_ranks
from torch import Tensor, nn

from adafisher_dist import CheckpointError, ds
from adafisher_dist.stepping import found_inf

pytestmark = pytest.mark.deepspeed

WIDTH, EXPERTS, TOKENS = 8, 4, 24


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, 12)
        self.down = nn.Linear(12, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x)))


class Mixture(nn.Module):
    """Two dense layers around a mixture; every expert begins with weights of its own."""

    def __init__(self, degree: int) -> None:
        super().__init__()
        from deepspeed.moe.layer import MoE

        torch.manual_seed(3)
        self.inner = nn.Linear(6, WIDTH)
        self.moe = MoE(WIDTH, Expert(), num_experts=EXPERTS, ep_size=degree, k=1, drop_tokens=False, use_rts=False)
        self.out = nn.Linear(WIDTH, 1)
        first = dist.get_rank() % degree * self.moe.num_local_experts
        for number, expert in enumerate(self.moe.deepspeed_moe.experts.deepspeed_experts):
            torch.manual_seed(10 + first + number)
            for parameter in expert.parameters():
                nn.init.uniform_(parameter, -0.5, 0.5)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.inner(x))
        return self.out(hidden + self.moe(hidden)[0])


def global_names(values: dict[str, Any], degree: int) -> dict[str, Any]:
    """By the names that the experts have where one rank holds them all."""
    first = dist.get_rank() % degree * (EXPERTS // degree)

    def renamed(name: str) -> str:
        return re.sub(r"(deepspeed_experts\.)(\d+)", lambda found: f"{found[1]}{int(found[2]) + first}", name)

    return {renamed(name): value for name, value in values.items()}


def train(engine: Any, first: int, last: int, rank: int, world: int) -> None:
    dtype = next(engine.module.parameters()).dtype
    own = slice(rank * TOKENS // world, (rank + 1) * TOKENS // world)
    for step in range(first, last):
        generator = torch.Generator().manual_seed(100 + step)
        x = torch.randn(TOKENS, 6, generator=generator)
        y = torch.sin(3 * x[:, :1]) + x[:, 1:2] * x[:, 2:3]
        loss = nn.functional.mse_loss(engine(x[own].to(dtype)).float(), y[own])
        engine.backward(loss)
        engine.step()


def engine_of(stage: int, degree: int, precision: str, world: int, **settings: Any) -> Any:
    import deepspeed

    config = {
        "train_micro_batch_size_per_gpu": TOKENS // world,
        "optimizer": {"type": "AdaFisher", "params": {**copy.deepcopy(PARAMS), **settings}},
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage},
        **PRECISIONS[precision],
        **(UNSCALED if stage == 0 and precision == "fp16" else {}),
    }
    engine, *_ = deepspeed.initialize(model=Mixture(degree), config=config, dist_init_required=False)
    return engine


def mixture(
    rank: int, world: int, stage: int, degree: int, precision: str, settings: dict[str, Any] | None = None
) -> dict[str, np.ndarray]:
    with fp16_on_the_cpu():
        engine = engine_of(stage, degree, precision, world, **(settings or {}))
        train(engine, 0, 8, rank, world)
        return global_names(masters(engine), degree)


@pytest.mark.parametrize(("world", "degree"), [(2, 2), pytest.param(4, 2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_expert_parallelism_trains_like_data_parallelism(stage: int, world: int, degree: int) -> None:
    wanted = run_ranks(mixture, world, stage, 1, "fp32", deepspeed=True)
    same(run_ranks(mixture, world, stage, degree, "fp32", deepspeed=True), wanted[0])


@pytest.mark.parametrize(
    ("stage", "precision"),
    [(stage, precision) for stage in (0, 1, 2) for precision in PRECISIONS if (stage, precision) != (0, "bf16-fp32")],
)
def test_in_half_precision(stage: int, precision: str) -> None:
    # Not with a polar factor: few tokens make gradients of low rank, and it would be one of what
    # rounding left in the other directions.
    settings = {"grafting": "none", "lr": 1e-3}
    wanted = run_ranks(mixture, 2, stage, 1, precision, settings, deepspeed=True)
    same(run_ranks(mixture, 2, stage, 2, precision, settings, deepspeed=True), wanted[0], bound=2e-3)


def faulty(rank: int, world: int, stage: int, on_device: bool, fault: str) -> tuple[str, int, bool]:
    """What becomes of a step in which rank 1 of 4, which shares its experts with rank 3, errs."""
    if on_device:
        found_inf.is_meant_for = lambda device: True
    engine = engine_of(stage, 2, "fp32", world)
    train(engine, 0, 4, rank, world)
    optimizer, before = engine.basic_optimizer, masters(engine)
    expert = engine.module.moe.deepspeed_moe.experts.deepspeed_experts[0]
    hook = None
    if rank == 1 and fault == "nan":
        hook = expert.up.weight.register_hook(lambda gradient: gradient * torch.nan)
    elif rank == 1:
        next(group for group in optimizer._registry.groups if group.get("moe"))["lr"] = 0.5
    told = ""
    try:
        train(engine, 4, 5, rank, world)
        if fault == "rate":
            train(engine, 5, 6, rank, world)  # a device tells the hosts in the next call
    except RuntimeError as error:
        told = str(error)
    if hook is not None:
        hook.remove()
    after = masters(engine)
    return told, optimizer.skipped_steps, all(np.array_equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("stage", [0, 1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_bad_gradient_of_an_expert_skips_the_step_everywhere(stage: int, on_device: bool) -> None:
    found = run_ranks(faulty, 4, stage, on_device, "nan", deepspeed=True)
    assert found == [("", 1 if stage == 0 else 0, True)] * 4  # ZeRO finds it before it calls AdaFisher


@pytest.mark.parametrize("on_device", [False, True])
def test_ranks_that_differ_in_an_experts_rate_stop_everywhere(on_device: bool) -> None:
    found = run_ranks(faulty, 4, 1, on_device, "rate", deepspeed=True)
    for told, _, _ in found:
        assert told
    assert "different settings" in found[1][0]
    assert "different settings" in found[3][0]


def saved(rank: int, world: int, stage: int, degree: int, folder: Path) -> None:
    engine = engine_of(stage, degree, "fp32", world)
    train(engine, 0, 4, rank, world)
    engine.save_checkpoint(str(folder))


def resumed(rank: int, world: int, stage: int, degree: int, folder: Path) -> dict[str, np.ndarray]:
    engine = engine_of(stage, degree, "fp32", world)
    engine.load_checkpoint(str(folder))
    train(engine, 4, 8, rank, world)
    return global_names(masters(engine), degree)


@pytest.mark.parametrize(
    ("stage", "then"),  # world, degree, stage
    [
        (1, (2, 2, 1)),
        (0, (2, 1, 2)),
        pytest.param(2, (4, 4, 0), marks=pytest.mark.slow),
        pytest.param(1, (1, 1, 1), marks=pytest.mark.slow),
        pytest.param(2, (4, 2, 1), marks=pytest.mark.slow),
    ],
)
def test_goes_on_at_another_degree(stage: int, then: tuple[int, int, int], tmp_path: Path) -> None:
    run_ranks(saved, 2, stage, 2, tmp_path, deepspeed=True)
    world, degree, after = then
    wanted = run_ranks(mixture, world, after, 1, "fp32", deepspeed=True)
    same(run_ranks(resumed, world, after, degree, tmp_path, deepspeed=True), wanted[0])


def auto(rank: int, world: int) -> str:
    engine = engine_of(1, 2, "fp32", world, block_size="auto", memory_budget_gb=1.0)
    with pytest.raises(ValueError, match="give a number") as told:
        train(engine, 0, 1, rank, world)
    return str(told.value)


def test_a_block_size_is_not_chosen() -> None:
    run_ranks(auto, 2, deepspeed=True)


class Noted(Expert):
    """With a state that is no tensor of its own."""

    note: Any = -1

    def get_extra_state(self) -> Any:
        return {"note": self.note}

    def set_extra_state(self, state: Any) -> None:
        self.note = state["note"]


def with_notes(rank: int, world: int, degree: int, folder: Path, notes: list[Any] | None) -> list[Any] | str:
    """The notes of this rank's experts: saved, or loaded where there are none to save."""
    global Expert
    Expert = Noted  # type: ignore[misc]
    engine = engine_of(1, degree, "fp32", world)
    experts = engine.module.moe.deepspeed_moe.experts.deepspeed_experts
    first = rank % degree * len(experts)
    if notes is None:
        ds.load_checkpoint(engine, folder)
        return [expert.note for expert in experts]
    for number, expert in enumerate(experts, first):
        expert.note = notes[number]
    train(engine, 0, 1, rank, world)
    try:
        ds.save_checkpoint(engine, folder)  # DeepSpeed's own fails with states that are no tensors
    except CheckpointError as error:
        return str(error)
    return []


def test_experts_keep_their_own_extra_state(tmp_path: Path) -> None:
    run_ranks(with_notes, 2, 2, tmp_path, [10, 11, 12, 13], deepspeed=True)
    assert run_ranks(with_notes, 2, 2, tmp_path, None, deepspeed=True) == [[10, 11], [12, 13]]
    assert run_ranks(with_notes, 2, 1, tmp_path, None, deepspeed=True) == [[10, 11, 12, 13]] * 2


def test_tensors_in_an_experts_extra_state_are_refused(tmp_path: Path) -> None:
    notes = [torch.full((2,), float(number)) for number in range(EXPERTS)]
    for told in run_ranks(with_notes, 2, 2, tmp_path, notes, deepspeed=True):
        assert "deepspeed_experts.2, which rank 0 does not hold, has tensors (on rank 1)" in told
    assert not list(tmp_path.glob("global_step*"))
