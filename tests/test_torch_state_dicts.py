"""State by torch's own API: get_/set_optimizer_state_dict, dcp.save, dcp.load, on any ranks.

What is loaded is compared bit by bit with what `load_checkpoint` makes of a checkpoint of the same
run.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from models import SECOND_GROUP, Odd, Stacked, Tied, batch, model, param_groups
from ranks import run_ranks
from test_fsdp2 import shard_model
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel as DDP

from adafisher_dist import AdaFisher, OptimizerState, load_checkpoint, save_checkpoint
from adafisher_dist.optimizer import state_dicts

pytestmark = pytest.mark.dist

warnings.filterwarnings("ignore", message="torch.distributed is (disabled|unavailable)")

# Every kind of state: shared and diagonal blocks, kept factors, a rounded Fisher.
SETTINGS: dict[str, Any] = {
    **{"block_size": 8, "rows_per_block": 4, "max_blocks": 12, "inverse_update_freq": 2, "fisher_dtype": "bfloat16"},
    **{"lr": 1e-2, "damping": 0.2},
}


class Every(Tied, Stacked):
    """With a weight used twice, one that is not used, and a stack of matrices."""


def build(layout: str, world: int, kind: type[Odd] = Every, **settings: Any) -> tuple[nn.Module, AdaFisher]:
    """The model in its layout, and a fresh optimizer of two param groups."""
    if layout in ("FSDP2", "HSDP"):
        module: nn.Module = shard_model(kind, 2 if layout == "HSDP" else 1, world)
    else:
        module = model(kind=kind)
    if layout == "DDP":
        module = DDP(module, find_unused_parameters=True)
    return module, AdaFisher(param_groups(module), **{**SETTINGS, **settings})


def steps(module: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int, rank: int, world: int) -> None:
    for step in range(first, last):
        optimizer.zero_grad()
        x, y = batch(step, rank, world)
        nn.functional.mse_loss(module(x), y).backward()
        optimizer.step()


Held = dict[str, dict[str, np.ndarray]]


def held(module: nn.Module, optimizer: AdaFisher) -> Held:
    """The state's bits by parameter name: all of it under DDP, what this rank owns under FSDP2."""
    names = [name for group in optimizer.param_groups for p in group["params"] for name, q in named(module) if q is p]
    if isinstance(module, DDP):
        optimizer.consolidate_state_dict(to=None)
    return {
        names[number]: {key: np.frombuffer(bits(key, value), np.uint8) for key, value in entry.items() if value.numel()}
        for number, entry in optimizer.state_dict()["state"].items()
    }


def bits(key: str, value: torch.Tensor) -> bytes:
    if key.startswith("fisher") and value.dim() == 3:
        value = value.tril()  # nothing reads the rest
    return value.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def assert_same(found: Held, right: Held) -> None:
    for name, entry in right.items():
        assert found[name].keys() == entry.keys(), name
        for key, value in entry.items():
            assert np.array_equal(found[name][key], value), f"{name} {key}"
    assert set(found) - set(right) <= {"unused"}  # torch's functions make a state for what had no gradient yet
    for name in set(found) - set(right):
        assert not any(value.any() for value in found[name].values())


def options(**chosen: bool) -> StateDictOptions:
    return StateDictOptions(**chosen)


# ---- the ways of torch: how to save, and how to load into a fresh optimizer ----


def save_plain(folder: Path, module: nn.Module, optimizer: AdaFisher) -> None:
    dcp.save({"optim": get_optimizer_state_dict(module, optimizer)}, checkpoint_id=folder)


def load_plain(folder: Path, module: nn.Module, optimizer: AdaFisher) -> None:
    room = {"optim": get_optimizer_state_dict(module, optimizer)}
    dcp.load(room, checkpoint_id=folder)
    set_optimizer_state_dict(module, optimizer, room["optim"])


def save_flat(folder: Path, module: nn.Module, optimizer: AdaFisher) -> None:  # as torchtitan does
    flat = options(flatten_optimizer_state_dict=True, cpu_offload=True)
    dcp.save({"optim": get_optimizer_state_dict(module, optimizer, options=flat)}, checkpoint_id=folder)


def load_flat(folder: Path, module: nn.Module, optimizer: AdaFisher) -> None:
    flat = options(flatten_optimizer_state_dict=True)
    room = {"optim": get_optimizer_state_dict(module, optimizer, options=flat)}
    dcp.load(room, checkpoint_id=folder)
    set_optimizer_state_dict(module, optimizer, room["optim"], options=flat)


