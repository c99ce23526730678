"""What a load changes: the state is built anew, and everything is read into its place."""

from __future__ import annotations

import torch
from torch import Tensor

from adafisher_dist import layouts
from adafisher_dist.checkpoint import dry_run, local_ranges, random_state, targets
from adafisher_dist.checkpoint.all_ranks import attempt, by_cause, run_on_all_ranks, told
from adafisher_dist.checkpoint.errors import CheckpointError
from adafisher_dist.checkpoint.manifest import Manifest
from adafisher_dist.checkpoint.matching import Match
from adafisher_dist.checkpoint.open_checkpoint import OpenCheckpoint
from adafisher_dist.checkpoint.options import Checked, Options
from adafisher_dist.checkpoint.ranges import Range
from adafisher_dist.checkpoint.reader import read_ranges
from adafisher_dist.checkpoint.targets import CheckpointTarget
from adafisher_dist.comm.host_groups import HostGroup, beat
from adafisher_dist.numerics.block_step import StepContext, rebuild_factors
from adafisher_dist.settings import StateConfig, state_config, step_settings
from adafisher_dist.state.shard import Shard


def apply(opened: OpenCheckpoint, target: CheckpointTarget, options: Options, matched: Match, checked: Checked) -> None:
    """Restore everything. After a failure no step is taken until a load restores as much."""
    hosts, manifest = target.hosts, opened.manifest
    shards: list[Shard] = []
    wanted: list[Range] = []

    def prepare() -> None:
        if options.states:
            for number, size in matched.block_sizes.items():
                target.optimizer.param_groups[number]["block_size"] = size
            shards.extend(_fresh_shards(target, manifest, matched))
        wanted.extend(_ranges(target, manifest, matched, shards))

    def finish() -> None:
        if options.states:
            dry_run.take_over(target, checked.settings)
            _complete(target, manifest, matched, shards)
        for part in checked.parts:
            part.restore()  # once more: what it makes of its state may depend on the weights
        if checked.scheduler is not None:
            options.lr_scheduler.load_state_dict(checked.scheduler)
        if checked.random is not None:
            random_state.restore(checked.random, [*target.parameters.values(), *target.buffers.values()])

    if options.states:
        target.access.begin_load()
    run_on_all_ranks(hosts, prepare)
    try:
        _read(opened, wanted, hosts)
        if target.wrapper is not None and options.weights:
            layouts.refresh_module(target.wrapper)
        run_on_all_ranks(hosts, finish)
    except BaseException:  # Ctrl-C too, after which a notebook could go on
        target.access.mark_incomplete(options.parts)
        raise


def _fresh_shards(target: CheckpointTarget, manifest: Manifest, matched: Match) -> list[Shard]:
    """Shards for all tensors that hold a parameter whose state is restored, with its counters."""
    chosen = chosen_tensors(target, matched)
    complete = all(name in matched.states for _, members in chosen for name in members) and all(
        _has_factors(manifest, matched.states[name], state_config(target.optimizer.param_groups[group]))
        for group, members in enumerate(targets.members_of_groups(target))
        for name in members
        if name in matched.states
    )
    tensors = [tensor for tensor, _ in chosen]
    shards = target.access.new_shards(tensors, target.wrapper, zeroed=not complete)
    saved = manifest.about["optimizer"]["state"]
    for shard in shards:
        for number, old in _restored(target, shard, matched).items():
            shard.counters[number] = torch.tensor([saved[old]["step"], saved[old]["fisher_updates"]], device="cpu")
    return shards


def chosen_tensors(target: CheckpointTarget, matched: Match) -> list[tuple[Tensor, list[str]]]:
    """Of what the optimizer steps, the tensors that hold a parameter whose state is restored."""
    every = _tensors(target)
    return [(tensor, members) for tensor, members in every if any(name in matched.states for name in members)]


def _tensors(target: CheckpointTarget) -> list[tuple[Tensor, list[str]]]:
    """The tensors that the optimizer steps, in param group order, with their parameters' names."""
    names = target.names
    if target.wrapper is None:
        return [(tensor, [names[info.position]]) for tensor, info in target.access.parameters()]
    held: dict[int, list[str]] = {}
    tensors = {}
    for storage in target.storages():
        for parameter in storage.parameters:
            tensor = storage.tensors[parameter.tensor]
            tensors[id(tensor)] = tensor
            held.setdefault(id(tensor), []).append(names[parameter.info.position])
    return [(tensors[key], members) for key, members in held.items()]


def _ranges(target: CheckpointTarget, manifest: Manifest, matched: Match, shards: list[Shard]) -> list[Range]:
    """What this rank reads."""
    wanted = list(local_ranges.weights(target, matched.weights, writing=False))
    for shard in shards:
        with_factors = {
            old
            for number, old in _restored(target, shard, matched).items()
            if _has_factors(manifest, old, shard.configs[shard.groups[shard.storage.parameters[number].tensor]])
        }
        for range_ in local_ranges.state(target, [shard], matched.states, writing=False):
            kind, _, old = range_.key.partition("/")
            if kind not in ("factor", "curvature") or old in with_factors:
                wanted.append(range_)
    return wanted


def _restored(target: CheckpointTarget, shard: Shard, matched: Match) -> dict[int, str]:
    """By number in the shard, the checkpoint name of each parameter whose state is restored."""
    names = enumerate(target.names[parameter.info.position] for parameter in shard.storage.parameters)
    return {number: matched.states[name] for number, name in names if name in matched.states}


def _has_factors(manifest: Manifest, old: str, own: StateConfig) -> bool:
    """Whether the checkpoint has the factors kept here, if any, made with the same exponent."""
    there = manifest.about["optimizer"]["state"][old]["structure"]
    return not own.keeps_factors or (there["keeps_factors"] and there["exponent"] == own.exponent)


def _read(opened: OpenCheckpoint, wanted: list[Range], hosts: HostGroup) -> None:
    def read() -> str | None:
        _, error = attempt(lambda: read_ranges(opened, wanted))
        return None if error is None else told(error)

    try:
        problem = by_cause(dict(enumerate(run_on_all_ranks(hosts, read))))
    except CheckpointError as error:  # another rank is gone
        problem = str(error)
    if problem:
        raise CheckpointError(
            f"{opened.folder} was not read to its end. {problem.rstrip('.')}. Model and optimizer are incomplete: load"
            " a checkpoint before the next step."
        )


def _complete(target: CheckpointTarget, manifest: Manifest, matched: Match, shards: list[Shard]) -> None:
    """Make the factors that the checkpoint does not have, and hand the shards to the optimizer."""
    for shard in shards:
        restored = _restored(target, shard, matched)
        for stack, segments in zip(shard.stacks, shard.by_parameter, strict=True):
            for segment in segments:
                old = restored.get(segment.owner)
                if old is not None and not _has_factors(manifest, old, stack.config):
                    group = shard.storage.parameters[segment.owner].info.group
                    settings = step_settings(target.optimizer.param_groups[group])
                    step, updates = shard.counters[segment.owner].tolist()
                    beat()
                    rebuild_factors(stack.rows(segment.start, segment.stop), StepContext(settings, step, updates))
    target.access.install(shards, manifest.about["optimizer"]["skipped_steps"])
