"""How many elements each tensor of a checkpoint has, by what the manifest says of the model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod
from typing import Any

from adafisher_dist.blocks.grid import GRID_SETTINGS, make_grid
from adafisher_dist.blocks.parts import saved_offsets, saved_parts
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
    parts = saved_parts(fact)
    settings = {key: structure[key] for key in GRID_SETTINGS}
    grids = [make_grid(fact["shape"], **settings)] if parts is None else parts.grids(structure)
    for kind in ("momentum", "fisher", "square", *(("factor", "curvature") if structure["keeps_factors"] else ())):
        yield f"{kind}/{name}", saved_offsets(kind, grids)[-1]
