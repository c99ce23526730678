"""packed=True: blocks are stored as lower triangles, and nothing else differs, to the last bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from adafisher_dist import AdaFisher
from adafisher_dist.blocks.fields import triangle
from adafisher_dist.blocks.grid import BlockShape
from adafisher_dist.numerics import fisher
from adafisher_dist.numerics.block_stack import BlockStack, allocate
from adafisher_dist.numerics.block_step import StepContext, update_blocks
from adafisher_dist.numerics.packing import pack, unpack
from adafisher_dist.numerics.rounding import seeds
from adafisher_dist.settings import DEFAULTS, StateConfig, step_settings

SIZES = (1, 2, 7, 16, 33, 64, 101)
DTYPES = (torch.float32, torch.bfloat16, torch.float64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_row_major_lower_triangles(size: int, dtype: torch.dtype) -> None:
    half_NBB = torch.arange(3 * size * size).view(3, size, size).tril()
    whole_NBB = (half_NBB + half_NBB.mT).to(dtype)
    packed_NT = pack(whole_NBB)
    assert packed_NT.shape == (3, size * (size + 1) // 2) == (3, triangle(size))
    for i in {0, size // 2, size - 1}:
        for j in {0, i // 3, i}:
            assert torch.equal(packed_NT[:, i * (i + 1) // 2 + j], whole_NBB[:, i, j])
    assert torch.equal(unpack(packed_NT, size), whole_NBB)
    assert unpack(packed_NT[:0], size).shape == (0, size, size)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_the_fisher_of_one_vector_is_symmetric_to_the_last_bit(size: int, dtype: torch.dtype) -> None:
    rng = np.random.default_rng(size)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    fisher_NBB = torch.zeros(4, size, size, dtype=dtype)
    for update in range(1, 6):
        values = rng.standard_normal((4, 1, size)) * np.exp(3 * rng.standard_normal(size))
        gradient_NRB = torch.tensor(values, dtype=wide)
        seed_N = seeds(torch.arange(4, dtype=torch.int32), update) if dtype == torch.bfloat16 else None
        fisher.update(fisher_NBB, gradient_NRB, fisher.Decay(0.95, 0.05), seed_N=seed_N)
        assert torch.equal(fisher_NBB, fisher_NBB.mT)


def trained(
    size: int, steps: int, packed: bool, rows: int, **settings: Any
) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Parameters whose rows are one block or two, a vector and a number, and their state."""
    rng = np.random.default_rng(size)
    shapes = [(max(rows, 3), size), (max(rows, 2), 2 * size - 1), (size,), ()]
    parameters = [nn.Parameter(torch.tensor(rng.standard_normal(shape), dtype=torch.float32)) for shape in shapes]
    settings = {"max_blocks": 10**6, "block_size": size, "rows_per_block": rows, **settings}  # no table
    optimizer = AdaFisher(parameters, packed=packed, **settings)
    for step in range(steps):
        for p in parameters:
            p.grad = torch.tensor(rng.standard_normal(p.shape), dtype=torch.float32)
        if step == 2:
            parameters[1].grad = None
        optimizer.step()
    return parameters, [optimizer.state[p] for p in parameters]


@pytest.mark.parametrize("exponent", [1.0, 0.5])
@pytest.mark.parametrize("inverse_update_freq", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("size", "rows"), [*((size, 1) for size in SIZES), (1, 2), (7, 2), (16, 16), (64, 16)])
def test_packed_training_is_dense_training(
    size: int, rows: int, dtype: torch.dtype, inverse_update_freq: int, exponent: float
) -> None:
    settings = {"fisher_dtype": dtype, "inverse_update_freq": inverse_update_freq, "exponent": exponent, "damping": 0.3}
    steps = 4 if size > 64 else 8
    dense, dense_states = trained(size, steps, False, rows, fisher_decay=0.6, **settings)
    packed, packed_states = trained(size, steps, True, rows, fisher_decay=0.6, **settings)
    assert size == 1 or any(key.startswith(f"fisher_{size}") for key in dense_states[0]), "no blocks of this size"
    assert all(torch.equal(a, b) for a, b in zip(dense, packed, strict=True))
    for a, b in zip(dense_states, packed_states, strict=True):
        assert a.keys() == b.keys()
        for key, value in a.items():
            whole = key.startswith("fisher_") and value.dim() == 3
            assert torch.equal(pack(value) if whole else value, b[key]), key


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("setting", [{"fisher_update_freq": 2, "grafting": "none"}, {"max_blocks": 2}], ids=str)
def test_with_other_settings(setting: dict[str, Any], rows: int) -> None:
    dense, packed = (trained(7, 6, packed, rows, **setting)[0] for packed in (False, True))
    assert all(torch.equal(a, b) for a, b in zip(dense, packed, strict=True))


