"""DeepSpeed's own functions on an optimizer's state, which read, write and offload it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from engines import PARAMS, config, engine_of, fp16_on_the_cpu, masters, train
from models import Odd, batch, model, param_groups
from ranks import run_ranks
from torch import nn

from adafisher_dist import AdaFisher, ds
from adafisher_dist.ds import from_config

pytestmark = [pytest.mark.deepspeed, pytest.mark.dist]

KEPT = {**PARAMS, "inverse_update_freq": 3}


def alone(steps: int) -> dict[str, np.ndarray]:
    """Each parameter's momentum by its formula, on one process's gradients."""
    module = model()
    optimizer = from_config(param_groups(module), **PARAMS)
    found = {name: np.zeros(p.shape) for name, p in module.named_parameters() if p.requires_grad}
    for step in range(steps):
        optimizer.zero_grad()
        x, y = batch(step, 0, 1)
        nn.functional.mse_loss(module(x), y).backward()
        for name, p in module.named_parameters():
            if p.requires_grad and p.grad is not None:
                decay = next(g["momentum"] for g in optimizer.param_groups if any(p is own for own in g["params"]))
                found[name] = decay * found[name] + (1 - decay) * p.grad.double().numpy()
        optimizer.step()
    return found


@contextmanager
def told(kind: type[Exception], text: str) -> Iterator[None]:
    with pytest.raises(kind, match=text):
        yield


def read(rank: int, world: int, stage: int, precision: str, more: dict[str, Any]) -> dict[str, np.ndarray]:
    from deepspeed.utils import (
        safe_get_full_optimizer_state,
        safe_get_local_optimizer_state,
        safe_set_full_optimizer_state,
        safe_set_local_optimizer_state,
    )

    engine = engine_of(config(stage, world, precision=precision, **more), groups=True)
    named = {name: p for name, p in engine.module.named_parameters() if p.requires_grad}
    first = next(iter(named.values()))
    assert not safe_get_full_optimizer_state(first, "momentum").any()
    with told(RuntimeError, "before its first step"):
        safe_set_full_optimizer_state(first, torch.zeros(1), "momentum")
    train(engine, 0, 3, rank, world)
    found = {name: safe_get_full_optimizer_state(p, "momentum") for name, p in named.items()}
    for name, p in named.items():
        assert found[name].shape == tuple(getattr(p, "ds_shape", p.shape))
        assert found[name].dtype == torch.float32
        assert torch.equal(found[name], safe_get_full_optimizer_state(p, "exp_avg"))
    # On every rank, also those that store nothing of the parameter: none goes on into a collective.
    for key in ("exp_avg_sq", "fisher", "step"):
        with told(ValueError, f"keeps no '{key}'.*Save a checkpoint"):
            safe_get_full_optimizer_state(first, key)
        with told(ValueError, f"keeps no '{key}'.*Save a checkpoint"):
            safe_set_full_optimizer_state(first, found["scale"], key)
    if stage == 3:
        with told(RuntimeError, "safe_get_full_optimizer_state"):
            safe_get_local_optimizer_state(first, "momentum")
        with told(RuntimeError, "safe_get_full_optimizer_state"):
            safe_set_local_optimizer_state(first, first.ds_tensor, "momentum")
    frozen = engine.module.frozen
    assert safe_get_full_optimizer_state(frozen, "momentum") is None
    # What is written is read, and trained with.
    weight = engine.module.inner.weight
    with told(ValueError, "has no 3 elements"):
        safe_set_full_optimizer_state(weight, torch.zeros(3), "momentum")
    before = {name: value.clone() for name, value in found.items()}
    wanted = torch.arange(found["inner.weight"].numel(), dtype=torch.float32).view(found["inner.weight"].shape)
    safe_set_full_optimizer_state(weight, wanted, "exp_avg")
    assert torch.equal(safe_get_full_optimizer_state(weight, "momentum"), wanted)
    assert torch.equal(safe_get_full_optimizer_state(first, "momentum"), before["scale"])
    safe_set_full_optimizer_state(weight, before["inner.weight"], "exp_avg")
    train(engine, 3, 4, rank, world)
    engine.basic_optimizer.offload_state()
    with told(RuntimeError, "reload_state"):
        safe_get_full_optimizer_state(first, "momentum")
    engine.basic_optimizer.reload_state()
    return {name: safe_get_full_optimizer_state(p, "momentum").double().numpy() for name, p in named.items()}


@pytest.mark.parametrize(
    ("stage", "precision", "world", "more"),
    [
        (1, "fp32", 2, {}),
        (2, "fp32", 3, {"zero": {"round_robin_gradients": True}}),
        (3, "fp32", 2, {"zero": {"sub_group_size": 100}}),
        pytest.param(3, "fp32", 3, {"offload": True}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_momentum_is_read_and_written(stage: int, precision: str, world: int, more: dict[str, Any]) -> None:
    wanted = alone(4)
    for found in run_ranks(read, world, stage, precision, more, deepspeed=True):
        for name, value in found.items():
            np.testing.assert_allclose(value, wanted[name], rtol=1e-3, atol=1e-6, err_msg=name)


def read_in_bf16(rank: int, world: int, stage: int, precision: str) -> list[np.ndarray]:
    from deepspeed.utils import safe_get_full_optimizer_state

    engine = engine_of(config(stage, world, precision=precision))
    train(engine, 0, 2, rank, world)
    named = [p for p in engine.module.parameters() if p.requires_grad]
    return [safe_get_full_optimizer_state(p, "momentum").numpy() for p in named]


@pytest.mark.parametrize(("stage", "precision"), [(1, "bf16-fp32"), (2, "bf16"), (3, "bf16")])
def test_momentum_of_16_bit_weights_is_in_fp32_and_alike(stage: int, precision: str) -> None:
    one, two = run_ranks(read_in_bf16, 2, stage, precision, deepspeed=True)
    for here, there in zip(one, two, strict=True):
        assert here.dtype == np.float32
        np.testing.assert_array_equal(here, there)
        assert here.any()


def other_optimizers(rank: int, world: int, stage: int) -> None:
    """AdamW's state is read as ever beside an AdaFisher."""
    from deepspeed.utils import safe_get_full_optimizer_state

    engine_of(config(stage, world))
    ours = config(stage, world)
    ours["optimizer"] = {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}}
    engine = engine_of(ours)
    train(engine, 0, 2, rank, world)
    assert safe_get_full_optimizer_state(engine.module.inner.weight, "exp_avg_sq").any()