def save_full(folder: Path, module: nn.Module, optimizer: AdaFisher) -> None:
    whole = get_optimizer_state_dict(module, optimizer, options=options(full_state_dict=True, cpu_offload=True))
    if not dist.is_initialized() or dist.get_rank() == 0:
        torch.save(whole, folder.with_suffix(".pt"))


def load_full(folder: Path, module: nn.Module, optimizer: AdaFisher) -> None:
    whole = torch.load(folder.with_suffix(".pt"), weights_only=True)
    set_optimizer_state_dict(module, optimizer, whole, options=options(full_state_dict=True))


def load_broadcast(folder: Path, module: nn.Module, optimizer: AdaFisher) -> None:
    """As Accelerate does: rank 0 alone reads."""
    first = not dist.is_initialized() or dist.get_rank() == 0
    whole = torch.load(folder.with_suffix(".pt"), weights_only=True) if first else {}
    broadcast = options(full_state_dict=True, broadcast_from_rank0=dist.is_initialized())
    set_optimizer_state_dict(module, optimizer, whole, options=broadcast)


def save_itself(folder: Path, module: nn.Module, optimizer: AdaFisher) -> None:
    dcp.save({"optim": optimizer}, checkpoint_id=folder)


def load_itself(folder: Path, module: nn.Module, optimizer: AdaFisher) -> None:
    dcp.load({"optim": optimizer}, checkpoint_id=folder)


def save_stateful(folder: Path, module: nn.Module, optimizer: AdaFisher) -> None:
    dcp.save({"optim": OptimizerState(module, optimizer)}, checkpoint_id=folder)


def load_stateful(folder: Path, module: nn.Module, optimizer: AdaFisher) -> None:
    dcp.load({"optim": OptimizerState(module, optimizer)}, checkpoint_id=folder)


Way = Callable[[Path, nn.Module, AdaFisher], None]
SAVE: dict[str, Way] = {
    **{"plain": save_plain, "flat": save_flat, "full": save_full, "itself": save_itself, "stateful": save_stateful},
}
LOAD: dict[str, tuple[str, Way]] = {  # by name: what it loads, and how
    "plain": ("plain", load_plain),
    "flat": ("flat", load_flat),
    "full": ("full", load_full),
    "broadcast": ("full", load_broadcast),
    "itself": ("itself", load_itself),
    "stateful": ("stateful", load_stateful),
}


def saving(rank: int, world: int, layout: str, folder: Path) -> None:
    module, optimizer = build(layout, world)
    get_optimizer_state_dict(module, optimizer)  # asked while it is fresh, which must change nothing
    twin, asked_nothing = build(layout, world)
    for m, o in ((module, optimizer), (twin, asked_nothing)):
        steps(m, o, 0, 5, rank, world)
    assert_same(held(module, optimizer), held(twin, asked_nothing))
    assert {name for name, _ in named(module)} - set(held(module, optimizer)) == {"unused", "frozen"}
    save_checkpoint(folder / "ours", module, optimizer)
    for name, way in SAVE.items():
        if layout == "DDP" and name != "stateful":
            optimizer.consolidate_state_dict(to=None)
        way(folder / name, module, optimizer)
    before = weights_of(module)
    steps(module, optimizer, 5, 8, rank, world)  # whatever was asked, the training goes on the same
    steps(twin, asked_nothing, 5, 8, rank, world)
    assert_same(held(module, optimizer), held(twin, asked_nothing))
    for name, (saved, load) in LOAD.items():
        again, resumed = build(layout, world, lr=5.0)
        set_weights(again, before)
        load(folder / saved, again, resumed)
        steps(again, resumed, 5, 8, rank, world)
        assert_same(held(again, resumed), held(module, optimizer))
        assert all(np.array_equal(a, weights_of(module)[key]) for key, a in weights_of(again).items()), name
        assert [group["lr"] for group in resumed.param_groups] == [1e-2, SECOND_GROUP["lr"]]


def named(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name.removeprefix("module."), p) for name, p in module.named_parameters()]


def weights_of(module: nn.Module) -> dict[str, np.ndarray]:
    """What is here of the weights."""
    here = ((name, p.to_local() if hasattr(p, "to_local") else p) for name, p in named(module))
    return {name: p.detach().numpy().copy() for name, p in here}


