"""FSDP2 (`fully_shard`), with or without tensor parallelism: each parameter is a DTensor.

Without tensor parallelism a parameter's rows are cut over a device mesh's ranks. Rank r of W holds
rows [r·c, min((r+1)·c, R)) of R, c = ⌈R/W⌉, as `torch.chunk` cuts them; the last ranks may hold
none. On a 2-D mesh (HSDP) that holds within each replica, and the replicas do the same work on the
same gradients.

With tensor parallelism each of its ranks has a part of the parameter, cut by rows or columns, and
the rows of that part are cut over the data-parallel ranks. The blocks of a part are its own: no
block goes over its edges.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from adafisher_dist.blocks import placement
from adafisher_dist.blocks.parts import Parts
from adafisher_dist.comm.collectives import Group, join
from adafisher_dist.layouts.storage import (
    GivenParameters,
    LocalShard,
    Parameter,
    ParameterInfo,
    Storage,
    UnsupportedLayoutError,
)


class _Cut(NamedTuple):
    """How a mesh cuts a parameter.

    Attributes:
        rows: the mesh's dimension over which FSDP2 cuts rows.
        part: the mesh's dimension over which tensor parallelism cuts the parameter, if it does.
        dim: the parameter's dimension that it cuts.
    """

    rows: int
    part: int | None = None
    dim: int = 0


def _cut(parameter: Tensor, name: str) -> _Cut:
    """How a parameter is cut.

    Raises:
        UnsupportedLayoutError: neither as `fully_shard` cuts it, nor as it and `parallelize_module`
            do together.
    """
    assert isinstance(parameter, DTensor)
    placements = parameter.placements
    rows = next((i for i, own in enumerate(placements) if not isinstance(own, Replicate)), None)
    inner = [] if rows is None else list(enumerate(placements))[rows + 1 :]
    parts = [(i, own) for i, own in inner if not isinstance(own, Replicate)]
    known = rows is not None and rows <= 1 and len(parts) <= 1 and all(type(own) is Shard for _, own in parts)
    if known and rows is not None:
        outer = placements[rows]
        strided = isinstance(outer, _StridedShard)  # its rows are those of a tensor-parallel rank's part
        part, dim = (parts[0][0], parts[0][1].dim % parameter.dim()) if parts else (None, 0)  # type: ignore[attr-defined]
        by_rows = (strided or type(outer) is Shard) and outer.dim == 0  # type: ignore[attr-defined]
        in_parts = part is not None and dim == 0 and parameter.device_mesh.size(part) > 1
        if by_rows and strided == in_parts:
            return _Cut(rows, part, dim)
    raise UnsupportedLayoutError(
        f"{name} is a DTensor with placements {tuple(placements)}.{_of_replicas(placements)} AdaFisher knows those"
        " of fully_shard, (Shard(0),) on a 1-D mesh and (Replicate(), Shard(0)) on a 2-D mesh (HSDP), and those of"
        " fully_shard after parallelize_module, as (_StridedShard(0), Shard(0)) and (Shard(0), Shard(1)). Another"
        " dimension is not supported: leave shard_placement_fn out. Neither is tensor parallelism without fully_shard."
    )


def _of_replicas(placements: Sequence[Any]) -> str:
    """What to do about a parameter that all ranks hold, as torch's replicate() makes them."""
    if not all(isinstance(placement, Replicate) for placement in placements):
        return ""
    return " For replicas alone use DDP, or fully_shard on a mesh of (replicas, 1)."


def check(parameter: Tensor, name: str) -> None:
    """Refuse a DTensor that is cut in an unknown way; raises as `storage`."""
    _cut(parameter, name)


def group_of(mesh: Any, rows: int) -> Group:
    """The ranks that cut the rows of the same part, with their replicas where there are some."""
    return join(mesh.get_group(rows), join(mesh.get_group(0)) if rows == 1 else None)


def ranks_of(given_parameters: GivenParameters) -> Group | None:
    """The ranks that step these parameters together; None where none is a DTensor.

    Raises:
        UnsupportedLayoutError: a mesh of tensor parallelism does not have all ranks.
    """
    by_mesh = {id(p.device_mesh): (p, info) for p, info in given_parameters.items() if isinstance(p, DTensor)}
    if not by_mesh:
        return None
    cuts = [(p.device_mesh, _cut(p, info.name)) for p, info in by_mesh.values()]
    if all(mesh.ndim == cut.rows + 1 for mesh, cut in cuts):
        mesh, cut = cuts[0]
        return group_of(mesh, cut.rows)
    largest, everyone = max(mesh.size() for mesh, _ in cuts), join(None)
    if largest != everyone.size:
        raise UnsupportedLayoutError(
            f"The device mesh has {largest} ranks, and there are {everyone.size}. With tensor parallelism AdaFisher"
            " needs one mesh of all ranks."
        )
    return everyone


