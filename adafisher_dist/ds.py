"""DeepSpeed: what `"optimizer": {"type": "AdaFisher", "params": {…}}` builds, and checkpoints of its engines."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adafisher_dist.optimizer import AdaFisher
from adafisher_dist.settings import DEFAULTS, check_names, fisher_dtype, preset

if TYPE_CHECKING:
    from torch.optim.optimizer import ParamsT

    from adafisher_dist.checkpoint import Saving

logger = logging.getLogger("adafisher_dist")

# Counters of an engine that DeepSpeed's own checkpoints keep.
_COUNTERS = ("global_steps", "global_samples", "skipped_steps")

# What a loss scaler has learnt; what it was configured with stays.
_LOSS_SCALE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def from_config(params: ParamsT, **config: Any) -> AdaFisher:
    """Build AdaFisher from the `params` of a JSON config.

    Args:
        params: what DeepSpeed passes on: the model's parameters or param groups.
        config: AdaFisher's arguments; fisher_dtype by name ("bfloat16"); and "preset", "language_models" or
            "image_classification", which the other keys override.

    Raises:
        TypeError: a key is unknown; the message names the nearest valid one and lists all.
        ValueError: a value is out of bounds, or the preset is unknown.
    """
    check_names(config, [*DEFAULTS, "preset"])
    name = config.pop("preset", None)
    settings = {**(preset(name) if name is not None else {}), **config}
    if "fisher_dtype" in settings:
        settings["fisher_dtype"] = fisher_dtype(settings["fisher_dtype"])
    return AdaFisher(params, **settings)


def save_checkpoint(
    engine: Any, save_dir: str | os.PathLike[str], tag: str | None = None,
    client_state: Mapping[str, Any] | None = None, save_latest: bool = True, *, keep_last: int | None = None,
    asynchronous: bool = False,
) -> Saving:  # fmt: skip
    """Save an engine that trains with AdaFisher, each rank its own part, to be loaded at any world size and stage.

    The arguments are those of `engine.save_checkpoint`. Saved are the weights (the fp32 ones, where there are some),
    the optimizer, the learning rate scheduler, the loss scale, the engine's counters, the random number generators, and
    the client state. A collective: all ranks call it.

    Args:
        engine: what `deepspeed.initialize` returned.
        save_dir: the folder of checkpoints, on a file system that all ranks share.
        tag: the name of this one, the same on all ranks; by default global_stepN.
        client_state: of rank 0: None, numbers, strings, lists, tuples, dicts, tensors, numpy arrays and the like.
        save_latest: let the file `latest` name this one.
        keep_last: keep so many of the checkpoints in `save_dir`, and delete the older ones.
        asynchronous: return when the state is copied to CPU memory, and write in the background.

    Returns:
        A handle: `path`, `done()` and `wait()`; true, as DeepSpeed's result.

    Raises:
        CheckpointError: on all ranks: it could not be written. Nothing was published, the last checkpoint is whole.
        TypeError: `client_state` holds what cannot be saved without pickling; the optimizer is not AdaFisher.
    """
    from adafisher_dist import checkpoint

    training = checkpoint.training_of(engine.module, _optimizer(engine), _wrapper(engine))
    tag = str(tag) if tag is not None else f"global_step{engine.global_steps}"
    tags = training.control.gather(tag)
    if len(set(tags)) > 1:
        raise ValueError(f"The ranks give the checkpoint different tags: {tags}.")
    if engine.micro_steps % engine.gradient_accumulation_steps():
        logger.warning(
            "Saving in the middle of gradient accumulation: the gradients of %d micro-steps are not in the checkpoint.",
            engine.micro_steps % engine.gradient_accumulation_steps(),
        )
    values = {
        "client_state": dict(client_state or {}),
        "engine": {name: getattr(engine, name) for name in _COUNTERS},
        "lr_scheduler": checkpoint.scheduler_state(engine.lr_scheduler),
        "loss_scale": _loss_scale(engine),
        "data_efficiency": _data_efficiency_states(engine),
    }
    facts = {
        "step": engine.global_steps,
        "zero_stage": engine.zero_optimization_stage(),
        "precision": _precision(engine),
    }
    place = checkpoint.Place(Path(save_dir).absolute(), tag)
    return checkpoint.save(place, training, facts, values, keep_last, asynchronous, save_latest)


def load_checkpoint(
    engine: Any, load_dir: str | os.PathLike[str], tag: str | None = None, load_module_strict: bool = True,
    load_optimizer_states: bool = True, load_lr_scheduler_states: bool = True, load_module_only: bool = False, *,
    strict: bool = True, rename: Mapping[str, str] | None = None, verify: bool = True,
) -> tuple[str | None, Any]:  # fmt: skip
    """Load what `save_checkpoint` saved, here or for torch, at any world size, ZeRO stage and precision.

    The first arguments are those of `engine.load_checkpoint`, the others those of `adafisher_dist.load_checkpoint`.
    What does not fit is an error; with strict=False (or load_module_strict=False) it is logged, and left as it is.

    Returns:
        The checkpoint's folder and the client state; (None, None) where `tag` is None and `load_dir` has no `latest`.

    Raises:
        CheckpointError: on all ranks, before anything changes: it is missing, damaged, or does not fit.
    """
    from adafisher_dist import checkpoint

    training = checkpoint.training_of(engine.module, _optimizer(engine), _wrapper(engine))
    root = Path(load_dir).absolute()
    if tag is None:
        tag = checkpoint.latest_tag(root)
        if tag is None:
            logger.warning("There is no file `latest` in %s, and no tag was given: nothing is loaded.", root)
            return None, None
    states = load_optimizer_states and not load_module_only
    schedule = load_lr_scheduler_states and not load_module_only
    options = checkpoint.Options(
        strict=strict and load_module_strict,
        rename=rename,
        verify=verify,
        states=states,
        random=states,
        lr_scheduler=engine.lr_scheduler if schedule else checkpoint.IGNORED,
    )
    loaded = checkpoint.load(checkpoint.Place(root, str(tag)), training, options)
    values = loaded.values
    if not load_module_only:
        _restore_counters(engine, values.get("engine") or {"global_steps": loaded.about["step"]})
        _restore_data_efficiency(engine, values.get("data_efficiency") or {})
        if states:
            _restore_loss_scale(engine, values.get("loss_scale") or {})
        engine.loaded_checkpoint_dp_world_size = loaded.about["world_size"]
        engine.loaded_checkpoint_mp_world_size = 1
    return str(loaded.folder), values.get("client_state", values.get("extra"))


def _optimizer(engine: Any) -> AdaFisher:
    optimizer = engine.basic_optimizer
    if not isinstance(optimizer, AdaFisher):
        raise TypeError(
            f"The engine's optimizer is {type(optimizer).__name__}, not AdaFisher; use engine.save_checkpoint and"
            " engine.load_checkpoint."
        )
    return optimizer


def _wrapper(engine: Any) -> Any:
    """What DeepSpeed has put between the engine and the optimizer; None at stage 0 in fp32."""
    return None if engine.optimizer is engine.basic_optimizer else engine.optimizer


def _precision(engine: Any) -> str:
    return "fp16" if engine.fp16_enabled() else "bf16" if engine.bfloat16_enabled() else "fp32"


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


def _data_efficiency_states(engine: Any) -> dict[str, Any]:
    return {name: part.state_dict() for name, part in _data_efficiency(engine).items()}


def _restore_data_efficiency(engine: Any, saved: Mapping[str, Any]) -> None:
    for name, part in _data_efficiency(engine).items():
        if name in saved:
            part.load_state_dict(saved[name])
