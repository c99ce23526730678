"""The optimizer's state for torch's `dcp.save` and `dcp.load`, where each rank does its part."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from adafisher_dist import layouts
from adafisher_dist.checkpoint import encoding
from adafisher_dist.checkpoint.saving import target_for
from adafisher_dist.checkpoint.targets import CheckpointTarget, members_of_groups
from adafisher_dist.optimizer import state_dicts
from adafisher_dist.optimizer.adafisher import AdaFisher
from adafisher_dist.optimizer.consolidated import UNDER_TENSOR_PARALLELISM


class OptimizerState:
    """AdaFisher's state as torch's `Stateful`, for trainers that use torch.distributed.checkpoint.

        parts = {"model": model, "optimizer": OptimizerState(model, optimizer)}
        dcp.save(parts, checkpoint_id="ckpt/step100")
        dcp.load(parts, checkpoint_id="ckpt/step100")

    Each rank saves and loads a part of every tensor, by the parameters' names in the model, so that
    a checkpoint loads at any number of ranks, in one process, under DDP, FSDP2 and HSDP, whichever
    of them saved it; but not under DeepSpeed. The settings that shape the state (block_size,
    fisher_dtype, packed, …) have to be those that it was saved with; the others are loaded too.
    `adafisher_dist.save_checkpoint` needs no copy of the state, converts such settings, and
    unpickles nothing; `dcp.load` unpickles.

    Args:
        model: plain, in DistributedDataParallel, or sharded by fully_shard.
        optimizer: AdaFisher, with parameters of that model.

    Raises:
        RuntimeError: tensor parallelism cuts parameters: better now than at the first save.
    """

    def __init__(self, model: nn.Module, optimizer: AdaFisher) -> None:
        if any(layouts.parts_of(parameter) is not None for parameter in model.parameters()):
            raise RuntimeError(UNDER_TENSOR_PARALLELISM)
        self._model = model
        self._optimizer = optimizer

    def state_dict(self) -> dict[str, Any]:
        """Settings, and the state of every trainable parameter. A collective: all ranks call it.

        Raises:
            RuntimeError: on all ranks: one of them has no room for its part; or parameters are
                cut by tensor parallelism, after the constructor.
            TypeError: the optimizer is not AdaFisher; or a param group holds what cannot be saved
                without pickling.
            ValueError: the model is DeepSpeed's, or lacks a parameter of the optimizer.
        """
        target = target_for(self._model, self._optimizer)
        target.access.check_complete()
        entries = target.access.whole_state()
        named = {
            target.names[parameter.info.position]: entries[id(shard.storage.tensors[parameter.tensor])]
            for shard in target.access.shards
            for _, parameter in shard.active
        }
        return {"state": named, "settings": _settings(target)}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore what `dcp.load` put into `state_dict`'s result. A collective: all ranks call it.

        Raises:
            ValueError: it does not fit the parameters or the settings; nothing has changed.
        """
        target = target_for(self._model, self._optimizer)
        members = members_of_groups(target)
        settings = [_of_group(names, state_dict["settings"]) for names in members]
        numbers = {name: number for number, name in enumerate(name for names in members for name in names)}
        rates = [group["lr"] for group in self._optimizer.param_groups]
        self._optimizer.load_state_dict(
            {
                "state": {numbers[name]: entry for name, entry in state_dict["state"].items()},
                "param_groups": [
                    {**found, "params": [numbers[name] for name in names]}
                    for found, names in zip(settings, members, strict=True)
                ],
                state_dicts.META: state_dicts.about(),
            }
        )
        for group, rate in zip(self._optimizer.param_groups, rates, strict=True):
            if isinstance(rate, Tensor):  # the user's own, which a compiled step may hold
                group["lr"] = rate.fill_(float(group["lr"]))


def _settings(target: CheckpointTarget) -> dict[str, str]:
    """The settings of each parameter's group, as JSON: one value for torch, whatever is in it."""
    found: dict[str, str] = {}
    for group, names in zip(target.optimizer.param_groups, members_of_groups(target), strict=True):
        tensors: list[Tensor] = []
        plain = {key: value for key, value in group.items() if key not in ("params", "param_names")}
        plain["lr"] = float(plain["lr"])
        text = json.dumps(encoding.encode(plain, "a param group", tensors))
        if tensors:
            raise TypeError("A param group holds a tensor, other than lr, which OptimizerState cannot save.")
        found |= dict.fromkeys(names, text)
    return found


def _of_group(names: Sequence[str], saved: Mapping[str, str]) -> dict[str, Any]:
    """The settings of a param group, which must be those of all its parameters.

    Raises:
        ValueError: they are not alike.
    """
    texts = sorted({saved[name] for name in names if name in saved})
    if len(texts) > 1:
        raise ValueError(
            f"The parameters of one param group, as {names[0]}, were saved with different settings: {texts}. Make the"
            " param groups as they were when the state was saved."
        )
    found: dict[str, Any] = encoding.decode(json.loads(texts[0]), []) if texts else {}
    return found
