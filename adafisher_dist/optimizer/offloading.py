"""State on the host while nobody trains, and the way back."""

from __future__ import annotations

from adafisher_dist.optimizer.registry import ParameterRegistry
from adafisher_dist.state import offload


def to_host(registry: ParameterRegistry, pin_memory: bool) -> None:
    """Move the state of all shards to the host, where `optimizer.state` then shows it. Local."""
    shards = [shard for shard in registry.shards if shard.offloaded is None]
    registry.sync_user_state(shards)
    for shard in shards:
        offload.to_host(shard, registry.stepper.buffers_of(shard), pin_memory)


def to_device(registry: ParameterRegistry) -> None:
    """The inverse of `to_host`."""
    for shard in registry.shards:
        if shard.offloaded is not None:
            offload.to_device(shard)
