"""torchtitan with AdaFisher: an OptimizersContainer, and configs that use it.

    export PYTHONPATH=examples
    torchrun --nproc-per-node 2 -m torchtitan.train --module torchtitan_container --config tiny
    torchrun --nproc-per-node 8 -m torchtitan.train --module torchtitan_container --config llama3_8b

`tiny` needs no files: two layers of torchtitan's own debug model read the bytes of Python's source.
All of torchtitan's arguments hold, as `--checkpoint.enable` and `--training.steps 100`. A run that
finds checkpoints in its folder goes on with the last of them.

torchtitan's own container knows Adam and AdamW by name. It saves what each rank's optimizer returns
as `state_dict()`, which has only this rank's part of AdaFisher's blocks. This one resolves the name
AdaFisher, and saves and loads by torch's `get_optimizer_state_dict`, which has the whole state.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from tiny import training_set
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.utils.data import IterableDataset
from torchtitan.components.checkpoint import CheckpointManager
from torchtitan.components.dataloader import ParallelAwareDataloader
from torchtitan.components.loss import CrossEntropyLoss
from torchtitan.components.metrics import MetricsProcessor
from torchtitan.components.optimizer import LRSchedulersContainer, OptimizersContainer, ParamGroupConfig
from torchtitan.components.tokenizer import BaseTokenizer
from torchtitan.config import ParallelismConfig, TrainingConfig
from torchtitan.distributed.activation_checkpoint import FullAC
from torchtitan.models.llama3 import config_registry, model_registry
from torchtitan.trainer import Trainer

from adafisher_dist import AdaFisher

FLAT = StateDictOptions(flatten_optimizer_state_dict=True)  # keys with names: stages of a pipeline do not collide


class AdaFisherContainer(OptimizersContainer):
    """Optimizers by name, AdaFisher among them; Adam and AdamW may train other parameters."""

    @dataclass(kw_only=True, slots=True)
    class Config(OptimizersContainer.Config):
        """torchtitan builds the class in which a Config is declared."""

    @staticmethod
    def _resolve_optimizer_factory(name: str) -> Any:
        return AdaFisher if name == "AdaFisher" else OptimizersContainer._resolve_optimizer_factory(name)

    def _parts(self) -> Iterator[tuple[torch.nn.Module, list[torch.optim.Optimizer]]]:
        """Each model part, which is a stage of a pipeline, with its optimizers."""
        for part in self.model_parts:
            here = set(part.parameters())
            yield part, [each for each in self.optimizers if each.param_groups[0]["params"][0] in here]

    def state_dict(self) -> dict[str, Any]:
        """By names, in DTensors. A collective: all ranks call it, as they do in torchtitan."""
        found: dict[str, Any] = {}
        for part, optimizers in self._parts():
            found |= get_optimizer_state_dict(part, optimizers, options=FLAT)
        return found

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Into the optimizers. A collective: all ranks call it."""
        for part, optimizers in self._parts():
            set_optimizer_state_dict(part, optimizers, state_dict, options=FLAT)


def adafisher(lr: float, weight_decay: float = 0.1, **settings: Any) -> AdaFisherContainer.Config:
    """AdaFisher for all parameters: what torchtitan's `default_adamw` is for AdamW."""
    values = {"lr": lr, "weight_decay": weight_decay, **settings}
    return AdaFisherContainer.Config(
        param_groups=[ParamGroupConfig(pattern=".*", optimizer_name="AdaFisher", optimizer_kwargs=values)],
        implementation="for-loop",  # of torch's Adam; AdaFisher has one of its own
    )


def llama3_8b() -> Trainer.Config:
    """torchtitan's config of that name, with another optimizer and the same learning rate."""
    config = config_registry.llama3_8b()
    (adamw,) = config.optimizer.param_groups
    config.optimizer = adafisher(adamw.optimizer_kwargs["lr"])
    return config


# ---- a run that needs no files ----


def tiny() -> Trainer.Config:
    spec = model_registry("debugmodel")
    spec.model.layers = spec.model.layers[:2]
    return Trainer.Config(
        model_spec=spec,
        tokenizer=NoTokenizer.Config(),
        dataloader=ByteLoader.Config(),
        loss=CrossEntropyLoss.Config(global_vocab_size=spec.model.vocab_size),
        optimizer=adafisher(lr=2e-3),
        lr_scheduler=LRSchedulersContainer.Config(warmup_steps=2),
        training=TrainingConfig(local_batch_size=8, seq_len=64, steps=20, disable_cuda_graphs=True),
        parallelism=ParallelismConfig(spmd_backend="partial_dtensor"),  # torch 2.13 cannot shard by "spmd_types"
        activation_checkpoint=FullAC.Config(),
        checkpoint=CheckpointManager.Config(interval=10, last_save_model_only=False),
        metrics=MetricsProcessor.Config(log_freq=1),
    )


class NoTokenizer(BaseTokenizer):
    """A byte is a token."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseTokenizer.Config):
        pass

    def __init__(self, config: Config, **_: Any) -> None:
        super().__init__()

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, tokens: list[int]) -> str:
        return bytes(tokens).decode(errors="replace")

    def get_vocab_size(self) -> int:
        return 256


class ByteLoader(ParallelAwareDataloader):
    """Sequences of bytes, over and over; each rank has its own of them, and keeps its place."""

    @dataclass(kw_only=True, slots=True)
    class Config(ParallelAwareDataloader.Config):
        pass

    def __init__(
        self, config: Config, *, dp_world_size: int, dp_rank: int, seq_len: int, local_batch_size: int,
        snapshot_every_n_steps: int | None = 1, **_: Any,
    ) -> None:  # fmt: skip
        sequences = Sequences(dp_rank, dp_world_size, seq_len)
        every = snapshot_every_n_steps
        super().__init__(sequences, dp_rank, dp_world_size, batch_size=local_batch_size, snapshot_every_n_steps=every)


class Sequences(IterableDataset):  # type: ignore[type-arg]
    def __init__(self, rank: int, ranks: int, length: int) -> None:
        self.tokens = training_set().sequences[rank::ranks, : length + 1]
        self.place = 0

    def __iter__(self) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
        while True:
            tokens = self.tokens[self.place % len(self.tokens)]
            self.place += 1
            yield {"input": tokens[:-1], "positions": torch.arange(len(tokens) - 1)}, tokens[1:]

    def state_dict(self) -> dict[str, int]:
        return {"place": self.place}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.place = state["place"]
