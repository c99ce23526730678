"""The development bench: candidates compute what they say; settings alone determine trainings.

In a process of its own: its modules have the names of others that tests import.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.ci

FOLDER = Path(__file__).parent.parent / "benchmarks" / "development"

SCRIPT = """
import dataclasses, sys
from pathlib import Path
import torch
import optimizers, prototype, tasks, trial

torch.manual_seed(0)
x = torch.linalg.qr(torch.randn(2, 40, 30)).Q * torch.linspace(0.05, 1, 30)
sigma = torch.linalg.svdvals(prototype.polar(x, 5))
assert 0.6 < sigma.min() and sigma.max() < 1.3, sigma
a = x.mT @ x + 0.01 * torch.eye(30)
values, vectors = torch.linalg.eigh(a)
exact = (vectors * values.rsqrt().unsqueeze(1)) @ vectors.mT
ratio = torch.linalg.svdvals(torch.linalg.solve(exact, prototype.inverse_root(a, 5)))
assert 0.6 < ratio.min() and ratio.max() < 1.3, ratio

short = dataclasses.replace(tasks.task_of("vit"), steps=20)
trial.task_of = lambda name: short
trial.FILE = Path(sys.argv[1])
runs = [("adamw", {}), ("muon", {}), ("adafisher", {}), ("prototype", {"a": 0, "length": 1})]
runs += [("prototype", {"weigh": 1, "coupled": 5, "every": 1, "length": 1, "left": 0.5, "nesterov": 1})]
for name, settings in runs:
    run = {"task": "vit", "optimizer": name, "settings": settings, "lr": 3e-3, "wd": 0.1, "seed": 0}
    first, again = trial.train(run), trial.train(run)
    assert first["losses"] == again["losses"] and first["losses"][-1] < first["losses"][0], first
    trial.append(first)
assert len(trial.read()) == len(runs)
for wrong in ({"a": 1, "coupled": 5}, {"length": 1, "polar": "whole"}, {"nope": 1}):
    try:
        optimizers.build("prototype", short.build(0), 1e-3, 0.1, wrong)
    except ValueError as error:
        print(error)
    else:
        raise AssertionError(wrong)
"""


def test_candidates_and_trainings(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path / "trials.jsonl")],
        cwd=FOLDER, capture_output=True, text=True, timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{FOLDER}:{os.environ.get('PYTHONPATH', '')}"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("\n") == 3 and "no such setting" in done.stdout
