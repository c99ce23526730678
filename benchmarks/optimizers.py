"""AdaFisher and its rivals, as the training benchmarks build them.

Each is one optimizer, or two with a part of the model each. A name has settings, `key=value`,
besides the learning rate and weight decay. Gains and biases have no weight decay, with any of them.
`rest` is the learning rate of embedding, head and gains over that of the hidden matrices, for those
that have AdamW for them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

Settings = dict[str, Any]
Named = list[tuple[str, nn.Parameter]]
Builder = Callable[[Named, float, float, Settings], list[Optimizer]]

QUINTIC = (3.4445, -4.7750, 2.0315)


def build(name: str, model: nn.Module, lr: float, weight_decay: float, settings: Settings) -> list[Optimizer]:
    """What trains a model's parameters that need a gradient."""
    named = [(key, p) for key, p in model.named_parameters() if p.requires_grad]
    return BUILDERS[name](named, lr, weight_decay, dict(settings))


def state_bytes(made: list[Optimizer]) -> int:
    """Of all tensors that the optimizers keep; AdaFisher's with its buffers."""
    return sum(
        optimizer.memory_usage()["rank"]["total"]
        if hasattr(optimizer, "memory_usage")
        else sum(tensor.numel() * tensor.element_size() for tensor in _tensors(optimizer.state))
        for optimizer in made
    )


def is_hidden(key: str, p: nn.Parameter) -> bool:
    """Whether a parameter is none of those that Muon's authors leave to AdamW."""
    return p.dim() > 1 and not key.startswith(("embedding", "head", "positions"))


def parted(named: Named, chosen: Callable[[str, nn.Parameter], bool]) -> tuple[list[nn.Parameter], Named]:
    return [p for key, p in named if chosen(key, p)], [(key, p) for key, p in named if not chosen(key, p)]


def adamw(named: Named, lr: float, weight_decay: float, own: Settings) -> list[Optimizer]:
    betas = (own.pop("beta1", 0.9), own.pop("beta2", 0.95))
    return [AdamW(_decayed(named, weight_decay), lr=lr, betas=betas, foreach=True, **own)] if named else []


def polar(x_NRC: Tensor, steps: int) -> Tensor:
    """The orthogonal factor, roughly (singular values of 0.7 to 1.2); Jordan et al. 2024."""
    a, b, c = QUINTIC
    tall = x_NRC.shape[-2] > x_NRC.shape[-1]
    x = x_NRC.mT if tall else x_NRC
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp_min(1e-30)
    for _ in range(steps):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return x.mT if tall else x


def _adafisher(named: Named, lr: float, weight_decay: float, own: Settings) -> list[Optimizer]:
    """As documented for a small vocabulary: embedding and head are Adam's, element by element."""
    from adafisher_dist import AdaFisher

    if "beta2" in own:  # torch's AdamW for what has no blocks
        hidden, rest = parted(named, is_hidden)
        matrices = [{"params": hidden, "weight_decay": weight_decay}]
        other = adamw(rest, lr, weight_decay, {"beta2": own.pop("beta2")})
        return [AdaFisher(matrices, lr=lr, **own), *other]
    tables, others = parted(named, lambda key, p: p.dim() > 1 and not is_hidden(key, p))
    groups = _decayed(others, weight_decay)
    if tables:
        groups.append({"params": tables, "weight_decay": weight_decay, "max_blocks": 0})
    return [AdaFisher(groups, lr=lr, **own)]


