"""What the optimizers are compared on: five small models and data that come with Python and scikit-learn.

Everything is a function of a seed: initial weights, the order of the data, its augmentation. Two optimizers that are
given the same seed see the same batches.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise

import corpus as texts
import torch
from model import ByteTransformer
from torch import Tensor, nn
from torch.nn import functional

SEQ_LEN, SEQUENCES, CORPUS_MB = 128, 16, 8.0
# Of the 1,797 digits. The last 297 are a test split, which nothing here looks at.
TRAIN, VALIDATION = 1000, 500
IMAGES = 64  # a batch

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
        hidden: whether a parameter of this name and these dimensions is one of the matrices that Muon is for, as its
            authors use it: not embeddings, heads, biases and gains.
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


class DigitsCNN(nn.Module):
    """Three convolutions and a linear layer, on 8 × 8 images."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv2d(1, 16, 3, padding=1), nn.Conv2d(16, 32, 3, padding=1)])
        self.last = nn.Conv2d(32, 48, 3, padding=1)
        self.head = nn.Linear(48 * 4, 10)

    def forward(self, images_N1HW: Tensor) -> Tensor:
        x = images_N1HW
        for conv in self.convs:
            x = functional.relu(conv(x))
        x = functional.max_pool2d(x, 2)
        x = functional.max_pool2d(functional.relu(self.last(x)), 2)
        return self.head(x.flatten(1))


class AutoEncoder(nn.Module):
    """The deep auto-encoder on which second-order methods have been compared since Hinton and Salakhutdinov (2006)."""

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


class DigitsViT(nn.Module):
    """A vision transformer on sixteen patches of 2 × 2."""

    def __init__(self, width: int = 48, layers: int = 2, heads: int = 4) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 2, stride=2)
        self.positions = nn.Parameter(0.02 * torch.randn(16, width))
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
            )
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)

    def forward(self, images_N1HW: Tensor) -> Tensor:
        x = self.patches(images_N1HW).flatten(2).transpose(1, 2) + self.positions
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x.mean(dim=1)))


def tasks() -> dict[str, Task]:
    """All by name."""
    return {
        "transformer_64": _transformer(64),
        "transformer_96": _transformer(96),
        "transformer_64_long": replace(
            _transformer(64), title="The same for four times as long", steps=800, lrs=(2.5e-3, 1e-2, 4e-2), seeds=(0,)
        ),
        "cnn": Task(
            "CNN on digits", "nats", 300, DigitsCNN, _classify, _validate(functional.cross_entropy), _inner_matrix
        ),
        "autoencoder": Task(
            "MLP auto-encoder on digits", "squared error", 400, AutoEncoder, _reconstruct, _validate_pictures,
            lambda name, p: p.dim() == 2,
        ),
        "vit": Task(
            "Vision transformer on digits", "nats", 300, DigitsViT, _classify, _validate(functional.cross_entropy),
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
    """A weight between the first layer and the head; torch's Muon takes matrices only, so convolutions are AdamW's."""
    return parameter.dim() == 2 and name.startswith("layers.")


@cache
def _corpus() -> texts.Corpus:
    return texts.load(None, CORPUS_MB, SEQ_LEN)


@cache
def _digits() -> tuple[Tensor, Tensor]:
    """All the digits in one random order: images (1797, 1, 8, 8) in [0, 1], labels."""
    from sklearn.datasets import load_digits

    data = load_digits()
    order = torch.randperm(len(data.images), generator=torch.Generator().manual_seed(0))
    images = torch.from_numpy(data.images).float().div_(16).unsqueeze(1)
    return images[order], torch.from_numpy(data.target).long()[order]


def _batch(seed: int, step: int) -> tuple[Tensor, Tensor]:
    """A batch of training images, each moved by up to a pixel each way, and labels."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    images, labels = _digits()
    chosen = torch.randint(TRAIN, (IMAGES,), generator=generator)
    shift = torch.randint(3, (2, IMAGES), generator=generator)
    padded = functional.pad(images[chosen, 0], (1, 1, 1, 1))
    rows, columns = (shift[:, :, None] + torch.arange(8)).unbind(0)
    moved = padded[torch.arange(IMAGES)[:, None, None], rows[:, :, None], columns[:, None, :]]
    return moved.unsqueeze(1), labels[chosen]


def _classify(model: nn.Module, seed: int, step: int) -> Tensor:
    images, labels = _batch(seed, step)
    return functional.cross_entropy(model(images), labels)


def _reconstruct(model: nn.Module, seed: int, step: int) -> Tensor:
    images, _ = _batch(seed, step)
    return _squares(model(images), images)


def _squares(found: Tensor, images: Tensor) -> Tensor:
    """Squared error a picture, as is usual for auto-encoders."""
    return (found - images.flatten(1)).square().sum(dim=1).mean()


def _validate(loss: Callable[[Tensor, Tensor], Tensor]) -> Callable[[nn.Module], float]:
    def validate(model: nn.Module) -> float:
        images, labels = (part[TRAIN : TRAIN + VALIDATION] for part in _digits())
        return float(loss(model(images), labels))

    return validate


def _validate_pictures(model: nn.Module) -> float:
    images = _digits()[0][TRAIN : TRAIN + VALIDATION]
    return float(_squares(model(images), images))
