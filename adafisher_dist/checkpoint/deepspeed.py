"""DeepSpeed checkpoints: engine state besides model and optimizer, and DeepSpeed's own files."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from adafisher_dist.checkpoint import foreign
from adafisher_dist.checkpoint.all_ranks import attempt, run_on_all_ranks
from adafisher_dist.checkpoint.directory import CheckpointDirectory, tagged
from adafisher_dist.checkpoint.dry_run import Part
from adafisher_dist.checkpoint.errors import CheckpointError
from adafisher_dist.checkpoint.folders import SUBFOLDER, folder_of, those_in
from adafisher_dist.checkpoint.latest import ANOTHER_TAG, LATEST, prepare_latest, read_latest
from adafisher_dist.checkpoint.loading import load
from adafisher_dist.checkpoint.manifest import MANIFEST
from adafisher_dist.checkpoint.options import IGNORED, Options
from adafisher_dist.checkpoint.saving import Saving, save, scheduler_state, target_of
from adafisher_dist.checkpoint.schema import whole_numbers
from adafisher_dist.checkpoint.targets import CheckpointTarget, without_frozen
from adafisher_dist.optimizer.adafisher import AdaFisher

logger = logging.getLogger("adafisher_dist")

# For who calls engine.load_checkpoint, whose arguments are DeepSpeed's.
_REMEDY = (
    "To restore what fits and be told of the rest, give load_module_strict=False; without the schedule,"
    " load_lr_scheduler_states=False. For renamed parameters call adafisher_dist.ds.load_checkpoint(engine, …) with"
    " rename={old name: new name}."
)

# Counters of an engine that DeepSpeed's own checkpoints keep.
_COUNTERS = ("global_steps", "global_samples", "skipped_steps")

# What a loss scaler has learnt; what it was configured with stays.
_LOSS_SCALE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def save_engine(
    engine: Any, save_dir: str | os.PathLike[str], tag: str | None, client_state: Mapping[str, Any] | None,
    save_latest: bool, keep_last: int | None, asynchronous: bool, exclude_frozen_parameters: bool,
) -> Saving:  # fmt: skip
    """See `ds.save_checkpoint`."""
    target = _training(engine, exclude_frozen_parameters)
    place = CheckpointDirectory(Path(save_dir).absolute(), _same_tag(target, tag, engine))
    values = partial(_values, engine, client_state)
    return save(place, target, _facts(engine), values, keep_last, asynchronous, save_latest)


def load_engine(
    engine: Any, load_dir: str | os.PathLike[str], tag: str | None, options: Options, counters: bool, schedule: bool
) -> tuple[str | None, Any]:
    """See `ds.load_checkpoint`; `counters` and `schedule`: whether to restore the engine's."""
    target = _training(engine)
    root = Path(load_dir).absolute()
    name = _tag_to_load(target, root, tag)
    if name is None:
        return None, None
    return _load(engine, lambda: tagged(root, name), target, options, counters, schedule)


def _load(
    engine: Any,
    where: Callable[[], CheckpointDirectory],
    target: CheckpointTarget,
    options: Options,
    counters: bool,
    schedule: bool,
) -> tuple[str, Any]:
    scheduler = engine.lr_scheduler if schedule else IGNORED
    more = partial(_checked, engine, counters=counters, states=options.states)
    loaded = load(where, target, replace(options, lr_scheduler=scheduler, more=more))
    values = loaded.values
    if counters:
        _restore_counters(engine, values.get("engine") or {"global_steps": loaded.about["step"]})
        engine.loaded_checkpoint_dp_world_size = loaded.about["world_size"]
        engine.loaded_checkpoint_mp_world_size = 1
    if options.states:
        _restore_loss_scale(engine, values.get("loss_scale") or {})
    client_state = values.get("client_state", values.get("extra"))
    if client_state is None and "client_state" in values:
        logger.warning(
            "The client state of %s is in DeepSpeed's files alone, where older versions of adafisher_dist left it. They"
            " are pickles, and are not read: if you trust them, torch.load them with weights_only=False.",
            loaded.folder,
        )
    return str(loaded.folder), {} if client_state is None else client_state


# ---- DeepSpeed's own save_checkpoint and load_checkpoint ----


