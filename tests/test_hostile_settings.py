"""Whatever stands in a param group or a config: refused by name and bound, before a step."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from checkpoint_runs import trained
from ranks import run_ranks
from strange_settings import VALUES, WHEN, set_to, stepped
from torch import nn

from adafisher_dist import AdaFisher, CheckpointError
from adafisher_dist.checkpoint import saving
from adafisher_dist.ds import from_config
from adafisher_dist.settings import DEFAULTS
from adafisher_dist.stepping import consistency


@pytest.mark.parametrize("when", WHEN)
@pytest.mark.parametrize("name", DEFAULTS)
def test_any_value_of_any_setting(name: str, when: str) -> None:
    for value in VALUES:
        set_to(name, value, when)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("lr", 10**400, r"lr should be at least 0 and at most 1e\+15, got 1000"),
        ("lr", 1e308, r"lr should be at least 0 and at most 1e\+15, got 1e\+308"),
        ("weight_decay", 1e308, r"weight_decay should be at least 0 and at most 1e\+15"),
        ("lr", torch.tensor(1j), "lr should be a number, got a torch.complex64 tensor"),
        ("block_size", "8", "block_size should be an integer, got '8' of type str. Write a number, without quotes."),
        ("block_size", 10**400, r"block_size should be below 2\*\*62"),
        ("block_size", np.array([1, 2]), r"block_size should be an integer, got array\(\[1, 2\]\)"),
        ("block_size", "auto", 'block_size="auto" needs memory_budget_gb'),
    ],
)
def test_the_bound_is_told(name: str, value: Any, words: str) -> None:
    parameter = nn.Parameter(torch.ones(3, 3))
    optimizer = AdaFisher([parameter])
    optimizer.param_groups[0][name] = value
    with pytest.raises((TypeError, ValueError), match=words):
        stepped(optimizer, [parameter])
    optimizer.param_groups[0][name] = DEFAULTS[name]
    stepped(optimizer, [parameter])  # it goes on


def test_a_setting_that_is_lost() -> None:
    parameter = nn.Parameter(torch.ones(3, 3))
    optimizer = AdaFisher([parameter])
    del optimizer.param_groups[0]["damping"]
    with pytest.raises(ValueError, match="has lost damping: set it again"):
        stepped(optimizer, [parameter])


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"preset": []}, r"no preset \[\]; the presets are: language_models"),
        ({"preset": {"a": 1}}, "no preset"),
        ({"params": [1]}, "AdaFisher has no parameter 'params'"),
        ({"lr": 10**400}, "lr should be at least 0 and at most"),
        ({"betas": [10**400, 0.9]}, r"betas\[0\] should be"),
        ({"betas": "x" * 10_000}, "betas should be two numbers, got 'x{12}...x{13}'"),
        ({"amsgrad": "x" * 10_000}, "amsgrad should be True or False, got 'x{12}...x{13}'"),
    ],
)
def test_a_config(config: dict[str, Any], words: str) -> None:
    with pytest.raises((TypeError, ValueError), match=words):
        from_config([nn.Parameter(torch.ones(2))], **config)


def different_ranks(rank: int, world: int, root: str) -> list[str]:
    """A wrong setting and another version on rank 1; what both ranks say."""
    said = []
    for name, value in (("block_size", "8"), ("lr", 10**400), ("fisher_dtype", np.array([1, 2]))):
        run = trained(1) if name == "lr" else trained(0)
        if rank == 1:
            run.optimizer.param_groups[0][name] = value
        before = [parameter.clone() for parameter in run.module.parameters()]
        for parameter in run.module.parameters():
            parameter.grad = torch.ones_like(parameter)
        with pytest.raises((TypeError, ValueError, RuntimeError)) as caught:
            run.optimizer.step()
        assert all(map(torch.equal, run.module.parameters(), before))
        said.append(str(caught.value))
    run = trained(1)
    if rank == 1:
        consistency.__version__ = saving.__version__ = "0.0.9"
    with pytest.raises(CheckpointError) as refused:
        run.save(Path(root) / "a", 1)
    assert not list(Path(root).iterdir())
    said.append(str(refused.value))
    with pytest.raises(RuntimeError) as caught:
        trained(1)
    said.append(str(caught.value))
    return said


@pytest.mark.dist
def test_ranks_that_differ(tmp_path: Path) -> None:
    """All stop, and say why."""
    first, second = run_ranks(different_ranks, 2, str(tmp_path), timeout=60)
    for said, name in zip(second, ("block_size", "lr", "fisher_dtype"), strict=False):
        assert f"{name} should be" in said
    assert all("since rank 1 failed before anything changed" in said for said in first[:3])
    for said in (first, second):
        assert "different versions of adafisher_dist, by rank" in said[3] and ", 0.0.9" in said[3]
        assert "different versions of adafisher_dist, this one" in said[4]


def dies(rank: int, world: int, root: str, when: str) -> str:
    run = trained(1)
    run.save(Path(root) / "a", 1)
    dist.barrier()
    if rank == 1:
        os._exit(0)
    with pytest.raises(CheckpointError) as caught:
        run.load(Path(root) / "a") if when == "load" else run.save(Path(root) / "b", 2)
    (Path(root) / "said").write_text(str(caught.value))
    os._exit(0)


@pytest.mark.dist
@pytest.mark.parametrize("when", ["load", "save"])
def test_a_rank_that_dies_is_named(when: str, tmp_path: Path) -> None:
    with pytest.raises(BaseException):  # noqa: B017  the test's own ranks tell that they ended
        run_ranks(dies, 2, str(tmp_path), when, timeout=60)
    assert "ank 1" in (tmp_path / "said").read_text()