@pytest.mark.parametrize("stage", [2, 3])
def test_another_optimizer_is_left_alone(stage: int) -> None:
    run_ranks(other_optimizers, 2, stage, deepspeed=True)


class Trainable(Odd):
    """Without a frozen parameter, with which DeepSpeed's own offload of 16-bit weights fails."""

    def __init__(self) -> None:
        super().__init__()
        del self.frozen
        self.frozen = 1.0


def memory(engine: Any) -> int:
    """Bytes of the state and of all buffers, by what lies under the tensors."""
    stepper = engine.basic_optimizer._registry.stepper
    tensors = [t for shard in stepper.shards for stack in shard.stacks for t in stack.state.values()]
    tensors += [rows.gradient_NRB for shard in stepper.shards for chunk in shard.blocks.chunks for rows in chunk]
    tensors += [shard.blocks.staging for shard in stepper.shards]
    tensors += [tensor for shard in stepper.shards for tensor in stepper.buffers_of(shard)]
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def offloaded(rank: int, world: int, stage: int, precision: str, states: list[str] | None) -> None:
    from deepspeed.runtime.zero.offload_config import OffloadStateTypeEnum

    with fp16_on_the_cpu():
        ds_config = config(stage, world, KEPT, precision=precision)
        straight = engine_of(ds_config, model(kind=Trainable), groups=True)
        train(straight, 0, 6, rank, world)
        engine = engine_of(ds_config, model(kind=Trainable), groups=True)
        train(engine, 0, 3, rank, world)
        before = memory(engine)
        shown = {id(t): {k: v.clone() for k, v in e.items()} for t, e in engine.basic_optimizer.state.items()}
        include = None if states is None else [OffloadStateTypeEnum(state) for state in states]
        assert before > 0
        for _ in range(2):  # again, and twice in a row
            engine.offload_states(include=include, pin_memory=rank == 0)
            engine.offload_states(include=include, pin_memory=False)
            moves = states is None or "optim_states" in states
            assert memory(engine) == (0 if moves else before)
            for tensor, entry in engine.basic_optimizer.state.items():
                for key, value in entry.items():
                    assert torch.equal(value, shown[id(tensor)][key])
            if moves:
                with told(RuntimeError, "reload_state"):
                    engine.basic_optimizer.state_dict()
            engine.reload_states()
            assert memory(engine) == before
        train(engine, 3, 6, rank, world)
        for name, value in masters(straight).items():
            np.testing.assert_array_equal(masters(engine)[name], value, err_msg=name)


@pytest.mark.parametrize(
    ("stage", "precision", "states"),
    [
        (1, "fp32", None),
        (2, "bf16", None),
        pytest.param(2, "fp32", ["optim_states"], marks=pytest.mark.slow),
        (3, "fp32", None),
        (3, "bf16", ["optim_states", "hp_params"]),
        (3, "fp32", ["lp_params", "lp_grads", "contiguous_grad_buffer"]),
    ],
    ids=str,
)
def test_offloaded_states_train_on_bit_for_bit(stage: int, precision: str, states: list[str] | None) -> None:
    run_ranks(offloaded, 2, stage, precision, states, deepspeed=True)


