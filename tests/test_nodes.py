"""Trainings over several hosts with their own addresses: torchrun, and lost processes and nodes."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hosts import Host, hosts, why_not

ROOT = Path(__file__).parent.parent
LAUNCH = ROOT / "launch"
REASON = why_not()

pytestmark = [
    pytest.mark.dist,
    pytest.mark.deepspeed,
    pytest.mark.skipif(REASON is not None, reason=str(REASON)),
    pytest.mark.timeout(600),
]

TINY = "--steps 40 --width 16 --layers 1 --heads 2 --seq-len 16 --corpus-mb 0.2 --held-out 32 --global-batch 12"
ENVIRONMENT = {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}


def training(stage: int, out: str) -> list[str]:
    config = str(ROOT / "configs" / f"zero{stage}.json")
    saving = "--restartable --save-every 5 --log-every 1"
    return [str(LAUNCH / "train.py"), "--device", "cpu", *f"{TINY} {saving} --config {config} --out {out}".split()]


def start(made: list[Host], nodes: str, stage: int, folder: Path) -> list[subprocess.Popen[bytes]]:
    """Start the same training on all hosts, as their users would."""
    options = f"--nodes {nodes} --host {made[0].address} --restarts 5 --wait 4".split()
    command = [str(LAUNCH / "torchrun.sh"), *options, *training(stage, "a")]
    return [host.start(command, folder / f"{host.address}.log", folder, ENVIRONMENT) for host in made]


def finish(running: list[subprocess.Popen[bytes]], folder: Path) -> None:
    for process in running:
        code = process.wait(timeout=400)
        assert code == 0, "\n".join(path.read_text()[-3000:] for path in folder.glob("*.log"))


def told(host: Host, folder: Path) -> str:
    """What was told on a host, without the line breaks that it was given."""
    return " ".join((folder / f"{host.address}.log").read_text().split())


def wait_for(path: Path, running: list[subprocess.Popen[bytes]]) -> None:
    while not path.exists():
        assert all(process.poll() is None for process in running), f"ended before there was {path}"
        time.sleep(0.05)


def losses(folder: Path) -> dict[int, tuple[float, float | None]]:
    with (folder / "a" / "log.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == list(range(41))
    return {int(row["step"]): (float(row["loss"] or 0), float(row["val_loss"] or 0)) for row in rows}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[int, tuple[float, float | None]]:
    """Losses of the same training in one process, independent of the number of ranks and stage."""
    folder = tmp_path_factory.mktemp("undisturbed")
    command = [sys.executable, *training(1, "a")]
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    done = subprocess.run(command, cwd=folder, env={**environment, **ENVIRONMENT}, capture_output=True, timeout=240)
    assert done.returncode == 0, done.stderr.decode()[-3000:]
    return losses(folder)


def compare(found: dict[int, tuple[float, float | None]], expected: dict[int, tuple[float, float | None]]) -> None:
    for step, pair in expected.items():
        assert found[step] == pytest.approx(pair, rel=1e-4), f"step {step}"


SLOW = pytest.mark.slow

# What stands in for a cluster's programs: it runs a command on hosts, given by their addresses.
ON_HOSTS = """#!/usr/bin/env python3
import os, subprocess, sys
names = {names}
def on(address, command):
    return subprocess.Popen(["ip", "netns", "exec", names[address], *command])
"""
PDSH = """
words = sys.argv[1:]
hosts = words[words.index("-w") + 1].split(",")
command = " ".join(words[words.index("-w") + 2:])
running = [on(host, ["sh", "-c", command.replace("%n", str(n))]) for n, host in enumerate(hosts)]
sys.exit(max(process.wait() for process in running))
"""
SSH = """
print(next(word for word in sys.argv[1:] if word in names))
"""
SRUN = """
command = sys.argv[1:]
while command[0].startswith("--"):
    del command[0]
