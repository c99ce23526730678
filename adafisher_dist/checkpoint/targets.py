"""A model and optimizer as a checkpoint sees them: named tensors, and facts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from adafisher_dist import layouts
from adafisher_dist.blocks.parts import Parts
from adafisher_dist.checkpoint import encoding
from adafisher_dist.checkpoint.errors import CheckpointError
from adafisher_dist.checkpoint.manifest import LEFT_OUT
from adafisher_dist.comm.host_groups import HostGroup
from adafisher_dist.layouts.deepspeed_wrappers import expert_names
from adafisher_dist.layouts.storage import Storage, local, whole_shape
from adafisher_dist.optimizer.adafisher import AdaFisher
from adafisher_dist.optimizer.checkpointing import CheckpointAccess
from adafisher_dist.settings import StateConfig

# What an optimizer keeps of its own when it loads: settings that shape the state, and its memory
# budget.
OWN_SETTINGS = (
    *("block_size", "rows_per_block", "block_grid", "max_blocks"),
    *("fisher_dtype", "exponent", "grafting", "inverse_update_freq", "packed", "memory_budget_gb"),
    "stochastic_rounding",  # which only weights in bfloat16 can have
    *("name", "moe"),  # what DeepSpeed knows a group by
)

_EXTRA = "_extra_state"

# What torch puts into the names of parameters when it wraps a module in place.
_IN_NAMES = ("_orig_mod.", "_checkpoint_wrapped_module.", "_fsdp_wrapped_module.")


@dataclass(frozen=True, slots=True, eq=False)
class CheckpointTarget:
    """See the module's docstring.

    Attributes:
        module: the model, without a wrapper around it.
        optimizer: AdaFisher.
        access: to what stands behind it.
        wrapper: DeepSpeed's, where it has put other tensors in the parameters' place; else None.
        hosts: the ranks that save and load together.
        names: of the optimizer's parameters, by their positions.
        parameters: by name; a tied one by its first.
        buffers: the persistent ones, by name; a shared one by its first.
        aliases: the other names of tied parameters and shared buffers.
        left_out: the names of parameters whose values are not saved.
        elsewhere: where ranks hold different experts or stages, the names that other ranks hold and
            this one does not.
        first_holders: there, by name, the first rank that holds it.
        parts: by name, how tensor parallelism cuts a parameter, where it is in several parts.
    """

    module: nn.Module
    optimizer: AdaFisher
    access: CheckpointAccess
    wrapper: Any
    hosts: HostGroup
    names: Mapping[int, str]
    parameters: Mapping[str, Tensor]
    buffers: Mapping[str, Tensor]
    aliases: Mapping[str, str]
    left_out: frozenset[str] = frozenset()
    elsewhere: frozenset[str] = frozenset()
    first_holders: Mapping[str, int] | None = None
    parts: Mapping[str, Parts] = field(default_factory=dict)

    def storages(self) -> list[Storage]:
        """Of the fp32 tensors of DeepSpeed's wrapper; none where the parameters are their own."""
        if self.wrapper is None:
            return []
        return self.access.storages_of(layouts.wrapped_tensors(self.wrapper), self.wrapper)


def collect_target(
    module: nn.Module, optimizer: AdaFisher, access: CheckpointAccess, wrapper: Any, hosts: HostGroup
) -> CheckpointTarget:
    """Name everything. A collective where ranks hold different experts or stages.

    Raises:
        ValueError: the optimizer has a parameter that is not in the model.
    """
    for part in module.modules():
        if hasattr(part, "reshard") and hasattr(part, "unshard"):  # FSDP2, which keeps a root whole after evaluation
            part.reshard()  # type: ignore[operator]
    first: dict[int, str] = {}
    aliases: dict[str, str] = {}
    experts = expert_names(module)
    parameters = _by_first_name(module.named_parameters(remove_duplicate=False), experts, first, aliases)
    buffers = _by_first_name(_persistent_buffers(module), experts, first, aliases)
    foreign = [info.name for tensor, info in access.parameters() if id(tensor) not in first]
    if foreign:
        raise ValueError(
            f"The optimizer has {len(foreign)} parameters that are not in the model, as {foreign[0]}. Save and load the"
            " model that it was built for (after fully_shard, where that is used)."
        )
    names = {info.position: first[id(tensor)] for tensor, info in access.parameters()}
    target = CheckpointTarget(
        module, optimizer, access, wrapper, hosts, names, parameters, buffers, aliases,
        parts={name: parts for name, tensor in parameters.items() if (parts := layouts.parts_of(tensor)) is not None},
    )  # fmt: skip
    return _with_others(target) if experts or layouts.group_of_stage(module) is not None else target


