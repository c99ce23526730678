"""Find what of a checkpoint fits a model and its optimizer, by names, shapes and settings.

This is done before a load changes anything.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from math import isclose
from reprlib import repr as short
from typing import Any

import torch
from torch import Tensor

from adafisher_dist.blocks.grid import GRID_SETTINGS, Grid
from adafisher_dist.blocks.parts import Parts, grids_of, saved_parts
from adafisher_dist.checkpoint import lengths, orders
from adafisher_dist.checkpoint.encoding import dtype_of
from adafisher_dist.checkpoint.errors import CheckpointError, damaged
from adafisher_dist.checkpoint.manifest import CHECKPOINT_FORMAT, LEFT_OUT, WEIGHTS_ONLY, Manifest
from adafisher_dist.checkpoint.targets import (
    OWN_SETTINGS,
    CheckpointTarget,
    config_facts,
    extra_state_key,
    members_of_groups,
    problem_of_values,
    with_extra_state,
)
from adafisher_dist.layouts.storage import local, whole_shape
from adafisher_dist.settings import state_config

_SHOWN = 20


@dataclass(slots=True)
class Match:
    """What will be restored.

    Attributes:
        weights: by name in the model, of parameters and buffers: the name in the checkpoint.
        states: by name in the model, of parameters whose optimizer state is restored: the name in
            the checkpoint.
        extra_states: by name of a module in the model: the name in the checkpoint.
        groups: for each param group of the optimizer, the number of the checkpoint's whose settings
            it takes.
        block_sizes: by param group, the checkpoint's, where the optimizer's was to be chosen
            ("auto").
        left_out: parameters whose values were left out of the checkpoint, being frozen: they stay
            as they are.
        problems: what will not be restored, and why.
    """

    weights: dict[str, str] = field(default_factory=dict)
    states: dict[str, str] = field(default_factory=dict)
    groups: list[int | None] = field(default_factory=list)
    block_sizes: dict[int, int] = field(default_factory=dict)
    extra_states: dict[str, str] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def match(
    manifest: Manifest,
    target: CheckpointTarget,
    rename: Mapping[str, str] | None,
    weights: bool = True,
    states: bool = True,
) -> Match:
    """Compare.

    Args:
        manifest: of the checkpoint.
        target: what it is to be loaded into.
        rename: names in the checkpoint → names in the model; one that ends with "." renames all
            that begin with it.
        weights: whether parameters and buffers are asked for.
        states: whether the optimizer's state is asked for.

    Raises:
        CheckpointError: `rename` names what the checkpoint does not have, or gives one name twice;
            the optimizer's state is asked for, and is of an earlier version's kind.
    """
    if states and manifest.format == WEIGHTS_ONLY:
        raise CheckpointError(
            f"The checkpoint's optimizer state is of adafisher_dist {manifest.about['versions'].get('adafisher_dist')}"
            f" (format {manifest.format}; this version's is {CHECKPOINT_FORMAT}), whose Fisher blocks are cut and"
            " weighed otherwise: it would not mean the same here. Load the weights alone (load_optimizer_states=False"
            " of DeepSpeed's load_checkpoint, or a file made by `adafisher_dist export`), or go on with that version."
            " Nothing was changed."
        )
    found = Match()
    model = manifest.about["model"]
    stored = {**model["parameters"], **model["buffers"]}
    modules = {extra_state_key(name): name for name in model["extra_state"]}
    old_names = _renamed([*stored, *model["aliases"], *modules], rename or {})
    _match_extra_states(target, old_names, modules, found)
    old_names = {name: old for name, old in old_names.items() if old not in modules}
    for alias, first in model["aliases"].items():  # a tied parameter may go by either name
        stored.setdefault(alias, stored[first])
    here = {**target.parameters, **target.buffers}
    fitting: dict[str, str] = {}
    for name, tensor in here.items():
        old = old_names.get(name)
        kind, other = ("parameter", "buffer") if name in target.parameters else ("buffer", "parameter")
        if old is None:
            found.problems.append(f"{name} is not in the checkpoint")
        elif model["aliases"].get(old, old) in model[f"{other}s"]:
            found.problems.append(f"{name} is a {kind} in the model, and was a {other}")
        elif tuple(stored[old]["shape"]) != whole_shape(tensor):
            found.problems.append(
                f"{name} has shape {whole_shape(tensor)}, and {tuple(stored[old]['shape'])} in the checkpoint"
            )
        elif not stored[old].get(LEFT_OUT) and (problem := problem_of_values(tensor)) is not None:
            found.problems.append(f"{name} {problem}")
        elif weights and not stored[old].get(LEFT_OUT) and _overlaps(tensor):
            found.problems.append(f"{name} is expanded, so that its elements share memory: give it its own by .clone()")
        elif weights and not stored[old].get(LEFT_OUT) and _kind(dtype_of(stored[old]["dtype"])) != _kind(tensor.dtype):
            found.problems.append(
                f"{name} is {tensor.dtype} in the model, and was {stored[old]['dtype']}: it is not converted, since"
                " imaginary parts would be lost, and integers may be a quantised weight's codes, which are no numbers"
                " without their scales"
            )
        else:
            fitting[name] = model["aliases"].get(old, old)
    for name, old in old_names.items():
        if name not in here and name not in target.elsewhere and old not in model["aliases"]:
            tied = target.aliases.get(name)
            if tied is not None and fitting.get(tied) == old:
                continue  # tied there as well, and by another of its names the first
            what = f"tied to {tied} in the model, and was a tensor of its own" if tied else "not in the model"
            found.problems.append(f"{old} is {what}" + ("" if name == old else f" (as {name})"))
    if weights:
        kept = {name for name, facts in stored.items() if not facts.get(LEFT_OUT)}
        found.weights = {name: old for name, old in fitting.items() if old in kept}
        found.left_out = [name for name in fitting if name not in found.weights]
    if states:
        _match_states(manifest, target, fitting, found)
        _match_groups(manifest, target, fitting, found)
    return found


def _overlaps(tensor: Tensor) -> bool:
    """Whether elements share memory, so that nothing can be read into them."""
    here = local(tensor)
    return here.numel() > 0 and any(
        size > 1 and stride == 0 for size, stride in zip(here.shape, here.stride(), strict=True)
    )


def _kind(dtype: torch.dtype) -> tuple[bool, bool]:
    """Dtypes of two kinds are not converted to each other: integers, reals, complex numbers."""
    return dtype.is_floating_point, dtype.is_complex


def refuse(found: Match, what: str, remedy: str) -> None:
    """The error for what does not fit.

    Raises:
        CheckpointError: there is any; lists it.
    """
    if found.problems:
        more = len(found.problems) - _SHOWN
        lines = [*found.problems[:_SHOWN], *([f"and {more} more"] if more > 0 else [])]
        raise CheckpointError(f"{what} does not fit:\n  " + "\n  ".join(lines) + f"\nNothing was changed. {remedy}")


def check_stored(manifest: Manifest, found: Match, what: str) -> None:
    """Check that the tensors to be read exist, and are as large as the manifest's facts say.

    Raises:
        CheckpointError: one is not: the manifest contradicts itself.
    """
    for key, numel in _needed(manifest, found):
        stored = manifest.tensors.get(key)
        if numel and (stored is None or stored.numel != numel):
            there = 0 if stored is None else stored.numel
            raise damaged(what, f"it has {there} elements of {key}, and should have {numel}", "Nothing was changed.")


def _needed(manifest: Manifest, found: Match) -> Iterator[tuple[str, int]]:
    """The keys of all tensors that will be read, and their elements."""
    weights = set(found.weights.values())
    for key, numel in lengths.of_weights(manifest.about):
        if key.partition("/")[2] in weights:
            yield key, numel
    for old in found.states.values():
        yield from lengths.of_state(manifest.about, old)


def _renamed(names: Sequence[str], rename: Mapping[str, str]) -> dict[str, str]:
    """By its new name, the name of each tensor in the checkpoint."""
    unused = {old for old in rename if not any(n == old or (old.endswith(".") and n.startswith(old)) for n in names)}
    if unused:
        raise CheckpointError(f"rename: the checkpoint has no {sorted(unused)}. It has: {', '.join(names[:_SHOWN])}, …")
    result: dict[str, str] = {}
    for name in names:
        prefixes = [old for old in rename if old.endswith(".") and name.startswith(old)]
        longest = max(prefixes, key=len, default="")
        new = rename.get(name) or (rename[longest] + name[len(longest) :] if longest else name)
        if new in result:
            raise CheckpointError(f"rename: both {result[new]} and {name} would become {new}.")
        result[new] = name
    return result


def _match_extra_states(
    target: CheckpointTarget, old_names: Mapping[str, str], saved: Mapping[str, str], found: Match
) -> None:
    here = {extra_state_key(name): name for name, _ in with_extra_state(target)}
    new_names = {name: old for name, old in old_names.items() if old in saved}
    for name, module in here.items():
        if name in new_names:
            found.extra_states[module] = saved[new_names[name]]
        else:
            found.problems.append(f"{name} is not in the checkpoint")
    found.problems += [
        f"{old} is not in the model"
        for name, old in new_names.items()
        if name not in here and name not in target.elsewhere
    ]


def _match_states(manifest: Manifest, target: CheckpointTarget, fitting: Mapping[str, str], found: Match) -> None:
    saved = manifest.about["optimizer"]
    managed = {name for group in saved["groups"] for name in group["names"]}
    members = members_of_groups(target)
    for number, (group, names) in enumerate(zip(target.optimizer.param_groups, members, strict=True)):
        own = config_facts(state_config(group))
        size = _block_size(saved, names, fitting) if group["memory_budget_gb"] is not None else None
        if size is not None:  # block_size="auto": the checkpoint's will do
            own["block_size"] = found.block_sizes[number] = size
        for name in names:
            old = fitting.get(name)
            if old is None:
                continue  # told already
            if old not in managed:
                found.problems.append(f"the optimizer had no {old}, so it has no state for {name}")
            elif old in saved["state"]:
                problem = _problem_of_state(manifest, target, name, old, own)
                if problem is None:
                    found.states[name] = old
                else:
                    found.problems.append(problem)
    given = {name for names in members for name in names}
    for name, old in fitting.items():
        if name not in given and old in saved["state"]:
            found.problems.append(f"the state of {old} is in the checkpoint, and the optimizer was not given {name}")


def _problem_of_state(
    manifest: Manifest, target: CheckpointTarget, name: str, old: str, own: Mapping[str, Any]
) -> str | None:
    """Why the state of a parameter does not fit one whose settings are `own`; None: it does."""
    there, shape = manifest.about["optimizer"]["state"][old]["structure"], whole_shape(target.parameters[name])
    parts, cut = target.parts.get(name), _saved_parts(manifest, old)
    if there["grafting"] != own["grafting"]:
        return (
            f"the Fisher of {name} was kept for grafting={there['grafting']!r}, here {own['grafting']!r}: it is of"
            " other vectors"
        )
    if not _alike(grids_of(shape, parts, own), grids_of(shape, parts, there)):
        changed = [key for key in GRID_SETTINGS if own[key] != there[key]]
        settings = ", ".join(f"{key}={there[key]!r}, here {own[key]!r}" for key in changed)
        return f"the Fisher blocks of {name} were made with {settings}"
    if parts != cut and None in [orders.of_field("fisher", shape, both, there) for both in (parts, cut)]:
        return _of_other_parts(name, shape, parts, cut)
    return None


def _saved_parts(manifest: Manifest, old: str) -> Parts | None:
    return saved_parts(manifest.about["model"]["parameters"][old])


def _of_other_parts(name: str, shape: tuple[int, ...], parts: Parts | None, cut: Parts | None) -> str:
    """What is told of blocks that end at the edges of parts that are not there any more, or new."""
    told = ["is whole" if own is None else f"is cut into parts of {own.shapes[0]}" for own in (parts, cut)]
    return (
        f"the Fisher blocks of {name}, whose shape is {shape}, end at the edges of tensor-parallel parts, and those are"
        f" not on the grid of the whole: here it {told[0]}, and where it was saved it {told[1]}. Load at the"
        " tensor-parallel degree that it was saved at; or with strict=False, which restores the weights, and begins the"
        " state of such parameters anew"
    )


def _alike(own: Sequence[Grid], there: Sequence[Grid]) -> bool:
    """Whether the state of one grid fits the other: the same blocks, or no dense ones in either.

    Other settings may make the same blocks, as block sizes above the length of its rows do.
    """
    return own == there or not any(grid.dense_row_groups for grid in (*own, *there))


def _block_size(saved: Mapping[str, Any], names: Sequence[str], fitting: Mapping[str, str]) -> int | None:
    """The block size of the first parameter of a group that has a state in the checkpoint."""
    states = [saved["state"][fitting[name]] for name in names if fitting.get(name) in saved["state"]]
    return int(states[0]["structure"]["block_size"]) if states else None


def _match_groups(manifest: Manifest, target: CheckpointTarget, fitting: Mapping[str, str], found: Match) -> None:
    """Choose the checkpoint's group whose settings each param group takes.

    It is the one that all its parameters come from; if they come from several, it takes none.
    """
    number_of = {name: i for i, group in enumerate(manifest.about["optimizer"]["groups"]) for name in group["names"]}
    for number, names in enumerate(members_of_groups(target)):
        sources = {number_of[fitting[name]] for name in names if fitting.get(name) in number_of}
        found.groups.append(next(iter(sources)) if len(sources) == 1 else None)
        if len(sources) > 1:
            found.problems.append(
                f"param group {number} has parameters of the groups {sorted(sources)} of the checkpoint, so it is not"
                " clear whose learning rate and settings it should take"
            )
    taken = {number_of[fitting[n]] for names in members_of_groups(target) for n in names if fitting.get(n) in number_of}
    for number, group in enumerate(manifest.about["optimizer"]["groups"]):
        if number not in taken and any(name in fitting.values() for name in group["names"]):
            found.problems.append(f"the optimizer has no parameter of param group {number} of the checkpoint")


# ---- groups that were one ----

OwnSettings = tuple[int, dict[str, Any]]


def own_settings(manifest: Manifest, target: CheckpointTarget, found: Match) -> list[OwnSettings]:
    """Of each param group that would take another's settings: which, and what it has itself."""
    saved = manifest.about["optimizer"]["groups"]
    return [
        (source, {name: _plain(group.get(name)) for name in saved[source]["settings"] if name not in OWN_SETTINGS})
        for group, source in zip(target.optimizer.param_groups, found.groups, strict=True)
        if source is not None
    ]


