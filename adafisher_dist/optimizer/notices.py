"""What an optimizer logs of its own accord, on the first rank alone, and not again and again."""

from __future__ import annotations

import logging
from collections.abc import Iterable

from adafisher_dist.blocks.grid import doubtful_tables
from adafisher_dist.layouts.storage import whole_shape
from adafisher_dist.optimizer.registry import ParameterRegistry
from adafisher_dist.settings import normalized

logger = logging.getLogger("adafisher_dist")


class Notices:
    """Of one optimizer."""

    def __init__(self, registry: ParameterRegistry) -> None:
        self._registry = registry
        self._told_of_betas = False
        self._told: set[str] = set()
        self.told_of_no_gradients = False
        self._looked_at = 0, 0  # the parameters whose shapes were, and their groups

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

    def tables(self) -> None:
        """Tables that may be hidden layers: each shape once, with the remedy."""
        given = self._registry.given_parameters
        looked_at = id(given), len(self._registry.groups)
        if looked_at == self._looked_at:  # DeepSpeed steps them in parts, each of which is new once
            return
        self._looked_at = looked_at
        groups = map(normalized, self._registry.groups)
        by_shape = [group["block_grid"] == "rows" and group["max_blocks"] is None for group in groups]
        shapes = [whole_shape(p) for p, info in given.items() if by_shape[info.group] and p.requires_grad]
        for shape, count in doubtful_tables(shapes):
            self._once(
                f"parameters of shape {shape}, {count} matrices in all, have no blocks and are updated as by Adam,"
                " since one side is so much longer than the other, as in a vocabulary's table. If they are hidden"
                " layers, give them a param group with max_blocks=10**9, and they get blocks."
            )

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
            remedy = (
                " If this goes on, the weights have diverged: load a checkpoint, and lower lr." if count > 1 else ""
            )
            logger.warning(
                "AdaFisher skipped a step: a gradient was NaN, infinite, or too large to square (%d skipped so far)."
                " No parameter or state changed." + remedy,
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
