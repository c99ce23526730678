"""Loading: check everything, then build the state anew and read it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint.state_dict_loader as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from adafisher_dist import batch, layouts
from adafisher_dist.checkpoint import random_state, values
from adafisher_dist.checkpoint import training as trained
from adafisher_dist.checkpoint.agree import together
from adafisher_dist.checkpoint.manifest import CheckpointError, Manifest, read, verify
from adafisher_dist.checkpoint.matching import Match, check_stored, match, refuse, settings_to_restore
from adafisher_dist.checkpoint.places import Place
from adafisher_dist.checkpoint.ranges import Range
from adafisher_dist.checkpoint.reader import RangeLoadPlanner, ShardReader, read_tensor
from adafisher_dist.checkpoint.saving import explain
from adafisher_dist.checkpoint.training import Training
from adafisher_dist.settings import Structure, normalize, structure
from adafisher_dist.shard import Shard

logger = logging.getLogger("adafisher_dist")


IGNORED = object()


@dataclass(frozen=True, slots=True)
class Options:
    """How to load; see `load_checkpoint`.

    Attributes:
        strict: refuse what does not fit.
        rename: names in the checkpoint → names in the model.
        verify: check the checksums.
        weights: restore parameters and buffers.
        states: restore the optimizer.
        random: restore the random number generators.
        lr_scheduler: restore this scheduler, or ignore what the checkpoint has of one.
    """

    strict: bool = True
    rename: Mapping[str, str] | None = None
    verify: bool = True
    weights: bool = True
    states: bool = True
    random: bool = True
    lr_scheduler: Any = IGNORED


@dataclass(slots=True)
class Loaded:
    """What was found: folder, manifest, the other values by name, what was not restored, and what had been left out."""

    folder: Path
    about: Mapping[str, Any]
    values: dict[str, Any] = field(default_factory=dict)
    not_restored: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)


def load(where: Callable[[], Place], training: Training, options: Options) -> Loaded:
    """Load from the place that `where` finds. A collective; the caller has waited for the last save.

    Raises:
        CheckpointError: see `load_checkpoint`.
    """
    control, began = training.control, time.monotonic()
    same = control.gather(repr((options.strict, options.rename, options.verify, options.weights, options.states)))
    if len(set(same)) > 1:
        raise CheckpointError(f"The ranks load with different arguments (strict, rename, verify, …): {same}.")
    folder, manifest = open_together(where, training)
    _verify(folder, manifest, training, options.verify)
    loaded, matched = Loaded(folder, manifest.about), Match()

    def compare() -> None:
        nonlocal matched
        loaded.values = _values(folder, manifest)
        matched = match(manifest, training, options.rename, options.weights, options.states)
        loaded.not_restored = matched.problems = [*matched.problems, *_scheduler_problems(loaded, options)]
        loaded.left_out = matched.left_out
        if options.strict:
            refuse(matched, f"{folder}")
        check_stored(manifest, training, matched, f"{folder}")

    together(control, compare)
    with trained.partitioned(training.wrapper):
        shards: list[Shard] = []
        wanted: list[Range] = []

        def prepare() -> None:
            if options.states:
                for number, size in matched.block_sizes.items():
                    training.optimizer.param_groups[number]["block_size"] = size
                shards.extend(_fresh_shards(training, manifest, matched))
            wanted.extend(_ranges(training, manifest, matched, shards))

        if options.states:
            _begin_anew(training)
        together(control, prepare)
        _read(folder, manifest, wanted, training)
        if training.wrapper is not None and options.weights:
            layouts.refresh_module(training.wrapper)

        def finish() -> None:
            if options.weights:
                _restore_extra_state(training, loaded.values["extra_state"], matched)
            if options.states:
                _restore_settings(training, loaded.values["settings"], matched)
                _complete(training, manifest, matched, shards)
            if _has_scheduler(options.lr_scheduler) and not _scheduler_problems(loaded, options):
                options.lr_scheduler.load_state_dict(loaded.values["lr_scheduler"]["state"])
            key = f"random/{control.rank}"
            if options.random and key in manifest.tensors:
                random_state.restore(read_tensor(folder, manifest, key))

        together(control, finish)
    if options.states:
        training.optimizer._roster.engine.incomplete = False
    if control.rank == 0:
        _report(loaded, manifest, time.monotonic() - began)
    return loaded


def open_together(where: Callable[[], Place], training: Training) -> tuple[Path, Manifest]:
    """The same checkpoint on all ranks."""
    found: list[tuple[Path, Manifest]] = []

    def find() -> str:
        folder = where().find()
        found.append((folder, read(folder)))
        return str(found[0][1].about["id"])

    ids = together(training.control, find)
    if len(set(ids)) > 1:
        raise CheckpointError(
            f"The ranks see different checkpoints; this one sees {found[0][0]} (their ids are {ids}). Load from a file"
            " system that all ranks share, after the save has ended."
        )
    return found[0]


def _verify(folder: Path, manifest: Manifest, training: Training, checksums: bool) -> None:
    """Check all files, each on one rank.

    Raises:
        CheckpointError: on all ranks: names what is wrong.
    """
    control = training.control
    largest_first = sorted(manifest.files, key=lambda name: -manifest.files[name].nbytes)
    mine = largest_first[control.rank :: control.size]
    answers = together(control, lambda: verify(folder, manifest, mine, checksums))
    problems = sorted(problem for answer in answers for problem in answer)
    if problems:
        raise CheckpointError(f"{folder} is damaged: {'; '.join(problems)}. Nothing was changed.")


def _begin_anew(training: Training) -> None:
    """Drop the state that there is, so that the new one does not need memory beside it."""
    optimizer = training.optimizer
    optimizer.reset_state()
    optimizer._roster.engine.incomplete = True


def _fresh_shards(training: Training, manifest: Manifest, matched: Match) -> list[Shard]:
    """Shards for all tensors that hold a parameter whose state is restored, with its counters."""
    names = training.names
    chosen = [
        (tensor, members) for tensor, members in _tensors(training) if any(name in matched.states for name in members)
    ]
    complete = all(name in matched.states for _, members in chosen for name in members) and all(
        _has_factors(manifest, matched.states[name], structure(training.optimizer.param_groups[group]))
        for group, members in enumerate(trained.members_of_groups(training))
        for name in members
        if name in matched.states
    )
    tensors = [tensor for tensor, _ in chosen]
    shards = training.optimizer._roster.replan(tensors, training.wrapper, zeroed=not complete)
    saved = manifest.about["optimizer"]["state"]
    for shard in shards:
        for number, parameter in enumerate(shard.storage.parameters):
            old = matched.states.get(names[parameter.given.position])
            if old is not None:
                shard.counters[number] = torch.tensor([saved[old]["step"], saved[old]["fisher_updates"]])
    return shards


def _tensors(training: Training) -> list[tuple[Tensor, list[str]]]:
    """What the optimizer steps, in the order of its param groups, and the names of the parameters in each."""
    names = training.names
    if training.wrapper is None:
        return [(tensor, [names[given.position]]) for tensor, given in training.optimizer._roster.registry.given()]
    held: dict[int, list[str]] = {}
    tensors = {}
    for storage in training.storages():
        for parameter in storage.parameters:
            tensor = storage.tensors[parameter.tensor]
            tensors[id(tensor)] = tensor
            held.setdefault(id(tensor), []).append(names[parameter.given.position])
    return [(tensors[key], members) for key, members in held.items()]


def _ranges(training: Training, manifest: Manifest, matched: Match, shards: list[Shard]) -> list[Range]:
    """What this rank reads."""
    wanted = list(trained.weights(training, matched.weights, writing=False))
    for shard in shards:
        with_factors = {
            old for old, structure in _structures(training, shard, matched) if _has_factors(manifest, old, structure)
        }
        for range_ in trained.state(training, [shard], matched.states, writing=False):
            kind, _, old = range_.key.partition("/")
            if kind not in ("factor", "curvature") or old in with_factors:
                wanted.append(range_)
    return wanted


def _structures(training: Training, shard: Shard, matched: Match) -> Iterator[tuple[str, Structure]]:
    """For each parameter of a shard that is restored: its name in the checkpoint, and what its state is built for."""
    names = training.names
    for parameter in shard.storage.parameters:
        old = matched.states.get(names[parameter.given.position])
        if old is not None:
            yield old, shard.structures[shard.groups[parameter.tensor]]


def _has_factors(manifest: Manifest, old: str, own: Structure) -> bool:
    """Whether the checkpoint has what is kept here of a parameter's factors, made with the same exponent."""
    there = manifest.about["optimizer"]["state"][old]["structure"]
    return not own.keeps_factors or (there["keeps_factors"] and there["exponent"] == own.exponent)


