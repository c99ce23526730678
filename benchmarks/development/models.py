"""The language model of the development bench: a modern byte-level GPT (Llama's layers)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

VOCABULARY, LAYERS, HEAD = 256, 3, 32


class Attention(nn.Module):
    """Causal, with rotary positions."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(width, width, bias=False) for _ in range(4))

    def forward(self, x_BTW: Tensor, turn_TD: Tensor) -> Tensor:
        B, T, W = x_BTW.shape
        q, k, v = (layer(x_BTW).view(B, T, W // HEAD, HEAD).transpose(1, 2) for layer in (self.q, self.k, self.v))
        y_BHTD = functional.scaled_dot_product_attention(rotate(q, turn_TD), rotate(k, turn_TD), v, is_causal=True)
        return self.out(y_BHTD.transpose(1, 2).reshape(B, T, W))


def rotate(x_BHTD: Tensor, turn_2TD: Tensor) -> Tensor:
    """Rotary positions: halves of a head's channels are the coordinates of planes."""
    cos_TD, sin_TD = turn_2TD
    low, high = x_BHTD.chunk(2, dim=-1)
    return torch.cat((low * cos_TD - high * sin_TD, low * sin_TD + high * cos_TD), dim=-1)


class Layer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        hidden = -(-8 * width // 48) * 16  # 8/3 of the width, in sixteens
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.attention = Attention(width)
        self.gate, self.up = nn.Linear(width, hidden, bias=False), nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor, turn: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x), turn)
        y = self.norm2(x)
        return x + self.down(functional.silu(self.gate(y)) * self.up(y))


class GPT(nn.Module):
    """Predicts the next byte."""

    def __init__(self, width: int, seq_len: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.layers = nn.ModuleList(Layer(width) for _ in range(LAYERS))
        self.norm = nn.RMSNorm(width)
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        angle_TD = torch.arange(seq_len)[:, None] * 10_000.0 ** -(torch.arange(0, HEAD, 2) / HEAD)
        self.register_buffer("turn", torch.stack((angle_TD.cos(), angle_TD.sin())), persistent=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                deep = name.endswith(("out.weight", "down.weight"))  # their sum grows with depth
                nn.init.normal_(parameter, std=0.02 / (2 * LAYERS) ** 0.5 if deep else 0.02)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """The mean cross-entropy in nats of all bytes but the first."""
        x = self.embedding(tokens_BT[:, :-1])
        for layer in self.layers:
            x = layer(x, self.turn[:, : x.shape[1]])
        return functional.cross_entropy(self.head(self.norm(x)).flatten(0, 1).float(), tokens_BT[:, 1:].flatten())