def problem_of_values(tensor: Tensor) -> str | None:
    """Why a parameter's or buffer's values can neither be saved nor loaded, if so."""
    here = local(tensor)
    if here.is_meta:
        return (
            "is on the meta device, where nothing has values: give it memory by module.to_empty(device=…), and build"
            " the optimizer after that"
        )
    if here.is_conj():
        return "is the conjugate of another tensor, computed where it is read: give it values by .resolve_conj()"
    if here.layout != torch.strided:
        return (
            f"is no dense tensor ({here.layout}), as those of checkpoints are: make it dense, or leave it out by"
            " register_buffer(…, persistent=False)"
        )
    return None


def check_values(target: CheckpointTarget) -> None:
    """Refuse to save what has no values.

    Raises:
        ValueError: names it.
    """
    for name, tensor in {**target.parameters, **target.buffers}.items():
        problem = None if name in target.left_out else problem_of_values(tensor)
        if problem is not None:
            raise ValueError(f"{name} {problem}.")


def _with_others(target: CheckpointTarget) -> CheckpointTarget:
    """The same, knowing what the other ranks hold."""
    extra = {name for name, _ in with_extra_state(target)}
    own = {*target.parameters, *target.buffers, *target.aliases, *(extra_state_key(name) for name in extra)}
    holders: dict[str, int] = {}
    for rank, names in enumerate(target.hosts.gather(sorted(own))):
        for name in names:
            holders.setdefault(name, rank)
    return replace(target, elsewhere=frozenset(holders) - own, first_holders=holders)


def without_frozen(target: CheckpointTarget) -> CheckpointTarget:
    """The same, to be saved without the values of the parameters that need no gradient."""
    frozen = frozenset(name for name, parameter in target.parameters.items() if not parameter.requires_grad)
    return replace(target, left_out=frozen)


def _by_first_name(
    named: Iterable[tuple[str, Tensor]], experts: Mapping[str, str], first: dict[int, str], aliases: dict[str, str]
) -> dict[str, Tensor]:
    """Each tensor by its first name; fills `first` (id → first name), `aliases` (other → first)."""
    found: dict[str, Tensor] = {}
    for raw, tensor in named:
        name = _on_all_ranks(raw, experts)
        if first.setdefault(id(tensor), name) == name:
            found[name] = tensor
        else:
            aliases[name] = first[id(tensor)]
    return found


def _on_all_ranks(raw: str, experts: Mapping[str, str]) -> str:
    """A name of this rank's module, with the numbers that experts have over all ranks."""
    expert = next((prefix for prefix in experts if raw.startswith(prefix)), "")
    return clean(experts.get(expert, "") + raw.removeprefix(expert))


