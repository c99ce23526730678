"""What a save and a load begin with: everything is named, when the last save has ended."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from adafisher_dist.checkpoint.all_ranks import attempt, run_on_all_ranks
from adafisher_dist.checkpoint.manifest import CheckpointError
from adafisher_dist.checkpoint.saving import finish_pending
from adafisher_dist.checkpoint.targets import CheckpointTarget, collect_target
from adafisher_dist.optimizer.adafisher import AdaFisher
from adafisher_dist.optimizer.checkpointing import CheckpointAccess


def target_for(model: nn.Module, optimizer: AdaFisher) -> CheckpointTarget:
    """The same of a model that may be wrapped, but not by DeepSpeed."""
    if hasattr(model, "zero_optimization_stage"):
        raise ValueError("For a DeepSpeed engine use adafisher_dist.ds.save_checkpoint and load_checkpoint.")
    while isinstance(model, DistributedDataParallel) or hasattr(model, "_orig_mod"):  # in either order
        inner: Any = model.module if isinstance(model, DistributedDataParallel) else model._orig_mod
        model = inner
    return target_of(model, optimizer, None)


def target_of(module: nn.Module, optimizer: AdaFisher, wrapper: Any) -> CheckpointTarget:
    """What is saved or loaded, when the last save has ended."""
    if not isinstance(optimizer, AdaFisher):
        raise TypeError(f"The optimizer is a {type(optimizer).__name__}; these checkpoints are AdaFisher's.")
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
