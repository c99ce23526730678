"""What README and the pages behind it claim: commands, tests, settings, losses."""

from __future__ import annotations

import itertools
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

from adafisher_dist import AdaFisher, ds
from adafisher_dist.settings import DEFAULTS, PRESETS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
WORKS, SETTINGS, LAUNCHING = (
    (ROOT / "docs" / page).read_text() for page in ("works_with.md", "settings.md", "launching.md")
)


def section(page: str, title: str) -> str:
    return page.split(f"\n## {title}\n")[1].split("\n## ")[0]


def rows(text: str) -> list[list[str]]:
    """Cells of its tables, line by line, without the lines of dashes."""
    lines = [line for line in text.splitlines() if line.startswith("| ") and not line.startswith("| ---")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


# ---- its form ----


def test_it_is_short() -> None:
    lines = README.splitlines()
    assert len(lines) <= 150
    assert [line for line in lines if len(line) > 100] == []


def test_its_links_lead_to_files_and_headings() -> None:
    links = re.findall(r"\]\(([^)]+)\)", README)
    assert len(links) > 20
    for link in links:
        path, _, heading = link.partition("#")
        assert (ROOT / path).is_file(), link
        headings = re.findall(r"^#+ (.+)$", (ROOT / path).read_text(), re.M) if heading else []
        assert not heading or heading in {re.sub(r"[^\w -]", "", each).lower().replace(" ", "-") for each in headings}


def test_its_badges_are_the_packages() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    badges = [re.sub(r"\[(.*)\]\(.*\)", r"\1", badge) for badge in README.splitlines()[2].split(" · ")]
    licence, python, torch_, deepspeed, status = badges
    assert f'license = "{licence}"' in project and f' - {status.title()}"' in project
    assert f'requires-python = ">={python.removeprefix("Python ").rstrip("+")}"' in project
    assert f'"torch>={torch_.removeprefix("torch ").rstrip("+")}"' in project
    assert f'"deepspeed>={deepspeed.removeprefix("DeepSpeed ").rstrip("+")}"' in project


# ---- what works ----


def test_each_test_that_is_named_exists() -> None:
    """Those with parameters are collected; of the others the function is looked up."""
    layouts = section(WORKS, "Layouts and precisions").split("A short name stands for")[0]
    names = set(re.findall(r"`(test_\w+\.py::[^`…]+)`", WORKS))
    oracle = "test_zero.py::test_layout_beside_the_oracle"
    names |= {f"{oracle}[{name}]" for name in re.findall(r"`([^`]+)`", layouts) if re.match(r"zero|bf16", name)}
    assert len(names) > 75
    of_cases = {name for name in names if "[" in name}
    files = sorted({f"tests/{name.split('::')[0]}" for name in of_cases})
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-o", "addopts=", *files]
    collected = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120, check=True).stdout
    assert [name for name in of_cases if f"tests/{name}" not in collected.splitlines()] == []
    for name in names - of_cases:
        file, function = name.split("::")
        assert re.search(rf"^def {function}\(", (ROOT / "tests" / file).read_text(), re.M), name


def test_each_claim_has_a_test() -> None:
    for row in rows(section(WORKS, "Layouts and precisions")):
        for cell in row:
            assert "✓" not in cell or "`" in cell, row
    asked = rows(section(WORKS, "Does it work with …"))[1:]
    assert len(asked) > 30
    for name, answer, test in asked:
        assert "✓" in answer or "refused" in answer or "not tested" in answer, name
        if "✓" in answer or "refused" in answer:
            assert "::" in test or "the table below" in test, name
        else:
            assert test == "–" or "not tested" in answer, name


def test_the_layouts_are_those_of_the_docs() -> None:
    """README puts several layouts into a row where all have the same marks."""
    _, *ours = rows(section(README, "What works where"))
    _, *theirs = rows(section(WORKS, "Layouts and precisions"))
    names, marks = [], []
    for name, *cells in ours:
        for each in [name] if name.startswith("one process") else name.split(", "):
            names.append(each)
            marks.append([cell[0] for cell in cells])
    assert names == [row[0] for row in theirs]
    assert marks == [[cell[0] for cell in row[1:]] for row in theirs]


# ---- settings ----