def checkpoints_meanwhile(rank: int, world: int, stage: int, precision: str, folder: str) -> None:
    """They are refused before anything is gathered, and training goes on as if nobody had tried."""
    from deepspeed.runtime.zero.offload_config import OffloadStateTypeEnum

    ds_config = config(stage, world, KEPT, precision=precision)
    straight = engine_of(ds_config, model(kind=Trainable), groups=True)
    train(straight, 0, 4, rank, world)
    engine = engine_of(ds_config, model(kind=Trainable), groups=True)  # in another order than the model's
    train(engine, 0, 2, rank, world)
    ds.save_checkpoint(engine, folder, "before")
    for moved in (None, ["lp_params"], ["hp_params"]):
        engine.offload_states(include=None if moved is None else [OffloadStateTypeEnum(state) for state in moved])
        for call in (
            lambda: ds.save_checkpoint(engine, folder, "meanwhile"),
            lambda: ds.load_checkpoint(engine, folder, "before"),
            lambda: engine.save_checkpoint(folder, "meanwhile"),
            lambda: engine.load_checkpoint(folder, "before"),
        ):
            with told(RuntimeError, r"p_params.*reload_states\(\)"):
                call()
        engine.reload_states()
    train(engine, 2, 4, rank, world)
    for name, value in masters(straight).items():
        np.testing.assert_array_equal(masters(engine)[name], value, err_msg=name)
    if stage < 3:  # of the state alone the rest is where it was, and a load brings another
        engine.offload_states(include=[OffloadStateTypeEnum.optim_states])
        ds.load_checkpoint(engine, folder, "before")
        engine.reload_states()
        train(engine, 2, 4, rank, world)
        for name, value in masters(straight).items():
            np.testing.assert_array_equal(masters(engine)[name], value, err_msg=name)


@pytest.mark.parametrize(
    ("stage", "precision"), [pytest.param(2, "bf16", marks=pytest.mark.slow), (3, "fp32")], ids=str
)
def test_checkpoints_of_what_is_offloaded_are_refused(stage: int, precision: str, tmp_path: Path) -> None:
    run_ranks(checkpoints_meanwhile, 2, stage, precision, str(tmp_path), deepspeed=True)


def without_offload(rank: int, world: int, stage: int, precision: str) -> None:
    engine = engine_of(config(stage, world, precision=precision))
    train(engine, 0, 2, rank, world)
    for function in (engine.offload_states, engine.reload_states):
        with told(RuntimeError, r"engine.basic_optimizer.offload_state\(\)"):
            function()


@pytest.mark.parametrize(("stage", "precision"), [(0, "fp32"), (0, "bf16"), (1, "bf16-fp32")])
def test_offload_is_refused_where_deepspeed_has_none(stage: int, precision: str) -> None:
    run_ranks(without_offload, 1, stage, precision, deepspeed=True)


def one_rank_offloads(rank: int, world: int) -> str:
    engine = engine_of(config(3, world))
    train(engine, 0, 2, rank, world)
    if rank == 1:
        engine.basic_optimizer.offload_state()
    before = masters(engine)
    with pytest.raises(RuntimeError) as error:
        train(engine, 2, 3, rank, world)
    engine.basic_optimizer.reload_state()
    for name, value in masters(engine).items():
        np.testing.assert_array_equal(before[name], value)
    train(engine, 3, 4, rank, world)
    return str(error.value)


def test_a_rank_that_has_not_reloaded_stops_all() -> None:
    one, two = run_ranks(one_rank_offloads, 2, deepspeed=True)
    assert "rank" in one
    assert "reload_state" in two


def under_ddp(rank: int, world: int) -> None:
    weights = []
    for offloads in (False, True):
        module = model()
        optimizer = AdaFisher(param_groups(module), **KEPT)
        for step in range(6):
            optimizer.zero_grad()
            x, y = batch(step, rank, world)
            nn.functional.mse_loss(module(x), y).backward()
            for p in module.parameters():
                if p.grad is not None:
                    dist.all_reduce(p.grad)
            optimizer.step()
            if offloads:
                optimizer.offload_state()
                with told(RuntimeError, "reload_state"):
                    optimizer.consolidate_state_dict()
                optimizer.reload_state()
        weights.append([p.detach().clone() for p in module.parameters()])
    assert all(torch.equal(one, two) for one, two in zip(*weights, strict=True))


def test_state_is_offloaded_under_ddp() -> None:
    run_ranks(under_ddp, 2)
