"""The development bench's text: Python sources of the installed packages, and their C++ headers.

The public benchmark has another text. No file, and hardly a line, comes twice; a training sees each
byte at most once. It depends on the versions that are installed.
"""

from __future__ import annotations

import sysconfig
from functools import cache
from pathlib import Path

import texts
from texts import Text

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / "runs" / "development"
SEQ_LEN = 128
# Of the packages' files: Python to train on, C++ to fine-tune on.
KINDS = {"code": ((".py",), 72.0), "headers": ((".h", ".hpp"), 8.0)}


@cache
def load(kind: str) -> Text:
    """One of KINDS; made once, then read from `runs/development`."""
    return texts.load(CACHE / f"{kind}.bin", lambda: _collect(*KINDS[kind]))


def _collect(endings: tuple[str, ...], megabytes: float) -> bytes:
    root = Path(sysconfig.get_paths()["purelib"])
    names = [path.relative_to(root).as_posix() for path in root.rglob("*") if path.suffix in endings]
    return texts.concatenate(names, lambda name: (root / name).read_bytes(), megabytes)
