"""Weights in bfloat16 that are rounded by chance: exact means, and the same bits on all ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from models import Stacked, batch, model, param_groups
from oracle import Oracle
from ranks import run_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import adafisher_dist.blocks.sharding
from adafisher_dist import AdaFisher, UnsupportedLayoutError, load_checkpoint, save_checkpoint
from adafisher_dist.numerics.rounding import Elements, add_stochastically, seeds_of_weights

SETTINGS: dict[str, Any] = {
    "lr": 1e-2, "block_size": 8, "rows_per_block": 4, "damping": 0.2, "stochastic_rounding": True,
}  # fmt: skip
WITHOUT = {key: value for key, value in SETTINGS.items() if key != "stochastic_rounding"}
CPU = torch.device("cpu")


def rounded(values: np.ndarray, updates: np.ndarray, steps: int, position: int = 3) -> np.ndarray:
    """What becomes of weights in many steps, each from the same ones: (steps, n), float64."""
    found = np.empty((steps, len(values)))
    for step in range(steps):
        weights = torch.from_numpy(values).to(torch.bfloat16)
        elements = Elements((len(values),), (1,), 0, position, step + 1)
        add_stochastically([weights], [torch.from_numpy(updates).float()], [elements])
        found[step] = weights.double().numpy()
    return found


def neighbours(exact: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The values of bfloat16 (8 bits of significand) below and above, by float64 arithmetic."""
    unit = 2.0 ** (np.floor(np.log2(np.abs(exact))) - 7)
    return np.floor(exact / unit) * unit, np.ceil(exact / unit) * unit


def test_the_mean_is_exact_and_each_draw_a_neighbour() -> None:
    generator = np.random.default_rng(5)
    values = torch.from_numpy(generator.normal(size=400)).to(torch.bfloat16).double().numpy()
    updates = (generator.normal(size=400) * 10.0 ** generator.uniform(-5, -1, 400)).astype(np.float32).astype(float)
    updates[:100] = np.abs(values[:100]) * 1e-4  # a twentieth of half a unit: to nearest, nothing happens
    steps, exact = 4000, values + updates
    found = rounded(values, updates, steps)
    low, high = neighbours(exact)
    assert ((found == low) | (found == high)).all()
    unmoved = torch.from_numpy(values[:100]).to(torch.bfloat16)
    assert torch.equal(unmoved.clone().add_(torch.from_numpy(updates[:100]).float()), unmoved)
    chance = np.where(high > low, (exact - low) / np.where(high > low, high - low, 1.0), 0.0)
    error = np.sqrt(chance * (1 - chance) / steps) * (high - low) + np.abs(exact) * 2.0**-23
    away = (found.mean(axis=0) - exact) / error
    assert np.abs(away).max() < 4.5  # of 400 weights
    assert np.abs(away).mean() < 1.0  # 0.8 of normal ones
    assert (found[:, :100].mean(axis=0) != values[:100]).mean() > 0.99


def test_no_update_moves_nothing() -> None:
    """As where a device finds that a step is to be skipped."""
    values = torch.randn(1000, generator=torch.Generator().manual_seed(3)).bfloat16().double().numpy()
    assert (rounded(values, np.zeros(1000), 20) == values).all()


def test_draws_are_independent() -> None:
    """Neither steps, nor neighbours, nor parameters of the same shape share their noise."""
    values, updates = np.ones(2000), np.full(2000, 2.0**-9)  # a quarter of the unit above 1
    up = rounded(values, updates, 200) > 1
    other = rounded(values, updates, 200, position=4) > 1
    assert abs(up.mean() - 0.25) < 0.003
    for one, two in ((up[1:], up[:-1]), (up[:, 1:], up[:, :-1]), (up, other), (up[:, 1:], other[:, :-1])):
        assert abs(np.corrcoef(one.ravel(), two.ravel())[0, 1]) < 0.01


def test_seeds_are_those_of_the_elements() -> None:
    """A view of a parameter, however it is cut, has the seeds of its elements in the whole."""
    whole = seeds_of((7, 12), (12, 1), 0)
    part = seeds_of((2, 3, 4), (24, 4, 1), 12)
    assert torch.equal(part, whole[12:60].view(2, 2, 3, 4)[:, 0].flatten())
    assert len(whole.unique()) == whole.numel()
    assert torch.equal(seeds_of((3, 7), (2, 12), 1).view(3, 7), whole.view(7, 12).T[1:7:2])
    far = seeds_of((4,), (1,), 2**32 + 2**31 - 2)  # past what int32 counts
    assert torch.equal(far, seeds_of((4,), (1,), 2**31 - 2))
    assert torch.equal(seeds_of((2, 2), (2**32 + 2, 1), 1), seeds_of((2, 2), (2, 1), 1))
    assert seeds_of((), (), 3) == whole[3] and seeds_of((1, 1), (12, 1), 3) == whole[3]
    other = Elements((5,), (1,), 2, 6, 9)
    together = seeds_of_weights([Elements((7, 12), (12, 1), 0, 5, 9), other, Elements((4,), (1,), 8, 5, 9)], CPU)
    assert torch.equal(together, torch.cat([whole, seeds_of_weights([other], CPU), whole[8:12]]))


