"""The replicated layout with real DDP: N ranks equal 1 rank, and each other bit for bit."""

from __future__ import annotations

import contextlib
import copy
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from layout_runs import Run
from models import batch, distance, model, weights
from ranks import run_ranks
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import adafisher_dist.blocks.sharding
import adafisher_dist.state.shard
from adafisher_dist import AdaFisher
from adafisher_dist.stepping import found_inf

pytestmark = pytest.mark.dist

# Of few rows a block, so that all ranks have some.
SMALL: dict[str, Any] = {"lr": 1e-2, "block_size": 8, "rows_per_block": 4}
SETTINGS: dict[str, dict[str, Any]] = {
    "default": {"lr": 1e-2},
    "small-blocks": {**SMALL, "block_size": 7, "rows_per_block": 3},
    "flat": {"lr": 1e-2, "block_size": 5, "block_grid": "flat"},
    "old-factors": {**SMALL, "inverse_update_freq": 4, "fisher_update_freq": 2},
    "diagonal-tail": {**SMALL, "max_blocks": 3},
    "cholesky": {**SMALL, "exponent": 1.0, "damping": 0.3},
    "root": {**SMALL, "block_size": 16, "exponent": 0.5, "grafting": "none", "damping": 0.3},
    "packed": {**SMALL, "inverse_update_freq": 4, "max_blocks": 20, "packed": True},
    "one-element": {"lr": 1e-2, "block_size": 1, "rows_per_block": 1},
}


def train(
    rank: int, world: int, settings: dict, steps: int = 12, chunk: int | None = None, dtype=torch.float32,
    gathered: int | None = None,
):  # fmt: skip
    """Final weights of a short run, and memory."""
    if gathered:
        adafisher_dist.blocks.sharding.GATHERED_NUMEL = gathered  # what is gathered in slices
    if chunk:
        adafisher_dist.blocks.sharding.CHUNK_FISHER_NUMEL = chunk  # several chunks: the overlapped path
    module = model(dtype)
    wrapped = DistributedDataParallel(module, gradient_as_bucket_view=True) if world > 1 else module
    decay = [p for p in module.parameters() if p.dim() > 1]
    rest = [p for p in module.parameters() if p.dim() <= 1]
    groups = [{"params": decay}, {"params": rest, "weight_decay": 0.0, "lr": 2e-2, "damping": 0.2, "momentum": 0.8}]
    optimizer = AdaFisher(groups, **settings)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    for step in range(steps):
        x, y = batch(step, rank, world, dtype=dtype)
        optimizer.zero_grad()
        nn.functional.mse_loss(wrapped(x), y).backward()
        optimizer.step()
        schedule.step()
    memory = optimizer.memory_usage()
    return weights(module), memory


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("world", [2, 3, 4])
def test_n_ranks_equal_one(name: str, world: int) -> None:
    settings = {**SETTINGS[name], "fisher_dtype": torch.float64}
    alone, memory = train(0, 1, settings, dtype=torch.float64)
    results = run_ranks(train, world, settings, 12, 500, torch.float64)
    for result, usage in results:
        for key, value in results[0][0].items():
            assert np.array_equal(result[key], value), f"{key} differs between ranks"
        assert distance(result, alone) < 1e-9
        assert usage["all"]["fisher"] == memory["all"]["fisher"]
    assert sum(usage["rank"]["fisher"] for _, usage in results) == memory["rank"]["fisher"]


@pytest.mark.parametrize("gathered", [1, 7, 100, 1000])
@pytest.mark.parametrize("chunk", [500, None])
def test_what_is_gathered_in_slices_is_the_same(chunk: int | None, gathered: int) -> None:
    """Fewer elements at a time than a row group has, a slice over the end of a parameter, …"""
    whole = run_ranks(train, 3, SMALL, 6, chunk)
    sliced = run_ranks(train, 3, SMALL, 6, chunk, torch.float32, gathered)
    for (values, usage), (expected, more) in zip(sliced, whole, strict=True):
        assert values.keys() == expected.keys()
        assert all(np.array_equal(values[key], expected[key]) for key in values)
        assert usage["rank"]["buffers"] <= more["rank"]["buffers"]


