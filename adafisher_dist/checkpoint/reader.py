"""Reads ranges, whatever ranges, dtypes and tensor-parallel parts were written."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from adafisher_dist.checkpoint import orders
from adafisher_dist.checkpoint.errors import CheckpointError
from adafisher_dist.checkpoint.open_checkpoint import OpenCheckpoint
from adafisher_dist.checkpoint.ranges import Range
from adafisher_dist.checkpoint.read_ahead import ReadAhead
from adafisher_dist.checkpoint.writer import Progress


@torch.no_grad()
def read_ranges(opened: OpenCheckpoint, wanted: Sequence[Range]) -> None:
    """Read these ranges into this rank's memory, converting dtypes that differ.

    Threads read on the host alone; while one range is brought to its place, on this thread and its
    stream of a device, the next one is read.

    Args:
        opened: the checkpoint, with all files held that the ranges lie in.
        wanted: the ranges; some may overlap, as where tensors were tied.

    Raises:
        CheckpointError: the checkpoint does not have all of a range.
        OSError: a file cannot be read.
    """
    tensors = opened.manifest.tensors
    total = sum(range_.numel * tensors[range_.key].dtype.itemsize for range_ in wanted)
    progress = Progress(f"reading {opened.folder}", total)
    with ReadAhead() as ahead:
        reads = _Reads(opened, ahead)
        for range_, values in ahead.in_order(reads.values, wanted):
            if _on_host(range_, values.dtype) is None:
                _bring(values, range_)
                reads.rooms.give_back(values)
            progress.add(values.nbytes)


def _on_host(range_: Range, dtype: torch.dtype) -> Tensor | None:
    """The place of a range, where what is saved can be read straight into it."""
    here = range_.in_place()
    return here if here is not None and here.device.type == "cpu" and here.dtype == dtype else None


def _bring(values: Tensor, range_: Range) -> None:
    here = range_.in_place()
    if here is None:
        range_.unpack(values.to(range_.pieces[0].memory.device, range_.dtype))
    else:
        here.copy_(values)


class _Rooms:
    """Memory of the host that is used again: to get new pages costs more than to read into them."""

    def __init__(self) -> None:
        self._free: list[Tensor] = []

    def take(self, numel: int, dtype: torch.dtype) -> Tensor:
        """An uninitialised 1-d tensor."""
        nbytes = numel * dtype.itemsize
        try:
            room = self._free.pop()
        except IndexError:  # which is another thread's answer too
            room = torch.empty(0, dtype=torch.uint8)
        if room.numel() < nbytes:
            room = torch.empty(nbytes, dtype=torch.uint8)
        return room[:nbytes].view(dtype)

    def give_back(self, taken: Tensor) -> None:
        """It is not needed any more."""
        self._free.append(torch.empty(0, dtype=torch.uint8).set_(taken.untyped_storage()))


class _Reads:
    """Reads of one load, on threads."""

    def __init__(self, opened: OpenCheckpoint, ahead: ReadAhead) -> None:
        self._opened, self._ahead = opened, ahead
        self.rooms = _Rooms()

    def values(self, range_: Range) -> Tensor:
        """A range's elements as they were saved, in its place or in a room."""
        dtype = self._opened.manifest.tensors[range_.key].dtype
        here = _on_host(range_, dtype)
        values = self.rooms.take(range_.numel, dtype) if here is None else here.detach()
        runs = orders.runs_of(range_, self._opened.manifest)
        if runs is None:
            self._read(range_.key, range_.start, values)
        else:
            self._gather(range_, runs, values)
        return values

    def _gather(self, range_: Range, runs: orders.Ints, into: Tensor) -> None:
        """A range whose elements lie in runs; what is between short gaps is read with them."""
        for group in orders.read_together(runs):
            begin, (_, last, numel) = group[0][1], group[-1]
            values = self.rooms.take(last + numel - begin, into.dtype)
            self._read(range_.key, begin, values)
            for place, at, numel in group:
                place, at = place - range_.start, at - begin
                into[place : place + numel] = values[at : at + numel]
            self.rooms.give_back(values)

    def _read(self, key: str, start: int, into: Tensor) -> None:
        """Read as many elements from `start` on as there is room for."""
        stored, stop = self._opened.manifest.tensors[key], start + into.numel()
        if stop > stored.numel:
            raise CheckpointError(f"elements {start} to {stop} of {key} were wanted, and it has {stored.numel}")
        for chunk in stored.chunks.overlapping(start, stop):
            low, high = max(start, chunk.start), min(stop, chunk.start + chunk.numel)
            offset = chunk.offset + (low - chunk.start) * stored.dtype.itemsize
            self._opened.read_at(chunk.file, offset, into[low - start : high - start])
            self._ahead.tick()
