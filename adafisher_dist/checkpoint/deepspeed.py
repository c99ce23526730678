"""Checkpoints of DeepSpeed engines: what an engine has besides model and optimizer, and DeepSpeed's own files."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from adafisher_dist.checkpoint import scheduler_state, training_of
from adafisher_dist.checkpoint.agree import attempt, together
from adafisher_dist.checkpoint.loading import IGNORED, Options, load
from adafisher_dist.checkpoint.manifest import CheckpointError
from adafisher_dist.checkpoint.places import BESIDE, Place, read_latest
from adafisher_dist.checkpoint.saving import Saving, save
from adafisher_dist.checkpoint.schema import whole_numbers
from adafisher_dist.checkpoint.training import Training
from adafisher_dist.checkpoint.trial import Part
from adafisher_dist.checkpoint.values import encode
from adafisher_dist.optimizer import AdaFisher

logger = logging.getLogger("adafisher_dist")

# Counters of an engine that DeepSpeed's own checkpoints keep.
_COUNTERS = ("global_steps", "global_samples", "skipped_steps")

# What its own files have besides the client state.
_DEEPSPEED_KEYS = (
    "module", "buffer_names", "optimizer", "param_shapes", "frozen_param_shapes", "shared_params",
    "frozen_param_fragments", "lr_scheduler", "data_sampler", "random_ltd", "sparse_tensor_module_names",
    "skipped_steps", "global_steps", "global_samples", "dp_world_size", "mp_world_size", "ds_config", "ds_version",
)  # fmt: skip

# What a loss scaler has learnt; what it was configured with stays.
_LOSS_SCALE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def save_engine(
    engine: Any, save_dir: str | os.PathLike[str], tag: str | None, client_state: Mapping[str, Any] | None,
    save_latest: bool, keep_last: int | None, asynchronous: bool,
) -> Saving:  # fmt: skip
    """See `ds.save_checkpoint`."""
    training = _training(engine)
    place = Place(Path(save_dir).absolute(), _same_tag(training, tag, engine))

    def values() -> dict[str, Any]:
        return {"client_state": dict(client_state or {}), **_values(engine)}

    return save(place, training, _facts(engine), values, keep_last, asynchronous, save_latest)


def load_engine(
    engine: Any, load_dir: str | os.PathLike[str], tag: str | None, options: Options, counters: bool, schedule: bool
) -> tuple[str | None, Any]:
    """See `ds.load_checkpoint`; `counters` and `schedule` tell whether those of the engine are restored."""
    training = _training(engine)
    root = Path(load_dir).absolute()
    name = _tag_to_load(training, root, tag)
    if name is None:
        logger.warning("There is no file `latest` in %s, and no tag was given: nothing is loaded.", root)
        return None, None
    return _load(engine, lambda: Place(root, name), training, options, counters, schedule)


def _load(
    engine: Any, where: Callable[[], Place], training: Training, options: Options, counters: bool, schedule: bool
) -> tuple[str, Any]:
    scheduler = engine.lr_scheduler if schedule else IGNORED

    def more(values: Mapping[str, Any]) -> list[Part]:
        return _checked(engine, values, counters, options.states)

    loaded = load(where, training, replace(options, lr_scheduler=scheduler, more=more))
    values = loaded.values
    if counters:
        _restore_counters(engine, values.get("engine") or {"global_steps": loaded.about["step"]})
        engine.loaded_checkpoint_dp_world_size = loaded.about["world_size"]
        engine.loaded_checkpoint_mp_world_size = 1
    if options.states:
        _restore_loss_scale(engine, values.get("loss_scale") or {})
    return str(loaded.folder), values.get("client_state", values.get("extra"))


# ---- DeepSpeed's own save_checkpoint and load_checkpoint ----


def save_with_deepspeed(
    original: Callable[..., Any], engine: Any, save_dir: Any, tag: Any, client_state: Any, *more: Any, **options: Any
) -> Any:
    """Let DeepSpeed write its files, and put AdaFisher's state, and all that a load elsewhere needs, beside them.

    DeepSpeed would save the optimizer state of rank 0 only at stage 0, and at other stages parts that fit no other
    world size.
    """
    training = _training(engine)
    tag = _same_tag(training, tag, engine)
    place = Place(Path(save_dir).absolute() / tag, BESIDE)
    _, problem = attempt(lambda: encode(dict(client_state or {}), "client_state", []))
    pickled = any(training.control.gather(problem is not None))
    if pickled:
        logger.warning("The client state is in DeepSpeed's files alone, and is lost at another world size: %s", problem)

    def values() -> dict[str, Any]:
        return {"client_state": None if pickled else dict(client_state or {}), **_values(engine)}

    save(place, training, _facts(engine), values, latest=False)
    training.optimizer._beside = True
    try:
        return original(engine, save_dir, tag, client_state, *more, **options)
    finally:
        training.optimizer._beside = False


def load_with_deepspeed(
    original: Callable[..., Any], engine: Any, load_dir: Any, tag: Any, flags: Mapping[str, Any]
) -> Any:
    """Load what `save_with_deepspeed` saved, from our files alone; what others saved, as DeepSpeed does."""
    training = _training(engine)
    root = Path(load_dir).absolute()
    name = _tag_to_load(training, root, tag)
    folder = root / str(name)  # ours is in it, or, from ds.save_checkpoint, it is ours

    def place() -> Place:
        beside = Place(folder, BESIDE)
        return beside if attempt(beside.find)[0] is not None else Place(folder.parent, folder.name)

    there = attempt(lambda: place().find())[0] is not None
    if engine.load_universal_checkpoint() or not any(training.control.gather(there)):
        return original(engine, load_dir, tag, **flags)
    if flags["custom_load_fn"] is not None:
        raise CheckpointError("custom_load_fn is not called for a checkpoint with AdaFisher's state.")
    counters = not flags["load_module_only"]
    states = flags["load_optimizer_states"] and counters
    options = Options(strict=flags["load_module_strict"], states=states, random=False)
    schedule = flags["load_lr_scheduler_states"] and counters
    path, client_state = _load(engine, place, training, options, counters, schedule)
    if client_state is None:
        client_state = _pickled_client_state(engine, training, load_dir, str(name))
    return path, client_state


def _pickled_client_state(engine: Any, training: Training, load_dir: Any, tag: str) -> dict[str, Any]:
    """What DeepSpeed's own file of this rank has besides its own entries; nothing where a rank has no such file."""
    path = engine._get_ckpt_name(str(load_dir), tag)
    if not all(training.control.gather(Path(path).is_file())):
        logger.warning("The client state in %s is not loaded: there is no such file for every rank.", path)
        return {}
    saved = engine.checkpoint_engine.load(path, map_location="cpu")
    return {key: value for key, value in saved.items() if key not in _DEEPSPEED_KEYS}


