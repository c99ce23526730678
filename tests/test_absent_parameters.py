"""Parameters that leave the param groups for a while, and come back."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from layout_runs import Run
from models import batch, model, train_steps
from ranks import run_ranks
from torch import nn

from adafisher_dist import AdaFisher, save_checkpoint


def in_turns(rank: int, world: int, layout: str, how: str) -> dict[str, Any]:
    """Two halves of the parameters train in turns of two steps; returns weights and step counts."""
    run = Run(layout, rank, world)
    optimizer, whole = run.optimizer, run.optimizer.param_groups
    halves = [[{**g, "params": g["params"][half::2]} for g in whole] for half in (0, 1)]
    for turn in range(4):
        now = halves[turn % 2]
        if how == "other groups":
            optimizer.param_groups = now
        elif how == "other lists":
            for group, members in zip(whole, now, strict=True):
                group["params"] = members["params"]
        wanted = {id(p) for group in now for p in group["params"]}
        for step in range(2 * turn, 2 * turn + 2):
            x, y = batch(step, rank, world)
            nn.functional.mse_loss(run.module(x), y).backward()
            for p in run.plain.parameters():
                p.grad = p.grad if id(p) in wanted else None
            optimizer.step()
            optimizer.zero_grad()
    trained = [(name, p) for name, p in run.plain.named_parameters() if p.requires_grad]
    return {**run.weights(), **{f"steps of {name}": np.array(optimizer.state[p]["step"]) for name, p in trained}}


@pytest.mark.dist
@pytest.mark.parametrize("how", ["other groups", "other lists"])
@pytest.mark.parametrize(("layout", "world"), [("alone", 1), ("ddp", 2), ("fsdp2", 2)])
def test_layers_that_train_in_turns_keep_their_state(layout: str, world: int, how: str) -> None:
    """As where the others only have no gradient."""
    wanted = run_ranks(in_turns, world, layout, "no gradient")
    for found, want in zip(run_ranks(in_turns, world, layout, how), wanted, strict=True):
        assert all(value == 4 for name, value in found.items() if name.startswith("steps of "))
        for name, value in want.items():
            np.testing.assert_array_equal(found[name], value, err_msg=name)


def three_squares(**settings: Any) -> tuple[list[nn.Parameter], AdaFisher]:
    generator = torch.Generator().manual_seed(0)
    parameters = [nn.Parameter(torch.randn(8, 8, generator=generator)) for _ in range(3)]
    return parameters, AdaFisher(parameters, lr=1e-2, **settings)


def take_steps(parameters: list[nn.Parameter], optimizer: AdaFisher, count: int, first: int = 0) -> None:
    """Steps of those that stand in a group; gradients are a function of step and parameter."""
    standing = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for step in range(first, first + count):
        for number, p in enumerate(parameters):
            generator = torch.Generator().manual_seed(10 * step + number)
            p.grad = torch.randn(8, 8, generator=generator) if id(p) in standing else None
        optimizer.step()


def counts(parameters: list[nn.Parameter], optimizer: AdaFisher) -> list[int]:
    return [int(optimizer.state[p]["step"]) for p in parameters]


@pytest.mark.parametrize("together", [True, False])
def test_what_comes_back_in_another_group(together: bool, caplog: pytest.LogCaptureFixture) -> None:
    """It goes on where those that it shared one with come back too; else it begins anew."""
    (a, b, c), optimizer = three_squares()
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(8, 8))]})
    take_steps([a, b, c], optimizer, 2)
    optimizer.param_groups[0]["params"] = [] if together else [a]
    take_steps([a, b, c], optimizer, 1, 2)
    before = b.detach().clone()
    optimizer.add_param_group({"params": [a, b, c] if together else [b, c], "lr": 1e-6})
    take_steps([a, b, c], optimizer, 1, 3)
    assert counts([a, b, c], optimizer) == ([3, 3, 3] if together else [4, 1, 1])
    assert ("forgets the state of 2 parameter(s), as 0.1" in caplog.text) == (not together)
    assert 0 < (b - before).abs().max() < 1e-5


@pytest.mark.parametrize("how", ["block_size", "dtype", "auto"])
def test_what_comes_back_otherwise_begins_anew(how: str, caplog: pytest.LogCaptureFixture) -> None:
    own = {"block_size": "auto", "memory_budget_gb": 1.0} if how == "auto" else {}
    (a, b, c), optimizer = three_squares(**own)
    take_steps([a, b, c], optimizer, 2)
    optimizer.param_groups[0]["params"] = [a, c]
    take_steps([a, b, c], optimizer, 1)
    if how == "dtype":
        b.data, b.grad = b.data.double(), None
    optimizer.add_param_group({"params": [b], **({"block_size": 4} if how == "block_size" else {})})
    if how == "dtype":
        b.grad = torch.ones(8, 8, dtype=torch.float64)
        optimizer.step()
    else:
        take_steps([a, b, c], optimizer, 1)
    assert counts([b], optimizer) == [1] and "forgets the state of 1 parameter(s), as 0.1" in caplog.text
    assert {group["block_size"] for group in optimizer.param_groups} != {"auto"}


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda it: pickle.loads(pickle.dumps(it))], ids=["deep", "pickle"])
def test_a_copy_made_while_one_is_absent(copied: Any) -> None:
    (a, b, c), optimizer = three_squares()
    take_steps([a, b, c], optimizer, 3)
    optimizer.param_groups[0]["params"] = [a, c]
    take_steps([a, b, c], optimizer, 1)
    optimizer, (a, b, c) = copied((optimizer, (a, b, c)))
    for here in ([a, c], [b, c], [a, b, c]):
        optimizer.param_groups[0]["params"] = here
        take_steps([a, b, c], optimizer, 1)
    assert counts([a, b, c], optimizer) == [6, 5, 7]


def whole_while_absent(rank: int, world: int, layout: str) -> None:
    run = Run(layout, rank, world)
    optimizer = run.optimizer
    optimizer.state[run.plain.scale]["mine"] = "kept"
    first = [[p for p in group["params"]] for group in optimizer.param_groups]
    optimizer.param_groups[0]["params"], later = first[0][:1], first[0][1:]
    run.train(0, 2)
    if layout == "fsdp2":  # all that one shard has leaves
        whole = list(optimizer.param_groups)
        optimizer.param_groups = [{**whole[0], "params": later}]
        run.train(2, 4)
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        return
    optimizer.consolidate_state_dict(to=None)
    assert "mine" in str(optimizer.state_dict()["state"])
    optimizer.consolidate_state_dict(to=None)
    optimizer.param_groups.pop()
    assert len(optimizer.state_dict()["state"]) == 1


@pytest.mark.dist
@pytest.mark.parametrize("layout", ["ddp", "fsdp2"])
def test_state_dicts_of_ranks_while_some_are_absent(layout: str) -> None:
    run_ranks(whole_while_absent, 2, layout)


def test_what_is_absent_is_left_out_of_state_dicts_and_can_be_deleted(tmp_path: Any) -> None:
    module = model()
    optimizer = AdaFisher([{"params": [p]} for p in module.parameters()], lr=1e-2)
    train_steps(module, optimizer, 0, 2)
    whole = list(optimizer.param_groups)
    here = [group for group in whole if group["params"][0] is not module.mix.weight]
    before = optimizer.memory_usage()["rank"]["fisher"]
    optimizer.param_groups = here
    train_steps(module, optimizer, 2, 3)
    assert len(optimizer.state_dict()["state"]) == len(here) - 1  # and a frozen one
    save_checkpoint(tmp_path / "a", module, optimizer)
    copied = copy.deepcopy(optimizer)
    assert int(copied.state[copied.param_groups[0]["params"][0]]["step"]) == 3
    optimizer.param_groups = whole
    train_steps(module, optimizer, 3, 4)
    assert int(optimizer.state[module.mix.weight]["step"]) == 3, "the third step was without it"
    optimizer.param_groups = here
    train_steps(module, optimizer, 4, 5)
    del optimizer.state[module.mix.weight]
    train_steps(module, optimizer, 5, 6)
    assert module.mix.weight not in optimizer.state and optimizer.memory_usage()["rank"]["fisher"] <= before
    optimizer.param_groups = whole
    train_steps(module, optimizer, 6, 7)
    assert int(optimizer.state[module.mix.weight]["step"]) == 1 and int(optimizer.state[module.scale]["step"]) == 7
