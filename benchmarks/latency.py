"""What a step costs in messages alone: how long ranks take to know of each other, by their number.

    python benchmarks/latency.py       # writes docs/latency.json and docs/latency.svg

W processes over gloo, one thread each, train a model so small that hardly any of the time is
arithmetic or bytes. One round measures, at every W in turn and in the same processes, the others
waiting: torch's all-reduce of the gradient; what the ranks of AdaFisher tell each other in a step,
where hosts ask each other, where a device decides (a CPU stands for it), and as it would be by
gloo's all-reduce; a step of AdaFisher; and a training step under DDP with either optimizer. The
slowest rank counts. All figures are ratios to the all-reduce or AdamW's step of the same round.

A hop is a message that has to be there before the next one can be sent. gloo's all-reduce makes
2 (W − 1) of them, its all-gather W − 1, its all-to-all one.

More processes than cores share them: a rank that has a message may have to wait for a core, so that
what is measured there grows with the number of messages and processes more than with the hops.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import common
import figures
import torch
import torch.distributed as dist
from common import Quick, rounded, spread
from rich.table import Table
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from adafisher_dist import AdaFisher
from adafisher_dist.comm import collectives

WORLDS, WORLDS_QUICK = (2, 4, 8, 16, 32), (2, 4)
ROUNDS, ROUNDS_QUICK, WARM_UP = 15, 3, 3
WIDTH = 64
BEFORE, AFTER = 23, 1  # numbers that hosts tell each other before and after a step: DESIGN.md, "Bytes"
BEFORE_ON_DEVICE = 5  # and devices before it

ALL_REDUCE, ADAMW = "all-reduce of the gradient", "training step, AdamW"
HOSTS, RING, DEVICE = "agreement, by hosts", "the same by gloo's all-reduce", "agreement, where a device decides"
STEP, TRAINING = "step of AdaFisher", "training step, AdaFisher"

HOPS: dict[str, Callable[[int], int]] = {
    "alltoall": lambda world: 1,
    "allreduce": lambda world: 2 * (world - 1),
    "allgather": lambda world: world - 1,
}


class _Collectives(TorchDispatchMode):
    """Counts collectives by name."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self.seen[func.overloadpacket.__name__.strip("_").removesuffix("_base")] += 1
        return func(*args, **(kwargs or {}))

    def hops(self, world: int) -> int:
        return sum(count * HOPS[name](world) for name, count in self.seen.items())


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH))


def works(group: dist.ProcessGroup) -> dict[str, Callable[[], None]]:
    """What is measured on the ranks of a group. All of them have the same gradients."""
    ranks = collectives.join(group)
    x = torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(1))
    alone = model()
    alone(x).square().mean().backward()
    gradient = torch.cat([parameter.grad.view(-1) for parameter in alone.parameters()])
    stepped = AdaFisher(alone.named_parameters(), lr=1e-3, process_group=group)
    on_device = [ranks.comm_buffer(torch.zeros(numel, dtype=torch.int64)) for numel in (BEFORE_ON_DEVICE, AFTER)]

    def by_hosts() -> None:
        for numel in (BEFORE, AFTER):
            collectives.minimum(ranks, [0] * numel)

    def by_ring() -> None:
        for numel in (BEFORE, AFTER):
            dist.all_reduce(torch.zeros(numel, dtype=torch.int64), dist.ReduceOp.MIN, group)

    def by_device() -> None:
        for buffer in on_device:
            collectives.minimum_on_device(ranks, buffer)

    def training(make: Callable[[nn.Module], torch.optim.Optimizer]) -> Callable[[], None]:
        wrapped = DistributedDataParallel(model(), process_group=group)
        optimizer = make(wrapped)

        def step() -> None:
            optimizer.zero_grad()
            wrapped(x).square().mean().backward()
            optimizer.step()

        return step

    return {
        ALL_REDUCE: lambda: dist.all_reduce(gradient, group=group),
        HOSTS: by_hosts,
        RING: by_ring,
        DEVICE: by_device,
        STEP: stepped.step,
        ADAMW: training(lambda module: torch.optim.AdamW(module.parameters(), lr=1e-3)),
        TRAINING: training(lambda module: AdaFisher(module.parameters(), lr=1e-3, process_group=group)),
    }


def on_ranks(rank: int, world: int, worlds: tuple[int, ...], rounds: int) -> tuple[list[Any], dict[int, Any]]:
    """By round and W: this rank's seconds of each work. And by W: hops of each."""
    groups = {size: dist.new_group(list(range(size))) for size in worlds}
    mine = {size: works(group) for size, group in groups.items() if rank < size}
    measured, hops = [], {}
    for number in range(WARM_UP + rounds):
        row: dict[int, dict[str, float]] = {}
        for size in worlds:
            dist.barrier()  # ranks that take no part wait in the next one, asleep
            for name, work in mine.get(size, {}).items():
                dist.barrier(groups[size])
                began = time.perf_counter()
                work()
                row.setdefault(size, {})[name] = time.perf_counter() - began
        if number >= WARM_UP:
            measured.append(row)
    for size in worlds:
        for name, work in mine.get(size, {}).items():
            with _Collectives() as seen:
                work()
            hops.setdefault(size, {})[name] = seen.hops(size)
        dist.barrier()
    return measured, hops


