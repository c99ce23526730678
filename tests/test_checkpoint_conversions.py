"""What a load converts, and what it refuses to: nothing loses its value without a word."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, OneCycleLR

from adafisher_dist import AdaFisher, CheckpointError, load_checkpoint, save_checkpoint
from adafisher_dist.checkpoint import applying
from adafisher_dist.optimizer.adafisher import AdaFisher as Optimizer


def with_buffer(buffer: Tensor) -> tuple[nn.Module, AdaFisher]:
    module = nn.Linear(4, 3)
    module.register_buffer("extra", buffer)
    return module, stepped(module)


def stepped(module: nn.Module, lr: float | Tensor = 1e-2) -> AdaFisher:
    optimizer = AdaFisher(module.parameters(), lr=lr)
    module(torch.ones(2, 4)).square().mean().backward()
    optimizer.step()
    return optimizer


@pytest.mark.parametrize(
    ("saved", "into", "words"),
    [
        (
            torch.tensor([1, 300]),
            torch.int8,
            r"buffer/extra has .* int8 has not, as 300 \(int8 ends at 127\)",
        ),
        (torch.tensor([-1, 3]), torch.uint8, "uint8 has not, as -1"),
        (torch.tensor([2]), torch.bool, "bool has not, as 2"),
        (torch.tensor([200], dtype=torch.uint8), torch.int8, "int8 has not, as 200"),
        (torch.tensor([-3], dtype=torch.int32), torch.uint32, "uint32 has not, as -3"),
        (torch.tensor([2**32 - 1], dtype=torch.uint32), torch.int32, "int32 has not, as"),
        (torch.tensor([-1]).view(torch.uint64), torch.int64, "int64 has not, as"),
        (torch.tensor([3e40], dtype=torch.float64), torch.float32, r"float32 has not, as 3e\+40"),
        (torch.tensor([-1e5]), torch.float16, "float16 has not, as -100000"),
        (torch.tensor([1000.0]), torch.float8_e4m3fn, "float8_e4m3fn has not, as 1000"),
        (torch.tensor([1 + 2j]), torch.float32, "extra is torch.float32 in the model, and was torch.complex64"),
        (torch.tensor([1.0]), torch.int64, "extra is torch.int64 in the model, and was torch.float32"),
    ],
    ids=str,
)
def test_what_a_dtype_cannot_hold_is_refused(saved: Tensor, into: torch.dtype, words: str, tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "a", *with_buffer(saved))
    with pytest.raises(CheckpointError, match=words):
        load_checkpoint(tmp_path / "a", *with_buffer(torch.zeros(len(saved), dtype=into)))


@pytest.mark.parametrize(
    ("saved", "into"),
    [
        (torch.tensor([1, 100]), torch.int8),
        (torch.tensor([0, 1]), torch.bool),
        (torch.tensor([1, 127], dtype=torch.uint8), torch.int8),
        (torch.tensor([1, 127], dtype=torch.int8), torch.uint8),
        (torch.tensor([5], dtype=torch.int32), torch.uint32),
        (torch.tensor([5], dtype=torch.uint32), torch.int32),
        (torch.tensor([5], dtype=torch.uint64), torch.int64),
        (torch.tensor([65510.0]), torch.float16),
        (torch.zeros(0, dtype=torch.int64), torch.int8),
        (torch.tensor([3e38, -torch.inf, torch.nan], dtype=torch.float64), torch.float32),
        (torch.tensor([3.38e38]).bfloat16().float(), torch.bfloat16),
        (torch.tensor([448.0, 2.0]).to(torch.float8_e4m3fn), torch.float32),
        (torch.tensor([448.0]).to(torch.float8_e5m2), torch.float8_e4m3fn),
    ],
    ids=str,
)
def test_what_it_can_hold_is_converted(saved: Tensor, into: torch.dtype, tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "a", *with_buffer(saved))
    module, optimizer = with_buffer(torch.zeros(len(saved), dtype=into))
    load_checkpoint(tmp_path / "a", module, optimizer)
    torch.testing.assert_close(module.extra.double(), saved.to(into).double(), rtol=0, atol=0, equal_nan=True)


def test_a_buffer_whose_elements_share_memory_is_told_of_before_anything_changes(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "a", *with_buffer(torch.ones(1).expand(3)))
    module, optimizer = with_buffer(torch.ones(1).expand(3))
    before = module.weight.detach().clone()
    with pytest.raises(CheckpointError, match=r"extra is expanded, so that .*\nNothing was changed"):
        load_checkpoint(tmp_path / "a", module, optimizer)
    assert torch.equal(module.weight, before)


def test_an_expanded_buffer_without_elements(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "a", *with_buffer(torch.ones(1, 1).expand(0, 5)))
    assert load_checkpoint(tmp_path / "a", *with_buffer(torch.ones(1, 1).expand(0, 5))).not_restored == []


def test_a_conjugated_buffer_is_told_of(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"extra is the conjugate of another tensor.*resolve_conj"):
        save_checkpoint(tmp_path / "a", *with_buffer(torch.tensor([1 + 2j]).conj()))


class Tied(nn.Module):
    def __init__(self, first: str) -> None:
        super().__init__()
        one, other = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
        other.weight = one.weight
        for name in sorted(("a", "b"), reverse=first == "b"):
            setattr(self, name, one if name == "a" else other)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x))


def test_tied_modules_may_stand_in_another_order(tmp_path: Path) -> None:
    module = Tied("a")
    save_checkpoint(tmp_path / "a", module, stepped(module))
    other = Tied("b")
    assert load_checkpoint(tmp_path / "a", other, stepped(other)).not_restored == []
    assert torch.equal(other.a.weight, module.a.weight)


class Phases(LRScheduler):
    """A scheduler of the user's."""

    def __init__(self, optimizer: Optimizer, phase: str | None) -> None:
        self.phase, self.limit = phase, sys.maxsize
        super().__init__(optimizer)

    def get_lr(self) -> list[float]:
        return [group["lr"] for group in self.optimizer.param_groups]


