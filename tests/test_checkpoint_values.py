"""A checkpoint's values are checked before anything changes."""

from __future__ import annotations

import copy
import json
import math
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from checkpoint_runs import content_of, write_manifest
from engines import config, engine_of, masters, train
from mutants import Steps, load_mutants
from ranks import run_ranks
from tally import Tally
from whole_runs import Whole, digest

from adafisher_dist import CheckpointError, ds
from adafisher_dist.checkpoint import deepspeed as of_deepspeed
from adafisher_dist.checkpoint import random_state

# ---- nothing changes before all is checked ----


def test_a_mutated_manifest_changes_nothing_or_loads(tmp_path: Path) -> None:
    """Its checksum is right, and one value in it is another."""
    tally = Tally()
    load_mutants(120, 1, "cosine", tmp_path, tally)
    tally.check()
    assert tally.outcomes["refused"] > 50 and tally.outcomes["loaded"] > 0


REFUSED: dict[str, tuple[Steps, Any, str]] = {
    "a setting out of bounds": (("optimizer", "groups", 0, "settings", "momentum"), 1.5, "momentum should be"),
    "a setting of another type": (("optimizer", "groups", 1, "settings", "damping"), "much", "damping should be"),
    "a step that is no number": (("optimizer", "state", "first.weight", "step"), "3", "step of the state of first"),
    "a step past int64": (("optimizer", "state", "first.weight", "step"), 2**63, "below 2\\*\\*62"),
    "more updates than steps": (("optimizer", "state", "first.weight", "fisher_updates"), 9, "between 1 and its 3"),
    "skipped steps below 0": (("optimizer", "skipped_steps"), -1, "skipped_steps of optimizer should be"),
    "other blocks": (("optimizer", "state", "first.weight", "structure", "block_size"), 0, "block_size of structure"),
    "no such dtype": (("model", "parameters", "first.weight", "dtype"), "torch.float33", "should be a dtype of torch"),
    "a world of its own": (("world_size",), 0, "world_size of about should be"),
    "a scheduler's state": (("values", "lr_scheduler", "state", "last_epoch"), "x", "'last_epoch' should be a number"),
    "rates": (("values", "lr_scheduler", "state", "base_lrs"), [0.1], "'base_lrs' should be 2 finite numbers"),
    "extra state": (("model", "extra_state", "counted"), {"seen": 1}, "extra state of counted cannot be restored"),
    "a dimension to be cut": (
        ("model", "parameters", "first.weight", "parts"), {"dim": 2, "count": 2}, "below its 2 dimensions"
    ),
    "more parts than files": (
        ("model", "parameters", "first.weight", "parts"), {"dim": 0, "count": 2}, "at most 1, as there are files"
    ),
    "one part": (("model", "parameters", "first.weight", "parts"), {"dim": 0, "count": 1}, "a whole number from 2 on"),
    "parts that are none": (("model", "parameters", "first.weight", "parts"), [0, 2], "parts of parameter first.wei"),
    "a tensor before the first": (("values", "extra", "t"), {"$tensor": -1}, "A value is tensor -1"),
}  # fmt: skip


@pytest.mark.parametrize(("path", "value", "message"), REFUSED.values(), ids=REFUSED)
def test_each_kind_of_value_is_checked(path: Steps, value: Any, message: str, tmp_path: Path) -> None:
    """Before anything changes; the error says what is wrong with it."""
    saved, bystander = Whole(1), Whole(2)
    saved.step(3)
    saved.save(tmp_path / "a")
    bystander.step(5)
    before, content = digest(bystander.everything()), content_of(tmp_path / "a")
    holder = content["about"]
    for key in path[:-1]:
        holder = holder[key]
    holder[path[-1]] = value
    write_manifest(tmp_path / "a", content)
    with pytest.raises(CheckpointError, match=message) as caught:
        bystander.load(tmp_path / "a")
    assert str(tmp_path / "a") in str(caught.value)
    assert digest(bystander.everything()) == before and not bystander.optimizer._registry.stepper.incomplete


