"""FSDP2 on 1-D and 2-D meshes trains like one process and, step by step, the oracle; or refuses."""

from __future__ import annotations

import copy
import logging
import os
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from beside_oracle import assert_blocks_agree
from models import SECOND_GROUP, Odd, Stacked, Tied, batch, distance, model, param_groups, weights
from oracle import Oracle
from ranks import run_ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from adafisher_dist import AdaFisher, UnsupportedLayoutError
from adafisher_dist.stepping import step as stepping

pytestmark = pytest.mark.dist

PARAMS = {"lr": 1e-2, "block_size": 8, "rows_per_block": 4, "damping": 0.2}


def shard_model(kind: type[Odd], replicas: int, world: int, **policy: Any) -> Odd:
    if replicas > 1:
        names = ("replicate", "shard")
        mesh = init_device_mesh("cpu", (replicas, world // replicas), mesh_dim_names=names)
    else:
        mesh = init_device_mesh("cpu", (world,))
    module = model(kind=kind)
    if kind is Odd:  # a wrapped layer of its own; a tied weight has to stay with the root
        fully_shard(module.inner, mesh=mesh, **policy)
        fully_shard(module.conv, mesh=mesh, **policy)
    return fully_shard(module, mesh=mesh, **policy)


def full(tensor: torch.Tensor) -> np.ndarray:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().double().numpy().copy()


DEFAULTS: dict[str, Any] = {
    "settings": PARAMS, "steps": 6, "groups": True, "replicas": 1, "accumulate": 1, "sync": "each", "kind": Odd,
    "policy": "fp32", "clip": 0.0, "bound": 1e-4,
}  # fmt: skip


def train(rank: int, world: int, options: dict[str, Any]):
    """By step: full gradients, weights before and after; then memory, and if blocks travel."""
    policies = {
        "fp32": {},
        "bf16": {"mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)},
        "offload": {"offload_policy": CPUOffloadPolicy(pin_memory=False)},
    }
    module = shard_model(options["kind"], options["replicas"], world, **policies[options["policy"]])
    groups = param_groups(module) if options["groups"] else module.named_parameters()
    optimizer = AdaFisher(groups, **options["settings"])
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    rows = []
    for step in range(options["steps"]):
        optimizer.zero_grad()
        backward(module, step, rank, world, options)
        named = dict(module.named_parameters())
        before = {name: full(p) for name, p in named.items()}
        grads = {name: full(p.grad) for name, p in named.items() if p.grad is not None}
        optimizer.step()
        schedule.step()
        rows.append((grads, before, {name: full(p) for name, p in named.items()}))
    travels = any(exchange.crossing for exchange in optimizer._registry.stepper._exchanges)
    return rows, optimizer.memory_usage(), travels


def backward(module: nn.Module, step: int, rank: int, world: int, options: dict[str, Any]) -> None:
    accumulate = options["accumulate"]
    for micro in range(accumulate):
        x, y = batch(step * accumulate + micro, rank, world)
        if isinstance(module, FSDPModule) and options["sync"] == "last":
            module.set_requires_gradient_sync(micro == accumulate - 1)
        (nn.functional.mse_loss(module(x).float(), y) / accumulate).backward()
    if options["clip"]:
        nn.utils.clip_grad_norm_(module.parameters(), options["clip"])


def alone(options: dict[str, Any]) -> dict[str, np.ndarray]:
    """The same training in one process without FSDP."""
    module = model(kind=options["kind"])
    optimizer = AdaFisher(param_groups(module) if options["groups"] else module.parameters(), **options["settings"])
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    for step in range(options["steps"]):
        optimizer.zero_grad()
        backward(module, step, 0, 1, options)
        optimizer.step()
        schedule.step()
    return weights(module)


def follow(world: int, **chosen: Any) -> list[Any]:
    """Train on `world` ranks; compare steps with the oracle and, but for bf16, with one process."""
    options = {**DEFAULTS, **chosen}
    results = run_ranks(train, world, options)
    rows = results[0][0]
    for other, *_ in results[1:]:
        assert all(np.array_equal(other[-1][2][name], rows[-1][2][name]) for name in rows[-1][2])
    module = model(kind=options["kind"])
    names = {id(p): name for name, p in module.named_parameters()}
    in_groups = [[names[id(p)] for p in group["params"]] for group in param_groups(module)]
    order = [name for group in in_groups for name in group] if options["groups"] else list(names.values())
    own = {name: SECOND_GROUP for name in in_groups[1]} if options["groups"] else {}
    start = rows[0][1]
    oracle = Oracle([(start[name], own.get(name, {})) for name in order], arithmetic=np.float32, **options["settings"])
    rates = [setting["lr"] for setting in oracle.settings]
    for number, (grads, before, after) in enumerate(rows):
        for setting, rate in zip(oracle.settings, rates, strict=True):
            setting["lr"] = rate / (1 + number)
        changes = oracle.step([grads.get(name) for name in order])
        for name, change, setting in zip(order, changes, oracle.settings, strict=True):
            floor = 4 * np.finfo(np.float32).eps * np.maximum(np.abs(before[name]), np.abs(after[name]))
            scale, where = 3e-4 * np.abs(change) + 1e-12, f"step {number}, {name}"
            assert_blocks_agree(after[name] - before[name], change, scale, floor, where, setting)
    if options["policy"] != "bf16":
        assert distance(rows[-1][2], alone(options)) < options["bound"]
    shards = options["replicas"]
    memory = [usage for _, usage, _ in results]
    assert sum(usage["rank"]["fisher"] for usage in memory) == memory[0]["all"]["fisher"] * shards
    return results


@pytest.mark.parametrize("groups", [False, True])
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_like_one_process(world: int, groups: bool) -> None:
    follow(world, groups=groups)


@pytest.mark.parametrize("policy", ["bf16", "offload"])
@pytest.mark.parametrize("world", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_policies(policy: str, world: int) -> None:
    follow(world, policy=policy)


@pytest.mark.parametrize("policy", ["fp32", "bf16", "offload"])
@pytest.mark.parametrize(("world", "replicas"), [(4, 2), pytest.param(4, 4, marks=pytest.mark.slow)])
def test_hsdp(world: int, replicas: int, policy: str) -> None:
    follow(world, replicas=replicas, policy=policy)


def scaled(rank: int, world: int, replicas: int, reduce: str) -> tuple[list[Any], float, int]:
    """fp16 with a loss scale: weights after each step; in the third the last rank alone overflows.

    In the sixth the scale, which grows every fourth step, has changed.
    """
    policy = MixedPrecisionPolicy(param_dtype=torch.float16, reduce_dtype=getattr(torch, reduce))
    module = shard_model(Odd, replicas, world, mp_policy=policy)
    optimizer = AdaFisher(param_groups(module), **PARAMS)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=3)
    rows = []
    for step in range(8):
        x, y = batch(step, rank, world)
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(module(x).float(), y) * (1e9 if step == 2 and rank == world - 1 else 1.0)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        rows.append({name: full(p) for name, p in module.named_parameters()})
    return rows, scaler.get_scale(), optimizer.skipped_steps


@pytest.mark.parametrize(("world", "replicas"), [(2, 1), (4, 2)])
@pytest.mark.parametrize("reduce", ["float16", "float32"])
def test_fp16_with_a_loss_scale(world: int, replicas: int, reduce: str) -> None:
    """Like one process in fp32, but for fp16's rounding; an overflow leaves no trace on a rank."""
    single = model()
    optimizer = AdaFisher(param_groups(single), **PARAMS)
    results = run_ranks(scaled, world, replicas, reduce)
    for number in range(8):
        before = weights(single)
        if number != 2:
            x, y = batch(number, 0, 1)
            optimizer.zero_grad()
            nn.functional.mse_loss(single(x), y).backward()
            optimizer.step()
        moved = distance(weights(single), before)
        for rows, _, _ in results:
            assert all(np.array_equal(rows[number][name], results[0][0][number][name]) for name in rows[number])
            assert distance(rows[number], weights(single)) < 0.02, number
            if number == 2:
                assert all(np.array_equal(rows[2][name], rows[1][name]) for name in rows[2])
            else:
                assert moved > 0.02, "the bound tells nothing"
    assert {scale for _, scale, _ in results} == {2.0**8}  # halved once, doubled once
    assert {skipped for *_, skipped in results} == {0}  # GradScaler itself leaves the step out


def bfloat16(rank: int, world: int) -> tuple[list[Any], list[Any]]:
    """Parameters that are bf16 themselves: full gradients and weights by step."""
    module = fully_shard(model(torch.bfloat16))
    optimizer = AdaFisher(module.named_parameters(), **PARAMS)
    grads, after = [], []
    for step in range(6):
        x, y = batch(step, rank, world, dtype=torch.bfloat16)
        optimizer.zero_grad()
        nn.functional.mse_loss(module(x).float(), y.float()).backward()
        grads.append({name: full(p.grad) for name, p in module.named_parameters() if p.grad is not None})
        optimizer.step()
        after.append({name: full(p) for name, p in module.named_parameters()})
    return grads, after


@pytest.mark.parametrize("world", [2, 3])
def test_parameters_in_bf16(world: int) -> None:
    """On the same gradients one process comes to the same weights, bit for bit but for ties."""
    single = model(torch.bfloat16)
    named = dict(single.named_parameters())
    optimizer = AdaFisher(single.named_parameters(), **PARAMS)
    results = run_ranks(bfloat16, world)
    grads, after = results[0]
    for own, rows in zip(grads, after, strict=True):
        for name, p in named.items():
            p.grad = torch.from_numpy(own[name]).to(torch.bfloat16) if name in own else None
        optimizer.step()
        same = np.concatenate([(rows[name] == alone).ravel() for name, alone in weights(single).items()])
        assert same.mean() > 0.97
        for name, alone in weights(single).items():
            assert np.allclose(rows[name], alone, rtol=2e-2, atol=1e-3), name
    for _, other in results[1:]:
        assert all(np.array_equal(other[-1][name], after[-1][name]) for name in other[-1])


def test_clipping_accumulation_tied_and_unused_weights() -> None:
    follow(2, accumulate=3, clip=0.05)
    follow(2, accumulate=3, sync="last")
    follow(2, kind=Tied)
    follow(3, kind=Stacked)  # of two matrices, so that one rank has nothing of it


@pytest.mark.parametrize(
    "settings",
    [
        {"inverse_update_freq": 4, "fisher_update_freq": 2, "max_blocks": 5, "exponent": 1.0},
        {"block_grid": "flat", "block_size": 5},
        {"exponent": 0.5, "grafting": "none", "damping": 0.5},
        {"block_size": 1},
    ],
    ids=str,
)
def test_settings(settings: dict[str, Any]) -> None:
    # At the second step an element with a diagonal Fisher is divided by its first gradient alone.
    # One of these almost cancels out, so that its rounding shows: 3.5e-4.
    follow(3, settings={**PARAMS, **settings}, bound=1e-3 if "fisher_update_freq" in settings else 1e-4)


def rows_stay(rank: int, world: int) -> list[bool]:
    """Shards of whole row groups, here of three rows and a last one of one: nothing travels."""
    module = nn.Sequential(nn.Linear(20, 7, bias=False), nn.Linear(7, 9, bias=False))
    fully_shard(module, mesh=init_device_mesh("cpu", (world,)))
    optimizer = AdaFisher(module.parameters(), block_size=7, rows_per_block=3)
    module(torch.ones(2, 20)).square().sum().backward()
    optimizer.step()
    return [exchange.crossing for exchange in optimizer._registry.stepper._exchanges]


def test_shards_of_whole_slabs_cut_none() -> None:
    assert run_ranks(rows_stay, 3) == [[False]] * 3
    assert all(travels for *_, travels in follow(3))  # the small parameters of the test model do


def resume(rank: int, world: int):
    options = {**DEFAULTS, "settings": {**PARAMS, "inverse_update_freq": 3}}

    def steps(module: nn.Module, optimizer: AdaFisher, first: int, last: int) -> None:
        for step in range(first, last):
            optimizer.zero_grad()
            backward(module, step, rank, world, options)
            optimizer.step()

    module = shard_model(Odd, 1, world)
    optimizer = AdaFisher(module.named_parameters(), **options["settings"])
    steps(module, optimizer, 0, 3)
    saved = optimizer.state_dict()
    assert saved["adafisher_dist"]["part"] == f"FSDP2, rank {rank} of {world}"
    saved = {**saved, "state": {i: {k: v.clone() for k, v in e.items()} for i, e in saved["state"].items()}}
    middle = {name: p.detach().clone() for name, p in module.state_dict().items()}
    steps(module, optimizer, 3, 6)
    straight = {name: full(p) for name, p in module.named_parameters()}
    again = shard_model(Odd, 1, world)
    again.load_state_dict(middle)
    resumed = AdaFisher(again.named_parameters())
    resumed.load_state_dict(saved)
    steps(again, resumed, 3, 6)
    with pytest.raises(ValueError, match="part of a sharded state"):
        AdaFisher(model().parameters()).load_state_dict(saved)
    return straight, {name: full(p) for name, p in again.named_parameters()}


def test_resume_is_bit_for_bit() -> None:
    for straight, resumed in run_ranks(resume, 3):
        assert all(np.array_equal(straight[name], resumed[name]) for name in straight)


def refused(rank: int, world: int) -> list[str]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "model"))
    weight = torch.ones(8, 6)
    cases = [
        distribute_tensor(weight, mesh["data"], [Shard(1)]),
        distribute_tensor(weight, mesh["data"], [Replicate()]),
        distribute_tensor(weight, mesh, [Replicate(), Shard(1)]),
        distribute_tensor(weight, mesh, [Shard(1), Shard(0)]),
        distribute_tensor(weight, mesh, [Shard(0), Shard(0)]),
    ]
    messages = []
    for case in cases:
        with pytest.raises(UnsupportedLayoutError, match="fully_shard") as caught:
            AdaFisher([("weight", nn.Parameter(case))])
        messages.append(str(caught.value))
    return messages


def test_other_dtensors_are_refused() -> None:
    for messages in run_ranks(refused, 4):
        assert all("weight is a DTensor with placements" in message for message in messages)
        assert ["For replicas alone use DDP" in message for message in messages] == [False, True, False, False, False]


def fsdp1(rank: int, world: int) -> str:
    from torch.distributed.fsdp import FullyShardedDataParallel

    module = FullyShardedDataParallel(nn.Linear(4, 4), device_id=torch.device("cpu"))
    with pytest.raises(UnsupportedLayoutError, match=r"FSDP1 .* use FSDP2") as caught:
        AdaFisher(module.parameters())
    return str(caught.value)


def test_fsdp1_is_refused() -> None:
    run_ranks(fsdp1, 2)


def wrapped_by_accelerate(rank: int, world: int, version: int) -> Any:
    from accelerate import Accelerator, FullyShardedDataParallelPlugin
    from accelerate.state import AcceleratorState
    from accelerate_on_cpu import with_fsdp

    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "LOCAL_WORLD_SIZE": str(world)}
    AcceleratorState.__init__ = with_fsdp
    plugin = FullyShardedDataParallelPlugin(fsdp_version=version, use_orig_params=True if version == 1 else None)
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
    accelerator.state.device = torch.device("cpu")  # as FSDP1 calls it; Accelerate has cpu:0
    module = model()
    module.frozen.requires_grad_(True)  # FSDP1 wants parameters that are alike
    before = AdaFisher(module.parameters(), **PARAMS)
    try:
        module, optimizer = accelerator.prepare(module, before)
        for step in range(4):
            x, y = batch(step, rank, world)
            optimizer.zero_grad()
            accelerator.backward(nn.functional.mse_loss(module(x), y))
            optimizer.step()
    except UnsupportedLayoutError as error:
        return str(error)
    return {name: full(p) for name, p in module.named_parameters()}


