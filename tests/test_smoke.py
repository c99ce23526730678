"""tests/smoke.py, with which users verify their installation, succeeds on one that is right."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import smoke


@pytest.mark.parametrize("check", [smoke.entry_point, smoke.one_process, smoke.numpy_steps, smoke.adamw])
def test_checks_of_one_process(check: Any, tmp_path: Path) -> None:
    assert check(tmp_path)


@pytest.mark.ci
@pytest.mark.dist
@pytest.mark.deepspeed
def test_the_whole() -> None:
    command = [sys.executable, str(Path(smoke.__file__)), "--require-deepspeed"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "FAIL" not in result.stdout