def test_seeds_stay_what_they_were() -> None:
    """Those of a release: a training goes on from its checkpoint to the bit."""
    expected = [-162318485, 580373090, -131969611, -1442932062, -1343940300, -163267357]
    assert seeds_of((3, 2), (4, 2), 5).tolist() == expected


def seeds_of(sizes: tuple[int, ...], strides: tuple[int, ...], first: int) -> Tensor:
    return seeds_of_weights([Elements(sizes, strides, first, position=5, step=9)], CPU)


def test_a_step_is_that_of_the_oracle_but_for_the_rounding() -> None:
    generator = np.random.default_rng(7)
    shapes = [(9, 20), (5,), ()]
    parameters = [nn.Parameter(torch.from_numpy(generator.normal(size=s)).bfloat16()) for s in shapes]
    optimizer = AdaFisher(parameters, **SETTINGS)
    oracle = Oracle([p.detach().double().numpy() for p in parameters], arithmetic=np.float32, **WITHOUT)
    for _ in range(10):
        gradients = [torch.from_numpy(generator.normal(size=s)).bfloat16() for s in shapes]
        for index, (p, g) in enumerate(zip(parameters, gradients, strict=True)):
            p.grad = g
            oracle.params[index] = p.detach().double().numpy()
        oracle.step([g.double().numpy() for g in gradients])
        optimizer.step()
        for p, exact in zip(parameters, oracle.params, strict=True):
            low, high = neighbours(np.asarray(exact))
            slack = 1e-4 * SETTINGS["lr"]  # of float32
            got = p.detach().double().numpy()
            assert ((got >= low - slack) & (got <= high + slack)).all()


def test_updates_that_are_lost_to_nearest_add_up() -> None:
    """A thousand steps, each a fortieth of what bfloat16 tells apart at 1."""
    moved = {}
    for chance in (True, False):
        p = nn.Parameter(torch.ones(1024, dtype=torch.bfloat16))
        optimizer = AdaFisher([p], lr=1e-4, weight_decay=0.0, stochastic_rounding=chance)
        for _ in range(1000):
            p.grad = torch.ones_like(p)
            optimizer.step()
        moved[chance] = 1 - p.detach().double().mean().item()
    assert moved[False] == 0
    assert moved[True] == pytest.approx(0.1, rel=0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
def test_other_weights_are_refused(dtype: torch.dtype) -> None:
    one, two = nn.Parameter(torch.ones(4, dtype=torch.bfloat16)), nn.Parameter(torch.ones(4, dtype=dtype))
    optimizer = AdaFisher([("one", one), ("two", two)], stochastic_rounding=True)
    for p in (one, two):
        p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match=f"two is stepped in {dtype}.*a param group without it"):
        optimizer.step()
    assert torch.equal(one, torch.ones(4, dtype=torch.bfloat16))
    groups = [{"params": [one], "stochastic_rounding": True}, {"params": [two]}]
    AdaFisher(groups).step()  # what the message tells


def test_an_older_state_dict_keeps_the_setting() -> None:
    p = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    optimizer = AdaFisher([p], stochastic_rounding=True)
    saved = optimizer.state_dict()
    del saved["param_groups"][0]["stochastic_rounding"]
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["stochastic_rounding"] is True


# ---- ranks ----


def build(layout: str, world: int, mixed: bool) -> tuple[nn.Module, nn.Module, AdaFisher]:
    """A model in bfloat16, what is called, and its optimizer; `mixed`: with a group in float32."""
    module: nn.Module = model(torch.bfloat16, kind=Stacked)
    if mixed:
        module.out.float()  # type: ignore[union-attr, operator]
    called: nn.Module = module
    if layout == "ddp":
        called = DistributedDataParallel(module) if world > 1 else module
    elif layout == "fsdp2":
        if mixed:
            fully_shard(module.out, mesh=init_device_mesh("cpu", (world,)))
        fully_shard(module, mesh=init_device_mesh("cpu", (world,)))
    elif layout == "hsdp":
        fully_shard(module, mesh=init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("replicate", "shard")))
    groups = param_groups(module)
    if mixed:
        rest = [p for group in groups for p in group["params"] if p.dtype == torch.float32]
        for group in groups:
            group["params"] = [p for p in group["params"] if p.dtype != torch.float32]
        groups.append({"params": rest, "stochastic_rounding": False})
    return module, called, AdaFisher(groups, **SETTINGS)


def train(module: nn.Module, called: nn.Module, optimizer: AdaFisher, first: int, last: int) -> None:
    """The same gradients on all ranks, which round to bfloat16 before they are averaged."""
    for step in range(first, last):
        optimizer.zero_grad()
        x, y = batch(step, 0, 1)
        hidden = called(x.bfloat16()) if module.out.weight.dtype == torch.bfloat16 else _in_two(module, called, x)
        nn.functional.mse_loss(hidden.float(), y).backward()
        optimizer.step()