@pytest.mark.parametrize("version", [1, 2])
def test_accelerates_fsdp1_is_refused_with_a_remedy_that_trains(version: int) -> None:
    pytest.importorskip("accelerate", reason="the extra 'hf' is not installed")
    single = model()
    single.frozen.requires_grad_(True)
    optimizer = AdaFisher(single.parameters(), **PARAMS)
    for step in range(4):
        x, y = batch(step, 0, 1)
        optimizer.zero_grad()
        nn.functional.mse_loss(single(x), y).backward()
        optimizer.step()
    for result in run_ranks(wrapped_by_accelerate, 2, version):
        if version == 1:
            assert "FSDP1" in result and "use FSDP2" in result and "`fsdp_version: 2`" in result
        else:
            assert distance(result, weights(single)) < 1e-4


def one_replica_fails(rank: int, world: int) -> str:
    module = shard_model(Odd, 2, world)
    optimizer = AdaFisher(module.named_parameters(), **PARAMS)
    backward(module, 0, rank, world, DEFAULTS)
    if rank == 3:
        stepping.inputs_of = lambda *arguments: 1 / 0
    with pytest.raises((RuntimeError, ZeroDivisionError)) as caught:
        optimizer.step()
    return str(caught.value)


def test_a_fault_in_one_replica_reaches_the_others() -> None:
    messages = run_ranks(one_replica_fails, 4, timeout=60)
    assert all(("division by zero" if rank == 3 else "rank 3 failed") in text for rank, text in enumerate(messages))