def set_weights(module: nn.Module, values: dict[str, np.ndarray]) -> None:
    for name, p in named(module):
        here = p.to_local() if hasattr(p, "to_local") else p
        here.detach().copy_(torch.from_numpy(values[name]))


SAVED = [("one process", 1), ("DDP", 2), ("FSDP2", 3), ("HSDP", 4)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {}
    for layout, world in SAVED:
        folder = tmp_path_factory.mktemp("saved")
        run_ranks(saving, world, layout, folder, timeout=250)
        found[f"{layout} {world}"] = folder
    return found


def test_a_resume_is_bit_for_bit(folders: dict[str, Path]) -> None:
    assert len(folders) == len(SAVED)  # `saving` has compared them


# What is common to all sources needs no other test with each of them.
ALWAYS = ("plain", "full", "stateful")


def loading(rank: int, world: int, layout: str, folders: dict[str, Path]) -> None:
    for source, folder in folders.items():
        module, optimizer = build(layout, world)
        load_checkpoint(folder / "ours", module, optimizer)
        right = held(module, optimizer)
        assert right
        for name, (saved, load) in LOAD.items():
            if name not in ALWAYS and not source.startswith("FSDP2"):
                continue
            again, resumed = build(layout, world, lr=5.0)
            load(folder / saved, again, resumed)
            try:
                assert_same(held(again, resumed), right)
            except AssertionError as error:
                raise AssertionError(f"{source} → {layout} {world}, {name}: {error}") from error
            assert [group["lr"] for group in resumed.param_groups] == [1e-2, SECOND_GROUP["lr"]]


@pytest.mark.parametrize(
    ("layout", "world"),
    [
        *(("one process", 1), ("DDP", 3), ("FSDP2", 1), ("FSDP2", 4)),
        *(pytest.param("FSDP2", 2, marks=pytest.mark.slow), pytest.param("HSDP", 4, marks=pytest.mark.slow)),
    ],
)
def test_any_layout_loads_what_any_other_saved(layout: str, world: int, folders: dict[str, Path]) -> None:
    run_ranks(loading, world, layout, folders, timeout=250)


def test_model_and_optimizer_together_in_one_process(tmp_path: Path) -> None:
    for flat in (False, True):
        chosen = options(flatten_optimizer_state_dict=flat, cpu_offload=True)
        module, optimizer = build("one process", 1)
        steps(module, optimizer, 0, 4, 0, 1)
        weights, state = get_state_dict(module, optimizer, options=chosen)
        dcp.save({"model": weights, "optim": state}, checkpoint_id=tmp_path / str(flat))
        steps(module, optimizer, 4, 6, 0, 1)
        again, resumed = build("one process", 1)
        nn.init.zeros_(again.get_parameter("inner.weight"))
        room_of_weights, room_of_state = get_state_dict(again, resumed, options=chosen)
        room = {"model": room_of_weights, "optim": room_of_state}
        dcp.load(room, checkpoint_id=tmp_path / str(flat))
        set_state_dict(again, resumed, model_state_dict=room["model"], optim_state_dict=room["optim"], options=chosen)
        steps(again, resumed, 4, 6, 0, 1)
        assert_same(held(again, resumed), held(module, optimizer))


# ---- what cannot be carried is refused ----


def test_a_flat_state_that_finds_no_names_is_refused() -> None:
    flat = options(flatten_optimizer_state_dict=True)
    module, optimizer = build("one process", 1)
    steps(module, optimizer, 0, 2, 0, 1)
    saved = get_optimizer_state_dict(module, optimizer, options=flat)
    again, resumed = build("one process", 1)
    again(batch(0, 0, 1)[0]).sum().backward()  # torch makes no state then, and its flat state dicts lose AdamW's
    with pytest.raises(ValueError, match=r"brought no state for .*Call get_optimizer_state_dict"):
        set_optimizer_state_dict(again, resumed, saved, options=flat)
    get_optimizer_state_dict(again, resumed)
    set_optimizer_state_dict(again, resumed, saved, options=flat)
    assert_same(held(again, resumed), held(module, optimizer))


def test_a_state_that_was_rounded_on_the_way_is_refused(tmp_path: Path) -> None:
    module, optimizer = build("one process", 1, fisher_dtype=torch.float32)
    steps(module, optimizer, 0, 2, 0, 1)
    for name in ("plain", "stateful"):
        SAVE[name](tmp_path / name, module, optimizer)
        again, resumed = build("one process", 1, fisher_dtype=torch.bfloat16)
        with pytest.raises(ValueError, match=r"is torch\.bfloat16, and the settings .* fisher_dtype that it was saved"):
            LOAD[name][1](tmp_path / name, again, resumed)


def test_settings_come_back_by_name(tmp_path: Path) -> None:
    module = model(kind=Tied)
    rates = {name: 1e-2 if "weight" in name else 3e-2 for name, _ in module.named_parameters()}
    groups = [{"params": [p], "lr": rates[name], "note": {"of": name}} for name, p in module.named_parameters()]
    optimizer = AdaFisher(groups, **SETTINGS)
    steps(module, optimizer, 0, 2, 0, 1)
    save_stateful(tmp_path, module, optimizer)
    again = model(kind=Tied)
    other_order = [{"params": [p], "lr": torch.tensor(5.0)} for p in reversed(list(again.parameters()))]
    resumed = AdaFisher(other_order, **SETTINGS)
    own = [group["lr"] for group in resumed.param_groups]
    load_stateful(tmp_path, again, resumed)
    names = {p: name for name, p in again.named_parameters()}
    for group, lr in zip(resumed.param_groups, own, strict=True):
        name = names[group["params"][0]]
        assert group["lr"] is lr and lr == torch.tensor(rates[name]) and group["note"] == {"of": name}
    assert_same(held(again, resumed), held(module, optimizer))
    whole = model(kind=Tied)
    together = AdaFisher(whole.parameters(), **SETTINGS)
    with pytest.raises(
        ValueError, match=r"parameters of one param group, as scale, were saved with different settings"
    ):
        load_stateful(tmp_path, whole, together)
    optimizer.param_groups[0]["note"] = torch.ones(2)
    with pytest.raises(TypeError, match="holds a tensor, other than lr"):
        OptimizerState(module, optimizer).state_dict()


def unconsolidated(rank: int, world: int) -> None:
    module, optimizer = build("DDP", world)
    if rank == 0:
        get_optimizer_state_dict(module, optimizer)  # on one rank, before the first step: forgotten by then
    steps(module, optimizer, 0, 2, rank, world)
    for chosen in (options(), options(flatten_optimizer_state_dict=True), options(full_state_dict=True)):
        with pytest.raises(RuntimeError, match=r"consolidate_state_dict\(to=None\) on all ranks.*OptimizerState"):
            get_optimizer_state_dict(module, optimizer, options=chosen)
    optimizer.consolidate_state_dict(to=0)
    if rank == 0:
        assert len(get_optimizer_state_dict(module, optimizer)["state"]) == len(optimizer.state)
    steps(module, optimizer, 2, 3, rank, world)


def test_under_ddp_a_state_has_to_be_consolidated() -> None:
    run_ranks(unconsolidated, 2)


def one_rank_fails(rank: int, world: int) -> None:
    module, optimizer = build("FSDP2", world)
    steps(module, optimizer, 0, 2, rank, world)
    right = held(module, optimizer)
    saved = get_optimizer_state_dict(module, optimizer)
    make_room = state_dicts.dtensor_room
    if rank == 1:
        state_dicts.dtensor_room = no_room
    with pytest.raises((MemoryError, RuntimeError), match=r"no room|rank 1 failed to make room"):
        get_optimizer_state_dict(module, optimizer)
    state_dicts.dtensor_room = make_room
    name, key = "inner.weight", "step"
    good = saved["state"][name][key]
    if rank == 1:
        saved["state"][name][key] = torch.zeros(7)
    with pytest.raises((ValueError, RuntimeError), match=r"step has shape|rank 1 failed before it took over"):
        set_optimizer_state_dict(module, optimizer, saved)
    assert_same(held(module, optimizer), right)
    saved["state"][name][key] = good
    key = next(key for key in saved["state"][name] if key.startswith("momentum"))
    spread = saved["state"][name][key]
    saved["state"][name][key] = spread.redistribute(placements=[Shard(2)])
    with pytest.raises(ValueError, match=r"is a DTensor with placements \(Shard\(dim=2\),\) over 2 rank"):
        set_optimizer_state_dict(module, optimizer, saved)
    optimizer.state[module.inner.weight][key] = spread
    with pytest.raises(ValueError, match="does not fit"):
        optimizer.state_dict()
    saved["state"][name][key] = spread
    set_optimizer_state_dict(module, optimizer, saved)
    assert_same(held(module, optimizer), right)


def no_room(*_: object) -> None:
    raise MemoryError("no room")


def test_an_error_of_one_rank_reaches_the_others() -> None:
    run_ranks(one_rank_fails, 2)


def zero(rank: int, world: int) -> None:
    from engines import config, engine_of, train

    engine = engine_of(config(1, world), model())
    train(engine, 0, 1, rank, world)
    with pytest.raises(RuntimeError, match=r"cannot carry AdaFisher's state under ZeRO.*ds\.save_checkpoint"):
        OptimizerState(engine.module, engine.basic_optimizer).state_dict()
    with pytest.raises(ValueError, match="For a DeepSpeed engine use"):
        OptimizerState(engine, engine.basic_optimizer).state_dict()


@pytest.mark.deepspeed
def test_zero_is_refused() -> None:
    run_ranks(zero, 1, deepspeed=True)


# ---- parameters that take the places of others, on several ranks ----


def give_gradients(optimizer: AdaFisher, step: int) -> None:
    """The same on all ranks, whatever stands in the groups."""
    generator = torch.Generator().manual_seed(step)
    for group in optimizer.param_groups:
        for p in group["params"]:
            grad = torch.randn(p.shape, generator=generator)
            p.grad = distribute_tensor(grad, p.device_mesh, p.placements) if isinstance(p, DTensor) else grad


def replaced(rank: int, world: int, layout: str) -> None:
    (_, optimizer), (_, reference) = (build(layout, world, Odd) for _ in range(2))
    for step in range(3):
        for o in (optimizer, reference):
            give_gradients(o, step)
            o.step()
    for group in optimizer.param_groups:
        for index, old in enumerate(group["params"]):
            if index % 2 == 0:
                group["params"][index] = new = nn.Parameter(old.detach().clone())
                optimizer.state[new] = {key: value.clone() for key, value in optimizer.state.pop(old).items()}
    for step in range(3, 5):
        for o in (optimizer, reference):
            give_gradients(o, step)
            o.step()
    for ours, theirs in zip(optimizer.param_groups, reference.param_groups, strict=True):
        for p, q in zip(ours["params"], theirs["params"], strict=True):
            assert torch.equal(*(t.to_local() if layout == "FSDP2" else t for t in (p, q)))
            assert optimizer.state[p].keys() == reference.state[q].keys()
            assert all(torch.equal(value, reference.state[q][key]) for key, value in optimizer.state[p].items())


@pytest.mark.parametrize("layout", ["replicated", "FSDP2"])
def test_replaced_parameters_keep_their_state_on_several_ranks(layout: str) -> None:
    run_ranks(replaced, 2, layout)


# ---- Accelerate ----


def accelerate(rank: int, world: int, kind: str, folder: Path) -> None:
    from accelerate import FullyShardedDataParallelPlugin
    from accelerate.utils import fsdp_utils

    fsdp_utils.logger = logging.getLogger(__name__)  # Accelerate's own asks for an Accelerator
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, state_dict_type=kind)
    accelerator = SimpleNamespace(process_index=rank, wait_for_everyone=dist.barrier)  # on CPUs it does no FSDP itself
    module, optimizer = build("FSDP2", world)
    if world == 2:
        steps(module, optimizer, 0, 3, rank, world)
        fsdp_utils.save_fsdp_optimizer(plugin, accelerator, optimizer, module, folder)
        save_checkpoint(folder / "ours", module, optimizer)
    else:
        load_checkpoint(folder / "ours", module, optimizer)
    again, resumed = build("FSDP2", world, lr=5.0)
    fsdp_utils.load_fsdp_optimizer(plugin, accelerator, resumed, again, folder)
    assert_same(held(again, resumed), held(module, optimizer))
    assert [group["lr"] for group in resumed.param_groups] == [1e-2, SECOND_GROUP["lr"]]


@pytest.mark.parametrize("kind", ["FULL_STATE_DICT", "SHARDED_STATE_DICT"])
def test_accelerate_saves_and_loads_under_fsdp2(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="the extra 'hf' is not installed")
    for world in (2, 3):
        run_ranks(accelerate, world, kind, tmp_path)