def _persistent_buffers(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, buffer in module.named_buffers(remove_duplicate=False):
        owner, _, own = name.rpartition(".")
        if own not in module.get_submodule(owner)._non_persistent_buffers_set:
            yield name, buffer


def clean(name: str) -> str:
    """A parameter's name without what torch.compile, activation checkpointing and others add."""
    for part in _IN_NAMES:
        name = name.replace(part, "")
    return name


# ---- facts ----


def describe(target: CheckpointTarget, tensors: list[Tensor]) -> dict[str, Any]:
    """The model and the optimizer's settings and counters, as JSON."""
    return {
        "model": {
            "parameters": {
                name: {
                    "shape": whole_shape(p),
                    "dtype": str(p.dtype),
                    "trainable": p.requires_grad,
                    **(target.parts[name].facts() if name in target.parts else {}),
                    **({LEFT_OUT: True} if name in target.left_out else {}),
                }
                for name, p in target.parameters.items()
            },
            "buffers": {name: {"shape": tuple(b.shape), "dtype": str(b.dtype)} for name, b in target.buffers.items()},
            "aliases": dict(target.aliases),
            "extra_state": {
                name: encoding.encode(part.get_extra_state(), f"the extra state of {name}", tensors)
                for name, part in with_extra_state(target)
            },
        },
        "optimizer": {
            "skipped_steps": target.optimizer.skipped_steps,
            "groups": _groups(target, tensors),
            "state": _counters(target),
        },
    }


def with_extra_state(target: CheckpointTarget) -> Iterator[tuple[str, nn.Module]]:
    """The modules that have some, by name."""
    experts = expert_names(target.module)
    for name, part in target.module.named_modules():
        if type(part).get_extra_state is not nn.Module.get_extra_state:
            yield _on_all_ranks(f"{name}.", experts).removesuffix("."), part


def extra_state_key(name: str) -> str:
    """The name that torch's state dicts give a module's extra state."""
    return f"{name}.{_EXTRA}" if name else _EXTRA


def _groups(target: CheckpointTarget, tensors: list[Tensor]) -> list[dict[str, Any]]:
    return [
        {
            "names": names,
            "settings": {
                key: encoding.encode(value, f"the setting {key!r} of a param group", tensors)
                for key, value in group.items()
                if key not in ("params", "param_names")
            },
        }
        for group, names in zip(target.optimizer.param_groups, members_of_groups(target), strict=True)
    ]


def members_of_groups(target: CheckpointTarget) -> list[list[str]]:
    """The names of the parameters of each param group, in order."""
    names = target.names
    members: list[list[str]] = [[] for _ in target.optimizer.param_groups]
    for _, info in target.access.parameters():
        members[info.group].append(names[info.position])
    return members


def _counters(target: CheckpointTarget) -> dict[str, dict[str, Any]]:
    names, found = target.names, {}
    for shard in target.access.shards:
        for number, parameter in shard.active:
            step, updates = shard.counters[number].tolist()
            config = shard.configs[shard.groups[parameter.tensor]]
            grids = [shard.grids[number]] if parameter.parts is None else parameter.parts.grids(config._asdict())
            found[names[parameter.info.position]] = {
                "step": step,
                "fisher_updates": updates,
                "blocks": sum(grid.num_blocks for grid in grids),
                "dense_blocks": sum(grid.dense_blocks for grid in grids),
                "structure": config_facts(config),
            }
    return found


def steps_of_parts(target: CheckpointTarget) -> dict[str, tuple[int, ...]]:
    """With tensor parallelism, how often each parameter was stepped, for ranks to compare."""
    names = target.names
    return {
        names[parameter.info.position]: tuple(shard.counters[number].tolist())
        for shard in target.access.shards
        for number, parameter in shard.active
        if target.parts
    }


def config_facts(config: StateConfig) -> dict[str, Any]:
    """What state was built for, as JSON."""
    facts = config._asdict()
    del facts["fisher_dtype"], facts["packed"]  # a load converts them
    return facts


def layout_of(target: CheckpointTarget) -> str:
    """The name of the layout, for reports."""
    shards = target.access.shards
    storages = [shard.storage for shard in shards] or target.storages()
    if storages:
        chosen = next((storage for storage in storages if storage.tensor_parallel), storages[0])
        return chosen.layout.partition(" (part")[0]
    return "replicated" if target.hosts.size > 1 else "one process"


@contextmanager
def partitioned(target: CheckpointTarget, done: str) -> Iterator[None]:
    """Keep ZeRO-3 parameters partitioned, as DeepSpeed's checkpoints need. A collective there.

    Args:
        target: what is saved or loaded.
        done: what was done when the block has ended, for the error.

    Raises:
        CheckpointError: DeepSpeed could not gather those again that it keeps whole.
    """
    wrapper = target.wrapper
    if hasattr(wrapper, "checkpoint_event_prologue"):
        wrapper.checkpoint_event_prologue()
    try:
        yield
    except BaseException:
        with suppress(Exception):  # it would hide what has failed before
            if not target.hosts.is_lost:
                _gather_again(wrapper)
        raise
    try:
        _gather_again(wrapper)
    except RuntimeError as error:
        raise CheckpointError(
            f"{done}, and then DeepSpeed could not gather its parameters again: {error}."
            " Start all ranks again, and load the last checkpoint."
        ) from error


def _gather_again(wrapper: Any) -> None:
    if hasattr(wrapper, "checkpoint_event_epilogue"):
        wrapper.checkpoint_event_epilogue()
