"""What a checkpoint holds, for people and scripts.

It is read from the manifest, without a process group, model or optimizer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

import torch

from adafisher_dist.checkpoint.manifest import CheckpointError, Manifest
from adafisher_dist.checkpoint.open_checkpoint import OpenCheckpoint

# Shows how far a long piece of work is: given its name and its bytes, a context with what takes the
# bytes just done.
Bar = Callable[[str, int], AbstractContextManager[Callable[[int], object]]]


def no_bar(what: str, nbytes: int) -> AbstractContextManager[Callable[[int], object]]:
    """A Bar that shows nothing."""
    return nullcontext(lambda done: None)


@dataclass(frozen=True, slots=True)
class ParameterFacts:
    """A parameter; a tied one once, by its first name.

    Attributes:
        name: in the model.
        shape: of the whole parameter.
        dtype: in the model that was saved.
        stored_dtype: of its values in the checkpoint: DeepSpeed's fp32 copy, say. None where there
            are none: it has no elements, or was frozen and left out.
        trainable: whether it required a gradient.
        aliases: its other names.
        blocks: Fisher blocks; None where the optimizer had no state for it, as also for the next
            three.
        dense_blocks: those of them that are no diagonal.
        step: steps that it took.
        fisher_dtype: of its Fisher blocks.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    stored_dtype: str | None
    trainable: bool
    aliases: tuple[str, ...]
    blocks: int | None
    dense_blocks: int | None
    step: int | None
    fisher_dtype: str | None

    @property
    def numel(self) -> int:
        """Its elements."""
        return prod(self.shape)


@dataclass(frozen=True, slots=True)
class BufferFacts:
    """A persistent buffer of the model."""

    name: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True, slots=True)
class GroupFacts:
    """A param group: parameter names, number of elements, and its settings as plain JSON."""

    names: tuple[str, ...]
    elements: int
    settings: dict[str, Any]


@dataclass(frozen=True, slots=True)
class KindFacts:
    """All tensors of a kind and dtype.

    The kinds: weight, buffer, momentum, fisher, square, factor, curvature, random, value.
    """

    kind: str
    dtype: str
    tensors: int
    elements: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class FileFacts:
    """A shard: its length and CRC-32, as the manifest has them."""

    name: str
    nbytes: int
    crc32: str


@dataclass(frozen=True, slots=True)
class Summary:
    """What a checkpoint holds.

    Attributes:
        path: its folder.
        id: a new one at each save.
        created: when it was saved, in UTC.
        versions: the versions that wrote it, by package.
        step: steps taken; with DeepSpeed, the engine's.
        world_size: ranks that saved it.
        layout: how the optimizer's tensors lay on them.
        zero_stage: DeepSpeed's; None without it.
        precision: DeepSpeed's: "fp32", "bf16", "fp16"; None without it.
        skipped_steps: that the optimizer did not take, for non-finite gradients.
        parameters: by name, in the model's order.
        buffers: likewise.
        groups: the optimizer's param groups.
        kinds: what takes how much room.
        files: the shards.
        values: the names of what else was saved, as "lr_scheduler" and "extra".
        extra_state: the modules whose get_extra_state() was saved.
    """

    path: str
    id: str
    created: str
    versions: dict[str, str]
    step: int
    world_size: int
    layout: str
    zero_stage: int | None
    precision: str | None
    skipped_steps: int
    parameters: tuple[ParameterFacts, ...]
    buffers: tuple[BufferFacts, ...]
    groups: tuple[GroupFacts, ...]
    kinds: tuple[KindFacts, ...]
    files: tuple[FileFacts, ...]
    values: tuple[str, ...]
    extra_state: tuple[str, ...]

    @property
    def totals(self) -> dict[str, int]:
        """Of the model, of the optimizer's state, and of the files."""
        return {
            "parameters": len(self.parameters),
            "elements": sum(p.numel for p in self.parameters),
            "trainable_elements": sum(p.numel for p in self.parameters if p.trainable),
            "blocks": sum(p.blocks or 0 for p in self.parameters),
            "dense_blocks": sum(p.dense_blocks or 0 for p in self.parameters),
            "nbytes": sum(file.nbytes for file in self.files),
        }

    def as_json(self) -> dict[str, Any]:
        """All of it, for json.dumps."""
        return {**asdict(self), "totals": self.totals}


def summarize(opened: OpenCheckpoint) -> Summary:
    """The facts of a checkpoint."""
    manifest, about = opened.manifest, opened.manifest.about
    return Summary(
        path=str(opened.folder),
        id=about["id"],
        created=about["created"],
        versions=dict(about["versions"]),
        step=about["step"],
        world_size=about["world_size"],
        layout=about["layout"],
        zero_stage=about.get("zero_stage"),
        precision=about.get("precision"),
        skipped_steps=about["optimizer"]["skipped_steps"],
        parameters=_parameters(manifest),
        buffers=tuple(
            BufferFacts(name, tuple(buffer["shape"]), short(buffer["dtype"]))
            for name, buffer in about["model"]["buffers"].items()
        ),
        groups=_groups(opened),
        kinds=_kinds(manifest),
        files=tuple(FileFacts(name, file.nbytes, f"{file.crc32:08x}") for name, file in manifest.files.items()),
        values=tuple(name for name, value in about["values"].items() if value not in (None, {})),
        extra_state=tuple(about["model"]["extra_state"]),
    )


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


def _parameters(manifest: Manifest) -> tuple[ParameterFacts, ...]:
    model, state = manifest.about["model"], manifest.about["optimizer"]["state"]
    aliases: dict[str, list[str]] = {}
    for alias, name in model["aliases"].items():
        aliases.setdefault(name, []).append(alias)
    return tuple(
        ParameterFacts(
            name=name,
            shape=tuple(parameter["shape"]),
            dtype=short(parameter["dtype"]),
            stored_dtype=_stored_dtype(manifest, f"weight/{name}"),
            trainable=parameter["trainable"],
            aliases=tuple(aliases.get(name, ())),
            blocks=state.get(name, {}).get("blocks"),
            dense_blocks=state.get(name, {}).get("dense_blocks"),
            step=state.get(name, {}).get("step"),
            fisher_dtype=_stored_dtype(manifest, f"fisher/{name}"),
        )
        for name, parameter in model["parameters"].items()
    )


def _stored_dtype(manifest: Manifest, key: str) -> str | None:
    stored = manifest.tensors.get(key)
    return None if stored is None else short(stored.dtype)


def _groups(opened: OpenCheckpoint) -> tuple[GroupFacts, ...]:
    about = opened.manifest.about
    parameters = about["model"]["parameters"]
    return tuple(
        GroupFacts(
            tuple(group["names"]),
            sum(prod(parameters[name]["shape"]) for name in group["names"]),
            {key: _plain(value, opened) for key, value in group["settings"].items()},
        )
        for group in about["optimizer"]["groups"]
    )


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


def _kinds(manifest: Manifest) -> tuple[KindFacts, ...]:
    kinds: dict[tuple[str, str], list[int]] = {}
    for key, tensor in manifest.tensors.items():
        kind = key.partition("/")[0]
        sums = kinds.setdefault((kind, short(tensor.dtype)), [0, 0, 0])
        sums[:] = sums[0] + 1, sums[1] + tensor.numel, sums[2] + tensor.nbytes
    order = ["weight", "buffer", "momentum", "fisher", "square", "factor", "curvature", "random", "value"]
    ranked = sorted(kinds.items(), key=lambda item: order.index(item[0][0]) if item[0][0] in order else len(order))
    return tuple(KindFacts(kind, dtype, *sums) for (kind, dtype), sums in ranked)
