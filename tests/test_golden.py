"""Every layout still computes what tests/golden.npz froze, and reads a checkpoint of that day."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from golden import KEPT, RUNS, SETTINGS, STEPS, Trace, name_of, trace
from layout_runs import Run
from ranks import run_ranks

from adafisher_dist.checkpoint.manifest import read

pytestmark = [pytest.mark.deepspeed, pytest.mark.dist, pytest.mark.desk]

# Of a day before the arrays of golden.npz: A^(−1/2) came from other steps of Newton and Schulz.
CHECKPOINT = Path(__file__).parent / "checkpoints" / "zero3-2-kept"

# Other processors round otherwise, and six steps carry it on; 16-bit weights and states round to 8
# bits.
FINE, COARSE = 2e-4, 2e-2


def frozen(name: str) -> Trace:
    with np.load(KEPT) as arrays:
        return {key.removeprefix(f"{name}/"): arrays[key] for key in arrays if key.startswith(f"{name}/")}


@pytest.mark.parametrize("run", RUNS, ids=name_of)
def test_six_steps(run: Any) -> None:
    before, after = frozen(name_of(run)), trace(run, None)
    assert before.keys() == after.keys()
    tolerance = COARSE if "16" in name_of(run) else FINE
    for key, value in before.items():
        assert np.abs(after[key] - value).max() <= tolerance * np.abs(value).max(), key


def loaded(rank: int, world: int, layout: str) -> Trace:
    run = Run(layout, rank, world, SETTINGS["kept"])
    run.load(str(CHECKPOINT.parent), CHECKPOINT.name)
    return {f"trained/{key}": value for key, value in run.weights().items()}


@pytest.mark.parametrize(("layout", "world"), [("alone", 1), ("zero3", 2)])
def test_a_checkpoint_of_that_day(layout: str, world: int) -> None:
    assert read(CHECKPOINT).about["step"] == STEPS
    with np.load(CHECKPOINT.with_suffix(".npz")) as arrays:
        before = dict(arrays)
    for after in run_ranks(loaded, world, layout, deepspeed=True):
        assert all(np.allclose(after[key], before[key], rtol=1e-6, atol=1e-7) for key in before)
