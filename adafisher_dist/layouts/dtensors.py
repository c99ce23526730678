"""State as DTensors, which torch's checkpoints gather, save in parts, and load at any world size.

Each key of a parameter's state is one tensor whose rows are cut over the ranks as `torch.chunk`
cuts them. Those are not the rows that a rank owns: `comm.move_rows` brings them from one to the
other.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from adafisher_dist.comm.collectives import Group
from adafisher_dist.layouts.storage import Storage

_meshes: dict[tuple[int, str], tuple[Any, DeviceMesh]] = {}  # by the id of a process group, beside it, and device type


def mesh_over(storage: Storage) -> DeviceMesh:
    """The parameters' own device mesh, or one over the ranks that hold the same parameters."""
    mesh: DeviceMesh | None = storage.mesh
    if mesh is not None:
        return mesh
    handle, device = storage.group.handle, storage.values(0).device.type
    assert handle is not None
    if (id(handle), device) not in _meshes:
        _meshes[id(handle), device] = handle, DeviceMesh.from_group(handle, device)
    return _meshes[id(handle), device][1]


def dtensor(local: Tensor, shape: Sequence[int], storage: Storage) -> Tensor:
    """The tensor of this shape whose rows on this rank are `local`, over the storage's ranks."""
    mesh = mesh_over(storage)
    placements: list[Placement] = [Replicate()] * (mesh.ndim - 1) + [Shard(0)]
    strides = tuple(prod(shape[dim + 1 :]) for dim in range(len(shape)))
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=torch.Size(shape), stride=strides)


def rows_here(value: Tensor, group: Group, what: str) -> Tensor:
    """The rows that this rank holds of a tensor as `dtensor` makes it.

    Raises:
        ValueError: it is cut otherwise.
    """
    assert isinstance(value, DTensor)
    *outer, last = value.placements
    alike = last == Shard(0) and all(isinstance(placement, Replicate) for placement in outer)
    ranks = value.device_mesh.size(value.device_mesh.ndim - 1)
    if not alike or ranks != group.size:
        raise ValueError(
            f"The saved optimizer state does not fit: {what} is a DTensor with placements {tuple(value.placements)}"
            f" over {ranks} rank(s), and needed is one whose rows are cut over {group.size}. Load into what"
            " get_optimizer_state_dict(model, optimizer) returns here."
        )
    return value.to_local()
