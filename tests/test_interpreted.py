"""Runs the tests of the Triton kernel that need a device, on a CPU, under Triton's interpreter.

In a pytest of its own: Triton decides when it is imported whether it interprets, and other tests may have imported it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent


@pytest.mark.timeout(600)
@pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton: pip install triton")
@pytest.mark.parametrize("file", ["test_fused.py", "test_verdict.py", "test_kernel_check.py"])
def test_interpreted(file: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", FOLDER / file]
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=580, cwd=FOLDER.parent)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout and "skipped" not in done.stdout.splitlines()[-1], done.stdout
