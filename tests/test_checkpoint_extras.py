"""What a checkpoint has beside weights and state: schedulers, random numbers, values; refusals."""

from __future__ import annotations

import argparse
import copy
import functools
import importlib.metadata
import json
import math
import random
from collections import Counter, OrderedDict, deque
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import distance, weights
from small_trainings import same, state, steps, trained
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, MultiStepLR, OneCycleLR

from adafisher_dist import AdaFisher, CheckpointError, __version__, load_checkpoint, save_checkpoint
from adafisher_dist.checkpoint import CheckpointDirectory, encoding, save, target_of
from adafisher_dist.checkpoint.latest import read_latest
from adafisher_dist.checkpoint.manifest import _checksum


@pytest.mark.parametrize(
    "make",
    [
        lambda o: LambdaLR(o, lambda step: 1 / (step + 1)),
        lambda o: CosineAnnealingLR(o, 10),
        lambda o: MultiStepLR(o, [2, 5, 5]),
        lambda o: OneCycleLR(o, 0.1, total_steps=20, cycle_momentum=False),
        lambda o: torch.optim.lr_scheduler.SequentialLR(
            o, [CosineAnnealingLR(o, 3), torch.optim.lr_scheduler.ExponentialLR(o, 0.5)], [3]
        ),
    ],
    ids=["lambda", "cosine", "multistep", "onecycle", "sequential"],
)
def test_learning_rate_schedulers(make: Any, tmp_path: Path) -> None:
    def run(scheduler: Any, module: nn.Module, optimizer: AdaFisher, first: int, last: int) -> list[float]:
        rates = []
        for step in range(first, last):
            steps(module, optimizer, step, step + 1)
            scheduler.step()
            rates.append(optimizer.param_groups[0]["lr"])
        return rates

    module, optimizer = trained(count=0)
    scheduler = make(optimizer)
    run(scheduler, module, optimizer, 0, 4)
    save_checkpoint(tmp_path / "a", module, optimizer, lr_scheduler=scheduler)
    rates = run(scheduler, module, optimizer, 4, 8)
    other, fresh = trained(count=0)
    again = make(fresh)
    load_checkpoint(tmp_path / "a", other, fresh, lr_scheduler=again)
    assert run(again, other, fresh, 4, 8) == rates
    assert distance(weights(other), weights(module)) == 0


def test_a_scheduler_that_does_not_fit(tmp_path: Path) -> None:
    module, optimizer = trained(count=1)
    scheduler = CosineAnnealingLR(optimizer, 10)
    save_checkpoint(tmp_path / "a", module, optimizer, lr_scheduler=scheduler)
    save_checkpoint(tmp_path / "b", module, optimizer)
    with pytest.raises(CheckpointError, match=r"state of a CosineAnnealingLR, and there is no .*: give lr_scheduler"):
        load_checkpoint(tmp_path / "a", module, optimizer)
    with pytest.raises(CheckpointError, match="is a MultiStepLR, and was a CosineAnnealingLR"):
        load_checkpoint(tmp_path / "a", module, optimizer, lr_scheduler=MultiStepLR(optimizer, [2]))
    with pytest.raises(CheckpointError, match="no state of a learning rate scheduler: leave out lr_scheduler"):
        load_checkpoint(tmp_path / "b", module, optimizer, lr_scheduler=scheduler)


def test_random_numbers_go_on(tmp_path: Path) -> None:
    def draw() -> list[Any]:
        return [random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(3).tolist()]

    module, optimizer = trained(count=1)
    draw()
    save_checkpoint(tmp_path / "a", module, optimizer)
    expected = draw()
    draw()
    load_checkpoint(tmp_path / "a", module, optimizer)
    assert draw() == expected


EXTRA = {
    "numbers": [1, -2.5, math.inf, True, None, 3 + 4j, np.float32(1.5), np.int64(7)],
    "text": "ä\n",
    "bytes": b"\x00\xff",
    "nested": {"tuple": (1, (2, [3])), "set": {1, 2}, "frozen": frozenset({"a"}), 5: "int key", (1, 2): "tuple key"},
    "$odd": {"$tuple": "not a tuple"},
    "ordered": OrderedDict(b=1, a=2),
    "counter": Counter({3: 2}),
    "deque": deque([1, 2]),
    "bounded": deque([1, 2], maxlen=2),
    "namespace": argparse.Namespace(lr=0.1, layers=(1, 2)),
    "path": Path("/tmp/x"),
    "dtype": torch.bfloat16,
    "device": torch.device("cpu"),
    "size": torch.Size([2, 3]),
    "empty": torch.zeros(0, 3),
}