def built_too_early(rank: int, world: int) -> list[str]:
    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("adafisher_dist").addHandler(handler)
    module = model()
    optimizer = AdaFisher(module.parameters())
    fully_shard(module, mesh=init_device_mesh("cpu", (world,)))
    for step in range(3):
        backward(module, step, rank, world, DEFAULTS)
        optimizer.step()
    return records


def test_an_optimizer_built_before_sharding_warns() -> None:
    for records in run_ranks(built_too_early, 2):
        assert len(records) == 1 and "build the optimizer last" in records[0]


def other_plan(rank: int, world: int) -> str:
    module = shard_model(Odd, 1, world)
    optimizer = AdaFisher(module.named_parameters(), block_size=8 + rank)
    backward(module, 0, rank, world, DEFAULTS)
    with pytest.raises(RuntimeError, match="planned different blocks") as caught:
        optimizer.step()
    return str(caught.value)


def test_ranks_with_different_plans_stop_together() -> None:
    run_ranks(other_plan, 3, timeout=60)


# ---- what else its users do ----


class Mixed(nn.Module):
    """A sharded layer, and a parameter that is left out of the sharding."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(9, 6)
        self.scale = nn.Parameter(torch.ones(40))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.layer(x)).sum(1) * self.scale.mean()


def mixed_steps(module: Mixed, optimizer: AdaFisher, first: int, last: int, rank: int, world: int) -> None:
    for step in range(first, last):
        optimizer.zero_grad()
        x, _ = batch(step, rank, world)
        module(x[:, :9]).square().mean().backward()
        if world > 1:
            dist.all_reduce(module.scale.grad)
            module.scale.grad /= world
        optimizer.step()


def mixed(rank: int, world: int):
    def build() -> tuple[Mixed, AdaFisher]:
        torch.manual_seed(0)
        module = Mixed()
        if world > 1:
            fully_shard(module, mesh=init_device_mesh("cpu", (world,)), ignored_params={module.scale})
        return module, AdaFisher(module.named_parameters(), **PARAMS)

    module, optimizer = build()
    mixed_steps(module, optimizer, 0, 3, rank, world)
    if world > 1:
        with pytest.raises(RuntimeError, match=r"consolidate_state_dict\(\) is for parameters that are the same"):
            optimizer.consolidate_state_dict()
    saved = copy.deepcopy(optimizer.state_dict())
    middle = {name: p.detach().clone() for name, p in module.state_dict().items()}
    mixed_steps(module, optimizer, 3, 6, rank, world)
    again, resumed = build()
    again.load_state_dict(middle)
    resumed.load_state_dict(saved)
    mixed_steps(again, resumed, 3, 6, rank, world)
    return [{name: full(p) for name, p in m.named_parameters()} for m in (module, again)]


def test_sharded_and_replicated_parameters_in_one_optimizer() -> None:
    alone, _ = mixed(0, 1)
    for straight, resumed in run_ranks(mixed, 3):
        assert distance(straight, alone) < 1e-5
        assert all(np.array_equal(straight[name], resumed[name]) for name in straight)


def swapped_in_place(rank: int, world: int):
    """Accelerate's order: first the optimizer, then fully_shard, then the new parameters."""
    module = model()
    optimizer = AdaFisher(module.named_parameters(), **PARAMS)
    names = {id(p): name for name, p in module.named_parameters()}
    in_groups = [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]
    fully_shard(module, mesh=init_device_mesh("cpu", (world,)))
    named = dict(module.named_parameters())
    for group, own in zip(optimizer.param_groups, in_groups, strict=True):
        group["params"] = [named[name] for name in own]
    for step in range(4):
        optimizer.zero_grad()
        backward(module, step, rank, world, DEFAULTS)
        optimizer.step()
    assert "inner.weight" in optimizer.fisher_stats()
    return {name: full(p) for name, p in module.named_parameters()}


