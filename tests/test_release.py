"""A release, built offline from the tracked files, holds the package and nothing else."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import release


def build(kind: str, tree: Path, out: Path) -> Path:
    script = f"from setuptools import build_meta; print(build_meta.build_{kind}({str(out)!r}))"
    done = subprocess.run([sys.executable, "-c", script], cwd=tree, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return out / done.stdout.splitlines()[-1]


def test_wheel_and_sdist(tmp_path: Path) -> None:
    tree = release.copy_tree(tmp_path / "tree")
    release.check_wheel(build("wheel", tree, tmp_path))
    release.check_sdist(build("sdist", tree, tmp_path))


def test_one_version() -> None:
    import adafisher_dist

    version = release.PROJECT["version"]
    assert adafisher_dist.__version__ == version
    heading = "Unreleased" if ".dev" in version else version
    assert re.search(rf"^## \[{re.escape(heading)}\]", (release.ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)


def test_lower_bounds() -> None:
    assert release.lower_bound("torch>=2.6") == "torch==2.6.0"
    assert release.lower_bound("deepspeed>=0.19.3") == "deepspeed==0.19.3"
