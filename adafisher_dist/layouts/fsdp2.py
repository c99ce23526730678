"""FSDP2 (`fully_shard`): each parameter is a DTensor, its rows cut over a device mesh's ranks.

Rank r of W holds rows [r·c, min((r+1)·c, R)) of R, c = ⌈R/W⌉, as `torch.chunk` cuts them; the last
ranks may hold none. On a 2-D mesh (HSDP) that holds within each replica, and the replicas do the
same work on the same gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from adafisher_dist.blocks import placement
from adafisher_dist.comm.collectives import Group, join
from adafisher_dist.layouts.storage import LocalShard, Parameter, ParameterInfo, Storage, UnsupportedLayoutError


def mesh_of(parameter: Tensor, name: str) -> Any:
    """The device mesh of a parameter that is sharded by FSDP2.

    Raises:
        UnsupportedLayoutError: the DTensor is not sharded by rows alone, as `fully_shard` does by
            default.
    """
    assert isinstance(parameter, DTensor)
    mesh, placements = parameter.device_mesh, parameter.placements
    sharded = type(placements[-1]) is Shard and placements[-1].dim == 0
    replicas = len(placements) == 1 or (len(placements) == 2 and isinstance(placements[0], Replicate))
    if not sharded or not replicas:
        raise UnsupportedLayoutError(
            f"{name} is a DTensor with placements {tuple(placements)}. AdaFisher knows those of fully_shard:"
            " (Shard(0),) on a 1-D mesh, and (Replicate(), Shard(0)) on a 2-D mesh (HSDP). Tensor parallelism and a"
            " shard_placement_fn with another dimension are not supported."
        )
    return mesh


def group_of(mesh: Any) -> Group:
    """The ranks that a mesh shards a parameter over, with its replicas where the mesh is 2-D."""
    return join(mesh.get_group(mesh.ndim - 1), join(mesh.get_group(0)) if mesh.ndim == 2 else None)


def storage(members: Sequence[tuple[Tensor, ParameterInfo]], mesh: Any) -> Storage:
    """What the ranks store of parameters that are sharded over one mesh.

    Raises:
        UnsupportedLayoutError: a local shard is not of the size that it should have.
    """
    group = group_of(mesh)
    for tensor, info in members:
        start, stop = placement.rows_of(tensor.shape, group.rank, group.size)
        _check_shard(tensor, info.name, stop - start)
    return Storage(
        layout="FSDP2" if group.replicas is None else "HSDP",
        group=group,
        tensors=[tensor for tensor, _ in members],
        parameters=[Parameter(info, tuple(tensor.shape), i) for i, (tensor, info) in enumerate(members)],
        stored_spans=placement.by_rows([tuple(tensor.shape) for tensor, _ in members], group.size),
        replicated=False,
    )


def locate(parameter: Tensor) -> LocalShard:
    """What this rank holds of a DTensor.

    Raises:
        UnsupportedLayoutError: it is not sharded by rows, as fully_shard does by default.
    """
    assert isinstance(parameter, DTensor)
    group = group_of(mesh_of(parameter, "a parameter"))
    start, stop = placement.rows_of(parameter.shape, group.rank, group.size)
    _check_shard(parameter, "a parameter", stop - start)
    return LocalShard(parameter.to_local().detach(), start, stop, group, replicated=False)


def _check_shard(tensor: Tensor, name: str, numel: int) -> None:
    assert isinstance(tensor, DTensor)
    held = tensor.to_local().numel()
    if held != numel:
        raise UnsupportedLayoutError(
            f"{name}: this rank holds {held} of {tensor.numel()} elements, but rows cut over the ranks as fully_shard"
            f" cuts them give it {numel}. Shard the model with torch's fully_shard."
        )