def test_extra_values_come_back(tmp_path: Path) -> None:
    module, optimizer = trained(count=1)
    tensors = {"half": torch.randn(3, 4).half(), "strided": torch.randn(4, 5).T, "array": np.arange(6).reshape(2, 3)}
    save_checkpoint(tmp_path / "a", module, optimizer, extra={**EXTRA, **tensors})
    back = load_checkpoint(tmp_path / "a", module, optimizer).extra
    assert {key: type(value) for key, value in back.items() if key not in ("ordered", "path")} == {
        key: type(value) for key, value in {**EXTRA, **tensors}.items() if key not in ("ordered", "path")
    }
    assert torch.equal(back.pop("half"), tensors["half"]) and torch.equal(back.pop("strided"), tensors["strided"])
    assert np.array_equal(back.pop("array"), tensors["array"]) and back.pop("empty").shape == (0, 3)
    numbers = back["numbers"]
    assert numbers == EXTRA["numbers"] and type(numbers[6]) is np.float32 and type(numbers[3]) is bool
    assert back == {key: value for key, value in EXTRA.items() if key != "empty"}
    assert back["bounded"].maxlen == 2 and back["deque"].maxlen is None


def test_what_a_counter_counts_comes_back() -> None:
    counts = Counter({"a": np.int64(3), "b": 2, "c": math.inf})
    tensors: list[torch.Tensor] = []
    back = encoding.decode(json.loads(json.dumps(encoding.encode(counts, "x", tensors))), tensors)
    assert back == counts and type(back["a"]) is np.int64


def test_a_conjugated_tensor_is_saved(tmp_path: Path) -> None:
    module, optimizer = trained(count=1)
    value = torch.tensor([1 + 2j, 3 - 1j]).conj()
    save_checkpoint(tmp_path / "a", module, optimizer, extra=value)
    assert torch.equal(load_checkpoint(tmp_path / "a", module, optimizer).extra, value.resolve_conj())


def test_a_dtype_that_no_file_can_hold_is_told_of_before_a_save_in_the_background(tmp_path: Path) -> None:
    module, optimizer = trained(count=1)
    wide = torch.ones(2, dtype=torch.complex128)
    with pytest.raises(TypeError, match="complex128"):
        save_checkpoint(tmp_path / "a", module, optimizer, extra=wide, asynchronous=True)


def test_not_a_number_comes_back() -> None:
    assert math.isnan(encoding.decode(encoding.encode(math.nan, "x", []), []))
    back = encoding.decode(json.loads(json.dumps(encoding.encode(complex(math.nan, math.inf), "x", []))), [])
    assert math.isnan(back.real) and back.imag == math.inf
    assert encoding.decode({"$complex": [1.0, 2.0]}, []) == 1 + 2j  # as version 0.1 wrote it


def _of_itself() -> dict[str, Any]:
    cycle: list[Any] = []
    cycle.append(cycle)
    return {"x": cycle}


@pytest.mark.parametrize(
    ("extra", "where"),
    [
        ({"a": [1, object()]}, r"extra\['a'\]\[1\] is a builtins.object"),
        ({"f": lambda: 1}, r"extra\['f'\] is a builtins.function"),
        ({"module": nn.Linear(1, 1)}, "state_dict"),
        ({"sparse": torch.zeros(2, 2).to_sparse()}, "save a plain tensor"),
        ({"objects": np.array([object()])}, "torch does not know"),
        ({"x": np.arange(3, dtype=np.dtype("i4").newbyteorder())}, r"extra\['x'\] is a numpy array of .i4"),
        ({"x": np.zeros(1, dtype=[("a", "i4")])[0]}, r"extra\['x'\] is a numpy.void"),
        ({"x": np.longdouble(1) / 3}, r"extra\['x'\] is a numpy.longdouble"),
        ({"x": np.ma.array([1.0, 2.0], mask=[False, True])}, r"extra\['x'\] is a numpy.ma.*MaskedArray"),
        ({"x": np.datetime64("2026-01-01", "ns")}, r"extra\['x'\] is a numpy.datetime64"),
        ({"x": np.timedelta64(5, "M")}, r"extra\['x'\] is a numpy.timedelta64"),
        ({"x": 10**4300}, r"extra\['x'\] is an integer of 14285 bits; save its hex"),
        (_of_itself(), "extra holds itself"),
    ],
)
def test_what_needs_pickling_is_refused(extra: Any, where: str, tmp_path: Path) -> None:
    module, optimizer = trained(count=1)
    with pytest.raises(TypeError, match=where):
        save_checkpoint(tmp_path / "a", module, optimizer, extra=extra)
    assert not list(tmp_path.iterdir())


