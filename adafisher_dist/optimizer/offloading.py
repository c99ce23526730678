"""State on the host while nobody trains: what `optimizer.state` shows of it, and the way back."""

from __future__ import annotations

from torch import Tensor

from adafisher_dist.optimizer.registry import ParameterRegistry
from adafisher_dist.state import offload
from adafisher_dist.state.shard import Shard


def to_host(registry: ParameterRegistry, pin_memory: bool) -> None:
    """Move the state of all shards to the host, where `optimizer.state` then shows it. Local."""
    shards = [shard for shard in registry.shards if shard.offloaded is None]
    registry.sync_user_state(shards)
    for shard in shards:
        _show(registry, shard, offload.to_host(shard, registry.stepper.buffers_of(shard), pin_memory))


def to_device(registry: ParameterRegistry) -> None:
    """The inverse of `to_host`."""
    for shard in registry.shards:
        if shard.offloaded is not None:
            offload.to_device(shard)
            _show(registry, shard, shard.views)


def _show(registry: ParameterRegistry, shard: Shard, views: list[dict[str, Tensor]]) -> None:
    for index, tensor in enumerate(shard.storage.tensors):
        if index not in shard.removed:
            registry.optimizer.state[tensor] = dict(views[index])
