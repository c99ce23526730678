"""The optimizer's hyper-parameters: their defaults, presets and bounds, and what to say of a wrong one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from numbers import Integral, Real
from typing import Any, NamedTuple

import torch

from adafisher_dist.grid import Grid, make_grid

DEFAULTS: dict[str, Any] = {
    "lr": 1e-3,
    "momentum": 0.85,
    "nesterov": True,
    "fisher_decay": 0.95,
    "damping": 0.01,
    "eps": 1e-8,
    "block_size": 128,
    "rows_per_block": 64,
    "block_grid": "rows",
    "weight_decay": 0.01,
    "bias_correction": True,
    "max_blocks": None,
    "fisher_update_freq": 1,
    "inverse_update_freq": 1,
    "exponent": 1.0,
    "grafting": "rms",
    "fisher_dtype": torch.float32,
    "packed": False,
    "backend": "auto",
    "memory_budget_gb": None,
}

# Settings that are one for the whole optimizer.
OF_ALL_GROUPS = ("fisher_dtype", "memory_budget_gb")

PRESETS: dict[str, dict[str, Any]] = {
    "language_models": {"lr": 3e-3, "weight_decay": 0.1},
    "image_classification": {"lr": 3e-3, "weight_decay": 1e-4},
}

FISHER_DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float64": torch.float64,
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp64": torch.float64,
}


class Structure(NamedTuple):
    """The settings of a param group that shape its state, and so cannot change once there is state."""

    block_size: int
    rows_per_block: int
    block_grid: str
    max_blocks: int | None
    fisher_dtype: torch.dtype
    exponent: float
    keeps_factors: bool
    packed: bool

    def grid(self, shape: Sequence[int]) -> Grid:
        """The blocks of a parameter of this shape."""
        return make_grid(shape, self.block_size, self.rows_per_block, self.block_grid, self.max_blocks)

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype of momentum, factors and all arithmetic: float64 for a float64 Fisher, else float32."""
        return torch.float64 if self.fisher_dtype == torch.float64 else torch.float32


def structure(group: Mapping[str, Any]) -> Structure:
    """The structural settings of a validated param group; block_size="auto" stands there until it is chosen."""
    return Structure(
        group["block_size"],
        group["rows_per_block"],
        group["block_grid"],
        group["max_blocks"],
        fisher_dtype(group["fisher_dtype"]),
        group["exponent"],
        group["inverse_update_freq"] > 1,
        group["packed"],
    )


# Hugging Face's Trainer puts its adam_beta1 and adam_beta2 in the place of "betas": "auto".
_BETAS = " Adam's betas are momentum and fisher_decay here, with defaults of their own: leave betas out."


def check_names(names: Iterable[str], valid: Iterable[str]) -> None:
    """Refuse hyper-parameters that do not exist.

    Raises:
        TypeError: names the unknown one, the nearest valid one, and the list.
    """
    valid = list(valid)
    for name in names:
        if name not in valid:
            near = get_close_matches(name.lower(), valid, n=1, cutoff=0.5)
            hint = _BETAS if name == "betas" else f" Did you mean {near[0]!r}?" if near else ""
            raise TypeError(f"AdaFisher has no parameter {name!r}.{hint} Its parameters are: {', '.join(valid)}.")


# What other optimizers of torch take in a param group, and this one would silently not do.
_FOREIGN = ("amsgrad", "betas", "capturable", "differentiable", "maximize")


def check_group_keys(group: Mapping[str, Any]) -> None:
    """Refuse a param group's key that is another optimizer's, or looks misspelt; other keys are the user's own.

    Raises:
        ValueError: names the key and, where it resembles one, the setting.
    """
    for key, value in group.items():
        if key in _FOREIGN and value:
            raise ValueError(f"AdaFisher has no setting {key!r} (got {value!r} in a param group); leave it out.")
        near = [] if key in DEFAULTS else get_close_matches(str(key).lower(), DEFAULTS, n=1, cutoff=0.85)
        if near:
            raise ValueError(f"The param group has a key {key!r}, which is no setting. Did you mean {near[0]!r}?")


def preset(name: str) -> dict[str, Any]:
    """The settings of a preset.

    Raises:
        ValueError: the name is unknown.
    """
    if name not in PRESETS:
        raise ValueError(f"AdaFisher has no preset {name!r}; the presets are: {', '.join(PRESETS)}.")
    return dict(PRESETS[name])