sys.exit(max(process.wait() for process in [on(host, command) for host in names]))
"""
SCONTROL = """
print(*names, sep=chr(10))
"""


def stand_ins(made: list[Host], folder: Path) -> str:
    """A PATH that has them first."""
    folder.mkdir()
    names = {host.address: host.name for host in made}
    for name, text in {"pdsh": PDSH, "ssh": SSH, "srun": SRUN, "scontrol": SCONTROL}.items():
        path = folder / name
        path.write_text(ON_HOSTS.replace("{names}", repr(names)) + text)
        path.chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


@SLOW
@pytest.mark.parametrize("launcher", ["deepspeed", "slurm"])
def test_one_command_reaches_all_hosts(
    launcher: str, tmp_path: Path, undisturbed: dict[int, tuple[float, float | None]]
) -> None:
    """DeepSpeed's launcher with a hostfile, and Slurm; stand-ins for pdsh, ssh, srun, scontrol."""
    with hosts(2) as made:
        environment = {**os.environ, **ENVIRONMENT, "PATH": stand_ins(made, tmp_path / "bin")}
        for name in ("RANK", "WORLD_SIZE", "DS_ACCELERATOR"):
            environment.pop(name, None)
        if launcher == "deepspeed":
            hostfile = tmp_path / "hosts"
            hostfile.write_text("".join(f"{host.address} slots=1\n" for host in made))
            environment |= {"DS_ACCELERATOR": "cpu"}
            options = ["--hostfile", str(hostfile), "--interface", "eth0"]
            command = [str(LAUNCH / "deepspeed.sh"), *options, *training(2, str(tmp_path / "a"))]
        else:
            slurm = {"SLURM_JOB_ID": "7", "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "all", "RANKS": "1"}
            environment |= {**slurm, "SLURM_SUBMIT_DIR": str(ROOT)}
            command = ["bash", str(LAUNCH / "slurm.sbatch"), *training(2, str(tmp_path / "a"))]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "2 rank(s) on cpu" in done.stdout
    compare(losses(tmp_path), undisturbed)


@pytest.mark.parametrize(("stage", "count"), [pytest.param(1, 3, marks=SLOW), pytest.param(3, 2, marks=SLOW)])
def test_hosts_train_as_one_process(
    stage: int, count: int, tmp_path: Path, undisturbed: dict[int, tuple[float, float | None]]
) -> None:
    with hosts(count) as made:
        finish(start(made, str(count), stage, tmp_path), tmp_path)
    assert f"{count} rank(s) on cpu" in told(made[0], tmp_path)
    compare(losses(tmp_path), undisturbed)


@pytest.mark.parametrize(
    ("stage", "count"),
    [pytest.param(1, 2, marks=SLOW), pytest.param(2, 2, marks=SLOW), pytest.param(3, 3, marks=SLOW)],
)
def test_a_rank_that_is_killed_is_started_again(
    stage: int, count: int, tmp_path: Path, undisturbed: dict[int, tuple[float, float | None]]
) -> None:
    """All ranks restart, resume from the last checkpoint, and end where an undisturbed run does."""
    with hosts(count) as made:
        running = start(made, str(count), stage, tmp_path)
        wait_for(tmp_path / "a/checkpoint/step10", running)
        os.kill(made[-1].processes()[-1], signal.SIGKILL)  # the rank; its agent is older
        finish(running, tmp_path)
    log = told(made[0], tmp_path)
    assert "Loaded " in log and f"saved by {count} rank(s)" in log
    compare(losses(tmp_path), undisturbed)


@pytest.mark.parametrize(("stage", "count"), [(2, 3), pytest.param(1, 3, marks=SLOW), pytest.param(3, 3, marks=SLOW)])
def test_a_node_that_is_lost_is_done_without(
    stage: int, count: int, tmp_path: Path, undisturbed: dict[int, tuple[float, float | None]]
) -> None:
    """The others go on from the last checkpoint, which was saved by one rank more."""
    with hosts(count) as made:
        running = start(made, f"1:{count}", stage, tmp_path)
        wait_for(tmp_path / "a/checkpoint/step10", running)
        for process in made[-1].processes():
            os.kill(process, signal.SIGKILL)
        finish(running[:-1], tmp_path)
    log = told(made[0], tmp_path)
    assert f"{count - 1} rank(s) on cpu" in log and f"saved by {count} rank(s)" in log
    compare(losses(tmp_path), undisturbed)