def _muon(named: Named, lr: float, weight_decay: float, own: Settings) -> list[Optimizer]:
    torch.optim._muon._zeropower_via_newtonschulz = polar_in_float32  # type: ignore[attr-defined]
    hidden, rest = parted(named, lambda key, p: p.dim() == 2 and is_hidden(key, p))  # torch's takes no convolutions
    other = adamw(rest, lr * own.pop("rest", 1.0), weight_decay, {"beta2": own.pop("beta2", 0.95)})
    if not hidden:
        return other
    muon = torch.optim.Muon(hidden, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw", **own)
    return [muon, *other]


def polar_in_float32(gradient: Tensor, coefficients: object, steps: int, eps: float) -> Tensor:
    """What torch's Muon computes in bfloat16, three times as slow on this kind of CPU."""
    return polar(gradient, steps)


def _normuon(named: Named, lr: float, weight_decay: float, own: Settings) -> list[Optimizer]:
    from pytorch_optimizer.optimizer.muon import normuon

    normuon.zero_power_via_newton_schulz_5 = lambda x, num_steps, **_: polar(x, num_steps)  # in float32, as Muon's
    hidden, rest = parted(named, lambda key, p: p.dim() > 1 and is_hidden(key, p))  # it flattens convolutions
    other = adamw(rest, lr * own.pop("rest", 1.0), weight_decay, {"beta2": own.pop("beta2", 0.95)})
    if not hidden:
        return other
    group = {"params": hidden, "use_muon": True, "lr": lr, "weight_decay": weight_decay, **own}
    return [normuon.NorMuon([group], update_scale="match_rms", foreach=False), *other]


def _soap(named: Named, lr: float, weight_decay: float, own: Settings) -> list[Optimizer]:
    from pytorch_optimizer import SOAP

    betas = (own.pop("beta1", 0.95), own.pop("beta2", 0.95))
    every = own.pop("every", 1)
    return [SOAP(_decayed(named, weight_decay), lr=lr, betas=betas, precondition_frequency=every, **own)]


def _kl_soap(named: Named, lr: float, weight_decay: float, own: Settings) -> list[Optimizer]:
    import heavyball

    heavyball.utils.compile_mode = None  # a compiler for the CPU is not there everywhere
    betas = (own.pop("beta1", 0.95), own.pop("beta2", 0.95))
    every = own.pop("every", 1)
    return [
        heavyball.KLSOAP(
            _decayed(named, weight_decay), lr=lr, betas=betas, precondition_frequency=every, merge_dims=False, **own
        )
    ]


def _kron(named: Named, lr: float, weight_decay: float, own: Settings) -> list[Optimizer]:
    from pytorch_optimizer import Kron

    return [Kron(_decayed(named, weight_decay), lr=lr, **own)]


def _ademamix(named: Named, lr: float, weight_decay: float, own: Settings) -> list[Optimizer]:
    from pytorch_optimizer import AdEMAMix

    betas = (own.pop("beta1", 0.9), own.pop("beta2", 0.999), own.pop("beta3", 0.9999))
    return [AdEMAMix(_decayed(named, weight_decay), lr=lr, betas=betas, weight_decouple=True, **own)]


def _prototype(named: Named, lr: float, weight_decay: float, own: Settings) -> list[Optimizer]:
    """A candidate of development/prototype.py; tables are AdamW's unless `everything` is set.

    With `own_tables` they are AdaFisher's without blocks, and so are gains.
    """
    sys.path.append(str(Path(__file__).parent / "development"))
    from prototype import Choice, Prototype

    known = {field.name for field in fields(Choice)}
    everything = bool(own.pop("everything", 0))
    hidden, rest = parted(named, lambda key, p: p.dim() > 1 and (everything or is_hidden(key, p)))
    ratio, beta2, own_tables = own.pop("rest", 1.0), own.pop("beta2", 0.95), own.pop("own_tables", 0)
    choice = Choice(**{key: own.pop(key) for key in list(own) if key in known})
    if own:
        raise ValueError(f"no such setting: {own}")
    made = [Prototype(hidden, lr, weight_decay, choice)]
    if own_tables:
        return [*made, *_adafisher(rest, lr * ratio, weight_decay, {})]
    return [*made, *adamw(rest, lr * ratio, weight_decay, {"beta2": beta2})]


BUILDERS: dict[str, Builder] = {
    "adamw": adamw, "adafisher": _adafisher, "muon": _muon, "normuon": _normuon, "soap": _soap, "kl_soap": _kl_soap,
    "kron": _kron, "ademamix": _ademamix, "prototype": _prototype,
}  # fmt: skip


def _decayed(named: Named, weight_decay: float) -> list[dict[str, Any]]:
    matrices = [p for _, p in named if p.dim() > 1]
    others = [p for _, p in named if p.dim() <= 1]
    groups = [(matrices, weight_decay), (others, 0.0)]
    return [{"params": params, "weight_decay": decay} for params, decay in groups if params]


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for each in value.values():
            yield from _tensors(each)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _tensors(each)
