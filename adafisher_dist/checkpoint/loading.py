"""Loading: check everything, then build the state anew and read it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeVar

import torch

from adafisher_dist.blocks import sharding
from adafisher_dist.blocks.fields import SAVED, saved_offset
from adafisher_dist.blocks.grid import grid_of
from adafisher_dist.checkpoint import dry_run, encoding, local_ranges, orders, random_state, targets
from adafisher_dist.checkpoint.all_ranks import run_on_all_ranks
from adafisher_dist.checkpoint.applying import apply, chosen_tensors
from adafisher_dist.checkpoint.directory import CheckpointDirectory, find
from adafisher_dist.checkpoint.dry_run import Tried
from adafisher_dist.checkpoint.errors import CheckpointError, damaged
from adafisher_dist.checkpoint.manifest import Manifest
from adafisher_dist.checkpoint.matching import Match, check_stored, keep_apart, match, own_settings, refuse
from adafisher_dist.checkpoint.open_checkpoint import PAUSES, OpenCheckpoint, Vanished, found_again, vanished
from adafisher_dist.checkpoint.options import IGNORED, Checked, Loaded, Options
from adafisher_dist.checkpoint.ranges import Range, among_parts
from adafisher_dist.checkpoint.targets import CheckpointTarget
from adafisher_dist.settings import state_config

logger = logging.getLogger("adafisher_dist")


T = TypeVar("T")


def load(where: Callable[[], CheckpointDirectory], target: CheckpointTarget, options: Options) -> Loaded:
    """Load what `where` finds. A collective; the caller has waited for the last save.

    Raises:
        CheckpointError: see `load_checkpoint`.
    """
    hosts, began = target.hosts, time.monotonic()
    same = hosts.gather(repr((options.strict, options.rename, options.verify, options.weights, options.states)))
    if len(set(same)) > 1:
        raise CheckpointError(f"The ranks load with different arguments (strict, rename, verify, …): {same}.")
    with targets.partitioned(target, "The checkpoint was loaded"), ExitStack() as stack:
        opened, matched, needed = _open_together(where, target, options, stack)
        if options.states:
            keep_apart(matched, hosts.gather(own_settings(opened.manifest, target, matched)))
        _verify(opened, target, options.verify)
        opened.keep(needed)
        loaded = Loaded(opened.folder, opened.manifest.about)
        checked = _check_together(opened, target, options, matched, loaded)
        apply(opened, target, options, matched, checked)
    target.access.end_load(options.parts)
    if hosts.rank == 0:
        _report(loaded, target, opened.manifest, time.monotonic() - began)
    return loaded


# ---- before anything changes ----


def _open_together(
    where: Callable[[], CheckpointDirectory], target: CheckpointTarget, options: Options, stack: ExitStack
) -> tuple[OpenCheckpoint, Match, set[str]]:
    """Open the same checkpoint on all ranks, with all files that this one reads; `stack` closes it.

    Where another save replaces it meanwhile, the ranks open what is there then. Nothing that they
    hold changes after that, so it is enough to compare the ids of what they hold.

    Returns:
        The checkpoint, what of it fits, and the files that this rank reads. Those that it only
        checks are held too.

    Raises:
        CheckpointError: on all ranks: there is none, its manifest is damaged, or it is replaced
            again and again.
    """
    found: list[tuple[OpenCheckpoint, Match, set[str]]] = []
    gone: list[Vanished] = []

    def hold() -> str | None:
        try:
            opened = stack.enter_context(OpenCheckpoint(found_again(lambda: find(where)[1], gone)))
            matched = match(opened.manifest, target, options.rename, options.weights, options.states)
            check_stored(opened.manifest, matched, f"{opened.folder}")
            needed = _needed_files(opened, target, options, matched)
            opened.hold([*needed, *_share(opened.manifest, target)])
        except Vanished as error:
            gone[:] = [error]
            return None
        gone.clear()
        found[:] = [(opened, matched, needed)]
        return str(opened.manifest.about["id"])

    for pause in (*PAUSES, None):
        ids = run_on_all_ranks(target.hosts, hold)
        if None not in ids and len(set(ids)) == 1:
            return found[0]
        stack.close()
        if pause is not None:
            time.sleep(pause)
    if None in ids:
        raise gone[0] if gone else vanished(found[0][0].folder)
    raise CheckpointError(
        f"The ranks see different checkpoints; this one sees {found[0][0].folder} (their ids are {ids}). Load from a"
        " file system that all ranks share, after the save has ended."
    )


def _share(manifest: Manifest, target: CheckpointTarget) -> list[str]:
    """The files that this rank checks: each is checked by one."""
    largest_first = sorted(manifest.files, key=lambda name: -manifest.files[name].nbytes)
    return largest_first[target.hosts.rank :: target.hosts.size]


def _needed_files(opened: OpenCheckpoint, target: CheckpointTarget, options: Options, matched: Match) -> set[str]:
    """The files that this rank reads."""
    manifest = opened.manifest
    files = opened.files_of(f"value/{number}" for number in range(len(manifest.about["value_tensors"])))
    if options.random:
        files |= opened.files_of([f"random/{target.hosts.rank}"])
    wanted = [*local_ranges.weights(target, matched.weights, writing=False)]
    if options.states:
        wanted += _ranges_of_state(target, matched)
    for range_ in wanted:
        if range_.key in manifest.tensors:
            files |= manifest.tensors[range_.key].chunks.files_of(*orders.bounds_of(range_, manifest))
    return files


def _ranges_of_state(target: CheckpointTarget, matched: Match) -> Iterator[Range]:
    """The ranges of state tensors that this rank will own, planned without allocating them."""
    groups = [{**group} for group in target.optimizer.param_groups]
    for number, size in matched.block_sizes.items():
        groups[number]["block_size"] = size
    names, tensors = target.names, [tensor for tensor, _ in chosen_tensors(target, matched)]
    for storage in target.access.storages_of(tensors, target.wrapper):
        configs = [state_config(groups[parameter.info.group]) for parameter in storage.parameters]
        grids = [grid_of(p.shape, config, p.whole) for p, config in zip(storage.parameters, configs, strict=True)]
        for span in sharding.assign(grids, storage.stored_spans, storage.replicated).owned[storage.group.rank]:
            number = span.parameter
            parameter, grid = storage.parameters[number], grids[number]
            old = matched.states.get(names[parameter.info.position])
            row_groups = grid.row_group_from(span.start), grid.row_group_from(span.stop), grid.row_groups
            for kind in SAVED if old is not None else ():
                start, stop, total = (saved_offset(kind, grid, row_group) for row_group in row_groups)
                found = Range(f"{kind}/{old}", start, stop - start, total, configs[number].compute_dtype, ())
                yield among_parts(found, parameter, configs[number])


def _verify(opened: OpenCheckpoint, target: CheckpointTarget, checksums: bool) -> None:
    """Check the files that are held: their bytes on one rank, all else on each that holds them.

    Raises:
        CheckpointError: on all ranks: names what is wrong.
    """
    share = _share(opened.manifest, target)

    def look() -> list[str]:
        return opened.problems(share, checksums) + opened.problems(opened.held - set(share), checksums=False)

    problems = sorted({problem for answer in run_on_all_ranks(target.hosts, look) for problem in answer})
    if problems:
        raise damaged(opened.folder, "; ".join(problems), "Nothing was changed.")


def _check_together(
    opened: OpenCheckpoint, target: CheckpointTarget, options: Options, matched: Match, loaded: Loaded
) -> Checked:
    """Try all that will be applied.

    Raises:
        CheckpointError: on all ranks: something does not fit, or is not what a save can have
            written.
    """
    checked, tried = Checked(), Tried()

    def compare() -> None:
        loaded.values = _or_refuse(opened.folder, lambda: _values(opened))
        loaded.not_restored = matched.problems = [*matched.problems, *_scheduler_problems(loaded, options)]
        loaded.left_out = matched.left_out
        if options.strict:
            refuse(matched, f"{opened.folder}", options.remedy)
        _or_refuse(opened.folder, lambda: _check(opened, target, options, matched, loaded, checked))
        _or_refuse(opened.folder, lambda: tried.attempt(checked.parts))

    try:
        run_on_all_ranks(target.hosts, compare)
    except Exception:
        tried.put_back()
        raise
    return checked


def _check(
    opened: OpenCheckpoint,
    target: CheckpointTarget,
    options: Options,
    matched: Match,
    loaded: Loaded,
    checked: Checked,
) -> None:
    own, key = options.lr_scheduler, f"random/{target.hosts.rank}"
    if options.states:
        checked.settings = dry_run.settings(target, loaded.values["settings"], matched)
    if own is not None and own is not IGNORED and not _scheduler_problems(loaded, options):
        checked.scheduler = loaded.values["lr_scheduler"]["state"]
        dry_run.scheduler(own, checked.scheduler, target)
    if options.random and key in opened.manifest.tensors:
        checked.random = random_state.parse(opened.read_tensor(key))
    if options.weights:
        checked.parts += dry_run.extra_states(target, loaded.values["extra_state"], matched)
    checked.parts += options.more(loaded.values)


def _or_refuse(folder: Path, work: Callable[[], T]) -> T:
    """Do `work`, which tries what the checkpoint holds, and return its result.

    Raises:
        CheckpointError: `work` failed: no save wrote such values, or they do not fit.
    """
    try:
        return work()
    except Exception as error:
        told = f"{error}" if isinstance(error, CheckpointError) else f"{type(error).__name__}: {error}"
        raise CheckpointError(
            f"{folder} cannot be loaded: {told.removesuffix('.')}. Nothing was changed. Load it into a training like"
            " the one that saved it, or load another checkpoint."
        ) from error


def _scheduler_problems(loaded: Loaded, options: Options) -> list[str]:
    saved, own = loaded.values.get("lr_scheduler"), options.lr_scheduler
    if own is IGNORED or (saved is None and own is None):
        return []
    if saved is None:
        return ["the checkpoint has no state of a learning rate scheduler: leave out lr_scheduler"]
    if own is None:
        kind = saved["class"]
        return [f"the checkpoint has the state of a {kind}, and there is no learning rate scheduler: give lr_scheduler"]
    if saved["class"] != type(own).__name__:
        return [f"the learning rate scheduler is a {type(own).__name__}, and was a {saved['class']}"]
    return []


def _values(opened: OpenCheckpoint) -> dict[str, Any]:
    """The other values by name; the modules' as "extra_state", the param groups' as "settings"."""
    tensors, manifest = [], opened.manifest
    for number, entry in enumerate(manifest.about["value_tensors"]):
        key = f"value/{number}"
        empty = torch.empty(0, dtype=encoding.dtype_of(entry["dtype"]), device="cpu")
        flat = opened.read_tensor(key) if key in manifest.tensors else empty
        tensors.append(flat.view(entry["shape"]))
    found = {name: encoding.decode(value, tensors) for name, value in manifest.about["values"].items()}
    found["extra_state"] = encoding.decode(manifest.about["model"]["extra_state"], tensors)
    groups = manifest.about["optimizer"]["groups"]
    found["settings"] = [encoding.decode(group["settings"], tensors) for group in groups]
    scheduler = found.get("lr_scheduler")
    if scheduler is not None and not ({"class", "state"} <= set(scheduler) and isinstance(scheduler["class"], str)):
        raise ValueError("lr_scheduler has no class and state")
    return found


def _report(loaded: Loaded, target: CheckpointTarget, manifest: Manifest, seconds: float) -> None:
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
    trained = [name for name in loaded.left_out if target.parameters[name].requires_grad]
    if trained:
        logger.warning(
            "%d parameter(s), as %s, are trained here, and %s has no values of them: they were frozen, and left out."
            " They are as they were in the model; load the base that they came from, if you have not.",
            len(trained), trained[0], loaded.folder,
        )  # fmt: skip
    for problem in loaded.not_restored:
        logger.warning("Not restored from %s: %s", loaded.folder, problem)