def save_with_deepspeed(
    original: Callable[..., Any], engine: Any, save_dir: Any, tag: Any, client_state: Any, save_latest: bool,
    exclude_frozen_parameters: bool, more: Mapping[str, Any],
) -> Any:  # fmt: skip
    """Save our own checkpoint, then let DeepSpeed write its files beside it.

    Ours holds AdaFisher's state, and all that a load at another world size needs. DeepSpeed alone
    would save only rank 0's optimizer state at stage 0, and at other stages parts that fit no other
    world size. A load reads only our files, so a client state that only a pickle could hold is
    refused. DeepSpeed writes `latest` in place, and a kill would leave a part of the tag in it: we
    write it instead, by a rename, when all else is there.
    """
    target = _training(engine, exclude_frozen_parameters)
    tag = _same_tag(target, tag, engine)
    place = CheckpointDirectory(Path(save_dir).absolute() / tag, SUBFOLDER)
    run_on_all_ranks(target.hosts, partial(_refuse_second, place.root))
    save(place, target, _facts(engine), partial(_values, engine, client_state), latest=False)
    later = engine.checkpoint_engine.is_decoupled()  # it writes all of its files, and `latest`, in the background
    target.optimizer._state_is_elsewhere = True
    try:
        with _errors_kept(engine, not later) as errors:
            done = original(
                engine, save_dir, tag, client_state, save_latest and later, exclude_frozen_parameters, **more
            )
        run_on_all_ranks(target.hosts, lambda: _raise_first(errors))
    except Exception as error:
        raise CheckpointError(
            f"DeepSpeed could not write its own files of {place.root}: {error}. AdaFisher's checkpoint, in"
            f" {SUBFOLDER}/ there, is complete, and is all that load_checkpoint needs: give it the tag {tag!r}, since"
            f" `{LATEST}` still names the one before."
        ) from error
    finally:
        target.optimizer._state_is_elsewhere = False
    if save_latest and not later:
        run_on_all_ranks(target.hosts, lambda: _name_latest(engine, Path(save_dir).absolute(), tag))
    return done


@contextmanager
def _errors_kept(engine: Any, kept: bool) -> Iterator[list[Exception]]:
    """Collect what fails in writing DeepSpeed's files, so that this rank comes to its barrier."""
    errors: list[Exception] = []
    writers = [(engine.checkpoint_engine, "save"), (engine, "_copy_recovery_script")] if kept else []
    with ExitStack() as stack:
        for owner, name in writers:
            original = getattr(owner, name, None)
            if original is not None:
                own = vars(owner).get(name)
                stack.callback(partial(delattr, owner, name) if own is None else partial(setattr, owner, name, own))
                setattr(owner, name, partial(_tried, original, errors))
        yield errors


def _tried(work: Callable[..., Any], errors: list[Exception], *arguments: Any, **keywords: Any) -> Any:
    try:
        return work(*arguments, **keywords)
    except Exception as error:
        errors.append(error)


def _raise_first(errors: Sequence[Exception]) -> None:
    if errors:
        raise errors[0]


def _refuse_second(folder: Path) -> None:
    """Refuse to write a checkpoint into another: a load would have to choose."""
    if (folder / MANIFEST).is_file():
        raise CheckpointError(
            f"{folder} is a checkpoint that adafisher_dist.ds.save_checkpoint saved, and engine.save_checkpoint would"
            " write a second one into it. Give another tag, or delete or rename that one. Nothing was saved."
        )


def _name_latest(engine: Any, root: Path, tag: str) -> None:
    if engine.global_rank == 0:
        prepare_latest(root, tag, checked=False).rename(root / LATEST)


def load_with_deepspeed(
    original: Callable[..., Any], engine: Any, load_dir: Any, tag: Any, flags: Mapping[str, Any]
) -> Any:
    """Load what `save_with_deepspeed` saved, or the weights of another optimizer's checkpoint.

    The former is read from our files alone; the latter needs a load without optimizer states.

    Raises:
        CheckpointError: see `ds.load_checkpoint`; or AdaFisher's state is asked for, and is not
            there.
    """
    target = _training(engine)
    root = Path(load_dir).absolute()
    if engine.load_universal_checkpoint():
        raise CheckpointError(
            'AdaFisher has no universal checkpoints: take "load_universal" out of the config\'s "checkpoint", and load'
            " the checkpoint as it was saved, which resumes at any number of ranks and any ZeRO stage."
        )
    name = _tag_to_load(target, root, tag)
    if name is None:
        return None, None
    folder = root / name  # ours is in it, or, from ds.save_checkpoint, it is ours

    def place() -> CheckpointDirectory:
        without_state = CheckpointDirectory(folder, SUBFOLDER)
        ours = attempt(without_state.find)[0] is not None
        return without_state if ours else CheckpointDirectory(folder.parent, folder.name)

    there = attempt(lambda: place().find())[0] is not None
    if not any(target.hosts.gather(there)):
        return foreign.load(original, engine, target.hosts, root, name, flags)
    if flags["custom_load_fn"] is not None:
        raise CheckpointError("custom_load_fn is not called for a checkpoint with AdaFisher's state.")
    counters = not flags["load_module_only"]
    states = flags["load_optimizer_states"] and counters
    options = Options(strict=flags["load_module_strict"], states=states, random=False, remedy=_REMEDY)
    return _load(engine, place, target, options, counters, flags["load_lr_scheduler_states"] and counters)


