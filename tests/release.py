"""Build the package and try its wheel in empty environments, with the oldest and newest versions.

    make release-check                                       # or: python tests/release.py
    python tests/release.py --oldest-python python3.10 --newest-python python3.13 \
        --folder runs/release

Needs the network, some 15 GB of disk (the default builds of torch bring CUDA) and half an hour.
Builds sdist and wheel from the tracked files, checks what is in them and `twine check`s them; then,
for the lower bounds of pyproject.toml and for the newest releases, makes a virtual environment,
installs the wheel, and runs tests/smoke.py there.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import tomllib

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
ARCHIVED = ["README.md", "CHANGELOG.md", "DESIGN.md", "LICENSE", "Makefile", "constraints.txt", "tests/conftest.py"]


# ---- what is in the built files ----


def copy_tree(target: Path) -> Path:
    """Copy the tracked files as they are now, so that no stale build folder or egg-info is used."""
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in tracked.split("\0"):
        if name and (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)
    return target


def check_wheel(wheel: Path) -> None:
    """The package and its metadata, whole, and nothing else.

    Raises:
        AssertionError: what is missing or too much.
    """
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        info = f"adafisher_dist-{PROJECT['version']}.dist-info"
        sources = {str(path.relative_to(ROOT)) for path in (ROOT / "adafisher_dist").rglob("*.py")}
        wanted = sources | {"adafisher_dist/py.typed", f"{info}/licenses/LICENSE", f"{info}/entry_points.txt"}
        wanted |= {f"{info}/{name}" for name in ("METADATA", "RECORD", "WHEEL", "top_level.txt")}
        assert names == wanted, f"missing: {sorted(wanted - names)}; too much: {sorted(names - wanted)}"
        points = archive.read(f"{info}/entry_points.txt").decode()
        metadata = Parser().parsestr(archive.read(f"{info}/METADATA").decode())
    assert "[torch.backends]\nadafisher_dist = adafisher_dist.autoload:register" in points, points
    assert metadata["License-Expression"] == "Apache-2.0"
    needed = [line for line in metadata.get_all("Requires-Dist") if "extra ==" not in line]
    assert sorted(re.split(r"[^\w-]", line)[0] for line in needed) == ["numpy", "torch"], needed


def check_sdist(sdist: Path) -> None:
    """The package, and all that its tests need.

    Raises:
        AssertionError: what is missing.
    """
    top = f"adafisher_dist-{PROJECT['version']}"
    with tarfile.open(sdist) as archive:
        names = {name.removeprefix(f"{top}/") for name in archive.getnames()}
    helpers = {f"tests/{path.name}" for path in (ROOT / "tests").glob("*.py")}
    missing = helpers | set(ARCHIVED) | {"adafisher_dist/py.typed", "configs/zero2.json", "launch/train.py"}
    missing |= {"packaging/conda/recipe.yaml", "docs/release_notes.md", "examples/torchtitan_container.py"}
    missing -= names
    assert not missing, f"the sdist lacks {sorted(missing)}"


# ---- environments ----


def run(*command: str | Path, cwd: Path) -> None:
    print("$", *command, flush=True)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run([str(word) for word in command], cwd=cwd, check=True, env=environment)


def environment(folder: Path, interpreter: str) -> Path:
    """A new virtual environment; its Python."""
    run(interpreter, "-m", "venv", "--clear", folder, cwd=folder.parent)
    return folder / "bin" / "python"


def build(folder: Path) -> Path:
    """Sdist and wheel, checked; the wheel."""
    python = environment(folder / "tools", sys.executable)
    run(python, "-m", "pip", "install", "-q", "build", "twine", cwd=folder)
    tree = copy_tree(folder / "tree")
    run(python, "-m", "build", "--outdir", folder / "dist", tree, cwd=folder)
    [wheel], [sdist] = (folder / "dist").glob("*.whl"), (folder / "dist").glob("*.tar.gz")
    check_wheel(wheel)
    check_sdist(sdist)
    run(python, "-m", "twine", "check", "--strict", wheel, sdist, cwd=folder)
    return wheel


def lower_bound(requirement: str) -> str:
    """`torch>=2.6` as `torch==2.6.0`."""
    name, bound = requirement.split(">=")
    return f"{name}=={bound}" + ".0" * (2 - bound.count("."))


def smoke(folder: Path, interpreter: str, wheel: Path, torch: str, deepspeed: str) -> bool:
    """Install the wheel beside these versions, and run tests/smoke.py; whether all went well."""
    try:
        python = environment(folder, interpreter)
        run(python, "-m", "pip", "install", "-q", "--no-cache-dir", torch, wheel, cwd=folder)
        # By itself, after torch: where there is no wheel, DeepSpeed's setup.py imports torch.
        run(python, "-m", "pip", "install", "-q", "--no-cache-dir", deepspeed, f"{wheel}[deepspeed]", cwd=folder)
        run(python, ROOT / "tests" / "smoke.py", "--require-deepspeed", cwd=folder)
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"{torch}, {deepspeed}: {error}", file=sys.stderr)
        return False
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    minimum = PROJECT["requires-python"].removeprefix(">=")
    parser.add_argument("--oldest-python", default=f"python{minimum}", help="default: %(default)s")
    parser.add_argument("--newest-python", default=sys.executable, help="default: the one that runs this")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "release", help="emptied first")
    arguments = parser.parse_args()
    folder = arguments.folder.resolve()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)

    wheel = build(folder)
    oldest_torch = lower_bound(next(line for line in PROJECT["dependencies"] if line.startswith("torch>=")))
    oldest_deepspeed = lower_bound(PROJECT["optional-dependencies"]["deepspeed"][0])
    well = smoke(folder / "oldest", arguments.oldest_python, wheel, oldest_torch, oldest_deepspeed)
    well &= smoke(folder / "newest", arguments.newest_python, wheel, "torch", "deepspeed")
    for name in ("oldest", "newest"):
        shutil.rmtree(folder / name, ignore_errors=True)
    print(f"The wheel and the sdist in {folder / 'dist'} " + ("may be released." if well else "must not be released."))
    return int(not well)


if __name__ == "__main__":
    sys.exit(main())
