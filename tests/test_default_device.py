"""`torch.set_default_device` and `torch.inference_mode` of the user change nothing.

What the host keeps lies on the host whatever the default device is. "meta" stands for a GPU: what
is made there by mistake has no values, and cannot be read.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from layout_runs import Run, contents
from ranks import run_ranks
from torch import Tensor, nn

from adafisher_dist import AdaFisher, load_checkpoint, save_checkpoint

ELSEWHERE = torch.device("meta")


def step_with_another_default(optimizer: Any) -> None:
    real = optimizer.step

    def step(*args: Any, **keywords: Any) -> Any:
        with ELSEWHERE:
            return real(*args, **keywords)

    optimizer.step = step


def trained(rank: int, world: int, layout: str, folder: str, elsewhere: bool) -> dict[str, np.ndarray]:
    run = Run(layout, rank, world)
    if elsewhere:
        step_with_another_default(run.optimizer if run.engine is None else run.engine.basic_optimizer)
    run.train(0, 4)
    if run.engine is None:  # DeepSpeed makes tensors of its own on the default device
        with ELSEWHERE if elsewhere else torch.device("cpu"):
            run.save(folder)
            run.save(folder, "behind", asynchronous=True).wait()
            run.load(folder)
    run.train(4, 6)
    return run.weights()


@pytest.mark.dist
@pytest.mark.deepspeed
@pytest.mark.parametrize(
    ("layout", "world"), [("alone", 1), ("ddp", 2), ("fsdp2", 2), ("zero1", 2), ("zero2-bf16", 2), ("zero3", 2)]
)
def test_training_with_another_default_device(layout: str, world: int, tmp_path: Any) -> None:
    arguments = {"deepspeed": layout.startswith("zero")}
    here = run_ranks(trained, world, layout, str(tmp_path / "a"), False, **arguments)
    there = run_ranks(trained, world, layout, str(tmp_path / "b"), True, **arguments)
    for one, other in zip(here, there, strict=True):
        assert one.keys() == other.keys()
        assert all(np.array_equal(one[name], other[name]) for name in one)
    if not layout.startswith("zero"):
        one, other = contents(tmp_path / "a" / "here"), contents(tmp_path / "b" / "here")
        assert all(torch.equal(one[key], other[key]) for key in one)


def module_and_optimizer(**settings: Any) -> tuple[nn.Module, AdaFisher]:
    torch.manual_seed(0)
    module = nn.Sequential(*(nn.Linear(24, 24) for _ in range(4)))
    return module, AdaFisher(module.parameters(), lr=1e-2, **settings)


def step(module: nn.Module, optimizer: AdaFisher, x: Tensor) -> None:
    optimizer.zero_grad()
    module(x).square().sum().backward()
    optimizer.step()


@pytest.mark.parametrize("settings", [{}, {"packed": True}, {"fisher_dtype": "bfloat16"}], ids=str)
def test_all_that_is_called_between_steps(settings: dict[str, Any], tmp_path: Any) -> None:
    """Saves of many ranges, state dicts, offload and statistics, with another default device."""
    module, optimizer = module_and_optimizer(**settings)
    x = torch.ones(3, 24)
    step(module, optimizer, x)
    other, second = module_and_optimizer(**settings)
    with ELSEWHERE:
        save_checkpoint(tmp_path / "a", module, optimizer)
        load_checkpoint(tmp_path / "a", other, second)
        second.load_state_dict(optimizer.state_dict())
        optimizer.offload_state()
        optimizer.reload_state()
        assert optimizer.fisher_stats() and optimizer.memory_usage()
        for pair in ((module, optimizer), (other, second)):
            step(*pair, x)
    for mine, theirs in zip(module.parameters(), other.parameters(), strict=True):
        assert mine.device.type == "cpu" and torch.equal(mine, theirs)


@pytest.mark.parametrize("settings", [{}, {"packed": True}, {"fisher_dtype": "bfloat16"}], ids=str)
def test_a_load_in_inference_mode(settings: dict[str, Any], tmp_path: Any) -> None:
    """As to evaluate: a mode of torch's is its thread's, and reads are on threads of their own."""
    module, optimizer = module_and_optimizer(**settings)
    x = torch.ones(3, 24)
    step(module, optimizer, x)
    save_checkpoint(tmp_path / "a", module, optimizer)
    other, second = module_and_optimizer()
    with torch.inference_mode():
        load_checkpoint(tmp_path / "a", other, second)
        assert torch.equal(other(x), module(x))
