"""The development bench's text: Python sources of the installed packages, and their C++ headers.

The public benchmark has another text. No file, and hardly a line, comes twice; a training sees each
byte at most once.
"""

from __future__ import annotations

import hashlib
import os
import sysconfig
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / "runs" / "development"
SEQ_LEN = 128
HELD_OUT_MB = 2.0
# Of the packages' files: Python to train on, C++ to fine-tune on.
KINDS = {"code": ((".py",), 72.0), "headers": ((".h", ".hpp"), 8.0)}
LONG_LINE = 40  # characters of a line that tells two files apart


@cache
def load(kind: str) -> tuple[Tensor, Tensor]:
    """Bytes to train on and bytes held out, uint8; made once, then read from `runs/development`."""
    path = CACHE / f"{kind}.bin"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_suffix(f".{os.getpid()}")  # another worker may be at it too
        beside.write_bytes(_collect(*KINDS[kind]))
        beside.replace(path)
    data = torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8)
    cut = int(HELD_OUT_MB * 1e6)
    return data[cut:], data[:cut]


def digest(kind: str) -> str:
    """First digits of the SHA-256 of all bytes: the text depends on the installed versions."""
    train, held_out = load(kind)
    return hashlib.sha256(held_out.numpy().tobytes() + train.numpy().tobytes()).hexdigest()[:12]


def batch(kind: str, seed: int, step: int, sequences: int) -> Tensor:
    """Sequences of a step, (sequences, SEQ_LEN + 1) int64; a seed uses each window at most once.

    Raises:
        ValueError: the text has no more windows.
    """
    train, _ = load(kind)
    order = _order(len(train) // SEQ_LEN - 1, seed)
    if (step + 1) * sequences > len(order):
        raise ValueError(f"The text has {len(order)} windows, too few for step {step}: it would repeat.")
    return _windows(train, order[step * sequences : (step + 1) * sequences] * SEQ_LEN)


def held_out(kind: str, sequences: int) -> Tensor:
    """Windows spread evenly over the held-out bytes, (sequences, SEQ_LEN + 1) int64."""
    _, text = load(kind)
    return _windows(text, torch.linspace(0, len(text) - SEQ_LEN - 1, sequences, dtype=torch.float64).long())


@cache
def _order(windows: int, seed: int) -> Tensor:
    return torch.randperm(windows, generator=torch.Generator().manual_seed(seed))


def _windows(data: Tensor, starts: Tensor) -> Tensor:
    return data[starts[:, None] + torch.arange(SEQ_LEN + 1)].long()


def _collect(endings: tuple[str, ...], megabytes: float) -> bytes:
    """Concatenate files by the hash of their names, skipping those with many repeated lines."""
    root = Path(sysconfig.get_paths()["purelib"])
    names = sorted(
        (path.relative_to(root).as_posix() for path in root.rglob("*") if path.suffix in endings),
        key=lambda name: hashlib.sha256(name.encode()).digest(),
    )
    parts, size, seen = [], 0, set()
    for name in names:
        text = (root / name).read_bytes()
        lines = {hash(line) for line in map(bytes.strip, text.splitlines()) if len(line) >= LONG_LINE}
        if len(text) < 500 or b"\0" in text or len(lines & seen) > 0.3 * len(lines):
            continue
        seen |= lines
        parts.append(text)
        size += len(text)
        if size >= megabytes * 1e6:
            return b"".join(parts)
    raise ValueError(f"{root} has only {size / 1e6:.0f} MB of {', '.join(endings)}; {megabytes:.0f} are needed.")
