"""Writes ranges through torch.distributed.checkpoint: each rank one file, at the end a manifest."""

from __future__ import annotations

import json
import logging
import os
import shutil
import struct
import time
import zlib
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future as Waiting
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, BinaryIO, TypeVar

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future

from adafisher_dist.blocks.parts import PARTS
from adafisher_dist.checkpoint import lengths
from adafisher_dist.checkpoint.chunks import MOST_CHUNKS, Chunk, collect
from adafisher_dist.checkpoint.directory import CheckpointDirectory, PublishedError
from adafisher_dist.checkpoint.errors import CheckpointError
from adafisher_dist.checkpoint.host_buffers import HostBuffers
from adafisher_dist.checkpoint.manifest import (
    CHECKPOINT_FORMAT,
    LONGEST_HEADER,
    MANIFEST,
    WITH_PARTS,
    File,
    Manifest,
    StoredTensor,
    dtype_name,
)
from adafisher_dist.checkpoint.ranges import Range
from adafisher_dist.comm.host_groups import HostGroup, beat

logger = logging.getLogger("adafisher_dist")

# In the header of a shard, the id of the checkpoint that it belongs to.
ID = "adafisher_dist"

T = TypeVar("T")

_SECONDS_BETWEEN_REPORTS = 10.0

# As much is brought to the disk at a time: a sync of a whole file would keep still for as long as
# the disk takes. With a range that is written meanwhile, it is the 64 MiB that docs/checkpoints.md
# asks of a disk within the timeout.
_BYTES_BETWEEN_SYNCS = 1 << 25


class RangeSavePlanner(DefaultSavePlanner):
    """Offers a rank's ranges.

    torch's own planner joins those of all ranks and checks that they cover each tensor.
    """

    def __init__(self, ranges: Sequence[Range]) -> None:
        super().__init__(flatten_state_dict=False)
        # Wide dtypes first, so that all are aligned in the file.
        self._ranges = {(r.key, r.start): r for r in sorted(ranges, key=lambda r: -r.dtype.itemsize)}
        self._buffers, self._taken = HostBuffers(), deque[Tensor]()

    def set_up_planner(self, state_dict: Any, storage_meta: Any = None, is_coordinator: bool = False) -> None:
        """See SavePlanner; the ranges take the place of a state dict."""
        self.is_coordinator = is_coordinator

    def create_local_plan(self) -> SavePlan:
        """One item a range."""
        self.plan = SavePlan([_write_item(range_) for range_ in self._ranges.values()])
        return self.plan

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """See SavePlanner; torch's own would leave one of two ranges at the same place out, unsaid.

        Raises:
            CheckpointError: two ranks write the same elements.
        """
        places: dict[tuple[str, int], int] = {}
        for rank, plan in enumerate(all_plans):
            for item in plan.items:
                assert item.index.offset is not None and item.tensor_data is not None
                first = places.setdefault((item.index.fqn, item.index.offset[0]), rank)
                if first != rank and item.tensor_data.chunk.sizes.numel():
                    raise CheckpointError(
                        f"ranks {first} and {rank} write the same elements of {item.index.fqn}: under one name they"
                        " have different parameters, which checkpoints cannot tell apart"
                    )
        return super().create_global_plan(all_plans)

    @torch.no_grad()
    def resolve_data(self, write_item: WriteItem) -> Tensor:
        """The elements of a range on the host; what was returned before the last may be gone."""
        assert write_item.index.offset is not None
        range_ = self._ranges[write_item.index.fqn, write_item.index.offset[0]]
        lying, on_host = range_.in_place(), range_.device.type == "cpu"
        if lying is not None and on_host:
            return lying
        if len(self._taken) == 2:
            self._buffers.give_back(self._taken.popleft())
        buffer = self._buffers.take(range_.numel, range_.dtype)
        self._taken.append(buffer)
        if on_host:
            range_.pack_into(buffer)
        else:
            buffer.copy_(range_.pack())
        return buffer


def _write_item(range_: Range) -> WriteItem:
    offset = torch.Size([range_.start])
    return WriteItem(
        index=MetadataIndex(range_.key, offset),
        type=WriteItemType.SHARD,
        tensor_data=TensorWriteData(
            chunk=ChunkStorageMetadata(offset, torch.Size([range_.numel])),
            properties=TensorProperties(dtype=range_.dtype),
            size=torch.Size([range_.total]),
        ),
    )


