"""What the optimizers are compared on: text and models that nothing was tuned on, and digits.

laws64x20        a GPT on German law, 20 bytes a parameter beside the embeddings; any width of SIZES
laws64x20large   the same with eight times the batch
tune64, lora64   that GPT, trained by AdamW, on English documentation: whole, or adapters of rank 4
cnn, vit         digits, to the end of their training; development has them too
"""

from __future__ import annotations

import math
import os
import re
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import digits
import optimizers
import texts
import torch
from finetuning import freeze_but_adapters, load_pretrained
from texts import Text
from torch import Tensor, nn
from torch.nn import functional
from trainings import Task

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / "runs" / "convergence"
MIRROR = "ADAFISHER_BENCH_MIRROR"  # a folder with clones as OWNER+NAME/repo, in the place of github.com
VOCABULARY, HEAD, SEQ_LEN, SEQUENCES = 256, 16, 256, 8
SIZES = {64: 3, 96: 5, 128: 8}  # layers by width: 0.14, 0.51 and 1.44 M parameters beside the embeddings
LARGE = 8  # times the batch
HELD_OUT = 256
PRETRAINED_LOSS = 1.52216  # of what is fine-tuned, before
TUNING_STEPS = 600


@dataclass(frozen=True, slots=True)
class Source:
    """Markdown files of a repository at a commit: the same bytes for everybody."""

    repository: str
    commit: str
    megabytes: float
    digest: str


SOURCES = {
    "laws": Source("bundestag/gesetze", "77abca2ceea3b7b89ea70afb13b5dd55415eb124", 85.0, "362056d0ca71"),
    "docs": Source("MicrosoftDocs/cpp-docs", "a2e592a8fc391b6aff8d1323f5b58696abdc5d57", 8.0, "da943278df5f"),
}


@cache
def text(name: str) -> Text:
    """One of SOURCES, fetched where it is missing.

    Raises:
        ValueError: the bytes are not those that the figures are of.
    """
    source = SOURCES[name]
    found = texts.load(CACHE / f"{name}.bin", lambda: _collect(source))
    if found.digest != source.digest:
        raise ValueError(
            f"{CACHE / name}.bin has the digest {found.digest}, not {source.digest}: delete it, and it is made again."
        )
    return found


def task_of(name: str) -> Task:
    """The task of this name.

    Raises:
        ValueError: there is none.
    """
    if (found := re.fullmatch(r"laws(\d+)x(\d+)(large)?", name)) and int(found[1]) in SIZES:
        width, budget, sequences = int(found[1]), int(found[2]), SEQUENCES * (LARGE if found[3] else 1)
        steps = round(budget * hidden_numel(width) / (sequences * SEQ_LEN))
        return _language("laws", steps, lambda seed: GPT(width), sequences)
    if found := re.fullmatch(r"(tune|lora)64", name):
        return _language("docs", TUNING_STEPS, lambda seed: _pretrained(found[1] == "lora"), SEQUENCES)
    if name in digits.MODELS:
        return digits.task_of(name)
    raise ValueError(f"no such task: {name}. There are laws64x20 and the like, tune64, lora64, cnn, vit.")


# ---- the model ----


