"""Saving: gather what this rank writes, write it now or in the background, publish.

A load begins as a save does: everything is named, when the last save has ended (`target_of`).
"""

from __future__ import annotations

import atexit
import logging
import threading
import time
import uuid
import warnings
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from functools import partial
from numbers import Integral
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint.state_dict_saver as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.nn.parallel import DistributedDataParallel

from adafisher_dist.checkpoint import encoding, local_ranges, manifest, random_state, ranges, targets
from adafisher_dist.checkpoint.all_ranks import attempt, by_cause, run_on_all_ranks, told
from adafisher_dist.checkpoint.directory import CheckpointDirectory, PublishedError
from adafisher_dist.checkpoint.errors import CheckpointError
from adafisher_dist.checkpoint.latest import read_latest
from adafisher_dist.checkpoint.manifest import dtype_name
from adafisher_dist.checkpoint.ranges import Range, RangePiece
from adafisher_dist.checkpoint.targets import CheckpointTarget, collect_target
from adafisher_dist.checkpoint.writer import RangeSavePlanner, ShardWriter
from adafisher_dist.comm.host_groups import HostGroup, beat
from adafisher_dist.optimizer.adafisher import AdaFisher
from adafisher_dist.optimizer.checkpointing import CheckpointAccess
from adafisher_dist.version import __version__

# As manifests tell times. What was saved later may be of this job.
_BEGAN = datetime.now(timezone.utc).isoformat(timespec="seconds")

logger = logging.getLogger("adafisher_dist")

# One process alone is nothing to warn of.
warnings.filterwarnings("ignore", message="torch.distributed is (disabled|unavailable).*assuming the intent is to")


class Saving:
    """A save that is done, or goes on in the background."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    def start(self, write: Callable[[], None]) -> None:
        """Write in the background."""

        def run() -> None:
            try:
                write()
            except Exception as error:
                self._error = error

        thread = threading.Thread(target=run, name="adafisher-checkpoint", daemon=False)
        try:
            thread.start()
        except RuntimeError as error:  # no more threads; the other ranks have begun to write
            logger.warning("This save cannot go on in the background, and keeps training waiting: %s", error)
            run()
        else:
            self._thread = thread

    def done(self) -> bool:
        """Whether nothing is being written any more."""
        return self._thread is None or not self._thread.is_alive()

    def wait(self) -> Path:
        """Wait until it is published; its folder.

        Raises:
            CheckpointError: it could not be written. Raised once.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if _pending[:] == [self]:
            _pending.clear()
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        return self.path


_pending: list[Saving] = []  # at most one


def finish_pending() -> None:
    """Wait for the save that goes on in the background.

    Raises:
        CheckpointError: it failed.
    """
    for saving in list(_pending):
        saving.wait()


@atexit.register
def _report_at_exit() -> None:
    try:
        finish_pending()
    except Exception as error:
        logger.error("The last asynchronous checkpoint was not written: %s", error)


def target_for(model: nn.Module, optimizer: AdaFisher) -> CheckpointTarget:
    """`target_of` a model that may be wrapped, but not by DeepSpeed."""
    if hasattr(model, "zero_optimization_stage"):
        raise ValueError("For a DeepSpeed engine use adafisher_dist.ds.save_checkpoint and load_checkpoint.")
    while isinstance(model, DistributedDataParallel) or hasattr(model, "_orig_mod"):  # in either order
        inner: Any = model.module if isinstance(model, DistributedDataParallel) else model._orig_mod
        model = inner
    return target_of(model, optimizer, None)


def target_of(module: nn.Module, optimizer: AdaFisher, wrapper: Any) -> CheckpointTarget:
    """What is saved or loaded, when the last save has ended."""
    if not isinstance(optimizer, AdaFisher):
        raise TypeError(
            f"The optimizer should be an AdaFisher, got {type(optimizer).__name__}. With DeepSpeed give the engine to"
            " adafisher_dist.ds.save_checkpoint and load_checkpoint."
        )
    if not isinstance(module, nn.Module):
        raise TypeError(f"The model should be a torch.nn.Module, got {type(module).__name__}.")
    access = CheckpointAccess(optimizer)
    if wrapper is None:
        access.sync_param_groups()
    # A save that goes on in the background uses the same group of hosts, so nothing else may until
    # it has ended.
    _, problem = attempt(finish_pending)
    hosts = access.hosts("a save or load", CheckpointError)
    run_on_all_ranks(hosts, lambda: _raise(problem))  # it may be known to some ranks already, by wait()
    return collect_target(module, optimizer, access, wrapper, hosts)


def _raise(problem: Exception | None) -> None:
    if problem is not None:
        raise problem


def save(
    place: CheckpointDirectory, target: CheckpointTarget, facts: Mapping[str, Any],
    extra: Callable[[], Mapping[str, Any]], keep_last: int | None = None, asynchronous: bool = False,
    latest: bool = True,
) -> Saving:  # fmt: skip
    """Save to a place. A collective; the caller has waited for the last save.

    Args:
        place: where.
        target: what.
        facts: what else the manifest says of it, as JSON: its step, say.
        extra: gives by name other values, of which rank 0's are saved.
        keep_last: how many checkpoints to keep in the place's root; None for all.
        asynchronous: write in the background, from a copy in CPU memory.
        latest: point `latest` at it.

    Raises:
        CheckpointError: see `save_checkpoint`, as for the other errors.
    """
    hosts = target.hosts
    began = time.monotonic()
    about: dict[str, Any] = {}
    found: list[Range] = []

    def collect() -> tuple[str, int | None, dict[str, tuple[int, ...]], str]:
        kept = _checked_number(keep_last)
        _refuse_anothers(place, hosts)
        target.access.check_complete()
        targets.check_values(target)
        target.access.gather_state()
        tensors: list[Tensor] = []
        about.update(_about(target, facts, extra(), tensors))
        found.extend(_ranges(target, tensors))
        for range_ in found:
            dtype_name(range_.dtype)  # before a save that goes on in the background has begun
        if asynchronous:
            found[:] = [_copied(range_) for range_ in found]
        return about["id"], kept, targets.steps_of_parts(target), __version__

    saving = Saving(place.folder)
    with targets.partitioned(target, f"{place.folder} was {'copied' if asynchronous else 'saved'}"):
        ids, kept, steps, versions = zip(*run_on_all_ranks(hosts, collect), strict=True)
        if len(set(versions)) > 1:
            raise CheckpointError(
                f"The ranks run different versions of adafisher_dist, by rank {', '.join(versions)}: install the same"
                " everywhere. Nothing was saved."
            )
        if len(set(kept)) > 1:
            raise ValueError(f"The ranks give keep_last different values: {list(kept)}.")
        _compare_steps(steps)
        about["id"] = ids[0]
        if target.first_holders is not None:
            about.update(_merged(hosts.gather({part: about[part] for part in ("model", "optimizer")})))
        if not asynchronous:
            _write(place, about, found, hosts, latest, keep_last, began, in_background=False)
    if asynchronous:
        _pending.append(saving)
        saving.start(lambda: _write(place, about, found, hosts, latest, keep_last, began, in_background=True))
    return saving


def _refuse_anothers(place: CheckpointDirectory, hosts: HostGroup) -> None:
    """Refuse to save where other ranks of this job do, as stages of a pipeline might.

    They would replace each other's checkpoints, or clear them away half written, and there is one
    `latest`.

    Raises:
        CheckpointError: names the ranks.
    """
    if hosts.rank > 0 or hosts.handle is None or hosts.size == dist.get_world_size():
        return
    newest, _ = attempt(lambda: read_latest(place.root))
    for tag in dict.fromkeys((place.tag, newest or place.tag)):
        found, _ = attempt(partial(manifest.read, place.root / tag))
        about = {} if found is None else found.about
        theirs = about.get("ranks", hosts.members)
        nested = set(theirs) <= set(hosts.members) or set(theirs) >= set(hosts.members)  # one after the other, then
        if not nested and about["created"] >= _BEGAN:
            raise CheckpointError(
                f"{place.root / tag} was saved by the ranks {theirs} of this job, and here the ranks {hosts.members}"
                f" save. Each group of ranks that save without the others needs a folder in the place of {place.root}."
                " Nothing was saved."
            )


def _compare_steps(by_rank: Sequence[Mapping[str, tuple[int, ...]]]) -> None:
    """Refuse to save parts of a parameter that were not stepped alike: they have one step count.

    Raises:
        CheckpointError: on all ranks alike: names one.
    """
    for name in sorted({name for steps in by_rank for name in steps}):
        found = [steps.get(name, (0, 0)) for steps in by_rank]
        if len(set(found)) > 1:
            raise CheckpointError(
                f"The tensor-parallel parts of {name} were not stepped equally often: by rank its (steps, Fisher"
                f" updates) are {found}. Give all parts of a parameter gradients in the same steps. Nothing was saved."
            )


def _merged(described: list[dict[str, Any]]) -> dict[str, Any]:
    """What the ranks describe, where they hold different experts or stages, as one."""
    whole = described[0]
    for rank, other in enumerate(described[1:], 1):
        for name, state in other["model"]["extra_state"].items():
            if name not in whole["model"]["extra_state"] and encoding.has_tensors(state):
                raise CheckpointError(
                    f"The extra state of {name}, which rank 0 does not hold, has tensors (on rank {rank}), and only"
                    " rank 0's can be saved. Have its get_extra_state return numbers, strings or bytes. Nothing was"
                    " saved."
                )
        for kind, entries in whole["model"].items():
            entries |= {name: entry for name, entry in other["model"][kind].items() if name not in entries}
        state = whole["optimizer"]["state"]
        state |= {name: entry for name, entry in other["optimizer"]["state"].items() if name not in state}
        for group, more in zip(whole["optimizer"]["groups"], other["optimizer"]["groups"], strict=True):
            group["names"] += [name for name in more["names"] if name not in group["names"]]
    return whole


def scheduler_state(lr_scheduler: Any) -> dict[str, Any] | None:
    """What is saved of a scheduler."""
    if lr_scheduler is None:
        return None
    return {"class": type(lr_scheduler).__name__, "state": lr_scheduler.state_dict()}


def _checked_number(keep_last: Any) -> int | None:
    if keep_last is None:
        return None
    if isinstance(keep_last, bool) or not isinstance(keep_last, Integral):
        raise ValueError(f"keep_last should be a whole number from 1 on, or None for all, got {keep_last!r}.")
    if keep_last < 1:
        raise ValueError(f"keep_last should be at least 1, got {keep_last}.")
    return int(keep_last)


def _about(
    target: CheckpointTarget, facts: Mapping[str, Any], extra: Mapping[str, Any], tensors: list[Tensor]
) -> dict[str, Any]:
    """What the manifest says besides files and tensors; rank 0's is written."""
    encoded = {name: encoding.encode(value, name, tensors) for name, value in extra.items()}
    described = targets.describe(target, tensors)
    state = described["optimizer"]["state"]
    return {
        "id": uuid.uuid4().hex,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": {"adafisher_dist": __version__, "torch": torch.__version__},
        "world_size": target.hosts.size,
        "ranks": target.hosts.members,
        "layout": targets.layout_of(target),
        "step": max((entry["step"] for entry in state.values()), default=0),
        **facts,
        **described,
        "values": encoded,
        "value_tensors": [{"shape": list(t.shape), "dtype": str(t.dtype)} for t in tensors],
    }


def _ranges(target: CheckpointTarget, tensors: Sequence[Tensor]) -> list[Range]:
    """Everything that this rank writes."""
    names = {name: name for name in [*target.parameters, *target.buffers]}
    stored = {name: name for name in names if name not in target.left_out}
    rank = target.hosts.rank
    found = list(local_ranges.weights(target, stored, writing=True))
    found += local_ranges.state(target, target.access.shards, names, writing=True)
    small = {f"random/{rank}": random_state.capture([*target.parameters.values(), *target.buffers.values()])}
    if rank == 0:
        small |= {f"value/{number}": tensor.reshape(-1) for number, tensor in enumerate(tensors)}
    for key, tensor in small.items():
        found += ranges.of_tensor(key, tensor, 0, tensor.numel(), tensor.numel())
    return found


def _copied(range_: Range) -> Range:
    """The same with a copy of the elements in CPU memory."""
    beat()
    packed = range_.pack()
    shares = range_.in_place() is not None and packed.device.type == "cpu"
    copy = packed.clone() if shares else packed.cpu()
    return Range(range_.key, range_.start, range_.numel, range_.total, range_.dtype, [RangePiece(copy, 0, (1,))])


def _write(
    place: CheckpointDirectory, about: Mapping[str, Any], found: Sequence[Range], hosts: HostGroup, latest: bool,
    keep_last: int | None, began: float, in_background: bool,
) -> None:  # fmt: skip
    writer = ShardWriter(place, about, hosts, latest, in_background)
    problem: str | None = None
    published: bool | None = False  # None: this rank cannot know
    try:
        dcp.save({}, storage_writer=writer, planner=RangeSavePlanner(found), process_group=hosts.handle)
    except CheckpointException as failure:  # which all ranks are told of
        problem = by_cause({rank: told(error) for rank, (error, _) in failure.failures.items()})
        published = any(isinstance(error, PublishedError) for error, _ in failure.failures.values())
    except Exception as error:  # another rank is gone, say
        problem = hosts.explain(error)
        published = writer.published if hosts.rank == 0 or not writer.handed_over else None
    if problem is not None:
        if hosts.rank == 0 and not published:
            place.discard()
        raise CheckpointError(_what_became(place.folder, about["id"], published, problem.rstrip(".")))
    try:
        with hosts.at_work():
            if hosts.rank == 0:
                place.clear_away(keep_last)
    except CheckpointError as error:  # another rank is gone, and the checkpoint is there
        raise CheckpointError(_what_became(place.folder, about["id"], True, str(error).rstrip("."))) from error
    if hosts.rank == 0:
        seconds = time.monotonic() - began
        rate = writer.nbytes / 1e9 / max(seconds, 1e-9)
        logger.info("Saved %s: %.3f GB in %.1f s, %.2f GB/s", place.folder, writer.nbytes / 1e9, seconds, rate)


def _what_became(folder: Path, of: str, published: bool | None, problem: str) -> str:
    """What a failed save has left, as far as this rank knows."""
    if published:
        return (
            f"The checkpoint {folder} was published and is whole, but its save did not end as it should. {problem}."
            " Load it, or save again."
        )
    if published is None:
        return (
            f"The checkpoint {folder} was not written, as far as this rank can tell. {problem}. It had handed over its"
            " part, so that the checkpoint may have been published nevertheless, and is whole then: look with `python"
            f" -m adafisher_dist inspect {folder}`, which tells its id; that of this save is {of}."
        )
    return (
        f"The checkpoint {folder} was not written. {problem}. Nothing was published; the checkpoints before it are"
        " whole."
    )
