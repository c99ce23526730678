"""Reads ranges through torch.distributed.checkpoint, whatever ranges and dtypes were written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import count
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from adafisher_dist.checkpoint.manifest import CheckpointError
from adafisher_dist.checkpoint.open_checkpoint import OpenCheckpoint
from adafisher_dist.checkpoint.ranges import Range
from adafisher_dist.checkpoint.writer import Progress, as_bytes
from adafisher_dist.comm.host_groups import HostGroup

_Place = tuple[str, int, int]  # key, number, start


class RangeLoadPlanner(LoadPlanner):
    """Asks for a rank's ranges, and puts what arrives where it belongs."""

    def __init__(self, ranges: Sequence[Range]) -> None:
        # Tensors that were tied are read into several places, hence the number.
        self._ranges: dict[_Place, Range] = {}
        for range_ in ranges:
            number = next(n for n in count() if (range_.key, n, range_.start) not in self._ranges)
            self._ranges[range_.key, number, range_.start] = range_
        self._packed: dict[_Place, Tensor] = {}  # ranges that do not lie in a row, until they are complete
        self._missing = {place: range_.numel for place, range_ in self._ranges.items()}
        self._metadata = Metadata({})

    def set_up_planner(self, state_dict: Any, metadata: Metadata | None = None, is_coordinator: bool = False) -> None:
        """See LoadPlanner; the ranges take the place of a state dict."""
        assert metadata is not None
        self._metadata = metadata

    def create_local_plan(self) -> LoadPlan:
        """What to read of which stored chunks, range by range, so that one at a time is packed."""
        chunks: dict[tuple[str, int], list[ChunkStorageMetadata]] = {}
        for (key, number, start), range_ in self._ranges.items():
            chunk = ChunkStorageMetadata(torch.Size([start]), torch.Size([range_.numel]))
            chunks.setdefault((key, number), []).append(chunk)
        items: list[ReadItem] = []
        for (key, number), wanted in chunks.items():
            stored = self._metadata.state_dict_metadata[key]
            assert isinstance(stored, TensorStorageMetadata)
            for item in create_read_items_for_chunk_list(key, stored, wanted):
                index = replace(item.dest_index, fqn=f"{number}/{key}")
                items.append(replace(item, dest_index=index))
        items.sort(key=lambda item: (item.dest_index.fqn, item.dest_index.offset or (), item.dest_offsets))
        return LoadPlan(items)

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        """As they are."""
        return global_plan

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        """As it is."""
        return central_plan

    def load_bytes(self, read_item: ReadItem, value: Any) -> None:
        """A checkpoint holds tensors only.

        Raises:
            CheckpointError: always.
        """
        raise CheckpointError(f"{read_item.dest_index.fqn} is no tensor")

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        """Where the elements of an item go."""
        place = _destination(read_item)
        whole = self._ranges[place].in_place()
        if whole is None:
            if place not in self._packed:
                self._packed[place] = self._ranges[place].room()
            whole = self._packed[place]
        begin = read_item.dest_offsets[0]
        return whole[begin : begin + read_item.lengths[0]]

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """The elements of an item have arrived."""
        place = _destination(read_item)
        self._missing[place] -= read_item.lengths[0]
        if self._missing[place] == 0 and place in self._packed:
            self._ranges[place].unpack(self._packed.pop(place))

    def check_complete(self) -> None:
        """Refuse a checkpoint whose chunks left a gap.

        Raises:
            CheckpointError: names the first.
        """
        for (key, _, start), missing in self._missing.items():
            if missing:
                raise CheckpointError(f"{missing} elements of {key} from {start} on are in no shard of the checkpoint")


def _destination(item: ReadItem) -> _Place:
    assert item.dest_index.offset is not None
    number, _, key = item.dest_index.fqn.partition("/")
    return key, int(number), item.dest_index.offset[0]


class ShardReader(StorageReader):
    """Reads from the shards of a checkpoint, which are held open."""

    def __init__(self, opened: OpenCheckpoint, hosts: HostGroup) -> None:
        self.opened, self.manifest, self.hosts = opened, opened.manifest, hosts
        self._chunks = {(key, c.start): c for key, tensor in self.manifest.tensors.items() for c in tensor.chunks}

    def reset(self, checkpoint_id: Any = None) -> None:
        """Nothing is kept between loads."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The manifest, in torch's terms."""
        return Metadata(
            {
                key: TensorStorageMetadata(
                    TensorProperties(dtype=tensor.dtype),
                    torch.Size([tensor.numel]),
                    [ChunkStorageMetadata(torch.Size([c.start]), torch.Size([c.numel])) for c in tensor.chunks],
                )
                for key, tensor in self.manifest.tensors.items()
            }
        )

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing to do."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """As it is."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """As they are."""
        return plans

    def read_data(self, plan: LoadPlan, planner: Any) -> Future[None]:
        """Read every item into the tensor that the planner names, converting dtypes that differ."""
        with self.hosts.at_work():
            self._read(plan, planner)
        future: Future[None] = Future()
        future.set_result(None)
        return future

    def _read(self, plan: LoadPlan, planner: Any) -> None:
        sizes = {key: tensor.dtype.itemsize for key, tensor in self.manifest.tensors.items()}
        total = sum(item.lengths[0] * sizes[item.storage_index.fqn] for item in plan.items)
        progress = Progress(f"reading {self.opened.folder}", total)
        for item in plan.items:
            key = item.storage_index.fqn
            assert item.storage_index.offset is not None
            chunk = self._chunks[key, item.storage_index.offset[0]]
            target = planner.resolve_tensor(item).detach()
            dtype = self.manifest.tensors[key].dtype
            direct = target.dtype == dtype and target.device.type == "cpu"
            read = target if direct else torch.empty(item.lengths[0], dtype=dtype)
            self.opened.read_at(chunk.file, chunk.offset + item.storage_offsets[0] * dtype.itemsize, read)
            if not direct:
                target.copy_(read)
            planner.commit_tensor(item, target)
            progress.add(len(as_bytes(read)))

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        """The folder is given to the constructor."""
        return checkpoint_id is None
