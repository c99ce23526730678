"""DeepSpeed: the optimizer that `"type": "AdaFisher"` in a config builds, and checkpoints."""

from __future__ import annotations

import logging
import os
import sys
import weakref
from collections.abc import Mapping
from functools import wraps
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.optim import Optimizer

from adafisher_dist import engine_state
from adafisher_dist.adamw_keys import translate
from adafisher_dist.layouts.deepspeed_modes import refuse_config
from adafisher_dist.layouts.deepspeed_wrappers import engine_that_builds, left_idle
from adafisher_dist.optimizer.adafisher import AdaFisher
from adafisher_dist.settings import preset
from adafisher_dist.stepping.metrics import Callback

if TYPE_CHECKING:
    from torch.optim.optimizer import ParamsT

    from adafisher_dist.checkpoint import Saving

logger = logging.getLogger("adafisher_dist")


def from_config(params: ParamsT, /, **config: Any) -> AdaFisher:
    """Build AdaFisher from the `params` of a JSON config.

    Args:
        params: what DeepSpeed passes on: the model's parameters or param groups.
        config: AdaFisher's arguments; fisher_dtype by name ("bfloat16"); "preset",
            "language_models" or "image_classification", which the other keys override; and
            "metrics_every": every how many steps the engine's monitors (TensorBoard, W&B, Comet,
            CSV) are told `metrics.NAMES`. With memory_budget_gb, block_size is "auto" if it is left
            out: Hugging Face's Trainer and Accelerate refuse an "auto" that they have no value for.
            Adam's keys (betas, torch_adam, …) are taken as by AdaFisher itself.

    Raises:
        TypeError: a key is unknown, or a value has the wrong type. The message reports all
            mistakes, suggests the nearest valid name for each unknown key, and lists all valid
            ones.
        ValueError: a value is out of bounds or asks for what AdaFisher does not do, or the preset
            is unknown.
    """
    translate(config, more=("preset", "metrics_every"))  # all that is wrong; AdaFisher itself knows neither of the two
    name, every = config.pop("preset", None), config.pop("metrics_every", None)
    settings = {**(preset(name) if name is not None else {}), **config}
    if settings.get("memory_budget_gb") is not None:
        settings.setdefault("block_size", "auto")
    optimizer = AdaFisher(params, **settings)
    if every is not None:
        engine = engine_that_builds()
        if engine is None:
            raise ValueError("metrics_every is for DeepSpeed's monitors; elsewhere use optimizer.report_metrics().")
        optimizer.report_metrics(_to_monitor(engine), every)
    return optimizer


def report_metrics(engine: Any, every: int = 100) -> None:
    """Report every n-th step to an engine's monitors (TensorBoard, W&B, Comet, CSV).

    All ranks have to call this. The events are called AdaFisher/NAME, by `metrics.NAMES`, over the
    number of samples, as DeepSpeed's own are. `"metrics_every"` in the config's params does the
    same.

    Raises:
        ValueError: the engine's optimizer is not AdaFisher, no monitor is on, or `every` is not a
            whole number from 1 on.
    """
    optimizer = engine.basic_optimizer
    if not isinstance(optimizer, AdaFisher):
        raise ValueError(f"The engine's optimizer is {type(optimizer).__name__}, not AdaFisher.")
    optimizer.report_metrics(_to_monitor(engine), every)


def _to_monitor(engine: Any) -> Callback:
    if not engine.monitor.enabled:
        raise ValueError(
            "AdaFisher's metrics are asked for (metrics_every), and DeepSpeed has no monitor on. Switch one on in its"
            ' config: "csv_monitor", "tensorboard", "wandb" or "comet".'
        )
    held = weakref.ref(engine)  # the engine holds the optimizer

    def tell(step: int, metrics: dict[str, float]) -> None:
        engine = held()
        if engine is not None:
            # DeepSpeed's own count: W&B drops what is of fewer samples than its last event, and
            # skipped steps count.
            samples = engine.global_samples
            engine.monitor.write_events([(f"AdaFisher/{name}", value, samples) for name, value in metrics.items()])

    return tell