# ---- what an engine has besides ----


def _training(engine: Any, exclude_frozen_parameters: bool = False) -> CheckpointTarget:
    """What is saved or loaded.

    Raises:
        TypeError: the optimizer is not AdaFisher.
        RuntimeError: `engine.offload_states` has moved some of it; on all ranks.
    """
    if not hasattr(engine, "basic_optimizer"):
        raise TypeError(
            f"A {type(engine).__name__} is no DeepSpeed engine: give what deepspeed.initialize returned, or, without"
            " DeepSpeed, use adafisher_dist.save_checkpoint and load_checkpoint."
        )
    optimizer = engine.basic_optimizer
    if not isinstance(optimizer, AdaFisher):
        raise TypeError(
            f"The engine's optimizer is {type(optimizer).__name__}, not AdaFisher; use engine.save_checkpoint and"
            " engine.load_checkpoint."
        )
    wrapper = None if engine.optimizer is optimizer else engine.optimizer  # none at stage 0 in fp32
    target = target_of(engine.module, optimizer, wrapper)
    run_on_all_ranks(target.hosts, lambda: _refuse_offloaded(wrapper))
    return without_frozen(target) if exclude_frozen_parameters else target


def _refuse_offloaded(wrapper: Any) -> None:
    """Refuse what DeepSpeed has moved to the host.

    Its 16-bit partitions are in another order there, where param groups are not in the model's. A
    checkpoint gathers small ones, and the next step would take the wrong ones for weights.
    """
    moved = sorted(str(state.value) for state in getattr(wrapper, "offloaded_states", ()))
    if moved:
        raise RuntimeError(
            f"engine.offload_states() has moved {', '.join(moved)} to the host. Call engine.reload_states() on all"
            " ranks before a checkpoint is saved or loaded."
        )


def _same_tag(target: CheckpointTarget, tag: Any, engine: Any) -> str:
    """The tag, by default as DeepSpeed makes it.

    Raises:
        ValueError: the ranks give different ones, or it names no folder inside of that of the
            checkpoints.
    """
    tags = target.hosts.gather(str(tag) if tag is not None else f"global_step{engine.global_steps}")
    if len(set(tags)) > 1:
        raise ValueError(f"The ranks give the checkpoint different tags: {tags}.")
    return _inside(tags[0])


def _inside(tag: str) -> str:
    """The tag, which may be a path, as DeepSpeed allows.

    Raises:
        ValueError: it leads elsewhere than into the folder of the checkpoints.
    """
    if tag != tag.strip() or not tag.isprintable() or any(part in ("", ".", "..") for part in tag.split("/")):
        raise ValueError(f"{tag!r} cannot be the tag of a checkpoint: it should name a folder inside of theirs.")
    return tag


def _tag_to_load(target: CheckpointTarget, root: Path, tag: Any) -> str | None:
    """The tag that was given, or what `latest` names; None where there is neither.

    Raises:
        CheckpointError: `latest` cannot be read, leads elsewhere than into the folder, or differs;
            or the folder is a checkpoint itself.
        ValueError: so does the tag that was given.
    """

    def find() -> str | None:
        if tag is not None:
            return _inside(str(tag))
        named = read_latest(root)
        if named is None and (ours := folder_of(root)) is not None:
            raise CheckpointError(
                f"{ours} is a checkpoint itself: load it from {root.parent} with tag={root.name!r}. Nothing was loaded."
            )
        try:
            return named if named is None else _inside(named)
        except ValueError as error:
            raise CheckpointError(f"{root / LATEST} is damaged: {error} {ANOTHER_TAG} Nothing was loaded.") from error

    tags = run_on_all_ranks(target.hosts, find)
    if len(set(tags)) > 1:
        raise CheckpointError(f"The ranks would load different checkpoints of {root}: {tags}.")
    if tags[0] is None and target.hosts.rank == 0:
        what, where = (f"file `{LATEST}`", root) if os.path.isdir(root) else (f"folder {root.name}", root.parent)
        logger.warning(
            "There is no %s in %s, and no tag was given: nothing is loaded, as at a training's first start. %s",
            what,
            where,
            those_in(root),
        )
    return tags[0]


