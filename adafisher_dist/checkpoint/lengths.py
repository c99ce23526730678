"""How many elements each tensor of a checkpoint has, by what the manifest says of the model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod
from typing import Any

from adafisher_dist.blocks.parts import grids_of, saved_offsets, saved_parts
from adafisher_dist.checkpoint.manifest import LEFT_OUT


def of_weights(about: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """Of the parameters and buffers that a checkpoint holds: keys, and elements."""
    model = about["model"]
    for name, fact in model["parameters"].items():
        if not fact.get(LEFT_OUT):
            yield f"weight/{name}", prod(fact["shape"])
    for name, fact in model["buffers"].items():
        yield f"buffer/{name}", prod(fact["shape"])


def of_state(about: Mapping[str, Any], name: str) -> Iterator[tuple[str, int]]:
    """Of a parameter's state: keys, and elements."""
    fact, structure = about["model"]["parameters"][name], about["optimizer"]["state"][name]["structure"]
    grids = grids_of(fact["shape"], saved_parts(fact), structure)
    for kind in ("momentum", "fisher", "square", *(("factor", "curvature") if structure["keeps_factors"] else ())):
        yield f"{kind}/{name}", saved_offsets(kind, grids)[-1]
