"""The fused Triton kernel beside the torch.linalg path and beside what moving its bytes takes, on a CUDA device.

    python benchmarks/kernel.py          # writes docs/kernel.json; without a CUDA device it says so and ends

About 1 GB of blocks, far more than any cache holds, in one step: gradients in, Fisher, momentum and updates out.
Blocks of one row, and blocks that 16 or 64 rows share. `make gpu` measures some of them in its part "fast", by
`measure`, which also works where the kernel is interpreted, on a CPU: that says whether the script works.

- kernel: one launch over all of it.
- torch: in chunks as large as the optimizer's, two of them, and scaled to all blocks, since it may take seconds.
- floor: F, m and w read and written, g read and u written, once each, at the bandwidth of a large copy that is measured
  here: of D rows of b elements in float32, 8 b/D + 16 + 8/b bytes an element (w only where D > 1). What the weights'
  own 8 take comes later. "of floor" is floor / kernel: 100 % would be a step that only moves bytes.

Times are medians of what the device's own events tell; compiling is left out. Every block is sound: the ladder is not
what is measured, and how many blocks climbed it is reported. So is how far u is from the torch path's.
"""

from __future__ import annotations

import itertools
import json
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import common
import numpy as np
import torch
from common import Quick
from rich.progress import track
from rich.table import Table
from torch import Tensor

from adafisher_dist import batch as stacked
from adafisher_dist import fisher, fused
from adafisher_dist.batch import Batch
from adafisher_dist.grid import Kind
from adafisher_dist.plan import CHUNK_FISHER_NUMEL
from adafisher_dist.settings import DEFAULTS, Structure

SIZES, QUICK_SIZES = (16, 32, 64, 128), (16, 64)
DEPTHS = (1, 16, 64)
DTYPES = (torch.float32, torch.bfloat16)
STATE_BYTES, QUICK_BYTES = 2**30, 2**27
CHUNKS = 2  # that the torch path is timed on
HEAD_START_CYCLES = 2_000_000  # about a millisecond, so that no launch is waited for between the events


class Effort(NamedTuple):
    """How often a thing is done before it is timed, and while."""

    warm_up: int
    repeats: int


KERNEL, TORCH = Effort(3, 20), Effort(1, 5)


def median_ms(
    run: Callable[[], object], prepare: Callable[[], object], effort: Effort, device: torch.device
) -> float:  # fmt: skip
    """Milliseconds on the device for `run`; `prepare` goes before each, and is not counted."""
    one = _ms_by_clock if device.type == "cpu" else _ms_by_events
    return statistics.median([one(run, prepare) for _ in range(sum(effort))][effort.warm_up :])


def _ms_by_clock(run: Callable[[], object], prepare: Callable[[], object]) -> float:
    prepare()
    began = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - began)


