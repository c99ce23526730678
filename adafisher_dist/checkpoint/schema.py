"""Check the type and bounds of every value in a manifest that a load relies on.

A manifest whose checksum is right may still have been made by something else than a save. Whatever
is wrong in it is found here, before a load changes anything, and not by the code that applies it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from reprlib import repr as short
from typing import Any

from adafisher_dist.blocks.fields import SAVED
from adafisher_dist.blocks.parts import PARTS, grids_of, saved_parts
from adafisher_dist.checkpoint.encoding import MOST_LEVELS, depth, dtype_of

# Counters are int64, and have to have room to go on.
_LARGEST = 2**62

# numpy's bound, and more than torch's kernels take.
_MOST_DIMENSIONS = 64


def check(content: Mapping[str, Any], dtypes: Mapping[str, Any], old: bool) -> None:
    """Check a manifest's content.

    Args:
        content: of the manifest.
        dtypes: of tensors, by the names that files have for them.
        old: whether it is of a version whose optimizer's state is not read: what that was built for
            is not looked at.

    Raises:
        ValueError: names the first value that cannot be right, and what it should be.
    """
    files = _list(content, "files", "the manifest")
    for number, file in enumerate(files):
        where = f"file {number}"
        text_in(file, "name", where)
        whole_number_in(file, "bytes", where)
        crc32 = text_in(file, "crc32", where)
        if len(crc32) != 8 or not set(crc32) <= set("0123456789abcdef"):
            raise _wrong(f"crc32 of {where}", "8 hexadecimal digits", crc32)
    tensors = _object(content, "tensors", "the manifest")
    for key, tensor in tensors.items():
        _check_tensor(key, tensor, dtypes)
    about = _object(content, "about", "the manifest")
    _check_origin(about)
    facts = _check_model(about, len(files))
    _check_optimizer(_object(about, "optimizer", "about"), facts, old)
    _check_depth(about)
    _check_values(about, tensors, dtypes)
    _check_keys(about, tensors)


def whole_number_in(value: Any, key: str, where: str, low: int = 0) -> int:
    """The entry of an object, a whole number from `low` on.

    Raises:
        ValueError: it is not, or there is none.
    """
    return _whole_number(_entry(value, key, where), f"{key} of {where}", low)


def whole_numbers(values: Mapping[str, Any], names: Sequence[str], where: str, low: int = 0) -> None:
    """Check each of these entries that is present with `whole_number_in`; raises as it does."""
    for name in names:
        if name in values:
            whole_number_in(values, name, where, low)


def text_in(value: Any, key: str, where: str) -> str:
    """The entry of an object, a string with something in it; raises as `whole_number_in`."""
    found = _entry(value, key, where)
    if not isinstance(found, str) or not found:
        raise _wrong(f"{key} of {where}", "a string", found)
    return found


def _check_tensor(key: str, tensor: Any, dtypes: Mapping[str, Any]) -> None:
    where = f"tensor {key}"
    if text_in(tensor, "dtype", where) not in dtypes:
        raise _wrong(f"dtype of {where}", f"one of {', '.join(dtypes)}", tensor["dtype"])
    whole_number_in(tensor, "numel", where)
    _entry(tensor, "chunks", where)  # which `chunks.parse` checks


def _check_origin(about: Mapping[str, Any]) -> None:
    for key in ("id", "created", "layout"):
        text_in(about, key, "about")
    for package in _object(about, "versions", "about"):
        text_in(about["versions"], package, "versions")
    whole_number_in(about, "world_size", "about", low=1)
    whole_number_in(about, "step", "about")
    if about.get("zero_stage") is not None:
        whole_number_in(about, "zero_stage", "about")
    if about.get("precision") is not None:
        text_in(about, "precision", "about")


def _check_model(about: Mapping[str, Any], most_parts: int) -> Mapping[str, Any]:
    """What is said of each parameter; each part was written by a rank of its own, into a file."""
    model = _object(about, "model", "about")
    kinds = {kind: _object(model, f"{kind}s", "model") for kind in ("parameter", "buffer")}
    for kind, members in kinds.items():
        for name, entry in members.items():
            _check_shape(entry, f"{kind} {name}")
            _check_dtype(entry, f"{kind} {name}")
    for name, entry in kinds["parameter"].items():
        if type(_entry(entry, "trainable", f"parameter {name}")) is not bool:
            raise _wrong(f"trainable of parameter {name}", "true or false", entry["trainable"])
        if PARTS in entry:
            _check_parts(_object(entry, PARTS, f"parameter {name}"), name, len(entry["shape"]), most_parts)
    named = {**kinds["parameter"], **kinds["buffer"]}
    for alias, first in _object(model, "aliases", "model").items():
        if not isinstance(first, str) or first not in named or alias in named:
            raise _wrong(f"what {alias} is tied to", "another parameter or buffer", first)
    _object(model, "extra_state", "model")
    return kinds["parameter"]


def _check_parts(parts: Mapping[str, Any], name: str, dims: int, most: int) -> None:
    where = f"{PARTS} of parameter {name}"
    if whole_number_in(parts, "dim", where) >= dims:
        raise _wrong(f"dim of {where}", f"below its {dims} dimensions", parts["dim"])
    if whole_number_in(parts, "count", where, low=2) > most:
        raise _wrong(f"count of {where}", f"at most {most}, as there are files", parts["count"])


def _check_optimizer(optimizer: Mapping[str, Any], facts: Mapping[str, Any], old: bool) -> None:
    whole_number_in(optimizer, "skipped_steps", "optimizer")
    managed: set[str] = set()
    for number, group in enumerate(_list(optimizer, "groups", "optimizer")):
        where = f"param group {number}"
        _object(group, "settings", where)
        for name in _list(group, "names", where):
            if not isinstance(name, str) or name not in facts or name in managed:
                raise _wrong(f"a name in {where}", "a parameter's, once", name)
            managed.add(name)
    for name, entry in _object(optimizer, "state", "optimizer").items():
        if name not in managed:
            raise _wrong("a name in the optimizer's state", "a parameter's of a param group", name)
        _check_counters(entry, name)
        _check_structure(entry, name, None if old else facts[name])


def _check_counters(entry: Any, name: str) -> None:
    where = f"the state of {name}"
    step, updates = (whole_number_in(entry, key, where) for key in ("step", "fisher_updates"))
    if not min(step, 1) <= updates <= step:
        raise _wrong(f"fisher_updates of {where}", f"between {min(step, 1)} and its {step} steps", updates)


def _check_structure(entry: Any, name: str, fact: Mapping[str, Any] | None) -> None:
    """Check a state's structure for its parameter; without (old version), only keeps_factors."""
    where, inner = f"the state of {name}", f"structure of {name}"
    structure = _object(entry, "structure", where)
    if type(_entry(structure, "keeps_factors", inner)) is not bool:
        raise _wrong(f"keeps_factors of {inner}", "true or false", structure["keeps_factors"])
    if fact is None:
        return
    for key in ("block_size", "rows_per_block"):
        whole_number_in(structure, key, inner, low=1)
    if _entry(structure, "max_blocks", inner) is not None:
        whole_number_in(structure, "max_blocks", inner)
    if _entry(structure, "block_grid", inner) not in ("rows", "flat"):
        raise _wrong(f"block_grid of {inner}", "'rows' or 'flat'", structure["block_grid"])
    exponent = _entry(structure, "exponent", inner)
    if type(exponent) is not float or exponent not in (1.0, 0.5):
        raise _wrong(f"exponent of {inner}", "1.0 or 0.5", exponent)
    if _entry(structure, "grafting", inner) not in ("rms", "none"):
        raise _wrong(f"grafting of {inner}", "'rms' or 'none'", structure["grafting"])
    grids = grids_of(fact["shape"], saved_parts(fact), structure)
    counts = {"blocks": sum(g.num_blocks for g in grids), "dense_blocks": sum(g.dense_blocks for g in grids)}
    for key, count in counts.items():
        if whole_number_in(entry, key, where) != count:
            raise _wrong(f"{key} of {where}", f"{count}, as its structure has it", entry[key])