def normalize(group: dict[str, Any]) -> None:
    """Check a param group's settings, and bring them into one form, in place.

    Raises:
        TypeError: a setting has the wrong type.
        ValueError: a setting is out of bounds; the message has the value and the bound.
    """
    _number(group, "lr", low=0.0)
    _number(group, "weight_decay", low=0.0)
    _number(group, "damping", low=0.0)
    _number(group, "momentum", low=0.0, below=1.0)
    _number(group, "fisher_decay", low=0.0, below=1.0)
    _budget(group)
    if group["block_size"] != "auto":
        _integer(group, "block_size", low=1)
    _integer(group, "rows_per_block", low=1)
    _integer(group, "fisher_update_freq", low=1)
    _integer(group, "inverse_update_freq", low=1)
    if group["max_blocks"] is not None:
        _integer(group, "max_blocks", low=0)
    for name in ("nesterov", "bias_correction", "packed"):
        if not isinstance(group[name], bool):
            raise TypeError(f"{name} should be True or False, got {group[name]!r}.")
    _choice(group, "block_grid", ("rows", "flat"))
    _choice(group, "grafting", ("rms", "none"))
    _choice(group, "backend", ("auto", "torch", "triton"))
    _number(group, "exponent", low=0.0)
    _choice(group, "exponent", (1.0, 0.5))
    # By name: torch's checkpoint functions and JSON carry no torch.dtype.
    group["fisher_dtype"] = str(fisher_dtype(group["fisher_dtype"])).removeprefix("torch.")
    smallest = torch.finfo(structure(group).compute_dtype).tiny
    _number(group, "eps", low=smallest, why="it keeps a parameter without gradient from 0/0")


def fisher_dtype(value: object) -> torch.dtype:
    """The dtype that a name, as JSON has it ("bfloat16", "bf16", "torch.bfloat16"), or a torch.dtype means.

    Raises:
        ValueError: it is none of those that AdaFisher keeps a Fisher in.
    """
    dtype = FISHER_DTYPES.get(value.removeprefix("torch.")) if isinstance(value, str) else value
    if dtype not in FISHER_DTYPES.values():
        raise ValueError(
            f"fisher_dtype should be torch.float32, torch.bfloat16 or torch.float64 (or its name), got {value!r}."
            " float16 is not offered: squares of gradients leave its range."
        )
    assert isinstance(dtype, torch.dtype)
    return dtype


def _budget(group: dict[str, Any]) -> None:
    if group["memory_budget_gb"] is not None:
        _number(group, "memory_budget_gb", low=0.0)
    elif group["block_size"] == "auto":
        raise ValueError('block_size="auto" needs memory_budget_gb, the GB (10⁹ bytes) that a rank may use for it.')


# DeepSpeed passes on what nobody replaced.
_AUTO = ' Hugging Face\'s Trainer and Accelerate replace "auto" by a number; where neither does, write the number.'


def _number(group: dict[str, Any], name: str, low: float, below: float | None = None, why: str = "") -> None:
    value = group[name]
    if isinstance(value, torch.Tensor):
        if name != "lr" or value.numel() != 1:
            raise TypeError(f"{name} should be a number, got a tensor of shape {tuple(value.shape)}.")
        number = float(value)  # as in torch.optim, a tensor lr may be changed in place by the user
    elif isinstance(value, bool) or not isinstance(value, Real):
        hint = _AUTO if isinstance(value, str) and value == "auto" else ""
        raise TypeError(f"{name} should be a number, got {value!r} of type {type(value).__name__}.{hint}")
    else:
        number = group[name] = float(value)
    if not (low <= number < (float("inf") if below is None else below)):
        bound = f"at least {low:g}" + (f" and below {below:g}" if below is not None else " and finite")
        raise ValueError(f"{name} should be {bound}, got {value!r}.{' Reason: ' + why + '.' if why else ''}")


def _integer(group: dict[str, Any], name: str, low: int) -> None:
    value = group[name]
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} should be an integer, got {value!r} of type {type(value).__name__}.")
    if value < low:
        raise ValueError(f"{name} should be at least {low}, got {value}.")
    group[name] = int(value)


def _choice(group: dict[str, Any], name: str, choices: tuple[object, ...]) -> None:
    if group[name] not in choices:
        raise ValueError(f"{name} should be one of {', '.join(map(repr, choices))}, got {group[name]!r}.")