def _values(engine: Any, client_state: Mapping[str, Any] | None) -> dict[str, Any]:
    own = dict(client_state or {})
    within = engine.micro_steps % engine.gradient_accumulation_steps()
    if within:
        logger.warning("Saving in the middle of gradient accumulation: %d micro-steps are not in it.", within)
    return {
        "client_state": own,
        "engine": {name: int(getattr(engine, name)) for name in _COUNTERS},  # a float with sequence parallelism
        "lr_scheduler": scheduler_state(engine.lr_scheduler),
        "loss_scale": _loss_scale(engine),
        "data_efficiency": {name: part.state_dict() for name, part in _data_efficiency(engine).items()},
    }


def _facts(engine: Any) -> dict[str, Any]:
    precision = "fp16" if engine.fp16_enabled() else "bf16" if engine.bfloat16_enabled() else "fp32"
    return {"step": engine.global_steps, "zero_stage": engine.zero_optimization_stage(), "precision": precision}


def _scaler(engine: Any) -> Any:
    """What holds the loss scale of an engine in fp16."""
    wrapper = engine.optimizer
    return getattr(wrapper, "loss_scaler", None) or getattr(wrapper, "loss_scale_config", None)


def _loss_scale(engine: Any) -> dict[str, Any] | None:
    if not engine.fp16_enabled():
        return None
    scaler = _scaler(engine)
    return {name: getattr(scaler, name) for name in _LOSS_SCALE if hasattr(scaler, name)}


def _restore_loss_scale(engine: Any, saved: Mapping[str, Any]) -> None:
    scaler = _scaler(engine)
    dynamic = getattr(scaler, "dynamic", getattr(scaler, "dynamic_loss_scale", False))
    if engine.fp16_enabled() and dynamic:
        for name in _LOSS_SCALE:
            # A scale that was fixed has no last overflow: None, with which one that adapts cannot
            # go on.
            if saved.get(name) is not None and hasattr(scaler, name):
                setattr(scaler, name, saved[name])


def _restore_counters(engine: Any, saved: Mapping[str, Any]) -> None:
    for name in _COUNTERS:
        if name in saved:
            setattr(engine, name, saved[name])
    if "global_samples" not in saved:
        engine.global_samples = engine.global_steps * engine.train_batch_size()


def _data_efficiency(engine: Any) -> dict[str, Any]:
    """The parts of DeepSpeed's data efficiency library that are on."""
    parts = {}
    if engine.training_dataloader is not None and engine.curriculum_learning_enabled():
        parts["data_sampler"] = engine.training_dataloader.data_sampler
    if engine.random_ltd_enabled() and engine.random_ltd_scheduler is not None:
        parts["random_ltd"] = engine.random_ltd_scheduler
    return parts


def _checked(engine: Any, values: Mapping[str, Any], counters: bool, states: bool) -> list[Part]:
    """Check what will be restored of the engine itself; the parts of it that have a state.

    Raises:
        ValueError: a counter, or what the loss scale has learnt, is no number that it can be.
    """
    for name in ("engine", "loss_scale", "data_efficiency"):
        if not isinstance(values.get(name) or {}, Mapping):
            raise ValueError(f"{name} should be a dict, and is {values[name]!r}")
    if counters:
        whole_numbers(values.get("engine") or {}, _COUNTERS, "the engine")
    learnt = {name: value for name, value in (values.get("loss_scale") or {}).items() if value is not None}
    if states:
        whole_numbers(learnt, _LOSS_SCALE[1:], "the loss scale", low=-1)  # no overflow yet is -1
        scale = learnt.get("cur_scale", 1.0)
        if isinstance(scale, bool) or not isinstance(scale, int | float) or not 0 < scale < float("inf"):
            raise ValueError(f"the loss scale should be a positive number, and is {scale!r}")
    saved = values.get("data_efficiency") or {}
    parts = _data_efficiency(engine).items() if counters else ()
    return [
        Part(f"DeepSpeed's {name}", part.state_dict, part.load_state_dict, saved[name])
        for name, part in parts
        if name in saved
    ]