def _check_depth(about: Mapping[str, Any]) -> None:
    """Of what is decoded."""
    groups = [group["settings"] for group in about["optimizer"]["groups"]]
    encoded = {"values": about.get("values"), "extra_state": about["model"]["extra_state"], "settings": groups}
    for name, value in encoded.items():
        if depth(value) > MOST_LEVELS + 2:  # the objects that hold them
            raise ValueError(f"{name} are nested deeper than {MOST_LEVELS} levels")


def _check_values(about: Mapping[str, Any], tensors: Mapping[str, Any], dtypes: Mapping[str, Any]) -> None:
    _object(about, "values", "about")
    for number, entry in enumerate(_list(about, "value_tensors", "about")):
        where = f"value {number}"
        numel = prod(_check_shape(entry, where))
        _check_dtype(entry, where)
        stored = tensors.get(f"value/{number}")  # none without elements
        held = 0 if stored is None else stored["numel"]
        if held != numel or (stored is not None and dtypes[stored["dtype"]] != dtype_of(entry["dtype"])):
            kind = "nothing" if stored is None else f"{held} of {stored['dtype']}"
            raise _wrong(f"shape and dtype of {where}", f"those of its tensor, {kind}", entry)


def _check_keys(about: Mapping[str, Any], tensors: Mapping[str, Any]) -> None:
    """Refuse tensors that the facts do not mention; a load refuses missing ones that it needs."""
    model, state = about["model"], about["optimizer"]["state"]
    of_state = dict.fromkeys(SAVED, state)
    without_factors = {name: entry for name, entry in state.items() if not entry["structure"]["keeps_factors"]}
    counted = {"value": len(about["value_tensors"]), "random": about["world_size"]}
    for key in tensors:
        kind, _, name = key.partition("/")
        named = {"weight": model["parameters"], "buffer": model["buffers"], **of_state}.get(kind, {})
        numbered = kind in counted and name.isdecimal() and str(int(name)) == name and int(name) < counted[kind]
        left_out = kind in ("factor", "curvature") and name in without_factors
        if (name not in named and not numbered) or left_out:
            raise ValueError(f"it has a tensor {key}, which its own facts do not tell of")


