"""Optimizers of the development bench, tuned alike: AdaFisher, candidates for its update, rivals.

A name has settings, `key=value`, besides the learning rate and weight decay. `rest` is the learning
rate of embedding, head and gains over that of the hidden matrices, for those that have another
optimizer for them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import torch
from prototype import Choice, Prototype, polar
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

Settings = dict[str, Any]
Named = list[tuple[str, nn.Parameter]]


def build(name: str, model: nn.Module, lr: float, weight_decay: float, settings: Settings) -> list[Optimizer]:
    """What trains a model; gains and biases have no weight decay, with any of them."""
    named = [(key, p) for key, p in model.named_parameters() if p.requires_grad]
    return BUILDERS[name](named, lr, weight_decay, dict(settings))


def _adamw(named: Named, lr: float, weight_decay: float, own: Settings) -> list[Optimizer]:
    betas = (own.pop("beta1", 0.9), own.pop("beta2", 0.95))
    if not named:
        return []
    return [AdamW(_decayed(named, weight_decay), lr=lr, betas=betas, foreach=True, **own)]


def _polar_in_float32(gradient: Tensor, coefficients: object, steps: int, eps: float) -> Tensor:
    """Torch's Muon in float32: its bfloat16 takes three times as long on this kind of CPU."""
    return polar(gradient[None], steps)[0]


def _muon(named: Named, lr: float, weight_decay: float, own: Settings) -> list[Optimizer]:
    torch.optim._muon._zeropower_via_newtonschulz = _polar_in_float32  # type: ignore[attr-defined]
    hidden, rest = _parted(named, lambda key, p: p.dim() == 2 and _is_hidden(key, p))  # torch's takes no convolutions
    other = _adamw(rest, lr * own.pop("rest", 1.0), weight_decay, {"beta2": own.pop("beta2", 0.95)})
    if not hidden:
        return other
    muon = torch.optim.Muon(hidden, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw", **own)
    return [muon, *other]


def _prototype(named: Named, lr: float, weight_decay: float, own: Settings) -> list[Optimizer]:
    known = {field.name for field in fields(Choice)}
    everything = bool(own.pop("everything", 0))
    hidden, rest = _parted(named, lambda key, p: p.dim() > 1 and (everything or _is_hidden(key, p)))
    other = {"beta2": own.pop("beta2", 0.95)}
    ratio = own.pop("rest", 1.0)
    made: list[Optimizer] = [
        Prototype(hidden, lr, weight_decay, Choice(**{k: own.pop(k) for k in list(own) if k in known}))
    ]
    if own:
        raise ValueError(f"no such setting: {own}")
    return made + _adamw(rest, lr * ratio, weight_decay, other)


def _soap(named: Named, lr: float, weight_decay: float, own: Settings) -> list[Optimizer]:
    from pytorch_optimizer import SOAP

    betas = (own.pop("beta1", 0.95), own.pop("beta2", 0.95))
    return [SOAP(_decayed(named, weight_decay), lr=lr, betas=betas, precondition_frequency=own.pop("every", 1), **own)]


def _adafisher(named: Named, lr: float, weight_decay: float, own: Settings) -> list[Optimizer]:
    from adafisher_dist import AdaFisher

    if "beta2" in own:  # torch's AdamW for what has no blocks
        hidden, rest = _parted(named, _is_hidden)
        matrices = [{"params": hidden, "weight_decay": weight_decay}]
        other = _adamw(rest, lr, weight_decay, {"beta2": own.pop("beta2")})
        return [AdaFisher(matrices, lr=lr, **own), *other]
    tables = [(key, p) for key, p in named if p.dim() > 1 and not _is_hidden(key, p)]
    others = [(key, p) for key, p in named if p.dim() <= 1 or _is_hidden(key, p)]
    by_element = [{**group, "max_blocks": 0} for group in _decayed(tables, weight_decay)]  # of a small vocabulary
    return [AdaFisher(_decayed(others, weight_decay) + by_element, lr=lr, **own)]


BUILDERS: dict[str, Callable[[Named, float, float, Settings], list[Optimizer]]] = {
    "adamw": _adamw, "muon": _muon, "soap": _soap, "adafisher": _adafisher, "prototype": _prototype,
}  # fmt: skip


def _decayed(named: Named, weight_decay: float) -> list[dict[str, Any]]:
    matrices = [p for _, p in named if p.dim() > 1]
    others = [p for _, p in named if p.dim() <= 1]
    groups = [(matrices, weight_decay), (others, 0.0)]
    return [{"params": params, "weight_decay": decay} for params, decay in groups if params]


def _parted(named: Named, chosen: Callable[[str, nn.Parameter], bool]) -> tuple[list[nn.Parameter], Named]:
    return [p for key, p in named if chosen(key, p)], [(key, p) for key, p in named if not chosen(key, p)]


def _is_hidden(key: str, p: nn.Parameter) -> bool:
    """Whether a parameter is none of those that Muon's authors leave to AdamW."""
    return p.dim() > 1 and not key.startswith(("embedding", "head", "positions"))
