"""Hyper-parameters: their defaults, presets and bounds, and the messages for wrong values."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from numbers import Integral, Real
from reprlib import repr as short
from typing import Any, NamedTuple

import torch

DEFAULTS: dict[str, Any] = {
    "lr": 1e-3,
    "momentum": 0.9,
    "nesterov": True,
    "fisher_decay": 0.97,
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
    "exponent": 0.5,
    "grafting": "rms",
    "fisher_dtype": torch.float32,
    "packed": False,
    "stochastic_rounding": False,
    "memory_budget_gb": None,
}

# Settings that checkpoints of earlier versions do not have: a load leaves the optimizer's own.
ADDED_LATER: tuple[str, ...] = ("stochastic_rounding",)

# Settings that are one for the whole optimizer.
OF_ALL_GROUPS = ("fisher_dtype", "memory_budget_gb")

PRESETS: dict[str, dict[str, Any]] = {
    "language_models": {"lr": 6e-4, "weight_decay": 0.1},
    "image_classification": {"lr": 1e-3, "weight_decay": 0.05},
}

FISHER_DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float64": torch.float64,
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp64": torch.float64,
}


class StateConfig(NamedTuple):
    """Settings of a param group that shape its state, and so cannot change once there is one."""

    block_size: int
    rows_per_block: int
    block_grid: str
    max_blocks: int | None
    fisher_dtype: torch.dtype
    exponent: float
    grafting: str
    keeps_factors: bool
    packed: bool

    @property
    def compute_dtype(self) -> torch.dtype:
        """Dtype of momentum, factors and arithmetic: float64 if the Fisher is, else float32."""
        return torch.float64 if self.fisher_dtype == torch.float64 else torch.float32


def state_config(group: Mapping[str, Any]) -> StateConfig:
    """Structural settings of a validated param group; block_size may still be "auto"."""
    own = {name: group[name] for name in StateConfig._fields if name in DEFAULTS}
    own["fisher_dtype"] = fisher_dtype(own["fisher_dtype"])
    return StateConfig(**own, keeps_factors=group["inverse_update_freq"] > 1)


class StepSettings(NamedTuple):
    """The settings of a param group that may change from step to step."""

    lr: float
    momentum: float
    nesterov: bool
    fisher_decay: float
    damping: float
    eps: float
    weight_decay: float
    bias_correction: bool
    fisher_update_freq: int
    inverse_update_freq: int
    stochastic_rounding: bool

    def updates_fisher(self, step: int) -> bool:
        """Whether F is updated at step t of a parameter."""
        return (step - 1) % self.fisher_update_freq == 0


def step_settings(group: Mapping[str, Any]) -> StepSettings:
    """Those of a validated param group; a tensor lr as a number."""
    values = {name: group[name] for name in StepSettings._fields}
    return StepSettings(**{**values, "lr": max(float(values["lr"]), 0.0)})


def preset(name: str) -> dict[str, Any]:
    """The settings of a preset.

    Raises:
        ValueError: the name is unknown.
    """
    if not isinstance(name, str) or name not in PRESETS:
        raise ValueError(f"AdaFisher has no preset {short(name)}; the presets are: {', '.join(PRESETS)}.")
    return dict(PRESETS[name])


def normalize(group: dict[str, Any]) -> None:
    """Check a param group's settings, and bring them into one form, in place.

    Raises:
        TypeError: a setting has the wrong type.
        ValueError: a setting is out of bounds. Either message has all values that are wrong, and
            their bounds.
    """
    raise_all(problems_of(group))


def normalized(group: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a param group's settings, checked: a user may have written anything into it.

    A tensor lr is a number in it.

    Raises:
        TypeError: as `normalize`.
        ValueError: as `normalize`.
    """
    missing = [name for name in DEFAULTS if name not in group]
    if missing:
        raise ValueError(f"A param group has lost {', '.join(missing)}: set it again.")
    result = {name: group[name] for name in DEFAULTS}
    if _is_number(result["lr"]):
        result["lr"] = float(result["lr"])  # once: where it is on an accelerator, the host waits for all before
    rest = {name: value for name, value in result.items() if name != "lr"}  # which a schedule changes in each step
    kinds = tuple(map(type, rest.values()))
    if _UNCHANGING.issuperset(kinds):
        with suppress(TypeError, ValueError):  # they are raised below, with all that is wrong
            _rate(result)
            return {**_checked(tuple(rest.items()), kinds), "lr": result["lr"]}
    normalize(result)
    return result