def test_asynchronous_saves_hold_the_moment_of_the_call(tmp_path: Path) -> None:
    module, optimizer = trained()
    saving = save_checkpoint(tmp_path / "a", module, optimizer, asynchronous=True)
    at_call, of_state = weights(module), state(optimizer)
    steps(module, optimizer, 4, 6)
    assert saving.wait() == tmp_path / "a" and saving.done()
    save_checkpoint(tmp_path / "b", module, optimizer, asynchronous=True)
    save_checkpoint(tmp_path / "c", module, optimizer)  # waits for b
    assert (tmp_path / "b" / "manifest.json").exists() and read_latest(tmp_path) == "c"
    load_checkpoint(tmp_path / "a", module, optimizer)
    assert distance(weights(module), at_call) == 0 and same(state(optimizer), of_state)


def test_rotation_keeps_the_newest(tmp_path: Path) -> None:
    module, optimizer = trained(count=1)
    (tmp_path / "notes").mkdir()
    for number in range(5):
        save_checkpoint(tmp_path / f"step{number}", module, optimizer, keep_last=2)
    save_checkpoint(tmp_path / "step0", module, optimizer)  # without a limit nothing goes
    assert {path.name for path in tmp_path.iterdir()} == {"notes", "step0", "step3", "step4", "latest"}
    save_checkpoint(tmp_path / "step5", module, optimizer, keep_last=1)
    assert {path.name for path in tmp_path.iterdir()} == {"notes", "step5", "latest"}
    assert load_checkpoint(tmp_path, module, optimizer).path == tmp_path / "step5"
    with pytest.raises(ValueError, match="keep_last should be at least 1, got 0"):
        save_checkpoint(tmp_path / "step6", module, optimizer, keep_last=0)


def test_a_copied_optimizer_saves_its_state(tmp_path: Path) -> None:
    module, optimizer = trained()
    other, copied = copy.deepcopy((module, optimizer))
    save_checkpoint(tmp_path / "a", other, copied)
    fresh_module, fresh = trained(count=0)
    load_checkpoint(tmp_path / "a", fresh_module, fresh)
    assert same(state(fresh), state(optimizer))


def test_wrong_things_are_refused(tmp_path: Path) -> None:
    module, optimizer = trained(count=1)
    with pytest.raises(ValueError, match="parameters that are not in the model"):
        save_checkpoint(tmp_path / "a", nn.Linear(2, 2), optimizer)
    with pytest.raises(TypeError, match="The optimizer should be an AdaFisher, got AdamW"):
        save_checkpoint(tmp_path / "a", module, torch.optim.AdamW(module.parameters()))
    with pytest.raises(CheckpointError, match=r"does not exist\. Checkpoints in .*: none"):
        load_checkpoint(tmp_path / "a", module, optimizer)
    (tmp_path / "empty").mkdir()
    save_checkpoint(tmp_path / "empty", module, optimizer)
    (tmp_path / "mine" / "notes").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="exists and is no checkpoint"):
        save_checkpoint(tmp_path / "mine", module, optimizer)
    with pytest.raises(ValueError, match="cannot be the name of a checkpoint"):
        save_checkpoint(tmp_path / "latest", module, optimizer)


def test_a_users_own_keys_in_param_groups(tmp_path: Path) -> None:
    module, optimizer = trained(count=1)
    optimizer.param_groups[0] |= {"mask": torch.ones(3), "factor": None}
    save_checkpoint(tmp_path / "a", module, optimizer)
    optimizer.param_groups[0] |= {"mask": torch.zeros(3), "factor": 1.0}
    load_checkpoint(tmp_path / "a", module, optimizer)
    assert optimizer.param_groups[0]["mask"].tolist() == [1, 1, 1] and optimizer.param_groups[0]["factor"] is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content["files"][0].update(name="../x"), "which is not in its folder"),
        (lambda content: content["tensors"]["weight/scale"]["chunks"][0].__setitem__(0, 1), "not place elements 0"),
        (lambda content: content["tensors"]["weight/scale"]["chunks"].append([1, 1, 0, 8]), "not place all 1"),
        (lambda content: content["tensors"]["weight/scale"]["chunks"][0].__setitem__(2, -1), "damaged: chunks of"),
        (lambda content: content["tensors"]["weight/scale"]["chunks"][0].__setitem__(3, 10**9), "outside of"),
        (lambda content: content["tensors"]["weight/scale"].update(dtype="F128"), "damaged: dtype of tensor"),
    ],
    ids=["path", "gap", "overlap", "file", "end", "dtype"],
)
def test_a_manifest_that_no_save_wrote(change: Any, message: str, tmp_path: Path) -> None:
    """Its checksum is right, and still it may not lead to other files or other memory."""
    module, optimizer = trained(count=1)
    save_checkpoint(tmp_path / "a", module, optimizer)
    path = tmp_path / "a" / "manifest.json"
    content = json.loads(path.read_text())["content"]
    change(content)
    path.write_text(json.dumps({"crc32": _checksum(content), "content": content}))
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(tmp_path / "a", module, optimizer)


