"""JSON for all that is no tensor of model or optimizer: schedulers, client state, counters.

Nothing is pickled. Plain values are JSON's own. What JSON lacks is an object with one key that
begins with "$": {"$tuple": […]}. Tensors and arrays are put aside, and stand in the JSON by their
number.
"""

from __future__ import annotations

import argparse
import base64
from collections import Counter, OrderedDict, deque
from collections.abc import Iterable, Mapping, Sequence
from math import isfinite
from pathlib import Path, PurePath
from reprlib import repr as short
from typing import Any

import numpy as np
import torch
from torch import Tensor

# Of values that are nested in each other, as JSON: `decode` calls itself for each.
MOST_LEVELS = 200

# Of integers: Python writes and reads no more than 4,300 digits.
_MOST_BITS = 14_284

_DTYPES = {str(value): value for value in vars(torch).values() if isinstance(value, torch.dtype)}


def dtype_of(name: str) -> torch.dtype:
    """The dtype that torch writes as `name`."""
    return _DTYPES[name]


def encode(value: object, where: str, tensors: list[Tensor]) -> Any:
    """A value as JSON.

    Args:
        value: made of None, numbers, strings, bytes, paths, lists, tuples, sets, dicts, namespaces,
            numpy values but for times, dtypes, devices, and plain tensors.
        where: what it is called, for the error: "client_state".
        tensors: takes the tensors and arrays in it.

    Raises:
        TypeError: something in it is of another type, or it holds itself; says where, and what to
            do.
    """
    try:
        encoded = _encode(value, where, tensors)
    except RecursionError:
        raise TypeError(f"{where} holds itself, or is nested too deep to be saved. Save it flat.") from None
    if (levels := depth(encoded)) > MOST_LEVELS:
        raise TypeError(f"{where} is nested too deep to be saved: {levels} levels of {MOST_LEVELS}. Save it flat.")
    return encoded


def has_tensors(encoded: Any) -> bool:
    """Whether what `encode` returned has tensors or arrays."""
    inner = [encoded]
    while inner:
        if any(isinstance(item, dict) and item.keys() & {"$tensor", "$array"} for item in inner):
            return True
        inner = [item for holder in inner if isinstance(holder, dict | list) for item in _items(holder)]
    return False


def depth(value: Any) -> int:
    """How deep JSON is nested; without recursion, and not much further than `MOST_LEVELS`."""
    levels, inner = 0, [value]
    while inner and levels <= MOST_LEVELS:
        inner = [item for holder in inner if isinstance(holder, dict | list) for item in _items(holder)]
        levels += 1
    return levels


def _items(holder: Mapping[str, Any] | Sequence[Any]) -> Iterable[Any]:
    return holder.values() if isinstance(holder, Mapping) else holder


def _encode(value: object, where: str, tensors: list[Tensor]) -> Any:
    if type(value) is int and value.bit_length() > _MOST_BITS:
        raise TypeError(f"{where} is an integer of {value.bit_length()} bits; save its hex(…).")
    if value is None or type(value) in (bool, int, str):
        return value
    if type(value) is float:
        return value if isfinite(value) else {"$float": repr(value)}
    if type(value) is list:
        return [_encode(item, f"{where}[{index}]", tensors) for index, item in enumerate(value)]
    if type(value) is deque and value.maxlen is not None:
        return {"$bounded_deque": [value.maxlen, _encode(list(value), where, tensors)]}
    for kind, (name, as_list) in _SEQUENCES.items():
        if type(value) is kind:
            return {name: _encode(as_list(value), where, tensors)}
    if isinstance(value, dict):
        return _encode_dict(value, where, tensors)
    if isinstance(value, Tensor) or (isinstance(value, np.ndarray) and type(value) in (np.ndarray, np.memmap)):
        return _put_aside(value, where, tensors)
    # Times lose their unit: numpy makes plain integers of some.
    is_time = isinstance(value, np.datetime64 | np.timedelta64)
    if isinstance(value, np.generic) and not is_time and type(value.item()) in (bool, int, float, complex, str, bytes):
        return {"$numpy": [value.dtype.str, _encode(value.item(), where, tensors)]}
    for other, (name, as_json) in _ATOMS.items():
        if isinstance(value, other):
            return {name: as_json(value)}
    if type(value) is argparse.Namespace:
        return {"$namespace": _encode_dict(vars(value), where, tensors)}
    raise TypeError(
        f"{where} is a {type(value).__module__}.{type(value).__qualname__}, which a checkpoint that is loaded without"
        " running pickled code cannot hold. Save what it is made of: numbers, strings, lists, tuples, dicts, tensors,"
        " numpy arrays (an object's state_dict(), say)."
    )