def save_checkpoint(
    engine: Any, save_dir: str | os.PathLike[str], tag: str | None = None,
    client_state: Mapping[str, Any] | None = None, save_latest: bool = True, *, keep_last: int | None = None,
    asynchronous: bool = False, exclude_frozen_parameters: bool = False,
) -> Saving:  # fmt: skip
    """Save an engine that trains with AdaFisher, each rank its own part.

    The checkpoint loads at any world size and ZeRO stage. The first arguments are those of
    `engine.save_checkpoint`. Saved are the weights (the fp32 ones, where there are some), the
    optimizer, the learning rate scheduler, the loss scale, the engine's counters, the random number
    generators, and the client state. A collective: all ranks call it.

    Args:
        engine: what `deepspeed.initialize` returned.
        save_dir: the folder of checkpoints, on a file system that all ranks share.
        tag: the name of this one, the same on all ranks; by default global_stepN.
        client_state: of rank 0: None, numbers, strings, lists, tuples, dicts, tensors, numpy arrays
            and the like.
        save_latest: let the file `latest` name this one.
        keep_last: keep so many of the checkpoints in `save_dir`, and delete the older ones; a whole
            number from 1 on, the same on all ranks.
        asynchronous: return when the state is copied to CPU memory, and write in the background.
        exclude_frozen_parameters: leave out the values of parameters that need no gradient (the
            base of a LoRA, say). A load leaves them as they are in the model, and checks their
            names and shapes.

    Returns:
        A handle: `path`, `done()` and `wait()`. It is truthy, as DeepSpeed's own result is.

    Raises:
        CheckpointError: on all ranks: it could not be written. The message says whether it was
            published; a rank that lost contact with rank 0 at the end cannot know, and says how to
            look. Or ranks, which are named, did not come or got no further for the timeout of the
            process group.
        TypeError: `client_state` holds what cannot be saved without pickling (on ranks that have
            it; a CheckpointError on the others); the optimizer is not AdaFisher.
    """
    from adafisher_dist.checkpoint.deepspeed import save_engine  # it takes time, which who only trains need not spend

    return save_engine(
        engine, save_dir, tag, client_state, save_latest, keep_last, asynchronous, exclude_frozen_parameters
    )


def load_checkpoint(
    engine: Any, load_dir: str | os.PathLike[str], tag: str | None = None, load_module_strict: bool = True,
    load_optimizer_states: bool = True, load_lr_scheduler_states: bool = True, load_module_only: bool = False, *,
    strict: bool = True, rename: Mapping[str, str] | None = None, verify: bool = True,
) -> tuple[str | None, Any]:  # fmt: skip
    """Load a checkpoint into an engine, at any world size, ZeRO stage and precision.

    It was saved by `save_checkpoint`, this one or `adafisher_dist.save_checkpoint`, or by
    `engine.save_checkpoint` of an engine with AdaFisher; those of other optimizers load by
    `engine.load_checkpoint(…, load_optimizer_states=False)`. The first arguments are those of
    `engine.load_checkpoint`, the others those of `adafisher_dist.load_checkpoint`. What does not
    fit is an error; with strict=False (or load_module_strict=False) it is logged, and left as it
    is.

    Returns:
        The checkpoint's folder and the client state; (None, None) where `tag` is None and
        `load_dir` has no `latest`.

    Raises:
        CheckpointError: on all ranks, before anything changes: it is missing, damaged, or does not
            fit; or `load_dir` is a checkpoint itself.
    """
    from adafisher_dist.checkpoint import Options
    from adafisher_dist.checkpoint.deepspeed import load_engine

    counters = not load_module_only
    states = load_optimizer_states and counters
    options = Options(strict=strict and load_module_strict, rename=rename, verify=verify, states=states, random=states)
    return load_engine(engine, load_dir, tag, options, counters, load_lr_scheduler_states and counters)


def adopt_engine() -> None:
    """Have DeepSpeed's own save_checkpoint and load_checkpoint keep AdaFisher's state.

    Other optimizers save and load as before, but cannot load AdaFisher's state. Called when an
    AdaFisher and DeepSpeed are both there. Libraries that know only DeepSpeed's functions (Hugging
    Face's Trainer, Accelerate) then resume at another world size and stage too. An engine that is
    built with another optimizer in the place of an AdaFisher gets a warning; one whose config asks
    for what AdaFisher does not do is refused.
    """
    engine_class = getattr(sys.modules.get("deepspeed.runtime.engine"), "DeepSpeedEngine", None)
    if engine_class is None or hasattr(engine_class.save_checkpoint, "without_adafisher"):
        return
    build, save, load = engine_class.__init__, engine_class.save_checkpoint, engine_class.load_checkpoint
    choose = engine_class._do_optimizer_sanity_check

    @wraps(build)
    def __init__(self: Any, *arguments: Any, **options: Any) -> None:
        build(self, *arguments, **options)
        _warn_of_another_optimizer(self)

    @wraps(choose)
    def _do_optimizer_sanity_check(self: Any, basic_optimizer: Any) -> Any:
        if isinstance(basic_optimizer, AdaFisher):
            refuse_config(self, basic_optimizer.param_groups)
            basic_optimizer._registry.sync_param_groups()  # DeepSpeed has taken empty groups away
        return choose(self, basic_optimizer)

    @wraps(save)
    def save_checkpoint(
        self: Any, save_dir: Any, tag: Any = None, client_state: Any = {}, save_latest: bool = True,  # noqa: B006
        exclude_frozen_parameters: bool = False, **more: Any,
    ) -> Any:  # fmt: skip
        if not isinstance(self.basic_optimizer, AdaFisher) or not save_dir:
            return save(self, save_dir, tag, client_state, save_latest, exclude_frozen_parameters, **more)
        from adafisher_dist.checkpoint.deepspeed import save_with_deepspeed

        return save_with_deepspeed(
            save, self, save_dir, tag, client_state, save_latest, exclude_frozen_parameters, more
        )

    @wraps(load)
    def load_checkpoint(
        self: Any, load_dir: Any, tag: Any = None, load_module_strict: bool = True, load_optimizer_states: bool = True,
        load_lr_scheduler_states: bool = True, load_module_only: bool = False, custom_load_fn: Any = None, **more: Any,
    ) -> Any:  # fmt: skip
        flags = {
            "load_module_strict": load_module_strict,
            "load_optimizer_states": load_optimizer_states,
            "load_lr_scheduler_states": load_lr_scheduler_states,
            "load_module_only": load_module_only,
            "custom_load_fn": custom_load_fn,
            **more,
        }
        if not isinstance(self.basic_optimizer, AdaFisher):
            _refuse_ours(self, load_dir, tag, flags)
            return load(self, load_dir, tag, **flags)
        from adafisher_dist.checkpoint.deepspeed import load_with_deepspeed

        try:
            signature(load).bind(self, load_dir, tag, **flags)
        except TypeError as error:
            raise TypeError(
                f"engine.load_checkpoint(): {error}. strict, rename and verify are arguments of"
                " adafisher_dist.ds.load_checkpoint(engine, …)."
            ) from None
        return load_with_deepspeed(load, self, load_dir, tag, flags)

    save_checkpoint.without_adafisher = save  # type: ignore[attr-defined]
    engine_state.adopt(engine_class)
    engine_class.__init__, engine_class._do_optimizer_sanity_check = __init__, _do_optimizer_sanity_check
    engine_class.save_checkpoint, engine_class.load_checkpoint = save_checkpoint, load_checkpoint


