"""The optimizer's state as state dicts hold it: by stored tensor, checked before anything changes.

For each tensor: `step`, `fisher_updates` (0-d int64), and for each block size B `momentum_B` (N, B), `fisher_B`
(N, B, B) and, where factors are kept, `factor_B` (N, B, B) and `curvature_B` (N,), blocks in order;
`momentum_diagonal` and `fisher_diagonal` (N, 1) past max_blocks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from adafisher_dist import comm
from adafisher_dist.grid import Grid
from adafisher_dist.shard import Shard

FORMAT = 1
META = "adafisher_dist"
COUNTERS = ("step", "fisher_updates")


def describe(shards: list[Shard]) -> dict[str, Any]:
    """What a state dict tells of its own completeness: plain numbers and strings."""
    partial = [shard for shard in shards if not shard.storage.replicated and shard.storage.group.size > 1]
    if not partial:
        return {"format": FORMAT, "part": "whole"}
    group = partial[0].storage.group
    layout = partial[0].storage.layout
    return {"format": FORMAT, "part": f"{layout}, rank {group.rank} of {group.size}"}


def expected(shard: Shard, tensor: int) -> dict[str, tuple[Tensor, int, int]]:
    """For each key of a whole state dict: this rank's view, the row where it begins, and the rows there are in all.

    A tensor of which this rank owns nothing has keys with empty views, so that a wrong state dict fails on all ranks.
    """
    views = {key: view for key, view in shard.state(tensor).items() if key not in COUNTERS}
    if not shard.storage.replicated:
        return {key: (view, 0, len(view)) for key, view in views.items()}
    grid = shard.grids[tensor]
    own = [span for span in shard.owned[shard.storage.group.rank] if span.parameter == tensor]
    before = _rows_by_kind(grid, own[0].start) if own else Counter()
    return {
        key: (views.get(key, torch.empty(0)), before[_kind(key)], _rows_by_kind(grid, grid.numel)[_kind(key)])
        for key in whole_shapes(shard, tensor)
    }


def whole_shapes(shard: Shard, parameter: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of each key of a replicated parameter's whole state."""
    structure = shard.structures[shard.groups[parameter]]
    wide = structure.compute_dtype
    shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    for kind, rows in _rows_by_kind(shard.grids[parameter], shard.grids[parameter].numel).items():
        size = 1 if kind == "diagonal" else int(kind)
        square = (rows, 1) if kind == "diagonal" else (rows, size, size)
        shapes[f"momentum_{kind}"] = (rows, size), wide
        shapes[f"fisher_{kind}"] = square, structure.fisher_dtype
        if structure.keeps_factors and kind != "diagonal":
            shapes[f"factor_{kind}"] = square, wide
            shapes[f"curvature_{kind}"] = (rows,), wide
    return shapes


def part(saved: Mapping[str, Any]) -> str:
    """Which part of the state a state dict holds.

    Raises:
        ValueError: none: it was consolidated on another rank.
    """
    result = str(saved.get(META, {}).get("part", "whole"))
    if result.startswith("none"):
        raise ValueError(f"This state dict holds no state: another rank consolidated it ({result}). Load that one.")
    return result


def check_part(saved: str, shards: list[Shard]) -> None:
    """Refuse a part of another sharded state.

    Raises:
        ValueError: names both parts.
    """
    here = describe(shards)["part"]
    if saved != here:
        raise ValueError(
            f"The state dict is a part of a sharded state ({saved}), and this rank needs {here}. Load it with the world"
            " size and ZeRO stage that it was saved with."
        )


def restore(shard: Shard, saved: Sequence[Mapping[str, Any]]) -> None:
    """Copy saved states into a shard, one for each stored tensor; an empty one leaves its tensor as before any step.

    Raises:
        ValueError: one does not fit; nothing was copied.
    """
    for tensor, entry in enumerate(saved):
        _check(shard, tensor, entry)
    for tensor, entry in enumerate(saved):
        if entry:
            shard.counters[tensor] = torch.tensor([int(entry[key]) for key in COUNTERS])
            for key, (view, first, _) in expected(shard, tensor).items():
                if len(view):
                    view.copy_(entry[key][first : first + len(view)])


def _check(shard: Shard, tensor: int, saved: Mapping[str, Any]) -> None:
    if not saved:
        return
    name = next((p.name for p in shard.storage.parameters if p.tensor == tensor), str(tensor))
    wanted = expected(shard, tensor)
    missing = sorted({*wanted, *COUNTERS} - set(saved))
    unknown = sorted(set(saved) - {*wanted, *COUNTERS})
    if missing or unknown:
        raise ValueError(
            f"The saved optimizer state of {name} does not fit: missing {missing}, unexpected {unknown}. It was saved"
            " for another shape, world size or block setting (block_size, block_grid, max_blocks), or by another"
            " optimizer."
        )
    for key, (view, _, rows) in wanted.items():
        shape = tuple(saved[key].shape)
        if (len(view) and shape[1:] != view.shape[1:]) or shape[0] != rows:
            raise ValueError(
                f"The saved optimizer state of {name} does not fit: {key} has shape {shape}, needed are {rows} rows of"
                f" {tuple(view.shape[1:])}. It was saved for another shape, world size or block setting."
            )


def consolidate(shard: Shard, tensor: int, keep: bool) -> dict[str, Tensor]:
    """The whole state of a replicated parameter on the CPU, on ranks that `keep` it. All ranks must call this."""
    group = shard.storage.group
    views, result = shard.state(tensor), {}
    for key, (shape, dtype) in whole_shapes(shard, tensor).items():
        whole = torch.empty(shape, dtype=dtype) if keep else None
        for rank, spans in enumerate(shard.owned):
            for span in spans:
                if span.parameter == tensor:
                    first = _rows_by_kind(shard.grids[tensor], span.start)[_kind(key)]
                    stop = _rows_by_kind(shard.grids[tensor], span.stop)[_kind(key)]
                    if first < stop:
                        empty = torch.empty(stop - first, *shape[1:], dtype=dtype, device=shard.arena.device)
                        part = comm.broadcast(group, views[key] if rank == group.rank else empty, rank)
                        if whole is not None:
                            whole[first:stop] = part
        if whole is not None:
            result[key] = whole
    return {key: views[key].clone() for key in COUNTERS} | result if keep else {}


def _kind(key: str) -> str:
    return key.rpartition("_")[2]


def _rows_by_kind(grid: Grid, stop: int) -> Counter[str]:
    """How many rows of each kind (block size, or "diagonal") the elements before `stop` fill."""
    rows: Counter[str] = Counter()
    for strip in grid.strips(0, stop):
        rows[str(strip.size) if strip.dense else "diagonal"] += strip.rows
    return rows
