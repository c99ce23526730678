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

    While one is brought to its place, the next one is read.

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
        for range_, packed in ahead.in_order(reads.packed, wanted):
            if range_.in_place() is None:
                range_.unpack(packed)
                reads.rooms.give_back(packed)
            progress.add(packed.numel() * tensors[range_.key].dtype.itemsize)


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
        if taken.device.type == "cpu":
            self._free.append(torch.empty(0, dtype=torch.uint8).set_(taken.untyped_storage()))


class _Reads:
    """Reads of one load, on threads."""

    def __init__(self, opened: OpenCheckpoint, ahead: ReadAhead) -> None:
        self._opened, self._ahead = opened, ahead
        self.rooms = _Rooms()

    @torch.no_grad()
    def packed(self, range_: Range) -> Tensor:
        """A range's elements: in their place, where they lie in a row there."""
        here = range_.in_place()
        packed = self._room(range_) if here is None else here
        runs = orders.runs_of(range_, self._opened.manifest)
        if runs is None:
            self._read(range_.key, range_.start, packed)
        else:
            packed.copy_(self._gathered(range_, runs))
        return packed

    def _room(self, range_: Range) -> Tensor:
        on_host = range_.pieces[0].memory.device.type == "cpu"
        return self.rooms.take(range_.numel, range_.dtype) if on_host else range_.room()

    def _gathered(self, range_: Range, runs: orders.Ints) -> Tensor:
        """A range whose elements lie in runs; what is between short gaps is read with them."""
        dtype = self._opened.manifest.tensors[range_.key].dtype
        gathered = torch.empty(range_.numel, dtype=dtype)
        for group in orders.read_together(runs):
            begin, (_, last, numel) = group[0][1], group[-1]
            values = torch.empty(last + numel - begin, dtype=dtype)
            self._read(range_.key, begin, values)
            for place, at, numel in group:
                place, at = place - range_.start, at - begin
                gathered[place : place + numel] = values[at : at + numel]
        return gathered

    def _read(self, key: str, start: int, packed: Tensor) -> None:
        """Read as many elements from `start` on as `packed` has."""
        stored, stop = self._opened.manifest.tensors[key], start + packed.numel()
        if stop > stored.numel:
            raise CheckpointError(f"elements {start} to {stop} of {key} were wanted, and it has {stored.numel}")
        direct = packed.dtype == stored.dtype and packed.device.type == "cpu"
        for chunk in stored.chunks.overlapping(start, stop):
            low, high = max(start, chunk.start), min(stop, chunk.start + chunk.numel)
            target = packed[low - start : high - start]
            read = target if direct else self.rooms.take(high - low, stored.dtype)
            self._opened.read_at(chunk.file, chunk.offset + (low - chunk.start) * stored.dtype.itemsize, read)
            if not direct:
                target.copy_(read)
                self.rooms.give_back(read)
            self._ahead.tick()
