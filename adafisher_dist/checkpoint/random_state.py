"""This process's random number generators: Python's, numpy's and torch's (CPU, CUDA)."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from adafisher_dist.checkpoint import encoding


def capture(model: Iterable[Tensor]) -> Tensor:
    """Their state, as JSON, (bytes,) uint8.

    Of CUDA devices the current one's, and those of the others that hold tensors of the model. A
    process that has not used CUDA has none: to ask for one would occupy a GPU.
    """
    tensors: list[Tensor] = []
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": np.random.get_state(legacy=False),
        "torch": torch.get_rng_state().numpy().tobytes(),
    }
    if _has_used_cuda():
        state["cuda"] = torch.cuda.get_rng_state().numpy().tobytes()
        others = _other_devices(model)
        if others:
            state["cuda_others"] = [torch.cuda.get_rng_state(device).numpy().tobytes() for device in others]
    encoded = encoding.encode(_without_arrays(state), "the random state", tensors)
    return torch.frombuffer(bytearray(json.dumps(encoded).encode()), dtype=torch.uint8)


def parse(captured: Tensor) -> dict[str, Any]:
    """What was captured, for `restore`; tried on other generators of the same kinds.

    Raises:
        ValueError: it is no state of these generators.
    """
    try:
        state = encoding.decode(json.loads(captured.numpy().tobytes()), [])
        version, numbers, gauss = state["python"]
        state["python"] = version, tuple(numbers), gauss
        random.Random().setstate(state["python"])
        if gauss is not None and not isinstance(gauss, float):  # Python's second normal number: it does not check it
            raise ValueError(f"the next normal number is {gauss!r}")
        inner = state["numpy"]["state"]
        if state["numpy"]["bit_generator"] == "MT19937":  # which numpy's functions use, unless told otherwise
            inner["key"] = np.array(inner["key"], dtype=np.uint32)
            if not 0 <= inner["pos"] <= len(inner["key"]):  # numpy would read past its end
                raise ValueError(f"pos is {inner['pos']}")
        own = str(np.random.get_state(legacy=False)["bit_generator"])  # the kind that numpy's global generator has
        np.random.RandomState(getattr(np.random, own)()).set_state(state["numpy"])
        torch.Generator().set_state(_as_tensor(state["torch"]))
        if _has_used_cuda():
            for own in ([state["cuda"]] if "cuda" in state else []) + state.get("cuda_others", []):
                torch.Generator("cuda").set_state(_as_tensor(own))
    except Exception as error:
        problem = f"{type(error).__name__}: {error}"
        raise ValueError(f"the state of the random number generators is none ({problem})") from error
    return dict(state)


def restore(state: dict[str, Any], model: Iterable[Tensor]) -> None:
    """Go on with the random numbers where `capture` was called, given what `parse` returned."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(_as_tensor(state["torch"]))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(_as_tensor(state["cuda"]))
    if "cuda_others" in state and _has_used_cuda():
        for device, own in zip(_other_devices(model), state["cuda_others"], strict=False):  # on fewer GPUs now
            torch.cuda.set_rng_state(_as_tensor(own), device)


def _has_used_cuda() -> bool:
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]


def _other_devices(model: Iterable[Tensor]) -> list[int]:
    """The CUDA devices of a model but for the current one, in order."""
    held = {tensor.device.index for tensor in model if tensor.device.type == "cuda"}
    return sorted(held - {torch.cuda.current_device()})


def _as_tensor(state: bytes) -> Tensor:
    return torch.frombuffer(bytearray(state), dtype=torch.uint8)


def _without_arrays(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_arrays(item) for key, item in value.items()}
    return value.tolist() if isinstance(value, np.ndarray) else value