@pytest.mark.parametrize("rows", [1, 3])
def test_the_fallbacks(rows: int) -> None:
    def run(packed: bool) -> tuple[BlockStack, Tensor]:
        config = StateConfig(7, rows, "rows", None, torch.float32, 1.0, "rms", keeps_factors=False, packed=packed)
        blocks = allocate(0, BlockShape(7, rows, True), config, np.arange(5), torch.device("cpu"))
        if blocks.square_NR is not None:
            blocks.square_NR.fill_(1.0)
        whole_NBB = torch.eye(7).repeat(5, 1, 1)
        whole_NBB[1, 0, 1] = whole_NBB[1, 1, 0] = 1.05
        whole_NBB[3, 0, 1] = whole_NBB[3, 1, 0] = 3.0
        blocks.fisher.copy_(pack(whole_NBB) if packed else whole_NBB)
        update_NRB = torch.arange(35.0 * rows, dtype=blocks.momentum_NRB.dtype).view(5, rows, 7)
        own = step_settings({**DEFAULTS, "damping": 0.01, "fisher_decay": 1.0, "bias_correction": False})  # F as it is
        update_blocks(blocks, update_NRB, StepContext(own, step=2, updates=1))
        return blocks, update_NRB

    (dense, dense_NRB), (packed, packed_NRB) = run(False), run(True)
    assert dense.fallback_counts == packed.fallback_counts == {1: [1, 0, 0], 3: [0, 0, 1]}
    assert torch.equal(dense_NRB, packed_NRB)


@pytest.mark.parametrize("dense", [True, False])
def test_a_decay_near_1_is_the_same_where_the_device_decides(dense: bool) -> None:
    """1 − ρ of a float32 ρ would be 0 here, and nothing would ever train."""
    found = []
    for should_step in (None, torch.ones((), dtype=torch.int32)):
        config = StateConfig(8, 4, "rows", None, torch.float32, 0.5, "rms", keeps_factors=False, packed=False)
        blocks = allocate(
            0, BlockShape(8 if dense else 1, 4 if dense else 1, dense), config, np.arange(3), torch.device("cpu")
        )
        update_NRB = torch.randn(3, *blocks.momentum_NRB.shape[1:], generator=torch.Generator().manual_seed(0))
        own = step_settings({**DEFAULTS, "fisher_decay": 1 - 1e-8})
        update_blocks(blocks, update_NRB, StepContext(own, 1, 1, should_step))
        assert update_NRB.abs().max() > 0.1
        found.append(update_NRB)
    assert torch.allclose(*found, atol=1e-4)


@pytest.mark.parametrize(("rows", "blocks"), [(1, 3), (2, 2)])
def test_memory(rows: int, blocks: int) -> None:
    """Half of F, and the factors and the rest as they were."""
    usages = []
    for packed in (False, True):
        parameter = nn.Parameter(torch.ones(4, 10))
        settings = {"block_size": 10, "rows_per_block": rows, "inverse_update_freq": 2, "max_blocks": 3}
        optimizer = AdaFisher([parameter], packed=packed, **settings)
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        usages.append(optimizer.memory_usage()["rank"])
        state = optimizer.state[parameter]
        held = [state[key] for key in state if key.startswith(("fisher_1", "fisher_d", "square_"))]
        assert usages[-1]["fisher"] == sum(value.nbytes for value in held)
    more = 40 if rows == 1 else 4 * 4  # a row past max_blocks; the squares of rows
    assert usages[0]["fisher"] == 4 * blocks * 100 + more and usages[1]["fisher"] == 4 * blocks * 55 + more
    assert all(usages[0][kind] == usages[1][kind] for kind in ("momentum", "factors", "buffers"))