def test_a_damaged_latest_does_not_undo_a_save(tmp_path: Path) -> None:
    """Rotation deletes nothing if it cannot read `latest`; the save succeeds without an error."""
    module, optimizer = trained(count=1)
    save_checkpoint(tmp_path / "a", module, optimizer)
    (tmp_path / "latest").write_bytes(b"\xff")
    training = target_of(module, optimizer, None)
    save(CheckpointDirectory(tmp_path, "b"), training, {}, dict, keep_last=1, latest=False)
    assert load_checkpoint(tmp_path / "b", module, optimizer).path == tmp_path / "b"
    assert (tmp_path / "a").exists()


def test_a_package_that_is_on_the_path_and_not_installed_saves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine with a copied checkout, where the distribution has no metadata."""

    def none(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", none)
    monkeypatch.setattr(importlib.metadata, "distribution", none)
    module = nn.Linear(3, 2)
    saved = save_checkpoint(tmp_path / "a", module, AdaFisher(module.parameters()))
    about = json.loads((saved.path / "manifest.json").read_text())
    assert __version__ in json.dumps(about)


class Trainer:
    """What a schedule is a method of; it cannot be copied."""

    def __init__(self) -> None:
        self.started = 0

    def rate(self, step: int) -> float:
        return 0.5**step

    def __deepcopy__(self, memo: object) -> object:
        raise AssertionError("says the test: a trainer may hold gigabytes")


@pytest.mark.parametrize("in_part", [False, True])
@pytest.mark.parametrize("nested", [False, True])
def test_a_load_does_not_copy_what_a_schedule_is_a_method_of(nested: bool, in_part: bool, tmp_path: Path) -> None:
    def built() -> tuple[nn.Module, AdaFisher, Any]:
        module = nn.Linear(4, 4)
        optimizer = AdaFisher(module.parameters(), lr=1e-2)
        rate: Any = functools.partial(Trainer().rate) if in_part else Trainer().rate
        schedulers = [torch.optim.lr_scheduler.LambdaLR(optimizer, rate) for _ in range(2)]
        if not nested:
            return module, optimizer, schedulers[0]
        return module, optimizer, torch.optim.lr_scheduler.SequentialLR(optimizer, schedulers, milestones=[2])

    module, optimizer, scheduler = built()
    for _ in range(3):
        optimizer.step()
        scheduler.step()
    save_checkpoint(tmp_path / "a", module, optimizer, lr_scheduler=scheduler)
    module, optimizer, again = built()
    loads = []
    load = type(again).load_state_dict
    try:
        type(again).load_state_dict = lambda self, state: loads.append(self) or load(self, state)
        load_checkpoint(tmp_path / "a", module, optimizer, lr_scheduler=again)
    finally:
        type(again).load_state_dict = load
    assert loads[0] is not again, "it is tried on a copy first"
    assert again.last_epoch == scheduler.last_epoch and again.get_last_lr() == scheduler.get_last_lr()


class Follows(torch.optim.lr_scheduler.LRScheduler):
    """A scheduler that holds another, and a method of it."""

    def __init__(self, optimizer: AdaFisher) -> None:
        self.after = torch.optim.lr_scheduler.StepLR(optimizer, 2)
        self.ask = self.after.get_last_lr
        super().__init__(optimizer)

    def get_lr(self) -> list[float]:
        return [0.5 * rate for rate in self.ask()]

    def state_dict(self) -> dict[str, Any]:
        return {"last_epoch": self.last_epoch, "after": self.after.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.last_epoch = state["last_epoch"]
        self.after.load_state_dict(state["after"])


def test_a_refused_load_leaves_a_scheduler_in_a_scheduler_alone(tmp_path: Path) -> None:
    module = nn.Linear(4, 4)
    optimizer = AdaFisher(module.parameters(), lr=1e-2)
    scheduler = Follows(optimizer)
    scheduler.after.last_epoch = 5
    save_checkpoint(tmp_path / "a", module, optimizer, lr_scheduler=scheduler)
    module = nn.Linear(4, 5)  # does not fit
    optimizer = AdaFisher(module.parameters(), lr=1e-2)
    scheduler = Follows(optimizer)
    with pytest.raises(CheckpointError, match="Nothing was changed"):
        load_checkpoint(tmp_path / "a", module, optimizer, lr_scheduler=scheduler)
    assert scheduler.after.last_epoch == 0
    module = nn.Linear(4, 4)
    scheduler = Follows(optimizer := AdaFisher(module.parameters(), lr=1e-2))
    load_checkpoint(tmp_path / "a", module, optimizer, lr_scheduler=scheduler)
    assert scheduler.after.last_epoch == 5
