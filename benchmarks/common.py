"""Shared by the benchmarks: command line, ranks, statistics for a noisy machine, saved results."""

from __future__ import annotations

import datetime
import json
import os
import platform
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import figures
import matplotlib
import torch
import typer
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "launch"))  # for ByteTransformer

Quick = Annotated[bool, typer.Option("--quick", help="Fewer rounds and cases, into runs/bench instead of docs.")]


def start(main: Callable[..., None]) -> None:
    """Run a benchmark's command line."""
    # One thread for each rank and each process, here and in what is started from here: figures of
    # one core.
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    matplotlib.use("Agg")
    typer.run(main)


def show(table: Table) -> None:
    # A pipe has no width, and rich would cut the columns to fit 80.
    Console(width=None if sys.stdout.isatty() else 150).print(table)


def save(
    name: str, quick: bool, result: Mapping[str, Any], draw: Callable[[Any], Figure] | None = None, **more: Any
) -> None:
    """Write docs/NAME.json and its figure; a quick run writes both to runs/bench instead.

    A quick run's numbers are not for quoting.

    Args:
        name: of the script and of what it writes.
        quick: whether the numbers are a quick run's.
        result: what was measured.
        draw: draws NAME.svg from all that the JSON holds, so that redraw.py can do it again.
        more: of the JSON's head, in place of the usual.
    """
    folder = ROOT / ("runs/bench" if quick else "docs")
    folder.mkdir(parents=True, exist_ok=True)
    head = {
        "command": f"python benchmarks/{name}.py" + (" --quick" if quick else ""),
        "date": datetime.date.today().isoformat(),
        "torch": torch.__version__,
        "machine": machine(),
        **more,
    }
    content = json.loads(json.dumps({**head, **result}))
    (folder / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")
    if draw:
        figures.write(draw(content), folder / f"{name}.svg")
    print(f"Written: {folder.relative_to(ROOT)}/{name}.json{' and .svg' if draw else ''}")


def machine() -> dict[str, Any]:
    """Processors, cores that this process may use, and threads of each process."""
    found = {"cpu": _cpu(), "cores": len(os.sched_getaffinity(0)), "threads": torch.get_num_threads()}
    return found | ({"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {})


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    models = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return models[0].partition(":")[2].strip() if models else platform.processor() or platform.machine()


def spread(values: Sequence[float]) -> dict[str, float]:
    """Smallest, median and largest."""
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


def rounded(value: Any, digits: int = 4) -> Any:
    """The same, with floats to so many significant digits: more than a benchmark knows."""
    if isinstance(value, float):
        return float(f"{value:.{digits}g}")
    if isinstance(value, Mapping):
        return {key: rounded(entry, digits) for key, entry in value.items()}
    return [rounded(entry, digits) for entry in value] if isinstance(value, list | tuple) else value


def on_ranks(fn: Callable[..., Any], world: int, *args: Any, deepspeed: bool = False) -> list[Any]:
    """Call `fn(rank, world, *args)` on `world` processes of a gloo group; returns all results."""
    context = torch.multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        started = torch.multiprocessing.start_processes(
            _run_rank, (fn, world, folder, results, deepspeed, args), nprocs=world, join=False, start_method="spawn"
        )
        # Taken out before the ranks are waited for: a pipe that is full would keep them from
        # ending.
        by_rank: dict[int, Any] = {}
        while len(by_rank) < world:
            if results.empty():
                started.join(timeout=0.1, grace_period=5)  # raises a failing rank's own error, and ends the others
            else:
                rank, value = results.get()
                by_rank[rank] = value
        while not started.join(grace_period=5):
            pass
    return [by_rank[rank] for rank in range(world)]


def _run_rank(
    rank: int, fn: Callable[..., Any], world: int, folder: str, results: Any, deepspeed: bool, args: tuple[Any, ...]
) -> None:
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    method = f"file://{folder}/store"
    if deepspeed:
        _init_deepspeed(method, rank, world)
    else:
        dist.init_process_group("gloo", init_method=method, rank=rank, world_size=world)
    results.put((rank, fn(rank, world, *args)))
    dist.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # DeepSpeed's references keep the group alive, and Python's shutdown may abort: see launch/ranks.py


def _init_deepspeed(method: str, rank: int, world: int) -> None:
    os.environ["DS_ACCELERATOR"] = "cpu"
    import logging
    import warnings

    warnings.filterwarnings("ignore", "`torch.distributed", FutureWarning)
    import deepspeed
    from deepspeed.ops import __compatible_ops__

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    __compatible_ops__["deepspeed_shm_comm"] = False  # else it is compiled at the first use
    deepspeed.init_distributed(
        dist_backend="gloo", init_method=method, rank=rank, world_size=world, verbose=False, auto_mpi_discovery=False
    )