def test_n_ranks_equal_one_in_float32() -> None:
    settings = SETTINGS["default"]
    alone, _ = train(0, 1, settings)
    for result, _ in run_ranks(train, 3, settings):
        assert distance(result, alone) < 2e-4


@pytest.mark.parametrize("chunk", [1, 300, 10**9])
def test_chunks_change_nothing(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, _ = train(0, 1, SETTINGS["old-factors"], dtype=torch.float32)
    monkeypatch.setattr(adafisher_dist.blocks.sharding, "CHUNK_FISHER_NUMEL", chunk)
    cut, _ = train(0, 1, SETTINGS["old-factors"], dtype=torch.float32)
    assert distance(cut, whole) < 1e-5


def more_ranks_than_elements(rank: int, world: int):
    parameter = nn.Parameter(torch.tensor([1.0, 2.0]))
    optimizer = AdaFisher([parameter], lr=0.1)
    for _ in range(3):
        parameter.grad = torch.tensor([0.3, -0.2])
        optimizer.step()
    return parameter.detach().numpy()


def test_a_parameter_smaller_than_the_world() -> None:
    alone = more_ranks_than_elements(0, 1)
    for result in run_ranks(more_ranks_than_elements, 4):
        assert np.allclose(result, alone, rtol=1e-6)


def low_precision(rank: int, world: int, dtype_name: str):
    dtype = getattr(torch, dtype_name)
    torch.manual_seed(3)
    # A channels-last weight is not contiguous: its flattened order is not its memory's.
    weight = nn.Parameter(torch.randn(6, 4, 3, 3).to(dtype).to(memory_format=torch.channels_last))
    mixed = nn.Parameter(torch.randn(9, 5))
    optimizer = AdaFisher([weight, mixed], lr=0.05, block_size=8, rows_per_block=2)
    for step in range(6):
        generator = torch.Generator().manual_seed(step)
        weight.grad = torch.randn(6, 4, 3, 3, generator=generator).to(dtype).to(memory_format=torch.channels_last)
        mixed.grad = torch.randn(5, 9, generator=generator).t()
        optimizer.step()
    return weight.detach().float().numpy(), mixed.detach().numpy()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision_and_strided_parameters(dtype: str) -> None:
    alone = low_precision(0, 1, dtype)
    results = run_ranks(low_precision, 3, dtype)
    for weight, mixed in results:
        # One unit in the last place of the 16-bit type, where a rounding fell on the other side.
        assert np.allclose(weight, alone[0], rtol=2e-2, atol=1e-3)
        assert (weight == alone[0]).mean() > 0.95
        assert np.allclose(mixed, alone[1], rtol=1e-4, atol=1e-6)
        assert np.array_equal(weight, results[0][0])


def late_gradients(rank: int, world: int):
    first, second = nn.Parameter(torch.ones(40)), nn.Parameter(torch.ones(7, 9))
    optimizer = AdaFisher([("first", first), ("second", second)], lr=0.1, block_size=8, rows_per_block=2)
    for step in range(8):
        first.grad = torch.sin(torch.arange(40.0) + step) if step != 4 else None
        second.grad = torch.cos(torch.arange(63.0).view(7, 9) * step) if step > 2 else None
        optimizer.step()
    late = nn.Parameter(torch.ones(30))
    optimizer.add_param_group({"params": [("late", late)], "lr": 0.2})
    for step in range(3):
        for parameter in (first, second, late):
            parameter.grad = torch.sin(torch.arange(float(parameter.numel())) * step + 1).view(parameter.shape)
        optimizer.step()
    updates = {name: stats.fisher_updates for name, stats in optimizer.fisher_stats().items()}
    return [p.detach().numpy() for p in (first, second, late)], updates


def test_parameters_whose_gradient_comes_late_or_not_always() -> None:
    alone, updates = late_gradients(0, 1)
    assert updates == {"first": 10, "second": 8, "late": 3}
    for result, counted in run_ranks(late_gradients, 3):
        assert counted == updates
        for a, b in zip(result, alone, strict=True):
            assert np.allclose(a, b, rtol=1e-4)


def disagree(rank: int, world: int, how: str) -> str:
    torch.manual_seed(rank if how == "parameters" else 0)
    tensors = [nn.Parameter(torch.randn(20)), nn.Parameter(torch.randn(4 if how != "plan" else 4 + rank, 5))]
    optimizer = AdaFisher(tensors)
    for tensor in tensors:
        tensor.grad = torch.ones_like(tensor)
    if how == "gradients":
        tensors[0].grad[3] += rank
    if how == "missing" and rank == 1:
        tensors[1].grad = None
    if how == "sparse" and rank == 1:
        tensors[0].grad = torch.ones(20).to_sparse()
    before = [t.detach().clone() for t in tensors]
    try:
        optimizer.step()
    except RuntimeError as error:
        assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))
        return str(error)
    return "no error"


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("parameters", "different parameters"),
        ("gradients", "different gradients"),
        ("missing", "which parameters have a gradient"),
        ("plan", "planned different blocks"),
        ("sparse", "has a sparse gradient"),
    ],
)
def test_ranks_that_disagree_stop_together(how: str, words: str) -> None:
    messages = run_ranks(disagree, 3, how, timeout=60)
    if how == "sparse":
        assert words in messages[1]
        assert "rank 1 failed" in messages[0] and "rank 1 failed" in messages[2]
    else:
        assert all(words in message for message in messages)


