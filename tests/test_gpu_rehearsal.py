"""`make gpu` on CPUs: scripts run at tiny size, a cut keeps results, no rehearsal is published."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.ci

ROOT = Path(__file__).parent.parent
GPU = ROOT / "benchmarks" / "gpu"
HEAD = {"command", "date", "commit", "rehearsal", "card", "driver", "cuda", "torch", "python", "ended"}
Done = subprocess.CompletedProcess[str]


def call(script: str, *words: str | Path, timeout: float = 280, **environment: str) -> Done:
    ours = ("PARTS", "OUT", "COMMIT", "PART_SECONDS", "GPU_COMMAND")
    clean = {name: value for name, value in os.environ.items() if name not in ours}
    command = [sys.executable, str(GPU / script), *map(str, words)]
    env = {**clean, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env, timeout=timeout)


def read(path: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(path.read_text())
    return result


# ---- the scripts ----


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Done]:
    folder = tmp_path_factory.mktemp("rehearsal")
    return folder, call("run.py", "--rehearse", "--parts", "fast trains", "--out", folder, COMMIT="abc123")


@pytest.mark.timeout(400)
def test_every_number_is_there(rehearsal: tuple[Path, Done]) -> None:
    folder, done = rehearsal
    assert done.returncode == 0, done.stdout + done.stderr
    fast, trains = read(folder / "fast.json"), read(folder / "trains.json")
    for content in (fast, trains):
        assert content.keys() >= HEAD
        assert content["ended"] == "finished" and content["rehearsal"] is True and content["commit"] == "abc123"
    assert [row for section in ("blocks", "steps", "share") for row in fast[section] if "failure" in row] == []
    assert len(fast["blocks"]) == 2
    assert all(row["step_ms"] > 0 and row["bytes_ms"] > 0 and row["flops_ms"] > 0 for row in fast["blocks"])
    names = {"AdamW (fused)", "AdaFisher", "AdaFisher, exponent 1"}
    names |= {"Muon, AdamW (fused) for the rest"} if hasattr(torch.optim, "Muon") else set()
    names |= {"SOAP"} if find_spec("pytorch_optimizer") else set()
    told = {row["optimizer"] for row in fast["steps"]} | {
        entry["name"].rpartition(",")[0] for entry in fast["left_out"]
    }
    assert names <= told
    assert all(row["device_ms"] > 0 and row["host_ms"] > 0 for row in fast["steps"])
    (share,) = fast["share"]
    assert share["cases"].keys() == {"AdamW (fused)", "AdaFisher"}
    assert all(0 < case["share_device"] < 1 for case in share["cases"].values())
    assert 0 < share["own"] <= share["parameters"]

    assert [(run["optimizer"], run["ended"]) for run in trains["runs"]] == 2 * [
        (name, "finished") for name in ("AdaFisher", "AdamW", "Muon")
    ]
    for run in trains["runs"]:
        assert run["held_out"][0][0] == 0 and run["held_out"][-1][0] == run["train"][-1][0] == trains["steps"]
        assert run["held_out"][-1][2] < run["held_out"][0][2]
        seconds = [entry[1] for entry in run["train"]]
        assert seconds == sorted(seconds) and seconds[-1] <= run["seconds"]
    assert len(trains["checks"]) == 2 and all(check["ok"] for check in trains["checks"])


@pytest.mark.timeout(400)
def test_the_page_names_every_part(rehearsal: tuple[Path, Done]) -> None:
    folder, done = rehearsal
    page = (folder / "gpu.md").read_text()
    for word in (
        "`correct`",
        "This part was not run.",
        "`fast`",
        "`trains`",
        "A rehearsal",
        "abc123",
        "AdaFisher, packed",
    ):
        assert word in page, word
    assert [line for line in page.splitlines() if len(line) > 100 and line[0] not in "|!"] == []
    assert sorted(path.name for path in folder.iterdir()) == [
        "fast.json", "gpu.md", "log.txt", "trains.json", "trains.svg",
    ]  # fmt: skip
    assert (
        "AdaFisher, lr 0.01: held out" in done.stdout[-6000:]
        and done.stdout.strip() in (folder / "log.txt").read_text()
    )


@pytest.mark.timeout(400)
def test_a_rehearsal_is_not_published(rehearsal: tuple[Path, Done], tmp_path: Path) -> None:
    folder, _ = rehearsal
    done = call("report.py", "--publish", "--docs", tmp_path, folder)
    assert done.returncode != 0 and "rehearsal" in done.stderr and list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_all_parts(tmp_path: Path) -> None:
    done = call("run.py", "--rehearse", "--out", tmp_path, timeout=550)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(list(tmp_path.iterdir())) <= 8
    checks = read(tmp_path / "correct.json")["checks"]
    assert checks and all(check["ok"] is not False for check in checks)


def test_without_a_gpu_it_names_the_rehearsal(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("here is a GPU")
    done = call("run.py", "--out", tmp_path)
    assert done.returncode == 1 and "make gpu REHEARSE=1" in done.stderr and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("limit", ["nope=3", "fast", "fast=0", "fast=-3", "fast=nan"])
def test_a_limit_that_is_none(tmp_path: Path, limit: str) -> None:
    done = call("run.py", "--rehearse", "--out", tmp_path, "--limit", limit)
    assert done.returncode == 2 and f"and not {limit}" in done.stderr and list(tmp_path.iterdir()) == []


def test_where_nothing_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = call("run.py", "--rehearse", OUT=str(tmp_path / "file"))
    assert done.returncode == 2 and f"Cannot write into {tmp_path / 'file'}" in done.stderr


# ---- cuts and repetitions, with parts that do nothing else ----

PART = """
import json, os, pathlib, subprocess, sys, time
out = pathlib.Path(sys.argv[sys.argv.index("--out") + 1])
assert "--rehearse" in sys.argv and os.environ["DS_ACCELERATOR"] == "cpu"
head = dict.fromkeys("command commit card driver cuda torch python".split(), "x")
head |= {"date": "2026-01-01T00:00", "rehearsal": True, "ended": "running", "checks": [], "part": "PART"}
(out / "PART.json").write_text(json.dumps({**head, "time": time.time()}))
print("PART was here", flush=True)
"""
HANGS = """
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
(out / "child").write_text(str(child.pid))
time.sleep(600)
"""


@pytest.fixture
def scripts(tmp_path: Path) -> Path:
    """Two parts that only say that they were there."""
    made = tmp_path / "scripts"
    made.mkdir()
    for part in ("fast", "trains"):
        (made / f"{part}.py").write_text(PART.replace("PART", part))
    return made


def test_a_part_that_is_cut_keeps_what_it_had(scripts: Path, tmp_path: Path) -> None:
    with (scripts / "fast.py").open("a") as file:
        file.write(HANGS)
    out = tmp_path / "out"
    words = ["--rehearse", "--scripts", scripts, "--out", out, "--limit", "fast=10"]
    done = call("run.py", *words, PARTS="fast trains")
    assert done.returncode == 1 and "NOT GOOD: fast: cut at its limit of 10 s" in done.stdout, done.stdout + done.stderr
    fast, trains = read(out / "fast.json"), read(out / "trains.json")
    assert fast["time"] and fast["ended"] == "cut at its limit of 10 s" and trains["ended"] == "finished"
    assert "cut at its limit of 10 s" in (out / "gpu.md").read_text()
    child = int((out / "child").read_text())
    for _ in range(50):
        if not _runs(child):
            break
        time.sleep(0.1)
    assert not _runs(child), "what a part has started ends with it"


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_only_what_is_asked_for_runs_again(scripts: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ["--rehearse", "--scripts", scripts, "--out", out]
    assert call("run.py", *words, "--parts", "fast,trains").returncode == 0
    before = {part: read(out / f"{part}.json")["time"] for part in ("fast", "trains")}
    done = call("run.py", *words, PARTS="fast", OUT=str(tmp_path / "unused"))
    assert done.returncode == 0 and "fast was here" in done.stdout and "trains was here" not in done.stdout
    assert read(out / "fast.json")["time"] > before["fast"] and read(out / "trains.json")["time"] == before["trains"]
    page = (out / "gpu.md").read_text()
    assert "| part | fast | trains | correct |" in page and "| ended | finished | finished | not run |" in page
    done = call("run.py", *words, PARTS="correct")
    assert done.returncode == 1 and "there is no" in read(out / "correct.json")["ended"], "a part may be missing"
    done = call("run.py", *words, PARTS="fats")
    assert done.returncode == 2 and "no such part: fats" in done.stderr


def test_a_part_that_fails_is_told(scripts: Path, tmp_path: Path) -> None:
    (scripts / "fast.py").write_text("raise SystemExit(3)")
    done = call("run.py", "--rehearse", "--scripts", scripts, "--out", tmp_path / "out", PARTS="fast")
    content = read(tmp_path / "out" / "fast.json")
    assert done.returncode == 1 and content["ended"] == "ended with status 3" and content.keys() >= HEAD


# ---- publishing ----

HAND = """# On a GPU

