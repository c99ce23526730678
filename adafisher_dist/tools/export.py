"""Export a checkpoint's weights and buffers alone, as safetensors files for serving.

Names and shapes are the model's own. What fits into one file is model.safetensors. What does not
is cut as Hugging Face's libraries do it: model-00001-of-00003.safetensors, …, and
model.safetensors.index.json, which tells where each tensor is.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from adafisher_dist.blocks.parts import Parts, saved_parts
from adafisher_dist.checkpoint.directory import sync
from adafisher_dist.checkpoint.encoding import dtype_of
from adafisher_dist.checkpoint.errors import CheckpointError, damaged
from adafisher_dist.checkpoint.manifest import LEFT_OUT, Manifest
from adafisher_dist.checkpoint.open_checkpoint import OpenCheckpoint, open_checkpoint
from adafisher_dist.tools.inspection import Bar, damage, no_bar, short

logger = logging.getLogger("adafisher_dist")

MAX_SHARD_BYTES = 5 * 10**9

_WHOLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_PARTS = "model-[0-9]*-of-[0-9]*.safetensors"
_SAVING = ".saving"


@dataclass(frozen=True, slots=True)
class _Output:
    """A tensor to write: its key in the checkpoint, and its shape and dtype in the file.

    `parts`: how tensor parallelism cut it, if it did.
    """

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    parts: Parts | None

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


_Outputs = Mapping[str, _Output]  # by name


def export_weights(
    folder: Path, out: Path, dtype: torch.dtype | None = None, max_shard_bytes: int = MAX_SHARD_BYTES, *,
    overwrite: bool = False, verify: bool = True, bar: Bar = no_bar,
) -> list[Path]:  # fmt: skip
    """Write a checkpoint's weights and buffers as safetensors files for a strict `load_state_dict`.

    Tied parameters are written under each of their names. Files get their names when all of them
    are complete. Memory: the tensors of one file, and where dtypes change, the largest tensor once
    more.

    Args:
        folder: the checkpoint's own folder, as `CheckpointDirectory.find` tells it.
        out: the folder to write to, made where there is none. What else is in it stays.
        dtype: of all floating-point parameters; None for their own in the model that was saved.
            Buffers keep theirs.
        max_shard_bytes: of the tensors in a file; a larger tensor has a file of its own.
        overwrite: replace what an earlier export has left in `out`.
        verify: check every file's checksum first. Without, sizes and headers alone are checked.
        bar: shows the progress.

    Returns:
        The files, in order. The index, where there is one, is the last.

    Raises:
        CheckpointError: the checkpoint is damaged, and its damaged files are named; or other saves
            replaced or deleted it again and again. Nothing was written.
        FileExistsError: there is an export in `out`, and it may not be overwritten.
        OverflowError: a weight is too large for the dtype; nothing was written, as for the next
            two.
        ValueError: max_shard_bytes is not positive.
        OSError: something cannot be read or written.
    """
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes should be at least 1, got {max_shard_bytes}.")
    standing = _exported(out)
    if standing and not overwrite:
        raise FileExistsError(f"{standing[0]} exists: choose another folder (--out), or replace it (--overwrite).")
    with open_checkpoint(lambda: folder, lambda manifest: manifest.files) as opened:
        return _export(opened, out, dtype, max_shard_bytes, standing, verify, bar)


def _export(
    opened: OpenCheckpoint, out: Path, dtype: torch.dtype | None, max_shard_bytes: int, standing: Sequence[Path],
    verify: bool, bar: Bar,
) -> list[Path]:  # fmt: skip
    _check(opened, verify, bar)
    shards = _cut(_outputs(opened.manifest, dtype), max_shard_bytes)
    files = [out / name for name in shards] + ([out / _INDEX] if len(shards) > 1 else [])
    made = not out.exists()
    out.mkdir(parents=True, exist_ok=True)
    try:
        _write(shards, out, opened, bar)
        _publish(files, standing)
    finally:
        for path in out.glob(f".model*{_SAVING}"):  # those too that a killed export has left
            path.unlink()
        if made and not any(out.iterdir()):
            out.rmdir()
    missing = [name for name, fact in opened.manifest.about["model"]["parameters"].items() if fact.get(LEFT_OUT)]
    if missing:
        logger.warning(
            "%d frozen parameters, as %s, were left out of the checkpoint, and so of the export: load it over the base"
            " model with strict=False.",
            len(missing), missing[0],
        )  # fmt: skip
    for name in opened.manifest.about["model"]["extra_state"]:
        logger.warning("The extra state of %s is not in the export: load it with strict=False.", name)
    return files


def _exported(out: Path) -> list[Path]:
    """What an earlier export has left in a folder."""
    return [path for path in (out / _WHOLE, out / _INDEX) if path.exists()] + sorted(out.glob(_PARTS))


def _check(opened: OpenCheckpoint, checksums: bool, bar: Bar) -> None:
    problems = damage(opened, bar) if checksums else opened.problems(opened.manifest.files, checksums=False)
    if problems:
        raise damaged(opened.folder, "; ".join(problems), "Nothing was written.")


def _outputs(manifest: Manifest, dtype: torch.dtype | None) -> _Outputs:
    """All that is written, in the model's order, then the other names of tied parameters.

    Raises:
        CheckpointError: the checkpoint lacks a tensor of the model.
    """
    model = manifest.about["model"]
    found: dict[str, _Output] = {}
    for kind, members in (("weight", model["parameters"]), ("buffer", model["buffers"])):
        for name, fact in members.items():
            if fact.get(LEFT_OUT):
                continue
            own = dtype_of(fact["dtype"])
            override = dtype if kind == "weight" and own.is_floating_point else None
            found[name] = _Output(f"{kind}/{name}", tuple(fact["shape"]), override or own, saved_parts(fact))
    for name, output in found.items():
        stored = manifest.tensors.get(output.key)
        held = 0 if stored is None else stored.numel  # a tensor without elements is not stored
        if held != output.numel:
            raise CheckpointError(f"The checkpoint holds {held} of the {output.numel} elements of {name}.")
    return {**found, **{alias: found[name] for alias, name in model["aliases"].items() if name in found}}


def _cut(outputs: _Outputs, limit: int) -> dict[str, _Outputs]:
    """The files, by name, and what is in each; a tensor that does not fit begins a new file."""
    parts: list[dict[str, _Output]] = [{}]
    held = 0
    for name, output in outputs.items():
        if parts[-1] and held + output.nbytes > limit:
            parts.append({})
            held = 0
        parts[-1][name] = output
        held += output.nbytes
    if len(parts) == 1:
        return {_WHOLE: parts[0]}
    return {f"model-{n:05d}-of-{len(parts):05d}.safetensors": part for n, part in enumerate(parts, start=1)}


def _write(shards: Mapping[str, _Outputs], out: Path, opened: OpenCheckpoint, bar: Bar) -> None:
    """Write everything under temporary names."""
    total = sum(output.nbytes for members in shards.values() for output in members.values())
    with bar("Writing", total) as advance:
        for file, members in shards.items():
            tensors = {}
            for name, output in members.items():
                tensors[name] = _tensor(opened, name, output)
                advance(output.nbytes)
            _save(_temporary(out / file), tensors)
    if len(shards) > 1:
        places = {name: file for file, members in shards.items() for name in members}
        index = {"metadata": {"total_size": total}, "weight_map": places}
        _temporary(out / _INDEX).write_text(json.dumps(index, indent=2) + "\n")
        sync(_temporary(out / _INDEX))


def _save(path: Path, tensors: dict[str, Tensor]) -> None:
    path.touch()
    mode = path.stat().st_mode
    try:
        save_file(tensors, path, {"format": "pt"})  # libraries that read the file ask for that word
        path.chmod(mode)  # safetensors would leave it to its owner alone
    except SafetensorError as error:  # the disk is full, say
        told = re.sub(r" \(os error \d+\)", "", str(error))
        raise OSError(f"{path} could not be written: {told}") from error
    sync(path)


def _tensor(opened: OpenCheckpoint, name: str, output: _Output) -> Tensor:
    """A tensor as it is written.

    Raises:
        OverflowError: finite values would become infinite.
    """
    if not output.numel:
        return torch.empty(output.shape, dtype=output.dtype, device="cpu")
    stored = _in_one(opened.read_tensor(output.key), output.parts)
    values = stored.to(output.dtype)
    if values.dtype != stored.dtype and values.is_floating_point() and values.dtype.itemsize > 1:  # float8 has no inf
        lost = int((stored.isfinite() & values.isinf()).sum())
        if lost:
            raise OverflowError(
                f"{lost} values of {name} are too large for {short(values.dtype)}, which ends at"
                f" {torch.finfo(values.dtype).max:g}: export as float32 or bfloat16 (--dtype). Nothing was written."
            )
    return values.view(output.shape)


def _in_one(stored: Tensor, parts: Parts | None) -> Tensor:
    """The elements in the parameter's own order, of parts that lie one after the other."""
    if parts is None:
        return stored
    cut = torch.split(stored, [prod(shape) for shape in parts.shapes])
    return torch.cat([own.view(shape) for own, shape in zip(cut, parts.shapes, strict=True)], dim=parts.dim).view(-1)


def _publish(files: Sequence[Path], standing: Sequence[Path]) -> None:
    """Give the files their names, and take away what is left of an earlier export."""
    if len(files) > 1:
        # What a reader opens first goes before the shards change, and comes last: it never sees a
        # mixture.
        for path in standing:
            if path.name in (_WHOLE, _INDEX):
                path.unlink()
    for path in files:
        _temporary(path).replace(path)
    for path in standing:
        if path not in files:
            path.unlink(missing_ok=True)


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}{_SAVING}")
