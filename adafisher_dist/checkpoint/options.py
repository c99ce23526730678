"""How to load, what will be applied, and what was found."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adafisher_dist.checkpoint.dry_run import Part

IGNORED = object()
_REMEDY = (
    "For renamed parameters give rename={old name: new name}; to restore what fits and be told of the rest,"
    " strict=False."
)


@dataclass(frozen=True, slots=True)
class Options:
    """How to load; see `load_checkpoint`.

    Attributes:
        strict: refuse what does not fit.
        rename: names in the checkpoint → names in the model.
        verify: check the checksums.
        weights: restore parameters and buffers.
        states: restore the optimizer.
        random: restore the random number generators.
        remedy: what the error for what does not fit advises.
        lr_scheduler: restore this scheduler, or ignore what the checkpoint has of one.
        more: given the other values by name, checks those that its caller will apply, and returns
            what else is to be restored; a ValueError tells what is wrong with them.
    """

    strict: bool = True
    rename: Mapping[str, str] | None = None
    verify: bool = True
    weights: bool = True
    states: bool = True
    random: bool = True
    remedy: str = _REMEDY
    lr_scheduler: Any = IGNORED
    more: Callable[[Mapping[str, Any]], list[Part]] = lambda _: []

    @property
    def parts(self) -> Set[str]:
        """What the load writes: "weights", "state", or both."""
        return {name for name, wanted in (("weights", self.weights), ("state", self.states)) if wanted}


@dataclass(slots=True)
class Loaded:
    """What a load found.

    Folder, manifest, the other values by name, what was not restored, and what had been left out.
    """

    folder: Path
    about: Mapping[str, Any]
    values: dict[str, Any] = field(default_factory=dict)
    not_restored: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)


@dataclass(slots=True)
class Checked:
    """What this rank will apply, all of it tried.

    Attributes:
        settings: of each param group.
        scheduler: the scheduler's state; None where none is restored.
        random: this rank's random state; None where none is restored.
        parts: what can only be tried in place.
    """

    settings: list[dict[str, Any]] = field(default_factory=list)
    scheduler: Any = None
    random: dict[str, Any] | None = None
    parts: list[Part] = field(default_factory=list)
