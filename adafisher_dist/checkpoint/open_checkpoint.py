"""A checkpoint held open, so that reads do not change when it is renamed or deleted meanwhile.

Another save may replace or delete the checkpoint at any moment. So a load opens the folder once,
and all files that it will read relative to that; a rename then changes nothing for it, and what is
deleted stays readable until it ends.
"""

from __future__ import annotations

import errno
import json
import os
import resource
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from adafisher_dist.checkpoint.checksums import checksum_of
from adafisher_dist.checkpoint.chunks import ByFile, Chunk
from adafisher_dist.checkpoint.directory import is_in_place
from adafisher_dist.checkpoint.errors import CheckpointError, reason, reason_and_remedy
from adafisher_dist.checkpoint.files import open_file
from adafisher_dist.checkpoint.manifest import LONGEST_HEADER, File, Manifest, dtype_name, read
from adafisher_dist.checkpoint.writer import ID, as_bytes

PAUSES = (0.0, 0.02, 0.1, 0.3, 0.5)
"""Seconds before each further try to open a checkpoint that was replaced meanwhile."""

# Files that a process has open besides: libraries, sockets, logs.
_OTHERS = 256


class Vanished(CheckpointError):
    """The checkpoint was replaced or deleted while it was opened; another may be in its place."""


class OpenCheckpoint:
    """See the module's docstring. Use as a context manager, or `close` it.

    Attributes:
        folder: its path, when it was opened.
        manifest: what the folder's manifest says.
    """

    def __init__(self, folder: Path) -> None:
        """Open the folder, and read its manifest.

        Raises:
            Vanished: the folder was there a moment ago.
            CheckpointError: see `manifest.read`.
        """
        self.folder = folder
        self._handles: dict[str, int] = {}
        self._unreadable: dict[str, str] = {}
        self._by_file: ByFile | None = None
        try:
            self._directory = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        except (FileNotFoundError, NotADirectoryError):
            raise vanished(folder) from None
        except OSError as error:
            raise CheckpointError(
                f"{folder} cannot be opened: {reason_and_remedy(error).removesuffix('.')}."
            ) from error
        try:
            self.manifest = read(folder, self._directory)
        except CheckpointError:
            gone = not is_in_place(folder, self._directory)
            self.close()
            if gone:
                raise vanished(self.folder) from None
            raise

    def __enter__(self) -> OpenCheckpoint:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the folder and of all files; once more does nothing."""
        self.keep(())
        if self._directory >= 0:
            os.close(self._directory)
            self._directory = -1

    def keep(self, names: Iterable[str]) -> None:
        """Let go of all files but these."""
        for name in self._handles.keys() - set(names):
            os.close(self._handles.pop(name))

    def hold(self, names: Iterable[str]) -> None:
        """Open files for `problems` and `read_at`; `problems` reports those that cannot be opened.

        Raises:
            Vanished: one is not there any more.
            CheckpointError: there are too many.
        """
        wanted = [name for name in dict.fromkeys(names) if name not in self._handles]
        _allow(len(self._handles) + len(wanted))
        for name in wanted:
            try:
                self._handles[name] = open_file(name, self._directory)
            except OSError as error:
                if error.errno in (errno.EMFILE, errno.ENFILE):
                    raise CheckpointError(
                        f"{self.folder} has {len(self.manifest.files)} files, of which {len(self._handles)} could be"
                        f" held open ({error.strerror}). Raise the limit of open files, as by `ulimit -n"
                        f" {len(self.manifest.files) + 2 * _OTHERS}`."
                    ) from error
                if not is_in_place(self.folder, self._directory):
                    raise vanished(self.folder) from None
                self._unreadable[name] = reason(error)

    @property
    def held(self) -> set[str]:
        """The files asked for: those that are open, and those that could not be opened."""
        return {*self._handles, *self._unreadable}

    def problems(self, names: Iterable[str], checksums: bool) -> list[str]:
        """What is wrong with these held files; reads all their bytes, unless checksums=False."""
        found = (self._problem(name, checksums) for name in names)
        return [problem for problem in found if problem is not None]

    def read_at(self, name: str, offset: int, into: Tensor) -> None:
        """Read a file's bytes from `offset` on into a contiguous 1-d tensor on the CPU.

        Raises:
            CheckpointError: the file ends before.
            OSError: it cannot be read.
        """
        view, handle = as_bytes(into), self._handles[name]
        while len(view):
            count = os.preadv(handle, [view], offset)
            if count == 0:
                raise CheckpointError(f"{name} ends before byte {offset + len(view)}")
            view, offset = view[count:], offset + count

    def read_tensor(self, key: str) -> Tensor:
        """One whole tensor, (numel,), on the CPU; its files are held, or opened for it.

        Raises:
            CheckpointError: it cannot be read.
        """
        stored = self.manifest.tensors[key]
        missing = [name for name in self.files_of([key]) if name not in self._handles]
        self.hold(missing)
        out = torch.empty(stored.numel, dtype=stored.dtype, device="cpu")
        for chunk in stored.chunks:
            if chunk.file not in self._handles:
                raise CheckpointError(f"{chunk.file} cannot be read ({self._unreadable[chunk.file]})")
            try:
                self.read_at(chunk.file, chunk.offset, out[chunk.start : chunk.start + chunk.numel])
            except OSError as error:
                raise CheckpointError(f"{chunk.file} cannot be read ({reason(error)})") from error
        self.keep(self._handles.keys() - set(missing))
        return out

    def files_of(self, keys: Iterable[str]) -> set[str]:
        """The files that hold these tensors, of which there need not be all."""
        tensors = self.manifest.tensors
        return {name for key in keys if key in tensors for name in tensors[key].chunks.files_of(0, tensors[key].numel)}

    # ---- whether a file is what the manifest says ----

    def _problem(self, name: str, checksum: bool) -> str | None:
        if name in self._unreadable:
            return f"{name} cannot be read ({self._unreadable[name]})"
        expected, handle = self.manifest.files[name], self._handles[name]
        try:
            status = os.fstat(handle)
            if status.st_size != expected.nbytes:
                return f"{name} has {status.st_size} bytes, and should have {expected.nbytes}"
            if checksum and (crc32 := checksum_of(handle, expected.nbytes)) != expected.crc32:
                own = File(expected.nbytes, crc32)
                other = next((n for n, file in self.manifest.files.items() if file == own), None)
                should = f"should have {expected.crc32:08x}: it is damaged"
                return f"{name} has checksum {crc32:08x}, and {f'holds what {other} should hold' if other else should}"
            return self._problem_of_header(name, handle, expected.nbytes)
        except OSError as error:
            return f"{name} cannot be read ({reason(error)})"

    def _problem_of_header(self, name: str, handle: int, nbytes: int) -> str | None:
        """Where a shard's header contradicts the manifest: the checkpoint's id, or its tensors."""
        length = int.from_bytes(os.pread(handle, 8, 0), "little")
        try:
            header = json.loads(os.pread(handle, length, 8)) if length <= min(nbytes - 8, LONGEST_HEADER) else None
            placed = {key: entry for key, entry in header.items() if key != "__metadata__"}  # type: ignore[union-attr]
            own = header.get("__metadata__", {}).get(ID, self.manifest.about["id"])  # type: ignore[union-attr]
        except (ValueError, TypeError, AttributeError, RecursionError):
            return f"{name} is damaged: it has no header of a safetensors file"
        if own != self.manifest.about["id"]:
            return f"{name} belongs to the checkpoint {own}, and the manifest to {self.manifest.about['id']}"
        for key, chunk in self._chunks_of(name):
            dtype = self.manifest.tensors[key].dtype
            begin = chunk.offset - 8 - length
            wanted: Any = {
                "dtype": dtype_name(dtype),
                "shape": [chunk.numel],
                "data_offsets": [begin, begin + chunk.numel * dtype.itemsize],
            }
            if placed.pop(f"{key}[{chunk.start}:{chunk.start + chunk.numel}]", None) != wanted:
                return f"{name} does not hold {key} from {chunk.start} on where the manifest has it"
        if placed:
            return f"{name} holds {next(iter(placed))}, which is not in the manifest"
        return None

    def _chunks_of(self, name: str) -> Iterator[tuple[str, Chunk]]:
        if self._by_file is None:
            self._by_file = ByFile({key: tensor.chunks for key, tensor in self.manifest.tensors.items()})
            self._number = {name: number for number, name in enumerate(self.manifest.files)}
        return self._by_file.of(self._number[name])


def vanished(folder: Path) -> Vanished:
    """The error for a folder that is not what it was."""
    return Vanished(
        f"Another save replaced or deleted {folder} while it was being loaded. Nothing was changed: load again, or load"
        f" the newest checkpoint of {folder.parent}."
    )


def open_checkpoint(
    where: Callable[[], Path], files: Callable[[Manifest], Iterable[str]] = lambda _: ()
) -> OpenCheckpoint:
    """Open the checkpoint that `where` finds, and hold `files` of it.

    Tries again where a save replaces it meanwhile.

    Raises:
        CheckpointError: there is none, its manifest is damaged, or it is replaced again and again.
    """
    gone: list[Vanished] = []
    for pause in PAUSES:
        try:
            return _open(found_again(where, gone), files)
        except Vanished as error:
            gone[:] = [error]
            time.sleep(pause)
    return _open(found_again(where, gone), files)


def found_again(where: Callable[[], Path], gone: Sequence[Vanished]) -> Path:
    """What `where` finds.

    Raises:
        CheckpointError: it finds nothing: what it raises, or, where it found something before that
            is gone, that.
    """
    try:
        return where()
    except CheckpointError:
        if gone:
            raise gone[0] from None
        raise


def _open(folder: Path, files: Callable[[Manifest], Iterable[str]]) -> OpenCheckpoint:
    opened = OpenCheckpoint(folder)
    try:
        opened.hold(files(opened.manifest))
    except BaseException:
        opened.close()
        raise
    return opened


def _allow(files: int) -> None:
    """Raise the limit of open files to `files` + _OTHERS, as far as allowed; it stays raised."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = files + _OTHERS
    if soft != resource.RLIM_INFINITY and needed > soft:
        most = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, most), hard))