def test_the_settings_and_their_defaults_are_the_optimizers() -> None:
    told: dict[str, str] = {}
    for names, defaults, _ in rows(section(SETTINGS, "All settings"))[1:]:
        told |= dict(zip(re.findall(r"`(\w+)`", names), defaults.split(", "), strict=True))
    assert set(told) == {*DEFAULTS, "process_group"}
    for name, default in {**DEFAULTS, "process_group": None}.items():
        if isinstance(default, float):
            assert float(told[name]) == default, name
        else:
            assert told[name].strip('"') == str(default).removeprefix("torch."), name
    six = {name.strip("`"): default for name, default, _ in rows(section(README, "Settings"))[1:7]}
    assert len(six) == 6 and all(told[name] == default for name, default in six.items())


def test_one_answer_to_which_learning_rate() -> None:
    """README's table is that of the docs; presets, configs and examples take theirs from it."""
    tables = [rows(text) for text in (section(README, "Settings"), section(SETTINGS, "Learning rate"))]
    ours, theirs = (table[[row[0] for row in table].index("learning rate for a model of") :] for table in tables)
    assert ours == theirs
    rates = {row[0]: row[1:] for row in theirs[1:]}
    assert float(rates["124 M"][0]) == PRESETS["language_models"]["lr"]
    (line,) = fenced("json").splitlines()
    assert json.loads("{" + line + "}")["optimizer"]["params"]["lr"] == float(rates["124 M"][0])
    for config in (ROOT / "configs").glob("zero*.json"):
        assert json.loads(config.read_text())["optimizer"]["params"]["lr"] == float(rates["below 1 M"][0])
    scripts = {*(ROOT / "examples").glob("*.py")} - {ROOT / "examples/torchtitan_container.py"}  # a larger model
    small = [line for script in scripts for line in script.read_text().splitlines()]
    written = [found[1] for line in small if (found := re.search(r"(?:lr\W+|default=|learning_rate=)(\de-\d)", line))]
    assert len(written) >= 8 and {float(rate) for rate in written} == {float(rates["below 1 M"][0])}
    assert rates["below 1 M"][0] == rates["below 1 M"][2], "of pre-training and of LoRA, which the examples are"


# ---- numbers ----


def test_the_losses_are_those_of_the_trainings() -> None:
    tasks = json.loads((ROOT / "docs/convergence.json").read_text())["tasks"]
    columns = ("laws64x20", "laws64x20large", "laws64x80", "laws96x20", "lora64")
    by_name = [{row["optimizer"]: row for row in tasks[task]} for task in columns]
    assert [{row["seeds"] for row in trained.values()} for trained in by_name] == [{5}, {3}, {3}, {3}, {3}]
    table = rows(section(README, "How well it trains"))[1:]
    assert [name for name, *_ in table] == ["AdamW", "Muon", "SOAP", "NorMuon", "AdaFisher"]
    for name, *cells, time, state in table:
        assert cells == [f"{by[name]['loss']:.3f}" if name in by else "–" for by in by_name], name
        assert (time, state) == (f"{by_name[0][name]['time']:.2f}", f"{by_name[0][name]['bytes']:.1f}"), name
    errors = [by[name]["error"] for by in by_name for name, *_ in table[1:] if name in by]
    (told,) = re.findall(r"standard errors of up to\s(0.\d{3}), AdamW's (0.\d{3})", README)
    assert told == (f"{max(errors):.3f}", f"{max(by['AdamW']['error'] for by in by_name):.3f}")


def test_the_curves_ends_are_told() -> None:
    (told,) = re.findall(r"!\[([^]]*)\]\(docs/convergence_seconds.svg\)", README)
    drawn = (ROOT / "docs/convergence_seconds.svg").read_text()
    ends = re.findall(r"(\w+)\s+at\s+(\d\.\d{3})", told)
    assert len(ends) >= 4 and all(f">{name}: {loss}<" in drawn for name, loss in ends)


# ---- its commands ----


def fenced(language: str) -> str:
    return "".join(re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL))


COMMANDS = [line for line in fenced("bash").splitlines() if not line.startswith("#")]
LAUNCHES = [
    line.strip()
    for line in LAUNCHING.replace("\\\n", " ").splitlines()
    if line.startswith(("    launch/", "    sbatch "))
]


def command(line: str) -> list[str]:
    """Its words, without comment."""
    return shlex.split(line, comments=True)


def run(words: list[str], path: str = "", **more: Any) -> subprocess.CompletedProcess[str]:
    """As a user would, with this Python's programs first, and those in `path` before them."""
    bin_ = str(Path(sys.executable).parent)
    environment = {**os.environ, "PATH": os.pathsep.join([path, bin_, os.environ["PATH"]]), "PYTHON": sys.executable}
    return subprocess.run(words, capture_output=True, text=True, env=environment, timeout=120, **more)


