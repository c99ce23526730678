"""The fused Triton kernel beside the torch.linalg path and beside what moving its bytes takes, on a CUDA device.

    python benchmarks/kernel.py          # writes docs/kernel.json; without a CUDA device it says so and ends

About 1 GB of blocks, far more than any cache holds, in one step: gradients in, Fisher, momentum and updates out.

- kernel: one launch over all of it.
- torch: in chunks as large as the optimizer's, two of them, and scaled to all rows, since it may take seconds.
- floor: F and m read and written, g read and u written, once each, at the bandwidth of a large copy that is measured
  here. "of floor" is floor / kernel: 100 % would be a step that only moves bytes.

Times are medians of what the device's own events tell; compiling is left out. Every block is sound: the ladder is not
what is measured, and how many blocks climbed it is reported. So is how far u is from the torch path's.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from adafisher_dist import batch as stacked
from adafisher_dist import fisher, fused
from adafisher_dist.batch import Batch
from adafisher_dist.plan import CHUNK_FISHER_NUMEL
from adafisher_dist.settings import DEFAULTS, Structure

ROOT = Path(__file__).resolve().parent.parent

SIZES = (16, 32, 64, 128)
DTYPES = (torch.float32, torch.bfloat16)
FISHER_BYTES = 2**30
CHUNKS = 2  # that the torch path is timed on
WARM_UP, REPEATS = 3, 20
TORCH_WARM_UP, TORCH_REPEATS = 1, 5
HEAD_START_CYCLES = 2_000_000  # about a millisecond, so that no launch is waited for between the events


def median_ms(run: Callable[[], object], prepare: Callable[[], object], warm_up: int, repeats: int) -> float:
    """Milliseconds on the device for `run`; `prepare` goes before each, and is not counted."""
    times = []
    for _ in range(warm_up + repeats):
        prepare()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(HEAD_START_CYCLES)
        begin.record()
        run()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times[warm_up:])


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second, read and written, of a copy of 1 GB."""
    source = torch.zeros(FISHER_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    ms = median_ms(lambda: target.copy_(source), lambda: None, WARM_UP, REPEATS)
    return 2 * source.numel() / (ms * 1e-3)


def make(size: int, dtype: torch.dtype, packed: bool, rows: int, device: torch.device) -> Batch:
    """Blocks that have seen many gradients of unit covariance: F is the identity."""
    structure = Structure(size, "rows", None, dtype, 1.0, False, packed)
    batch = stacked.allocate(0, size, True, structure, np.arange(rows), rows, device)
    identity = torch.eye(size, dtype=dtype, device=device).unsqueeze(0)
    batch.fisher.copy_(fisher.pack(identity) if packed else identity)
    return batch


class Steps:
    """Steps of a batch with one of the backends, always on the same gradients."""

    def __init__(self, batch: Batch, gradient_NB: Tensor, backend: str, chunk: int) -> None:
        self.batch, self.gradient_NB, self.chunk = batch, gradient_NB, chunk
        self.settings = {**DEFAULTS, "backend": backend}
        self.done = 100  # the averages are full

    def prepare(self) -> None:
        self.batch.gradient_NB.copy_(self.gradient_NB)
        self.done += 1

    def run(self) -> None:
        rows = len(self.batch.fisher)
        for start in range(0, rows, self.chunk):
            stop = min(rows, start + self.chunk)
            stacked.compute(self.batch, start, stop, self.done, self.done, self.settings)


def measure(size: int, dtype: torch.dtype, packed: bool, bandwidth: float, device: torch.device) -> dict[str, Any]:
    """Everything about one kind of block."""
    elements = fisher.packed_numel(size) if packed else size**2
    rows = FISHER_BYTES // (elements * dtype.itemsize)
    chunk = min(rows, CHUNK_FISHER_NUMEL // size**2)
    few = min(rows, CHUNKS * chunk)
    gradient_NB = torch.randn(rows, size, device=device, generator=torch.Generator(device).manual_seed(0))
    kernel = Steps(make(size, dtype, packed, rows, device), gradient_NB, "triton", rows)
    other = Steps(make(size, dtype, packed, few, device), gradient_NB[:few], "torch", chunk)
    for steps in (kernel, other):
        steps.prepare()
        steps.run()
    apart_NB = kernel.batch.gradient_NB[:few] - other.batch.gradient_NB
    error = float((apart_NB.norm(dim=1) / other.batch.gradient_NB.norm(dim=1)).max())
    same = torch.equal(kernel.batch.fisher[:few], other.batch.fisher)

    kernel_ms = median_ms(kernel.run, kernel.prepare, WARM_UP, REPEATS)
    torch_ms = median_ms(other.run, other.prepare, TORCH_WARM_UP, TORCH_REPEATS) * rows / few
    assert kernel.batch.rungs_N3 is not None
    moved = 2 * sum(tensor.nbytes for tensor in (kernel.batch.fisher, kernel.batch.momentum_NB, gradient_NB))
    floor_ms = 1e3 * moved / bandwidth
    return {
        "block_size": size,
        "fisher_dtype": str(dtype).removeprefix("torch."),
        "packed": packed,
        "blocks": rows,
        "moved_bytes": moved,
        "kernel_ms": round(kernel_ms, 4),
        "torch_ms": round(torch_ms, 3),
        "floor_ms": round(floor_ms, 4),
        "of_the_floor": round(floor_ms / kernel_ms, 3),
        "times_torch": round(torch_ms / kernel_ms, 1),
        "largest_relative_difference_of_u": error,
        "same_fisher_as_torch": same,
        "blocks_on_the_ladder": int(kernel.batch.rungs_N3.any(dim=1).sum()),
    }


def report(results: list[dict[str, Any]], bandwidth: float, name: str) -> None:
    """Print the table and write docs/kernel.json."""
    import triton

    table = Table(title=f"A step of {FISHER_BYTES / 1e9:.2f} GB of blocks, {name}, copies {bandwidth / 1e12:.2f} TB/s")
    for heading in ("block", "Fisher", "kernel ms", "floor ms", "of floor", "torch ms", "torch / kernel", "u apart"):
        table.add_column(heading, justify="right")
    for r in results:
        kind = {"float32": "fp32", "bfloat16": "bf16"}[r["fisher_dtype"]] + (", packed" if r["packed"] else "")
        ms = [f"{r[key]:.2f}" for key in ("kernel_ms", "floor_ms")]
        table.add_row(
            str(r["block_size"]), kind, *ms, f"{100 * r['of_the_floor']:.0f} %", f"{r['torch_ms']:.1f}",
            f"{r['times_torch']:.1f}", f"{r['largest_relative_difference_of_u']:.0e}",
        )  # fmt: skip
    Console().print(table)
    out = {
        "device": name,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "copy_bytes_a_second": round(bandwidth),
        "repeats": REPEATS,
        "results": results,
    }
    (ROOT / "docs" / "kernel.json").write_text(json.dumps(out, indent=2) + "\n")


def main() -> None:
    if not torch.cuda.is_available():
        print("benchmarks/kernel.py needs a CUDA device: nothing was measured.")
        return
    device = torch.device("cuda", torch.cuda.current_device())
    obstacle = fused.obstacle(device)
    if obstacle is not None:
        print(f"benchmarks/kernel.py: {obstacle}. Nothing was measured.")
        return
    bandwidth = copy_bandwidth(device)
    kinds = [(size, dtype, packed) for size in SIZES for dtype in DTYPES for packed in (False, True)]
    results = []
    for size, dtype, packed in track(kinds, "Blocks of all kinds"):
        results.append(measure(size, dtype, packed, bandwidth, device))
        torch.cuda.empty_cache()
    report(results, bandwidth, torch.cuda.get_device_name(device))


if __name__ == "__main__":
    main()
