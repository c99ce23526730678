"""What is trained on the development bench, by name.

gpt64x20        the GPT of width 64 on code, 20 bytes a parameter; any width and number
gpt64s2000      the same for 2,000 steps of a quarter of the batch, to compare rates over widths
cnn, vit        digits, to the end of their training
tune64, lora64  a GPT that AdamW trained on Python, on C++ headers: whole, or adapters of rank 8
"""

from __future__ import annotations

import math
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))  # behind this folder, which has a tasks.py too

import digits
import text
import torch
from models import GPT, with_lora
from torch import Tensor, nn

SEQUENCES, HELD_OUT = 16, 1024
DIGIT_STEPS, TUNING_STEPS = 1500, 600
WARM_UP, CLIP = 0.05, 1.0
BASE_SEED, BASE_LR = 99, 1e-2  # of the model that is fine-tuned


@dataclass(frozen=True, slots=True)
class Task:
    """A task: `build(seed)`, `loss(model, seed, step)`, and the held-out loss `validate(model)`."""

    steps: int
    build: Callable[[int], nn.Module]
    loss: Callable[[nn.Module, int, int], Tensor]
    validate: Callable[[nn.Module], float]


def schedule(step: int, steps: int) -> float:
    """Warm-up, then a cosine to 0."""
    warm = max(1, round(WARM_UP * steps))
    return (step + 1) / warm if step < warm else 0.5 * (1 + math.cos(math.pi * (step - warm) / (steps - warm)))


@cache
def task_of(name: str) -> Task:
    """The task of this name.

    Raises:
        ValueError: there is none.
    """
    if found := re.fullmatch(r"gpt(\d+)x(\d+)", name):
        width, budget = int(found[1]), int(found[2])
        numel = sum(p.numel() for p in GPT(width, 1).parameters())
        return _language(
            "code", round(budget * numel / (SEQUENCES * text.SEQ_LEN)), lambda seed: GPT(width, text.SEQ_LEN)
        )
    if found := re.fullmatch(r"gpt(\d+)s(\d+)", name):
        width, steps = int(found[1]), int(found[2])
        return _language("code", steps, lambda seed: GPT(width, text.SEQ_LEN), SEQUENCES // 4)
    if found := re.fullmatch(r"(tune|lora)(\d+)", name):
        return _language("headers", TUNING_STEPS, lambda seed: _pretrained(int(found[2]), found[1] == "lora"))
    if name in ("cnn", "vit"):
        build = digits.CNN if name == "cnn" else digits.ViT
        return Task(DIGIT_STEPS, lambda seed: build(), digits.loss, digits.held_out_loss)
    raise ValueError(f"no such task: {name}. There are gpt64x20, gpt64s2000 and the like, cnn, vit, tune64, lora64.")


def _language(kind: str, steps: int, build: Callable[[int], nn.Module], sequences: int = SEQUENCES) -> Task:
    return Task(steps, build, lambda model, seed, step: model(text.batch(kind, seed, step, sequences)), _held_out(kind))


def _held_out(kind: str) -> Callable[[nn.Module], float]:
    def validate(model: nn.Module) -> float:
        tokens = text.held_out(kind, HELD_OUT)
        return math.fsum(float(model(part)) for part in tokens.split(64)) / (HELD_OUT / 64)

    return validate


def _pretrained(width: int, lora: bool) -> nn.Module:
    """A GPT trained by AdamW, the same for every seed; trained once, then read from a file.

    The seed affects the adapters only.
    """
    path = text.CACHE / f"base{width}-{text.digest('code')}.pt"
    model = GPT(width, text.SEQ_LEN)
    if not path.exists():
        with torch.random.fork_rng():
            torch.manual_seed(BASE_SEED)
            base = _trained_by_adamw(width)
        beside = path.with_suffix(f".{os.getpid()}")  # another worker may be at it too
        torch.save(base.state_dict(), beside)
        beside.replace(path)
    model.load_state_dict(torch.load(path, weights_only=True))
    return with_lora(model, rank=8) if lora else model


def _trained_by_adamw(width: int) -> GPT:
    task, model = task_of(f"gpt{width}x20"), GPT(width, text.SEQ_LEN)
    optimizer = torch.optim.AdamW(model.parameters(), lr=BASE_LR, betas=(0.9, 0.95), weight_decay=0.1, foreach=True)
    for step in range(task.steps):
        optimizer.param_groups[0]["lr"] = BASE_LR * schedule(step, task.steps)
        optimizer.zero_grad()
        task.loss(model, BASE_SEED, step).backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
    return model
