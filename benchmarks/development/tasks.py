"""What is trained on the development bench, by name.

gpt64x20        the GPT of width 64 on code, 20 bytes a parameter; any width and number
gpt64s2000      the same for 2,000 steps of a quarter of the batch, to compare rates over widths
cnn, vit        digits, to the end of their training
gpt64x20-bf16   any of these with weights, and so all arithmetic of the model, in bfloat16
tune64, lora64  a GPT that AdamW trained on Python, on C++ headers: whole, or adapters of rank 8
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import replace

import digits
import text
from finetuning import freeze_but_adapters, load_pretrained
from models import GPT
from torch import Tensor, nn
from trainings import Task

SEQUENCES, HELD_OUT = 16, 1024
TUNING_STEPS = 600


def task_of(name: str) -> Task:
    """The task of this name.

    Raises:
        ValueError: there is none.
    """
    if name.startswith("gpt") and name.endswith("-bf16"):
        task = task_of(name.removesuffix("-bf16"))
        return replace(task, build=lambda seed: task.build(seed).bfloat16())
    if found := re.fullmatch(r"gpt(\d+)x(\d+)", name):
        width, budget = int(found[1]), int(found[2])
        numel = sum(p.numel() for p in GPT(width, 1).parameters())
        steps = round(budget * numel / (SEQUENCES * text.SEQ_LEN))
        return _language("code", steps, lambda seed: GPT(width, text.SEQ_LEN))
    if found := re.fullmatch(r"gpt(\d+)s(\d+)", name):
        width, steps = int(found[1]), int(found[2])
        return _language("code", steps, lambda seed: GPT(width, text.SEQ_LEN), SEQUENCES // 4)
    if found := re.fullmatch(r"(tune|lora)(\d+)", name):
        return _language("headers", TUNING_STEPS, lambda seed: _pretrained(int(found[2]), found[1] == "lora"))
    if name in digits.MODELS:
        return digits.task_of(name)
    raise ValueError(f"no such task: {name}. There are gpt64x20, gpt64s2000 and the like, cnn, vit, tune64, lora64.")


def _language(kind: str, steps: int, build: Callable[[int], nn.Module], sequences: int = SEQUENCES) -> Task:
    def loss(model: nn.Module, seed: int, step: int) -> Tensor:
        return model(text.load(kind).batch(seed, step, sequences, text.SEQ_LEN))

    def validate(model: nn.Module) -> float:
        tokens = text.load(kind).held_out_batch(HELD_OUT, text.SEQ_LEN)
        return math.fsum(float(model(part)) for part in tokens.split(64)) / (HELD_OUT / 64)

    return Task(steps, steps * sequences * text.SEQ_LEN, build, loss, validate)


def _pretrained(width: int, adapters: bool) -> nn.Module:
    model = GPT(width, text.SEQ_LEN)
    load_pretrained(model, text.CACHE / f"base{width}-{text.load('code').digest}.pt", task_of(f"gpt{width}x20"))
    if adapters:
        freeze_but_adapters(model, model.layers)
    return model
