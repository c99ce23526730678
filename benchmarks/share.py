"""AdaFisher's share of a training step of a 350 M transformer on one GPU, as one rank of eight has it.

    python benchmarks/share.py       # writes docs/share.json and docs/share.png

Forward and backward of the whole model (bfloat16 autocast, 16 sequences of 1,024), and the optimizer's step on an
eighth of its parameters, whole layers of it: what a rank of eight owns. What travels between ranks is not in it.
Blocks of one row and blocks that 16 rows share: b=64×16 are those of block_size=64, rows_per_block=16.
Without a CUDA device --quick runs a tiny model on the CPU, which says whether the script works and nothing else.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import common
import torch
from common import Quick
from matplotlib import pyplot
from model import ByteTransformer
from rich.table import Table
from torch import nn

from adafisher_dist import AdaFisher

RANKS = 8
LARGE = {"width": 1024, "layers": 28, "heads": 16, "seq_len": 1024, "batch": 16}
TINY = {"width": 64, "layers": 8, "heads": 4, "seq_len": 32, "batch": 2}
ROUNDS, WARM_UP = 20, 5
CASES: dict[str, dict[str, Any]] = {
    f"b={size}×{rows}{', bf16' if dtype == torch.bfloat16 else ''}{', packed' if packed else ''}": {
        "block_size": size, "rows_per_block": rows, "fisher_dtype": dtype, "packed": packed,
    }
    for rows in (1, 16)
    for size in (32, 64, 128)
    for dtype in (torch.float32, torch.bfloat16)
    for packed in (False, True)
}  # fmt: skip


def main(quick: Quick = False) -> None:
    on_gpu = torch.cuda.is_available()
    if not on_gpu and not quick:
        print("benchmarks/share.py needs a CUDA device: nothing was measured.")
        return
    device = torch.device("cuda" if on_gpu else "cpu")
    shape = dict(LARGE if on_gpu else TINY)
    batch = shape.pop("batch")
    torch.manual_seed(0)
    model = ByteTransformer(**shape).to(device)
    tokens = torch.randint(256, (batch, shape["seq_len"] + 1), device=device)

    def forward_and_backward() -> None:
        model.zero_grad()
        with torch.autocast(device.type, torch.bfloat16):
            loss = model(tokens[:, :-1], tokens[:, 1:]).mean()
        loss.backward()

    whole = seconds(forward_and_backward, device)
    own = eighth(model)
    steps = {}
    for name, settings in CASES.items():
        optimizer = AdaFisher(own, **settings)
        steps[name] = seconds(optimizer.step, device)
        optimizer.reset_state()
    report(whole, steps, sum(p.numel() for p in model.parameters()), sum(p.numel() for p in own), on_gpu, quick)


def eighth(model: ByteTransformer) -> list[nn.Parameter]:
    """The parameters of an eighth of the layers, as a rank's blocks are a run of all."""
    layers = list(model.layers)
    return [p for layer in layers[: -(-len(layers) // RANKS)] for p in layer.parameters()]


def seconds(run: Callable[[], Any], device: torch.device) -> float:
    """The median of some runs, each with nothing else on the device."""
    times = []
    for number in range(WARM_UP + ROUNDS):
        if device.type == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        if number >= WARM_UP:
            times.append(time.perf_counter() - began)
    return statistics.median(times)


def report(whole: float, steps: dict[str, float], parameters: int, own: int, on_gpu: bool, quick: bool) -> None:
    shares = {name: step / (step + whole) for name, step in steps.items()}
    table = Table(title=f"{own:,} of {parameters:,} parameters, as one rank of {RANKS}; target: at most 10 %")
    for heading in ("", "share of a step", "/ forward and backward", *(["ms"] if on_gpu else [])):
        table.add_column(heading, justify="right" if heading else "left")
    for name, step in steps.items():
        absolute = [f"{1e3 * step:.2f}"] if on_gpu else []
        table.add_row(name, f"{100 * shares[name]:.1f} %", f"{step / whole:.3f}", *absolute)
    common.show(table)
    figure, axes = pyplot.subplots(figsize=(8, 9), layout="constrained")
    axes.barh(list(shares), [100 * share for share in shares.values()])
    axes.axvline(10, color="black", linestyle="--", label="target")
    axes.invert_yaxis()
    axes.set_xlabel("% of a training step")
    axes.legend()
    absolute = {"forward_and_backward_ms": 1e3 * whole, "step_ms": {n: 1e3 * s for n, s in steps.items()}}
    result = {"parameters": parameters, "own": own, "ranks": RANKS, "share": shares, **(absolute if on_gpu else {})}
    common.save("share", quick, common.rounded(result), figure)


if __name__ == "__main__":
    common.start(main)
