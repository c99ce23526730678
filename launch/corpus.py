"""Text to train on, as bytes: the user's own, or the sources of Python's standard library."""

from __future__ import annotations

import hashlib
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

HELD_OUT = 0.1  # of the bytes, at the end
# Not the library itself (tests, installed packages) or not prose and code (tables of character
# sets, a data dump).
_SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data", "__pycache__"}


@dataclass(frozen=True, slots=True)
class Corpus:
    """Bytes to train on and bytes held out.

    Attributes:
        train, held_out: uint8, 1-d.
        source: what it was made from, for people.
        digest: SHA-256 of all the bytes; the ranks compare it.
    """

    train: Tensor
    held_out: Tensor
    source: str
    digest: str


def load(data: Path | None, megabytes: float, seq_len: int) -> Corpus:
    """Read at most `megabytes` (10⁶ bytes) of text and hold out the last tenth.

    Files of a folder are taken in the order of the hashes of their relative names: the same on
    every machine, and the held-out tail is a fair sample of the folder.

    Raises:
        ValueError: there is no text at `data`, or too little for sequences of `seq_len`.
    """
    limit = int(megabytes * 1e6)
    text, source = _standard_library(limit) if data is None else _own(data, limit)
    cut = len(text) - int(len(text) * HELD_OUT)
    need = int((seq_len + 1) / HELD_OUT) + 1
    if len(text) < need:
        raise ValueError(
            f"The corpus ({source}) has {len(text)} bytes; sequences of {seq_len} need at least {need}, so that"
            " a held-out tenth has one. Give more text with --data or --corpus-mb, or a smaller --seq-len."
        )
    everything = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    return Corpus(everything[:cut], everything[cut:], source, hashlib.sha256(text).hexdigest())


def train_batch(corpus: Corpus, step: int, seed: int, batch: int, seq_len: int) -> Tensor:
    """A step's global batch, (batch, seq_len + 1) int64, from seed and step; equal on all ranks."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    starts = torch.randint(len(corpus.train) - seq_len, (batch,), generator=generator)
    return _windows(corpus.train, starts, seq_len)


def held_out_batch(corpus: Corpus, sequences: int, seq_len: int) -> Tensor:
    """At most `sequences` windows spread evenly over the held-out bytes, (n, seq_len + 1) int64."""
    count = min(sequences, len(corpus.held_out) // (seq_len + 1))
    starts = torch.linspace(0, len(corpus.held_out) - seq_len - 1, count, dtype=torch.float64).long()
    return _windows(corpus.held_out, starts, seq_len)


def _windows(data: Tensor, starts: Tensor, seq_len: int) -> Tensor:
    return data[starts[:, None] + torch.arange(seq_len + 1)].long()


def _standard_library(limit: int) -> tuple[bytes, str]:
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [path for path in root.rglob("*.py") if not _SKIPPED.intersection(path.relative_to(root).parts[:-1])]
    if not files:
        raise ValueError(f"Python's standard library has no sources at {root}; give a text with --data FILE_OR_DIR.")
    text, count = _concatenate(root, files, limit)
    return text, f"Python's standard library, {count} files, {len(text) / 1e6:.1f} MB"


def _own(data: Path, limit: int) -> tuple[bytes, str]:
    if data.is_file():
        with data.open("rb") as file:
            text = file.read(limit)
        if b"\0" in text[:8192]:
            raise ValueError(
                f"--data {data} is a binary file (it has NUL bytes); give a text file or a folder of them."
            )
        count = 1
    elif data.is_dir():
        files = [path for path in data.rglob("*") if path.is_file() and not _hidden(path.relative_to(data))]
        text, count = _concatenate(data, files, limit)
        if not text:
            raise ValueError(f"--data {data} has no text: {len(files)} files, all of them empty or binary.")
    else:
        raise ValueError(f"--data {data} is neither a file nor a folder.")
    return text, f"{data}, {count} {'file' if count == 1 else 'files'}, {len(text) / 1e6:.1f} MB"


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _concatenate(root: Path, files: list[Path], limit: int) -> tuple[bytes, int]:
    """The text files' bytes in a fixed order, cut at `limit`, and how many files they are."""
    by_name = {path.relative_to(root).as_posix(): path for path in files}
    parts, size = [], 0
    for name in sorted(by_name, key=lambda name: hashlib.sha256(name.encode()).digest()):
        if size >= limit:
            break
        with by_name[name].open("rb") as file:
            text = file.read(limit - size)
        if text and b"\0" not in text[:8192]:
            parts.append(text)
            size += len(text)
    return b"".join(parts), len(parts)