def _read(folder: Path, manifest: Manifest, wanted: list[Range], training: Training) -> None:
    control, planner = training.control, RangeLoadPlanner(wanted)
    problem = None
    try:
        dcp.load({}, storage_reader=ShardReader(folder, manifest), planner=planner, process_group=control.handle)
    except CheckpointException as failure:
        problem = explain(failure)
    except Exception as error:
        problem = f"{type(error).__name__}: {error}"
    if problem is not None:
        training.optimizer._roster.engine.incomplete = True
        raise CheckpointError(
            f"{folder} was not read to its end. {problem}. Model and optimizer are incomplete: load a checkpoint before"
            " the next step."
        )
    together(control, planner.check_complete)


def _has_scheduler(lr_scheduler: Any) -> bool:
    return lr_scheduler is not None and lr_scheduler is not IGNORED


def _scheduler_problems(loaded: Loaded, options: Options) -> list[str]:
    saved, own = loaded.values.get("lr_scheduler"), options.lr_scheduler
    if own is IGNORED or (saved is None and own is None):
        return []
    if saved is None:
        return ["the checkpoint has no state of a learning rate scheduler"]
    if own is None:
        return [f"the checkpoint has the state of a {saved['class']}, and there is no learning rate scheduler"]
    if saved["class"] != type(own).__name__:
        return [f"the learning rate scheduler is a {type(own).__name__}, and was a {saved['class']}"]
    return []


