"""A small language model cut by tensor parallelism, and the same training in one process."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from models import weights
from torch import Tensor, nn

from adafisher_dist import AdaFisher

SETTINGS: dict[str, Any] = {"lr": 1e-2, "block_size": 8, "rows_per_block": 4}
VOCABULARY = 32  # with which the edges of all parts lie on the grid


class Block(nn.Module):
    """A layer of a transformer without its attention, between an embedding and a head."""

    def __init__(self, width: int = 16, hidden: int = 32) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)
        self.head = nn.Linear(width, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        x = x + self.down(torch.tanh(self.up(self.norm(x))))
        return self.head(x)


def loss_of(module: nn.Module, step: int, part: slice = slice(None)) -> Tensor:
    generator = torch.Generator().manual_seed(50 + step)
    tokens, targets = torch.randint(VOCABULARY, (2, 8, 6), generator=generator)[:, part]
    return nn.functional.cross_entropy(module(tokens).flatten(0, 1), targets.flatten())


def alone(hidden: int, settings: dict[str, Any], steps: int = 8) -> dict[str, np.ndarray]:
    module = Block(hidden=hidden)
    optimizer = AdaFisher(module.parameters(), **settings)
    for step in range(steps):
        optimizer.zero_grad()
        loss_of(module, step).backward()
        optimizer.step()
    return weights(module)


def alone_in_parts(hidden: int, tensor: int) -> dict[str, np.ndarray]:
    """The same training in one process, whose optimizer is given each rank's part by itself."""
    module = Block(hidden=hidden)
    dims = {"embedding.weight": 0, "up.weight": 0, "up.bias": 0, "down.weight": 1, "head.weight": 0}
    parts = {name: list(p.detach().chunk(tensor, dims.get(name, 0))) for name, p in module.named_parameters()}
    parts |= {name: [p.detach()] for name, p in module.named_parameters() if name not in dims}
    copies = {name: [nn.Parameter(part.clone()) for part in own] for name, own in parts.items()}
    optimizer = AdaFisher([part for own in copies.values() for part in own], **SETTINGS)
    for step in range(8):
        module.zero_grad()
        loss_of(module, step).backward()
        for name, p in module.named_parameters():
            assert p.grad is not None
            for own, gradient in zip(copies[name], p.grad.chunk(len(copies[name]), dims.get(name, 0)), strict=True):
                own.grad = gradient.contiguous()
        optimizer.step()
        for name, own in parts.items():
            for part, trained_ in zip(own, copies[name], strict=True):
                part.copy_(trained_.detach())
    return weights(module)


def parallel(mesh: Any, hidden: int, dtype: torch.dtype = torch.float32) -> Block:
    """Cut by a mesh's tensor-parallel ranks; the rows of the parts by FSDP2."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    module = Block(hidden=hidden).to(dtype)
    plan = {
        "embedding": RowwiseParallel(input_layouts=Replicate(), use_local_output=True),
        "up": ColwiseParallel(),
        "down": RowwiseParallel(),
        "head": ColwiseParallel(output_layouts=Replicate(), use_local_output=True),
    }
    parallelize_module(module, mesh["tp"], plan)
    outer = mesh["replicas", "dp"] if "replicas" in mesh.mesh_dim_names else mesh["dp"]
    fully_shard(module, mesh=outer)
    return module
