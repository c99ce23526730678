"""A release, built offline from the tracked files, holds the package and nothing else."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import release
import tomllib


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


def conda_name(requirement: str) -> str:
    """`torch>=2.6` as conda-forge has it."""
    name, bound = re.fullmatch(r"([\w-]+)(.*)", requirement.replace("torch", "pytorch")).groups()
    return f"{name} {bound}".strip()


def test_the_conda_recipe_says_what_pyproject_says() -> None:
    yaml = pytest.importorskip("yaml", reason="PyYAML is not installed: the extra 'docs' brings it")
    recipe = yaml.safe_load((release.ROOT / "packaging/conda/recipe.yaml").read_text())
    project, context = release.PROJECT, recipe["context"]
    assert recipe["package"] == {"name": project["name"], "version": "${{ version }}"}
    assert context["version"] == project["version"]
    assert f">={context['python_min']}" == project["requires-python"]
    needs = recipe["requirements"]
    assert needs["run"] == ["python >=${{ python_min }}", *map(conda_name, project["dependencies"])]
    assert needs["run_constraints"] == [conda_name(project["optional-dependencies"]["deepspeed"][0])]
    (builder,) = tomllib.loads((release.ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    assert conda_name(builder) in needs["host"]
    assert recipe["about"]["license"] == project["license"]
    assert [recipe["about"]["license_file"]] == project["license-files"]
    files = [name for test in recipe["tests"] for name in test.get("files", {}).get("source", [])]
    assert files and all((release.ROOT / name).is_file() for name in files)


def test_the_conda_recipe_renders() -> None:
    """By rattler-build itself; it solves and builds nothing, which would want conda's channels."""
    rattler = pytest.importorskip("rattler_build", reason="py-rattler-build is not installed")
    recipe = rattler.Stage0Recipe.from_file(release.ROOT / "packaging/conda/recipe.yaml")
    (rendered,) = recipe.render(rattler.VariantConfig())
    package = rendered.recipe.package
    assert (str(package.name), str(package.version)) == (release.PROJECT["name"], release.PROJECT["version"])