# ---- values ----


def _entry(value: Any, key: str, where: str) -> Any:
    if not isinstance(value, dict) or key not in value:
        raise _wrong(where, f"an object with {key!r}", value)
    return value[key]


def _object(value: Any, key: str, where: str) -> Mapping[str, Any]:
    found = _entry(value, key, where)
    if not isinstance(found, dict):
        raise _wrong(f"{key} of {where}", "an object", found)
    return found


def _list(value: Any, key: str, where: str) -> Sequence[Any]:
    found = _entry(value, key, where)
    if not isinstance(found, list):
        raise _wrong(f"{key} of {where}", "a list", found)
    return found


def _whole_number(value: Any, where: str, low: int = 0) -> int:
    if type(value) is not int or not low <= value < _LARGEST:
        raise _wrong(where, f"a whole number from {low} on, below 2**62", value)
    return value


def _check_shape(entry: Any, where: str) -> Sequence[int]:
    shape = _list(entry, "shape", where)
    if len(shape) > _MOST_DIMENSIONS:
        raise _wrong(f"shape of {where}", f"of at most {_MOST_DIMENSIONS} dimensions", f"{len(shape)} of them")
    for size in shape:
        _whole_number(size, f"a size in the shape of {where}")
    if prod(shape) >= _LARGEST:
        raise _wrong(f"shape of {where}", "one of fewer than 2**62 elements", shape)
    return shape


def _check_dtype(entry: Any, where: str) -> None:
    try:
        dtype_of(text_in(entry, "dtype", where))
    except KeyError:
        raise _wrong(f"dtype of {where}", "a dtype of torch", entry["dtype"]) from None


def _wrong(what: str, should: str, value: Any) -> ValueError:
    return ValueError(f"{what} should be {should}, and is {short(value)}")
