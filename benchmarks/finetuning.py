"""Fine-tuning in the benchmarks: a model that AdamW trained, whole or with adapters of low rank."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn
from trainings import CLIP, Task, measured, schedule

# At these widths a rank of 8 would make factors that are no tables to AdaFisher, as those of real
# models are: one side of them is more than 8 times the other.
RANK, SCALE = 4, 2.0
SEED, LR, WEIGHT_DECAY = 99, 1e-2, 0.1  # of the training before


class LoRA(nn.Module):
    """A frozen linear layer plus a trained product of two thin matrices (Hu et al. 2021)."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.a = nn.Parameter(torch.randn(RANK, base.in_features) / base.in_features**0.5)
        self.b = nn.Parameter(torch.zeros(base.out_features, RANK))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + SCALE * (x @ self.a.mT) @ self.b.mT


def freeze_but_adapters(model: nn.Module, layers: nn.Module) -> None:
    """Give all linear layers in `layers` adapters, and train nothing else."""
    model.requires_grad_(False)
    for owner in list(layers.modules()):
        for name, child in list(owner.named_children()):
            if isinstance(child, nn.Linear):
                setattr(owner, name, LoRA(child))


def load_pretrained(model: nn.Module, path: Path, task: Task, known: float | None = None) -> None:
    """Give a model the weights that AdamW has trained on a task, the same for every seed.

    They are trained where the file is missing, with a warning where they do not end at the `known`
    loss, with which committed trainings began: other processors round otherwise.
    """
    if not path.exists():
        trained = _trained_by_adamw(task)
        loss = measured(task.validate, trained)
        if known not in (None, loss):
            warnings.warn(
                f"The model that is fine-tuned ends at {loss} before, and did at {known} where the committed"
                " trainings began: compare fine-tunings of one machine.",
                stacklevel=2,
            )
        beside = path.with_suffix(f".{os.getpid()}")  # another worker may be at it too
        torch.save(trained.state_dict(), beside)
        beside.replace(path)
    model.load_state_dict(torch.load(path, weights_only=True))


def _trained_by_adamw(task: Task) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        model = task.build(SEED)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.95), weight_decay=WEIGHT_DECAY, foreach=True)
    for step in range(task.steps):
        optimizer.param_groups[0]["lr"] = LR * schedule(step, task.steps)
        optimizer.zero_grad()
        task.loss(model, SEED, step).backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
    return model
