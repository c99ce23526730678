"""Parameters train however they are stored: the documentation's table, and what it promises."""

from __future__ import annotations

import re
from collections.abc import Callable
from math import prod
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from adafisher_dist import AdaFisher
from adafisher_dist.blocks.estimate import estimate
from adafisher_dist.blocks.grid import grid_of, view
from adafisher_dist.settings import DEFAULTS, state_config

TABLE = Path(__file__).parents[1] / "docs" / "how_it_works.md"
Shape = tuple[int, ...]


def rows_of_the_table() -> list[tuple[str, Shape, str]]:
    found = re.findall(r"^\| ([^|]+) \| \(([\d, ]*)\) \| ([^|]+) \|$", TABLE.read_text(), re.MULTILINE)
    return [(name, tuple(int(size) for size in re.findall(r"\d+", shape)), seen) for name, shape, seen in found]


def seen_as(shape: Shape) -> str:
    """In the table's words."""
    if grid_of(shape, state_config(DEFAULTS)).dense_row_groups == 0:
        return "elements"
    matrices, rows, row = view(shape)
    return (f"{matrices} matrices of " if matrices > 1 else "") + f"{rows} rows of {row}"


def test_the_table_has_enough() -> None:
    assert len(rows_of_the_table()) >= 20


@pytest.mark.parametrize(("name", "shape", "seen"), rows_of_the_table(), ids=lambda value: str(value))
def test_the_table(name: str, shape: Shape, seen: str) -> None:
    assert seen_as(shape) == seen
    memory = estimate([shape], "ddp", 1, state_config(DEFAULTS), torch.float32, 1).memory
    assert memory["total"] - memory["buffers"] <= 13 * max(1, prod(shape))
    if seen == "elements":
        assert memory["fisher"] + memory["momentum"] == 8 * max(1, prod(shape))


def test_a_group_may_choose() -> None:
    with_blocks = state_config({**DEFAULTS, "max_blocks": 10**6})
    assert grid_of((50257, 768), with_blocks).dense_row_groups == grid_of((50257, 768), with_blocks).row_groups
    assert grid_of((4096, 4096), state_config({**DEFAULTS, "max_blocks": 0})).dense_row_groups == 0


def train(parameters: list[nn.Parameter], gradients: Callable[[int], list[Tensor]], **settings: float) -> list[Tensor]:
    optimizer = AdaFisher(parameters, lr=1e-2, **settings)
    for step in range(8):
        for parameter, gradient in zip(parameters, gradients(step), strict=True):
            parameter.grad = gradient
        optimizer.step()
    return [parameter.detach() for parameter in parameters]


def drawn(shape: Shape, step: int) -> Tensor:
    scales = torch.linspace(-2, 2, shape[-1]).exp()  # so that F is no multiple of the identity
    return torch.randn(shape, generator=torch.Generator().manual_seed(step)) * scales


@pytest.mark.parametrize("shape", [(4, 48, 96), (2, 3, 40, 72), (3, 5, 33)], ids=str)
def test_stacked_matrices_train_as_matrices(shape: Shape) -> None:
    """Bit for bit."""
    matrices = shape[:-2]
    stacked = train([nn.Parameter(torch.zeros(shape))], lambda step: [drawn(shape, step)])[0]
    apart = train(
        [nn.Parameter(torch.zeros(shape[-2:])) for _ in range(prod(matrices))],
        lambda step: list(drawn(shape, step).flatten(0, -3)),
    )
    assert torch.equal(stacked.flatten(0, -3), torch.stack(apart))


@pytest.mark.parametrize(
    ("shape", "plain"),
    [
        ((1, 64, 96), (64, 96)),
        ((64, 1, 96), (64, 96)),
        ((1, 1, 70), (70,)),
        ((70, 1), (70,)),
        ((24, 16, 3, 3), (24, 144)),
    ],
    ids=str,
)
def test_other_shapes_of_the_same(shape: Shape, plain: Shape) -> None:
    """Bit for bit."""
    one, other = (
        train([nn.Parameter(torch.zeros(own))], lambda step, own=own: [drawn(plain, step).view(own)])[0]  # type: ignore[misc]
        for own in (shape, plain)
    )
    assert torch.equal(one.view(plain), other)


# ---- Beside AdamW at AdamW's rates ----


def left_of_lora(kind: type[torch.optim.Optimizer], rank: int, width: int, lr: float) -> float:
    """The share of the loss that two adapters of a wide layer leave after 120 steps."""
    torch.manual_seed(0)
    base = torch.randn(64, width) / width**0.5
    target = base + torch.randn(64, 4) @ torch.randn(4, width) / (2 * width**0.5)
    a, b = nn.Parameter(torch.randn(rank, width) / width**0.5), nn.Parameter(torch.zeros(64, rank))
    optimizer = kind([a, b], lr=lr, weight_decay=0)  # type: ignore[call-arg]
    losses = []
    for step in range(120):
        x = torch.randn(64, width, generator=torch.Generator().manual_seed(step))
        loss = (x @ (base - target).T + 2 * (x @ a.T) @ b.T).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    return losses[-1] / losses[0]


@pytest.mark.parametrize("rank", [1, 8, 16])
@pytest.mark.parametrize("lr", [2e-4, 2e-3])
def test_adapters_learn_as_with_adamw(rank: int, lr: float) -> None:
    """The bound is how far apart two of AdamW's own seeds may be, about."""
    ours, theirs = (left_of_lora(kind, rank, 1024, lr) for kind in (AdaFisher, torch.optim.AdamW))
    assert ours <= theirs + 0.05


def test_vectors_learn_as_with_adamw() -> None:
    def left(kind: type[torch.optim.Optimizer], shape: Shape) -> float:
        torch.manual_seed(0)
        target = torch.randn(shape).sign()
        parameter = nn.Parameter(torch.zeros(shape))
        optimizer = kind([parameter], lr=1e-2, weight_decay=0)  # type: ignore[call-arg]
        for _ in range(100):
            parameter.grad = parameter.detach() - target + 0.1 * torch.randn(shape)
            optimizer.step()
        return float((parameter.detach() - target).square().mean())

    for shape in ((768,), (1, 5000), (5000, 1)):
        assert left(AdaFisher, shape) <= left(torch.optim.AdamW, shape)


def test_layers_that_look_like_tables_are_told_of(caplog: pytest.LogCaptureFixture) -> None:
    """Once, of all ranks by the first; not where a param group decides what has blocks."""
    for settings, told in (({}, 1), ({"max_blocks": 10}, 0)):
        layers = [nn.Parameter(torch.zeros(4200, 512)) for _ in range(3)]
        optimizer = AdaFisher(layers, **settings)
        for _ in range(2):
            for layer in layers:
                layer.grad = torch.zeros_like(layer)
            optimizer.step()
        found = [record.getMessage() for record in caplog.records if "have no blocks" in record.getMessage()]
        assert len(found) == told
        assert not told or "of shape (4200, 512), 3 matrices in all" in found[0]
        caplog.clear()