def keep_apart(found: Match, by_rank: Sequence[Sequence[OwnSettings]]) -> None:
    """Let param groups that differ, and would all take the settings of one, keep their own.

    Args:
        found: is changed alike on all ranks, of which some may have other param groups.
        by_rank: what `own_settings` returned on each.
    """
    own = [entry for entries in by_rank for entry in entries]
    for source in sorted({source for source, _ in own}):
        first, *others = (settings for number, settings in own if number == source)
        different = [name for name in first if any(not _same(first[name], other.get(name)) for other in others)]
        if different:
            told = [f"{name} {_some([first[name], *(other.get(name) for other in others)])}" for name in different[:5]]
            found.problems.append(
                f"param group {source} of the checkpoint would give its settings to several groups, which differ here:"
                f" {'; '.join(told)}"
            )
            found.groups = [None if number == source else number for number in found.groups]


def _plain(value: Any) -> bool | int | float | str | None:
    """A setting as it can be sent: of a tensor its number, of anything but a number its text."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    with suppress(TypeError, ValueError, RuntimeError):
        return float(value)
    return short(value)


def _same(one: Any, other: Any) -> bool:
    """Whether two settings are alike but for rounding."""
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in (one, other))
    return isclose(one, other, rel_tol=1e-6) if numbers else one == other


def _some(values: Sequence[Any]) -> str:
    distinct = list(dict.fromkeys(str(value) for value in values))
    return ", ".join(distinct[:5]) + (", …" if len(distinct) > 5 else "")