def compare(worlds: tuple[int, ...], rounds: int) -> dict[str, Any]:
    """By W and work: hops, and ratios to the all-reduce and to AdamW's training step."""
    ranks = common.on_ranks(on_ranks, max(worlds), worlds, rounds)
    cores = len(os.sched_getaffinity(0))
    result = {}
    for size in worlds:
        hops = ranks[0][1][size]
        slowest = {
            name: [max(measured[n][size][name] for measured, _ in ranks[:size]) for n in range(rounds)] for name in hops
        }
        result[str(size)] = {
            "oversubscribed": size > cores,
            "work": {
                name: {
                    "hops": hops[name],
                    "to_all_reduce": _over(seconds, slowest[ALL_REDUCE]),
                    "to_training_step_of_adamw": _over(seconds, slowest[ADAMW]),
                }
                for name, seconds in slowest.items()
            },
        }
    return result


def _over(above: list[float], below: list[float]) -> dict[str, float]:
    return spread([a / b for a, b in zip(above, below, strict=True)])


def main(quick: Quick = False) -> None:
    """Time what ranks tell each other in a step, by their number."""
    rounds, worlds = (ROUNDS_QUICK, WORLDS_QUICK) if quick else (ROUNDS, WORLDS)
    found = compare(worlds, rounds)
    cores = len(os.sched_getaffinity(0))
    show(found)
    result = {
        "note": f"{cores} cores: more ranks than that share them (oversubscribed), and wait for a core.",
        "rounds": rounds,
        "parameters": sum(parameter.numel() for parameter in model().parameters()),
        "W": found,
    }
    common.save("latency", quick, rounded(result), draw)


def show(found: dict[str, Any]) -> None:
    table = Table(title="Median time over that of the gradient's all-reduce (min to max); hops")
    table.add_column("")
    for size, row in found.items():
        table.add_column(f"W = {size}" + (", oversubscribed" if row["oversubscribed"] else ""), justify="right")
    for name in next(iter(found.values()))["work"]:
        entries = [row["work"][name] for row in found.values()]
        ratios = [entry["to_all_reduce"] for entry in entries]
        texts = [f"{r['median']:.2f} ({r['min']:.2f} to {r['max']:.2f})" for r in ratios]
        table.add_row(name, *(f"{text}; {entry['hops']}" for text, entry in zip(texts, entries, strict=True)))
    common.show(table)


def draw(content: dict[str, Any]) -> Any:
    """Time over that of the all-reduce; training steps over AdamW's."""
    found, cores = content["W"], content["machine"]["cores"]
    figure, panels = figures.panels([3.7, 3.5])
    worlds = [int(size) for size in found]
    colours = (figures.OURS, figures.THEIRS, figures.THIRD, figures.INK)
    for axis, names, key, below in (
        (panels[0], (HOSTS, RING, DEVICE, STEP), "to_all_reduce", ALL_REDUCE),
        (panels[1], (ALL_REDUCE, STEP, TRAINING), "to_training_step_of_adamw", ADAMW),
    ):
        ends = []
        for number, (name, colour) in enumerate(zip(names, colours, strict=False)):
            ratios = [row["work"][name][key] for row in found.values()]
            ends += [ratio[end] for ratio in ratios for end in ("min", "max")]
            aside = [world * 1.03 ** (number - 1) for world in worlds]  # whiskers beside each other
            figures.between(axis, ratios, aside, label=name, color=colour)
        axis.axhline(1, color=figures.INK, linewidth=1, linestyle=":", label=f"{below} = 1")
        if max(worlds) > cores:
            axis.axvspan(cores * 1.2, max(worlds) * 1.2, color="gray", alpha=0.12)
            axis.text(cores * 1.3, 0.02, f"more ranks than the {cores} cores", transform=axis.get_xaxis_transform())
        axis.set(xscale="log", xlabel="ranks", ylabel=f"time / that of {below.replace(' of the gradient', '')}")
        figures.plain_log_ticks(axis, 0.8 * min(ends), 1.2 * max(ends))
        axis.set_xticks(worlds, [str(size) for size in worlds])
        figures.head(axis, f"Beside the {below}")
    figures.tell(
        figure,
        f"Two linear layers, {content['parameters']:,} parameters, over gloo on one machine, so that time is messages."
        f" Medians of {content['rounds']} rounds, smallest and largest. AdaFisher: the defaults.",
        figures.machine(content),
    )
    return figure


if __name__ == "__main__":
    common.start(main)
