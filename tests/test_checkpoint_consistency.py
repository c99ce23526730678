"""A load gives a whole checkpoint, or fails and changes nothing; a failed save's error is true."""

from __future__ import annotations

import copy
import errno
import hashlib
import json
import math
import os
import random
import resource
import shutil
import signal
import sys
import threading
import time
import zlib
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from checkpoint_runs import (
    Child,
    Digests,
    Run,
    Tell,
    before_each_change,
    children,
    failing,
    leftovers,
    nth,
    trained,
    visible,
)  # fmt: skip
from engines import config, engine_of, masters, train
from ranks import run_ranks
from safetensors.torch import load_file
from torch import nn
from typer.testing import CliRunner

from adafisher_dist import AdaFisher, CheckpointError, ds, load_checkpoint, save_checkpoint
from adafisher_dist.checkpoint import deepspeed as of_deepspeed
from adafisher_dist.checkpoint import directory, loading, random_state
from adafisher_dist.checkpoint.directory import CheckpointDirectory
from adafisher_dist.checkpoint.manifest import MANIFEST, read
from adafisher_dist.checkpoint.open_checkpoint import OpenCheckpoint
from adafisher_dist.tools.cli import app
from adafisher_dist.tools.export import export_weights

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


def write_manifest(folder: Path, content: Any) -> None:
    """With the right checksum."""
    crc32 = zlib.crc32(json.dumps(content, sort_keys=True, separators=(",", ":")).encode())
    (folder / MANIFEST).write_text(json.dumps({"crc32": f"{crc32:08x}", "content": content}))


def content_of(folder: Path) -> Any:
    return json.loads((folder / MANIFEST).read_bytes())["content"]


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
    "a tensor before the first": (("values", "extra", "t"), {"$tensor": -1}, "A value is tensor -1"),
}


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


# ---- a load gives one step, or an error ----


def acting_at(number: int, act: Callable[[], None]) -> list[str]:
    """Call `act` right before this process opens its n-th path to read; returns names as opened."""
    names: list[str] = []
    busy: list[bool] = []

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and not busy and isinstance(arguments[2], int) and not arguments[2] & os.O_WRONLY:
            names.append(Path(str(arguments[0])).name)
            if len(names) == number:
                busy.append(True)
                act()
                busy.clear()

    sys.addaudithook(hook)
    return names


def loads_beside(act: Callable[[Path], None], verify: bool, two: Path, folder: Path) -> Counter[str]:
    """Outcomes of loads of step2: in the n-th load, `act` runs before the n-th path is opened."""
    outcomes: Counter[str] = Counter()
    for number in range(1, 100):
        root = Path(shutil.copytree(two, folder / str(number)))

        def work(tell: Tell, number: int = number, root: Path = root) -> None:
            run = Run().train(5)
            before = run.digest()
            names = acting_at(number, lambda: act(root))
            try:
                step = run.load(root / "step2", verify=verify)
                assert run.digest() == Digests()[step], f"neither step, at {number}"
                tell(f"step {step}")
            except CheckpointError as error:
                assert run.digest() == before, error
                tell("refused" if "load again" in str(error) else f"{error}")
            tell(str(len(names)))

        _, (outcome, opened) = Child(work).end()
        outcomes[outcome] += 1
        if int(opened) < number:
            break
    assert number > 3
    return outcomes


@pytest.mark.parametrize("verify", [True, False])
def test_the_tag_is_replaced_beside_a_load(verify: bool, two: Path, folder: Path) -> None:
    """Whenever that is, the load gives the old one or the new one, whole."""
    outcomes = loads_beside(lambda root: trained(3).save(root / "step2", 3), verify, two, folder)
    assert outcomes.keys() == {"step 2", "step 3"}, outcomes


@pytest.mark.parametrize("verify", [True, False])
def test_the_checkpoint_is_deleted_beside_a_load(verify: bool, two: Path, folder: Path) -> None:
    """By keep_last, for which an older one is loaded."""

    def rotate(root: Path) -> None:
        trained(3).save(root / "step3", 3, keep_last=1)

    outcomes = loads_beside(rotate, verify, two, folder)
    assert sum(" is no checkpoint of " in outcome for outcome in outcomes) <= 1, "but where it was gone from the start"
    assert outcomes["step 2"] and outcomes["refused"] and len(outcomes) <= 3, outcomes