def test_a_schedulers_own_values_pass(tmp_path: Path) -> None:
    module = nn.Linear(4, 3)
    optimizer = stepped(module)
    save_checkpoint(tmp_path / "a", module, optimizer, lr_scheduler=Phases(optimizer, None))
    scheduler = Phases(optimizer, "warm-up")
    load_checkpoint(tmp_path / "a", module, optimizer, lr_scheduler=scheduler)
    assert scheduler.phase is None and scheduler.limit == sys.maxsize


def test_a_scheduler_of_torchs_has_no_use_for_none(tmp_path: Path) -> None:
    module = nn.Linear(4, 3)
    optimizer = stepped(module)
    scheduler = OneCycleLR(optimizer, 0.1, total_steps=9, cycle_momentum=False)
    scheduler._anneal_func_type = None
    save_checkpoint(tmp_path / "a", module, optimizer, lr_scheduler=scheduler)
    other = OneCycleLR(optimizer, 0.1, total_steps=9, cycle_momentum=False)
    with pytest.raises(CheckpointError, match="'_anneal_func_type' should be a str, and is None"):
        load_checkpoint(tmp_path / "a", module, optimizer, lr_scheduler=other)


def test_a_rate_that_was_a_tensor(tmp_path: Path) -> None:
    """What a scheduler has put beside it was a tensor too, and is a number here."""
    module = nn.Linear(4, 3)
    optimizer = stepped(module, torch.tensor(0.1))
    save_checkpoint(tmp_path / "a", module, optimizer, lr_scheduler=CosineAnnealingLR(optimizer, 10))
    other = stepped(module, 0.5)
    load_checkpoint(tmp_path / "a", module, other, lr_scheduler=CosineAnnealingLR(other, 10))
    group = other.param_groups[0]
    assert type(group["initial_lr"]) is float and group["initial_lr"] == pytest.approx(0.1)


def test_ctrl_c_in_a_load_of_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is half loaded is neither stepped nor saved."""
    from adafisher_dist.checkpoint import loading, options, saving
    from adafisher_dist.checkpoint.directory import checkpoint_directory

    module = nn.Linear(4, 3)
    optimizer = stepped(module)
    save_checkpoint(tmp_path / "a", module, optimizer)

    def pressed(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(applying, "read_ranges", pressed)
    with pytest.raises(KeyboardInterrupt):
        loading.load(
            lambda: checkpoint_directory(tmp_path / "a"),
            saving.target_for(module, optimizer),
            options.Options(states=False, random=False),
        )
    for use in (optimizer.step, lambda: save_checkpoint(tmp_path / "b", module, optimizer)):
        with pytest.raises(RuntimeError, match="incomplete"):
            use()


def test_a_hidden_folder_without_a_checkpoint(tmp_path: Path) -> None:
    module = nn.Linear(4, 3)
    optimizer = stepped(module)
    save_checkpoint(tmp_path / ".runs" / "a", module, optimizer)
    (tmp_path / ".runs" / "latest").unlink()
    with pytest.raises(CheckpointError, match=r"\.runs is no checkpoint of adafisher_dist: .* Checkpoints in .*: a"):
        load_checkpoint(tmp_path / ".runs", module, optimizer)
