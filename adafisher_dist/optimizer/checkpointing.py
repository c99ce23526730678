"""All that a checkpoint may ask of an optimizer, and do to it."""

from __future__ import annotations

from collections.abc import Sequence, Set
from typing import TYPE_CHECKING, Any

from torch import Tensor

from adafisher_dist import layouts
from adafisher_dist.comm.host_groups import HostGroup
from adafisher_dist.layouts.storage import ParameterInfo, Storage
from adafisher_dist.optimizer import state_dicts
from adafisher_dist.optimizer.consolidated import as_dtensors
from adafisher_dist.state.shard import Shard

if TYPE_CHECKING:
    from adafisher_dist.optimizer.adafisher import AdaFisher


class CheckpointAccess:
    """An optimizer, as checkpoints see it."""

    def __init__(self, optimizer: AdaFisher) -> None:
        self._registry = optimizer._registry
        self._optimizer = optimizer

    def parameters(self) -> list[tuple[Tensor, ParameterInfo]]:
        """Those that it was given, in order, and how."""
        return list(self._registry.given_parameters.items())

    @property
    def shards(self) -> list[Shard]:
        """Where their state is; counters are right."""
        return self._registry.shards

    def hosts(self, purpose: str, error: type[Exception]) -> HostGroup:
        """The ranks that save and load together; see `host_groups.host_group`."""
        return layouts.host_group_of(self._registry.given_parameters, self._registry.process_group, purpose, error)

    def storages_of(self, tensors: Sequence[Tensor], wrapper: Any) -> list[Storage]:
        """What each rank stores of the parameters, or of what a DeepSpeed wrapper put there."""
        return self._registry.storages_of(list(tensors), wrapper)

    def sync_param_groups(self) -> None:
        """Take note of what has been put into the param groups, and taken out of them."""
        self._registry.sync_param_groups()

    # ---- a save ----

    def check_complete(self) -> None:
        """Refuse a state that a failed step or load left incomplete.

        Raises:
            RuntimeError: it is.
        """
        self._registry.stepper.check_complete()

    def gather_state(self) -> None:
        """Take over the state that the user has set, and that of a copied optimizer."""
        registry = self._registry
        registry.drop_unused_shards()
        entries = [(tensor, self._optimizer.state.get(tensor, {})) for tensor in registry.given_parameters]
        self._optimizer._notices.left_out(key for _, entry in entries for key in state_dicts.foreign_part(entry))
        waiting = [tensor for tensor, entry in entries if state_dicts.own_part(entry)]
        registry.init_shards([tensor for tensor in waiting if tensor not in registry.stepper])
        registry.sync_user_state(registry.shards)

    def whole_state(self) -> dict[int, dict[str, Tensor]]:
        """By each stored tensor's id, its state; DTensors where ranks hold parts. A collective."""
        return as_dtensors(self._registry)

    # ---- a load ----

    def begin_load(self) -> None:
        """Drop the present state, to use its memory for the new one, and mark it incomplete."""
        weights = self._registry.stepper.incomplete & {"weights"}  # of a load before, which reset_state() forgets
        self._optimizer.reset_state()
        self.mark_incomplete(weights | {"state"})

    def mark_incomplete(self, parts: Set[str]) -> None:
        """No step is taken until a load completes these: "weights", "state"."""
        self._registry.stepper.incomplete |= parts

    def new_shards(self, tensors: Sequence[Tensor], wrapper: Any, zeroed: bool) -> list[Shard]:
        """Shards without any step, whose state is to be read; `zeroed` where not all of it is."""
        return self._registry.replan(list(tensors), wrapper, zeroed)

    def install(self, shards: Sequence[Shard], skipped_steps: int) -> None:
        """Let the optimizer go on with these."""
        for shard in shards:
            self._registry.install(shard)
        self._registry.stepper.skipped = skipped_steps

    def end_load(self, parts: Set[str]) -> None:
        """All ranks have read all of these: "weights", "state"."""
        self._registry.stepper.incomplete -= parts
