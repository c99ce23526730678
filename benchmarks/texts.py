"""Texts as bytes, which trainings see at most once: each is made once, then read from a file."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

HELD_OUT_MB = 2.0
LONG_LINE = 40  # characters of a line that tells two files apart


@dataclass(frozen=True, slots=True, eq=False)
class Text:
    """Bytes to train on and bytes held out, uint8."""

    train: Tensor
    held_out: Tensor

    def batch(self, seed: int, step: int, sequences: int, seq_len: int) -> Tensor:
        """The sequences of a step, (sequences, seq_len + 1) int64: a seed takes each window once.

        Raises:
            ValueError: the text has no more windows.
        """
        order = _order(len(self.train) // seq_len - 1, seed)
        if (step + 1) * sequences > len(order):
            raise ValueError(
                f"The text has {len(order)} windows of {seq_len} bytes, too few for step {step}: it would repeat."
            )
        return _windows(self.train, order[step * sequences : (step + 1) * sequences] * seq_len, seq_len)

    def held_out_batch(self, sequences: int, seq_len: int) -> Tensor:
        """Windows spread evenly over the held-out bytes, (sequences, seq_len + 1) int64."""
        last = len(self.held_out) - seq_len - 1
        return _windows(self.held_out, torch.linspace(0, last, sequences, dtype=torch.float64).long(), seq_len)

    @property
    def digest(self) -> str:
        """The first digits of the SHA-256 of all bytes."""
        both = self.held_out.numpy().tobytes() + self.train.numpy().tobytes()
        return hashlib.sha256(both).hexdigest()[:12]


def load(path: Path, collect: Callable[[], bytes]) -> Text:
    """The text in a file, which is made where it is missing."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_suffix(f".{os.getpid()}")  # another worker may be at it too
        beside.write_bytes(collect())
        beside.replace(path)
    data = torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8)
    cut = int(HELD_OUT_MB * 1e6)
    return Text(data[cut:], data[:cut])


def concatenate(names: Iterable[str], read: Callable[[str], bytes], megabytes: float) -> bytes:
    """Join files in the order of their names' hashes, without those that repeat others' lines.

    Args:
        names: of the files, in any order.
        read: the bytes of a file.
        megabytes: how much to take (10⁶ bytes); the last file is taken whole.

    Raises:
        ValueError: there is less.
    """
    parts, size, seen = [], 0, set[int]()
    for name in sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest()):
        text = read(name)
        lines = {hash(line) for line in map(bytes.strip, text.splitlines()) if len(line) >= LONG_LINE}
        if len(text) < 500 or b"\0" in text or len(lines & seen) > 0.3 * len(lines):
            continue
        seen |= lines
        parts.append(text)
        size += len(text)
        if size >= megabytes * 1e6:
            return b"".join(parts)
    raise ValueError(f"There are only {size / 1e6:.0f} MB; {megabytes:.0f} are needed.")


@cache
def _order(windows: int, seed: int) -> Tensor:
    return torch.randperm(windows, generator=torch.Generator().manual_seed(seed))


def _windows(data: Tensor, starts: Tensor, seq_len: int) -> Tensor:
    return data[starts[:, None] + torch.arange(seq_len + 1)].long()
