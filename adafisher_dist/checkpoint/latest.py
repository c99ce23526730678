"""The file `latest` in a folder of checkpoints: the tag of the newest one, and a checksum.

The first line is the tag; the second, "crc32 XXXXXXXX", is of the first. DeepSpeed, versions before
this one and people write the tag alone.
"""

from __future__ import annotations

import os
import re
import zlib
from pathlib import Path

from adafisher_dist.checkpoint.errors import CheckpointError, reason_and_remedy
from adafisher_dist.checkpoint.files import open_file

LATEST = "latest"

# What to do where it is damaged.
ANOTHER_TAG = "Write the tag that is meant into it, alone."

_LONGEST = 8192  # bytes; a path has at most 4096
_CHECKED = re.compile(r"(?P<tag>.*)\ncrc32 (?P<crc32>[0-9a-f]{8})\n", re.DOTALL)


def prepare_latest(root: Path, tag: str, checked: bool = True) -> Path:
    """Write what `latest` will say under another name, which is returned.

    Args:
        root: the folder of checkpoints.
        tag: the newest one.
        checked: with a checksum, which DeepSpeed's own function would take for a part of the tag.
    """
    path = root / f".{LATEST}.saving"
    with path.open("w", encoding="utf-8") as file:
        file.write(f"{tag}\ncrc32 {_sum(tag)}\n" if checked else tag)
        file.flush()
        os.fsync(file.fileno())
    return path


def read_latest(root: Path) -> str | None:
    """What `latest` says, if there is one; DeepSpeed also writes paths into it.

    Raises:
        CheckpointError: it cannot be read, or its checksum is another.
    """
    try:
        text = _text(root)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise CheckpointError(
            f"{root / LATEST} cannot be read: {reason_and_remedy(error).removesuffix('.')}."
        ) from error
    except ValueError as error:
        raise CheckpointError(f"{root / LATEST} is damaged: {error}. {ANOTHER_TAG}") from error
    checked = _CHECKED.fullmatch(text)
    if checked is None:
        return text.rstrip("\n")
    if (summed := _sum(checked["tag"])) != checked["crc32"]:
        raise CheckpointError(
            f"{root / LATEST} is damaged: it says {checked['tag']!r} and the checksum {checked['crc32']}, and that tag"
            f" has {summed}. {ANOTHER_TAG}"
        )
    return checked["tag"]


def _text(root: Path) -> str:
    directory = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    try:
        handle = open_file(LATEST, directory)
    finally:
        os.close(directory)
    try:
        data = os.read(handle, _LONGEST + 1)
    finally:
        os.close(handle)
    if len(data) > _LONGEST:
        raise ValueError(f"it has more than {_LONGEST} bytes, and should hold the name of a checkpoint")
    return data.decode("utf-8")


def _sum(tag: str) -> str:
    return f"{zlib.crc32(tag.encode()):08x}"
