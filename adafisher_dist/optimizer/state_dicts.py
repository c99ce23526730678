"""The optimizer's state as state dicts hold it: by stored tensor, checked before anything changes.

For each tensor: `step`, `fisher_updates` (int64; 0-d, or of each parameter that a flat tensor
holds), and for each kind of block, of B elements ("B") or of D vectors of B elements ("BxD"),
`momentum_KIND` (N, D, B), `fisher_KIND` (N, B, B), or (N, B (B + 1) / 2) where it is packed,
`square_KIND` (N, D) where D > 1, and, where factors are kept, `factor_KIND` (N, B, B) and
`curvature_KIND` (N,), blocks in order; `momentum_diagonal` (N, 1, 1) and `fisher_diagonal` (N, 1)
past max_blocks.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from adafisher_dist import layouts
from adafisher_dist.blocks import placement
from adafisher_dist.blocks.grid import Grid
from adafisher_dist.comm import collectives
from adafisher_dist.state.shard import Shard, state_shapes

STATE_DICT_FORMAT = 3
META = "adafisher_dist"
CONSOLIDATE = "consolidate_state_dict()"  # in messages
COUNTERS = ("step", "fisher_updates")

# What AdaFisher calls its entries; others in `optimizer.state` are of users and of other libraries.
_OWN = re.compile("step|fisher_updates|(momentum|fisher|square|factor|curvature)_.+")

Wanted = dict[str, tuple[Tensor, int, int]]  # by key: this rank's view, the row where it begins, rows in all


def about(part: str = "whole") -> dict[str, Any]:
    """What a state dict tells of itself: by default that it has everything."""
    return {"format": STATE_DICT_FORMAT, "part": part}


def describe(shards: list[Shard]) -> dict[str, Any]:
    """What a state dict tells of its own completeness: plain numbers and strings."""
    if not is_partial(shards):
        return about()
    storage = next(shard.storage for shard in shards if not shard.storage.replicated)
    part = f"{storage.layout}, rank {storage.group.rank} of {storage.group.size}"
    return {**about(part), "plan": [shard.digest() for shard in shards if shard.active_tensors]}


def own_part(entry: Mapping[str, Any]) -> dict[str, Any]:
    """What AdaFisher, or one with other blocks, put into an entry of `state`."""
    return {key: value for key, value in entry.items() if isinstance(key, str) and _OWN.fullmatch(key)}


def foreign_part(entry: Mapping[str, Any]) -> dict[str, Any]:
    """What users and other libraries put there, as Lookahead its slow weights."""
    return {key: value for key, value in entry.items() if not (isinstance(key, str) and _OWN.fullmatch(key))}


def is_partial(shards: list[Shard]) -> bool:
    """Whether parameters are sharded, so that a state dict has only this rank's part of them."""
    return any(not shard.storage.replicated for shard in shards)


def _wanted(shard: Shard, tensor: int, own: bool) -> Wanted:
    """For each key of a state dict: this rank's view, its first row, and the rows in all.

    `own`: of a state dict that has no other rank's rows. In a whole one, a tensor of which this
    rank owns nothing has keys with empty views, so that a wrong state dict fails on all ranks.
    """
    views, rank = shard.views[tensor], shard.storage.group.rank
    if own or not shard.storage.one_each:
        return {key: (view, 0, len(view)) for key, view in views.items() if key not in COUNTERS}
    owned = _owned_rows(shard, tensor)
    return {
        key: (views[key], owned[_kind(key)][rank][0], shape[0])
        for key, (shape, _) in whole_shapes(shard, tensor).items()
    }


def _owned_rows(shard: Shard, tensor: int) -> dict[str, list[tuple[int, int]]]:
    """By kind and rank, the rows of a whole state that the rank owns: first, and last plus one."""
    grid = shard.grids[tensor]
    result: dict[str, list[tuple[int, int]]] = {kind: [] for kind in _rows(grid, grid.numel)}
    for spans in shard.owned:
        own = [span for span in spans if span.parameter == tensor]
        first, stop = (_rows(grid, own[0].start), _rows(grid, own[-1].stop)) if own else (Counter(), Counter())
        for kind, runs in result.items():
            runs.append((first[kind], stop[kind]))
    return result


