"""What checkpoints there are in a folder."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from adafisher_dist.checkpoint.errors import CheckpointError
from adafisher_dist.checkpoint.folders import folder_of, saved_at
from adafisher_dist.checkpoint.latest import read_latest
from adafisher_dist.checkpoint.manifest import MANIFEST, read


@dataclass(frozen=True, slots=True)
class Listed:
    """A checkpoint in a folder of them.

    Attributes:
        tag: its name there.
        step, created, world_size: as its manifest has them; None where that cannot be read.
        latest: whether the file `latest` names it.
        problem: why the manifest cannot be read; None where it can.
    """

    tag: str
    step: int | None
    created: str | None
    world_size: int | None
    latest: bool
    problem: str | None


def checkpoints_in(root: Path) -> list[Listed]:
    """The checkpoints in a folder, the oldest first; none where it is one itself, or no folder.

    Those too that lie in DeepSpeed's folder of a tag. Manifests alone are read.

    Raises:
        OSError: the folder cannot be listed.
    """
    if not root.is_dir() or folder_of(root) is not None:
        return []
    found = []
    for path in root.iterdir():
        folder = None if path.name.startswith(".") else folder_of(path)
        if folder is not None:
            with suppress(OSError):  # another process is deleting it
                found.append((saved_at(folder / MANIFEST), path.name, folder))
    try:
        latest = read_latest(root)
    except CheckpointError:  # which is told of where the newest is looked for
        latest = None
    return [_listed(tag, folder, tag == latest) for _, tag, folder in sorted(found)]


def _listed(tag: str, folder: Path, latest: bool) -> Listed:
    try:
        about = read(folder).about
    except CheckpointError as error:
        return Listed(tag, None, None, None, latest, str(error))
    return Listed(tag, about["step"], about["created"], about["world_size"], latest, None)
