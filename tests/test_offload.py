"""State on the host and back, in one process: what was read, saved or written around it."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import model, same_state, train_steps
from torch import nn

from adafisher_dist import AdaFisher, load_checkpoint, save_checkpoint

SETTINGS: dict[str, Any] = {"lr": 1e-2, "block_size": 8, "rows_per_block": 4, "inverse_update_freq": 3}


def trained(steps: int = 3) -> tuple[nn.Module, AdaFisher]:
    module = model()
    optimizer = AdaFisher(module.named_parameters(), **SETTINGS)
    train_steps(module, optimizer, 0, steps)
    return module, optimizer


def no_checkpoint(module: nn.Module, optimizer: AdaFisher, folder: Path) -> None:
    pass


def saved(module: nn.Module, optimizer: AdaFisher, folder: Path) -> None:
    save_checkpoint(folder / "ckpt", module, optimizer)


def loaded(module: nn.Module, optimizer: AdaFisher, folder: Path) -> None:
    saved(module, optimizer, folder)
    load_checkpoint(folder / "ckpt", module, optimizer)


def read_as_arrays(module: nn.Module, optimizer: AdaFisher, folder: Path) -> None:
    """After which numpy shares the memory, which torch does not free any more."""
    for entry in optimizer.state.values():
        for value in entry.values():
            value.numpy()


@pytest.mark.parametrize("before", [no_checkpoint, saved, loaded, read_as_arrays])
def test_training_goes_on_bit_for_bit(before: Callable[..., None], tmp_path: Path) -> None:
    one, straight = trained(5)
    two, optimizer = trained()
    before(two, optimizer, tmp_path)
    shown = copy.deepcopy(optimizer.state_dict())
    for _ in range(2):
        optimizer.offload_state()
        for tensor, entry in optimizer.state.items():
            number = [id(p) for p in optimizer.param_groups[0]["params"]].index(id(tensor))
            assert all(torch.equal(value, shown["state"][number][key]) for key, value in entry.items())
        with pytest.raises(RuntimeError, match="reload_state"):
            optimizer.state_dict()
        optimizer.reload_state()
    train_steps(two, optimizer, 3, 5)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert same_state(straight.state_dict(), optimizer.state_dict())


def test_a_state_dict_that_was_made_before_is_whole() -> None:
    """Its tensors are the optimizer's own, as everywhere in torch, and may be saved later."""
    module, optimizer = trained()
    kept = optimizer.state_dict()
    wanted = copy.deepcopy(kept)
    optimizer.offload_state()
    assert same_state(kept, wanted)
    file = io.BytesIO()
    torch.save(kept, file)
    file.seek(0)
    again = AdaFisher(module.named_parameters(), **SETTINGS)
    again.load_state_dict(torch.load(file))
    assert same_state(again.state_dict(), wanted)
    optimizer.reload_state()
    assert same_state(kept, wanted)
    train_steps(module, optimizer, 3, 4)
    assert same_state(kept, optimizer.state_dict())


def test_what_is_put_into_the_state_meanwhile_is_taken_over() -> None:
    module, optimizer = trained()
    weight, bias = module.inner.weight, module.inner.bias
    optimizer.offload_state()
    optimizer.state[weight] = {key: value.clone() for key, value in optimizer.state[weight].items()}
    key = next(key for key in optimizer.state[weight] if key.startswith("momentum"))
    optimizer.state[weight][key].fill_(0.5)
    del optimizer.state[bias]
    optimizer.reload_state()
    optimizer.state_dict()
    assert (optimizer.state[weight][key] == 0.5).all()
    assert not any(value.any() for value in optimizer.state[bias].values())


def test_compiled_code_offloads_as_other_code() -> None:
    """Called by it, they are graph breaks: the compiler traces no memory that is taken away."""
    one, _ = trained(5)
    module, optimizer = trained()

    @torch.compile(backend="eager")
    def around(x: torch.Tensor) -> torch.Tensor:
        optimizer.offload_state()
        y = x + 1
        optimizer.reload_state()
        return y

    assert around(torch.ones(1)).item() == 2
    train_steps(module, optimizer, 3, 5)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), module.parameters(), strict=True))
