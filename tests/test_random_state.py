"""Which random generators a checkpoint keeps, on a machine with several GPUs (pretended)."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from adafisher_dist.checkpoint import random_state


class Gpus:
    """The generators of two GPUs, of which the first is the current one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, initialized: bool) -> None:
        self.states = [torch.Generator().manual_seed(number).get_state() for number in (5, 6)]
        self.asked = 0
        generator = torch.Generator
        for name, value in {
            "is_available": lambda: True, "is_initialized": lambda: initialized, "current_device": lambda: 0,
            "get_rng_state": self.get, "set_rng_state": self.set,
        }.items():  # fmt: skip
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(torch, "Generator", lambda device="cpu": generator("cpu"))

    def get(self, device: int = 0) -> torch.Tensor:
        self.asked += 1
        return self.states[device]

    def set(self, state: torch.Tensor, device: int = 0) -> None:
        self.states[device] = state


def model_on(*devices: str) -> list[Any]:
    return [SimpleNamespace(device=torch.device(device)) for device in devices]


@pytest.mark.parametrize("devices", [("cuda:0",), ("cuda:1",), ("cuda:1", "cpu", "cuda:0"), ("cpu",)])
def test_those_of_the_models_devices_go_on(devices: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = Gpus(monkeypatch, initialized=True)
    before = list(gpus.states)
    parsed = random_state.parse(random_state.capture(model_on(*devices)))
    gpus.states = [torch.Generator().get_state() for _ in before]
    random_state.restore(parsed, model_on(*devices))
    assert torch.equal(gpus.states[0], before[0])  # the current one: what is computed there may be on the CPU between
    assert torch.equal(gpus.states[1], before[1]) == ("cuda:1" in devices)


def test_a_process_that_has_not_used_a_gpu_leaves_it_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = Gpus(monkeypatch, initialized=False)
    parsed = random_state.parse(random_state.capture(model_on("cpu")))
    random_state.restore(parsed, model_on("cpu"))
    assert gpus.asked == 0 and not any(key.startswith("cuda") for key in parsed)


def test_fewer_gpus_than_before(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = Gpus(monkeypatch, initialized=True)
    before = list(gpus.states)
    parsed = random_state.parse(random_state.capture(model_on("cuda:0", "cuda:1")))
    gpus.states = [torch.Generator().get_state() for _ in before]
    random_state.restore(parsed, model_on("cuda:0"))
    assert torch.equal(gpus.states[0], before[0]) and not torch.equal(gpus.states[1], before[1])


def test_a_state_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = Gpus(monkeypatch, initialized=True)
    gpus.states[1] = torch.zeros(3, dtype=torch.uint8)
    with pytest.raises(ValueError, match="the state of the random number generators is none"):
        random_state.parse(random_state.capture(model_on("cuda:1")))
