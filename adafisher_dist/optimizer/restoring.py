"""Loading a state dict: check it, and put it into new shards, before the optimizer is touched."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from adafisher_dist import layouts
from adafisher_dist.comm.deferred_errors import DeferredErrors
from adafisher_dist.optimizer import state_dicts
from adafisher_dist.optimizer.registry import ParameterRegistry
from adafisher_dist.settings import normalize
from adafisher_dist.state.shard import Shard
from adafisher_dist.stepping.consistency import raise_if_any_failed


def shards_with(registry: ParameterRegistry, saved: Mapping[str, Any]) -> list[Shard]:
    """Shards that hold a saved state; the optimizer itself is not touched."""
    state_dicts.check_format(saved)
    registry.sync_param_groups()
    own = [tensor for group in registry.optimizer.param_groups for tensor in group["params"]]
    numbers = [number for group in saved["param_groups"] for number in group["params"]]
    lengths, saved_lengths = (
        [len(group["params"]) for group in groups]
        for groups in (registry.optimizer.param_groups, saved["param_groups"])
    )
    if lengths != saved_lengths and state_dicts.is_whole(saved):
        return []  # torch's own check reports it
    states = {id(t): saved["state"][n] for t, n in zip(own, numbers, strict=False) if n in saved["state"]}
    if not states:
        return []
    chosen = [tensor for tensor in own if id(tensor) in states]
    shards: list[Shard] = []

    def check() -> None:
        shards.extend(registry.build_shards(chosen, completed(registry, saved["param_groups"])))
        state_dicts.check_part(saved, shards)
        for shard in shards:
            for index, tensor in enumerate(shard.storage.tensors):
                if states[id(tensor)]:
                    state_dicts.check(shard, index, states[id(tensor)], own=not state_dicts.is_whole(saved))
                elif layouts.is_called_by_torch_checkpoint():
                    raise ValueError(
                        f"torch.distributed.checkpoint brought no state for {shard.storage.name_of(index)}: it takes"
                        " the names in a flat state dict from what the optimizer has, which was nothing. Call"
                        " get_optimizer_state_dict(model, optimizer) before set_optimizer_state_dict."
                    )

    errors = DeferredErrors()
    errors.attempt(check)
    if any(layouts.is_dtensor(value) for entry in states.values() for value in entry.values()):
        raise_if_any_failed(registry.ranks(), errors, "before it took over a saved state")
    elif errors.error is not None:
        raise errors.error
    for shard in shards:
        for index, tensor in enumerate(shard.storage.tensors):
            state_dicts.restore(shard, index, states[id(tensor)], own=not state_dicts.is_whole(saved))
    return shards


def completed(registry: ParameterRegistry, saved: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Saved param groups, checked; settings that an older version lacked are the optimizer's."""
    if len(saved) != len(registry.optimizer.param_groups):
        return saved  # torch's own check reports it
    result = [{**now, **then} for now, then in zip(registry.optimizer.param_groups, saved, strict=True)]
    for group in result:
        normalize(group)
    return result
