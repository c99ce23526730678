"""GPU checks rehearsed on CPUs: benchmarks/gpu/correct.py, launch/check_gpus.sh, their failures."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks

ROOT = Path(__file__).parent.parent
GPU = ROOT / "benchmarks" / "gpu"
CHECK_GPUS = ROOT / "launch" / "check_gpus.sh"
sys.path.append(str(GPU))

import correct  # noqa: E402
from correct_runner import Here, NotChecked, Report, run_checks  # noqa: E402


def call(*command: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command without what this process's launcher may have left in the environment."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PART_", "TORCHELASTIC"))}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "DS_ACCELERATOR", "VIRTUAL_ENV"):
        kept.pop(name, None)
    kept |= {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "PART_SECONDS": "500", **environment}
    return subprocess.run([str(word) for word in command], capture_output=True, text=True, env=kept, timeout=560)


def found(folder: Path) -> dict[str, dict[str, Any]]:
    return {entry["name"]: entry for entry in json.loads((folder / "correct.json").read_text())["checks"]}


# ---- rehearsals ----


@pytest.mark.timeout(600)
@pytest.mark.dist
@pytest.mark.deepspeed
def test_one_rank(tmp_path: Path) -> None:
    done = call(sys.executable, GPU / "correct.py", "--rehearse", "--out", tmp_path)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    checks = found(tmp_path)
    assert len(checks) == 58, list(checks)
    assert {name for name, entry in checks.items() if not entry["ok"]} == set()
    assert "loaded bit for bit" in checks["zero3-checkpoint"]["said"]
    lines = [line for line in done.stdout.splitlines() if line.startswith("ok ")]
    assert len(lines) == len(checks) and f"{len(checks)} passed, 0 failed, 0 not checked" in done.stdout
    head = json.loads((tmp_path / "correct.json").read_text())
    assert head["rehearsal"] and head["ranks"] == 1 and head["ended"] == "finished" and head["running"] is None
    assert head["torch"] == torch.__version__ and head["deepspeed"] and head["adafisher_dist"]


@pytest.mark.timeout(600)
@pytest.mark.dist
@pytest.mark.deepspeed
def test_two_ranks_by_the_launcher(tmp_path: Path) -> None:
    chosen = "comm* scaler train-bf16 skipped waiting fsdp2-offload checkpoint zero2-fp16"
    done = call(CHECK_GPUS, "--rehearse", "--ranks", "2", "--out", tmp_path / "a", "--only", chosen)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    checks = found(tmp_path / "a")
    assert {name: entry["ok"] for name, entry in checks.items() if not entry["ok"]} == {"waiting": None}
    assert len(checks) == 9 and "DDP over 2 ranks" in checks["train-bf16"]["said"]
    block = done.stdout.partition("---- please report from here ----")[2].partition("---- to here ----")[0]
    for words in (
        "ranks           2\n",
        f"torch           {torch.__version__}\n",
        "8 checks passed, 0 failed, 1 were not",
    ):
        assert words in block, done.stdout
    assert "ok   zero2-fp16" in block and str((tmp_path / "a" / "correct.json").resolve()) in done.stdout


def test_what_would_be_run() -> None:
    done = call(CHECK_GPUS, "--rehearse", "--dry-run", "--ranks", "3", "--only", "comm zero*", "--out", "here")
    assert done.returncode == 0 and done.stdout == "", done.stdout
    words = done.stderr.strip()
    assert "--nproc-per-node 3 --standalone" in words and words.endswith(
        "/benchmarks/gpu/correct.py --out here --rehearse --only comm zero\\*"
    )


def test_help_tells_every_option() -> None:
    text = call(CHECK_GPUS, "--help").stdout
    cases = [line.split(")")[0].strip() for line in CHECK_GPUS.read_text().splitlines() if ";;" in line]
    options = [case for case in cases if case.startswith("--") and "|" not in case]
    assert len(options) == 5 and all(f"  {option} " in text for option in options)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--ranks none", "--ranks should be a whole number"),
        ("--rank 2", "there is no option --rank"),
        ("--out", "--out needs a value"),
    ],
)
def test_bad_input_is_refused(words: str, message: str) -> None:
    done = call(CHECK_GPUS, *words.split())
    assert done.returncode == 2 and message in done.stderr, done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so() -> None:
    done = call(CHECK_GPUS)
    assert done.returncode == 2 and "torch sees no GPU here" in done.stderr and "--rehearse" in done.stderr
    done = call(sys.executable, GPU / "correct.py")
    assert done.returncode == 1 and "no CUDA device" in done.stderr


def test_checks_are_chosen_by_name() -> None:
    checks: Any = dict.fromkeys(["comm", "zero1-fp32", "zero1-bf16", "scaler"])
    assert list(correct.select(checks, [])) == list(checks)
    assert list(correct.select(checks, ["zero1-*", "comm"])) == ["comm", "zero1-fp32", "zero1-bf16"]
    with pytest.raises(SystemExit, match=r"there is no check scalar\. There are: comm, zero1-fp32"):
        correct.select(checks, ["comm", "scalar"])


# ---- how a run ends badly ----


def kept(
    rank: int, world: int, folder: Path, *checks: Callable[[Here], str], patience: float = 30.0, limit: float = 60.0
):
    """Run them; the exit status, and what this rank has kept, the first one in a file too."""
    path = folder / "report.json"
    report = Report(rank, lambda checks, running: path.write_text(json.dumps(checks)) and None)
    here = Here(rank, world, torch.device("cpu"), folder, limit)
    return run_checks({check.__name__: check for check in checks}, here, report, patience=patience), report.checks


def passes(here: Here) -> str:
    return "as it should be"


def fails_everywhere(here: Here) -> str:
    raise ValueError(f"wrong on rank {here.rank}")


def fails_on_the_last(here: Here) -> str:
    if here.is_last:
        raise ArithmeticError("wrong on the last rank alone")
    return "nothing wrong here"


def is_left_out(here: Here) -> str:
    raise NotChecked("there is nothing to check")


def leaves_others_waiting(here: Here) -> str:
    if here.rank == 1:
        raise LookupError("this rank sends nothing")
    dist.all_reduce(torch.ones(1))
    return "never"


def hangs(here: Here) -> str:
    time.sleep(1000)
    return "never"


def mixed(rank: int, world: int, folder: Path) -> tuple[int, list[dict[str, Any]]]:
    return kept(rank, world, folder, passes, fails_everywhere, fails_on_the_last, is_left_out)


@pytest.mark.dist
def test_a_failure_keeps_no_other_check_from_running(tmp_path: Path) -> None:
    (code, checks), (other_code, nothing) = run_ranks(mixed, 2, tmp_path)
    assert code == 1 and other_code == 0 and nothing == []
    said = {entry["name"]: (entry["ok"], entry["said"]) for entry in checks}
    assert said["passes"] == (True, "as it should be") and said["is_left_out"] == (None, "there is nothing to check")
    assert [said[name][0] for name in ("fails_everywhere", "fails_on_the_last")] == [False, False]
    for rank in range(2):
        assert f"rank {rank} of 2: ValueError: wrong on rank {rank}\nTraceback" in said["fails_everywhere"][1]
    text = said["fails_on_the_last"][1]
    assert text.startswith("rank 1 of 2: ArithmeticError: wrong on the last rank alone\nTraceback")
    assert "in fails_on_the_last" in text and "rank 0" not in text
    assert text.endswith("ArithmeticError: wrong on the last rank alone\n")


def waits_in_vain(rank: int, world: int, folder: Path) -> None:
    kept(rank, world, folder, passes, leaves_others_waiting, is_left_out, patience=1.0)


@pytest.mark.dist
@pytest.mark.parametrize("world", [2, 3])
def test_a_rank_that_would_wait_for_ever_ends_the_run(world: int, tmp_path: Path) -> None:
    """It ends with the failed rank's traceback, the results before it, and exit status 1."""
    began = time.monotonic()
    with pytest.raises(AssertionError, match="exit code 1"):
        run_ranks(waits_in_vain, world, tmp_path)
    assert time.monotonic() - began < 60
    checks = json.loads((tmp_path / "report.json").read_text())
    assert [(entry["name"], entry["ok"]) for entry in checks] == [
        ("passes", True), ("leaves_others_waiting", False), ("is_left_out", None)
    ]  # fmt: skip
    assert f"rank 1 of {world}: LookupError: this rank sends nothing\nTraceback" in checks[1]["said"]
    assert "LookupError: this rank sends nothing\n1 s later other ranks had not ended" in checks[1]["said"]
    assert checks[2]["said"] == "the run ended in leaves_others_waiting"


