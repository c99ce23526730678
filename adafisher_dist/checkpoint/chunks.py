"""Where the elements of a tensor lie in a checkpoint's files: a table with a row for each chunk.

Every rank reads the tables of all tensors, and a thousand ranks write hundreds of thousands of
chunks. So a table is one array of integers, and an object is made of a chunk only where one is
asked for. In manifest.json a short table is a list, [[start, elements, file, offset], …]. A longer
one is text: base64 of zlib of little-endian int64, first the elements of all chunks, then their
files, then their offsets, each number less the one before it, so that most are small or repeat.
"""

from __future__ import annotations

import base64
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from reprlib import repr as short
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Numbers in a manifest are below this: int64, with room to add two of them.
LARGEST = 2**62

# A checkpoint has no more chunks in all. A chunk takes 24 bytes of memory, and a text can hold a
# thousand times its length: it must not make a load take all that there is.
MOST_CHUNKS = 2**25

# Longer tables are written as text.
_LISTED = 64

_COLUMNS = 3  # of a table: stop, file, offset; as text, elements take the place of stops
_ROW_BYTES = _COLUMNS * 8


@dataclass(frozen=True, slots=True)
class Chunk:
    """Elements [start, start + numel) of a tensor: they begin `offset` bytes into a file."""

    start: int
    numel: int
    file: str
    offset: int


@dataclass(frozen=True, slots=True, eq=False)
class Chunks:
    """The chunks of a tensor in order: each begins where the one before it ends.

    Attributes:
        table: (3, n), int64: for each chunk the element after its last, the number of its file, and
            the byte of that file where it begins.
        files: the names of all files.
    """

    table: NDArray[np.int64]
    files: Sequence[str]

    def __len__(self) -> int:
        return len(self.table[0])

    def __iter__(self) -> Iterator[Chunk]:
        return self._made(slice(0, len(self)))

    def __getitem__(self, row: int) -> Chunk:
        return next(self._made(slice(row, row + 1)))

    def overlapping(self, start: int, stop: int) -> Iterator[Chunk]:
        """Those that hold any of the elements [start, stop), whole."""
        return self._made(self._rows(start, stop))

    def files_of(self, start: int | NDArray[np.int64], stop: int | NDArray[np.int64]) -> set[str]:
        """The files that the elements [start, stop) lie in; of several such runs, where arrays."""
        starts, ends = np.atleast_1d(start), np.atleast_1d(stop)
        some = starts < ends
        marks = np.zeros(len(self) + 1, dtype=np.int64)  # of a chunk where runs begin, and after where they end
        np.add.at(marks, np.searchsorted(self.table[0], starts[some], side="right"), 1)
        np.add.at(marks, np.minimum(len(self), np.searchsorted(self.table[0], ends[some]) + 1), -1)
        return {self.files[number] for number in np.unique(self.table[1, np.cumsum(marks)[:-1] > 0]).tolist()}

    def dump(self) -> list[list[int]] | str:
        """What manifest.json has of them."""
        if len(self) <= _LISTED:
            return [
                [c.start, c.numel, number, c.offset] for c, number in zip(self, self.table[1].tolist(), strict=True)
            ]
        rows = self.table.copy()
        rows[0] = np.diff(rows[0], prepend=0)
        return base64.b64encode(zlib.compress(np.diff(rows, prepend=0).astype("<i8").tobytes())).decode()

    def _rows(self, start: int, stop: int) -> slice:
        stops = self.table[0]
        first = int(np.searchsorted(stops, start, side="right"))
        return slice(first, min(len(self), int(np.searchsorted(stops, stop)) + 1) if start < stop else first)

    def _made(self, rows: slice) -> Iterator[Chunk]:
        start = int(self.table[0, rows.start - 1]) if rows.start else 0
        for stop, number, offset in self.table[:, rows].T.tolist():
            yield Chunk(start, stop - start, self.files[number], offset)
            start = stop


class ByFile:
    """The chunks of all tensors, to be found by the number of the file that they lie in."""

    def __init__(self, tensors: Mapping[str, Chunks]) -> None:
        self._keys, self._chunks = [*tensors], [*tensors.values()]
        self._ends = np.cumsum([len(chunks) for chunks in self._chunks], dtype=np.int64)
        files = np.concatenate([np.empty(0, np.int64), *(chunks.table[1] for chunks in self._chunks)])
        self._rows = np.argsort(files, kind="stable")
        self._files = files[self._rows]

    def of(self, file: int) -> Iterator[tuple[str, Chunk]]:
        """What lies in a file: keys of tensors, and a chunk of each."""
        first, last = np.searchsorted(self._files, [file, file + 1])
        rows = self._rows[first:last]
        tensors = np.searchsorted(self._ends, rows, side="right")
        for row, tensor in zip(rows.tolist(), tensors.tolist(), strict=True):
            chunks = self._chunks[tensor]
            yield self._keys[tensor], chunks[row - int(self._ends[tensor]) + len(chunks)]


