"""The optimizer's state as state dicts hold it: by stored tensor, checked before anything changes.

For each tensor: `step`, `fisher_updates` (int64; 0-d, or of each parameter that a flat tensor holds), and for each
kind of block, of B elements ("B") or of D vectors of B elements ("BxD"), `momentum_KIND` (N, D, B), `fisher_KIND`
(N, B, B), or (N, B (B + 1) / 2) where it is packed, `square_KIND` (N, D) where D > 1, and, where factors are kept,
`factor_KIND` (N, B, B) and `curvature_KIND` (N,), blocks in order; `momentum_diagonal` (N, 1, 1) and `fisher_diagonal`
(N, 1) past max_blocks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from adafisher_dist import comm
from adafisher_dist.batch import fisher_shape
from adafisher_dist.grid import Grid
from adafisher_dist.shard import Shard

FORMAT = 2  # 1 had momentum_B (N, B)
META = "adafisher_dist"
CONSOLIDATE = "consolidate_state_dict()"  # in messages
COUNTERS = ("step", "fisher_updates")

Wanted = dict[str, tuple[Tensor, int, int]]  # by key: this rank's view, the row where it begins, rows in all


def describe(shards: list[Shard]) -> dict[str, Any]:
    """What a state dict tells of its own completeness: plain numbers and strings."""
    if not is_partial(shards):
        return {"format": FORMAT, "part": "whole"}
    storage = next(shard.storage for shard in shards if not shard.storage.replicated)
    part = f"{storage.layout}, rank {storage.group.rank} of {storage.group.size}"
    return {"format": FORMAT, "part": part, "plan": [shard.digest() for shard in shards]}


def is_partial(shards: list[Shard]) -> bool:
    """Whether parameters are sharded themselves, so that a state dict holds what goes with this rank's part of them."""
    return any(not shard.storage.replicated for shard in shards)


def expected(shard: Shard, tensor: int) -> Wanted:
    """For each key of a whole state dict: this rank's view, the row where it begins, and the rows there are in all.

    A tensor of which this rank owns nothing has keys with empty views, so that a wrong state dict fails on all ranks.
    """
    if not shard.storage.replicated:
        return _own(shard, tensor)
    views = shard.views[tensor]
    grid = shard.grids[tensor]
    own = [span for span in shard.owned[shard.storage.group.rank] if span.parameter == tensor]
    before, total = _rows(grid, own[0].start if own else 0), _rows(grid, grid.numel)
    return {
        key: (views.get(key, torch.empty(0)), before[_kind(key)], total[_kind(key)])
        for key in whole_shapes(shard, tensor)
    }


def _rows(grid: Grid, stop: int) -> Counter[str]:
    """Rows by the name of their kind; see `Grid.rows_by_kind`."""
    return Counter({kind.name: rows for kind, rows in grid.rows_by_kind(stop).items()})