**Something that is not so
any more.**

What somebody wrote.

<!-- results: begin -->
old
<!-- results: end -->

More of it.
"""


def results(folder: Path, part: str, **more: Any) -> None:
    head = dict.fromkeys(HEAD, "x") | {"rehearsal": False, "card": "Card | 80 GB", "date": "2026-12-01T10:00"}
    folder.mkdir(exist_ok=True)
    (folder / f"{part}.json").write_text(json.dumps({**head, "ended": "finished", "command": "make gpu", **more}))


def test_publish(tmp_path: Path) -> None:
    docs, runs = tmp_path / "docs", tmp_path / "runs"
    docs.mkdir()
    (docs / "gpu.md").write_text(HAND)
    checks = [
        {"name": "good", "ok": True, "seconds": 1.0, "said": ""},
        {"name": "open", "ok": None, "seconds": 0.0, "said": "no NCCL"},
        {"name": "bad", "ok": False, "seconds": 2.0, "said": "off\nby one"},
    ]
    results(runs, "correct", checks=checks, ranks=1)
    done = call("report.py", "--publish", "--docs", docs, runs)
    assert done.returncode == 0, done.stderr
    page = (docs / "gpu.md").read_text()
    assert page.startswith("# On a GPU\n\n**`make gpu` ran the part `correct` on a Card | 80 GB on 2026-12-01;")
    assert "not so" not in page and "old" not in page
    assert "What somebody wrote." in page and page.endswith("<!-- results: end -->\n\nMore of it.\n")
    assert page.index("| bad |") < page.index("| open |") < page.index("| good |") and "off by one" in page
    assert (
        "Card \\| 80 GB" in page and "[correct.json](gpu/correct.json)" in page and (docs / "gpu/correct.json").exists()
    )

    # Another day another part: the first one stays.
    (runs / "correct.json").unlink()
    results(runs, "fast", card="NVIDIA", blocks=[], steps=[], share=[])
    assert call("report.py", "--publish", "--docs", docs, runs).returncode == 0
    again = (docs / "gpu.md").read_text()
    assert (
        "| bad |" in again and "`fast` on an NVIDIA" in " ".join(again.split()) and again.count("results: begin") == 1
    )

    (docs / "gpu.md").write_text(HAND.replace("<!-- results: end -->", ""))
    done = call("report.py", "--publish", "--docs", docs, runs)
    assert done.returncode != 0 and "results: end" in done.stderr
    assert call("report.py", "--publish", "--docs", docs, tmp_path / "nothing").returncode != 0