def non_finite(rank: int, world: int, value: float):
    tensors = [nn.Parameter(torch.ones(70)), nn.Parameter(torch.ones(9, 9))]
    optimizer = AdaFisher(tensors, lr=0.1, rows_per_block=2)
    seen = []
    for step in range(4):
        for tensor in tensors:
            tensor.grad = torch.sin(torch.arange(float(tensor.numel())) + step).view(tensor.shape)
        if step in (0, 2):
            tensors[1].grad[8, 8] = value  # on the last rank's blocks alone
        optimizer.step()
        seen.append([t.detach().numpy().copy() for t in tensors])
    return seen, optimizer.skipped_steps, optimizer.fisher_stats()["0.1"].fisher_updates


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_a_gradient_that_is_not_finite_skips_the_step_on_all_ranks(value: float) -> None:
    for seen, skipped, updates in run_ranks(non_finite, 3, value):
        assert skipped == 2 and updates == 2
        assert all(np.array_equal(a, np.ones_like(a)) for a in seen[0])
        assert all(np.array_equal(a, b) for a, b in zip(seen[1], seen[2], strict=True))
        assert all(np.isfinite(a).all() for a in seen[3])


def consolidated(rank: int, world: int, to: int | None, packed: bool):
    module = model()
    settings = {**SMALL, "max_blocks": 4, "inverse_update_freq": 3, "packed": packed}
    optimizer = AdaFisher(module.named_parameters(), **settings)
    for step in range(5):
        step_once(module, optimizer, step)
    messages = []
    if world > 1:
        for attempt in (optimizer.state_dict, lambda: copy.deepcopy(optimizer)):
            with pytest.raises(RuntimeError, match="consolidate_state_dict") as caught:
                attempt()
            messages.append(str(caught.value))
    optimizer.consolidate_state_dict(to)
    saved = copy.deepcopy(optimizer.state_dict())
    middle = copy.deepcopy(module.state_dict())
    for step in range(5, 9):
        step_once(module, optimizer, step)
    if world > 1:
        with pytest.raises(RuntimeError, match="consolidate_state_dict"):
            optimizer.state_dict()  # the copy is as old as the last step
    if to is not None and rank != to:
        with pytest.raises(ValueError, match="holds no state"):
            AdaFisher(model().parameters()).load_state_dict(saved)
    return as_numpy(saved), {k: v.numpy() for k, v in middle.items()}, weights(module)


def step_once(module: nn.Module, optimizer: AdaFisher, step: int) -> None:
    x, y = batch(step, 0, 1)  # the same on each rank: no DDP is needed
    optimizer.zero_grad()
    nn.functional.mse_loss(module(x), y).backward()
    optimizer.step()


