"""GPT-2's shapes: the language models on whose parameters `fast.py` takes steps.

Shape suffixes as in launch/model.py, whose layers these are: B sequences, T positions, W width, V
vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from model import Layer
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True, slots=True)
class Shape:
    """Of a model and of the batches that it is given."""

    title: str
    width: int
    layers: int
    heads: int
    vocabulary: int
    seq_len: int
    batch: int


SHAPES = {
    "350M": Shape("350 M", 1024, 24, 16, 50_304, 1024, 8),
    "124M": Shape("124 M", 768, 12, 12, 50_304, 1024, 8),
}
TINY = {"350M": Shape("tiny", 16, 1, 2, 32, 8, 2)}


class GPT(nn.Module):
    """A GPT-2: the head is the embedding."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.tokens = nn.Embedding(shape.vocabulary, shape.width)
        self.positions = nn.Embedding(shape.seq_len, shape.width)
        self.layers = nn.ModuleList(Layer(shape.width, shape.heads) for _ in range(shape.layers))
        self.norm = nn.LayerNorm(shape.width)
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
        """The mean cross-entropy, in nats a token."""
        x_BTW = self.tokens(tokens_BT) + self.positions.weight[: tokens_BT.shape[1]]
        for layer in self.layers:
            x_BTW = layer(x_BTW)
        logits_BTV = functional.linear(self.norm(x_BTW), self.tokens.weight)
        return functional.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten())


def build(shape: Shape, device: torch.device) -> GPT:
    """A model on a device, the same each time."""
    torch.manual_seed(0)
    with device:
        return GPT(shape)


def is_hidden(name: str, parameter: Tensor) -> bool:
    """Whether it is one of the matrices that Muon is for, as its authors use it."""
    return parameter.dim() == 2 and name.startswith("layers.")
