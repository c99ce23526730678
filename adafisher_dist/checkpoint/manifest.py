"""What a checkpoint folder holds: manifest.json, and the shards, which are safetensors files.

manifest.json lists every file with its checksum, and every tensor with its places (`chunks`). A
shard is the 8-byte length of a JSON header, the header, and the tensors' bytes. A tensor there is a
range of a global 1-d tensor: "fisher/layer.weight[0:4096]".
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as short
from typing import Any

import torch

from adafisher_dist.checkpoint import chunks, schema
from adafisher_dist.checkpoint.chunks import Chunks, Shards
from adafisher_dist.checkpoint.errors import CheckpointError, damaged, reason_and_remedy
from adafisher_dist.checkpoint.files import open_file

# Bytes of a shard's header: what the safetensors library reads at most.
LONGEST_HEADER = 100_000_000

# Bytes of a manifest that is read, or written. Of Llama-7B at 1,024 ranks it has 2 million; as
# Python's objects it may take 50 times as many.
LARGEST_MANIFEST = 1 << 28

CHECKPOINT_FORMAT = 4

# The same, where tensor parallelism cut parameters: their tensors lie part by part, which earlier
# versions would not know.
WITH_PARTS = 5

# The earlier format whose weights can be read, and not its optimizer's state: F was of rows that
# were not weighed, and blocks were cut by other rules.
WEIGHTS_ONLY = 3
_READ = (WEIGHTS_ONLY, CHECKPOINT_FORMAT, WITH_PARTS)
MANIFEST = "manifest.json"

# What is said of a parameter whose values are not in the checkpoint: they stay what they are in the
# model.
LEFT_OUT = "left_out"

_LONGEST_NAME = 255

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


# What stands before the content: a checksum of the content's bytes.
_HEAD = b'{"crc32": "%08x", "content": '


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A global 1-d tensor, and the chunks that it is stored in."""

    dtype: torch.dtype
    numel: int
    chunks: Chunks

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
        format: `CHECKPOINT_FORMAT`, `WITH_PARTS` or `WEIGHTS_ONLY`.
    """

    about: Mapping[str, Any]
    files: Mapping[str, File]
    tensors: Mapping[str, StoredTensor]
    format: int = CHECKPOINT_FORMAT

    def dump(self) -> bytes:
        """The bytes of manifest.json."""
        content = {
            "format": self.format,
            "about": self.about,
            "files": [{"name": name, "bytes": f.nbytes, "crc32": f"{f.crc32:08x}"} for name, f in self.files.items()],
            "tensors": {
                key: {"dtype": dtype_name(tensor.dtype), "numel": tensor.numel, "chunks": tensor.chunks.dump()}
                for key, tensor in self.tensors.items()
            },
        }
        text = json.dumps(content, allow_nan=False).encode()
        if len(text) > LARGEST_MANIFEST - len(_HEAD % 0) - 1:
            raise CheckpointError(
                f"its {MANIFEST} would have {len(text)} bytes, and may have {LARGEST_MANIFEST}: save large values as"
                " tensors or arrays, not as lists, and fewer parameters"
            )
        return _HEAD % zlib.crc32(text) + text + b"}"


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
        text = _content(folder, directory)
        whole = json.loads(text, object_pairs_hook=_object)
        content, crc32 = whole["content"], whole["crc32"]
        summed = f"{zlib.crc32(memoryview(text)[len(_HEAD % 0) : -1]):08x}"
        if crc32 != summed:
            summed = _checksum(content)
    except FileNotFoundError:
        raise CheckpointError(f"{folder} is no checkpoint of adafisher_dist: it has no {MANIFEST}.") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {reason_and_remedy(error).removesuffix('.')}.") from error
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise damaged(path, f"it cannot be parsed ({error})") from error
    if crc32 != summed:
        raise damaged(path, f"its checksum is {summed}, and it says {crc32}")
    try:
        own = schema.whole_number_in(content, "format", "the manifest", low=1)
        if own in _READ:
            schema.check(content, DTYPES, old=own == WEIGHTS_ONLY)
    except ValueError as error:
        raise damaged(path, error) from error
    if own not in _READ:
        remedy = "update" if own > WITH_PARTS else "load it with the version that saved it, an older"
        raise CheckpointError(
            f"{folder} has format {own}, and this version of adafisher_dist reads {CHECKPOINT_FORMAT} and"
            f" {WITH_PARTS}: {remedy} adafisher_dist."
        )
    try:
        return _parse(content)
    except ValueError as error:
        raise damaged(path, error) from error


def _content(folder: Path, directory: int | None) -> bytes:
    opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY) if directory is None else directory
    try:
        handle = open_file(MANIFEST, opened)
    finally:
        if directory is None:
            os.close(opened)
    try:
        if (nbytes := os.fstat(handle).st_size) > LARGEST_MANIFEST:
            raise ValueError(f"it has {nbytes} bytes, and a manifest has at most {LARGEST_MANIFEST}")
        return b"".join(iter(lambda: os.read(handle, 1 << 24), b""))
    finally:
        os.close(handle)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; of a key that it has twice, it is not known which is meant."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"an object has the key {short(key)} twice")
        found[key] = value
    return found


def _parse(content: Mapping[str, Any]) -> Manifest:
    """A manifest with a right checksum that no save made may lead to other files: all is checked.

    Raises:
        ValueError: says what is wrong.
    """
    files = {file["name"]: File(file["bytes"], int(file["crc32"], 16)) for file in content["files"]}
    for name in files:
        if Path(name).name != name or not name.isprintable() or len(name) > _LONGEST_NAME:
            raise ValueError(f"it names the file {short(name)}, which is not in its folder, or no plain name")
    if len(files) != len(content["files"]):
        raise ValueError("it names a file twice")
    shards = Shards({name: file.nbytes for name, file in files.items()})
    tensors: dict[str, StoredTensor] = {}
    left = chunks.MOST_CHUNKS
    for key, entry in content["tensors"].items():
        dtype, numel = DTYPES[entry["dtype"]], entry["numel"]
        tensors[key] = StoredTensor(
            dtype, numel, chunks.parse(entry["chunks"], key, numel, dtype.itemsize, shards, left)
        )
        left -= len(tensors[key].chunks)
    held, needed = sum(file.nbytes for file in files.values()), sum(tensor.nbytes for tensor in tensors.values())
    if needed > held:  # some would share bytes, and a small file ask for much memory
        raise ValueError(f"its tensors have {needed} bytes, and its files {held}")
    return Manifest(content["about"], files, tensors, content["format"])


def _checksum(content: Mapping[str, Any]) -> str:
    """Of the content as earlier versions summed it: its keys sorted, whatever its bytes are."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return f"{zlib.crc32(text.encode()):08x}"