def saves_for_ever(root: Path, tell: Tell) -> None:
    """A saver that fills the weights with its step's number, and replaces the tag."""
    run, step = Run(), 0
    while True:
        step += 1
        for parameter in run.module.parameters():
            parameter.data.fill_(float(step))
        run.save(root / "tag", step)
        if step == 1:
            tell("there")
        time.sleep(0.01)


def loads_of(root: Path, seconds: float) -> Counter[str]:
    """What loads beside it give, by turns with and without checksums."""
    run, outcomes, end, number = Run(), Counter[str](), time.monotonic() + seconds, 0
    while time.monotonic() < end:
        number += 1
        try:
            step = run.load(root / "tag", verify=number % 2 == 0)
            weights = {float(value) for p in run.module.parameters() for value in p.flatten()}
            outcomes["right" if weights == {float(step)} else f"extra of {step}, weights of {weights}"] += 1
        except CheckpointError as error:
            outcomes["refused" if "load again" in str(error) else f"refused: {error}"] += 1
    return outcomes


@pytest.mark.parametrize("world", [1, pytest.param(2, marks=pytest.mark.dist)])
def test_loads_beside_a_saver_that_replaces_the_tag(world: int, folder: Path) -> None:
    savers = children(world, folder, lambda rank, tell: saves_for_ever(folder / "root", tell))
    try:
        assert savers[0].line() == "there"
        outcomes = loads_of(folder / "root", 4.0)
    finally:
        for child in savers:
            child.kill()
    for child in savers:
        child.end()
    assert outcomes["right"] > 20 and outcomes.keys() <= {"right", "refused"}, outcomes


def ranks_hold_different_ones(rank: int, world: int, root: str, source: str) -> int:
    """Rank 0 opens the checkpoint, it is replaced, rank 1 opens it: then both open it once more."""
    path, replaced, held, opens = Path(root), Path(root) / ".replaced-by-the-test", OpenCheckpoint.hold, []

    def hold(self: OpenCheckpoint, names: Any) -> None:
        names = list(names)
        held(self, names)
        if not names:
            return
        if rank == 0 and not opens:
            (path / "step2").rename(path / ".away")
            shutil.copytree(Path(source) / "step3", path / "step2")
            replaced.touch()
        opens.append(self.manifest.about["id"])

    if rank == 0:
        shutil.copytree(Path(source) / "step2", path / "step2")
    dist.barrier()
    OpenCheckpoint.hold = hold  # type: ignore[method-assign]
    find = directory.find

    def later(where: Any) -> Any:
        while rank == 1 and not replaced.exists():
            time.sleep(0.001)
        return find(where)

    loading.find = later
    run = Run()
    assert run.load(path / "step2") == 3 and run.digest() == Digests()[3]
    return len(opens)


@pytest.mark.dist
def test_ranks_that_hold_different_checkpoints_open_them_again(two: Path, folder: Path) -> None:
    source = Path(shutil.copytree(two, folder / "source"))
    trained(3).save(source / "step3", 3)
    (folder / "root").mkdir()
    assert run_ranks(ranks_hold_different_ones, 2, str(folder / "root"), str(source), timeout=60) == [2, 2]


def test_nobody_waits_for_what_is_not_there(two: Path) -> None:
    """Only what was there, and is gone, is looked for again after a while."""
    began = time.monotonic()
    with pytest.raises(CheckpointError, match="is no checkpoint of adafisher_dist"):
        Run().load(two / "none")
    assert time.monotonic() - began < 1


# ---- what ties a shard to its manifest ----

SHARD = "shard-00000-of-00001.safetensors"


def test_a_shard_of_another_checkpoint(folder: Path) -> None:
    """Of the same size; its header tells, without a checksum."""
    root = folder / "root"
    for step in (2, 3):
        saved = trained(step)
        torch.manual_seed(0), np.random.seed(0), random.seed(0)  # whose states are as long then
        saved.save(root / f"step{step}", step)
    shutil.copy(root / "step3" / SHARD, root / "step2" / SHARD)
    run = trained(5)
    before = run.digest()
    assert (root / "step3" / SHARD).stat().st_size == read(root / "step2").files[SHARD].nbytes
    with pytest.raises(CheckpointError, match=f"{SHARD} belongs to the checkpoint [0-9a-f]+, and the manifest to"):
        run.load(root / "step2", verify=False)
    assert run.digest() == before
    out = CliRunner().invoke(app, ["export", str(root / "step2"), "--to", "safetensors", "--no-verify"])
    assert out.exit_code == 1 and "belongs to the checkpoint" in out.output