def test_parameters_swapped_in_place() -> None:
    module = model()
    optimizer = AdaFisher(module.parameters(), **PARAMS)
    for step in range(4):
        optimizer.zero_grad()
        backward(module, step, 0, 1, DEFAULTS)
        optimizer.step()
    for result in run_ranks(swapped_in_place, 2):
        assert distance(result, weights(module)) < 1e-4


def sub_meshes(rank: int, world: int):
    """Two models on two meshes, of which one takes a step before it has any gradient."""
    meshes = init_device_mesh("cpu", (2, 2), mesh_dim_names=("model", "shard"))
    module = fully_shard(model(), mesh=meshes["shard"])
    optimizer = AdaFisher(module.parameters(), **PARAMS)
    if rank < 2:
        optimizer.step()
    for step in range(3):
        optimizer.zero_grad()
        backward(module, step, rank % 2, 2, DEFAULTS)
        optimizer.step()
    return {name: full(p) for name, p in module.named_parameters()}


def test_two_meshes_step_by_themselves() -> None:
    results = run_ranks(sub_meshes, 4, timeout=60)
    assert all(np.array_equal(results[0][name], result[name]) for result in results for name in result)


def replicas_differ(rank: int, world: int) -> str:
    module = shard_model(Odd, 2, world)
    optimizer = AdaFisher(module.named_parameters(), **PARAMS)
    for step in range(4):
        optimizer.zero_grad()
        backward(module, step, rank, world, DEFAULTS)
        if step == 1 and rank < 2:  # the second call, at which the replicas are compared again
            for p in module.parameters():
                if p.grad is not None:
                    p.grad.mul_(2)
        try:
            optimizer.step()
        except RuntimeError as error:
            return f"{step}: {error}"
    return "no error"


def test_replicas_that_differ_are_found() -> None:
    for message in run_ranks(replicas_differ, 4, timeout=60):
        assert message.startswith("1: The replicas of an HSDP mesh hold different")
