"""A checkpoint's values are checked before anything changes."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import random
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from checkpoint_runs import content_of, write_manifest
from engines import config, engine_of, masters, train
from ranks import run_ranks
from torch import nn

from adafisher_dist import AdaFisher, CheckpointError, ds, load_checkpoint, save_checkpoint
from adafisher_dist.checkpoint import deepspeed as of_deepspeed
from adafisher_dist.checkpoint import random_state

# ---- nothing changes before all is checked ----


class Counted(nn.Module):
    """Has extra state, and takes only what it knows."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen += 1
        return x

    def get_extra_state(self) -> Any:
        return {"seen": self.seen, "table": torch.tensor([1, 7])}

    def set_extra_state(self, state: Any) -> None:
        self.seen = -1  # half-way
        self.seen = state["seen"] + 0 * int(state["table"].sum())


class Net(nn.Module):
    """With a buffer, a tied parameter, and extra state."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 5, bias=False)
        self.counted, self.again = Counted(), nn.Linear(5, 5, bias=False)
        self.again.weight = self.second.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.again(self.counted(torch.tanh(self.second(self.norm(self.first(x))))))


class Whole:
    """A training with everything that a checkpoint can hold."""

    def __init__(self, seed: int, scheduler: str = "cosine") -> None:
        torch.manual_seed(seed)
        self.model = Net()
        groups = [
            {"params": [p for p in self.model.parameters() if p.dim() > 1], "mine": ("t", 1), "lr": torch.tensor(1e-2)},
            {"params": [p for p in self.model.parameters() if p.dim() == 1], "weight_decay": 0.0},
        ]
        self.optimizer = AdaFisher(groups, lr=1e-2, block_size=4, rows_per_block=2, inverse_update_freq=2)
        schedule = torch.optim.lr_scheduler
        self.scheduler = {
            "cosine": lambda: schedule.CosineAnnealingLR(self.optimizer, 50),
            "plateau": lambda: schedule.ReduceLROnPlateau(self.optimizer),
            "steps": lambda: schedule.MultiStepLR(self.optimizer, [2, 40]),
            "in turn": lambda: schedule.SequentialLR(
                self.optimizer, [schedule.ConstantLR(self.optimizer), schedule.ExponentialLR(self.optimizer, 0.9)], [3]
            ),
        }[scheduler]()

    def step(self, count: int = 1) -> None:
        for _ in range(count):
            self.optimizer.zero_grad()
            loss = self.model(torch.randn(16, 6)).square().mean()
            loss.backward()
            self.optimizer.step()
            plateau = isinstance(self.scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau)
            self.scheduler.step(*([float(loss.detach())] if plateau else []))

    def save(self, path: Path) -> None:
        extra = {
            "step": 3, "t": torch.arange(4.0), "pair": (1, 2), "np": np.float32(2.5), "set": {1, 2}, "k": {1: 2},
            "inf": math.inf, "path": Path("a/b"), "b": b"xy", "ns": Namespace(q=1), "c": 1 + 2j, "n": Counter("aab"),
        }  # fmt: skip
        save_checkpoint(path, self.model, self.optimizer, lr_scheduler=self.scheduler, extra=extra)

    def load(self, path: Path, **more: Any) -> Any:
        return load_checkpoint(path, self.model, self.optimizer, lr_scheduler=self.scheduler, **more)

    def everything(self) -> list[Any]:
        """Whatever a load may change."""
        return [
            dict(self.model.state_dict()), self.optimizer.state_dict(), self.optimizer.skipped_steps,
            [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups],
            self.scheduler.state_dict(), torch.get_rng_state(), np.random.get_state(), random.getstate(),
        ]  # fmt: skip


def digest(*things: Any) -> str:
    """Of every bit."""
    found = hashlib.sha256()

    def feed(thing: Any) -> None:
        if isinstance(thing, torch.Tensor):
            data = thing.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
            found.update(f"{thing.dtype}{tuple(thing.shape)}".encode() + data.tobytes())
        elif isinstance(thing, np.ndarray):
            found.update(f"{thing.dtype}{thing.shape}".encode() + thing.tobytes())
        elif isinstance(thing, dict):
            for key in sorted(thing, key=repr):
                found.update(f"{key!r}:".encode())
                feed(thing[key])
        elif isinstance(thing, list | tuple):
            found.update(f"{type(thing).__name__}{len(thing)}".encode())
            for item in thing:
                feed(item)
        else:
            found.update(f"{type(thing).__name__}{thing!r}".encode())

    feed(list(things))
    return found.hexdigest()


Steps = tuple[Any, ...]  # from a manifest's content to a value in it


def values_in(value: Any, path: Steps = ()) -> Iterator[Steps]:
    """The paths of all JSON values in a value, inner ones too."""
    yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inner:
        yield from values_in(item, (*path, key))


OTHERS = [
    *(None, True, False, 0, 1, 2, 3, -1, 2**31, 2**63, -(2**63), 10**30),
    *(0.5, 1.5, -0.5, 1e300, math.nan, math.inf, -math.inf),
    *("", "x", "1", "torch.float64", "a" * 300, [], [1], [[]], {}, {"x": 1}),
    *({"$tensor": 0}, {"$tensor": -1}, {"$float": "nan"}, {"$float": "inf"}, {"$tuple": [1]}, {"$what": 1}),
]
CHANGES: list[Callable[[Any], Any]] = [
    *(lambda value, other=other: other for other in OTHERS),
    *(lambda value, by=by: value + by if isinstance(value, int | float) else [value] for by in (1, -1, 4, 1000)),
    lambda value: -value if isinstance(value, int | float) else str(value),
    lambda value: str(value) if not isinstance(value, str) else value[1:],
    lambda value: value * 2 if isinstance(value, list | str) else {"x": value},
    lambda value: value[::-1] if isinstance(value, list | str) else float(value) if isinstance(value, int) else [],
    lambda value: value[1:] if isinstance(value, list) else {**value, "more": 1} if isinstance(value, dict) else None,
]
REMOVED = object()
CHANGES.append(lambda value: REMOVED)


def mutant(content: Any, path: Steps, change: Callable[[Any], Any]) -> Any:
    """A copy of the content with one value changed; None where that makes no difference."""
    whole = [copy.deepcopy(content)]
    *before, last = (0, *path)
    holder: Any = whole
    for key in before:
        holder = holder[key]
    other = change(holder[last])
    if other is REMOVED:
        del holder[last]
    elif type(other) is type(holder[last]) and json.dumps(other) == json.dumps(holder[last]):
        return None
    else:
        holder[last] = other
    return whole[0] if whole else {}


def mutants(content: Any, count: int, seed: int) -> Iterator[tuple[Steps, int, Any]]:
    """So many, of all values and changes."""
    draw = random.Random(seed)
    every = [(path, number) for path in values_in(content) for number in range(len(CHANGES))]
    for path, number in draw.sample(every, min(count, len(every))):
        changed = mutant(content, path, CHANGES[number])
        if changed is not None:
            yield path, number, changed


def check_mutants(count: int, seed: int, scheduler: str, folder: Path) -> Counter[str]:
    """Load each; what happened, how often."""
    saved = Whole(1, scheduler)
    saved.step(3)
    saved.save(folder / "saved")
    right = {name: tensor.clone() for name, tensor in saved.model.state_dict().items() if "_extra" not in name}
    bystander = Whole(2, scheduler)
    bystander.step(5)
    bystander.save(folder / "own")
    before, content = digest(bystander.everything()), content_of(folder / "saved")
    outcomes: Counter[str] = Counter()
    problems = []
    for path, number, changed in mutants(content, count, seed):
        write_manifest(folder / "saved", changed)
        what = f"{path} by change {number}"
        try:
            bystander.load(folder / "saved", verify=number % 2 == 0)
        except CheckpointError as error:
            outcomes["refused"] += 1
            if bystander.optimizer._registry.stepper.incomplete or digest(bystander.everything()) != before:
                outcomes["changed state"] += 1
                problems.append(f"{what} changed state: {error}")
                bystander.optimizer._registry.stepper.incomplete = frozenset()
        except Exception as error:
            outcomes["another error"] += 1
            problems.append(f"{what}: {type(error).__name__}: {error}")
        else:
            outcomes["loaded"] += 1
            try:
                for name, tensor in right.items():
                    assert torch.equal(bystander.model.state_dict()[name], tensor), f"{name} is another"
                if not {"settings", "lr_scheduler"} & set(path):  # a huge lr, say, is a lr
                    bystander.step()
                    assert all(p.isfinite().all() for p in bystander.model.parameters()), "not finite"
            except Exception as error:
                outcomes["inconsistent"] += 1
                problems.append(f"{what} loaded, then: {type(error).__name__}: {error}")
        if digest(bystander.everything()) != before:
            bystander = Whole(2, scheduler)
            bystander.load(folder / "own")
            assert digest(bystander.everything()) == before, f"after {what} even a whole checkpoint does not load"
    outcomes["changed state"] += 0
    print(f"{sum(outcomes[k] for k in ('refused', 'another error', 'loaded'))} mutants: {dict(outcomes)}")
    assert not problems, f"{dict(outcomes)}\n" + "\n".join(problems[:40])
    return outcomes


@pytest.mark.parametrize("scheduler", ["cosine", "plateau", "steps", "in turn"])
def test_a_mutated_manifest_changes_nothing_or_loads(scheduler: str, tmp_path: Path) -> None:
    """Its checksum is right, and one value in it is another."""
    outcomes = check_mutants(120, 1, scheduler, tmp_path)
    assert outcomes["refused"] > 50 and outcomes["loaded"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2, 6))
def test_very_many_mutated_manifests(seed: int, tmp_path: Path) -> None:
    outcomes = check_mutants(3000, seed, "cosine" if seed % 2 else "plateau", tmp_path)
    assert outcomes["refused"] > 1000 and outcomes["loaded"] > 0


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

    def wrong() -> torch.Tensor:
        state = json.loads(bytes(capture().numpy()).decode())
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
