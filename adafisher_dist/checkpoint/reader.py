"""Reads ranges, whatever ranges, dtypes and tensor-parallel parts were written."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from adafisher_dist.checkpoint import orders
from adafisher_dist.checkpoint.errors import CheckpointError
from adafisher_dist.checkpoint.host_buffers import HostBuffers
from adafisher_dist.checkpoint.open_checkpoint import OpenCheckpoint
from adafisher_dist.checkpoint.ranges import Range
from adafisher_dist.checkpoint.read_ahead import ReadAhead
from adafisher_dist.checkpoint.writer import Progress


@torch.no_grad()
def read_ranges(opened: OpenCheckpoint, wanted: Sequence[Range]) -> None:
    """Read these ranges into this rank's memory, converting dtypes that differ.

    Threads read, and do what is to be done on the host; what is brought to a device is, meanwhile,
    on this thread and its stream.

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
        for range_, values in ahead.in_order(reads.read, wanted):
            if values is not None:
                reads.bring(values, range_)
            progress.add(range_.numel * tensors[range_.key].dtype.itemsize)


def _check_that_it_fits(values: Tensor, range_: Range) -> None:
    """Refuse numbers that are beyond those of the dtype they are converted to.

    Raises:
        CheckpointError: there is one.
    """
    (low, high), (own_low, own_high) = _bounds(range_.dtype), _bounds(values.dtype)
    if low <= own_low / 1.01 and own_high / 1.01 <= high:  # bfloat16 for float32 too
        return
    if values.is_floating_point():
        comparable = values.float() if values.itemsize == 1 else values
        if range_.dtype.itemsize == 1:  # some of 8 bits have no infinity, and become their largest
            beyond = comparable[comparable.isfinite() & (comparable.abs() > high)]
        else:
            beyond = comparable[comparable.isfinite() & ~comparable.to(range_.dtype).isfinite()]
    else:  # torch compares integers with bounds of their own dtype alone
        comparable = values.view(torch.int64) if values.dtype == torch.uint64 else values.to(torch.int64)
        least = 0 if values.dtype == torch.uint64 else max(low, own_low)  # what is negative then is too large
        beyond = comparable[(comparable < least) | (comparable > min(high, own_high, _LARGEST))]
    if len(beyond):
        name, most = str(range_.dtype).removeprefix("torch."), max(beyond.tolist(), key=abs)
        raise CheckpointError(
            f"{range_.key} has numbers that {name} has not, as {most:.6g} ({name} ends at {high:.6g}): load it into a"
            f" model in {str(values.dtype).removeprefix('torch.')}, or another dtype that has them"
        )


_LARGEST = torch.iinfo(torch.int64).max


def _bounds(dtype: torch.dtype) -> tuple[float, float]:
    if dtype.is_complex:
        dtype = dtype.to_real()
    if dtype == torch.bool:
        return 0, 1
    info = torch.finfo(dtype) if dtype.is_floating_point else torch.iinfo(dtype)
    return info.min, info.max


class _Reads:
    """Reads of one load, on threads."""

    def __init__(self, opened: OpenCheckpoint, ahead: ReadAhead) -> None:
        self._opened, self._ahead = opened, ahead
        self._buffers = HostBuffers()
        self._inference = torch.is_inference_mode_enabled()  # of the caller, whose tensors are to be written

    def read(self, range_: Range) -> Tensor | None:
        """Read a range to its place on the host; for a device, into a buffer, which is returned."""
        with torch.no_grad(), torch.inference_mode(self._inference):  # a thread has modes of its own
            return self._in_place_or_buffer(range_)

    def _in_place_or_buffer(self, range_: Range) -> Tensor | None:
        dtype, here = self._opened.manifest.tensors[range_.key].dtype, range_.in_place()
        on_host = range_.device.type == "cpu"
        if here is not None and on_host and here.dtype == dtype:
            self._read_into(range_, here)
            return None
        buffer = self._buffers.take(range_.numel, dtype)
        self._read_into(range_, buffer)
        if not on_host:
            return buffer
        self.bring(buffer, range_)
        return None

    def bring(self, buffer: Tensor, range_: Range) -> None:
        """Copy what was read to its place, and give the buffer back."""
        here = range_.in_place()
        _check_that_it_fits(buffer, range_)
        if here is None:
            range_.unpack(buffer.to(range_.device, range_.dtype))
        else:
            here.copy_(buffer)
        self._buffers.give_back(buffer)

    def _read_into(self, range_: Range, values: Tensor) -> None:
        runs = orders.runs_of(range_, self._opened.manifest)
        if runs is None:
            self._read(range_.key, range_.start, values)
        else:
            self._gather(range_, runs, values)

    def _gather(self, range_: Range, runs: orders.Ints, into: Tensor) -> None:
        """A range whose elements lie in runs; what is between short gaps is read with them."""
        for group in orders.read_together(runs):
            begin, (_, last, numel) = group[0][1], group[-1]
            values = self._buffers.take(last + numel - begin, into.dtype)
            self._read(range_.key, begin, values)
            for place, at, numel in group:
                place, at = place - range_.start, at - begin
                into[place : place + numel] = values[at : at + numel]
            self._buffers.give_back(values)

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