def _restore_extra_state(training: Training, saved: Mapping[str, Any], matched: Match) -> None:
    for name, restore in trained.extra_states(training).items():
        if name in matched.extra_states:
            restore(saved[matched.extra_states[name]])


def _restore_settings(training: Training, saved: Sequence[Mapping[str, Any]], matched: Match) -> None:
    """Learning rate, damping, … of each param group, and the user's own keys."""
    for group, source in zip(training.optimizer.param_groups, matched.groups, strict=True):
        if source is not None:
            for key, value in settings_to_restore(saved[source]).items():
                if key == "lr" and isinstance(group["lr"], Tensor):
                    group["lr"].fill_(float(value))
                else:
                    group[key] = float(value) if key == "lr" else value
            normalize(group)


def _complete(training: Training, manifest: Manifest, matched: Match, shards: list[Shard]) -> None:
    """Make the factors that the checkpoint does not have, and hand the shards to the optimizer."""
    optimizer, names = training.optimizer, training.names
    for shard in shards:
        for stack, segments in zip(shard.batches, shard.by_parameter, strict=True):
            for segment in segments:
                parameter = shard.storage.parameters[segment.owner]
                old = matched.states.get(names[parameter.given.position])
                if old is not None and not _has_factors(manifest, old, stack.structure):
                    settings = optimizer.param_groups[parameter.given.group]
                    updates = int(shard.counters[segment.owner, 1])
                    batch.rebuild_factors(stack, segment.start, segment.stop, updates, settings)
        optimizer._roster.install(shard)
    optimizer._roster.engine.skipped = manifest.about["optimizer"]["skipped_steps"]


def _values(folder: Path, manifest: Manifest) -> dict[str, Any]:
    """The other values by name, those of the model's modules ("extra_state"), and of the param groups ("settings")."""
    tensors = []
    for number, entry in enumerate(manifest.about["value_tensors"]):
        key = f"value/{number}"
        empty = torch.empty(0, dtype=values.dtype_of(entry["dtype"]))
        flat = read_tensor(folder, manifest, key) if key in manifest.tensors else empty
        tensors.append(flat.view(entry["shape"]))
    found = {name: values.decode(value, tensors) for name, value in manifest.about["values"].items()}
    found["extra_state"] = values.decode(manifest.about["model"]["extra_state"], tensors)
    groups = manifest.about["optimizer"]["groups"]
    found["settings"] = [values.decode(group["settings"], tensors) for group in groups]
    return found


def _report(loaded: Loaded, manifest: Manifest, seconds: float) -> None:
    gigabytes = sum(file.nbytes for file in manifest.files.values()) / 1e9
    logger.info(
        "Loaded %s (step %s, saved by %s rank(s), %s): %.3f GB in %.1f s",
        loaded.folder, manifest.about["step"], manifest.about["world_size"], manifest.about["layout"], gigabytes,
        seconds,
    )  # fmt: skip
    if loaded.left_out:
        logger.info(
            "%d frozen parameters, as %s, were left out of %s, and stay as they are in the model.",
            len(loaded.left_out), loaded.left_out[0], loaded.folder,
        )  # fmt: skip
    for problem in loaded.not_restored:
        logger.warning("Not restored from %s: %s", loaded.folder, problem)
