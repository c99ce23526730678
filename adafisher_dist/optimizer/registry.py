"""Which parameters an optimizer was given, and which shards hold their state."""

from __future__ import annotations

import logging
import math
import weakref
from operator import is_
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.optim import Optimizer

from adafisher_dist import layouts
from adafisher_dist.comm import collectives
from adafisher_dist.comm.deferred_errors import DeferredErrors
from adafisher_dist.layouts.storage import GivenParameters, Storage
from adafisher_dist.numerics import fisher
from adafisher_dist.numerics.block_step import waits_for_nothing
from adafisher_dist.optimizer import replaced_parameters, state_dicts
from adafisher_dist.optimizer.auto_block_size import choose_block_size
from adafisher_dist.settings import is_auto, normalized, state_config
from adafisher_dist.state import offload
from adafisher_dist.state.shard import Shard, build
from adafisher_dist.stepping.agreement import OfAllParts
from adafisher_dist.stepping.metrics import Meter
from adafisher_dist.stepping.step import Stepper

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup  # noqa: TID251 (a type)

logger = logging.getLogger("adafisher_dist")


_Changed = tuple[Shard, int, Any]  # a stored tensor's shard, its number there, and its entry in `state`


class ParameterRegistry:
    """An optimizer's parameters, and the shards that hold their state.

    `param_groups` and `state` belong to torch.

    Attributes:
        process_group: the user's.
        given_parameters: the parameters that it was given.
        groups: all its param groups; DeepSpeed takes some away while it steps one.
        stepper: takes the steps of the shards that hold their state.
        prebuilt: of those, the ones that were made before their parameters had a gradient, to be
            shown to torch's checkpoint functions.
    """

    def __init__(self, optimizer: Optimizer, process_group: ProcessGroup | None) -> None:
        self._optimizer = weakref.ref(optimizer)  # which has this: a cycle would keep all memory until a collection
        self.process_group = process_group
        self.given_parameters = GivenParameters()
        self.groups: list[dict[str, Any]] = []
        self.join_contexts = layouts.JoinContexts()
        self._told_of_absent = 0
        self.forget_shards()

    def forget_shards(self, meter: Meter | None = None) -> None:
        """Begin without any; `meter` goes on, without a step that it has not told of."""
        if meter is not None:
            meter.forget()
        self.stepper = Stepper(meter)
        self.prebuilt: list[Shard] = []

    @property
    def optimizer(self) -> Optimizer:
        """Whose parameters they are."""
        optimizer = self._optimizer()
        assert optimizer is not None, "the optimizer is gone"
        return optimizer

    @property
    def shards(self) -> list[Shard]:
        """In the order in which their tensors first had a gradient."""
        return self.stepper.shards

    @property
    def is_sharded(self) -> bool:
        """Whether a parameter that was given, or has had a gradient, is sharded itself."""
        return any(layouts.is_dtensor(tensor) for tensor in self.given_parameters) or state_dicts.is_partial(
            self.shards
        )

    def current_tensors(self) -> list[tuple[Shard, int, Tensor]]:
        """The stored tensors in the param groups: shard, number in the shard, and tensor."""
        return [(s, i, t) for s in self.shards for i, t in enumerate(s.storage.tensors) if s.stands(i)]

    def init_shards(self, tensors: list[Tensor]) -> None:
        """Build shards for tensors that have none yet."""
        storages = self.storages_of(tensors)
        if storages:
            choose_block_size(storages, self.given_parameters, self.groups, self.ranks())
        for shard in self._build(storages, self.optimizer.param_groups):
            # A copied or unpickled optimizer has a state, but no shard.
            for index, tensor in enumerate(shard.storage.tensors):
                own = state_dicts.own_part(self.optimizer.state.get(tensor, {}))
                state_dicts.restore(shard, index, own, own=True)
            self.install(shard)

    def begin_step(self, errors: DeferredErrors) -> tuple[dict[int, dict[str, Any]], list[Tensor]]:
        """Param groups of tensors with a gradient, by tensor id; and those tensors without state.

        What libraries have put into the param groups and into `state` is taken over, as far as
        there is no error.
        """
        groups = self.optimizer.param_groups
        active = [(tensor, group) for group in groups for tensor in group["params"] if tensor.grad is not None]
        errors.attempt(self.sync_param_groups)
        errors.attempt(self.drop_unused_shards)
        new = [tensor for tensor, _ in active if tensor not in self.stepper]
        return {id(tensor): group for tensor, group in active}, new

    def forget_unstepped(self) -> None:
        """Drop the state of tensors whose shards were planned in a failed step and are gone."""
        for tensor, entry in list(self.optimizer.state.items()):
            step = entry.get("step") if isinstance(tensor, Tensor) else None  # users may have entries of their own
            if tensor not in self.stepper and step is not None and not step.any():
                self._forget(tensor)

    def install(self, shard: Shard) -> None:
        """Take a shard in, and show its state in the optimizer's."""
        self.stepper.add(shard)
        for index, tensor in enumerate(shard.storage.tensors):
            self._show(tensor, shard.views[index])

    def _forget(self, tensor: Tensor) -> None:
        others = state_dicts.foreign_part(self.optimizer.state.pop(tensor, {}))
        if others:
            self.optimizer.state[tensor] = others

    def _show(self, tensor: Tensor, views: dict[str, Tensor]) -> None:
        others = state_dicts.foreign_part(self.optimizer.state.get(tensor, {}))
        self.optimizer.state[tensor] = {**views, **others}

    def sync_param_groups(self) -> None:
        """Take note of parameters that were put into the param groups or taken out. Local.

        Does nothing under DeepSpeed. Before there is a state: Accelerate builds the optimizer,
        shards the model by FSDP2, and writes the new parameters into `param_groups`, each where the
        old one stood; Lightning adds groups before it loads. Afterwards nn.Parameters may be
        replaced, added or removed, as `replaced_parameters` describes. What other wrappers put
        there is no nn.Parameter, or has another shape; `layouts` refuses it.
        """
        groups = self.optimizer.param_groups
        given, state = self.given_parameters, self.optimizer.state
        if given.stands_as(groups) and not replaced_parameters.absence_ended(self.stepper.planned, given, state):
            return
        held = [tensor for shard in self.stepper.planned for tensor in shard.active_tensors]
        if any(given.find(tensor) is None for tensor in held):  # DeepSpeed's, in the parameters' places
            return
        current_tensors = [tensor for group in groups for tensor in group["params"]]
        new = [tensor for tensor in current_tensors if given.find(tensor) is None and tensor not in self.stepper]
        here = set(map(id, current_tensors))
        gone = [tensor for tensor in self.given_parameters if id(tensor) not in here]
        if not self._may_sync(current_tensors, new, gone, held):
            return
        replacements = replaced_parameters.find_replacements(self.shards, given, groups, new, state)
        given_parameters = self._list_parameters()  # may refuse; nothing has changed by then
        misfits = replaced_parameters.misfits(self.shards, given_parameters, groups)
        if misfits and self.ranks().is_first:
            logger.warning(replaced_parameters.FORGOTTEN, len(misfits), misfits[0][0].storage.name_of(misfits[0][1]))
        for shard, index, successor in [*replacements, *misfits]:
            old = shard.storage.tensors[index]
            replaced_parameters.replace_tensor(shard, index, successor)
            self.stepper.replace(old, successor)
            state.pop(old, None)
        self.given_parameters, self.groups = given_parameters, groups
        absent = replaced_parameters.settle(self.shards, given_parameters)
        if len(absent) >= max(1, 2 * self._told_of_absent):
            self._told_of_absent = len(absent)
            if self.ranks().is_first:
                logger.warning(replaced_parameters.KEPT, len(absent), absent[0])

    def _may_sync(
        self, current_tensors: list[Tensor], new: list[Tensor], gone: list[Tensor], held: list[Tensor]
    ) -> bool:
        """Whether the param groups have changed in a way that is not a wrapper's."""
        if not current_tensors or not all(isinstance(tensor, nn.Parameter) for tensor in new):
            return False
        if new and gone and not held and not self.given_parameters.could_be(current_tensors):
            return False
        return not layouts.is_called_by_deepspeed(self.optimizer)

    def sync_user_state(self, shards: list[Shard]) -> None:
        """Take over what the user put into `state`: copy replaced entries, reset removed ones.

        Libraries move or reset an optimizer's state by replacing what is in there, and the shards
        hold the original. It is an error where these are offloaded.
        """
        offload.refuse(shards)
        changed = []
        for shard in shards:
            for index, tensor in enumerate(shard.storage.tensors):
                views, entry = shard.views[index], self.optimizer.state.get(tensor)
                if index in shard.removed or (entry is None and index in shard.absent):
                    continue
                if entry is not None and len(entry) == len(views) and all(map(is_, entry.values(), views.values())):
                    continue  # as nearly always
                own = None if entry is None else state_dicts.own_part(entry)
                if entry and not own and views["step"].any():
                    own = entry  # renamed, say: it is told of as what does not fit
                if own is None or not (own.keys() == views.keys() and all(own[k] is views[k] for k in views)):
                    changed.append((shard, index, own))
        if changed:  # or what the last step counted would be undone later, if it turns out not to count
            self.stepper.resolve_pending([shard for shard, _, _ in changed])
        for shard, index, entry in self._apart(changed):
            if entry:
                state_dicts.restore(shard, index, entry, own=True)
            else:
                for value in shard.views[index].values():
                    value.zero_()
            self._show(shard.storage.tensors[index], shard.views[index])

    def _apart(self, changed: list[_Changed]) -> list[_Changed]:
        """The same, with copies of values that lie in a shard's own memory.

        Another entry may be about to overwrite those.
        """
        if not any(entry for _, _, entry in changed):
            return changed
        ours = {_memory(value) for shard in self.shards for views in shard.views for value in views.values()}

        def copied(value: Any) -> Any:
            plain = isinstance(value, Tensor) and not layouts.is_dtensor(value)
            return value.clone() if plain and _memory(value) in ours else value

        return [(s, i, {key: copied(value) for key, value in (entry or {}).items()}) for s, i, entry in changed]

    # ---- for torch's checkpoint functions ----

    def init_missing_shards(self) -> None:
        """Build shards for trainable parameters that have none, to have a state to load into.

        A training step drops those that no state was loaded into: it plans as if nobody had asked.
        """
        groups = self.optimizer.param_groups
        trainable = [tensor for group in groups for tensor in group["params"] if tensor.requires_grad]
        before = self.shards
        self.init_shards([tensor for tensor in trainable if tensor not in self.stepper])
        self.prebuilt += [shard for shard in self.shards if shard not in before]

    def drop_unused_shards(self) -> None:
        """Forget the shards of `init_missing_shards` without a step: no state was put into them."""
        self.sync_user_state(self.prebuilt)
        unused = [shard for shard in self.prebuilt if not shard.stepped]
        for shard in unused:
            for tensor in shard.active_tensors:
                self._forget(tensor)
        self.stepper.drop(unused)
        self.prebuilt = []

    def storages_of(self, tensors: list[Tensor], wrapper: Any = None) -> list[Storage]:
        """What each rank stores of the parameters, or of what a known wrapper put there."""
        if not tensors:
            return []
        return layouts.storages(self.optimizer, tensors, self.given_parameters, self.process_group, wrapper)

    def replan(self, tensors: list[Tensor], wrapper: Any, zeroed: bool) -> list[Shard]:
        """Shards without any step for these tensors, with the param groups' present settings.

        A tensor's group is that of its parameters: ZeRO-3 empties the param groups between steps.
        See `block_stack.allocate` for `zeroed`.
        """
        storages = self.storages_of(tensors, wrapper)
        numbers = {id(s.tensors[p.tensor]): p.info.group for s in storages for p in s.parameters}
        return self._build(storages, self.optimizer.param_groups, numbers, zeroed)

    def build_shards(self, tensors: list[Tensor], groups: list[dict[str, Any]]) -> list[Shard]:
        """Shards without any step for these tensors, with the settings of the given groups."""
        return self._build(self.storages_of(tensors), groups)

    def _build(
        self, storages: list[Storage], groups: list[dict[str, Any]], numbers: dict[int, int] | None = None,
        zeroed: bool = True,
    ) -> list[Shard]:  # fmt: skip
        """Plan and allocate shards with the settings of `groups`, which may be about to be loaded.

        `numbers` tells each tensor's group, by default where it stands now: DeepSpeed hides some
        groups in a step.
        """
        if numbers is None:
            current_tensors = enumerate(self.optimizer.param_groups)
            numbers = {id(tensor): number for number, group in current_tensors for tensor in group["params"]}
        shards = []
        for storage in storages:
            mine = [numbers[id(tensor)] for tensor in storage.tensors]
            order = sorted(set(mine))
            configs = [state_config(normalized(groups[number])) for number in order]
            shards.append(build(storage, [order.index(number) for number in mine], configs, zeroed))
        return shards

    def of_all_parts(self) -> OfAllParts:
        """What holds for the blocks of all param groups."""
        own = [state_config(normalized(group)) for group in self.groups]
        sized = [config for config in own if not is_auto(config.block_size)]
        limit = min((fisher.gradient_limit(s.compute_dtype, s.block_size) for s in sized), default=math.inf)
        return OfAllParts(limit, all(map(waits_for_nothing, own)))

    def ranks(self) -> collectives.Group:
        """The ranks that take each step together: the device mesh's, or the process group's."""
        return layouts.mesh_group(self.given_parameters) or collectives.join(self.process_group)

    def register_all(self) -> None:
        """Register anew what stands in the param groups now."""
        self.given_parameters, self.groups = self._list_parameters(), self.optimizer.param_groups

    def register(self, group: int) -> None:
        """Register the parameters of a param group."""
        self.groups = self.optimizer.param_groups
        for index, tensor in enumerate(self.groups[group]["params"]):
            self.given_parameters.add(tensor, self.name(group, index), group)

    def check(self, group: int) -> None:
        """Refuse a parameter of a param group that cannot be trained.

        Raises:
            TypeError: it is complex. Integers, as the codes of a frozen base, may stand in a param
                group, as with torch's optimizers: torch never gives them a gradient.
            UnsupportedLayoutError: its layout is not supported.
        """
        for index, tensor in enumerate(self.optimizer.param_groups[group]["params"]):
            name = self.name(group, index)
            if tensor.is_complex():
                raise TypeError(f"AdaFisher needs real floating-point parameters; {name} is {tensor.dtype}.")
            layouts.check_parameter(tensor, name)

    def _list_parameters(self) -> GivenParameters:
        """What stands in the param groups now."""
        given_parameters = GivenParameters()
        for number, group in enumerate(self.optimizer.param_groups):
            self.check(number)
            for index, tensor in enumerate(group["params"]):
                given_parameters.add(tensor, self.name(number, index), number)
        return given_parameters

    def name(self, group: int, index: int) -> str:
        """The name of a parameter: the user's, or its place in the param groups."""
        names = self.optimizer.param_groups[group].get("param_names")
        return names[index] if names and index < len(names) else f"{group}.{index}"


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