def _refuse_ours(engine: Any, load_dir: Any, tag: Any, flags: Mapping[str, Any]) -> None:
    """Refuse to resume another optimizer from AdaFisher's state.

    DeepSpeed would fail for a missing key, or with no message at all.

    Raises:
        CheckpointError: the state of the optimizer is asked for, and AdaFisher saved it; or the
            checkpoint has no files of DeepSpeed's. On all ranks that see the same files; on others
            DeepSpeed fails as it would have, since no rank's file of its own has such a state.
    """
    from adafisher_dist.checkpoint.errors import CheckpointError
    from adafisher_dist.checkpoint.folders import SUBFOLDER
    from adafisher_dist.checkpoint.latest import read_latest
    from adafisher_dist.checkpoint.manifest import MANIFEST

    root = Path(load_dir)
    try:
        name = str(tag) if tag is not None else read_latest(root)
    except CheckpointError:  # DeepSpeed tells what is wrong with it
        return
    if name is None:
        return
    folder = root / name
    is_ours = (folder / MANIFEST).is_file() and any(folder.glob("*.safetensors"))
    if is_ours and not any(folder.glob("*.pt")):
        raise CheckpointError(
            f"{folder} was saved by adafisher_dist.ds.save_checkpoint, which writes no files of DeepSpeed's; this"
            " engine reads no others. Export its weights (python -m adafisher_dist export"
            f" {folder} --to safetensors) and load them into the model, or save by engine.save_checkpoint. Nothing was"
            " changed."
        )
    if not isinstance(engine.basic_optimizer, Optimizer) or not flags["load_optimizer_states"]:
        return
    if flags["load_module_only"] or engine.load_universal_checkpoint():
        return
    if (folder / SUBFOLDER / MANIFEST).is_file():
        raise CheckpointError(
            f"{folder} was saved by AdaFisher, whose state {type(engine.basic_optimizer).__name__} cannot"
            " take over. Load with load_optimizer_states=False: weights, learning rate schedule and counters. Nothing"
            " was changed."
        )


def _warn_of_another_optimizer(engine: Any) -> None:
    """Warn where a library has replaced an AdaFisher that was built for the same model."""
    used = engine.basic_optimizer
    if not isinstance(used, Optimizer):  # none: this engine does not train
        return

    def given_to(own: Optimizer) -> list[Tensor]:
        return list(own._registry.given_parameters) if isinstance(own, AdaFisher) and not own._registry.shards else []

    idle = left_idle(engine.module, used, given_to)
    if idle and not isinstance(used, AdaFisher) and engine.global_rank == 0:
        logger.warning(
            "This DeepSpeed engine trains with %s, and an AdaFisher that was built for its parameters is not used. Name"
            ' it in DeepSpeed\'s config instead: "optimizer": {"type": "AdaFisher", "params": {…}}. Or, with CPU'
            ' offload, for which Accelerate replaces object and class alike, set "zero_force_ds_cpu_optimizer": false'
            " there; without it, give Hugging Face's Trainer the class, optimizer_cls_and_kwargs=(AdaFisher, {…}).",
            type(used).__name__,
        )