def _ms_by_events(run: Callable[[], object], prepare: Callable[[], object]) -> float:
    prepare()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(HEAD_START_CYCLES)
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def copy_bandwidth(device: torch.device, numel: int = STATE_BYTES) -> float:
    """Bytes a second, read and written, of a copy of so many bytes, by default 1 GB."""
    source = torch.zeros(numel, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    ms = median_ms(lambda: target.copy_(source), lambda: None, KERNEL, device)
    return 2 * source.numel() / (ms * 1e-3)


def make(kind: Kind, dtype: torch.dtype, packed: bool, count: int, device: torch.device) -> Batch:
    """Blocks that have seen many gradients of unit covariance: F is the identity."""
    structure = Structure(kind.size, kind.depth, "rows", None, dtype, 1.0, False, packed)
    batch = stacked.allocate(0, kind, structure, np.arange(count), np.full(count, kind.size), device)
    identity = torch.eye(kind.size, dtype=dtype, device=device).unsqueeze(0)
    batch.fisher.copy_(fisher.pack(identity) if packed else identity)
    if batch.square_ND is not None:
        batch.square_ND.fill_(1.0)
    return batch


class Steps:
    """Steps of a batch with one of the backends, always on the same gradients."""

    def __init__(self, batch: Batch, gradient_NDB: Tensor, backend: str, chunk: int) -> None:
        self.batch, self.gradient_NDB, self.chunk = batch, gradient_NDB, chunk
        self.settings = {**DEFAULTS, "backend": backend}
        self.done = 100  # the averages are full

    def prepare(self) -> None:
        self.batch.gradient_NDB.copy_(self.gradient_NDB)
        self.done += 1

    def run(self) -> None:
        count = len(self.batch.fisher)
        for start in range(0, count, self.chunk):
            stop = min(count, start + self.chunk)
            stacked.compute(self.batch, start, stop, self.done, self.done, self.settings)


def measure(
    kind: Kind, dtype: torch.dtype, packed: bool, state_bytes: int, bandwidth: float, device: torch.device,
    effort: Effort = KERNEL, torch_effort: Effort = TORCH,
) -> dict[str, Any]:  # fmt: skip
    """Everything about one kind of block."""
    elements = kind.size * kind.depth
    triangle = fisher.packed_numel(kind.size) if packed else kind.size**2
    count = state_bytes // (triangle * dtype.itemsize + 2 * 4 * elements)
    chunk = min(count, CHUNK_FISHER_NUMEL // kind.size**2)
    few = min(count, CHUNKS * chunk)
    generator = torch.Generator(device).manual_seed(0)
    gradient_NDB = torch.randn(count, kind.depth, kind.size, device=device, generator=generator)
    kernel = Steps(make(kind, dtype, packed, count, device), gradient_NDB, "triton", count)
    other = Steps(make(kind, dtype, packed, few, device), gradient_NDB[:few], "torch", chunk)
    for steps in (kernel, other):
        steps.prepare()
        steps.run()
    apart_NDB = kernel.batch.gradient_NDB[:few] - other.batch.gradient_NDB
    error = float((apart_NDB.norm(dim=2) / other.batch.gradient_NDB.norm(dim=2)).max())
    fisher_error = float((kernel.batch.fisher[:few].float() - other.batch.fisher.float()).abs().max())

    kernel_ms = median_ms(kernel.run, kernel.prepare, effort, device)
    torch_ms = median_ms(other.run, other.prepare, torch_effort, device) * count / few
    assert kernel.batch.rungs_N3 is not None
    moved = 2 * sum(tensor.nbytes for tensor in (*kernel.batch.tensors().values(), gradient_NDB))
    floor_ms = 1e3 * moved / bandwidth
    return {
        "block_size": kind.size,
        "rows_per_block": kind.depth,
        "fisher_dtype": str(dtype).removeprefix("torch."),
        "packed": packed,
        "blocks": count,
        "moved_bytes": moved,
        "moved_bytes_an_element": round(moved / (count * elements), 2),
        "kernel_ms": round(kernel_ms, 4),
        "torch_ms": round(torch_ms, 3),
        "floor_ms": round(floor_ms, 4),
        "kernel_ns_an_element": round(1e6 * kernel_ms / (count * elements), 5),
        "of_the_floor": round(floor_ms / kernel_ms, 3),
        "times_torch": round(torch_ms / kernel_ms, 1),
        "largest_relative_difference_of_u": error,
        "largest_difference_of_the_fisher": fisher_error,  # whose diagonal is about 1
        "blocks_on_the_ladder": int(kernel.batch.rungs_N3.any(dim=1).sum()),
    }


def report(results: list[dict[str, Any]], state_bytes: int, bandwidth: float, name: str, quick: bool) -> None:
    """Print the table and write docs/kernel.json; a quick run's goes to runs/bench."""
    import triton

    table = Table(title=f"A step of {state_bytes / 1e9:.2f} GB of blocks, {name}, copies {bandwidth / 1e12:.2f} TB/s")
    headings = ("block", "rows", "Fisher", "kernel ms", "floor ms", "of floor", "torch ms", "torch / kernel")
    for heading in (*headings, "ps an element", "bytes an element", "u apart"):
        table.add_column(heading, justify="right")
    for r in results:
        kind = {"float32": "fp32", "bfloat16": "bf16"}[r["fisher_dtype"]] + (", packed" if r["packed"] else "")
        ms = [f"{r[key]:.2f}" for key in ("kernel_ms", "floor_ms")]
        table.add_row(
            str(r["block_size"]), str(r["rows_per_block"]), kind, *ms, f"{100 * r['of_the_floor']:.0f} %",
            f"{r['torch_ms']:.1f}", f"{r['times_torch']:.1f}", f"{1e3 * r['kernel_ns_an_element']:.1f}",
            f"{r['moved_bytes_an_element']:.0f}", f"{r['largest_relative_difference_of_u']:.0e}",
        )  # fmt: skip
    common.show(table)
    out = {
        "device": name,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "copy_bytes_a_second": round(bandwidth),
        "repeats": KERNEL.repeats,
        "results": results,
    }
    folder = common.ROOT / ("runs/bench" if quick else "docs")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "kernel.json").write_text(json.dumps(out, indent=2) + "\n")


def main(quick: Quick = False) -> None:
    if not torch.cuda.is_available():
        print("benchmarks/kernel.py needs a CUDA device: nothing was measured.")
        return
    device = torch.device("cuda", torch.cuda.current_device())
    obstacle = fused.obstacle(device)
    if obstacle is not None:
        print(f"benchmarks/kernel.py: {obstacle}. Nothing was measured.")
        return
    bandwidth, state_bytes = copy_bandwidth(device), QUICK_BYTES if quick else STATE_BYTES
    sizes, packings = (QUICK_SIZES, (False,)) if quick else (SIZES, (False, True))
    kinds = itertools.product(sizes, DEPTHS, DTYPES, packings)
    results = []
    for size, depth, dtype, packed in track(list(kinds), "Blocks of all kinds"):
        results.append(measure(Kind(size, depth, True), dtype, packed, state_bytes, bandwidth, device))
        torch.cuda.empty_cache()
    report(results, state_bytes, bandwidth, torch.cuda.get_device_name(device), quick)


if __name__ == "__main__":
    common.start(main)
