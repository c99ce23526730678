"""Reads ranges, whatever ranges and dtypes were written."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from adafisher_dist.checkpoint.manifest import CheckpointError
from adafisher_dist.checkpoint.open_checkpoint import OpenCheckpoint
from adafisher_dist.checkpoint.ranges import Range
from adafisher_dist.checkpoint.writer import Progress


@torch.no_grad()
def read_ranges(opened: OpenCheckpoint, wanted: Sequence[Range]) -> None:
    """Read these ranges into this rank's memory, one at a time, converting dtypes that differ.

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
    for range_ in wanted:
        here = range_.in_place()
        packed = range_.room() if here is None else here
        _read(opened, range_, packed, progress)
        if here is None:
            range_.unpack(packed)


def _read(opened: OpenCheckpoint, range_: Range, packed: Tensor, progress: Progress) -> None:
    stored, start, stop = opened.manifest.tensors[range_.key], range_.start, range_.start + range_.numel
    if stop > stored.numel:
        raise CheckpointError(f"elements {start} to {stop} of {range_.key} were wanted, and it has {stored.numel}")
    direct = packed.dtype == stored.dtype and packed.device.type == "cpu"
    for chunk in stored.chunks.overlapping(start, stop):
        low, high = max(start, chunk.start), min(stop, chunk.start + chunk.numel)
        target = packed[low - start : high - start]
        read = target if direct else torch.empty(high - low, dtype=stored.dtype)
        opened.read_at(chunk.file, chunk.offset + (low - chunk.start) * stored.dtype.itemsize, read)
        if not direct:
            target.copy_(read)
        progress.add(read.nbytes)
