"""Loads, inspections and exports beside saves that replace and delete: one step, or an error."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from checkpoint_runs import (
    Child,
    Digests,
    Run,
    Tell,
    trained,
)  # fmt: skip
from ranks import run_ranks
from safetensors.torch import load_file
from typer.testing import CliRunner

from adafisher_dist import CheckpointError
from adafisher_dist.checkpoint import directory, loading
from adafisher_dist.checkpoint.open_checkpoint import OpenCheckpoint
from adafisher_dist.tools.cli import app

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
    with pytest.raises(CheckpointError, match="does not exist"):
        Run().load(two / "none")
    assert time.monotonic() - began < 1


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
