"""Handwritten digits of scikit-learn, 8 × 8 pixels, and two small models that tell them apart."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional
from trainings import Task

# Of the 1,797 digits. The last 297 are a test split, which nothing is chosen by.
TRAIN, VALIDATION, TEST = 1000, 500, 297
IMAGES = 64  # a batch
STEPS = 1500


class CNN(nn.Module):
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


class ViT(nn.Module):
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


@cache
def load() -> tuple[Tensor, Tensor]:
    """All the digits in one random order: images (1797, 1, 8, 8) in [0, 1], labels."""
    from sklearn.datasets import load_digits

    data = load_digits()
    order = torch.randperm(len(data.images), generator=torch.Generator().manual_seed(0))
    images = torch.from_numpy(data.images).float().div_(16).unsqueeze(1)
    return images[order], torch.from_numpy(data.target).long()[order]


def batch(seed: int, step: int) -> tuple[Tensor, Tensor]:
    """A batch of training images, each moved by up to a pixel each way, and labels."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    images, labels = load()
    chosen = torch.randint(TRAIN, (IMAGES,), generator=generator)
    shift = torch.randint(3, (2, IMAGES), generator=generator)
    padded = functional.pad(images[chosen, 0], (1, 1, 1, 1))
    rows, columns = (shift[:, :, None] + torch.arange(8)).unbind(0)
    moved = padded[torch.arange(IMAGES)[:, None, None], rows[:, :, None], columns[:, None, :]]
    return moved.unsqueeze(1), labels[chosen]


def loss(model: nn.Module, seed: int, step: int) -> Tensor:
    images, labels = batch(seed, step)
    return functional.cross_entropy(model(images), labels)


@torch.no_grad()
def held_out_loss(model: nn.Module, split: slice = slice(TRAIN, TRAIN + VALIDATION)) -> float:
    """The mean cross-entropy of a split, the validation split by default."""
    images, labels = (part[split] for part in load())
    return float(functional.cross_entropy(model(images), labels))


def test_loss(model: nn.Module) -> float:
    """That of the test split."""
    return held_out_loss(model, slice(TRAIN + VALIDATION, TRAIN + VALIDATION + TEST))


MODELS = {"cnn": CNN, "vit": ViT}


def task_of(name: str) -> Task:
    """The training of one of MODELS to its end."""
    return Task(STEPS, STEPS * IMAGES, lambda seed: MODELS[name](), loss, held_out_loss, test_loss)