def _part_of(parameter: Tensor, mesh: Any, cut: _Cut) -> tuple[Parts | None, int]:
    """How tensor parallelism cuts a parameter, if it does; the number of this rank's part."""
    if cut.part is None:
        return None, 0
    return Parts(tuple(parameter.shape), cut.dim, mesh.size(cut.part)), mesh.get_local_rank(cut.part)


def is_spare(parameter: Tensor, first: int) -> bool:
    """Whether ranks of another tensor-parallel number hold the same elements, and save them.

    Replicas of an HSDP mesh are not meant: they share the work.

    Args:
        parameter: a DTensor.
        first: the first of the ranks that save together.
    """
    assert isinstance(parameter, DTensor)
    mesh, cut = parameter.device_mesh, _cut(parameter, "a parameter")
    copies = [own for i, own in enumerate(mesh.get_coordinate() or ()) if i > cut.rows and i != cut.part]
    return any(copies) or first not in mesh.mesh.flatten().tolist()


def storages(members: Sequence[tuple[Tensor, ParameterInfo]]) -> list[Storage]:
    """What the ranks store of DTensors: one storage for each device mesh.

    Raises:
        UnsupportedLayoutError: one is cut in an unknown way, or its local shard is not of the size
            that it should have.
    """
    found: dict[tuple[Any, int], list[tuple[Tensor, ParameterInfo, _Cut]]] = {}
    for tensor, info in members:
        assert isinstance(tensor, DTensor)
        cut = _cut(tensor, info.name)
        found.setdefault((tensor.device_mesh, cut.rows), []).append((tensor, info, cut))
    return [_storage(own, mesh, rows) for (mesh, rows), own in found.items()]


def _storage(members: Sequence[tuple[Tensor, ParameterInfo, _Cut]], mesh: Any, rows: int) -> Storage:
    group = group_of(mesh, rows)
    parameters = []
    for number, (tensor, info, cut) in enumerate(members):
        parts, part = _part_of(tensor, mesh, cut)
        shape = tuple(tensor.shape) if parts is None else parts.shapes[part]
        start, stop = placement.rows_of(shape, group.rank, group.size)
        _check_shard(tensor, info.name, stop - start)
        parameters.append(Parameter(info, shape, number, parts, part))
    layout = "FSDP2" if group.replicas is None else "HSDP"
    cut_by = next((cut.part for _, _, cut in members if cut.part is not None), None)
    if cut_by is not None:  # the part's number keeps the state dicts of the parts apart
        layout += f" with tensor parallelism (part {mesh.get_local_rank(cut_by) + 1} of {mesh.size(cut_by)})"
    return Storage(
        layout=layout,
        group=group,
        tensors=[tensor for tensor, _, _ in members],
        parameters=parameters,
        stored_spans=placement.by_rows([parameter.shape for parameter in parameters], group.size),
        replicated=False,
    )


def parts_of(parameter: Tensor) -> Parts | None:
    """How tensor parallelism cuts a DTensor; None where it is in one part."""
    assert isinstance(parameter, DTensor)
    if _is_whole(parameter):
        return None
    parts, _ = _part_of(parameter, parameter.device_mesh, _cut(parameter, "a parameter"))
    return parts if parts is not None and parts.count > 1 else None


def _is_whole(tensor: DTensor) -> bool:
    """Whether each rank has all of it, as of buffers of modules that were parallelized."""
    return all(isinstance(own, Replicate) for own in tensor.placements)


def locate(tensor: Tensor, everyone: Group) -> LocalShard:
    """What this rank holds of a DTensor.

    Args:
        tensor: a parameter or buffer.
        everyone: the ranks that save together.

    Raises:
        UnsupportedLayoutError: it is cut in an unknown way.
    """
    assert isinstance(tensor, DTensor)
    if _is_whole(tensor):
        return LocalShard(tensor.to_local().detach(), 0, tensor.numel(), everyone, replicated=True)
    cut = _cut(tensor, "a parameter")
    group = group_of(tensor.device_mesh, cut.rows)
    parts, part = _part_of(tensor, tensor.device_mesh, cut)
    shape: Sequence[int] = tensor.shape if parts is None else parts.shapes[part]
    before = 0 if parts is None else parts.offset(part)
    start, stop = placement.rows_of(shape, group.rank, group.size)
    _check_shard(tensor, "a parameter", stop - start)
    return LocalShard(tensor.to_local().detach(), before + start, before + stop, group, replicated=False)


def _check_shard(tensor: Tensor, name: str, numel: int) -> None:
    assert isinstance(tensor, DTensor)
    held = tensor.to_local().numel()
    if held != numel:
        raise UnsupportedLayoutError(
            f"{name}: this rank holds {held} of {tensor.numel()} elements, but rows cut over the ranks as fully_shard"
            f" cuts them give it {numel}. Shard the model with torch's fully_shard."
        )
