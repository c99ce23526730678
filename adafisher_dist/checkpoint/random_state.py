"""This process's random number generators: Python's, numpy's, torch's on the CPU and on its accelerator."""

from __future__ import annotations

import json
import random
from typing import Any

import numpy as np
import torch
from torch import Tensor

from adafisher_dist.checkpoint import values


def capture() -> Tensor:
    """Their state, as JSON, (bytes,) uint8."""
    tensors: list[Tensor] = []
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": np.random.get_state(legacy=False),
        "torch": torch.get_rng_state().numpy().tobytes(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state().numpy().tobytes()
    encoded = values.encode(_without_arrays(state), "the random state", tensors)
    return torch.frombuffer(bytearray(json.dumps(encoded).encode()), dtype=torch.uint8)


def restore(captured: Tensor) -> None:
    """Go on with the random numbers where `capture` was called."""
    state = values.decode(json.loads(captured.numpy().tobytes()), [])
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    numpy_state = state["numpy"]
    numpy_state["state"]["key"] = np.array(numpy_state["state"]["key"], dtype=np.uint32)
    np.random.set_state(numpy_state)
    torch.set_rng_state(torch.frombuffer(bytearray(state["torch"]), dtype=torch.uint8))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(torch.frombuffer(bytearray(state["cuda"]), dtype=torch.uint8))


def _without_arrays(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_arrays(item) for key, item in value.items()}
    return value.tolist() if isinstance(value, np.ndarray) else value
