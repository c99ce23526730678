"""The optimizer's step beside AdamW, Muon and the model's own forward and backward, one process, one thread a CPU.

    python benchmarks/step_time.py       # writes docs/step_time.json

Rounds of all candidates in turn, so that a machine whose speed drifts slows all alike; medians, as ratios to AdamW.
Absolute times are printed for a GPU only.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from adafisher_dist import AdaFisher

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "launch"))

from model import ByteTransformer  # noqa: E402

ROUNDS, WARM_UP = 15, 3
BATCH, SEQ_LEN = 32, 128
MODEL = {"width": 96, "layers": 3, "heads": 4, "seq_len": SEQ_LEN}


def candidates(matrices: list[nn.Parameter], rest: list[nn.Parameter]) -> dict[str, Callable[[], Any]]:
    """A function for each that takes one step on the gradients that are there."""
    everything = [*matrices, *rest]
    result: dict[str, Callable[[], Any]] = {
        "AdamW (foreach)": torch.optim.AdamW(everything, foreach=True).step,
        "AdamW (fused)": torch.optim.AdamW(everything, fused=True).step,
    }
    if hasattr(torch.optim, "Muon"):
        muon, adamw = torch.optim.Muon(matrices), torch.optim.AdamW(rest, foreach=True)
        result["Muon, AdamW for the rest"] = lambda: (muon.step(), adamw.step())
    for size in (16, 32, 64):
        for every in (1, 10):
            optimizer = AdaFisher(everything, block_size=size, inverse_update_freq=every)
            result[f"AdaFisher b={size}" + (f", factors every {every}" if every > 1 else "")] = optimizer.step
    half = AdaFisher(everything, block_size=32, fisher_dtype=torch.bfloat16)
    result["AdaFisher b=32, bfloat16"] = half.step
    return result


def main() -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        torch.set_num_threads(1)
    torch.manual_seed(0)
    model = ByteTransformer(**MODEL).to(device)
    tokens = torch.randint(256, (BATCH, SEQ_LEN + 1), device=device)

    def forward_and_backward() -> None:
        model.zero_grad()
        model(tokens[:, :-1], tokens[:, 1:]).mean().backward()

    forward_and_backward()
    matrices = [p for p in model.parameters() if p.dim() == 2]
    rest = [p for p in model.parameters() if p.dim() != 2]
    runs = {"forward and backward": forward_and_backward, **candidates(matrices, rest)}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(WARM_UP + ROUNDS):
        for name, run in runs.items():
            if device.type == "cuda":
                torch.cuda.synchronize()
            began = time.perf_counter()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if number >= WARM_UP:
                seconds[name].append(time.perf_counter() - began)
    report(seconds, device, sum(p.numel() for p in model.parameters()))


def report(seconds: dict[str, list[float]], device: torch.device, parameters: int) -> None:
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    adamw, model = medians["AdamW (foreach)"], medians["forward and backward"]
    table = Table(title=f"Step time, {parameters:,} parameters, {device.type}; medians of {ROUNDS}")
    for heading in ("", "/ AdamW (foreach)", "/ forward and backward", *(["ms"] if device.type == "cuda" else [])):
        table.add_column(heading, justify="right" if heading else "left")
    for name, value in medians.items():
        absolute = [f"{1e3 * value:.2f}"] if device.type == "cuda" else []
        table.add_row(name, f"{value / adamw:.1f}", f"{value / model:.2f}", *absolute)
    Console().print(table)
    out = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu, one thread",
        "torch": torch.__version__,
        "parameters": parameters,
        "rounds": ROUNDS,
        "ratio_to_adamw": {name: round(value / adamw, 2) for name, value in medians.items()},
        "ratio_to_forward_and_backward": {name: round(value / model, 3) for name, value in medians.items()},
    }
    (ROOT / "docs" / "step_time.json").write_text(json.dumps(out, indent=2) + "\n")


if __name__ == "__main__":
    main()
