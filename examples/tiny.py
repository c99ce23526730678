"""For the examples, without downloads: random two-layer models, and bytes of Python's source."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch.utils.data import Dataset
from transformers import GPT2Config, LlamaConfig, LlamaForCausalLM, set_seed

CONFIG = GPT2Config(
    vocab_size=256, n_positions=64, n_embd=64, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0,
    resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
)  # fmt: skip

LLAMA = LlamaConfig(
    vocab_size=256, max_position_embeddings=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, initializer_range=0.125, bos_token_id=0, eos_token_id=0,
)  # fmt: skip


GLOBAL_BATCH = 16


def llama() -> LlamaForCausalLM:
    """The same random weights in each process; in earnest `from_pretrained`."""
    set_seed(0)
    return LlamaForCausalLM(LLAMA)


class Bytes(Dataset[dict[str, torch.Tensor]]):
    """Sequences of bytes in the format of transformers' language models: labels are the inputs."""

    def __init__(self, first: int, count: int, length: int = 64) -> None:
        text = b"".join(path.read_bytes() for path in sorted(Path(os.__file__).parent.glob("[a-d]*.py")))
        chosen = bytearray(text[first * length : (first + count) * length])
        self.sequences = torch.frombuffer(chosen, dtype=torch.uint8).long().view(count, length)

    def __len__(self) -> int:
        return len(self.sequences)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.sequences[index], "labels": self.sequences[index]}


def training_set() -> Bytes:
    """256 sequences."""
    return Bytes(0, 256)


def held_out_set() -> Bytes:
    """64 others."""
    return Bytes(256, 64)


def batch(step: int, rank: int, ranks: int) -> torch.Tensor:
    """This rank's share of a step's sequences, whatever the number of ranks."""
    data = training_set().sequences
    return data[(step * GLOBAL_BATCH + torch.arange(GLOBAL_BATCH)) % len(data)][rank::ranks]