# Of values that cannot be changed in place: those that were checked once are not checked again.
_UNCHANGING = frozenset({int, float, bool, str, type(None), torch.dtype})


@lru_cache(maxsize=64)
def _checked(settings: tuple[tuple[str, Any], ...], kinds: tuple[type, ...]) -> dict[str, Any]:
    """All but lr, normalised; `kinds` since 1, 1.0 and True are equal."""
    result = {"lr": 0.0, **dict(settings)}
    normalize(result)
    return result


def problems_of(group: dict[str, Any]) -> list[Exception]:
    """All problems with a param group's settings; valid ones are normalised in place."""
    found: list[Exception] = []

    def check(how: Callable[..., None], *arguments: Any, **bounds: Any) -> None:
        try:
            how(group, *arguments, **bounds)
        except (TypeError, ValueError) as error:
            found.append(error)

    check(_rate)
    check(check_number, "weight_decay", low=0.0)
    check(check_number, "damping", low=0.0)
    check(check_number, "momentum", low=0.0, below=1.0)
    check(check_number, "fisher_decay", low=0.0, below=1.0)
    check(_budget)
    if not is_auto(group["block_size"]):
        check(_integer, "block_size", low=1)
    check(_integer, "rows_per_block", low=1)
    check(_integer, "fisher_update_freq", low=1)
    check(_integer, "inverse_update_freq", low=1)
    if group["max_blocks"] is not None:
        check(_integer, "max_blocks", low=0)
    for name in ("nesterov", "bias_correction", "packed", "stochastic_rounding"):
        check(_switch, name)
    check(_choice, "block_grid", ("rows", "flat"))
    check(_choice, "grafting", ("rms", "none"))
    check(_exponent)
    check(_fisher_dtype)
    check(_eps)
    return found


def doubts_of(group: Mapping[str, Any]) -> list[str]:
    """What is valid in a param group's settings, but hardly meant."""
    found = []
    momentum, decay, freq = group["momentum"], group["fisher_decay"], group["fisher_update_freq"]
    if momentum**2 > decay and group["grafting"] == "rms":
        found.append(
            f"momentum={momentum:g} forgets more slowly than fisher_decay={decay:g}: where gradients become 0 (experts"
            " or tokens that do not occur for a while), weights go on by the old ones, faster and faster. Set"
            f" fisher_decay to {max(momentum, DEFAULTS['fisher_decay']):g} or more."
        )
    if freq > 1 and group["grafting"] == "rms":
        found.append(
            f"fisher_update_freq={freq} has no effect: with grafting='rms' F bounds each update, and is brought up to"
            " date in every step. Leave it out."
        )
    return found


def raise_all(problems: Sequence[Exception]) -> None:
    """One error for all of them, if there are any.

    Raises:
        TypeError: one of them is a TypeError.
        ValueError: none of them is.
    """
    if problems:
        kind = TypeError if any(isinstance(problem, TypeError) for problem in problems) else ValueError
        raise kind(" ".join(map(str, problems)))


def fisher_dtype(value: object) -> torch.dtype:
    """The dtype that a name as in JSON ("bfloat16", "bf16", "torch.bfloat16") or a dtype means.

    Raises:
        ValueError: it is none of those that AdaFisher keeps a Fisher in.
    """
    dtype = FISHER_DTYPES.get(value.removeprefix("torch.")) if isinstance(value, str) else value
    if not isinstance(dtype, torch.dtype) or dtype not in FISHER_DTYPES.values():
        raise ValueError(
            f"fisher_dtype should be torch.float32, torch.bfloat16 or torch.float64 (or its name), got {short(value)}."
            " float16 is not offered: squares of gradients leave its range."
        )
    return dtype


def is_auto(block_size: object) -> bool:
    """Whether the block size is to be chosen."""
    return isinstance(block_size, str) and block_size == "auto"


def _budget(group: dict[str, Any]) -> None:
    if group["memory_budget_gb"] is not None:
        check_number(group, "memory_budget_gb", low=0.0)
    elif is_auto(group["block_size"]):
        raise ValueError('block_size="auto" needs memory_budget_gb, the GB (10⁹ bytes) that a rank may use for it.')


def _switch(group: dict[str, Any], name: str) -> None:
    if not isinstance(group[name], bool):
        raise TypeError(f"{name} should be True or False, got {short(group[name])}.")