def _in_two(module: nn.Module, called: nn.Module, x: Tensor) -> Tensor:
    hook = module.out.register_forward_pre_hook(lambda _, given: (given[0].float(),))
    try:
        return called(x.bfloat16())
    finally:
        hook.remove()


def whole(module: nn.Module) -> dict[str, np.ndarray]:
    found = {}
    for name, p in module.named_parameters():
        value = p.full_tensor() if hasattr(p, "full_tensor") else p
        found[name] = value.detach().double().numpy().copy()
    return found


def trained(rank: int, world: int, layout: str, mixed: bool = False, chunk: int = 0) -> dict[str, np.ndarray]:
    if chunk:
        adafisher_dist.blocks.sharding.CHUNK_FISHER_NUMEL = chunk
    module, called, optimizer = build(layout, world, mixed)
    train(module, called, optimizer, 0, 8)
    if layout == "hsdp":  # each replica has its own
        own = [p.to_local().float() for p in module.parameters()]
        copies = [[torch.empty_like(value) for _ in range(world)] for value in own]
        for value, copy in zip(own, copies, strict=True):
            if value.numel() == copy[0].numel():
                group = module.out.weight.device_mesh.get_group("replicate")
                both = [torch.empty_like(value) for _ in range(2)]
                dist.all_gather(both, value.contiguous(), group)
                assert torch.equal(both[0], both[1])
    return whole(module)


@pytest.mark.dist
@pytest.mark.parametrize(
    ("layout", "world", "mixed", "chunk"),
    [
        ("ddp", 2, False, 0),
        ("ddp", 4, True, 300),
        ("fsdp2", 2, False, 0),
        ("fsdp2", 2, True, 300),
        ("hsdp", 4, False, 0),
    ],
)
def test_ranks_round_alike(layout: str, world: int, mixed: bool, chunk: int) -> None:
    """N ranks end with the bits of one process: its gradients, whose mean is exact, and noise."""
    wanted = trained(0, 1, "ddp", mixed)
    for found in run_ranks(trained, world, layout, mixed, chunk):
        for name, value in wanted.items():
            np.testing.assert_array_equal(found[name], value, err_msg=name)


def resumed(rank: int, world: int, layout: str, folder: Path) -> list[dict[str, np.ndarray]]:
    module, called, optimizer = build(layout, world, False)
    train(module, called, optimizer, 0, 4)
    save_checkpoint(folder / "a", module, optimizer)
    train(module, called, optimizer, 4, 8)
    again, called, optimizer = build(layout, world, False)
    load_checkpoint(folder / "a", again, optimizer)
    train(again, called, optimizer, 4, 8)
    return [whole(module), whole(again)]


@pytest.mark.dist
@pytest.mark.parametrize("layout", ["ddp", "fsdp2"])
def test_a_checkpoint_resumes_bit_for_bit(layout: str, tmp_path: Path) -> None:
    for straight, again in run_ranks(resumed, 2, layout, tmp_path):
        for name, value in straight.items():
            np.testing.assert_array_equal(again[name], value, err_msg=name)


def refused(rank: int, world: int, stage: int) -> None:
    from engines import config, engine_of
    from engines import train as train_engine

    with pytest.raises(UnsupportedLayoutError, match=r"params\.stochastic_rounding is true.* Leave it out"):
        engine_of(config(stage, world, SETTINGS, precision="bf16"))
    engine = engine_of(config(stage, world, WITHOUT, precision="bf16"))
    engine.basic_optimizer.param_groups[0]["stochastic_rounding"] = True
    with pytest.raises(ValueError, match=r"stepped in torch\.float32") as error:
        train_engine(engine, 0, 1, rank, world)
    assert "stochastic_rounding" in str(error.value)


def refused_in_bf16(rank: int, world: int, stage: int) -> None:
    from engines import config, engine_of
    from engines import train as train_engine

    bf16 = {"enabled": True, "bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}
    with pytest.raises(UnsupportedLayoutError, match=r"with bf16_master_weights_and_grads, which has no such copies"):
        engine_of(config(stage, world, SETTINGS, precision="bf16", bf16=bf16))
    engine = engine_of(config(stage, world, WITHOUT, precision="bf16", bf16=bf16))
    engine.basic_optimizer.param_groups[0]["stochastic_rounding"] = True
    with pytest.raises(RuntimeError, match=f"not supported under ZeRO-{stage}") as error:
        train_engine(engine, 0, 1, rank, world)
    assert "bf16_master_weights_and_grads" in str(error.value)


@pytest.mark.deepspeed
@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeeds_masters_in_bfloat16_are_refused(stage: int) -> None:
    run_ranks(refused_in_bf16, 2, stage, deepspeed=True)


@pytest.mark.deepspeed
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_deepspeeds_masters_in_float32_are_refused(stage: int) -> None:
    run_ranks(refused, 2, stage, deepspeed=True)