def rewrite_shard(folder: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Change a shard's header, and the manifest to fit: as another version may have written it."""
    data = (folder / SHARD).read_bytes()
    length = int.from_bytes(data[:8], "little")
    text = json.dumps(change(json.loads(data[8 : 8 + length]))).encode()
    text += b" " * (-len(text) % 8)
    (folder / SHARD).write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    content = content_of(folder)
    whole = (folder / SHARD).read_bytes()
    content["files"] = [{"name": SHARD, "bytes": len(whole), "crc32": f"{zlib.crc32(whole):08x}"}]
    for tensor in content["tensors"].values():
        for chunk in tensor["chunks"]:
            chunk[3] += len(text) - length
    write_manifest(folder, content)


def test_a_shard_without_an_id_loads(two: Path, folder: Path) -> None:
    """As checkpoints are that were saved before shards had one."""
    root = Path(shutil.copytree(two, folder / "root"))
    rewrite_shard(root / "step2", lambda header: {k: v for k, v in header.items() if k != "__metadata__"})
    for verify in (True, False):
        run = Run()
        assert run.load(root / "step2", verify=verify) == 2 and run.digest() == Digests()[2]


def test_a_header_that_contradicts_the_manifest(two: Path, folder: Path) -> None:
    """All checksums are right."""
    root = Path(shutil.copytree(two, folder / "root"))

    def swapped(header: dict[str, Any]) -> dict[str, Any]:
        weights = [key for key in header if key.startswith("weight/")]
        first, second = next((a, b) for a in weights for b in weights if a < b and header[a] != header[b])
        return {**header, first: header[second], second: header[first]}

    rewrite_shard(root / "step2", swapped)
    run = trained(5)
    before = run.digest()
    with pytest.raises(CheckpointError, match=r"does not hold weight/.* where the manifest has it"):
        run.load(root / "step2")
    assert run.digest() == before


# ---- as many files as there are ranks ----


def split(folder: Path, count: int) -> None:
    """Cut a checkpoint's shard into so many files, each with a part of each larger tensor."""
    with OpenCheckpoint(folder) as opened:
        tensors = {key: opened.read_tensor(key) for key in opened.manifest.tensors}
    content = content_of(folder)
    names = [f"shard-{number:05d}-of-{count:05d}.safetensors" for number in range(count)]
    parts: list[list[tuple[str, int, torch.Tensor]]] = [[] for _ in names]
    at = 0
    for key, tensor in tensors.items():
        content["tensors"][key]["chunks"] = []
        size = max(1, -(-len(tensor) // 8))
        for start in range(0, len(tensor), size):
            parts[at % count].append((key, start, tensor[start : start + size]))
            at += 1
    assert at >= count
    content["files"] = []
    for number, (name, members) in enumerate(zip(names, parts, strict=True)):
        header: dict[str, Any] = {"__metadata__": {"adafisher_dist": content["about"]["id"]}}
        data = b""
        for key, start, part in members:
            raw = part.view(torch.uint8).numpy().tobytes()
            entry = {"dtype": content["tensors"][key]["dtype"], "shape": [len(part)]}
            header[f"{key}[{start}:{start + len(part)}]"] = {**entry, "data_offsets": [len(data), len(data) + len(raw)]}
            data += raw
        text = json.dumps(header).encode()
        for key, start, part in members:
            begin = header[f"{key}[{start}:{start + len(part)}]"]["data_offsets"][0]
            content["tensors"][key]["chunks"].append([start, len(part), number, 8 + len(text) + begin])
        whole = len(text).to_bytes(8, "little") + text + data
        (folder / name).write_bytes(whole)
        content["files"].append({"name": name, "bytes": len(whole), "crc32": f"{zlib.crc32(whole):08x}"})
    for tensor in content["tensors"].values():
        tensor["chunks"].sort()
    (folder / SHARD).unlink()
    write_manifest(folder, content)


class Many(Run):
    """With enough parameters for many shards."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.module = nn.Sequential(*(nn.Linear(4, 4) for _ in range(16)))
        self.optimizer = AdaFisher(self.module.parameters(), block_size=4, rows_per_block=2)

    def train(self, *steps: int) -> Many:
        for step in steps:
            self.optimizer.zero_grad()
            (self.module(torch.ones(3, 4) * step) + 1).square().mean().backward()
            self.optimizer.step()
        return self


@pytest.mark.parametrize(
    ("count", "soft", "hard", "works"), [(512, 1024, 1024, True), (512, 256, 1024, True), (512, 256, 256, False)]
)
def test_many_shards(count: int, soft: int, hard: int, works: bool, folder: Path) -> None:
    """All are open at once. The limit of open files is raised if possible, or an error names it."""

    def work(_: Tell) -> None:
        run = Many().train(1, 2)
        run.save(folder / "a", 2)
        split(folder / "a", count)
        other = Many().train(3)
        before = other.digest()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        held = len(os.listdir("/proc/self/fd"))
        if works:
            assert other.load(folder / "a") == 2 and other.digest() == run.digest()
            assert export_weights(folder / "a", folder / "out")
            assert CliRunner().invoke(app, ["inspect", str(folder / "a"), "--verify"]).exit_code == 0
        else:
            for load in (lambda: other.load(folder / "a"), lambda: export_weights(folder / "a", folder / "out")):
                with pytest.raises(CheckpointError, match=r"has 512 files, of which \d+ could be .*ulimit -n 1024"):
                    load()
            assert other.digest() == before
        assert len(os.listdir("/proc/self/fd")) == held, "handles were left open"

    Child(work).end()


def test_nothing_stays_open(two: Path, folder: Path) -> None:
    """After a load that succeeds, and one that fails anywhere."""
    root, run = Path(shutil.copytree(two, folder / "root")), trained(3)
    held = sorted(os.listdir("/proc/self/fd"))
    run.load(root)
    for name in (SHARD, MANIFEST):
        (root / "step2" / name).write_bytes((root / "step2" / name).read_bytes()[:-1])
        with pytest.raises(CheckpointError):
            run.load(root)
    assert sorted(os.listdir("/proc/self/fd")) == held


# ---- inspect and export ----


@pytest.mark.parametrize("command", ["inspect", "export"])
def test_the_command_line_beside_a_saver(command: str, two: Path, folder: Path) -> None:
    """If the tag is replaced before any path is opened, the command gives one whole checkpoint."""
    codes = Counter[int]()
    options = ["--verify", "--json"] if command == "inspect" else ["--to", "safetensors", "--out", str(folder / "out")]
    for number in range(1, 100):
        root = Path(shutil.copytree(two, folder / str(number)))

        def work(tell: Tell, number: int = number, root: Path = root) -> None:
            run = trained(3)
            names = acting_at(number, lambda: run.save(root / "step2", 3))
            result = CliRunner().invoke(app, [command, str(root / "step2"), *options])
            assert result.exit_code == 0, (result.output, result.exception)
            if command == "inspect":
                facts = json.loads(result.stdout)
                assert facts["damage"] == [] and facts["step"] in (2, 3)
            else:
                loaded = load_file(folder / "out" / "model.safetensors")
                both = [trained(step).module.state_dict() for step in (2, 3)]
                assert any(all(torch.equal(loaded[k], own[k]) for k in own) for own in both), "of two steps"
            tell(f"{result.exit_code} {len(names)}")

        _, told = Child(work).end()
        shutil.rmtree(folder / "out", ignore_errors=True)
        code, opened = map(int, told[-1].split())
        codes[code] += 1
        if opened < number:
            break
    assert number > 3 and codes.keys() == {0}


# ---- what is said of a save is so ----


@pytest.mark.parametrize("keep_last", [2.5, 2.0, True, "3", math.nan, -1, 0])
def test_keep_last_is_a_whole_number(keep_last: Any, two: Path, folder: Path) -> None:
    """Looked at before anything is written."""
    root, run = Path(shutil.copytree(two, folder / "root")), trained(3)
    for asynchronous in (False, True):
        with pytest.raises(ValueError, match="keep_last should be"):
            run.save(root / "step3", 3, keep_last=keep_last, asynchronous=asynchronous)
    assert visible(root) == {"step1", "step2"} and not leftovers(root)
    run.save(root / "step3", 3, keep_last=np.int64(1))
    assert visible(root) == {"step3"}


def keep_different_numbers(rank: int, world: int, root: str) -> str:
    with pytest.raises(ValueError, match="keep_last") as caught:
        trained(1).save(Path(root) / "a", 1, keep_last=rank + 1)
    assert not list(Path(root).iterdir())
    return str(caught.value)


@pytest.mark.dist
def test_keep_last_is_the_same_on_all_ranks(folder: Path) -> None:
    both = run_ranks(keep_different_numbers, 2, str(folder), timeout=60)
    assert both == ["The ranks give keep_last different values: [1, 2]."] * 2


def die_when(there: Path) -> None:
    """From now on in a thread: end this process by a signal as soon as a file exists."""

    def watch() -> None:
        while not there.exists():
            time.sleep(0.0005)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


@pytest.mark.dist
@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_peer_dies_between_publishing_and_the_last_message(asynchronous: bool, two: Path, folder: Path) -> None:
    """Rank 0 has published, and says so, if it notices at all."""
    root = Path(shutil.copytree(two, folder / "root"))

    def work(rank: int, tell: Tell) -> None:
        run = trained(3)
        if rank == 1:
            die_when(root / "step3" / MANIFEST)
        else:
            publish = CheckpointDirectory.publish
            CheckpointDirectory.publish = lambda *a: (publish(*a), time.sleep(1.0))[0]  # type: ignore[method-assign]
        try:
            run.save(root / "step3", 3, asynchronous=asynchronous).wait()
            tell("saved")
        except CheckpointError as error:
            tell(str(error).replace("\n", " "))

    first, second = (child.end() for child in children(2, folder, work))
    assert second[0] and not first[0] and visible(root) == {"step1", "step2", "step3"}
    assert Run().load(root) == 3
    told = first[1][-1]
    assert told == "saved" or f"{root / 'step3'} was published and is whole" in told, told
    assert "Nothing was published" not in told and not leftovers(root)


@pytest.mark.dist
@pytest.mark.parametrize("published", [True, False])
def test_rank_0_dies_about_publishing(published: bool, two: Path, folder: Path) -> None:
    """The other rank cannot know, says so, and how to look."""
    root = Path(shutil.copytree(two, folder / "root"))

    def work(rank: int, tell: Tell) -> None:
        run = trained(3)
        if rank == 0:
            publish = CheckpointDirectory.publish

            def dies(*arguments: Any) -> None:
                if published:
                    publish(*arguments)
                os.kill(os.getpid(), signal.SIGKILL)

            CheckpointDirectory.publish = dies  # type: ignore[method-assign]
        with pytest.raises(CheckpointError) as caught:
            run.save(root / "step3", 3)
        tell(str(caught.value).replace("\n", " "))

    first, second = (child.end() for child in children(2, folder, work))
    told = second[1][-1]
    assert first[0] and "may have been published" in told and "Nothing was published" not in told, told
    assert f"`python -m adafisher_dist inspect {root / 'step3'}`" in told
    result = CliRunner().invoke(app, ["inspect", str(root / "step3")])
    assert result.exit_code == (0 if published else 2), result.output
    own = told.rpartition("that of this save is ")[2].rstrip(".")
    assert len(own) == 32 and (own in result.output) == published


def test_latest_cannot_be_changed_and_the_rename_not_undone(two: Path, folder: Path) -> None:
    """It is published then, and that is what is said."""
    root = Path(shutil.copytree(two, folder / "root"))

    def work(_: Tell) -> None:
        run, fail = trained(3), failing(errno.EROFS)  # the second does not see what the first lets fail
        before_each_change(nth(2, fail, "os.rename"), nth(2, fail, "os.rename"))
        with pytest.raises(CheckpointError, match="step3 was published and is whole") as caught:
            run.save(root / "step3", 3)
        assert "`latest` could not be changed" in str(caught.value) and "Nothing was" not in str(caught.value)
        before_each_change()
        assert Run().load(root / "step3") == 3 and Run().load(root) == 2

    Child(work).end()


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
