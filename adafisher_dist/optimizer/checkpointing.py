"""What a save and a load do to an optimizer, besides reading and building its shards."""

from __future__ import annotations

from collections.abc import Sequence

from adafisher_dist.optimizer.sharded_optimizer import ShardedOptimizer
from adafisher_dist.state.shard import Shard


def gather_state(optimizer: ShardedOptimizer) -> None:
    """Before a save: take over the state that the user has set, and that of a copied optimizer."""
    registry = optimizer._registry
    registry.drop_unused_shards()
    waiting = [tensor for tensor in registry.given_parameters if optimizer.state.get(tensor)]
    registry.init_shards([tensor for tensor in waiting if tensor not in registry.stepper])
    registry.sync_user_state(registry.shards)


def begin_load(optimizer: ShardedOptimizer) -> None:
    """Drop the present state, to use its memory for the new one, and mark it incomplete.

    No step is taken until a load completes it.
    """
    registry = optimizer._registry
    weights = registry.stepper.incomplete & {"weights"}  # of a load before, which reset_state() forgets
    optimizer.reset_state()
    registry.stepper.incomplete |= weights | {"state"}


def install(optimizer: ShardedOptimizer, shards: Sequence[Shard], skipped_steps: int) -> None:
    """Let the optimizer go on with these."""
    for shard in shards:
        optimizer._registry.install(shard)
    optimizer._registry.stepper.skipped = skipped_steps
