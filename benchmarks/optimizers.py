"""The optimizers that convergence.py compares, and what each is given besides the learning rate."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from tasks import Task
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from adafisher_dist import AdaFisher
from adafisher_dist.settings import DEFAULTS

# A row of its own for each of these settings: add, for instance, "AdaFisher, every 10":
# {"inverse_update_freq": 10}.
ADAFISHERS: dict[str, dict[str, Any]] = {"AdaFisher": {}}
# The others are compared with the better of these; times are relative to the first.
ADAMWS: dict[str, tuple[float, float]] = {"AdamW": (0.9, 0.999), "AdamW, β₂ = 0.95": (0.9, 0.95)}
BASE = "AdamW"

Build = Callable[[nn.Module, Task, float], list[Optimizer]]


@dataclass(frozen=True, slots=True)
class Contender:
    """An optimizer with its settings.

    Attributes:
        build: what trains a task's model at a learning rate: one optimizer, or two with a part of
            the parameters each.
        settings: besides the learning rate, as JSON has them. Runs with other settings are other
            runs.
        missing: why it cannot be built here; None where it can.
        unfit: why it is not for a task; None where it is.
        slow_start: whether its step grows dearer, or cheaper, for dozens of steps.
    """

    build: Build
    settings: dict[str, Any]
    missing: str | None = None
    unfit: Callable[[Task], str | None] = lambda task: None
    slow_start: bool = False


def contenders() -> dict[str, Contender]:
    """All by name, those too that cannot be built here."""
    return {
        **{name: _adafisher(settings) for name, settings in ADAFISHERS.items()},
        **{name: _adamw(betas) for name, betas in ADAMWS.items()},
        "SGD": _sgd(),
        "Muon": _muon(),
        "SOAP": _soap(),
    }


def _adafisher(settings: dict[str, Any]) -> Contender:
    def build(model: nn.Module, task: Task, lr: float) -> list[Optimizer]:
        return [AdaFisher(model.named_parameters(), lr=lr, **settings)]

    # The defaults and the update too, so that runs from before one of them changed are not taken
    # for today's.
    everything = {name: value for name, value in {**DEFAULTS, **settings}.items() if name != "lr"}
    written = {
        name: str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value
        for name, value in everything.items()
    }
    return Contender(build, {**written, "update": _update(settings)}, slow_start=everything["inverse_update_freq"] > 1)


def _update(settings: dict[str, Any]) -> list[float]:
    """Fingerprint of AdaFisher's update: what a few steps make of a matrix and of a vector.

    To three digits, which another machine rounds alike.
    """
    parameters = [nn.Parameter(torch.zeros(shape)) for shape in ((6, 5), (7,))]
    waves = [torch.sin(torch.arange(1.0, 1 + p.numel()) ** 2).view_as(p) for p in parameters]
    optimizer = AdaFisher(parameters, lr=1.0, **settings)
    for step in range(3):
        for parameter, wave in zip(parameters, waves, strict=True):
            parameter.grad = wave.exp() + (wave * (step + 1)).cos()
        optimizer.step()
    return [float(f"{(p.detach() * wave).sum():.3g}") for p, wave in zip(parameters, waves, strict=True)]


def _adamw(betas: tuple[float, float]) -> Contender:
    def build(model: nn.Module, task: Task, lr: float) -> list[Optimizer]:
        return [AdamW(model.parameters(), lr=lr, betas=betas, weight_decay=0.01, foreach=True)]

    return Contender(build, {"betas": list(betas), "weight_decay": 0.01})


def _sgd() -> Contender:
    settings = {"momentum": 0.9, "nesterov": True, "weight_decay": 0.0}

    def build(model: nn.Module, task: Task, lr: float) -> list[Optimizer]:
        return [SGD(model.parameters(), lr=lr, foreach=True, **settings)]

    def unfit(task: Task) -> str | None:
        return "it is far behind in the shorter trainings" if task.lrs is not None else None

    return Contender(build, settings, unfit=unfit)


def _muon() -> Contender:
    """Muon for hidden matrices, AdamW for the rest; scaled so that both share a learning rate."""
    betas = (0.9, 0.95)

    def build(model: nn.Module, task: Task, lr: float) -> list[Optimizer]:
        hidden, rest = [], []
        for name, parameter in model.named_parameters():
            (hidden if task.hidden(name, parameter) else rest).append(parameter)
        made: list[Optimizer] = [torch.optim.Muon(hidden, lr=lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")]
        if rest:
            made.append(AdamW(rest, lr=lr, betas=betas, weight_decay=0.01, foreach=True))
        return made

    def unfit(task: Task) -> str | None:
        if any(task.hidden(name, parameter) for name, parameter in task.build().named_parameters()):
            return None
        return "this model has no hidden matrix, so it would be AdamW throughout"

    settings = {
        "adjust_lr_fn": "match_rms_adamw",
        "weight_decay": 0.01,
        "rest": {"betas": list(betas), "weight_decay": 0.01},
    }
    missing = None if hasattr(torch.optim, "Muon") else f"torch {torch.__version__} has no Muon, 2.9 has"
    return Contender(build, settings, missing, unfit)


def _soap() -> Contender:
    """SOAP's defaults: eigenbases of size ≤ 10,000, refreshed every 10 steps; Adam for vectors."""

    def build(model: nn.Module, task: Task, lr: float) -> list[Optimizer]:
        from pytorch_optimizer import SOAP

        return [SOAP(model.parameters(), lr=lr, weight_decay=0.01)]

    found = importlib.util.find_spec("pytorch_optimizer") is not None
    missing = None if found else "pytorch_optimizer is not installed: pip install '.[bench]'"
    return Contender(build, {"weight_decay": 0.01}, missing)
