"""DDP's join() is refused at the first step on all ranks; both remedies that it names train."""

from __future__ import annotations

from collections.abc import Sequence
from time import monotonic
from typing import Any

import numpy as np
import pytest
import torch
from models import batch, distance, model, weights
from ranks import run_ranks
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

from adafisher_dist import AdaFisher, UnsupportedLayoutError

pytestmark = pytest.mark.dist

PARAMS = {"lr": 1e-2, "block_size": 8, "rows_per_block": 4, "damping": 0.2}


class Sub(DistributedDataParallel):
    """As libraries derive theirs."""


def wrapped(kind: type[DistributedDataParallel] = DistributedDataParallel) -> tuple[Any, AdaFisher]:
    module = kind(model())
    return module, AdaFisher(module.parameters(), **PARAMS)


def steps(module: Any, optimizer: AdaFisher, batches: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> int:
    """How many steps were taken."""
    for x, y in batches:
        optimizer.zero_grad()
        nn.functional.mse_loss(module(x), y).backward()
        optimizer.step()
    return len(batches)


def in_join(rank: int, world: int, fewest: int, before: int) -> float:
    """Rank 0 has `fewest` batches in a join() that is entered after some steps; seconds."""
    module, optimizer = wrapped(Sub if before else DistributedDataParallel)
    batches = [batch(step, rank, world) for step in range(fewest + rank)]
    steps(module, optimizer, [batch(step, rank, world) for step in range(before)])
    held = weights(module)
    start = monotonic()
    if batches:
        with pytest.raises(UnsupportedLayoutError, match=r"join\(throw_on_early_termination=True\)"), module.join():
            steps(module, optimizer, batches)
        assert all(np.array_equal(held[name], after) for name, after in weights(module).items())
    return monotonic() - start


@pytest.mark.parametrize("before", [0, 2])
def test_join_is_refused_at_once_on_all_ranks(before: int) -> None:
    for seconds in run_ranks(in_join, 2, 3, before, timeout=100, group_timeout=90):
        assert seconds < 60  # and not after the timeout of the process group


def without_any(rank: int, world: int) -> None:
    """Rank 0 has no batch at all, and waits in join() for those that have."""
    module, optimizer = wrapped()
    with module.join():
        if rank > 0:
            with pytest.raises(UnsupportedLayoutError, match="equally many batches"):
                steps(module, optimizer, [batch(0, rank, world)])


def test_a_rank_without_any_batch_does_not_hold_up_the_others() -> None:
    run_ranks(without_any, 2, timeout=100, group_timeout=90)


def stopped_early(rank: int, world: int) -> tuple[int, dict[str, np.ndarray]]:
    module, optimizer = wrapped()
    done = 0
    with pytest.raises(RuntimeError, match="exhausted"), module.join(throw_on_early_termination=True):
        for step in range(3 + rank):
            done += steps(module, optimizer, [batch(step, rank, world)])
    return done, weights(module.module)


def alone(count: int) -> dict[str, np.ndarray]:
    module = model()
    steps(module, AdaFisher(module.parameters(), **PARAMS), [batch(step, 0, 1) for step in range(count)])
    return weights(module)


def test_the_remedy_that_stops_all_ranks() -> None:
    for done, trained in run_ranks(stopped_early, 2):
        assert done == 3 and distance(trained, alone(3)) < 1e-4


def sampled(rank: int, world: int) -> dict[str, np.ndarray]:
    """35 samples over 2 ranks, in batches of 6: the sampler makes them 36."""
    x, y = batch(0, 0, 1, size=35)
    data = torch.utils.data.TensorDataset(x, y)
    loader = DataLoader(data, batch_size=6, sampler=DistributedSampler(data, world, rank, shuffle=False))
    module, optimizer = wrapped()
    assert steps(module, optimizer, list(loader)) == 3
    return weights(module.module)


def test_the_remedy_of_equally_many_batches() -> None:
    x, y = batch(0, 0, 1, size=35)
    x, y = (torch.cat([values, values[:1]]) for values in (x, y))
    module = model()
    batches = [(x[12 * i : 12 * (i + 1)], y[12 * i : 12 * (i + 1)]) for i in range(3)]
    steps(module, AdaFisher(module.parameters(), **PARAMS), batches)
    for trained in run_ranks(sampled, 2):
        assert distance(trained, weights(module)) < 1e-4


def others(rank: int, world: int) -> None:
    """A join() of another model is none of our business, nor one that is switched off."""
    module, optimizer = wrapped()
    other = DistributedDataParallel(model())
    with other.join(), module.join(enable=False):
        steps(other, optimizer_of_other := torch.optim.SGD(other.parameters(), lr=0.1), [batch(0, rank, world)])  # type: ignore[arg-type]
        steps(module, optimizer, [batch(0, rank, world)])
    assert optimizer_of_other is not None


def test_other_join_contexts_are_left_alone() -> None:
    run_ranks(others, 2)