def decode(value: Any, tensors: Sequence[Tensor]) -> Any:
    """The inverse of `encode`.

    Raises:
        ValueError: it was encoded by a newer version, or names a tensor that there is not. What
            `encode` did not make may raise other errors too.
    """
    if isinstance(value, list):
        return [decode(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if len(value) != 1 or not next(iter(value)).startswith("$"):
        return {key: decode(item, tensors) for key, item in value.items()}
    ((name, content),) = value.items()
    if name == "$tensor":
        return _set_aside(content, tensors).clone()
    if name == "$array":
        return _set_aside(content, tensors).numpy().copy()
    if name == "$numpy":
        kind, item = np.dtype(content[0]), decode(content[1], tensors)
        if kind.kind in "VS" and not isinstance(item, bytes):  # of a number n they would make n bytes
            raise ValueError(f"A numpy value of {kind} should be bytes, and is {short(item)}.")
        return kind.type(item)
    if name == "$bounded_deque":
        return deque(decode(content[1], tensors), content[0])
    if name == "$dict":
        return {decode(key, tensors): decode(item, tensors) for key, item in content}
    if name == "$counter":
        return Counter({decode(key, tensors): decode(item, tensors) for key, item in content})
    if name == "$namespace":
        return argparse.Namespace(**decode(content, tensors))
    for kind, (sequence, _) in _SEQUENCES.items():
        if name == sequence:
            return kind(decode(content, tensors))
    if name not in _FROM_ATOMS:
        raise ValueError(f"The checkpoint holds a value of kind {name!r}, which this version does not know.")
    return _FROM_ATOMS[name](content)


def _set_aside(number: Any, tensors: Sequence[Tensor]) -> Tensor:
    """The tensor of this number."""
    if type(number) is not int or not 0 <= number < len(tensors):
        raise ValueError(f"A value is tensor {number!r} of {len(tensors)}.")
    return tensors[number]


def _encode_dict(value: Mapping[Any, Any], where: str, tensors: list[Tensor]) -> Any:
    if type(value) not in (dict, OrderedDict, Counter) and not type(value).__name__.endswith("defaultdict"):
        raise TypeError(f"{where} is a {type(value).__qualname__}; save dict(…) of it.")
    plain = all(type(key) is str and not key.startswith("$") for key in value)
    if plain and not isinstance(value, Counter):
        return {key: _encode(item, f"{where}[{key!r}]", tensors) for key, item in value.items()}
    pairs = [
        [_encode(k, f"a key of {where}", tensors), _encode(v, f"{where}[{k!r}]", tensors)] for k, v in value.items()
    ]
    return {"$counter" if isinstance(value, Counter) else "$dict": pairs}


def _put_aside(value: Tensor | np.ndarray[Any, Any], where: str, tensors: list[Tensor]) -> dict[str, int]:
    if isinstance(value, np.ndarray):
        try:
            tensor = torch.from_numpy(np.ascontiguousarray(value).reshape(value.shape))
        except (TypeError, ValueError) as error:  # the latter: bytes in another order
            raise TypeError(f"{where} is a numpy array of {value.dtype}, which torch does not know.") from error
    else:
        tensor = value.detach().resolve_conj()
        if hasattr(tensor, "device_mesh") or tensor.layout != torch.strided or tensor.is_quantized:
            raise TypeError(f"{where} is a {type(value).__name__}, of layout {value.layout}; save a plain tensor.")
    tensors.append(tensor)
    return {"$array" if isinstance(value, np.ndarray) else "$tensor": len(tensors) - 1}


_SEQUENCES: dict[type, tuple[str, Any]] = {
    torch.Size: ("$size", list),
    tuple: ("$tuple", list),
    set: ("$set", lambda value: sorted(value, key=repr)),
    frozenset: ("$frozenset", lambda value: sorted(value, key=repr)),
    deque: ("$deque", list),
}
_ATOMS: dict[type, tuple[str, Any]] = {
    bytes: ("$bytes", lambda value: base64.b64encode(value).decode()),
    torch.dtype: ("$dtype", str),
    torch.device: ("$device", str),
    complex: ("$complex", lambda value: [repr(value.real), repr(value.imag)]),  # either may be NaN
    PurePath: ("$path", str),
}
_FROM_ATOMS: dict[str, Any] = {
    "$float": float,
    "$bytes": lambda content: base64.b64decode(content, validate=True),
    "$dtype": _DTYPES.__getitem__,
    "$device": torch.device,
    "$complex": lambda content: complex(*map(float, content)),
    "$path": Path,
}
