"""LoRA by PEFT on a tiny Llama: AdaFisher beside AdamW at the same rates.

    python benchmarks/development/peft_lora.py

The base is trained by AdamW on Python's source; the adapters on its C headers. Prints the held-out
loss before and after, mean and standard deviation over seeds.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sysconfig
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from adafisher_dist import AdaFisher

CONFIG = LlamaConfig(
    vocab_size=256, max_position_embeddings=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2,
)  # fmt: skip
BATCH, LENGTH = 16, 64

Kind = Callable[..., torch.optim.Optimizer]


def text(folder: str, pattern: str) -> Tensor:
    """The files' bytes, (bytes,) int64."""
    found = b"".join(path.read_bytes() for path in sorted(Path(sysconfig.get_path(folder)).glob(pattern)))
    return torch.frombuffer(bytearray(found), dtype=torch.uint8).long()


def batch(data: Tensor, generator: torch.Generator, size: int = BATCH) -> Tensor:
    starts = torch.randint(len(data) - LENGTH, (size, 1), generator=generator)
    return data[starts + torch.arange(LENGTH)]


def train(model: nn.Module, kind: Kind, lr: float, data: Tensor, steps: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    optimizer = kind([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)
    for _ in range(steps):
        tokens = batch(data, generator)
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def loss(model: nn.Module, data: Tensor) -> float:
    tokens = batch(data, torch.Generator().manual_seed(1), 256)
    return float(model(input_ids=tokens, labels=tokens).loss)


def adapted(base: LlamaForCausalLM, rank: int, seed: int) -> Any:
    torch.manual_seed(seed)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")
    return get_peft_model(copy.deepcopy(base), config)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pretraining", type=int, default=600, help="steps")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--ranks", type=int, nargs="+", default=[4, 16], help="of the adapters")
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-4, 2e-4, 1e-3])
    parser.add_argument("--second-moment", type=float, nargs=2, default=[0.999, 0.97], help="AdamW's β₂, AdaFisher's ρ")
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    base = LlamaForCausalLM(CONFIG)
    train(base, torch.optim.AdamW, 3e-3, text("stdlib", "[a-m]*.py"), args.pretraining, seed=0)
    headers = text("include", "*.h")
    data, held_out = headers[: len(headers) * 9 // 10], headers[len(headers) * 9 // 10 :]
    print(f"before: {loss(base, held_out):.3f}", flush=True)
    beta2, rho = args.second_moment
    kinds = {
        "AdamW": partial(torch.optim.AdamW, betas=(0.9, beta2)),
        "AdaFisher": partial(AdaFisher, fisher_decay=rho),
    }
    for rank in args.ranks:
        for lr in args.rates:
            for name, kind in kinds.items():
                ends = []
                for seed in range(args.seeds):
                    model = adapted(base, rank, seed)
                    train(model, kind, lr, data, args.steps, seed)
                    ends.append(loss(model, held_out))
                spread = statistics.stdev(ends) if args.seeds > 1 else 0.0
                told = f"{statistics.mean(ends):.3f} ± {spread:.3f}"
                print(f"rank {rank} lr {lr:g} {name}: {told}", flush=True)


if __name__ == "__main__":
    main()
