"""Time to save and load a sharded checkpoint, a plain file of the same bytes, and `torch.save`.

    python benchmarks/checkpoint.py       # writes docs/checkpoint.json and docs/checkpoint.svg

Each of W ranks (gloo, one thread) holds its share of the state of one model. Every way writes the
same bytes of the same tensors beside those of the last round, ends with fsync, and takes their
place; rounds in turn, medians. What a load reads is in the page cache. "+ MiB" is what the process
grew by at most: a load drops the state that it replaces.
"""

from __future__ import annotations

import os
import resource
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, BinaryIO

import common
import figures
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import typer
from common import Quick
from rich.table import Table
from torch import nn

from adafisher_dist import AdaFisher, load_checkpoint, save_checkpoint
from adafisher_dist.checkpoint.manifest import read

WORLDS, WORLDS_QUICK = (1, 2, 4), (2,)
ROUNDS, ROUNDS_QUICK = 5, 1
WIDTH, LAYERS = 2048, 10  # 42 million parameters; with the defaults half a GB of Fisher, momentum and weights


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*[nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)])


def peak() -> int:
    """Bytes of the largest resident set since `forget_peak`."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def forget_peak() -> int:
    """Begin anew to look for the largest resident set; its size now."""
    Path("/proc/self/clear_refs").write_text("5")
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def write_plain(path: Path, tensors: list[torch.Tensor]) -> None:
    with published(path) as file:
        for tensor in tensors:
            file.write(memoryview(tensor.view(-1).view(torch.uint8).numpy()))


def write_torch(path: Path, tensors: list[torch.Tensor]) -> None:
    with published(path) as file:
        torch.save(tensors, file)


@contextmanager
def published(path: Path) -> Iterator[BinaryIO]:
    """As a checkpoint is written: beside the last one, synced, and then in its place."""
    temporary = path.with_suffix(".saving")
    with temporary.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)


def read_plain(path: Path, tensors: list[torch.Tensor]) -> None:
    with path.open("rb", buffering=0) as file:
        for tensor in tensors:
            file.readinto(memoryview(tensor.view(-1).view(torch.uint8).numpy()))


def run_rank(rank: int, world: int, folder: str, rounds: int, results: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store-{world}", rank=rank, world_size=world)
    here = Path(folder)
    module = model()
    optimizer = AdaFisher(module.parameters(), lr=1e-3)
    for parameter in module.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    optimizer.step()
    share = [b.detach() for shard in optimizer._registry.shards for stack in shard.stacks for b in stack.state.values()]
    own = sum(tensor.nbytes for tensor in share)
    mine = here / f"plain-{rank}"
    copies = [torch.empty_like(tensor) for tensor in share]
    ways: dict[str, Callable[[], Any]] = {
        "plain write": lambda: write_plain(mine, share),
        "torch.save": lambda: write_torch(here / f"torch-{rank}.pt", share),
        "save_checkpoint": lambda: save_checkpoint(here / "checkpoint", module, optimizer),
        "asynchronous, until it returns": lambda: pending.append(
            save_checkpoint(here / "behind", module, optimizer, asynchronous=True)
        ),
        "plain read": lambda: read_plain(mine, copies),
        "torch.load": lambda: torch.load(here / f"torch-{rank}.pt", weights_only=True),
        "load_checkpoint": lambda: load_checkpoint(here / "checkpoint", module, optimizer),
        "load_checkpoint, verify=False": lambda: load_checkpoint(here / "checkpoint", module, optimizer, verify=False),
    }
    pending: list[Any] = []
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    grown = dict.fromkeys(ways, 0)
    for number in range(rounds + 1):
        for name, way in ways.items():
            dist.barrier()
            before = forget_peak()
            began = time.perf_counter()
            way()
            dist.barrier()
            took = time.perf_counter() - began
            while pending:
                pending.pop().wait()
            if number:  # the first round warms up
                seconds[name].append(took)
                grown[name] = max(grown[name], peak() - before)
    results.put((rank, own, {name: statistics.median(times) for name, times in seconds.items()}, grown))
    dist.destroy_process_group()


def measure(world: int, parent: Path, rounds: int) -> dict[str, Any]:
    folder = tempfile.mkdtemp(dir=parent)
    try:
        context = mp.get_context("spawn")
        results = context.SimpleQueue()
        mp.spawn(run_rank, (world, folder, rounds, results), nprocs=world)
        by_rank = sorted(results.get() for _ in range(world))
        manifest = read(Path(folder) / "checkpoint")
        nbytes = sum(file.nbytes for file in manifest.files.values())
        return {
            "world_size": world,
            "bytes": nbytes,
            "bytes_by_file": [file.nbytes for file in manifest.files.values()],
            "state_bytes_by_rank": [own for _, own, _, _ in by_rank],
            "gb_per_s": {name: nbytes / 1e9 / took for name, took in by_rank[0][2].items()},
            "seconds": by_rank[0][2],
            "grown_bytes": {name: max(grown[name] for *_, grown in by_rank) for name in by_rank[0][3]},
        }
    finally:
        shutil.rmtree(folder)


def main(
    parent: Annotated[Path | None, typer.Argument(help="Folder on the disk to measure; a temporary one.")] = None,
    quick: Quick = False,
) -> None:
    """Time saving and loading beside plain files, on several ranks."""
    worlds, rounds = (WORLDS_QUICK, ROUNDS_QUICK) if quick else (WORLDS, ROUNDS)
    measured = [measure(world, parent or Path(tempfile.gettempdir()), rounds) for world in worlds]
    table = Table(title=f"{measured[0]['bytes'] / 1e9:.2f} GB, all ranks together; ratio to the plain file's time")
    table.add_column("")
    for entry in measured:
        table.add_column(f"W = {entry['world_size']}", justify="right")
    for name in measured[0]["seconds"]:
        base = "plain write" if name in list(measured[0]["seconds"])[:4] else "plain read"
        cells = [
            f"{e['gb_per_s'][name]:.2f} GB/s ({e['seconds'][name] / e['seconds'][base]:.2f}), "
            f"+{e['grown_bytes'][name] / 2**20:.0f} MiB"
            for e in measured
        ]
        table.add_row(name, *cells)
    common.show(table)
    common.save("checkpoint", quick, {"rounds": rounds, "by_world_size": common.rounded(measured)}, draw)


def draw(content: dict[str, Any]) -> Any:
    """Speed of each way by ranks, writing and reading apart; and what a rank's file holds."""
    measured = content["by_world_size"]
    names = list(measured[0]["seconds"])
    colours = (figures.GREY, figures.THIRD, figures.OURS)
    figure, (writing, reading, sizes) = figures.panels([2.5, 2.5, figures.height(len(measured)) - 0.1])
    for axes, group, title in ((writing, names[:4], "Writing"), (reading, names[4:], "Reading")):
        for number, entry in enumerate(measured):
            at = [place + 0.2 * (number - 1) + 0.2 for place in range(len(group))]
            label = f"{entry['world_size']} rank" + "s" * (entry["world_size"] > 1)
            axes.barh(at, [entry["gb_per_s"][name] for name in group], 0.19, color=colours[number], label=label)
        for place, name in enumerate(group):
            axes.annotate(name, (0, place - 0.12), (2, 0), textcoords="offset points", va="bottom")
        axes.set(xlabel="GB/s, all ranks together", title=title, ylim=(len(group) - 0.4, -0.5), yticks=[])
        axes.grid(axis="y", visible=False)
        axes.spines["left"].set_visible(False)
    writing.legend(frameon=False, loc="upper right")
    rows = []
    for number, entry in enumerate(measured):
        megabytes, ranks = max(entry["bytes_by_file"]) / 1e6, entry["world_size"]
        rows.append((f"{ranks} rank" + "s" * (ranks > 1), megabytes, f"{megabytes:.0f} MB", colours[number]))
    figures.bars(sizes, rows)
    sizes.set(title="Largest file of a checkpoint", xlabel="MB")
    figures.tell(
        figure,
        f"{LAYERS} linear layers of width {WIDTH}, {measured[0]['bytes'] / 1e6:.0f} MB of weights and AdaFisher's"
        f" state with its defaults. Medians of {content['rounds']} rounds, each with fsync; what is"
        " read is in the page cache.",
        figures.machine(content),
    )
    return figure


if __name__ == "__main__":
    common.start(main)
