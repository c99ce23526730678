"""The harness (`fuzz`): three minutes of it, and that it finds what is wrong."""

from __future__ import annotations

import errno
import json
import shutil
import subprocess
import sys
from pathlib import Path

import fuzz
import pytest
from checkpoint_runs import Digests, check, content_of
from damage import Bystander, flip
from lives import Chronicle, Plan
from tally import Foreign, Hung, Lost, Tally, Wrong, explained

from adafisher_dist import CheckpointError
from adafisher_dist.checkpoint.open_checkpoint import OpenCheckpoint

SHARD = "shard-00000-of-00001.safetensors"


@pytest.mark.dist
@pytest.mark.deepspeed
@pytest.mark.timeout(900)
def test_three_minutes_of_the_harness(tmp_path: Path) -> None:
    script, counts = Path(__file__).with_name("fuzz.py"), tmp_path / "counts.json"
    command = [sys.executable, str(script), "--minutes", "3", "--seed", "1", "--sum", str(counts)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stdout + done.stderr[-8000:]
    assert all(own["trials"] for own in json.loads(counts.read_text()).values()), done.stdout


# ---- it finds what is wrong ----


def test_a_load_that_checks_nothing_is_found(two: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = Path(shutil.copytree(two, tmp_path / "root"))
    path = root / "step2" / SHARD
    bystander, tensors = Bystander(), content_of(path.parent)["tensors"]
    position = next(own["chunks"][0][3] for key, own in tensors.items() if key.startswith("weight/"))
    assert flip(path, position, 1, bystander) == "refused"
    monkeypatch.setattr(OpenCheckpoint, "_problem", lambda *_: None)
    with pytest.raises(Wrong, match=f"loaded, with byte {position} changed by 1"):
        flip(path, position, 1, bystander)


def test_a_checkpoint_that_is_lost_is_found(two: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(two, tmp_path / "root"))
    assert check(root, Digests(), 2) == 2
    with pytest.raises(AssertionError, match="does not hold what was saved at step 2"):
        check(root, {**{1: Digests()[1]}, 2: Digests()[3]}, 2)
    (root / "latest").write_text("step1")
    with pytest.raises(Lost, match="latest leads back to step 1; step 2 was completed"):
        check(root, Digests(), 2)


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (KeyError("a/b"), "KeyError"),
        (OSError(errno.EIO, "a/b should be loaded again"), "OSError"),
        (CheckpointError("something should be loaded again"), "does not name a/b"),
        (CheckpointError("a/b is damaged"), "says not what to do"),
    ],
    ids=repr,
)
def test_an_error_that_explains_nothing_is_found(error: Exception, why: str) -> None:
    with pytest.raises(Foreign, match=why):
        explained(error, "a/b")
    explained(CheckpointError("a/b is damaged: load another"), "a/b")


@pytest.mark.parametrize(
    ("where", "line", "found"),
    [
        ("save", "loaded 1 abc", Lost), ("save", "loaded 2 other", Wrong), ("save", "began 2 other", Wrong),
        ("save", "raised 90.0 CheckpointError ours /root", Hung),
        ("step", "raised 1.0 RuntimeError ours nothing", Foreign),
        ("save", "raised 1.0 RuntimeError foreign /root", Foreign), ("step", "ended 1.0 3", Wrong),
    ],
)  # fmt: skip
def test_a_life_that_went_wrong_is_found(where: str, line: str, found: type[AssertionError]) -> None:
    chronicle = Chronicle(Path("/root"))
    chronicle.least, chronicle.digests = 2, {(0, 1): "abc", (0, 2): "def"}
    chronicle.check(0, Plan("ddp", victims=(1,), where=where), "loaded 2 def", unreached=False)
    with pytest.raises(found):
        chronicle.check(0, Plan("ddp", victims=(1,), where=where), line, unreached=False)


def test_what_it_tells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A summary, the command that repeats a round that failed, and counts that add up."""

    def hangs(this: fuzz.Round) -> None:
        this.tally.trials += 1
        if this.draw.random() >= 0:
            raise Hung(f"in round {this.number}")

    def fine(this: fuzz.Round) -> None:
        with this.tally.trial("fine"):
            this.tally.outcomes["refused"] += 1

    monkeypatch.setattr(fuzz, "KINDS", {"flips": (fine, 1.0), "saves": (hangs, 1.0)})
    counts = ["--sum", str(tmp_path / "counts.json")]
    assert fuzz.main(["--only", "flips", "--round", "0", *counts]) == 0
    assert fuzz.main(["--only", "flips", "saves", "--seed", "7", "--round", "3", *counts]) == 1
    told = capsys.readouterr()
    assert "python tests/fuzz.py --seed 7 --only saves --round 3" in told.err and "in round 3" in told.err
    assert "hung" in told.out and "1 refused" in told.out
    whole = json.loads((tmp_path / "counts.json").read_text())
    assert whole["flips"]["trials"] == 2 and whole["flips"]["outcomes"] == {"refused": 2}
    assert whole["saves"]["hung"] == 1 and whole["saves"]["lost"] == 0


def test_each_kind_has_its_share(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fine(this: fuzz.Round) -> None:
        this.tally.trials += 1

    monkeypatch.setattr(fuzz, "KINDS", {"flips": (fine, 3.0), "saves": (fine, 1.0)})
    harness = fuzz.Harness(0, ["flips", "saves"])
    harness.run_for(0.5, fuzz.Sources(tmp_path))
    assert harness.tallies["flips"].trials > harness.tallies["saves"].trials > 1


def test_trials_go_on_after_one_that_failed() -> None:
    tally = Tally()
    for error in (Lost(), Wrong(), Hung(), Foreign(), AssertionError(), KeyError()):
        with tally.trial("x"):
            raise error
    columns = [column for column, _ in tally.problems]
    assert columns == ["lost", "wrong", "hung", "foreign", "wrong", "foreign"] and tally.trials == 6
    with pytest.raises(AssertionError):
        tally.check()
