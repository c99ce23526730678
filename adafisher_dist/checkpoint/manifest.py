"""What a checkpoint folder holds: manifest.json, and the shards, which are safetensors files.

manifest.json lists every file with its checksum, and every tensor with its place. A shard is the
8-byte length of a JSON header, the header, and the tensors' bytes. A tensor there is a range of a
global 1-d tensor: "fisher/layer.weight[0:4096]".
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from adafisher_dist.checkpoint import schema

# How files are opened: not to wait for a writer, where one is a pipe.
READ = os.O_RDONLY | os.O_NONBLOCK

CHECKPOINT_FORMAT = 4

# The earlier format whose weights can be read, and not its optimizer's state: F was of rows that
# were not weighed, and blocks were cut by other rules.
WEIGHTS_ONLY = 3
MANIFEST = "manifest.json"

# What is said of a parameter whose values are not in the checkpoint: they stay what they are in the
# model.
LEFT_OUT = "left_out"

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.uint16: "U16",
    torch.uint32: "U32",
    torch.uint64: "U64",
    torch.bool: "BOOL",
    torch.complex64: "C64",
}
DTYPES = {name: dtype for dtype, name in _NAMES.items()}


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, is damaged, or does not fit. Raised on all ranks alike."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """Elements [start, start + numel) of a tensor: they begin `offset` bytes into a file."""

    start: int
    numel: int
    file: str
    offset: int


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A global 1-d tensor, and the chunks that it is stored in."""

    dtype: torch.dtype
    numel: int
    chunks: Sequence[Chunk]

    @property
    def nbytes(self) -> int:
        """Its bytes."""
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class File:
    """A shard: its length and the CRC-32 of all its bytes."""

    nbytes: int
    crc32: int


@dataclass(frozen=True, slots=True)
class Manifest:
    """See the module's docstring.

    Attributes:
        about: whatever is no tensor, as JSON: who wrote it, step, world size, parameters, param
            groups, values.
        files: by name.
        tensors: by key.
        format: `CHECKPOINT_FORMAT`, or `WEIGHTS_ONLY`.
    """

    about: Mapping[str, Any]
    files: Mapping[str, File]
    tensors: Mapping[str, StoredTensor]
    format: int = CHECKPOINT_FORMAT

    def dump(self) -> bytes:
        """The bytes of manifest.json."""
        names = list(self.files)
        number = {name: index for index, name in enumerate(names)}
        content = {
            "format": self.format,
            "about": self.about,
            "files": [{"name": name, "bytes": f.nbytes, "crc32": f"{f.crc32:08x}"} for name, f in self.files.items()],
            "tensors": {
                key: {
                    "dtype": dtype_name(tensor.dtype),
                    "numel": tensor.numel,
                    "chunks": [[c.start, c.numel, number[c.file], c.offset] for c in tensor.chunks],
                }
                for key, tensor in self.tensors.items()
            },
        }
        return json.dumps({"crc32": _checksum(content), "content": content}, allow_nan=False).encode()


def dtype_name(dtype: torch.dtype) -> str:
    """The name that safetensors has for a dtype.

    Raises:
        TypeError: it has none.
    """
    if dtype not in _NAMES:
        raise TypeError(f"A tensor of {dtype} cannot be saved: safetensors has no name for that dtype.")
    return _NAMES[dtype]


def read(folder: Path, directory: int | None = None) -> Manifest:
    """The manifest of a checkpoint folder.

    Args:
        folder: its path, which errors name.
        directory: a handle of the folder, to read from that whatever its path leads to by now.

    Raises:
        CheckpointError: there is none, it is damaged, or of another format.
    """
    path = folder / MANIFEST
    try:
        whole = json.loads(_content(path) if directory is None else _content(MANIFEST, directory))
        content, crc32 = whole["content"], whole["crc32"]
        summed = _checksum(content)
    except FileNotFoundError:
        raise CheckpointError(f"{folder} is no checkpoint of adafisher_dist: it has no {MANIFEST}.") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: it cannot be parsed ({error}).") from error
    if crc32 != summed:
        raise CheckpointError(f"{path} is damaged: its checksum is {summed}, and it says {crc32}.")
    try:
        own = schema.whole_number_in(content, "format", "the manifest", low=1)
        if own in (CHECKPOINT_FORMAT, WEIGHTS_ONLY):
            schema.check(content, DTYPES, old=own != CHECKPOINT_FORMAT)
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged: {error}.") from error
    if own not in (CHECKPOINT_FORMAT, WEIGHTS_ONLY):
        remedy = "update" if own > CHECKPOINT_FORMAT else "load it with the version that saved it, an older"
        raise CheckpointError(
            f"{folder} has format {own}, and this version of adafisher_dist reads {CHECKPOINT_FORMAT}: {remedy}"
            " adafisher_dist."
        )
    manifest = _parse(content)
    _check(path, manifest)
    return manifest


def _content(name: str | Path, directory: int | None = None) -> bytes:
    handle = os.open(name, READ, dir_fd=directory)
    try:
        return b"".join(iter(lambda: os.read(handle, 1 << 24), b""))
    finally:
        os.close(handle)


def _parse(content: Mapping[str, Any]) -> Manifest:
    names = dict(enumerate(file["name"] for file in content["files"]))
    return Manifest(
        content["about"],
        {file["name"]: File(file["bytes"], int(file["crc32"], 16)) for file in content["files"]},
        {
            key: StoredTensor(
                DTYPES[tensor["dtype"]],
                tensor["numel"],
                [Chunk(start, numel, names[file], offset) for start, numel, file, offset in tensor["chunks"]],
            )
            for key, tensor in content["tensors"].items()
        },
        content["format"],
    )


def _check(path: Path, manifest: Manifest) -> None:
    """Refuse a manifest with a right checksum that no save made: it may lead to other files."""
    for name in manifest.files:
        if Path(name).name != name or "\0" in name:
            raise CheckpointError(f"{path} names the file {name!r}, which is not in its folder.")
    for key, tensor in manifest.tensors.items():
        stop = 0
        for chunk in tensor.chunks:
            end = chunk.offset + chunk.numel * tensor.dtype.itemsize
            if end > manifest.files[chunk.file].nbytes:
                raise CheckpointError(f"{path} places a part of {key} outside of {chunk.file}.")
            if chunk.start != stop:
                raise CheckpointError(f"{path} does not place elements {stop} to {chunk.start} of {key}, or twice.")
            stop += chunk.numel
        if stop != tensor.numel:
            raise CheckpointError(f"{path} does not place all {tensor.numel} elements of {key}.")


def _checksum(content: Mapping[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return f"{zlib.crc32(text.encode()):08x}"