@pytest.mark.parametrize("which", ["torch", "numpy", "python"])
def test_a_random_state_that_is_none(which: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is in a shard, whose checksum is right."""

    def wrong(model: Sequence[torch.Tensor]) -> torch.Tensor:
        state = json.loads(bytes(capture(model).numpy()).decode())
        if which == "torch":
            state["torch"] = {"$bytes": ""}
        elif which == "numpy":
            state["numpy"]["state"]["pos"] = 10**6
        else:
            state["python"]["$tuple"][1]["$tuple"].pop()
        return torch.frombuffer(bytearray(json.dumps(state).encode()), dtype=torch.uint8)

    capture = random_state.capture
    saved, bystander = Whole(1), Whole(2)
    saved.step(3)
    monkeypatch.setattr(random_state, "capture", wrong)
    saved.save(tmp_path / "a")
    before = digest(bystander.everything())
    with pytest.raises(CheckpointError, match="the state of the random number generators is none"):
        bystander.load(tmp_path / "a")
    assert digest(bystander.everything()) == before


def one_rank_cannot_take_it(rank: int, world: int, root: str) -> str:
    """The extra state fails on rank 1 alone, after rank 0 has taken it."""
    run = Whole(1)
    run.step(3)
    run.save(Path(root) / "a")
    run.model.counted.seen = 50
    run.optimizer.consolidate_state_dict(to=None)
    before = digest(run.everything())

    def refuse(state: Any) -> None:
        raise OSError("not here")

    if rank == 1:
        run.model.counted.set_extra_state = refuse
    with pytest.raises(CheckpointError, match="not here") as caught:
        run.load(Path(root) / "a")
    run.optimizer.consolidate_state_dict(to=None)
    assert digest(run.everything()) == before and run.model.counted.seen == 50
    return str(caught.value)


@pytest.mark.dist
def test_extra_state_that_one_rank_cannot_take(tmp_path: Path) -> None:
    """All put back what they had."""
    first, second = run_ranks(one_rank_cannot_take_it, 2, str(tmp_path), timeout=60)
    assert first.startswith("Rank 1 failed, so all stop.") and "Nothing was changed" in second


def test_a_scheduler_that_cannot_be_copied(tmp_path: Path) -> None:
    """Its state is tried in place, and put back."""
    saved, bystander = Whole(1), Whole(2)
    saved.step(3)
    saved.save(tmp_path / "a")
    bystander.scheduler.pipe = (x for x in "ab")
    bystander.scheduler.state_dict = lambda: {
        k: v for k, v in vars(bystander.scheduler).items() if k not in ("optimizer", "pipe", "state_dict")
    }
    assert bystander.load(tmp_path / "a") and bystander.scheduler.last_epoch == 3
    content = content_of(tmp_path / "a")
    content["about"]["optimizer"]["groups"][0]["settings"]["eps"] = -1.0
    write_manifest(tmp_path / "a", content)
    bystander.step()
    before = digest(bystander.everything())
    with pytest.raises(CheckpointError, match="eps should be"):
        bystander.load(tmp_path / "a")
    assert digest(bystander.everything()) == before


# ---- DeepSpeed's engine ----


def test_a_fixed_loss_scale_has_no_last_overflow() -> None:
    """A dynamic scale ignores the missing value, and what is no part of a loss scale."""
    scaler = Namespace(dynamic=True, cur_scale=4.0, cur_iter=7, last_overflow_iter=-1, step=len)
    engine = Namespace(
        optimizer=Namespace(loss_scaler=scaler), fp16_enabled=lambda: True, training_dataloader=None,
        random_ltd_enabled=lambda: False,
    )  # fmt: skip
    saved = {"cur_scale": 2.0, "cur_iter": 3, "last_overflow_iter": None, "step": 1}
    assert of_deepspeed._checked(engine, {"loss_scale": saved}, True, True) == []
    of_deepspeed._restore_loss_scale(engine, saved)
    assert (scaler.cur_scale, scaler.cur_iter, scaler.last_overflow_iter, scaler.step) == (2.0, 3, -1, len)


OF_THE_ENGINE: dict[str, tuple[Steps, Any, str]] = {
    "a counter below 0": (("values", "engine", "global_steps"), -1, "global_steps of the engine should be"),
    "a counter that is no number": (
        ("values", "engine", "skipped_steps"),
        "x",
        "skipped_steps of the engine should be",
    ),
    "no counters": (("values", "engine"), [3], "engine should be a dict"),
    "the step": (("step",), math.nan, "step of about should be"),
    "the loss scale": (("values", "loss_scale"), {"cur_scale": 0.0}, "the loss scale should be a positive number"),
    "its iteration": (("values", "loss_scale"), {"cur_iter": 2**63}, "cur_iter of the loss scale should be"),
}


def loads_wrong_values(rank: int, world: int, root: str) -> None:
    engine = engine_of(config(2, world, precision="bf16"))
    train(engine, 0, 2, rank, world)
    ds.save_checkpoint(engine, root, "a")
    whole = content_of(Path(root) / "a")
    train(engine, 2, 4, rank, world)

    def state() -> str:
        return digest(dict(masters(engine)), engine.global_steps, engine.global_samples, engine.skipped_steps)

    before = state()
    for path, value, message in OF_THE_ENGINE.values():
        content = copy.deepcopy(whole)
        holder = content["about"]
        for key in path[:-1]:
            holder = holder[key]
        holder[path[-1]] = value
        dist.barrier()
        if rank == 0:
            write_manifest(Path(root) / "a", content)
        dist.barrier()
        with pytest.raises(CheckpointError, match=message):
            ds.load_checkpoint(engine, root, "a")
        assert state() == before
    dist.barrier()
    if rank == 0:
        write_manifest(Path(root) / "a", whole)
    dist.barrier()
    ds.load_checkpoint(engine, root, "a")
    assert engine.global_steps == 2


@pytest.mark.dist
@pytest.mark.deepspeed
def test_what_is_of_the_engine_is_checked(tmp_path: Path) -> None:
    """Its counters, and what the loss scale has learnt: before the weights change."""
    run_ranks(loads_wrong_values, 2, str(tmp_path), deepspeed=True)
