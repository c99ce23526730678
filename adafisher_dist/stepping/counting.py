"""Steps and Fisher updates of each parameter, counted on the host."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from adafisher_dist.numerics.block_step import StepContext
from adafisher_dist.settings import StateConfig, StepSettings
from adafisher_dist.state.shard import Shard
from adafisher_dist.stepping.inputs import Inputs


def next_step(shard: Shard, inputs: Inputs) -> int:
    """The coming step t of the parameter with the most steps; −1 where none has a gradient."""
    counts = shard.counters.numpy()[_active(shard, inputs), 0]
    return int(counts.max()) + 1 if counts.size else -1


def count_step(shard: Shard, inputs: Inputs, should_step: Tensor | None) -> list[StepContext | None]:
    """Count the step of the parameters that have a gradient; what each takes it with."""
    groups = shard.group_of_parameter
    active = _active(shard, inputs)
    every = np.array([_interval(*of_group) for of_group in zip(inputs.settings, shard.configs, strict=True)])
    counts = shard.counters.numpy()
    counts[:, 0] += active
    counts[:, 1] += active & ((counts[:, 0] - 1) % every[groups] == 0)
    if active.all() and (counts == counts[0]).all():  # as nearly always
        step, updates = counts[0].tolist()
        of_group = [None if own is None else StepContext(own, step, updates, should_step) for own in inputs.settings]
        return [of_group[group] for group in groups]
    known: dict[tuple[int, int, int], StepContext] = {}
    contexts: list[StepContext | None] = []
    for group, (step, updates), having in zip(groups, counts.tolist(), active.tolist(), strict=True):
        settings = inputs.settings[group]
        if not having or settings is None:
            contexts.append(None)
            continue
        key = group, step, updates
        if key not in known:
            known[key] = StepContext(settings, step, updates, should_step)
        contexts.append(known[key])
    return contexts


def _interval(settings: StepSettings | None, config: StateConfig) -> int:
    """Steps between updates of F: `block_step` makes one in every step but with grafting="none"."""
    return 1 if settings is None or config.grafting == "rms" else settings.fisher_update_freq


def _active(shard: Shard, inputs: Inputs) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """For each parameter, whether it has a gradient."""
    having = np.array([gradient is not None for gradient in inputs.gradients], dtype=bool)
    return having[shard.tensor_of_parameter]
