"""Values that no setting should have, in a param group, a constructor or a DeepSpeed config."""

from __future__ import annotations

import random
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from engines import PARAMS, config, engine_of, fp16_on_the_cpu, train
from ranks import run_ranks
from refused_configs import CASES
from tally import Foreign, Tally, Wrong, column_of, explained
from torch import nn

from adafisher_dist import AdaFisher
from adafisher_dist.settings import DEFAULTS

# Those that JSON has.
JSON: list[Any] = [
    *("8", "auto", "", "x" * 10_000, [], {}, [1], None, True, 0, -1, 0.5, 1e-320),
    *(10**400, -(10**400), 10**30, 2**63, 1e308, -1e308, float("nan"), float("inf")),
]
VALUES: list[Any] = [
    *(*JSON, b"x", len, object(), 1j, Fraction(10**400, 3), Decimal(1)),
    *(torch.tensor(1.0), torch.tensor([1.0, 2.0]), torch.tensor(1j), torch.tensor(float("nan")), torch.float16),
    *(np.float64(1e308), np.array([1, 2]), np.array(1.0)),
]
WHEN = ["constructor", "param group", "before the first step", "after it"]


def stepped(optimizer: AdaFisher, parameters: list[nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()


def set_to(name: str, value: Any, when: str) -> str:
    """It is taken, or the error names the setting, says little else, and nothing has changed."""
    parameters = [nn.Parameter(torch.ones(6, 5)), nn.Parameter(torch.ones(4))]
    before = [parameter.clone() for parameter in parameters]
    try:
        if when == "constructor":
            AdaFisher(parameters, **{name: value})
            return "taken"
        optimizer = AdaFisher(parameters, block_size=4)
        if when == "param group":
            optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3))], name: value})
            return "taken"
        if when == "after it":
            stepped(optimizer, parameters)
            before = [parameter.clone() for parameter in parameters]
        optimizer.param_groups[0][name] = value
        stepped(optimizer, parameters)
    except Exception as error:
        if not all(map(torch.equal, parameters, before)):
            raise Wrong(f"changed weights: {error}") from error
        explained(error, *([] if "keeps_factors" in str(error) else [name]))
        if len(str(error)) > 900:
            raise Foreign(f"says too much: {str(error)[:300]}") from error
        return "refused"
    return "taken"


def set_anything(count: int, draw: random.Random, tally: Tally) -> None:
    """So many, of all settings, values and moments."""
    for _ in range(count):
        name, value, when = draw.choice([*DEFAULTS]), draw.choice(VALUES), draw.choice(WHEN)
        with tally.trial(f"{name} = {str(value)[:40]} of type {type(value).__name__}, {when}"):
            tally.outcomes[set_to(name, value, when)] += 1


# ---- DeepSpeed's configs ----


def configure_anything(count: int, draw: random.Random, tally: Tally) -> None:
    """So many engines in one process, each with a strange parameter or what AdaFisher refuses."""
    given = []
    for _ in range(count):
        stage = draw.randrange(4)
        if draw.random() < 0.2:
            given.append((*CASES[draw.choice([*CASES])][:3], None))
        else:
            name = draw.choice([*DEFAULTS, "betas", "preset", "metrics_every", "amsgrad", "momentun"])
            given.append((stage, {}, {}, (name, draw.choice(JSON))))
    for (*_, key), (what, column, told) in zip(given, run_ranks(built, 1, given, deepspeed=True)[0], strict=True):
        tally.trials += 1
        tally.outcomes[column] += 1
        if column not in ("taken", "refused"):
            tally.problems.append((column, f"{what}, {key and key[0]}: {told}"))


def built(rank: int, world: int, given: list[Any]) -> list[tuple[str, str, str]]:
    """An engine of each config, and a step: what came of it."""
    return [_built(*each) for each in given]


def _built(
    stage: int, zero: dict[str, Any], more: dict[str, Any], strange: tuple[str, Any] | None
) -> tuple[str, str, str]:
    what = f"stage {stage}, {zero}, {more}, {str(strange)[:60]}"
    params = {**PARAMS, **({} if strange is None else dict([strange]))}
    try:
        with fp16_on_the_cpu():
            train(engine_of(config(stage, 1, params, zero=zero, **more)), 0, 1, 0, 1)
    except Exception as error:
        try:
            explained(error, *([] if strange is None else [strange[0]]))
        except Foreign as problem:
            return what, column_of(problem), str(problem)
        return what, "refused", ""
    if strange is None:
        return what, "wrong", "took what AdaFisher refuses"
    return what, "taken", ""
