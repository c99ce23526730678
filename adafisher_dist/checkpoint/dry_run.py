"""Try what a load will apply, before anything changes.

It is tried on copies, or in place, where the previous state is kept to put it back.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from reprlib import repr as short
from types import MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from adafisher_dist.checkpoint import targets
from adafisher_dist.checkpoint.errors import CheckpointError
from adafisher_dist.checkpoint.matching import Match
from adafisher_dist.checkpoint.targets import OWN_SETTINGS, CheckpointTarget
from adafisher_dist.settings import ADDED_LATER, DEFAULTS, normalize

logger = logging.getLogger("adafisher_dist")

_LARGEST = 2**62  # of numbers that count or measure something

# What schedulers of torch keep in param groups.
_OF_SCHEDULERS = {"initial_lr", "max_lr", "min_lr", "base_momentum", "max_momentum"}

# ---- settings of the param groups ----


def settings(target: CheckpointTarget, saved: Sequence[Mapping[str, Any]], matched: Match) -> list[dict[str, Any]]:
    """For each param group, what it will take over, checked beside what it keeps.

    Raises:
        ValueError: a saved setting is missing or out of bounds.
        TypeError: it has the wrong type.
    """
    result = []
    for number, (group, source) in enumerate(zip(target.optimizer.param_groups, matched.groups, strict=True)):
        kept = (*OWN_SETTINGS, "params", "param_names")
        taken = {} if source is None else {key: value for key, value in saved[source].items() if key not in kept}
        lacking = [
            name for name in DEFAULTS if source is not None and name not in (*taken, *OWN_SETTINGS, *ADDED_LATER)
        ]
        if lacking:
            raise ValueError(f"its param group {source} has no {', '.join(lacking)}.")
        for key in taken.keys() & _OF_SCHEDULERS:
            if _is_number(group.get(key)):
                taken[key] = _plain(taken[key])  # where lr was a tensor, this was one too
                if not _is_number(taken[key]):
                    raise ValueError(
                        f"{key} of its param group {source} should be a number, and is {short(taken[key])}."
                    )
        trial = {**group, **taken}
        if number in matched.block_sizes:
            trial["block_size"] = matched.block_sizes[number]
        normalize(trial)
        if isinstance(group["lr"], Tensor):
            trial["lr"] = torch.full_like(group["lr"], float(trial["lr"]))
            normalize(trial)
        result.append({key: float(trial[key]) if key == "lr" else trial[key] for key in taken})
    return result


def take_over(target: CheckpointTarget, chosen: Sequence[Mapping[str, Any]]) -> None:
    """Give the param groups what `settings` returned."""
    for group, taken in zip(target.optimizer.param_groups, chosen, strict=True):
        for key, value in taken.items():
            if key == "lr" and isinstance(group["lr"], Tensor):
                group["lr"].fill_(value)
            else:
                group[key] = value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and -_LARGEST < value < _LARGEST


# ---- the learning rate scheduler ----


def scheduler(own: Any, state: Any, target: CheckpointTarget) -> None:
    """Load a saved state into a copy of the scheduler.

    A scheduler that cannot be copied loads it in place, and then gets its own state back.

    Raises:
        CheckpointError: it is no state of this scheduler.
    """
    try:
        before = own.state_dict()
        _check_alike(before, state, type(own).__module__.startswith("torch."))
        with _param_groups_kept(target.optimizer):
            try:
                other = copy.deepcopy(own, dict(_shared(own, target)))
            except Exception:  # it holds what cannot be copied
                before = copy.deepcopy(before)
                try:
                    own.load_state_dict(copy.deepcopy(state))
                finally:
                    own.load_state_dict(before)
            else:
                other.load_state_dict(copy.deepcopy(state))
    except Exception as error:
        raise CheckpointError(
            f"The saved state of the learning rate scheduler does not fit a {type(own).__name__}:"
            f" {type(error).__name__}: {error}"
        ) from error


def _shared(own: Any, target: CheckpointTarget) -> Iterator[tuple[int, Any]]:
    """What a copy of a scheduler refers to as the scheduler itself does."""
    things = [target.optimizer, target.wrapper, target.module, *_held(own)]
    ids = {id(own), *map(id, things)}
    for thing in things:
        if isinstance(thing, Optimizer | nn.Module) or hasattr(thing, "param_groups"):
            yield id(thing), thing
        while isinstance(thing, partial):
            thing = thing.func
        if isinstance(thing, MethodType) and id(thing.__self__) not in ids:  # LambdaLR(optimizer, trainer.rate)
            yield id(thing.__self__), thing.__self__


def _held(own: Any, seen: frozenset[int] = frozenset()) -> list[Any]:
    """What a scheduler holds, also in lists, and what schedulers hold that it holds."""
    values = [value for value in getattr(own, "__dict__", {}).values() if id(value) not in seen]
    found = [item for value in values for item in (value if isinstance(value, list | tuple) else [value])]
    seen |= {id(own), *map(id, found)}
    inner = [item for item in found if hasattr(item, "load_state_dict") and hasattr(item, "optimizer")]
    return found + [item for scheduler in inner for item in _held(scheduler, seen)]


@contextmanager
def _param_groups_kept(optimizer: Optimizer) -> Iterator[None]:
    """Whatever a scheduler does to them as it loads."""
    before = [
        {key: value.clone() if key == "lr" and isinstance(value, Tensor) else value for key, value in group.items()}
        for group in optimizer.param_groups
    ]
    standing = [group.get("lr") for group in optimizer.param_groups]
    try:
        yield
    finally:
        for group, kept, lr in zip(optimizer.param_groups, before, standing, strict=True):
            if isinstance(lr, Tensor):
                kept["lr"] = lr.copy_(kept["lr"])
            group.clear()
            group.update(kept)


# How far a scheduler of torch, or of DeepSpeed, has come. What else a state lacks may be of another
# version.
_PROGRESS = ("last_epoch", "base_lrs", "last_batch_iteration")


def _check_alike(own: Any, saved: Any, is_torchs: bool) -> None:
    """Refuse a state of another kind of scheduler.

    torch's schedulers take any dict as their state. A wrong one would fail later, or train
    differently.

    Raises:
        ValueError: an entry that is a number, a string, a list, … here has another type there; or
            the progress is missing.
    """
    if not isinstance(own, dict):
        return
    if not isinstance(saved, dict):
        raise ValueError(f"it should be a dict, and is {short(saved)}")
    for key, value in own.items():
        if key not in saved:
            if key in _PROGRESS:
                raise ValueError(f"it has no {key!r}")
        elif type(value) in (int, float) and type(saved[key]) is type(value) and saved[key] == value:
            continue  # of any size
        elif isinstance(value, str) and saved[key] is None and not is_torchs:
            continue  # a phase that was over
        elif isinstance(value, bool | str | list | tuple | dict):
            kind = dict if isinstance(value, dict) else type(value)
            if not isinstance(saved[key], kind):
                raise ValueError(f"{key!r} should be a {kind.__name__}, and is {short(saved[key])}")
            if isinstance(value, list) and str(key).endswith(("lrs", "_lr")):
                _check_rates(saved[key], len(value), key)
        elif isinstance(value, int | float):
            number = _plain(saved[key])
            if not _is_number(number) and not (isinstance(value, float) and isinstance(number, float)):
                raise ValueError(f"{key!r} should be a number, and is {short(number)}")


def _check_rates(saved: Any, count: int, key: str) -> None:
    if len(saved) != count or not all(_is_number(_plain(value)) for value in saved):
        other = "" if len(saved) == count else " (a schedule of other param groups: load without it)"
        raise ValueError(f"{key!r} should be {count} finite numbers, and is {short(saved)}{other}")


def _plain(value: Any) -> Any:
    """A number of numpy, or a tensor of one element, as a number of Python."""
    one = isinstance(value, np.generic) or (isinstance(value, Tensor) and value.numel() == 1)
    return value.item() if one else value


# ---- what can only be tried in place ----


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """Something of the user's that has a state, as a module's extra state.

    Attributes:
        name: what it is, for errors.
        get: gives its state.
        set: takes one.
        saved: the state that it will take.
    """

    name: str
    get: Callable[[], Any]
    set: Callable[[Any], Any]
    saved: Any

    def restore(self) -> None:
        """Give it the saved state.

        Raises:
            CheckpointError: it does not take it.
        """
        try:
            self.set(copy.deepcopy(self.saved))  # it may keep it, and is given it twice
        except Exception as error:
            raise CheckpointError(f"{self.name} cannot be restored: {type(error).__name__}: {error}") from error


def extra_states(target: CheckpointTarget, saved: Mapping[str, Any], matched: Match) -> list[Part]:
    """The modules whose extra state is restored."""
    return [
        Part(f"The extra state of {name}", part.get_extra_state, part.set_extra_state, saved[old])
        for name, part in targets.with_extra_state(target)
        if (old := matched.extra_states.get(name)) is not None
    ]


class Tried:
    """Parts that have been given their saved states, and remember what they had."""

    def __init__(self) -> None:
        self._before: list[tuple[Part, Any]] = []

    def attempt(self, parts: Sequence[Part]) -> None:
        """Give each its saved state.

        Raises:
            CheckpointError: one does not take it; `put_back` then.
        """
        for part in parts:
            try:
                before = copy.deepcopy(part.get())
            except Exception:
                continue  # what cannot be put back is not tried: it is restored when all else is
            self._before.append((part, before))
            part.restore()

    def put_back(self) -> None:
        """Give them what they had before."""
        for part, before in reversed(self._before):
            try:
                part.set(before)
            except Exception as error:
                logger.error("%s does not take back what it had: %s", part.name, error)
        self._before.clear()