class Attention(nn.Module):
    """Causal: rotary positions, normalised queries and keys, half as many keys as queries."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.q, self.out = (nn.Linear(width, width, bias=False) for _ in range(2))
        self.k, self.v = (nn.Linear(width, width // 2, bias=False) for _ in range(2))

    def forward(self, x_BTW: Tensor, turn: Tensor) -> Tensor:
        q, k, v = (layer(x_BTW).unflatten(2, (-1, HEAD)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        q, k = (_rotated(functional.rms_norm(x, (HEAD,)), turn) for x in (q, k))
        y_BHTD = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.out(y_BHTD.transpose(1, 2).flatten(2))


class Layer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention = Attention(width)
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor, turn: Tensor) -> Tensor:
        x = x + self.attention(functional.rms_norm(x, x.shape[-1:]), turn)
        return x + self.down(functional.relu(self.up(functional.rms_norm(x, x.shape[-1:]))).square())


class GPT(nn.Module):
    """Predicts the next byte. Nanochat's layers: squared ReLU, normalisation without gains."""

    def __init__(self, width: int) -> None:
        super().__init__()
        layers = SIZES[width]
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.layers = nn.ModuleList(Layer(width) for _ in range(layers))
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        angle_TD = torch.arange(SEQ_LEN)[:, None] * 10_000.0 ** -(torch.arange(0, HEAD, 2) / HEAD)
        self.register_buffer("turn", torch.stack((angle_TD.cos(), angle_TD.sin())), persistent=False)
        for name, parameter in self.named_parameters():
            deep = name.endswith(("out.weight", "down.weight"))  # their sum grows with depth
            nn.init.normal_(parameter, std=0.02 / (2 * layers) ** 0.5 if deep else 0.02)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """The mean cross-entropy in nats of all bytes but the first."""
        x = self.embedding(tokens_BT[:, :-1])
        for layer in self.layers:
            x = layer(x, self.turn[:, : x.shape[1]])
        logits = self.head(functional.rms_norm(x, x.shape[-1:]))
        return functional.cross_entropy(logits.flatten(0, 1), tokens_BT[:, 1:].flatten())


def _rotated(x_BHTD: Tensor, turn_2TD: Tensor) -> Tensor:
    """Halves of a head's channels are the coordinates of planes."""
    cos_TD, sin_TD = turn_2TD
    low, high = x_BHTD.chunk(2, dim=-1)
    return torch.cat((low * cos_TD - high * sin_TD, low * sin_TD + high * cos_TD), dim=-1)


def hidden_numel(width: int) -> int:
    """Parameters beside embedding and head."""
    return sum(p.numel() for name, p in GPT(width).named_parameters() if optimizers.is_hidden(name, p))


def _language(kind: str, steps: int, build: Callable[[int], nn.Module], sequences: int) -> Task:
    def loss(model: nn.Module, seed: int, step: int) -> Tensor:
        return model(text(kind).batch(seed, step, sequences, SEQ_LEN))

    def validate(model: nn.Module) -> float:
        parts = text(kind).held_out_batch(HELD_OUT, SEQ_LEN).split(32)
        return math.fsum(float(model(part)) for part in parts) / len(parts)

    return Task(steps, steps * sequences * SEQ_LEN, build, loss, validate)


def _pretrained(adapters: bool) -> nn.Module:
    model = GPT(64)
    load_pretrained(model, CACHE / "base64.pt", task_of("laws64x20"), PRETRAINED_LOSS)
    if adapters:
        freeze_but_adapters(model, model.layers)
    return model


# ---- the text ----


def _collect(source: Source) -> bytes:
    with _clone(source) as git:
        listed = subprocess.run([*git, "ls-tree", "-r", "--name-only", "-z", source.commit], capture_output=True)
        names = [name for name in listed.stdout.decode().split("\0") if name.endswith(".md")]
        with subprocess.Popen([*git, "cat-file", "--batch"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
            assert process.stdin is not None and process.stdout is not None
            to, back = process.stdin, process.stdout

            def read(name: str) -> bytes:
                to.write(f"{source.commit}:{name}\n".encode())
                to.flush()
                size = int(back.readline().split()[-1])
                return back.read(size + 1)[:-1]

            collected = texts.concatenate(names, read, source.megabytes)
            to.close()
    return collected


@contextmanager
def _clone(source: Source) -> Iterator[list[str]]:
    """Git with a repository that has the commit: the start of a command."""
    if MIRROR in os.environ:
        yield ["git", "-C", f"{os.environ[MIRROR]}/{source.repository.replace('/', '+')}/repo"]
        return
    folder = CACHE / source.repository.replace("/", "+")
    git = ["git", "-C", str(folder)]
    if not folder.exists():
        folder.mkdir(parents=True)
        subprocess.run([*git, "init", "--quiet", "--bare"], check=True)
    url = f"https://github.com/{source.repository}"
    subprocess.run([*git, "fetch", "--quiet", "--depth", "1", url, source.commit], check=True)
    yield git
