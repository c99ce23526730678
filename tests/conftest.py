"""What all tests share."""

from __future__ import annotations

import importlib.util
import os
import subprocess
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


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The documentation's, built as `make docs` does."""
    for module in ("mkdocs", "material", "mkdocstrings"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed: pip install '.[docs]'")
    folder = tmp_path_factory.mktemp("site")
    # Not --quiet, with which --strict passes over warnings.
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    unreachable = {f"{kind}_proxy": "http://127.0.0.1:9" for kind in ("http", "https", "all")}  # it needs no network
    environment = {**os.environ, **unreachable, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=Path(__file__).parent.parent, env=environment, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder
