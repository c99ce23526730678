"""Sharded checkpoints that load at any world size, ZeRO stage and precision.

Each rank writes its own Fisher blocks, momentum and weights, as ranges of named global tensors,
through torch.distributed.checkpoint; a load reads whatever ranges it needs. See `directory` for how
a checkpoint is published, `manifest` for the format, `ranges` for what makes it independent of
ranks.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from adafisher_dist.checkpoint.directory import CheckpointDirectory, checkpoint_directory, latest_tag
from adafisher_dist.checkpoint.errors import CheckpointError
from adafisher_dist.checkpoint.loading import load
from adafisher_dist.checkpoint.options import IGNORED, Loaded, Options
from adafisher_dist.checkpoint.saving import Saving, save, scheduler_state, target_for, target_of
from adafisher_dist.checkpoint.stateful import OptimizerState
from adafisher_dist.checkpoint.targets import without_frozen
from adafisher_dist.optimizer.adafisher import AdaFisher

__all__ = [
    "IGNORED",
    "CheckpointDirectory",
    "CheckpointError",
    "Loaded",
    "OptimizerState",
    "Options",
    "Restored",
    "Saving",
    "checkpoint_directory",
    "latest_tag",
    "load",
    "load_checkpoint",
    "save",
    "save_checkpoint",
    "scheduler_state",
    "target_of",
    "without_frozen",
]

logger = logging.getLogger("adafisher_dist")


@dataclass(frozen=True, slots=True)
class Restored:
    """What `load_checkpoint` did.

    Attributes:
        path: the checkpoint's folder.
        extra: what was saved as `extra`, or as DeepSpeed's client state.
        not_restored: with strict=False, what was left as it is, and why.
    """

    path: Path
    extra: Any
    not_restored: list[str] = field(default_factory=list)


def save_checkpoint(
    path: str | os.PathLike[str], model: nn.Module, optimizer: AdaFisher, *, extra: Any = None,
    lr_scheduler: Any = None, keep_last: int | None = None, asynchronous: bool = False,
    exclude_frozen_parameters: bool = False,
) -> Saving:  # fmt: skip
    """Save model and optimizer, each rank its own part. A collective: all ranks call it.

    The checkpoint is written beside `path` and gets its name when it is complete, so that a failure
    or a kill leaves the last one whole; then the file `latest` beside it names it. An existing
    checkpoint of that name is replaced.

    Args:
        path: its folder, as runs/a/step100, on a file system that all ranks share.
        model: plain, in DistributedDataParallel, or sharded by fully_shard. For DeepSpeed see
            `ds.save_checkpoint`.
        optimizer: AdaFisher, with parameters of that model.
        extra: whatever else belongs to the run (a GradScaler's state_dict(), the epoch, …), of rank
            0: None, numbers, strings, lists, tuples, dicts, tensors, numpy arrays and the like.
        lr_scheduler: a learning rate scheduler, whose state is saved too.
        keep_last: keep so many of the checkpoints in the parent folder, and delete the older ones;
            a whole number from 1 on, the same on all ranks.
        asynchronous: return when the state is copied to CPU memory, and write in the background.
            The next save or load waits for it, and raises what went wrong; so does `wait()` of the
            result.
        exclude_frozen_parameters: leave out the values of parameters that need no gradient (the
            base of a LoRA, say). A load leaves them as they are in the model, and checks their
            names and shapes.

    Returns:
        A handle: `path`, `done()` and `wait()`. A save that is not asynchronous is done.

    Raises:
        CheckpointError: on all ranks: it could not be written (no room, no permission, …). The
            message says whether it was published; a rank that lost contact with rank 0 at the end
            cannot know, and says how to look. Or ranks, which are named, did not come or got no
            further for the timeout of the process group.
        TypeError: `extra` holds what cannot be saved without pickling; on the other ranks, a
            CheckpointError says so.
        ValueError: an argument is out of bounds; the optimizer does not belong to the model.
        RuntimeError: the optimizer's state is incomplete after a failed step.
    """
    path = Path(path).absolute()
    target = target_for(model, optimizer)
    if exclude_frozen_parameters:
        target = without_frozen(target)

    def values() -> dict[str, Any]:
        return {"extra": extra, "lr_scheduler": scheduler_state(lr_scheduler)}

    return save(CheckpointDirectory(path.parent, path.name), target, {}, values, keep_last, asynchronous)


def load_checkpoint(
    path: str | os.PathLike[str], model: nn.Module, optimizer: AdaFisher, *, lr_scheduler: Any = None,
    strict: bool = True, rename: Mapping[str, str] | None = None, verify: bool = True,
) -> Restored:  # fmt: skip
    """Restore what a `save_checkpoint` saved (ours, ds's or an engine's), at any ranks and layout.

    With the same number of ranks and layout, training goes on bit for bit; with others, to float
    rounding. The settings of the param groups (lr, damping, …) are restored, as by torch.optim;
    those that shape the state (block_size, rows_per_block, block_grid, max_blocks, fisher_dtype,
    exponent, grafting, inverse_update_freq, packed), memory_budget_gb and stochastic_rounding stay
    as they are, but for block_size="auto", which takes the checkpoint's, and the state is converted
    to this optimizer's fisher_dtype and packing. Each rank that took part in the save gets its own
    random number generators back; ranks beyond those keep theirs. A collective. Nothing is
    unpickled.

    Args:
        path: the checkpoint's folder, or one of checkpoints: the one that `latest` names.
        model: built as for training, with the same names and shapes; any precision.
        optimizer: AdaFisher, with parameters of that model.
        lr_scheduler: the learning rate scheduler, of the class that was saved.
        strict: refuse a checkpoint that does not hold all of the model and the optimizer, or holds
            more.
        rename: names in the checkpoint → names in the model; one that ends with "." renames all
            that begin with it.
        verify: check every file's checksum first. Without, sizes and headers alone are checked.

    Returns:
        The checkpoint's folder, what was saved as `extra`, and what was not restored.

    Raises:
        CheckpointError: on all ranks, before anything changes: there is no such checkpoint; a file
            of it is missing, truncated or damaged, and named; it does not fit, or holds a value
            that cannot be restored; other saves replaced or deleted it again and again; or ranks,
            which are named, did not come or got no further for the timeout of the process group.
            Or, while reading, an I/O error: the optimizer then refuses to step until a load
            succeeds.
    """
    target = target_for(model, optimizer)
    found = load(
        lambda: checkpoint_directory(Path(path)), target, Options(strict, rename, verify, lr_scheduler=lr_scheduler)
    )
    return Restored(found.folder, found.values.get("extra", found.values.get("client_state")), found.not_restored)
