"""Checkpoint folders: written under a temporary name, published by one rename when complete.

ROOT/TAG            a checkpoint
ROOT/latest         the tag of the newest one
ROOT/.TAG.saving    being written
ROOT/.TAG.replaced  the one that TAG held before, until the new one has its name
ROOT/.TAG.deleting  going away
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from adafisher_dist.checkpoint.errors import CheckpointError, os_problem
from adafisher_dist.checkpoint.folders import REPLACED, SUBFOLDER, folders_in, tags, those_in
from adafisher_dist.checkpoint.latest import ANOTHER_TAG, LATEST, prepare_latest, read_latest
from adafisher_dist.checkpoint.manifest import MANIFEST
from adafisher_dist.comm.host_groups import beat

logger = logging.getLogger("adafisher_dist")

_SAVING, _DELETING = ".saving", ".deleting"

# Bytes of a name in a folder, and of what a tag gets around it while a checkpoint is replaced.
_LONGEST_NAME = 255
_AROUND_A_TAG = len(f".{REPLACED}")


class PublishedError(CheckpointError):
    """A save failed after its checkpoint had got its name."""


@dataclass(frozen=True, slots=True)
class CheckpointDirectory:
    """The folder of one checkpoint."""

    root: Path
    tag: str

    def __post_init__(self) -> None:
        plain = self.tag == self.tag.strip() and self.tag.isprintable() and "/" not in self.tag
        if not plain or self.tag in ("", LATEST) or self.tag.startswith("."):
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
        return self.root / f".{self.tag}{REPLACED}"

    def find(self) -> Path:
        """The folder of the complete checkpoint.

        Raises:
            CheckpointError: there is none; names those that there are.
        """
        # The second, where a save was killed between two renames; then the same two where
        # DeepSpeed's own function saved. Once more from the first: a save may just have published
        # between the looks.
        within = CheckpointDirectory(self.folder, SUBFOLDER)
        for folder in (self.folder, self._replaced, within.folder, within._replaced, self.folder, within.folder):
            if (folder / MANIFEST).is_file():
                return folder
        if any(self.folder.glob("*.safetensors")):
            found = os.path.lexists(self.folder / MANIFEST)
            raise CheckpointError(
                f"{self.folder / MANIFEST} is {'no file' if found else 'missing'}: the checkpoint is damaged. Copy it"
                f" again, or load another. {those_in(self.root)}"
            )
        named = f", and {self.root / LATEST} names it" if self._is_latest() else ""
        if not os.path.exists(self.folder):
            what = "is a link that leads nowhere" if self.folder.is_symlink() else "does not exist"
            raise CheckpointError(f"{self.folder} {what}{named}. {those_in(self.root)}")
        if any(self.folder.glob("*_model_states.pt")):
            raise CheckpointError(
                f"{self.folder} is a checkpoint of DeepSpeed's own{named}, without AdaFisher's state. If another"
                " optimizer saved it, engine.load_checkpoint(…, load_optimizer_states=False) loads its weights."
            )
        told = those_in(self.folder if folders_in(self.folder) else self.root)
        raise CheckpointError(f"{self.folder} is no checkpoint of adafisher_dist{named}. {told}")

    def _is_latest(self) -> bool:
        with suppress(CheckpointError):
            return read_latest(self.root) == self.tag
        return False

    def prepare(self) -> None:
        """Make the folder to write into, and clear away what killed saves have left.

        Raises:
            CheckpointError: something else has the name, or it is too long.
        """
        if (length := len(os.fsencode(self._replaced.name))) > _LONGEST_NAME:
            raise CheckpointError(
                f"the tag {self.tag[:20]}… has {length - _AROUND_A_TAG} bytes, and may have"
                f" {_LONGEST_NAME - _AROUND_A_TAG}: so long, it could not be replaced"
            )
        if self.folder.is_symlink() and not self.folder.exists():
            raise CheckpointError(f"{self.folder} is a link that leads nowhere; remove it, or choose another name.")
        if self.folder.exists() and not (self.folder / MANIFEST).is_file() and not _is_empty(self.folder):
            raise CheckpointError(f"{self.folder} exists and is no checkpoint of adafisher_dist; choose another name.")
        self.root.mkdir(parents=True, exist_ok=True)
        for path in list(self.root.iterdir()):
            if path not in (self.saving, self._replaced):
                try:
                    _clear(path)
                except OSError as error:  # another user's, say: it is in nobody's way
                    logger.warning("What a killed save has left, %s, cannot be taken away: %s", path, error)
        for path in (self.saving, self._replaced):
            _clear(path)
        self.saving.mkdir()

    def publish(self, latest: bool) -> None:
        """Give what was written its name, and point `latest` at it.

        Raises:
            OSError: it could not; `discard` then brings back what there was.
            PublishedError: it has its name, and `latest` does not name it.
        """
        sync(self.saving)
        if latest:
            prepare_latest(self.root, self.tag)  # all that may fail for want of room is done before anything is seen
        if (self.folder / MANIFEST).is_file():
            if self._replaced.exists():
                _remove(self._replaced)
            self.folder.rename(self._replaced)
        elif self.folder.exists():
            self.folder.rmdir()  # it is empty
        try:
            self.saving.rename(self.folder)
            sync(self.root)
            if latest:
                (self.root / f".{LATEST}.saving").rename(self.root / LATEST)
        except BaseException as error:  # Ctrl-C too, which may come when the system has done what it was asked for
            if self._take_back(latest):
                raise
            if isinstance(error, OSError):
                raise PublishedError(f"`{LATEST}` could not be changed: {os_problem(error)}") from error
            raise PublishedError(f"It was interrupted by {type(error).__name__}") from error

    def _take_back(self, latest: bool) -> bool:
        """Take its name away again, unless `latest` has it by now; whether it could."""
        if latest and not (self.root / f".{LATEST}.saving").exists():
            return False
        with suppress(OSError):
            if not self.saving.exists():
                self.folder.rename(self.saving)
            return True
        return False

    def clear_away(self, keep_last: int | None) -> None:
        """Delete what was replaced, and the oldest checkpoints of the root."""
        try:
            sync(self.root)
            if self._replaced.exists():
                _remove(self._replaced)
            if keep_last is not None:
                self._delete_old(keep_last)
        except Exception as error:  # it is published; CheckpointError where `latest` cannot be read
            logger.warning("%s is saved; what it replaces could not be taken away: %s", self.folder, error)

    def discard(self) -> None:
        """Delete what a failed save wrote, and restore the checkpoint that it was to replace."""
        try:
            for path in (self.saving, self.root / f".{LATEST}.saving"):
                if path.exists():
                    _remove(path)
            if self._replaced.exists():
                _roll_back(self._replaced)
        except OSError as error:
            logger.warning("What a failed save left in %s could not be taken away: %s", self.root, error)

    def _delete_old(self, keep_last: int) -> None:
        linked = {path.resolve().name for path in self.root.iterdir() if path.is_symlink()}
        keep = {self.tag, read_latest(self.root), *linked}
        for tag in tags(self.root)[:-keep_last]:
            if tag not in keep:
                beat()
                leaving = self.root / f".{tag}.deleting"
                (self.root / tag).rename(leaving)
                shutil.rmtree(leaving, ignore_errors=True)


def latest_tag(root: Path) -> str | None:
    """The tag that `latest` names, if there is one.

    Raises:
        CheckpointError: the file cannot be read, or is damaged.
    """
    try:
        tag = read_latest(root)
    except CheckpointError as error:
        raise CheckpointError(f"{error} {those_in(root)}") from error
    if tag is not None:
        try:
            tagged(root, tag)
        except ValueError as error:
            raise CheckpointError(f"{root / LATEST} is damaged: {error} {ANOTHER_TAG} {those_in(root)}") from error
    return tag


def checkpoint_directory(path: Path) -> CheckpointDirectory:
    """The checkpoint that a path names: its own folder, or the newest in a folder of checkpoints.

    Raises:
        CheckpointError: there is none.
    """
    path = path.absolute()
    tag = latest_tag(path)
    if tag is not None and not (path / MANIFEST).is_file():
        return tagged(path, tag)
    try:
        return CheckpointDirectory(path.parent, path.name)
    except ValueError as error:
        raise CheckpointError(f"{path} is no checkpoint of adafisher_dist: {error} {those_in(path)}") from error


def tagged(root: Path, tag: str) -> CheckpointDirectory:
    """The checkpoint of a tag; those of DeepSpeed's own function may be paths in the folder.

    Raises:
        ValueError: it leads out of the folder, or cannot be a name.
    """
    *parents, name = tag.split("/")
    for parent in parents:
        CheckpointDirectory(root, parent)
    return CheckpointDirectory(root.joinpath(*parents), name)


def is_in_place(folder: Path, handle: int) -> bool:
    """Whether an opened checkpoint folder still has its name, and is not about to be deleted."""
    try:
        there, here = folder.stat(), os.fstat(handle)
    except OSError:  # also where a file system over a network has forgotten it
        return False
    if (there.st_dev, there.st_ino) != (here.st_dev, here.st_ino):
        return False
    put_aside = folder.name.startswith(".") and folder.name.endswith(REPLACED)
    return not (put_aside and (_name_before(folder) / MANIFEST).is_file())


def _name_before(replaced: Path) -> Path:
    return replaced.with_name(replaced.name[1 : -len(REPLACED)])


def find(where: Callable[[], CheckpointDirectory]) -> tuple[CheckpointDirectory, Path]:
    """The place that `where` gives, and the folder of its checkpoint.

    Looks twice, since a save may just have moved it.

    Raises:
        CheckpointError: there is none, or it cannot be looked for.
    """
    with suppress(CheckpointError, OSError):
        place = where()
        return place, place.find()
    try:
        place = where()
        return place, place.find()
    except OSError as error:
        raise CheckpointError(f"The checkpoint cannot be looked for: {os_problem(error)}") from error


def _is_empty(folder: Path) -> bool:
    return folder.is_dir() and not any(folder.iterdir())


def _remove(path: Path) -> None:
    """Take away a file or a folder."""
    beat()
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _clear(path: Path) -> None:
    """Take away what a killed save has left, if this is such; bring back what it was to replace."""
    if not path.name.startswith(".") or not os.path.lexists(path):
        return
    if path.name.endswith(_SAVING):  # whoever still writes it shall not publish what is left
        leaving = path.with_name(path.name.removesuffix(_SAVING) + _DELETING)
        if os.path.lexists(leaving):
            _remove(leaving)
        path.rename(leaving)
        path = leaving
    if path.name.endswith(_DELETING):
        _remove(path)
    elif path.name.endswith(REPLACED):
        _roll_back(path)


def _roll_back(replaced: Path) -> None:
    """Undo an interrupted replacement of a checkpoint, or complete it.

    The old checkpoint gets its name again, or is deleted if the new one already has that name.
    """
    folder = _name_before(replaced)
    if (folder / MANIFEST).is_file():
        _remove(replaced)
    elif not folder.exists() or _is_empty(folder):
        replaced.rename(folder)  # which takes the place of an empty one


def sync(path: Path) -> None:
    """Make a file, or what was renamed or created in a folder, outlive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
