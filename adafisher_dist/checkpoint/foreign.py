"""Load weights that another optimizer's run saved with DeepSpeed alone.

DeepSpeed's files are pickles, which can run any code. They are read as plain data (`torch.load`'s
weights_only), and what is more than that is refused. Their optimizer states fit only their own
optimizer: a load that asks for them is refused.
"""

from __future__ import annotations

import os
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from adafisher_dist.checkpoint.all_ranks import run_on_all_ranks
from adafisher_dist.checkpoint.errors import CheckpointError, reason
from adafisher_dist.checkpoint.files import check_regular
from adafisher_dist.checkpoint.folders import SUBFOLDER, those_in
from adafisher_dist.checkpoint.latest import LATEST, read_latest
from adafisher_dist.checkpoint.manifest import MANIFEST
from adafisher_dist.comm.host_groups import HostGroup

# Plain classes of DeepSpeed's own that its files hold besides tensors and Python's values.
_PLAIN = {
    "deepspeed.runtime.fp16.loss_scaler": ("LossScaler", "DynamicLossScaler"),
    "deepspeed.runtime.zero.config": ("ZeroStageEnum",),
    "deepspeed.utils.tensor_fragment": ("fragment_address",),
}

# torch's own switches: the first holds for DeepSpeed's calls too, which ask for the contrary.
_RESTRICT, _TRUST = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"


def load(
    original: Callable[..., Any], engine: Any, hosts: HostGroup, root: Path, tag: str, flags: Mapping[str, Any]
) -> Any:
    """Load the weights, and what else is asked for, by DeepSpeed's own function. A collective.

    Args:
        original: DeepSpeed's load_checkpoint.
        engine: the engine.
        hosts: the ranks.
        root: the folder of checkpoints.
        tag: the checkpoint's.
        flags: the other arguments of load_checkpoint.

    Raises:
        CheckpointError: on all ranks, before anything changes: the optimizer's state is asked for;
            there are no files for these ranks and this ZeRO stage; or they hold more than plain
            data.
    """
    run_on_all_ranks(hosts, lambda: _check(engine, hosts, root, tag, flags))
    if engine.zero_optimization_partition_weights():
        # With it DeepSpeed 0.19.8 would look for the weights where stage 3 has none, and load
        # nothing.
        flags = {**flags, "load_optimizer_states": False}
    with _plain_data():
        result = original(engine, str(root), tag, **flags)
    if hasattr(engine.optimizer, "refresh_fp32_params"):
        engine.optimizer.refresh_fp32_params()  # DeepSpeed 0.19.8 leaves those of stage 0 as they were
    return result


def _check(engine: Any, hosts: HostGroup, root: Path, tag: str, flags: Mapping[str, Any]) -> None:
    folder = root / tag
    if not folder.is_dir():
        raise CheckpointError(f"There is no checkpoint {folder}. {those_in(root)}")
    if flags["load_optimizer_states"] and not flags["load_module_only"]:
        raise CheckpointError(
            f"{folder} holds no state of AdaFisher: it has no {SUBFOLDER}/{MANIFEST}. If another optimizer saved it,"
            " load with load_optimizer_states=False (weights, learning rate schedule, counters) or"
            " load_module_only=True (weights); where a library calls engine.load_checkpoint, as Hugging Face's"
            " resume_from_checkpoint does, load the weights into the model beforehand (from_pretrained). If AdaFisher"
            " saved it, that folder is lost: copy it again, or take another checkpoint. Nothing was changed."
        )
    stage3 = engine.zero_optimization_partition_weights()
    files = [Path(path) for path in engine._get_all_ckpt_names(str(root), tag)]
    if not files:
        raise CheckpointError(
            f"{folder} has no file of DeepSpeed's that fits ZeRO stage {engine.zero_optimization_stage()} on"
            f" {hosts.size} ranks: its own files resume where they were saved alone. Load there, or take the weights"
            " out of them (DeepSpeed's zero_to_fp32.py). Nothing was changed."
        )
    if stage3 and read_latest(root) != tag:
        raise CheckpointError(
            f"At ZeRO stage 3 DeepSpeed takes the weights of what the file {LATEST} in {root} names, which is"
            f" {read_latest(root)!r}, and not {tag!r}. Write {tag} into that file. Nothing was changed."
        )
    if stage3:
        files = [*folder.glob("*_model_states.pt"), *folder.glob("*_optim_states.pt")]
    for path in sorted(set(files))[hosts.rank :: hosts.size] if stage3 else files:
        _check_file(path)


def _check_file(path: Path) -> None:
    """Whether a file can be read as plain data; its tensors are not read.

    Raises:
        CheckpointError: it cannot.
    """
    try:
        check_regular(path.stat().st_mode, path.name)
        with _plain_data():
            torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {reason(error)}. Nothing was changed.") from error
    except Exception as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        what = f"it holds {found[1]}" if found else f"{type(error).__name__}: {str(error).splitlines()[0]}"
        raise CheckpointError(
            f"{path} cannot be read as plain data ({what}), and nothing else is read, since pickles can run any code."
            " If you trust it, name such classes to torch.serialization.add_safe_globals before the load. Nothing was"
            " changed."
        ) from error


@contextmanager
def _plain_data() -> Iterator[None]:
    """While every torch.load of this process, DeepSpeed's too, takes plain data alone."""
    found = [(import_module(module), names) for module, names in _PLAIN.items()]
    plain = [getattr(module, name) for module, names in found for name in names if hasattr(module, name)]
    before = {name: os.environ.pop(name, None) for name in (_RESTRICT, _TRUST)}
    os.environ[_RESTRICT] = "1"
    try:
        with torch.serialization.safe_globals(plain):
            yield
    finally:
        del os.environ[_RESTRICT]
        os.environ.update({name: value for name, value in before.items() if value is not None})