def never_ends(rank: int, world: int, folder: Path) -> None:
    kept(rank, world, folder, passes, hangs, limit=1.0)


@pytest.mark.dist
def test_a_check_that_never_ends_is_ended(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="exit code 1"):
        run_ranks(never_ends, 1, tmp_path)
    passed, hung = json.loads((tmp_path / "report.json").read_text())
    assert passed["ok"] and hung["ok"] is False and "has not ended in 1 s" in hung["said"]
    assert "time.sleep(1000)" in hung["said"], "where it was"


def test_no_check_begins_when_no_time_is_left(tmp_path: Path) -> None:
    report = Report(0, lambda checks, running: None)
    here = Here(0, 1, torch.device("cpu"), tmp_path)
    assert run_checks({"a": passes, "b": passes, "c": passes}, here, report, left=lambda: -1.0) == 0
    assert [(entry["ok"], entry["said"]) for entry in report.checks] == [
        (True, "as it should be"), (None, "no time was left"), (None, "no time was left")
    ]  # fmt: skip


# ---- a run that was cut off ----


@pytest.mark.dist
def test_a_run_goes_on_after_what_it_has(tmp_path: Path) -> None:
    """What it was in is a failure, and not tried again: it may have taken the machine with it."""
    command = [
        sys.executable,
        GPU / "correct.py",
        "--rehearse",
        "--out",
        tmp_path,
        "--only",
        "ladder",
        "comm",
        "metrics",
    ]
    assert call(*command).returncode == 0
    path = tmp_path / "correct.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "ended": "running", "running": "metrics", "checks": content["checks"][:1]}))
    done = call(*command, "--resume")
    assert done.returncode == 1, done.stdout + done.stderr
    checks = found(tmp_path)
    assert {name: entry["ok"] for name, entry in checks.items()} == {"ladder": True, "metrics": False, "comm": True}
    assert checks["ladder"] == content["checks"][0] and "without a word" in checks["metrics"]["said"]


def test_a_report_of_a_run_that_did_not_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "correct.json"
    assert correct.show(path) == 2 and "There is no" in capsys.readouterr().out
    checks = [
        {"name": "comm", "ok": True, "seconds": 1.0, "said": "fine"},
        {"name": "scaler", "ok": False, "seconds": 2.0, "said": "rank 1 of 2:\nTraceback …\nValueError: 3 is not 4\n"},
    ]
    head = {"card": "H100", "rehearsal": False, "ended": "running", "running": "zero1-fp32", "checks": checks}
    path.write_text(json.dumps(head))
    assert correct.show(path) == 1
    text = capsys.readouterr().out
    for words in (
        "card            H100\n", "nccl            unknown\n", "1 checks passed, 1 failed, 0 were not made\n",
        "did not come to its end. It was in: zero1-fp32", "ok   comm                       1.0 s  fine\n",
        "FAIL scaler                     2.0 s\n", "scaler ended with\n", "    ValueError: 3 is not 4\n",
        "open an issue",
    ):  # fmt: skip
        assert words in text, text
