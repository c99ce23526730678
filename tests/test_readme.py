"""README's claims hold: its commands run, its tests exist, its settings are the optimizer's."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from adafisher_dist import ds
from adafisher_dist.settings import DEFAULTS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
SECTION = README[README.index("## What works where") : README.index("A short name stands for")]
TABLE = "\n".join(line for line in SECTION.splitlines() if line.startswith("|"))


def test_each_cell_names_a_test_that_exists() -> None:
    files = ["tests/test_zero.py", "tests/test_fsdp2.py", "tests/test_replicated.py"]
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-o", "addopts=", *files]
    collected = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120, check=True).stdout
    names = re.findall(r"`([^`]+)`", TABLE)
    assert len(names) > 25
    for name in names:
        full = f"tests/{name}" if "::" in name else f"tests/test_zero.py::test_layout_beside_the_oracle[{name}]"
        found = [line for line in collected.splitlines() if line == full or line.startswith(f"{full}[")]
        assert found, f"README names {name}, and there is no such test"


def test_each_supported_cell_has_a_test() -> None:
    for line in TABLE.splitlines():
        for cell in line.split("|"):
            assert "✓" not in cell or "`" in cell, f"a claim without a test: {line}"


def test_all_settings_are_in_the_table() -> None:
    section = README[README.index("## Settings") : README.index("## What works where")]
    for name in [*DEFAULTS, "process_group"]:
        assert f"`{name}`" in section, name


def test_the_defaults_in_the_table_are_the_optimizers() -> None:
    section = README[README.index("## Settings") : README.index("## What works where")]
    told: dict[str, str] = {}
    for names, defaults in re.findall(r"^\| (`.*?`) \| (.*?) \|", section, flags=re.MULTILINE):
        told |= dict(zip(re.findall(r"`(\w+)`", names), defaults.split(", "), strict=True))
    for name, default in {**DEFAULTS, "process_group": None}.items():
        if isinstance(default, float):
            assert float(told[name]) == default, name
        else:
            assert told[name].strip('"') == str(default).removeprefix("torch."), name


# ---- its commands ----

BLOCKS = re.findall(r"(?:^    .*\n)+", README, flags=re.MULTILINE)
LINES = [line.strip() for block in BLOCKS for line in block.splitlines()]
PYTHON = re.compile(r"import |from |[a-z_, ]+ = |adafisher_dist\.|ds\.|restored\.")
SHELL = re.compile(r"(make|pip|launch/\S+|sbatch|python) ")


def command(line: str) -> list[str]:
    """Its words, without comment and without what is [optional]."""
    return shlex.split(re.sub(r"\[[^]]*\]", "", line), comments=True)


def run(words: list[str], path: str = "", **more: Any) -> subprocess.CompletedProcess[str]:
    """As a user would, with this Python's programs first, and those in `path` before them."""
    bin_ = str(Path(sys.executable).parent)
    environment = {**os.environ, "PATH": os.pathsep.join([path, bin_, os.environ["PATH"]]), "PYTHON": sys.executable}
    return subprocess.run(words, capture_output=True, text=True, env=environment, timeout=120, **more)


def test_every_line_of_code_is_run_by_a_test_below() -> None:
    left = [line for line in LINES if not PYTHON.match(line) and not SHELL.match(line)]
    assert left == ['"optimizer": {"type": "AdaFisher", "params": {"lr": 1e-3}}']
    section = json.loads("{" + left[0] + "}")["optimizer"]
    assert ds.from_config(nn.Linear(2, 2).parameters(), **section["params"]).get_lr() == 1e-3
    makes = [line for line in LINES if line.startswith("make ")]
    assert [command(line) for line in makes] == [["make", "demo"], ["make", "test"]]
    for line in makes:
        assert run([*command(line), "--dry-run"], cwd=ROOT).returncode == 0
    assert [command(line) for line in LINES if line.startswith("pip ")] == [["pip", "install", "."]]
    scripts = [command(line)[1] for line in LINES if re.match("python [^-]", line)]
    assert scripts == ["tests/smoke.py"], "which `make release-check` runs: it takes minutes"


@pytest.mark.parametrize("line", [line for line in LINES if line.startswith(("launch/", "sbatch "))])
def test_launchers(line: str, tmp_path: Path) -> None:
    """Told what they would run; sbatch by its script, with stand-ins for Slurm."""
    (tmp_path / "hosts").write_text("node1 slots=2\n")
    for name, text in {"pdsh": "exit 1", "scontrol": "echo node1", "srun": 'echo srun "$@" >&2'}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    words = [word.replace("node1", "127.0.0.1").replace("hosts", f"{tmp_path}/hosts") for word in command(line)]
    if words[0] == "sbatch":
        slurm = {"SLURM_SUBMIT_DIR": ROOT, "SLURM_JOB_ID": 1, "SLURM_NNODES": 2, "SLURM_JOB_NODELIST": "node1"}
        done = run(["env", *(f"{k}={v}" for k, v in slurm.items()), "bash", *words[3:]], str(tmp_path), cwd=ROOT)
    else:
        done = run([words[0], "--dry-run", *words[1:]], str(tmp_path), cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "launch/train.py" in done.stderr and words[-1] in done.stderr


@pytest.mark.ci
def test_python_and_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Python lines in order (test_deepspeed.py has those for an engine), then each command."""
    monkeypatch.chdir(tmp_path)
    model = nn.Linear(4, 3)
    names: dict[str, Any] = {"model": model}
    lines = [line for line in LINES if PYTHON.match(line) and "engine" not in line]
    assert len(lines) == 7
    for line in lines:
        exec(line, names)
        if line.startswith("optimizer ="):
            model(torch.ones(2, 4)).sum().backward()
            names["optimizer"].step()
            names["scheduler"] = torch.optim.lr_scheduler.ConstantLR(names["optimizer"])
    assert names["restored"].extra == {"epoch": 3}
    commands = [line for line in LINES if line.startswith("python -m")]
    assert len(commands) == 4
    (tmp_path / "mypackage").mkdir()
    (tmp_path / "mypackage" / "model.py").write_text("from torch import nn\ndef build(): return nn.Linear(64, 64)\n")
    for line in commands:
        done = run(command(line), cwd=tmp_path)
        assert done.returncode == 0 and done.stdout, (line, done.stderr)
