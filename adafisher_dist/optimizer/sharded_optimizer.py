"""What torch.optim asks of an optimizer with sharded state: param groups, state dicts, copies."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch._compile import _disable_dynamo
from torch.optim import Optimizer

from adafisher_dist import layouts
from adafisher_dist.adamw_keys import translate_group
from adafisher_dist.comm.deferred_errors import DeferredErrors
from adafisher_dist.layouts.deepspeed_wrappers import register_with_deepspeed
from adafisher_dist.optimizer import offloading, state_dicts
from adafisher_dist.optimizer.consolidated import Consolidated, consolidate, for_torch_checkpoint
from adafisher_dist.optimizer.notices import Notices
from adafisher_dist.optimizer.registry import ParameterRegistry
from adafisher_dist.settings import OF_ALL_GROUPS, doubts_of, normalize
from adafisher_dist.state.shard import Shard
from adafisher_dist.stepping.consistency import raise_if_any_failed

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup  # noqa: TID251 (a type)
    from torch.optim.optimizer import ParamsT


class ShardedOptimizer(Optimizer):
    """What AdaFisher inherits: all but its settings, its step and its statistics."""

    # While DeepSpeed saves its files beside a sharded checkpoint: the state dict says so, and has
    # no state.
    _state_is_elsewhere = False

    def __init__(self, params: ParamsT, defaults: dict[str, Any], process_group: ProcessGroup | None) -> None:
        self._begin(process_group)
        super().__init__(params, defaults)

    def _begin(self, process_group: ProcessGroup | None) -> None:
        self._registry = ParameterRegistry(self, process_group)
        self._notices = Notices(self._registry)
        self._reset()

    def _reset(self) -> None:
        self._registry.forget_shards(self._registry.stepper.meter)
        self._consolidated: Consolidated | None = None  # since the last step
        self._notices.told_of_no_gradients = False

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a param group; only fisher_dtype and memory_budget_gb must equal the defaults.

        Raises:
            TypeError: a parameter is complex, or needs a gradient and is not floating-point; a
                setting has the wrong type.
            ValueError: a setting is out of bounds, looks misspelt, or asks for what AdaFisher does
                not do.
            UnsupportedLayoutError: a parameter's layout is not supported.
        """
        notice = None
        if isinstance(param_group, dict):
            param_group, notice = translate_group(param_group, self.defaults)
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            normalize(group)
            for key in OF_ALL_GROUPS:
                if group[key] != self.defaults[key]:
                    raise ValueError(
                        f"{key} is one for the whole optimizer ({self.defaults[key]}), but a param group asks for"
                        f" {group[key]}. Use two optimizers."
                    )
            self._registry.check(len(self.param_groups) - 1)
        except Exception:
            self.param_groups.pop()
            raise
        self._registry.register(len(self.param_groups) - 1)
        self._notices.betas(notice)
        self._notices.doubts(doubts_of(group))

    def state_dict(self) -> dict[str, Any]:
        """The state as torch.optim has it; docs/reference.md lists the keys.

        In the replicated layout on several ranks a rank holds only its own blocks, so
        `consolidate_state_dict` must have been called, on all ranks, since the last step. Under
        ZeRO-1 to 3 and FSDP2 it is this rank's part, and says so.

        Raises:
            RuntimeError: the state is sharded and was not consolidated.
        """
        self._registry.stepper.check_complete()
        if self._state_is_elsewhere:
            return state_dicts.without_state(super().state_dict()["param_groups"])
        self._registry.sync_param_groups()
        if layouts.is_called_by_torch_checkpoint():
            return self._with_state(for_torch_checkpoint(self._registry, self._consolidated))
        self._registry.sync_user_state(self._registry.shards)
        shards = self._registry.shards
        if state_dicts.is_partial(shards) or not any(shard.storage.group.size > 1 for shard in shards):
            self._consolidated = None
            return {**self._packed(self._standing()), state_dicts.META: state_dicts.describe(shards)}
        if self._consolidated is None:
            raise RuntimeError(
                "This rank holds only its own blocks, so its state_dict() would not be the whole state. Call"
                " optimizer.consolidate_state_dict() on all ranks first, after the last step, then state_dict() on the"
                " rank that saves."
            )
        whole = self._with_state(self._consolidated)
        if self._consolidated.on_rank is None:
            for tensor, entry in _saved_states(self.param_groups, whole):
                entry.update(state_dicts.foreign_part(self.state.get(tensor, {})))
        return whole

    def _with_state(self, whole: Consolidated) -> dict[str, Any]:
        """A state dict with this state in the place of the optimizer's own."""
        chosen = {tensor: dict(whole.entries[id(tensor)]) for tensor in self._standing() if id(tensor) in whole.entries}
        return {**self._packed(chosen), state_dicts.META: whole.about}

    def _standing(self) -> dict[Any, Any]:
        """`state` but for parameters that stand in no param group, which torch could not pack."""
        here = {id(tensor) for group in self.param_groups for tensor in group["params"]}
        return {key: value for key, value in self.state.items() if not isinstance(key, Tensor) or id(key) in here}

    def _packed(self, state: dict[Any, Any]) -> dict[str, Any]:
        own = self.state
        try:  # the base class packs whatever `state` holds
            self.state = type(own)(dict, state)
            return super().state_dict()
        finally:
            self.state = own

    def consolidate_state_dict(self, to: int | None = 0) -> None:
        """Collect the whole state on the CPU of rank `to` (None: all) for the next `state_dict()`.

        A collective: all ranks of the process group must call it, and `to` is a rank of that group.
        The copy is dropped by the next step. On the other ranks `state_dict()` then has an empty
        state, which `load_state_dict` refuses.

        Raises:
            ValueError: the group has no rank `to`.
            RuntimeError: on all ranks: one of them has no room for it; or the parameters themselves
                are sharded (ZeRO-1 to 3, FSDP2), and with them the state; or ranks did not come
                within the timeout of the process group.
        """
        self._consolidated = consolidate(self._registry, to)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` returned; bit for bit where the layout is the same.

        A whole state dict loads on any number of ranks of the replicated layout: each rank takes
        its own blocks. Settings of the param groups are restored too, as in torch.optim. Nothing
        changes if an error is raised.

        Raises:
            ValueError: the state does not fit the parameters, or is one rank's part of another
                layout.
        """
        prepared: list[Shard] = []
        others: dict[Tensor, dict[str, Any]] = {}

        def prepare_load(_: Optimizer, saved: dict[str, Any]) -> dict[str, Any]:
            prepared.extend(_shards_with(self._registry, saved))
            for tensor, entry in _saved_states(self.param_groups, saved):
                if foreign := state_dicts.foreign_part(entry):
                    others[tensor] = {key: _on(tensor, value) for key, value in foreign.items()}
            numbers = {number for group in saved["param_groups"] for number in group["params"]}
            own = {
                key: entry for key, entry in saved["state"].items() if key not in numbers
            }  # a user's, of no parameter
            return {**saved, "state": own, "param_groups": _completed(self._registry, saved["param_groups"])}

        def install(_: Optimizer) -> None:
            self._reset()
            self.defaults |= {key: self.param_groups[0][key] for key in OF_ALL_GROUPS}
            self._registry.groups = self.param_groups
            for shard in prepared:
                self._registry.install(shard)
            for tensor, entry in others.items():
                self.state[tensor].update(entry)

        # As hooks, so that the user's own hooks see what they would with any other optimizer.
        before = self.register_load_state_dict_pre_hook(prepare_load)
        after = self.register_load_state_dict_post_hook(install, prepend=True)
        try:
            super().load_state_dict(state_dict)
        finally:
            before.remove()
            after.remove()

    def __getstate__(self) -> dict[str, Any]:
        """For copy and pickle.

        Raises:
            RuntimeError: the state is sharded over ranks, or a process group was given: neither can
                leave the process.
        """
        if self._registry.process_group is not None or any(
            shard.storage.group.size > 1 for shard in self._registry.shards
        ):
            raise RuntimeError(
                "An AdaFisher that shares its blocks with other ranks cannot be copied or pickled: this rank holds only"
                " a part. Use consolidate_state_dict() and state_dict()."
            )
        self._registry.sync_user_state(self._registry.shards)
        # Copies: a view would drag along the whole stack that it is a part of.
        own = {
            tensor: {key: _copied(value) for key, value in entry.items()} if isinstance(tensor, Tensor) else entry
            for tensor, entry in self.state.items()
        }
        return {**super().__getstate__(), "state": type(self.state)(dict, own), "skipped_steps": self.skipped_steps}

    def __setstate__(self, saved: dict[str, Any]) -> None:
        """From copy, pickle, and torch's own load_state_dict."""
        saved = dict(saved)
        skipped = saved.pop("skipped_steps", None)
        if skipped is not None:  # a copy: the tensors are new, and its state waits in `state` for the next step
            self._begin(None)
            self._registry.stepper.skipped = skipped
        super().__setstate__(saved)
        if skipped is not None:
            self._registry.register_all()
            register_with_deepspeed(self, built=False)

    @property
    def skipped_steps(self) -> int:
        """Steps that were skipped for a gradient that was not finite or too large to square.

        Where a GPU's kernels find that, the host learns of it at the next call of `step`, or here;
        this waits for it.
        """
        self._registry.stepper.resolve_pending()
        return self._registry.stepper.skipped

    @_disable_dynamo  # which traces no memory that is taken from under a tensor
    def offload_state(self, pin_memory: bool = True) -> None:
        """Move this rank's state to the host, and free it and all buffers on the device.

        For phases that do not train, as generation in RLHF. Call it on all ranks, and
        `reload_state` before the next step, save or state dict, which are errors until then.
        Training goes on bit for bit. `state`, and state dicts that were made before, show the
        copies meanwhile. State on a CPU whose memory a numpy array shares, as after a save or a
        load, stays where it is.

        Args:
            pin_memory: page-lock the copies of what is on an accelerator: faster, and the host
                cannot swap them out.

        Raises:
            RuntimeError: a step or a load failed half-way.
        """
        self._registry.stepper.check_complete()
        offloading.to_host(self._registry, pin_memory)

    @_disable_dynamo
    def reload_state(self) -> None:
        """Bring back what `offload_state` moved; does nothing where it did not.

        If entries of `state` were replaced meanwhile, the next step uses the new ones, as always.
        """
        offloading.to_device(self._registry)

    def reset_state(self) -> None:
        """Forget momentum, Fisher blocks and counters, not settings. Call it on all ranks."""
        self.state.clear()
        self._reset()


# ---- loading a state dict: checked, and put into new shards, before the optimizer is touched ----


def _shards_with(registry: ParameterRegistry, saved: Mapping[str, Any]) -> list[Shard]:
    """Shards that hold a saved state; the optimizer itself is not touched."""
    state_dicts.check_format(saved)
    registry.sync_param_groups()
    given = [tensor for group in registry.optimizer.param_groups for tensor in group["params"]]
    lengths, saved_lengths = (
        [len(group["params"]) for group in groups]
        for groups in (registry.optimizer.param_groups, saved["param_groups"])
    )
    if lengths != saved_lengths and state_dicts.is_whole(saved):
        return []  # torch's own check reports it
    states = {id(tensor): entry for tensor, entry in _saved_states(registry.optimizer.param_groups, saved)}
    if any(map(state_dicts.own_part, states.values())):  # what has others' entries alone had no step
        states = {key: entry for key, entry in states.items() if not entry or state_dicts.own_part(entry)}
    if not states:
        return []
    chosen = [tensor for tensor in given if id(tensor) in states]
    shards: list[Shard] = []

    def check() -> None:
        shards.extend(registry.build_shards(chosen, _completed(registry, saved["param_groups"])))
        state_dicts.check_part(saved, shards)
        for shard in shards:
            for index, tensor in enumerate(shard.storage.tensors):
                if states[id(tensor)]:
                    state_dicts.check(shard, index, states[id(tensor)], own=not state_dicts.is_whole(saved))
                elif layouts.is_called_by_torch_checkpoint():
                    raise ValueError(
                        f"torch.distributed.checkpoint brought no state for {shard.storage.name_of(index)}: it takes"
                        " the names in a flat state dict from what the optimizer has, which was nothing. Call"
                        " get_optimizer_state_dict(model, optimizer) before set_optimizer_state_dict."
                    )

    errors = DeferredErrors()
    errors.attempt(check)
    if any(layouts.is_dtensor(value) for entry in states.values() for value in entry.values()):
        raise_if_any_failed(registry.ranks(), errors, "before it took over a saved state")
    elif errors.error is not None:
        raise errors.error
    for shard in shards:
        for index, tensor in enumerate(shard.storage.tensors):
            state_dicts.restore(shard, index, states[id(tensor)], own=not state_dicts.is_whole(saved))
    return shards


def _saved_states(groups: list[dict[str, Any]], saved: Mapping[str, Any]) -> list[tuple[Tensor, dict[str, Any]]]:
    """The parameters, in order, that a state dict has an entry for."""
    own = [tensor for group in groups for tensor in group["params"]]
    numbers = [number for group in saved["param_groups"] for number in group["params"]]
    return [(t, saved["state"][n]) for t, n in zip(own, numbers, strict=False) if n in saved["state"]]


def _on(tensor: Tensor, value: Any) -> Any:
    return value.to(tensor.device) if isinstance(value, Tensor) else value


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else copy.copy(value)


def _completed(registry: ParameterRegistry, saved: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Saved param groups, checked; settings that an older version lacked are the optimizer's."""
    if len(saved) != len(registry.optimizer.param_groups):
        return saved  # torch's own check reports it
    result = [{**now, **then} for now, then in zip(registry.optimizer.param_groups, saved, strict=True)]
    for group in result:
        normalize(group)
    return result
