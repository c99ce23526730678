"""What a checkpoint holds, for people and scripts.

It is read from the manifest, without a process group, model or optimizer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from math import prod
from typing import Any

import torch

from adafisher_dist.checkpoint.errors import CheckpointError
from adafisher_dist.checkpoint.manifest import Manifest
from adafisher_dist.checkpoint.open_checkpoint import OpenCheckpoint

# Shows how far a long piece of work is: given its name and its bytes, a context with what takes the
# bytes just done.
Bar = Callable[[str, int], AbstractContextManager[Callable[[int], object]]]


def no_bar(what: str, nbytes: int) -> AbstractContextManager[Callable[[int], object]]:
    """A Bar that shows nothing."""
    return nullcontext(lambda done: None)


def summarize(opened: OpenCheckpoint) -> dict[str, Any]:
    """What a checkpoint holds, for json.dumps.

    - path: its folder; id: a new one at each save; created: when, in UTC; versions: those that
      wrote it, by package; step: steps taken, with DeepSpeed the engine's; world_size: ranks that
      saved it; layout: how the optimizer's tensors lay on them.
    - zero_stage, precision ("fp32", "bf16", "fp16"): DeepSpeed's; None without it.
    - skipped_steps: that the optimizer did not take, for non-finite gradients.
    - parameters: in the model's order, a tied one once, by its first name: see `_parameters`.
    - buffers: the persistent ones, by name, shape and dtype.
    - groups: of each param group the parameters' names, the number of elements, and the settings.
    - kinds: for each kind and dtype of tensors (weight, buffer, momentum, fisher, square, factor,
      curvature, random, value) how many there are, their elements and bytes.
    - files: the shards: name, length and CRC-32, as the manifest has them.
    - values: the names of what else was saved, as "lr_scheduler" and "extra"; extra_state: the
      modules whose get_extra_state() was saved.
    - totals: of the model, of the optimizer's state, and of the files.
    """
    manifest, about = opened.manifest, opened.manifest.about
    parameters, files = _parameters(manifest), manifest.files
    elements = [prod(parameter["shape"]) for parameter in parameters]
    return {
        "path": str(opened.folder),
        **{key: about[key] for key in ("id", "created", "versions", "step", "world_size", "layout")},
        **{key: about.get(key) for key in ("zero_stage", "precision")},
        "skipped_steps": about["optimizer"]["skipped_steps"],
        "parameters": parameters,
        "buffers": [
            {"name": name, "shape": buffer["shape"], "dtype": short(buffer["dtype"])}
            for name, buffer in about["model"]["buffers"].items()
        ],
        "groups": _groups(opened),
        "kinds": _kinds(manifest),
        "files": [{"name": name, "nbytes": f.nbytes, "crc32": f"{f.crc32:08x}"} for name, f in files.items()],
        "values": [name for name, value in about["values"].items() if value not in (None, {})],
        "extra_state": list(about["model"]["extra_state"]),
        "totals": {
            "parameters": len(parameters),
            "elements": sum(elements),
            "trainable_elements": sum(
                n for n, parameter in zip(elements, parameters, strict=True) if parameter["trainable"]
            ),
            "blocks": sum(parameter["blocks"] or 0 for parameter in parameters),
            "dense_blocks": sum(parameter["dense_blocks"] or 0 for parameter in parameters),
            "nbytes": sum(file.nbytes for file in files.values()),
        },
    }


def short(dtype: torch.dtype | str) -> str:
    """A dtype's name without "torch."."""
    return str(dtype).removeprefix("torch.")


def damage(opened: OpenCheckpoint, bar: Bar = no_bar) -> list[str]:
    """What is wrong with a checkpoint's files, one line each; reads all bytes. All must be held."""
    found, files = [], opened.manifest.files
    with bar("Checking", sum(file.nbytes for file in files.values())) as advance:
        for name, file in files.items():
            found += opened.problems([name], checksums=True)
            advance(file.nbytes)
    return found


def _parameters(manifest: Manifest) -> list[dict[str, Any]]:
    """Facts of each parameter.

    - name, shape, dtype, trainable: of the whole parameter in the model that was saved.
    - stored_dtype: of its values in the checkpoint: DeepSpeed's fp32 copy, say. None where there
      are none: it has no elements, or was frozen and left out.
    - aliases: its other names.
    - blocks, dense_blocks (those that are no diagonal), step (steps that it took), fisher_dtype:
      None where the optimizer had no state for it.
    """
    model, state = manifest.about["model"], manifest.about["optimizer"]["state"]
    return [
        {
            "name": name,
            "shape": parameter["shape"],
            "dtype": short(parameter["dtype"]),
            "stored_dtype": _stored_dtype(manifest, f"weight/{name}"),
            "trainable": parameter["trainable"],
            "aliases": [alias for alias, first in model["aliases"].items() if first == name],
            **{key: state.get(name, {}).get(key) for key in ("blocks", "dense_blocks", "step")},
            "fisher_dtype": _stored_dtype(manifest, f"fisher/{name}"),
        }
        for name, parameter in model["parameters"].items()
    ]


def _stored_dtype(manifest: Manifest, key: str) -> str | None:
    stored = manifest.tensors.get(key)
    return None if stored is None else short(stored.dtype)


def _groups(opened: OpenCheckpoint) -> list[dict[str, Any]]:
    about = opened.manifest.about
    parameters = about["model"]["parameters"]
    return [
        {
            "names": group["names"],
            "elements": sum(prod(parameters[name]["shape"]) for name in group["names"]),
            "settings": {key: _plain(value, opened) for key, value in group["settings"].items()},
        }
        for group in about["optimizer"]["groups"]
    ]


def _plain(value: Any, opened: OpenCheckpoint) -> Any:
    """An encoded setting (see `encoding`), decoded: a dtype's short name, a tensor lr's number."""
    if not isinstance(value, Mapping) or len(value) != 1:
        return value
    ((kind, content),) = value.items()
    if kind == "$dtype":
        return short(content)
    if kind != "$tensor":
        return content if kind.startswith("$") else value
    key = f"value/{content}"
    try:
        return opened.read_tensor(key).tolist()[0] if opened.manifest.tensors[key].numel == 1 else key
    except (KeyError, CheckpointError):
        return key  # its shard is damaged: for --verify to tell


def _kinds(manifest: Manifest) -> list[dict[str, Any]]:
    kinds: dict[tuple[str, str], dict[str, Any]] = {}
    for key, tensor in manifest.tensors.items():
        kind, dtype = key.partition("/")[0], short(tensor.dtype)
        sums = kinds.setdefault((kind, dtype), {"kind": kind, "dtype": dtype, "tensors": 0, "elements": 0, "nbytes": 0})
        for name, amount in (("tensors", 1), ("elements", tensor.numel), ("nbytes", tensor.nbytes)):
            sums[name] += amount
    order = ["weight", "buffer", "momentum", "fisher", "square", "factor", "curvature", "random", "value"]
    return sorted(kinds.values(), key=lambda sums: order.index(sums["kind"]) if sums["kind"] in order else len(order))