@dataclass(frozen=True, slots=True)
class _Written:
    """What a rank tells the coordinator of a range: its place, its file's length and checksum."""

    chunk: Chunk
    file: File


class ShardWriter(StorageWriter):
    """Writes a rank's file; on the coordinator, the manifest; and publishes the checkpoint."""

    def __init__(
        self, place: CheckpointDirectory, about: Mapping[str, Any], hosts: HostGroup, latest: bool, in_background: bool
    ) -> None:
        self.place, self.about, self.latest = place, about, latest
        self.hosts, self.in_background = hosts, in_background
        self.name = f"shard-{hosts.rank:05d}-of-{hosts.size:05d}.safetensors"
        self.nbytes = 0
        """Of all files, on the coordinator, when it is published."""
        self.handed_over = False
        """Whether this rank's part was written, so that the coordinator may publish."""
        self.published = False
        """Whether the checkpoint has its name; the coordinator alone knows."""

    def reset(self, checkpoint_id: Any = None) -> None:
        """Nothing is kept between saves."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Make the folder before any rank writes: they first send plans to the coordinator."""
        with self.hosts.at_work():
            if is_coordinator:
                self.place.prepare()

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """As it is."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """As they are, if there is room for them; on the coordinator."""
        chunks = sum(len(plan.items) for plan in plans)
        if chunks > MOST_CHUNKS:
            raise CheckpointError(
                f"it has {chunks} chunks, and a checkpoint may have {MOST_CHUNKS}: save fewer parameters, or on fewer"
                " ranks"
            )
        needed = sum(_nbytes(item) for plan in plans for item in plan.items)
        free = shutil.disk_usage(self.place.saving).free
        if needed > free:
            raise CheckpointError(f"it needs {needed} bytes, and {self.place.root} has {free} free")
        return plans

    def write_data(self, plan: SavePlan, planner: Any) -> Future[list[WriteResult]]:
        """Write this rank's ranges, one at a time."""
        future: Future[list[WriteResult]] = Future()
        with self.hosts.at_work():
            results = self._write(plan.items, planner) if plan.items else []
        future.set_result(results)
        self.handed_over = True
        return future

    def _write(self, items: Sequence[WriteItem], planner: Any) -> list[WriteResult]:
        folder = self.place.saving
        if not folder.is_dir():
            raise CheckpointError(
                f"this rank does not see {folder}: all ranks have to give the same path, on a file system that they"
                " share, since rank 0 makes the folder"
            )
        header, chunks = _layout(items, self.name, self.about["id"])
        with (folder / self.name).open("xb") as file:
            # In the background there is nothing to pack, and no thread can be started when Python
            # shuts down.
            with nullcontext(_Direct()) if self.in_background else ThreadPoolExecutor(2) as pool:
                crc32 = _stream(file, header, items, planner, pool)
            os.fsync(file.fileno())
            written = File(file.tell(), crc32)
        return [
            WriteResult(item.index, chunk.numel, _Written(chunk, written))
            for item, chunk in zip(items, chunks, strict=True)
        ]

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write the manifest and publish the checkpoint; on the coordinator."""
        places: dict[str, list[Chunk]] = {}
        files: dict[str, File] = {}
        for result in (result for by_rank in results for result in by_rank):
            written: _Written = result.storage_data
            places.setdefault(result.index.fqn, []).append(written.chunk)
            files[written.chunk.file] = written.file
        files = dict(sorted(files.items()))
        names, tensors = tuple(files), {}
        for key, chunks in sorted(places.items()):
            stored: Any = metadata.state_dict_metadata[key]
            table = collect(key, stored.size[0], sorted(chunks, key=lambda c: c.start), names)
            tensors[key] = StoredTensor(stored.properties.dtype, stored.size[0], table)
        self._check_complete(tensors)
        self._check_files(files)
        cut = any(PARTS in fact for fact in self.about["model"]["parameters"].values())
        manifest = Manifest(self.about, files, tensors, WITH_PARTS if cut else CHECKPOINT_FORMAT)
        with (self.place.saving / MANIFEST).open("xb") as file:
            file.write(manifest.dump())
            file.flush()
            os.fsync(file.fileno())
        self.nbytes = sum(file.nbytes for file in files.values())
        try:
            self.place.publish(self.latest)
        except PublishedError:
            self.published = True
            raise
        self.published = True

    def _check_complete(self, tensors: Mapping[str, StoredTensor]) -> None:
        """Refuse to publish what no load would take, as where ranks left out different parts."""
        needed = dict(lengths.of_weights(self.about))
        for name in self.about["optimizer"]["state"]:
            needed.update(lengths.of_state(self.about, name))
        for key, numel in needed.items():
            held = tensors[key].numel if key in tensors else 0
            if held != numel:
                raise CheckpointError(
                    f"the ranks wrote {held} of the {numel} elements of {key}: all have to save the same model, with"
                    " the same parameters frozen and the same exclude_frozen_parameters"
                )

    def _check_files(self, files: Mapping[str, File]) -> None:
        for name, file in files.items():
            path = self.place.saving / name
            held = path.stat().st_size if path.is_file() else "no"
            if held != file.nbytes:
                raise CheckpointError(
                    f"a rank wrote {file.nbytes} bytes to {name}, and rank 0 sees {held}: save to a file system that"
                    " all ranks share"
                )

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        """The place is given to the constructor."""
        return checkpoint_id is None


def _layout(items: Sequence[WriteItem], name: str, of: str) -> tuple[bytes, list[Chunk]]:
    """The safetensors header, with the checkpoint's id `of`, and each range's place in the file."""
    entries: dict[str, Any] = {}
    places: list[tuple[int, int, int]] = []  # start, elements, first byte
    begin = 0
    for item in items:
        assert item.tensor_data is not None and item.index.offset is not None
        start, numel, dtype = item.index.offset[0], item.tensor_data.chunk.sizes[0], item.tensor_data.properties.dtype
        end = begin + numel * dtype.itemsize
        key = f"{item.index.fqn}[{start}:{start + numel}]"
        entries[key] = {"dtype": dtype_name(dtype), "shape": [numel], "data_offsets": [begin, end]}
        places.append((start, numel, begin))
        begin = end
    text = json.dumps({"__metadata__": {ID: of}, **entries}).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > LONGEST_HEADER:
        raise CheckpointError(
            f"the header of {name} would have {len(text)} bytes, for {len(entries)} tensors, and may have"
            f" {LONGEST_HEADER}: save fewer or larger tensors (of `extra`, say), or on more ranks"
        )
    header = struct.pack("<Q", len(text)) + text
    return header, [Chunk(start, numel, name, len(header) + first) for start, numel, first in places]


class _Direct:
    """An executor that does it at once."""

    def submit(self, work: Callable[[Any], T], argument: Any) -> Waiting[T]:
        """Do it."""
        done: Waiting[T] = Waiting()
        done.set_result(work(argument))
        return done


def _stream(
    file: BinaryIO, header: bytes, items: Sequence[WriteItem], planner: Any, pool: _Direct | ThreadPoolExecutor
) -> int:
    """Write header and ranges, and return the checksum of all bytes.

    One range is packed while the one before is written.
    """
    progress = Progress(f"writing {file.name}", sum(map(_nbytes, items)))
    unsynced = file.write(header)
    crc32 = zlib.crc32(header)
    writing: Waiting[int] | None = None
    syncing: Waiting[None] | None = None
    for item in items:
        data = as_bytes(planner.resolve_data(item))
        crc32 = zlib.crc32(data, crc32)
        if writing is not None:
            writing.result()
        writing = pool.submit(file.write, data)
        unsynced += len(data)
        if unsynced >= _BYTES_BETWEEN_SYNCS:
            if syncing is not None:
                syncing.result()
            syncing, unsynced = pool.submit(os.fsync, file.fileno()), 0
        progress.add(len(data))
    for last in (writing, syncing):
        if last is not None:
            last.result()
    file.flush()
    return crc32


def _nbytes(item: WriteItem) -> int:
    assert item.tensor_data is not None
    return item.tensor_data.chunk.sizes[0] * item.tensor_data.properties.dtype.itemsize


def as_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous 1-d tensor on the host, which are its own."""
    return memoryview(tensor.detach().view(torch.uint8).numpy())


class Progress:
    """Logs from time to time how far a long transfer is; tells waiting ranks that it goes on."""

    def __init__(self, what: str, nbytes: int) -> None:
        self.what, self.nbytes, self.done = what, nbytes, 0
        self.began = self.told = time.monotonic()

    def add(self, nbytes: int) -> None:
        """So many bytes more."""
        beat()
        self.done += nbytes
        now = time.monotonic()
        if now - self.told > _SECONDS_BETWEEN_REPORTS:
            self.told = now
            rate = self.done / (now - self.began) / 1e9
            logger.info("%s: %.1f of %.1f GB, %.2f GB/s", self.what, self.done / 1e9, self.nbytes / 1e9, rate)
