"""A byte-level transformer language model, small enough to train on two CPU cores.

Shape suffixes: B sequences, T positions, W width, H heads, D = W / H, V = 256 byte values.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

VOCABULARY = 256


class Attention(nn.Module):
    """Causal self-attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x_BTW: Tensor) -> Tensor:
        B, T, W = x_BTW.shape
        qkv_3BHTD = self.qkv(x_BTW).view(B, T, 3, self.heads, W // self.heads).permute(2, 0, 3, 1, 4)
        y_BHTD = functional.scaled_dot_product_attention(*qkv_3BHTD.unbind(0), is_causal=True)
        return self.out(y_BHTD.transpose(1, 2).reshape(B, T, W))


class Layer(nn.Module):
    """Attention and a two-layer perceptron, each normalised before and added after."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x_BTW: Tensor) -> Tensor:
        x_BTW = x_BTW + self.attention(self.norm1(x_BTW))
        return x_BTW + self.down(functional.gelu(self.up(self.norm2(x_BTW))))


class ByteTransformer(nn.Module):
    """Predicts the next byte.

    Args:
        width: W, a multiple of heads.
        layers: number of layers.
        heads: H.
        seq_len: the most positions of an input.
    """

    def __init__(self, width: int, layers: int, heads: int, seq_len: int) -> None:
        super().__init__()
        # DeepSpeed's Muon trains all matrices but those with "embed" or "lm_head" in their names.
        self.embed_bytes = nn.Embedding(VOCABULARY, width)
        self.embed_positions = nn.Embedding(seq_len, width)
        self.layers = nn.ModuleList(Layer(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.lm_head = nn.Linear(width, VOCABULARY, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                # What is added to the residual stream starts smaller: its variance does not grow
                # with depth (GPT-2).
                deep = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(parameter, std=0.02 / (2 * layers) ** 0.5 if deep else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def groups(self) -> list[dict[str, Any]]:
        """Named parameters in groups; the tables of bytes and positions are updated as by Adam.

        AdaFisher recognizes tables of larger vocabularies by their shape.
        """
        tables = {f"{table}.weight" for table in ("embed_bytes", "embed_positions", "lm_head")}
        named = list(self.named_parameters())
        return [
            {"params": [pair for pair in named if pair[0] not in tables]},
            {"params": [pair for pair in named if pair[0] in tables], "max_blocks": 0},
        ]

    def forward(self, tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
        """The cross-entropy of each sequence, in nats a byte: (B,), float32."""
        positions_T = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)
        x_BTW = self.embed_bytes(tokens_BT) + self.embed_positions(positions_T)
        for layer in self.layers:
            x_BTW = layer(x_BTW)
        logits_BVT = self.lm_head(self.norm(x_BTW)).float().transpose(1, 2)
        return functional.cross_entropy(logits_BVT, targets_BT, reduction="none").mean(dim=1)
