"""Where a checkpoint lies, and how it is published: under a temporary name until it is complete, then by one rename.

ROOT/TAG            a checkpoint
ROOT/latest         the tag of the newest one
ROOT/.TAG.saving    being written
ROOT/.TAG.replaced  the one that TAG held before, until the new one has its name
ROOT/.TAG.deleting  going away
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from adafisher_dist.checkpoint.manifest import MANIFEST, CheckpointError

LATEST = "latest"

# The folder with our checkpoint, in DeepSpeed's own of a tag.
BESIDE = "adafisher_dist"
_TEMPORARY = (".saving", ".deleting")


@dataclass(frozen=True, slots=True)
class Place:
    """The folder of one checkpoint."""

    root: Path
    tag: str

    def __post_init__(self) -> None:
        if not self.tag or self.tag in (".", "..", LATEST) or self.tag.startswith(".") or "/" in self.tag:
            raise ValueError(f"{self.tag!r} cannot be the name of a checkpoint: it should be a plain folder name.")

    @property
    def folder(self) -> Path:
        """Where it lies when it is complete."""
        return self.root / self.tag

    @property
    def saving(self) -> Path:
        """Where it is written."""
        return self.root / f".{self.tag}.saving"

    @property
    def _replaced(self) -> Path:
        return self.root / f".{self.tag}.replaced"

    def find(self) -> Path:
        """The folder of the complete checkpoint.

        Raises:
            CheckpointError: there is none; names those that there are.
        """
        # The second, where a save was killed between two renames; the third, where DeepSpeed's own function saved.
        for folder in (self.folder, self._replaced, self.folder / BESIDE):
            if (folder / MANIFEST).is_file():
                return folder
        inside = tags(self.folder)
        root, there = (self.folder, inside) if inside else (self.root, tags(self.root))
        raise CheckpointError(
            f"{self.folder} is no checkpoint of adafisher_dist. Checkpoints in {root}: {', '.join(there) or 'none'}."
        )

    def prepare(self) -> None:
        """Make the folder to write into, and clear away what killed saves have left.

        Raises:
            CheckpointError: something else has the name.
        """
        if self.folder.exists() and not (self.folder / MANIFEST).is_file():
            raise CheckpointError(f"{self.folder} exists and is no checkpoint of adafisher_dist; choose another name.")
        self.root.mkdir(parents=True, exist_ok=True)
        for path in self.root.iterdir():
            if path.name.startswith(".") and path.name.endswith(_TEMPORARY):
                shutil.rmtree(path)
        self.saving.mkdir()

    def publish(self, latest: bool, keep_last: int | None) -> None:
        """Give what was written its name, point `latest` at it, and delete the oldest checkpoints of the root."""
        _sync(self.saving)
        if self.folder.exists():
            shutil.rmtree(self._replaced, ignore_errors=True)
            self.folder.rename(self._replaced)
        self.saving.rename(self.folder)
        _sync(self.root)
        if latest:
            write_latest(self.root, self.tag)
        shutil.rmtree(self._replaced, ignore_errors=True)
        if keep_last is not None:
            self._delete_old(keep_last)

    def discard(self) -> None:
        """Take away what was written of a save that failed."""
        shutil.rmtree(self.saving, ignore_errors=True)

    def _delete_old(self, keep_last: int) -> None:
        keep = {self.tag, latest_tag(self.root)}
        for tag in tags(self.root)[:-keep_last]:
            if tag not in keep:
                leaving = self.root / f".{tag}.deleting"
                (self.root / tag).rename(leaving)
                shutil.rmtree(leaving, ignore_errors=True)


def write_latest(root: Path, tag: str) -> None:
    """Point `latest` at a checkpoint, by one rename."""
    temporary = root / f".{LATEST}.saving"
    with temporary.open("w") as file:
        file.write(tag)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(root / LATEST)
    _sync(root)


def latest_tag(root: Path) -> str | None:
    """The tag that `latest` names, if there is one."""
    try:
        return (root / LATEST).read_text().strip() or None
    except (FileNotFoundError, NotADirectoryError):
        return None


def tags(root: Path) -> list[str]:
    """The checkpoints in a folder, the oldest first."""
    if not root.is_dir():
        return []
    found = [path for path in root.iterdir() if not path.name.startswith(".") and (path / MANIFEST).is_file()]
    return [path.name for path in sorted(found, key=lambda path: ((path / MANIFEST).stat().st_mtime_ns, path.name))]


def place_of(path: Path) -> Place:
    """The checkpoint that a path names: its own folder, or the newest in a folder of checkpoints.

    Raises:
        CheckpointError: there is none.
    """
    path = path.absolute()
    tag = latest_tag(path)
    if tag is not None and not (path / MANIFEST).is_file():
        return Place(path, tag)
    return Place(path.parent, path.name)


def _sync(folder: Path) -> None:
    """Make what was renamed or created in a folder outlive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
