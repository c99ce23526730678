"""A training with everything that a checkpoint can hold, and what a load may change of it."""

from __future__ import annotations

import hashlib
import math
import random
from argparse import Namespace
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from adafisher_dist import AdaFisher, load_checkpoint, save_checkpoint


class Counted(nn.Module):
    """Has extra state, and takes only what it knows."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen += 1
        return x

    def get_extra_state(self) -> Any:
        return {"seen": self.seen, "table": torch.tensor([1, 7])}

    def set_extra_state(self, state: Any) -> None:
        self.seen = -1  # half-way
        self.seen = state["seen"] + 0 * int(state["table"].sum())


class Net(nn.Module):
    """With a buffer, a tied parameter, and extra state."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 5, bias=False)
        self.counted, self.again = Counted(), nn.Linear(5, 5, bias=False)
        self.again.weight = self.second.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.again(self.counted(torch.tanh(self.second(self.norm(self.first(x))))))


class Whole:
    """A training with everything that a checkpoint can hold."""

    def __init__(self, seed: int, scheduler: str = "cosine") -> None:
        torch.manual_seed(seed)
        self.model = Net()
        groups = [
            {"params": [p for p in self.model.parameters() if p.dim() > 1], "mine": ("t", 1), "lr": torch.tensor(1e-2)},
            {"params": [p for p in self.model.parameters() if p.dim() == 1], "weight_decay": 0.0},
        ]
        self.optimizer = AdaFisher(groups, lr=1e-2, block_size=4, rows_per_block=2, inverse_update_freq=2)
        schedule = torch.optim.lr_scheduler
        self.scheduler = {
            "cosine": lambda: schedule.CosineAnnealingLR(self.optimizer, 50),
            "plateau": lambda: schedule.ReduceLROnPlateau(self.optimizer),
            "steps": lambda: schedule.MultiStepLR(self.optimizer, [2, 40]),
            "in turn": lambda: schedule.SequentialLR(
                self.optimizer, [schedule.ConstantLR(self.optimizer), schedule.ExponentialLR(self.optimizer, 0.9)], [3]
            ),
        }[scheduler]()

    def step(self, count: int = 1) -> None:
        for _ in range(count):
            self.optimizer.zero_grad()
            loss = self.model(torch.randn(16, 6)).square().mean()
            loss.backward()
            self.optimizer.step()
            plateau = isinstance(self.scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau)
            self.scheduler.step(*([float(loss.detach())] if plateau else []))

    def save(self, path: Path) -> None:
        extra = {
            "step": 3, "t": torch.arange(4.0), "pair": (1, 2), "np": np.float32(2.5), "set": {1, 2}, "k": {1: 2},
            "inf": math.inf, "path": Path("a/b"), "b": b"xy", "ns": Namespace(q=1), "c": 1 + 2j, "n": Counter("aab"),
        }  # fmt: skip
        save_checkpoint(path, self.model, self.optimizer, lr_scheduler=self.scheduler, extra=extra)

    def load(self, path: Path, **more: Any) -> Any:
        return load_checkpoint(path, self.model, self.optimizer, lr_scheduler=self.scheduler, **more)

    def everything(self) -> list[Any]:
        """Whatever a load may change."""
        return [
            dict(self.model.state_dict()), self.optimizer.state_dict(), self.optimizer.skipped_steps,
            [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups],
            self.scheduler.state_dict(), torch.get_rng_state(), np.random.get_state(), random.getstate(),
        ]  # fmt: skip


def digest(*things: Any) -> str:
    """Of every bit."""
    found = hashlib.sha256()

    def feed(thing: Any) -> None:
        if isinstance(thing, torch.Tensor):
            data = thing.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
            found.update(f"{thing.dtype}{tuple(thing.shape)}".encode() + data.tobytes())
        elif isinstance(thing, np.ndarray):
            found.update(f"{thing.dtype}{thing.shape}".encode() + thing.tobytes())
        elif isinstance(thing, dict):
            for key in sorted(thing, key=repr):
                found.update(f"{key!r}:".encode())
                feed(thing[key])
        elif isinstance(thing, list | tuple):
            found.update(f"{type(thing).__name__}{len(thing)}".encode())
            for item in thing:
                feed(item)
        else:
            found.update(f"{type(thing).__name__}{thing!r}".encode())

    feed(list(things))
    return found.hexdigest()
