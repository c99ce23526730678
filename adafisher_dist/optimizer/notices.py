"""What an optimizer logs of its own accord, on the first rank alone, and not again and again."""

from __future__ import annotations

import logging
from collections.abc import Iterable

from adafisher_dist.optimizer.registry import ParameterRegistry

logger = logging.getLogger("adafisher_dist")


class Notices:
    """Of one optimizer."""

    def __init__(self, registry: ParameterRegistry) -> None:
        self._registry = registry
        self._told_of_betas = False
        self._told: set[str] = set()
        self.told_of_no_gradients = False

    def betas(self, notice: str | None) -> None:
        """How Adam's betas were taken: once, however many param groups have them."""
        if notice is not None and not self._told_of_betas:
            self._told_of_betas = True
            if self._registry.ranks().is_first:
                logger.warning("%s", notice)

    def doubts(self, told: Iterable[str]) -> None:
        """Settings that are hardly meant: each once, however many param groups have it."""
        for doubt in told:
            self._once(doubt)

    def left_out(self, keys: Iterable[object]) -> None:
        """Entries of `state` that are not AdaFisher's, where it alone is saved."""
        if names := ", ".join(sorted(set(map(repr, keys)))):
            self._once(f"{names} in optimizer.state is not AdaFisher's: what is saved leaves it out.")

    def _once(self, told: str) -> None:
        if told not in self._told:
            self._told.add(told)
            if self._registry.ranks().is_first:
                logger.warning("AdaFisher: %s", told)

    def skipped(self, count: int) -> None:
        """A step changed nothing: logged for the 1st, 2nd, 4th, 8th, … such step.

        So a run that only skips neither stays silent nor fills the disk.
        """
        if self._registry.ranks().is_first and count.bit_count() == 1:
            logger.warning(
                "AdaFisher skipped a step: a gradient was NaN, infinite, or too large to square (%d skipped so far)."
                " No parameter or state changed.",
                count,
            )

    def no_gradients(self) -> None:
        """A step in which no parameter has a gradient, where none ever had one."""
        if not self._registry.shards and not self.told_of_no_gradients:
            self.told_of_no_gradients = True
            logger.warning(
                "AdaFisher.step() found no gradient on any parameter, so nothing moves. Call backward() before it, and"
                " zero_grad() after it. If the model was sharded or its parameters replaced (fully_shard, …) after the"
                " optimizer was built, build the optimizer last. If FSDP2 accumulates gradients, call"
                " set_requires_gradient_sync(True) before the last backward()."
            )
