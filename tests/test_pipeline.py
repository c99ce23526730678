"""Pipeline parallelism in DeepSpeed: each stage has its own parameters, on ranks of its own."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from engines import PARAMS, PRECISIONS, fp16_on_the_cpu, masters
from models import same, weights
from ranks import run_ranks
from torch import Tensor, nn

from adafisher_dist import AdaFisher, UnsupportedLayoutError
from adafisher_dist.stepping import found_inf

pytestmark = pytest.mark.deepspeed

MICRO, MICRO_BATCHES = 4, 2


def layers() -> list[nn.Module]:
    torch.manual_seed(4)
    return [nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 1)]


def batch(step: int, rows: slice = slice(None)) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    x = torch.randn(16, 6, generator=generator)[rows]
    return x, torch.sin(3 * x[:, :1]) + x[:, 1:2] * x[:, 2:3]


def alone(steps: int = 8) -> dict[str, np.ndarray]:
    module = nn.Sequential(*layers())
    optimizer = AdaFisher(module.parameters(), **PARAMS)
    for step in range(steps):
        x, y = batch(step)
        optimizer.zero_grad()
        nn.functional.mse_loss(module(x), y).backward()
        optimizer.step()
    return weights(module)


def engine_of(stages: int, stage: int, precision: str, data: int, **settings: Any) -> Any:
    import deepspeed
    from deepspeed.pipe import PipelineModule

    class OfAUser(PipelineModule):
        """As in Megatron-DeepSpeed, a class of its own."""

    module = OfAUser(
        layers(), num_stages=stages, loss_fn=nn.functional.mse_loss, partition_method="uniform", seed_layers=False
    )
    config = {
        "train_batch_size": 16,
        "train_micro_batch_size_per_gpu": 16 // data // MICRO_BATCHES,
        "gradient_accumulation_steps": MICRO_BATCHES,
        "optimizer": {"type": "AdaFisher", "params": {**copy.deepcopy(PARAMS), **settings}},
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage},
        **PRECISIONS[precision],
    }
    engine, *_ = deepspeed.initialize(model=module, config=config, dist_init_required=False)
    return engine


def micro_batches(
    step: int, replica: int, data: int, dtype: torch.dtype = torch.float32
) -> Iterator[tuple[Tensor, Tensor]]:
    size = 16 // data // MICRO_BATCHES
    for number in range(MICRO_BATCHES):
        begin = replica * 16 // data + number * size
        x, y = batch(step, slice(begin, begin + size))
        yield x.to(dtype), y.to(dtype)


def in_stages(
    rank: int, world: int, stages: int, stage: int, precision: str, settings: dict[str, Any] | None = None
) -> dict[str, np.ndarray]:
    with fp16_on_the_cpu():
        data = world // stages
        engine = engine_of(stages, stage, precision, data, **(settings or {}))
        replica = engine.grid.get_data_parallel_rank()
        dtype = next(engine.module.parameters()).dtype
        for step in range(8):
            engine.train_batch(micro_batches(step, replica, data, dtype))
        return masters(engine)


@pytest.mark.parametrize(("world", "stages"), [(2, 2), (4, 2), pytest.param(4, 4, marks=pytest.mark.slow)])
def test_trains_like_one_process(world: int, stages: int) -> None:
    same(run_ranks(in_stages, world, stages, 1, "fp32", deepspeed=True), alone())


@pytest.mark.parametrize("precision", ["bf16", "bf16-fp32", "fp16"])
def test_in_half_precision(precision: str) -> None:
    settings = {"grafting": "none", "lr": 1e-3}  # as in test_experts
    wanted = run_ranks(in_stages, 2, 1, 1, precision, settings, deepspeed=True)
    same(run_ranks(in_stages, 2, 2, 1, precision, settings, deepspeed=True), wanted[0], bound=2e-3)


def refused(rank: int, world: int) -> str:
    engine = engine_of(2, 0, "fp32", 1)
    with pytest.raises(UnsupportedLayoutError) as told:
        engine.train_batch(micro_batches(0, 0, 1))
    return str(told.value)


def test_stage_0_says_what_works() -> None:
    for told in run_ranks(refused, 2, deepspeed=True):
        assert "stage 1 works" in told


def faulty(rank: int, world: int, on_device: bool) -> tuple[int, bool]:
    """What a step does in which the first stage alone has a gradient too large to square."""
    if on_device:
        found_inf.is_meant_for = lambda device: True
    engine = engine_of(2, 1, "fp32", 1)
    for step in range(4):
        engine.train_batch(micro_batches(step, 0, 1))
    before = masters(engine)

    def spoil(optimizer: Any, *_: Any) -> None:
        if rank == 0:
            optimizer.param_groups[0]["params"][0].grad[0] = 1e30

    hook = engine.basic_optimizer.register_step_pre_hook(spoil)
    engine.train_batch(micro_batches(4, 0, 1))
    hook.remove()
    skipped = engine.basic_optimizer.skipped_steps
    after = masters(engine)
    unchanged = all(np.array_equal(after[name], before[name]) for name in before)
    engine.train_batch(micro_batches(5, 0, 1))
    return skipped, unchanged


@pytest.mark.parametrize("on_device", [False, True])
def test_a_bad_gradient_in_one_stage_skips_the_step_in_all(on_device: bool) -> None:
    assert run_ranks(faulty, 2, on_device, deepspeed=True) == [(1, True)] * 2


def saved(rank: int, world: int, stages: int, folder: Path) -> None:
    data = world // stages
    engine = engine_of(stages, 1, "fp32", data)
    for step in range(4):
        engine.train_batch(micro_batches(step, engine.grid.get_data_parallel_rank(), data))
    engine.save_checkpoint(str(folder))


def resumed(rank: int, world: int, stages: int, folder: Path) -> dict[str, np.ndarray]:
    data = world // stages
    engine = engine_of(stages, 1, "fp32", data)
    engine.load_checkpoint(str(folder))
    for step in range(4, 8):
        engine.train_batch(micro_batches(step, engine.grid.get_data_parallel_rank(), data))
    return masters(engine)


@pytest.mark.parametrize(
    ("world", "stages"),
    [(2, 2), (4, 2), pytest.param(2, 1, marks=pytest.mark.slow), pytest.param(4, 4, marks=pytest.mark.slow)],
)
def test_goes_on_with_other_stages(world: int, stages: int, tmp_path: Path) -> None:
    run_ranks(saved, 2, 2, tmp_path, deepspeed=True)
    same(run_ranks(resumed, world, stages, tmp_path, deepspeed=True), alone())


class Noted(nn.Tanh):
    """A layer with a state that is no tensor."""

    note = -1

    def get_extra_state(self) -> Any:
        return {"note": self.note}

    def set_extra_state(self, state: Any) -> None:
        self.note = state["note"]


def with_notes(rank: int, world: int, stages: int, folder: Path, first: int | None) -> dict[str, int]:
    """The notes of this rank's layers by name: saved, or loaded where no first one is given."""
    nn.Tanh, tanh = Noted, nn.Tanh  # type: ignore[misc]
    engine = engine_of(stages, 1, "fp32", world // stages)
    nn.Tanh = tanh  # type: ignore[misc]
    noted = {name: part for name, part in engine.module.named_modules() if isinstance(part, Noted)}
    if first is None:
        engine.load_checkpoint(str(folder))
    else:
        for name, part in noted.items():
            part.note = first + int(name)
        engine.train_batch(micro_batches(0, engine.grid.get_data_parallel_rank(), world // stages))
        engine.save_checkpoint(str(folder))
    return {name: part.note for name, part in noted.items()}


def test_stages_keep_their_own_extra_state(tmp_path: Path) -> None:
    saved_there = run_ranks(with_notes, 2, 2, tmp_path, 100, deepspeed=True)
    assert [sorted(notes.values()) for notes in saved_there] == [[101, 103], [105]]
    assert run_ranks(with_notes, 2, 2, tmp_path, None, deepspeed=True) == saved_there
    assert run_ranks(with_notes, 1, 1, tmp_path, None, deepspeed=True) == [{**saved_there[0], **saved_there[1]}]


def tied_engine(rows: int, width: int, second: bool = False, **settings: Any) -> Any:
    """Of two stages, both of which have the same table; `second`: in a param group of its own."""
    import deepspeed
    from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec

    torch.manual_seed(4)

    def head(layer: nn.Module, x: Tensor) -> Tensor:
        return x @ layer.weight.t()

    specs = [
        TiedLayerSpec("table", nn.Embedding, rows, width),
        LayerSpec(nn.Linear, width, width),
        LayerSpec(nn.Linear, width, width) if second else LayerSpec(nn.Tanh),  # a group has parameters in each stage
        TiedLayerSpec("table", nn.Embedding, rows, width, forward_fn=head),
    ]
    loss = nn.CrossEntropyLoss()
    module = PipelineModule(specs, num_stages=2, loss_fn=loss, partition_method="uniform", seed_layers=False)
    tied_weights = [p for name, p in module.named_parameters() if "table" in name]
    rest = [p for name, p in module.named_parameters() if "table" not in name]
    groups = [{"params": rest}, {"params": tied_weights, **(settings if second else {})}]
    config = {
        "train_batch_size": 8,
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 2,
        "optimizer": {"type": "AdaFisher", "params": {**copy.deepcopy(PARAMS), **({} if second else settings)}},
        "zero_optimization": {"stage": 1},
    }
    given = {"model_parameters": groups} if second else {}
    engine, *_ = deepspeed.initialize(model=module, config=config, dist_init_required=False, **given)
    return engine


def train_tied(engine: Any, rows: int, first: int, last: int) -> None:
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        pairs = [(torch.randint(rows, (4,), generator=generator),) * 2 for _ in range(2)]
        engine.train_batch(iter(pairs))


def tied(
    rank: int, world: int, rows: int, width: int, settings: dict[str, Any], folder: Path
) -> tuple[float, bool]:  # fmt: skip
    """How far the copies are apart; and whether a checkpoint half-way makes no difference."""
    engine = tied_engine(rows, width, **settings)
    train_tied(engine, rows, 0, 3)
    engine.save_checkpoint(str(folder))
    train_tied(engine, rows, 3, 6)
    straight = masters(engine)
    again = tied_engine(rows, width, **settings)
    again.load_checkpoint(str(folder))
    train_tied(again, rows, 3, 6)
    resumed = masters(again)
    (weight,) = [value for name, value in straight.items() if "table" in name]
    both: list[Any] = [None, None]
    dist.all_gather_object(both, weight)
    return float(np.abs(both[0] - both[1]).max()), all(np.array_equal(resumed[n], straight[n]) for n in straight)


@pytest.mark.parametrize(
    ("rows", "width", "settings"),
    [(40, 4, {}), (12, 8, {"max_blocks": 0}), (40, 4, {"second": True}), (12, 8, {"second": True, "max_blocks": 0})],
)
def test_tied_tables_stay_the_same(rows: int, width: int, settings: dict[str, Any], tmp_path: Path) -> None:
    assert run_ranks(tied, 2, rows, width, settings, tmp_path, deepspeed=True) == [(0.0, True)] * 2


def refused_ties(rank: int, world: int) -> list[str]:
    found = []
    cases: list[tuple[int, int, dict[str, Any]]] = [
        *((12, 8, {"second": second}) for second in (False, True)),
        *((40, 4, settings) for settings in ({"max_blocks": 100}, {"block_grid": "flat"})),
    ]
    for rows, width, settings in cases:
        with pytest.raises(RuntimeError) as told:
            train_tied(tied_engine(rows, width, **settings), rows, 0, 1)
        found.append(str(told.value))
    return found


def test_tied_blocks_are_refused() -> None:
    for told in zip(*run_ranks(refused_ties, 2, deepspeed=True), strict=True):
        assert any("is tied over stages" in message for message in told)


def auto(rank: int, world: int) -> None:
    engine = engine_of(2, 1, "fp32", 1, block_size="auto", memory_budget_gb=1.0)
    with pytest.raises((ValueError, RuntimeError), match=r"give a number|rank \d failed"):
        engine.train_batch(micro_batches(0, 0, 1))


def test_a_block_size_is_not_chosen() -> None:
    run_ranks(auto, 2, deepspeed=True)
