"""Which checkpoints there are in a folder."""

from __future__ import annotations

import os
import re
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from stat import S_ISREG

from adafisher_dist.checkpoint.latest import LATEST
from adafisher_dist.checkpoint.manifest import MANIFEST

# The folder with our checkpoint, in DeepSpeed's own of a tag.
SUBFOLDER = "adafisher_dist"

# What a folder's name gets, with a dot before it, until another checkpoint has its name.
REPLACED = ".replaced"


def tags(root: Path) -> list[str]:
    """The checkpoints in a folder, the oldest first, by when they were saved."""
    if not root.is_dir():
        return []
    own = [path for path in root.iterdir() if not path.name.startswith(".") and not path.is_symlink()]
    found = []
    for path in own:
        with suppress(OSError):  # it has none, or another process is deleting it
            if S_ISREG((path / MANIFEST).stat().st_mode):
                found.append((saved_at(path / MANIFEST), path.name))
    return [name for _, name in sorted(found)]


def saved_at(manifest: Path) -> tuple[str, int]:
    """What orders checkpoints by age: when each was saved, to the second, and the file's own time.

    A copy may have other times than what was copied.

    Raises:
        OSError: it cannot be read.
    """
    modified = manifest.stat().st_mtime_ns
    with manifest.open("rb") as file:
        found = re.search(rb'"created": ?"([0-9T:+-]+)"', file.read(4096))  # it is near the beginning
    time = datetime.fromtimestamp(modified / 1e9, timezone.utc).isoformat(timespec="seconds")
    return found[1].decode() if found else time, modified


def folder_of(path: Path) -> Path | None:
    """The folder with our manifest, of a path that may name a checkpoint, ours or DeepSpeed's."""
    for folder in (path, path / SUBFOLDER, path / f".{SUBFOLDER}{REPLACED}"):
        with suppress(OSError):  # it may not be looked into
            if (folder / MANIFEST).is_file():
                return folder
    return None


def those_in(root: Path) -> str:
    """A sentence that tells which checkpoints there are in a folder; raises nothing."""
    if folder_of(root) is not None:
        return f"{root} is a checkpoint itself."
    if found := _names_in(root):
        return f"Checkpoints in {root}: {', '.join(found)}; load one by its name."
    folders = ", ".join(str(path) for path in folders_in(root)[:100] if os.path.isfile(path / LATEST))
    elsewhere = (
        f"there are some in {folders}" if folders else "if there should be some, give the folder that was saved to"
    )
    return f"Checkpoints in {root}: none; {elsewhere}."


def _names_in(root: Path) -> list[str]:
    """As `tags`, then linked ones and those that lie in DeepSpeed's folder of a tag."""
    found: list[str] = []
    with suppress(OSError):  # it may not be looked into
        found = tags(root)
    return list(dict.fromkeys([*found, *(path.name for path in folders_in(root) if folder_of(path) is not None)]))


def folders_in(root: Path) -> list[Path]:
    """In the order of their names; none where it is no folder, or may not be looked into."""
    with suppress(OSError):
        return sorted(path for path in root.iterdir() if not path.name.startswith(".") and os.path.isdir(path))
    return []
