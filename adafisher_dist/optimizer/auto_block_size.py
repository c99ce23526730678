"""block_size="auto": chosen at the first step, when layout and ranks are known."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import reduce
from typing import Any

import torch

from adafisher_dist import layouts
from adafisher_dist.blocks import estimate
from adafisher_dist.comm.collectives import Group
from adafisher_dist.layouts.storage import GivenParameters, Storage, whole_shape
from adafisher_dist.settings import normalized, state_config

logger = logging.getLogger("adafisher_dist")


def choose_block_size(
    storages: Sequence[Storage], given_parameters: GivenParameters, groups: Sequence[dict[str, Any]], ranks: Group
) -> None:
    """Replace "auto" in the param groups by the largest size in the budget, alike on all ranks.

    Args:
        storages: of the parameters that are about to have a state.
        given_parameters: all that the optimizer was given.
        groups: all its param groups.
        ranks: that step them together.

    Raises:
        ValueError: ranks hold different parameters; or not even the smallest blocks fit.
    """
    checked = [normalized(group) for group in groups]  # a user may have written anything into them
    if all(group["block_size"] != "auto" for group in checked):
        return
    has_experts = any(layouts.group_of_expert(parameter) is not None for parameter in given_parameters)
    if has_experts or any(storage.group.total_size < ranks.total_size for storage in storages):
        raise ValueError(
            'block_size="auto" is not for ranks that hold different parameters (experts, stages, tensor-parallel'
            " parts): give a number, and see what it takes by memory_usage()."
        )
    shapes: list[list[tuple[int, ...]]] = [[] for _ in groups]
    for parameter, info in given_parameters.items():
        shapes[info.group].append(whole_shape(parameter))
    by_group = [(of_group, state_config(group)) for of_group, group in zip(shapes, checked, strict=True)]
    storage, budget = storages[0], checked[0]["memory_budget_gb"]
    dtype = reduce(torch.promote_types, (one.values(i).dtype for one in storages for i in range(len(one.tensors))))
    layout = estimate.layout_named(storage.layout)
    size = estimate.largest_block_size(by_group, layout, storage.group.size, dtype, budget * 1e9)
    for group in groups:
        if group["block_size"] == "auto":
            group["block_size"] = size
    if storage.group.is_first:
        logger.info("AdaFisher: block_size %d is the largest that takes at most %g GB a rank.", size, budget)