# ---- what an engine has besides ----


def _training(engine: Any) -> Training:
    """What is saved or loaded.

    Raises:
        TypeError: the optimizer is not AdaFisher.
    """
    optimizer = engine.basic_optimizer
    if not isinstance(optimizer, AdaFisher):
        raise TypeError(
            f"The engine's optimizer is {type(optimizer).__name__}, not AdaFisher; use engine.save_checkpoint and"
            " engine.load_checkpoint."
        )
    wrapper = None if engine.optimizer is optimizer else engine.optimizer  # none at stage 0 in fp32
    return training_of(engine.module, optimizer, wrapper)


def _same_tag(training: Training, tag: Any, engine: Any) -> str:
    """The tag, by default as DeepSpeed makes it.

    Raises:
        ValueError: the ranks give different ones.
    """
    tags = training.control.gather(str(tag) if tag is not None else f"global_step{engine.global_steps}")
    if len(set(tags)) > 1:
        raise ValueError(f"The ranks give the checkpoint different tags: {tags}.")
    return tags[0]


def _tag_to_load(training: Training, root: Path, tag: Any) -> str | None:
    """The tag that was given, or what `latest` names; None where there is neither.

    Raises:
        CheckpointError: `latest` cannot be read, or differs.
    """
    tags = together(training.control, lambda: str(tag) if tag is not None else read_latest(root))
    if len(set(tags)) > 1:
        raise CheckpointError(f"The ranks would load different checkpoints of {root}: {tags}.")
    return tags[0]


def _values(engine: Any) -> dict[str, Any]:
    within = engine.micro_steps % engine.gradient_accumulation_steps()
    if within:
        logger.warning("Saving in the middle of gradient accumulation: %d micro-steps are not in it.", within)
    return {
        "engine": {name: getattr(engine, name) for name in _COUNTERS},
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
        for name, value in saved.items():
            if hasattr(scaler, name):
                setattr(scaler, name, value)


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
    learnt = values.get("loss_scale") or {}
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