def as_numpy(saved: dict) -> dict:
    tensors = {i: {k: v.numpy() for k, v in entry.items()} for i, entry in saved["state"].items()}
    return {**saved, "state": tensors}


def resumed(rank: int, world: int, saved: dict, middle: dict):
    module = model()
    module.load_state_dict({k: torch.from_numpy(v) for k, v in middle.items()})
    optimizer = AdaFisher(module.named_parameters(), lr=123.0)
    tensors = {i: {k: torch.from_numpy(np.asarray(v)) for k, v in e.items()} for i, e in saved["state"].items()}
    optimizer.load_state_dict({**saved, "state": tensors})
    for step in range(5, 9):
        step_once(module, optimizer, step)
    return weights(module)


@pytest.mark.parametrize(("world", "to", "packed"), [(1, 0, False), (3, 0, False), (3, None, False), (3, 0, True)])
def test_consolidated_state_resumes_at_any_world_size(world: int, to: int | None, packed: bool) -> None:
    results = run_ranks(consolidated, world, to, packed)
    saved, middle, final = results[0]
    assert saved["adafisher_dist"]["part"] == "whole"
    if world > 1:
        assert (results[2][0]["state"] == {}) == (to == 0)
    for other in (1, 2, 3):
        for result in run_ranks(resumed, other, saved, middle):
            if other == world:
                assert all(np.array_equal(result[name], final[name]) for name in final), "not bit for bit"
            assert distance(result, final) < 1e-5


