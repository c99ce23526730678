"""What README claims is backed: the tests that it names exist, and its settings are the optimizer's."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

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
