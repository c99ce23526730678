"""Tasks to compare optimizers on: five small models, with data from Python and scikit-learn.

Everything is a function of a seed: initial weights, the order of the data, its augmentation. Two
optimizers that are given the same seed see the same batches.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise

import corpus as texts
import digits
import torch
from model import ByteTransformer
from torch import Tensor, nn

SEQ_LEN, SEQUENCES, CORPUS_MB = 128, 16, 8.0

Loss = Callable[[nn.Module, int, int], Tensor]


@dataclass(frozen=True, slots=True)
class Task:
    """A model, its data, and how long it is trained.

    Attributes:
        title: for people.
        unit: of the loss.
        steps: length of a run and of its schedule.
        build: the model, in the state that the global random generator gives it.
        loss: of a model on the training batch of a step, by model, seed and step.
        validate: the loss on held-out data.
        hidden: whether a parameter of this name and these dimensions is one of the matrices that
            Muon is for, as its authors use it: not embeddings, heads, biases and gains.
        lrs: a grid of learning rates of its own, coarser since it is long.
        seeds: likewise, fewer.
    """

    title: str
    unit: str
    steps: int
    build: Callable[[], nn.Module]
    loss: Loss
    validate: Callable[[nn.Module], float]
    hidden: Callable[[str, nn.Parameter], bool]
    lrs: tuple[float, ...] | None = None
    seeds: tuple[int, ...] | None = None


class AutoEncoder(nn.Module):
    """A deep auto-encoder, usual for second-order methods (Hinton and Salakhutdinov 2006)."""

    WIDTHS = (64, 128, 64, 32, 12)

    def __init__(self) -> None:
        super().__init__()
        widths = (*self.WIDTHS, *self.WIDTHS[-2::-1])
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))

    def forward(self, images_N1HW: Tensor) -> Tensor:
        x = images_N1HW.flatten(1)
        for index, layer in enumerate(self.layers):
            x = layer(x)
            if index not in (len(self.WIDTHS) - 2, len(self.layers) - 1):  # the code and the picture are linear
                x = torch.tanh(x)
        return x


def tasks() -> dict[str, Task]:
    """All by name."""
    return {
        "transformer_64": _transformer(64),
        "transformer_96": _transformer(96),
        "transformer_64_long": replace(
            _transformer(64), title="The same for four times as long", steps=800, lrs=(2.5e-3, 1e-2, 4e-2), seeds=(0,)
        ),
        "cnn": Task(
            "CNN on digits", "nats", 300, digits.CNN, digits.loss, digits.held_out_loss, _inner_matrix
        ),
        "autoencoder": Task(
            "MLP auto-encoder on digits", "squared error", 400, AutoEncoder, _reconstruct, _validate_pictures,
            lambda name, p: p.dim() == 2,
        ),
        "vit": Task(
            "Vision transformer on digits", "nats", 300, digits.ViT, digits.loss, digits.held_out_loss,
            _inner_matrix,
        ),
    }  # fmt: skip


def _transformer(width: int) -> Task:
    def loss(model: nn.Module, seed: int, step: int) -> Tensor:
        return _next_byte(model, texts.train_batch(_corpus(), step, seed, SEQUENCES, SEQ_LEN))

    def validate(model: nn.Module) -> float:
        return float(_next_byte(model, texts.held_out_batch(_corpus(), 128, SEQ_LEN)))

    return Task(
        f"Byte-level transformer, width {width}", "nats a byte", 200,
        lambda: ByteTransformer(width, layers=3, heads=4, seq_len=SEQ_LEN), loss, validate, _inner_matrix,
    )  # fmt: skip


def _next_byte(model: nn.Module, tokens_BT: Tensor) -> Tensor:
    return model(tokens_BT[:, :-1], tokens_BT[:, 1:]).mean()


def _inner_matrix(name: str, parameter: nn.Parameter) -> bool:
    """A matrix between first layer and head; torch's Muon takes no convolutions (AdamW does)."""
    return parameter.dim() == 2 and name.startswith("layers.")


@cache
def _corpus() -> texts.Corpus:
    return texts.load(None, CORPUS_MB, SEQ_LEN)


def _reconstruct(model: nn.Module, seed: int, step: int) -> Tensor:
    images, _ = digits.batch(seed, step)
    return _squares(model(images), images)


def _squares(found: Tensor, images: Tensor) -> Tensor:
    """Squared error a picture, as is usual for auto-encoders."""
    return (found - images.flatten(1)).square().sum(dim=1).mean()


def _validate_pictures(model: nn.Module) -> float:
    images = digits.load()[0][digits.TRAIN : digits.TRAIN + digits.VALIDATION]
    return float(_squares(model(images), images))