def subgroups(rank: int, world: int):
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    module = model()
    optimizer = AdaFisher(module.parameters(), **SMALL, process_group=groups[rank // 2])
    for step in range(4):
        x, y = batch(step + 50 * (rank // 2), 0, 1)  # the two groups train on their own data
        optimizer.zero_grad()
        nn.functional.mse_loss(module(x), y).backward()
        optimizer.step()
    return weights(module)


def test_process_group() -> None:
    results = run_ranks(subgroups, 4)
    assert distance(results[0], results[1]) == distance(results[2], results[3]) == 0
    assert distance(results[0], results[2]) > 1e-3


def different_settings(rank: int, world: int) -> str:
    parameter = nn.Parameter(torch.ones(20))
    optimizer = AdaFisher([parameter])
    for step in range(2):
        parameter.grad = torch.ones(20)
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 + rank * step)
        try:
            optimizer.step()
        except RuntimeError as error:
            return f"{step}: {error}"
    return "no error"


def test_settings_that_differ_between_ranks_are_an_error() -> None:
    for message in run_ranks(different_settings, 2):
        assert message.startswith("1: The ranks' param groups have different settings")


def tries_again(rank: int, world: int):
    tensors = [nn.Parameter(torch.ones(200)), nn.Parameter(torch.ones(7, 9))]
    optimizer = AdaFisher(tensors, lr=0.1, block_size=4, rows_per_block=2)
    for step in range(3):
        for tensor in tensors:
            tensor.grad = torch.full_like(tensor, 0.5)
        if step == 0 and rank == 1:
            tensors[1].grad = None
            with pytest.raises(RuntimeError, match="which parameters have a gradient"):
                optimizer.step()
        elif step == 0:
            with pytest.raises(RuntimeError, match="which parameters have a gradient"):
                optimizer.step()
        else:
            optimizer.step()
    return [int(entry["step"]) for entry in optimizer.state.values()], [t.detach().numpy() for t in tensors]


def test_after_a_disagreement_training_can_go_on() -> None:
    results = run_ranks(tries_again, 2)
    for counts, tensors in results:
        assert counts == [2, 2]
        assert all(np.array_equal(a, b) for a, b in zip(tensors, results[0][1], strict=True))


def too_early(rank: int, world: int, store: str) -> str:
    dist.destroy_process_group()
    parameter = nn.Parameter(torch.ones(20))
    optimizer = AdaFisher([parameter])
    parameter.grad = torch.ones(20)
    optimizer.step()
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    with pytest.raises(RuntimeError, match=r"before torch\.distributed was initialised") as caught:
        optimizer.step()
    return str(caught.value)


def test_a_step_before_the_process_group_is_an_error(tmp_path: Path) -> None:
    run_ranks(too_early, 2, str(tmp_path / "store"))


def loaded_on_one_rank(rank: int, world: int) -> str:
    module = model()
    optimizer = AdaFisher(module.named_parameters(), lr=1e-2)
    for step in range(2):
        step_once(module, optimizer, step)
    optimizer.consolidate_state_dict(to=None)
    saved = optimizer.state_dict()
    again = AdaFisher(module.named_parameters(), lr=1e-2)
    step_once(module, again, 2)
    if rank == 0:
        again.load_state_dict(saved)
    with pytest.raises(RuntimeError) as caught:
        step_once(module, again, 3)
    return str(caught.value)


def test_a_state_loaded_on_one_rank_alone_is_an_error() -> None:
    for message in run_ranks(loaded_on_one_rank, 2, timeout=60):
        assert "reset and load the same" in message or "different numbers of steps" in message


def state_removed_on_one_rank(rank: int, world: int) -> str:
    module = model()
    optimizer = AdaFisher(module.named_parameters(), lr=1e-2)
    step_once(module, optimizer, 0)
    if rank == 1:
        optimizer.state.clear()
    with pytest.raises(RuntimeError, match="different numbers of steps") as caught:
        step_once(module, optimizer, 1)
    return str(caught.value)


def test_a_state_removed_on_one_rank_alone_is_an_error() -> None:
    run_ranks(state_removed_on_one_rank, 2, timeout=60)


def unsynchronised(rank: int, world: int) -> str:
    module = DistributedDataParallel(model())
    optimizer = AdaFisher(module.parameters(), lr=1e-2)
    for step in range(8):
        optimizer.zero_grad()
        x, y = batch(step, rank, world)
        with module.no_sync() if step else contextlib.nullcontext():
            nn.functional.mse_loss(module(x), y).backward()
        try:
            optimizer.step()
        except RuntimeError as error:
            return f"{step}: {error}"
    return "no error"


def test_gradients_that_are_no_longer_synchronised_are_found() -> None:
    for message in run_ranks(unsynchronised, 2, timeout=60):
        assert message.startswith("1: The ranks hold different gradients") and "no_sync()" in message


def torch_functions(rank: int, world: int):
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    module, twin = model(), model()
    optimizer = AdaFisher(module.parameters(), lr=1e-2)
    fresh = get_optimizer_state_dict(module, optimizer)["state"]  # torch makes a step with gradients of zero
    assert len(fresh) == sum(p.requires_grad for p in module.parameters())
    assert not any(value.any() for entry in fresh.values() for value in entry.values())
    for step in range(3):
        step_once(module, optimizer, step)
    assert int(optimizer.state[module.mix.weight]["step"]) == 3
    saved = copy.deepcopy(get_optimizer_state_dict(module, optimizer))
    twin.load_state_dict(module.state_dict())
    resumed = AdaFisher(twin.parameters())
    set_optimizer_state_dict(twin, resumed, saved)
    for m, o in ((module, optimizer), (twin, resumed)):
        step_once(m, o, 3)
    return weights(module), weights(twin)


def test_torch_s_checkpoint_functions_in_one_process() -> None:
    for straight, resumed in run_ranks(torch_functions, 1):
        assert all(np.array_equal(straight[name], resumed[name]) for name in straight)


def compiled(rank: int, world: int, layout: str, on_device: bool) -> bool:
    """Whether steps that compiled code calls end with the same bits as those of plain code."""
    found_inf.is_meant_for = lambda device: on_device
    trained = []
    for make in (lambda call: call, partial(torch.compile, backend="eager")):
        run = Run(layout, rank, world, SMALL)
        step = run.optimizer.step
        run.optimizer.step = make(lambda step=step: step())
        run.train(0, 4)
        trained.append(run.weights())
    return all(np.array_equal(trained[0][name], trained[1][name]) for name in trained[0])


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("layout", ["ddp", "fsdp2"])
def test_compiled_steps_of_several_ranks(layout: str, on_device: bool) -> None:
    assert run_ranks(compiled, 2, layout, on_device) == [True, True]