def _rows(grid: Grid, stop: int) -> Counter[str]:
    """Rows by the name of their kind; see `Grid.blocks_by_shape`."""
    return Counter({kind.name: rows for kind, rows in grid.blocks_by_shape(stop).items()})


def whole_shapes(shard: Shard, parameter: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of each key of a whole state, where each tensor is one parameter."""
    return state_shapes(shard.grids[parameter], shard.configs[shard.groups[parameter]])


def is_whole(saved: Mapping[str, Any]) -> bool:
    """Whether a state dict holds the whole state, as far as it says."""
    return bool((saved.get(META) or {}).get("part", "whole") == "whole")


def without_state(param_groups: list[dict[str, Any]]) -> dict[str, Any]:
    """A state dict without state: that is in a sharded checkpoint, in a folder beside the file."""
    return {"state": {}, "param_groups": param_groups, META: about("beside")}


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
    if meta.get("format", STATE_DICT_FORMAT) > STATE_DICT_FORMAT:
        raise ValueError(
            f"This state dict has format {meta['format']}, and this version of adafisher_dist reads up to"
            f" {STATE_DICT_FORMAT}; update adafisher_dist."
        )
    if meta.get("format", STATE_DICT_FORMAT) < STATE_DICT_FORMAT:
        raise ValueError(
            f"This state dict has format {meta['format']}, whose Fisher blocks are cut and weighed otherwise; this"
            f" version of adafisher_dist reads {STATE_DICT_FORMAT}. Load it with the version that saved it, an older"
            " one."
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
    if part == "whole" and all(shard.storage.one_each for shard in shards):
        return
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

    A collective where the values are DTensors; then every rank has to `check` before any calls
    this.

    Args:
        shard: the shard.
        tensor: the number of the stored tensor.
        saved: its entry in a state dict, or
        own: in this rank's `optimizer.state`, which has no other rank's rows.

    Raises:
        ValueError: it does not fit; nothing was copied.
    """
    if not saved:
        return
    check(shard, tensor, saved, own)
    for key in COUNTERS:
        shard.views[tensor][key].copy_(torch.as_tensor(saved[key], device="cpu"))
    owned = {} if own or not shard.storage.one_each else _owned_rows(shard, tensor)
    for key, (view, first, rows) in _wanted(shard, tensor, own).items():
        if layouts.is_dtensor(saved.get(key)):
            group = shard.storage.group
            there = layouts.rows_here(saved[key], group, key).to(view.device).contiguous()
            collectives.move_rows(group, there, placement.runs(rows, group.size), view, owned[_kind(key)])
        elif len(view):
            view.copy_(saved[key][first : first + len(view)])


def check(shard: Shard, tensor: int, saved: Mapping[str, Any], own: bool = False) -> None:
    """Refuse a saved state that does not fit; arguments as for `restore`. Local.

    Raises:
        ValueError: says what does not fit.
    """
    wanted = _wanted(shard, tensor, own)
    misfit = f"The saved optimizer state of {shard.storage.name_of(tensor)} does not fit"
    needed = {key for key, (view, _, _) in wanted.items() if len(view) or not own}
    missing = sorted({*needed, *COUNTERS} - set(saved))
    unknown = sorted(set(own_part(saved)) - {*wanted, *COUNTERS})
    if missing or unknown:
        raise ValueError(
            f"{misfit}: missing {missing}, unexpected {unknown}. It was saved for another shape, world size or block"
            " setting (block_size, rows_per_block, block_grid, max_blocks), or by another optimizer." + _START_ANEW
        )
    for key in COUNTERS:
        shape, place = getattr(saved[key], "shape", None), tuple(shard.views[tensor][key].shape)
        if shape is None and not isinstance(saved[key], int):
            raise ValueError(f"{misfit}: {key} is {saved[key]!r}.")
        if shape is not None and tuple(shape) not in ((), place):
            raise ValueError(f"{misfit}: {key} has shape {tuple(shape)}, needed is {place}.")
    steps, updates = (torch.as_tensor(saved[key], device="cpu") for key in COUNTERS)
    if not bool(((steps % 1 == 0) & (updates % 1 == 0) & (updates >= 0) & (updates <= steps)).all()):
        raise ValueError(
            f"{misfit}: step and fisher_updates should be whole numbers, of which the second is at least 0 and at most"
            f" the first, and are {steps.tolist()} and {updates.tolist()}. The state dict was altered or is damaged:"
            " load another."
        )
    for key, (view, _, rows) in wanted.items():
        if key not in saved:
            continue
        shape = tuple(getattr(saved[key], "shape", ("not a tensor",)))
        if shape[1:] != view.shape[1:] or shape[0] != rows or (own and layouts.is_dtensor(saved[key])):
            raise ValueError(
                f"{misfit}: {key} has shape {shape}, needed are {rows} rows of {tuple(view.shape[1:])}. It was saved"
                " for another shape, world size or block setting." + _START_ANEW
            )
        if not own and saved[key].dtype != view.dtype:
            raise ValueError(
                f"{misfit}: {key} is {saved[key].dtype}, and the settings that were saved with it make it {view.dtype}."
                " It was rounded on the way: build the optimizer with the fisher_dtype that it was saved with, and load"
                " again."
            )
        if layouts.is_dtensor(saved[key]):
            layouts.rows_here(saved[key], shard.storage.group, key)


# What a parameter that was replaced by one with more or fewer rows cannot keep: a block's Fisher is
# that of its rows.
_START_ANEW = (
    " A parameter that has been given more or fewer rows starts anew with `del optimizer.state[parameter]`. Its state"
    " can be cut to some of its rows only where each row has blocks of its own: rows_per_block=1, and a block_size that"
    " is at most a row's length."
)


def room(shard: Shard, tensor: int) -> dict[str, Tensor]:
    """Room on the CPU for the whole state of a replicated parameter."""
    shapes = whole_shapes(shard, tensor)
    counters = {key: shard.views[tensor][key].clone() for key in COUNTERS}
    return counters | {key: torch.empty(shape, dtype=dtype, device="cpu") for key, (shape, dtype) in shapes.items()}


def dtensor_room(shard: Shard, tensor: int) -> dict[str, Tensor]:
    """Room for this rank's rows of the state, as torch cuts them, and copies of the counters."""
    group = shard.storage.group
    rooms = {key: shard.views[tensor][key].clone() for key in COUNTERS}
    for key, (shape, dtype) in whole_shapes(shard, tensor).items():
        first, stop = placement.runs(shape[0], group.size)[group.rank]
        rooms[key] = torch.empty(stop - first, *shape[1:], dtype=dtype, device=shard.device)
    return rooms


def as_dtensors(shard: Shard, tensor: int, rooms: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state of a parameter as DTensors, in the room for it. A collective."""
    group, views, owned = shard.storage.group, shard.views[tensor], _owned_rows(shard, tensor)
    result = dict(rooms)
    for key, (shape, _) in whole_shapes(shard, tensor).items():
        collectives.move_rows(group, views[key], owned[_kind(key)], rooms[key], placement.runs(shape[0], group.size))
        result[key] = layouts.dtensor(rooms[key], shape, shard.storage)
    return result


def consolidate(shard: Shard, tensor: int, into: Mapping[str, Tensor] | None) -> None:
    """Copy a replicated parameter's whole state into `into`, unless it is None. A collective."""
    group, views, owned = shard.storage.group, shard.views[tensor], _owned_rows(shard, tensor)
    for key, (shape, dtype) in whole_shapes(shard, tensor).items():
        for rank, (first, stop) in enumerate(owned[_kind(key)]):
            if first < stop:
                empty = torch.empty(stop - first, *shape[1:], dtype=dtype, device=shard.device)
                part = collectives.broadcast(group, views[key] if rank == group.rank else empty, rank, CONSOLIDATE)
                if into is not None:
                    into[key][first:stop] = part


def _kind(key: str) -> str:
    return key.rpartition("_")[2]
