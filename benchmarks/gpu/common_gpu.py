"""Shared by the parts of `make gpu`: their options, the time left, and results written atomically.

A part may be killed at its limit, and the machine taken away: so each writes its JSON again after
every number, into a file beside it that takes its place at once. `ended` in it tells how far the
part came.

Only the standard library is imported here: `run.py` and `report.py` are to work where torch does
not.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PATHS = [ROOT, ROOT / "launch", ROOT / "benchmarks", ROOT / "tests"]
for path in PATHS:
    if str(path) not in sys.path:  # run.py has put them into PYTHONPATH; a part may also be started by itself
        sys.path.append(str(path))

RUNNING, FINISHED = "running", "finished"


def options(part: str, description: str | None, seconds: float, rehearsal_seconds: float) -> argparse.Namespace:
    """A part's command line: out, rehearse, resume, and the seconds that it may take.

    Args:
        part: its name.
        description: its module's docstring.
        seconds: what it plans with unless the environment has PART_SECONDS, which run.py sets.
        rehearsal_seconds: the same in a rehearsal.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help=f"folder for {part}.json; by default runs/gpu")
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes on the CPU: says whether the script works")
    parser.add_argument("--resume", action="store_true", help="go on after what the JSON has")
    given = parser.parse_args()
    given.part = part
    given.out = given.out or default_folder(given.rehearse)
    given.out.mkdir(parents=True, exist_ok=True)
    given.seconds = float(os.environ.get("PART_SECONDS", rehearsal_seconds if given.rehearse else seconds))
    given.began = float(os.environ["PART_BEGAN"]) if given.resume and "PART_BEGAN" in os.environ else time.time()
    os.environ["PART_BEGAN"] = str(given.began)  # for the same part, should it start itself again
    if not given.rehearse and not has_cuda():
        raise SystemExit(no_device(part))
    return given


def left(given: argparse.Namespace) -> float:
    """Seconds that a part still has."""
    return given.began + given.seconds - time.time()


def default_folder(rehearse: bool) -> Path:
    return ROOT / "runs" / ("gpu-rehearsal" if rehearse else "gpu")


def has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def no_device(who: str) -> str:
    return (
        f"{who}: there is no CUDA device here. `make gpu REHEARSE=1` runs the same scripts on a CPU, with tiny sizes."
    )


def head(rehearse: bool) -> dict[str, Any]:
    """Where and of what the numbers are."""
    import torch

    return {
        "command": os.environ.get("GPU_COMMAND", " ".join(["python", *sys.argv])),
        "date": datetime.datetime.now().isoformat(timespec="minutes"),
        "commit": commit(),
        "rehearsal": rehearse,
        "kernel": os.environ.get("ADAFISHER_KERNEL") == "1",
        "card": torch.cuda.get_device_name() if not rehearse else f"none: a rehearsal on a CPU, {platform.machine()}",
        "driver": "none" if rehearse else driver(),
        "cuda": str(torch.version.cuda),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def driver() -> str:
    found = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return found.splitlines()[0].strip() if found else "unknown"


def commit() -> str:
    """COMMIT of the environment, since a copy of the tree may have no .git; else what git says."""
    if "COMMIT" in os.environ:
        return os.environ["COMMIT"]
    found = _output("git", "rev-parse", "--short=12", "HEAD")
    if not found:
        return "unknown"
    return found + (" with changes" if _output("git", "status", "--porcelain", "--untracked-files=no") else "")


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def said(error: BaseException) -> str:
    """An error in a line or two: compilers write pages, of which the end or the beginning tells."""
    text = str(error).strip() or "no message"
    short = text if len(text) <= 500 else f"{text[:250]} … {text[-250:]}"
    return f"{type(error).__name__}: {short}"


def rounded(value: Any, digits: int = 5) -> Any:
    """Floats to so many significant digits; None if not finite, as JSON has no name for it."""
    if isinstance(value, float):
        return float(f"{value:.{digits}g}") if abs(value) < float("inf") else None
    if isinstance(value, Mapping):
        return {key: rounded(entry, digits) for key, entry in value.items()}
    return [rounded(entry, digits) for entry in value] if isinstance(value, list | tuple) else value


def write_json(path: Path, value: Any) -> None:
    """Write a file that is never seen half written."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def read_json(path: Path) -> dict[str, Any] | None:
    """What a part has written, or None."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


class Results:
    """A part's JSON: what `content` holds is in the file after each `save`.

    Attributes:
        content: the head, `ended` ("running", "finished", or what run.py saw), and the part's own.
    """

    def __init__(self, given: argparse.Namespace, **own: Any) -> None:
        self.path: Path = given.out / f"{given.part}.json"
        before = read_json(self.path) if given.resume else None
        self.content: dict[str, Any] = before or {**head(given.rehearse), "ended": RUNNING, **own}
        self.content["ended"] = RUNNING
        self.save()

    def save(self) -> None:
        write_json(self.path, rounded(self.content))

    def finish(self) -> None:
        self.content["ended"] = FINISHED
        self.save()
