"""What all tests share."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported: there is no GPU to compile for
sys.path.insert(0, str(Path(__file__).parent))

import pytest
import torch

torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start: sums have the same bits


@pytest.fixture
def folder() -> Iterator[Path]:
    """An empty folder, in memory if possible: a kill loses nothing that the kernel was given."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as made:
        yield Path(made)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the checkpoints step1 and step2."""
    from checkpoint_runs import trained

    root = tmp_path_factory.mktemp("two")
    for step in (1, 2):
        trained(step).save(root / f"step{step}", step)
    return root