def whole_shapes(shard: Shard, parameter: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of each key of a replicated parameter's whole state."""
    structure = shard.structures[shard.groups[parameter]]
    wide = structure.compute_dtype
    shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    for kind, rows in shard.grids[parameter].rows_by_kind(shard.grids[parameter].numel).items():
        size, depth, dense = kind
        shapes[f"momentum_{kind.name}"] = (rows, depth, size), wide
        shapes[f"fisher_{kind.name}"] = (rows, *fisher_shape(kind, structure)), structure.fisher_dtype
        if depth > 1:
            shapes[f"square_{kind.name}"] = (rows, depth), wide
        if structure.keeps_factors and dense:
            shapes[f"factor_{kind.name}"] = (rows, size, size), wide
            shapes[f"curvature_{kind.name}"] = (rows,), wide
    return shapes


def is_whole(saved: Mapping[str, Any]) -> bool:
    """Whether a state dict holds the whole state, as far as it says."""
    return bool((saved.get(META) or {}).get("part", "whole") == "whole")


def beside(param_groups: list[dict[str, Any]]) -> dict[str, Any]:
    """A state dict without state: that is in a sharded checkpoint, in a folder beside the file."""
    return {"state": {}, "param_groups": param_groups, META: {"format": FORMAT, "part": "beside"}}


def check_format(saved: Mapping[str, Any]) -> None:
    """Refuse what is no state of AdaFisher, or holds none.

    Raises:
        ValueError: says what it is.
    """
    meta = saved.get(META)
    if meta is None and any("block_size" not in group for group in saved["param_groups"]):
        raise ValueError("This state dict does not fit AdaFisher: it was saved by another optimizer.")
    if not isinstance(meta, dict | None):
        raise ValueError(f"This state dict does not fit: its entry {META!r} is {meta!r}.")
    meta = meta or {}
    if meta.get("format", FORMAT) > FORMAT:
        raise ValueError(
            f"This state dict has format {meta['format']}, and this version of adafisher_dist reads up to {FORMAT};"
            " update adafisher_dist."
        )
    if meta.get("format", FORMAT) < FORMAT:
        raise ValueError(
            f"This state dict has format {meta['format']}, whose rows share no blocks; this version of adafisher_dist"
            f" reads {FORMAT}. Load it with the version that saved it, an older one."
        )
    if meta.get("part") == "beside":
        raise ValueError(
            "This state dict of DeepSpeed's has no optimizer state: that is in the folder adafisher_dist beside its"
            " file. Load it by engine.load_checkpoint, with AdaFisher as the engine's optimizer."
        )
    if str(meta.get("part")).startswith("none"):
        raise ValueError(
            f"This state dict holds no state: another rank consolidated it ({meta['part']}). Load that one."
        )


def check_part(saved: Mapping[str, Any], shards: list[Shard]) -> None:
    """Refuse a part of another sharded state.

    Raises:
        ValueError: names both parts.
    """
    here, there = describe(shards), saved.get(META) or {}
    part = there.get("part", "whole")
    if part != here["part"]:
        raise ValueError(
            f"The state dict is a part of a sharded state ({part}), and this rank needs {here['part']}. Load it with"
            " the world size and ZeRO stage that it was saved with."
        )
    if there.get("plan", here.get("plan")) != here.get("plan"):
        raise ValueError(
            f"The state dict ({part}) was saved where the parameters, or their blocks, lay otherwise on the ranks. Load"
            " it with the model, param groups, block settings and ZeRO options (round_robin_gradients, sub_group_size,"
            " …) that it was saved with."
        )


def restore(shard: Shard, tensor: int, saved: Mapping[str, Any], own: bool = False) -> None:
    """Copy a stored tensor's saved state into a shard; an empty one leaves it as it is.

    Args:
        shard: the shard.
        tensor: the number of the stored tensor.
        saved: its entry in a state dict, or
        own: in this rank's `optimizer.state`, which has no other rank's rows.

    Raises:
        ValueError: it does not fit; nothing was copied.
    """
    if saved:
        wanted = _own(shard, tensor) if own else expected(shard, tensor)
        _check(shard, tensor, saved, wanted)
        for key in COUNTERS:
            shard.views[tensor][key].copy_(torch.as_tensor(saved[key]))
        for key, (view, first, _) in wanted.items():
            if len(view):
                view.copy_(saved[key][first : first + len(view)])


def clear(shard: Shard, tensor: int) -> None:
    """Bring a stored tensor's state back to what it was before any step."""
    for value in shard.views[tensor].values():
        value.zero_()


def _own(shard: Shard, tensor: int) -> Wanted:
    return {key: (view, 0, len(view)) for key, view in shard.views[tensor].items() if key not in COUNTERS}


def _check(shard: Shard, tensor: int, saved: Mapping[str, Any], wanted: Wanted) -> None:
    name = next((p.name for p in shard.storage.parameters if p.tensor == tensor), str(tensor))
    missing = sorted({*wanted, *COUNTERS} - set(saved))
    unknown = sorted(set(saved) - {*wanted, *COUNTERS})
    if missing or unknown:
        raise ValueError(
            f"The saved optimizer state of {name} does not fit: missing {missing}, unexpected {unknown}. It was saved"
            " for another shape, world size or block setting (block_size, rows_per_block, block_grid,"
            " max_blocks), or by another optimizer."
        )
    for key in COUNTERS:
        shape, needed = tuple(getattr(saved[key], "shape", ())), tuple(shard.views[tensor][key].shape)
        if shape not in ((), needed):
            raise ValueError(
                f"The saved optimizer state of {name} does not fit: {key} has shape {shape}, needed is {needed}."
            )
    for key, (view, _, rows) in wanted.items():
        shape = tuple(getattr(saved[key], "shape", ("not a tensor",)))
        if (len(view) and shape[1:] != view.shape[1:]) or shape[0] != rows:
            raise ValueError(
                f"The saved optimizer state of {name} does not fit: {key} has shape {shape}, needed are {rows} rows of"
                f" {tuple(view.shape[1:])}. It was saved for another shape, world size or block setting."
            )


def room(shard: Shard, tensor: int) -> dict[str, Tensor]:
    """Room on the CPU for the whole state of a replicated parameter."""
    shapes = whole_shapes(shard, tensor)
    counters = {key: shard.views[tensor][key].clone() for key in COUNTERS}
    return counters | {key: torch.empty(shape, dtype=dtype) for key, (shape, dtype) in shapes.items()}


def consolidate(shard: Shard, tensor: int, into: Mapping[str, Tensor] | None) -> None:
    """Bring the whole state of a replicated parameter into the room for it, where there is any. A collective."""
    group, views = shard.storage.group, shard.views[tensor]
    for key, (shape, dtype) in whole_shapes(shard, tensor).items():
        for rank, spans in enumerate(shard.owned):
            for span in spans:
                if span.parameter == tensor:
                    first = _rows(shard.grids[tensor], span.start)[_kind(key)]
                    stop = _rows(shard.grids[tensor], span.stop)[_kind(key)]
                    if first < stop:
                        empty = torch.empty(stop - first, *shape[1:], dtype=dtype, device=shard.arena.device)
                        mine = views[key] if rank == group.rank else empty
                        part = comm.broadcast(group, mine, rank, CONSOLIDATE)
                        if into is not None:
                            into[key][first:stop] = part


def _kind(key: str) -> str:
    return key.rpartition("_")[2]