def test_every_command_is_run_by_a_test() -> None:
    assert [command(line)[:2] for line in COMMANDS] == [
        ["pip", "install"],
        ["python", "tests/smoke.py"],  # test_smoke.py runs it
        ["make", "demo"],
        ["make", "test"],
        ["python", "-m"],  # see below
    ]
    for line in COMMANDS:
        if line.startswith("make "):
            assert run([*command(line), "--dry-run"], cwd=ROOT).returncode == 0


def test_only_two_lines_change() -> None:
    lines = fenced("diff").splitlines()
    trained = []
    for sign in "-+":
        torch.manual_seed(0)
        names: dict[str, Any] = {"model": nn.Linear(4, 3)}
        exec("\n".join(line[1:] for line in lines if line[0] == sign), names)
        names["model"](torch.ones(2, 4)).sum().backward()
        names["optimizer"].step()
        trained.append(names["optimizer"])
    assert len(lines) == 4 and isinstance(trained[0], torch.optim.AdamW) and isinstance(trained[1], AdaFisher)


def test_the_config_is_taken() -> None:
    params = json.loads("{" + fenced("json") + "}")["optimizer"]["params"]
    assert ds.from_config(nn.Linear(2, 2).parameters(), **params).get_lr() == params["lr"]


def test_the_python_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In order; test_deepspeed.py has what an engine is needed for."""
    monkeypatch.chdir(tmp_path)
    model = nn.Linear(4, 3)
    names: dict[str, Any] = {"model": model, "optimizer": AdaFisher(model.parameters())}
    lines = fenced("python").splitlines()
    assert len(lines) == 6 and lines.index("") == 1
    for line in itertools.filterfalse(re.compile("engine,").search, lines):
        exec(line, names)
    assert names["restored"].extra == {"epoch": 3}


def test_the_estimate_says_so() -> None:
    """One command, and the sizes of one line of its answer."""
    (line,) = (line for line in COMMANDS if "estimate" in line)
    (answer,) = (line for line in fenced("bash").splitlines() if line.startswith("#"))
    done = run(command(line), cwd=ROOT)
    (ours,) = (row for row in done.stdout.splitlines() if row.split()[:1] == ["AdaFisher"])
    (adamw,) = (row for row in done.stdout.splitlines() if row.split()[:1] == ["AdamW"])
    size = re.compile(r"[\d.]+ [GM]B")
    assert size.findall(answer) == size.findall(ours)[:5]
    assert size.findall(adamw)[-1] == "17.5 GB" and "AdamW: 17.5 GB a GPU" in README


@pytest.mark.parametrize("line", LAUNCHES)
def test_launchers(line: str, tmp_path: Path) -> None:
    """Told what they would run; sbatch by its script, with stand-ins for Slurm."""
    (tmp_path / "hosts").write_text("127.0.0.1 slots=2\n")
    for name, text in {"pdsh": "exit 1", "scontrol": "echo node1", "srun": 'echo srun "$@" >&2'}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    words = [f"{tmp_path}/hosts" if word == "hosts" else word.replace("node1", "127.0.0.1") for word in command(line)]
    if words[0] == "sbatch":
        slurm = {"SLURM_SUBMIT_DIR": ROOT, "SLURM_JOB_ID": 1, "SLURM_NNODES": 2, "SLURM_JOB_NODELIST": "node1"}
        done = run(["env", *(f"{k}={v}" for k, v in slurm.items()), "bash", *words[3:]], str(tmp_path), cwd=ROOT)
    else:
        done = run([words[0], "--dry-run", *words[1:]], str(tmp_path), cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "launch/train.py" in done.stderr and words[-1] in done.stderr


def test_all_launchers_are_shown() -> None:
    scripts = {script.name for script in (ROOT / "launch").glob("*.sh")} & {"torchrun.sh", "mpirun.sh", "deepspeed.sh"}
    assert scripts == {Path(command(line)[0]).name for line in LAUNCHES} - {"sbatch"} and len(LAUNCHES) == 8


ESTIMATES = re.findall(r"^    (python -m .*--world-size.*)$", (ROOT / "docs/command_line.md").read_text(), re.MULTILINE)


@pytest.mark.ci
@pytest.mark.parametrize("line", ESTIMATES)
def test_the_commands_of_the_command_line_page(line: str, tmp_path: Path) -> None:
    (tmp_path / "mypackage").mkdir()
    (tmp_path / "mypackage" / "model.py").write_text("from torch import nn\ndef build(): return nn.Linear(64, 64)\n")
    done = run(command(line), cwd=tmp_path)
    assert done.returncode == 0 and done.stdout, (line, done.stderr)