def collect(key: str, numel: int, chunks: Sequence[Chunk], files: Sequence[str]) -> Chunks:
    """The table of the chunks that the ranks have written of a tensor of so many elements.

    Raises:
        ValueError: there is a gap, or elements were written twice: no load could read it.
    """
    stop = 0
    for chunk in (*chunks, Chunk(numel, 0, "", 0)):
        if chunk.start != stop:
            raise ValueError(f"the ranks wrote {key} up to element {stop}, and then from {chunk.start} on, of {numel}")
        stop += chunk.numel
    number = {name: index for index, name in enumerate(files)}
    rows = [[c.start + c.numel, number[c.file], c.offset] for c in chunks]
    return Chunks(np.array(rows, dtype=np.int64).reshape(-1, _COLUMNS).T.copy(), files)


class Shards:
    """The files of a checkpoint: their names, and how many bytes each has."""

    def __init__(self, nbytes: Mapping[str, int]) -> None:
        self.names = tuple(nbytes)
        self.nbytes = np.array([*nbytes.values()], dtype=np.int64)


def parse(value: Any, key: str, numel: int, itemsize: int, shards: Shards, most: int) -> Chunks:
    """The chunks of a tensor, from what manifest.json has of them, with everything checked.

    Args:
        value: a list or text, see the module's docstring.
        key: of the tensor.
        numel: its elements, all of which the chunks have to hold.
        itemsize: bytes of an element.
        shards: the files.
        most: how many chunks there may be.

    Raises:
        ValueError: says what is wrong.
    """
    if isinstance(value, str):
        table, starts = _unpacked(value, key, min(most, numel)), None
    else:
        listed = _listed(value, key, most)
        table, starts = listed[1:], listed[0]
    if not table.size:
        if numel:
            raise ValueError(f"it does not place all {numel} elements of {key}")
        return Chunks(table, shards.names)
    elements, files, offsets = table
    if table.min() < 0 or table.max() >= LARGEST or files.max() >= len(shards.names):
        raise _wrong(key, f"whole numbers below 2**62, with files below {len(shards.names)}", value)
    # No difference of these overflows, as the sum of an offset and a length in bytes may.
    beyond = elements > (shards.nbytes[files] - offsets) // itemsize
    if beyond.any():
        raise ValueError(f"it places a part of {key} outside of {shards.names[files[beyond.argmax()]]}")
    table[0] = stops = np.cumsum(elements)
    if starts is not None:
        before = np.concatenate(([0], stops[:-1]))
        apart = starts != before
        if apart.any():
            row = apart.argmax()
            raise ValueError(f"it does not place elements {before[row]} to {starts[row]} of {key}, or twice")
    # A sum past int64 is first seen as a negative one, as no addend is above 2**62.
    if stops.min() < 0 or stops[-1] != numel:
        raise ValueError(f"it does not place all {numel} elements of {key}")
    return Chunks(table, shards.names)


def _listed(value: Any, key: str, most: int) -> NDArray[np.int64]:
    """Starts, elements, files and offsets: (4, n)."""
    fours = isinstance(value, list) and {*map(type, value)} <= {list} and {*map(len, value)} <= {4}
    numbers: list[Any] = [*chain.from_iterable(value)] if fours else [None]
    if not {*map(type, numbers)} <= {int} or min(numbers, default=0) < 0 or max(numbers, default=0) >= LARGEST:
        raise _wrong(key, "a list of [start, elements, file, offset], whole numbers below 2**62", value)
    if len(value) > most:
        raise _too_many(key, most)
    return np.array(numbers, dtype=np.int64).reshape(-1, 4).T.copy()


def _unpacked(text: str, key: str, most: int) -> NDArray[np.int64]:
    """Elements, files and offsets: (3, n), of `most` chunks at most, whatever the text says."""
    unpacker = zlib.decompressobj()
    try:
        # One byte more than there may be: so zlib comes to the stream's end, and its checksum.
        data = unpacker.decompress(base64.b64decode(text, validate=True), most * _ROW_BYTES + 1)
    except (ValueError, zlib.error) as error:
        raise _wrong(key, f"base64 of zlib ({error})", text) from None
    if len(data) > most * _ROW_BYTES:
        raise _too_many(key, most)
    if not unpacker.eof or unpacker.unused_data or len(data) % _ROW_BYTES:
        raise _wrong(key, f"one whole zlib stream of rows of {_ROW_BYTES} bytes", text)
    return np.cumsum(np.frombuffer(data, dtype="<i8").reshape(_COLUMNS, -1), axis=1, dtype=np.int64)


def _wrong(key: str, should: str, value: Any) -> ValueError:
    return ValueError(f"chunks of tensor {key} should be {should}, and are {short(value)}")


def _too_many(key: str, most: int) -> ValueError:
    return ValueError(
        f"chunks of tensor {key} are more than {most}: as many as its elements may be, and in all {MOST_CHUNKS}"
    )