def _exponent(group: dict[str, Any]) -> None:
    check_number(group, "exponent", low=0.0)
    _choice(group, "exponent", (1.0, 0.5))


def _fisher_dtype(group: dict[str, Any]) -> None:
    # By name: torch's checkpoint functions and JSON carry no torch.dtype.
    group["fisher_dtype"] = str(fisher_dtype(group["fisher_dtype"])).removeprefix("torch.")


def _eps(group: dict[str, Any]) -> None:
    wide = torch.float64 if group["fisher_dtype"] == "float64" else torch.float32
    check_number(group, "eps", low=torch.finfo(wide).tiny, why="it keeps a parameter without gradient from 0/0")


# DeepSpeed passes on what nobody replaced.
_AUTO = ' Hugging Face\'s Trainer and Accelerate replace "auto" by a number; where neither does, write the number.'
_QUOTED = " Write a number, without quotes."
_YAML = " YAML takes 1e-8 for text: write 1.0e-8 there."


def hint_of(value: object) -> str:
    """What to do about text, or Adam's betas, where a number should be; else nothing."""
    if isinstance(value, tuple | list) and len(value) == 2:
        return " If these are Adam's betas, give them by name: betas=(…, …)."
    if not isinstance(value, str):
        return ""
    return _AUTO if value == "auto" else _QUOTED + (_YAML if re.fullmatch(r"[-+]?\d+[eE][-+]?\d+", value) else "")


# Of a setting that is no share: the squares of a block's row of them still sum up to a float32.
LARGEST = 1e15

# What float32 leaves of a learning rate where a schedule should have reached 0, at most.
_ROUNDING = 1e-8


def check_number(group: dict[str, Any], name: str, low: float, below: float | None = None, why: str = "") -> None:
    """Check a number, and make it a float in place, unless it is a tensor lr.

    Raises:
        TypeError: it is none.
        ValueError: it is below `low`, not below `below`, or, without `below`, above `LARGEST`.
    """
    value = group[name]
    if isinstance(value, torch.Tensor):
        if name != "lr" or value.numel() != 1 or value.is_complex():
            kind = f"{value.dtype} tensor" if value.is_complex() else "tensor"
            raise TypeError(f"{name} should be a number, got a {kind} of shape {tuple(value.shape)}.")
        number = float(value)  # as in torch.optim, a tensor lr may be changed in place by the user
    elif isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(
            f"{name} should be a number, got {short(value)} of type {type(value).__name__}.{hint_of(value)}"
        )
    else:
        with suppress(OverflowError):  # it is too large, and is told of below
            value = float(value)
        group[name] = number = value
    if not (low <= number < below if below is not None else low <= number <= LARGEST):
        bound = f"at least {low:g} and " + (f"below {below:g}" if below is not None else f"at most {LARGEST:g}")
        raise ValueError(f"{name} should be {bound}, got {short(value)}.{' Reason: ' + why + '.' if why else ''}")


def _rate(group: dict[str, Any]) -> None:
    """Check a learning rate.

    One that rounding has made negative, as torch's LinearLR does at the end of a schedule to 0,
    counts as 0 in steps and stays as it is, since the scheduler goes on from it.
    """
    lr = group["lr"]
    a_number = isinstance(lr, float) or _is_number(lr)
    if not (a_number and -_ROUNDING < float(lr) < 0):
        check_number(group, "lr", low=0.0)


def _is_number(lr: object) -> bool:
    """Whether it is a tensor that can be a learning rate."""
    return isinstance(lr, torch.Tensor) and lr.numel() == 1 and not lr.is_complex()


def _integer(group: dict[str, Any], name: str, low: int) -> None:
    value = group[name]
    if isinstance(value, bool) or not isinstance(value, Integral):
        hint = hint_of(value)
        raise TypeError(f"{name} should be an integer, got {short(value)} of type {type(value).__name__}.{hint}")
    number = int(value)
    if not low <= number < 2**62:
        bound = f"at least {low}" if number < low else "below 2**62"
        raise ValueError(f"{name} should be {bound}, got {short(number)}.")
    group[name] = number


def _choice(group: dict[str, Any], name: str, choices: tuple[object, ...]) -> None:
    value = group[name]
    if not isinstance(value, str | float) or value not in choices:
        raise ValueError(f"{name} should be one of {', '.join(map(repr, choices))}, got {short(value)}.")
