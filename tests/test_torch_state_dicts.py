"""The state by torch's own means: get_/set_optimizer_state_dict, dcp.save and dcp.load, at any number of ranks.

What is loaded is compared bit by bit with what `load_checkpoint` makes of a checkpoint of the same run.
"""

from __future__ import annotations

import copy
import inspect
import io
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from models import Odd, Tied, batch, distance, model, param_groups, weights
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
from torch.nn.parallel import DistributedDataParallel as DDP

import adafisher_dist
from adafisher_dist import AdaFisher, OptimizerState, load_checkpoint, save_checkpoint

pytestmark = pytest.mark.dist

warnings.filterwarnings("ignore", message="torch.distributed is (disabled|unavailable)")

# Every kind of state: shared and diagonal blocks, kept factors, a rounded Fisher.
SETTINGS: dict[str, Any] = {
    **{"block_size": 8, "rows_per_block": 4, "max_blocks": 12, "inverse_update_freq": 2, "fisher_dtype": "bfloat16"},
    **{"lr": 1e-2, "damping": 0.2},
}


def build(layout: str, world: int, kind: type[Odd] = Tied, **settings: Any) -> tuple[nn.Module, AdaFisher]:
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
    """The state bit by bit, by the parameters' names: under DDP the whole, under FSDP2 what this rank owns."""
    names = [name for group in optimizer.param_groups for p in group["params"] for name, q in named(module) if q is p]
    if isinstance(module, DDP):
        optimizer.consolidate_state_dict(to=None)
    return {
        names[number]: {key: np.frombuffer(bits(value), np.uint8) for key, value in entry.items() if value.numel()}
        for number, entry in optimizer.state_dict()["state"].items()
    }


def bits(value: torch.Tensor) -> bytes:
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
        assert [group["lr"] for group in resumed.param_groups] == [1e-2, 2e-2]


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


def loading(rank: int, world: int, layout: str, folders: dict[str, Path]) -> None:
    for source, folder in folders.items():
        module, optimizer = build(layout, world)
        load_checkpoint(folder / "ours", module, optimizer)
        right = held(module, optimizer)
        assert right
        for name, (saved, load) in LOAD.items():
            again, resumed = build(layout, world, lr=5.0)
            load(folder / saved, again, resumed)
            try:
                assert_same(held(again, resumed), right)
            except AssertionError as error:
                raise AssertionError(f"{source} → {layout} {world}, {name}: {error}") from error
            assert [group["lr"] for group in resumed.param_groups] == [1e-2, 2e-2]


@pytest.mark.parametrize(
    ("layout", "world"), [("one process", 1), ("DDP", 3), ("FSDP2", 1), ("FSDP2", 2), ("FSDP2", 4), ("HSDP", 4)]
)
def test_any_layout_loads_what_any_other_saved(layout: str, world: int, folders: dict[str, Path]) -> None:
    run_ranks(loading, world, layout, folders, timeout=250)
