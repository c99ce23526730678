"""How AdaFisher's step scales with the number of ranks that share the blocks, and with model size.

    python benchmarks/scaling.py       # writes docs/scaling.json and docs/scaling.svg

Ranks: W processes over gloo, one thread each, hold the same parameters and gradients, as under DDP.
A step is split into the arithmetic (each rank's time inside `shard.compute`; the slowest rank's
counts) and the rest: gradients in, the two small all-reduces, the all-gather of the updates and
their application. Rounds of all W in turn: the same processes step as one group of all ranks, as
smaller groups, and as one rank, the others waiting. The arithmetic is given by the clock, and by
processor time, which tells what a rank would need with a core of its own (but for caches and
memory, which all share): where there are fewer cores than ranks, or other work, only that can
scale.

Size: one rank, models from 0.25 to 16 million parameters, in turn. All figures are ratios.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import common
import figures
import numpy as np
import torch
import torch.distributed as dist
from common import Quick, rounded, spread
from model import ByteTransformer
from rich.table import Table

import adafisher_dist.stepping.step
from adafisher_dist import AdaFisher
from adafisher_dist.settings import DEFAULTS

WORLDS = (1, 2, 4)
BLOCK_SIZE = DEFAULTS["block_size"]
RANKS_MODEL = {"width": 256, "layers": 6, "heads": 4, "seq_len": 128}  # 4.9 million parameters
ROUNDS, ROUNDS_QUICK, WARM_UP = 7, 2, 2
TARGET = 1.7  # how much faster the arithmetic of two ranks is to be

# Width and layers of about 0.25, 1, 4 and 16 million parameters. Widths are multiples of both block
# sizes, so that all blocks are full, at any size.
SIZES = ((128, 1), (128, 5), (256, 5), (512, 5))
SIZES_QUICK = SIZES[:3]
SIZE_ROUNDS, SIZE_ROUNDS_QUICK = 3, 1
BLOCK_SIZES = (64, BLOCK_SIZE)
# At the smaller sizes a step is short: more of them make one measured value.
MEASURED_NUMEL = 1_000_000


def build(width: int, layers: int, seq_len: int = 128, heads: int = 4) -> ByteTransformer:
    """A transformer with gradients that are the same on all ranks."""
    torch.manual_seed(0)
    module = ByteTransformer(width, layers, heads, seq_len)
    generator = torch.Generator().manual_seed(1)
    for parameter in module.parameters():
        parameter.grad = 1e-3 * torch.randn(parameter.shape, generator=generator)
    return module


@contextmanager
def arithmetic() -> Iterator[list[tuple[float, float]]]:
    """Within, the seconds of each call of `compute_chunk` by the clock and the processor.

    It is replaced under the name by which a step calls it.
    """
    seconds: list[tuple[float, float]] = []
    original = adafisher_dist.stepping.step.compute_chunk

    @functools.wraps(original)
    def measured(*args: Any, **kwargs: Any) -> None:
        clock, processor = time.perf_counter(), time.thread_time()
        original(*args, **kwargs)
        seconds.append((time.perf_counter() - clock, time.thread_time() - processor))

    adafisher_dist.stepping.step.compute_chunk = measured
    try:
        yield seconds
    finally:
        adafisher_dist.stepping.step.compute_chunk = original


def step_on_ranks(rank: int, world: int, worlds: tuple[int, ...], rounds: int) -> list[dict[int, tuple[float, ...]]]:
    """By counted round and world size: seconds of the step, and of this rank's arithmetic in it.

    The arithmetic is given by the clock and by processor time.
    """
    groups = {size: dist.new_group(list(range(size))) for size in worlds}
    mine = {  # each with its own parameters, which would not be alike on all ranks if fewer of them stepped
        size: AdaFisher(build(**RANKS_MODEL).named_parameters(), block_size=BLOCK_SIZE, process_group=group)
        for size, group in groups.items()
        if rank < size
    }
    result: list[dict[int, tuple[float, ...]]] = []
    for number in range(WARM_UP + rounds):
        row = {}
        for size in worlds:
            dist.barrier()  # ranks that take no part wait here, asleep, until the others have stepped
            if size in mine:
                with arithmetic() as seconds:
                    dist.barrier(groups[size])
                    began = time.perf_counter()
                    mine[size].step()
                    dist.barrier(groups[size])  # the step ends when the slowest rank's does
                    row[size] = time.perf_counter() - began, *map(sum, zip(*seconds, strict=True))
        if number >= WARM_UP:
            result.append(row)
    return result


def by_world(worlds: tuple[int, ...], rounds: int) -> dict[str, Any]:
    """Steps and arithmetic of the slowest rank, as ratios to the same round's one-rank step."""
    ranks = common.on_ranks(step_on_ranks, max(worlds), worlds, rounds)
    steps, inside, busy = (
        {size: [max(rank[n][size][which] for rank in ranks[:size]) for n in range(rounds)] for size in worlds}
        for which in range(3)
    )
    cores = len(os.sched_getaffinity(0))
    result = {}
    for size in worlds:
        rest = [step - own for step, own in zip(steps[size], inside[size], strict=True)]
        result[str(size)] = {
            "oversubscribed": size > cores,
            "step_to_step_of_one_rank": over(steps[size], steps[1]),
            "arithmetic_to_step_of_one_rank": over(inside[size], steps[1]),
            "rest_to_step_of_one_rank": over(rest, steps[1]),
            "speedup_of_step": over(steps[1], steps[size]),
            "speedup_of_arithmetic": over(inside[1], inside[size]),
            "speedup_of_arithmetic_by_processor_time": over(busy[1], busy[size]),
        }
    return result


def over(above: list[float], below: list[float]) -> dict[str, float]:
    return spread([a / b for a, b in zip(above, below, strict=True)])


def by_size(sizes: tuple[tuple[int, int], ...], block_size: int, rounds: int) -> dict[str, Any]:
    """Time per parameter relative to the smallest model, and the slope of log time by log size."""
    modules = [build(width, layers) for width, layers in sizes]
    numels = [sum(p.numel() for p in module.parameters()) for module in modules]
    optimizers = [AdaFisher(module.named_parameters(), block_size=block_size) for module in modules]
    repeats = [max(1, MEASURED_NUMEL // numel) for numel in numels]
    seconds: list[list[float]] = [[] for _ in sizes]
    for number in range(1 + rounds):
        for optimizer, times, own in zip(optimizers, repeats, seconds, strict=True):
            took = timed(optimizer.step, times)
            if number:  # the first round allocates
                own.append(took / times)
    each = [[second / numel for second in own] for own, numel in zip(seconds, numels, strict=True)]
    slopes = [np.polyfit(np.log(numels), np.log(row), 1)[0] for row in zip(*seconds, strict=True)]
    return {
        "parameters": numels,
        "time_a_parameter_to_the_smallest": [over(own, each[0]) for own in each],
        "slope_of_log_time_by_log_size": spread([float(slope) for slope in slopes]),
    }


def timed(run: Callable[[], Any], times: int) -> float:
    began = time.perf_counter()
    for _ in range(times):
        run()
    return time.perf_counter() - began


def main(quick: Quick = False) -> None:
    """Time AdaFisher's step by the number of ranks and by the size of the model."""
    rounds, worlds = (ROUNDS_QUICK, WORLDS[:2]) if quick else (ROUNDS, WORLDS)
    size_rounds, models = (SIZE_ROUNDS_QUICK, SIZES_QUICK) if quick else (SIZE_ROUNDS, SIZES)
    ranks = by_world(worlds, rounds)
    sizes = {str(b): by_size(models, b, size_rounds) for b in BLOCK_SIZES}
    parameters = sum(p.numel() for p in build(**RANKS_MODEL).parameters())
    cores = len(os.sched_getaffinity(0))
    show(ranks, sizes, parameters, cores)
    result = {
        "note": f"{cores} cores: more ranks than that share them (oversubscribed), and only processor time can scale.",
        "rounds": {"by_world_size": rounds, "by_model_size": size_rounds},
        "by_world_size": {"model": {**RANKS_MODEL, "parameters": parameters}, "block_size": BLOCK_SIZE, "W": ranks},
        "by_model_size": {"W": 1, "block_size": sizes},
    }
    common.save("scaling", quick, rounded(result), draw)


def show(ranks: dict[str, Any], sizes: dict[str, Any], parameters: int, cores: int) -> None:
    table = Table(title=f"Step on W ranks, {parameters:,} parameters, b = {BLOCK_SIZE}; shares of one rank's step")
    for heading in (
        "W",
        "step",
        "arithmetic",
        "rest",
        "step faster",
        "arithmetic faster",
        "min to max",
        "by processor time",
        "",
    ):
        table.add_column(heading, justify="right")
    for size, row in ranks.items():
        gain = row["speedup_of_arithmetic"]
        remark = f"oversubscribed: {cores} cores" if row["oversubscribed"] else ""
        if size == "2" and not row["oversubscribed"]:
            remark = f"target {TARGET}: {'met' if gain['median'] >= TARGET else 'MISSED'}"
        shares = [row[f"{part}_to_step_of_one_rank"]["median"] for part in ("step", "arithmetic", "rest")]
        table.add_row(
            size,
            *(f"{share:.3f}" for share in shares),
            f"{row['speedup_of_step']['median']:.2f} ×",
            f"{gain['median']:.2f} ×",
            f"{gain['min']:.2f} to {gain['max']:.2f}",
            f"{row['speedup_of_arithmetic_by_processor_time']['median']:.2f} ×",
            remark,
        )
    common.show(table)
    table = Table(title="Time a parameter on one rank, to that of the smallest model")
    table.add_column("parameters", justify="right")
    for b in sizes:
        table.add_column(f"b = {b}", justify="right")
    for number, numel in enumerate(next(iter(sizes.values()))["parameters"]):
        entries = [entry["time_a_parameter_to_the_smallest"][number] for entry in sizes.values()]
        table.add_row(f"{numel:,}", *(f"{e['median']:.2f} ({e['min']:.2f} to {e['max']:.2f})" for e in entries))
    slopes = [entry["slope_of_log_time_by_log_size"]["median"] for entry in sizes.values()]
    table.add_row("slope of log time by log size", *(f"{slope:.3f}" for slope in slopes))
    common.show(table)


def draw(content: dict[str, Any]) -> Any:
    """What a step on W ranks consists of; and the time a parameter by the size of the model."""
    by_ranks, by_size = content["by_world_size"], content["by_model_size"]
    ranks, cores = by_ranks["W"], content["machine"]["cores"]
    figure, (first, second) = figures.panels([figures.height(2 * len(ranks)), 3.2])
    rows = []
    for size, row in ranks.items():
        plural = "s" if size != "1" else ""
        told = f"{size} rank{plural}" + (f" on {cores} cores" if row["oversubscribed"] else "")
        step = row["step_to_step_of_one_rank"]["median"]
        rows.append((f"{told}: all of the step", step, f"{step:.2f}", figures.OURS))
        own = row["arithmetic_to_step_of_one_rank"]["median"]
        busy = 1 / row["speedup_of_arithmetic_by_processor_time"]["median"]
        words = f"{own:.2f}; by processor time {busy:.2f} of one rank's"
        rows.append(("    its arithmetic", own, words, figures.GREY))
    figures.bars(first, rows)
    first.set(title="Time of AdaFisher's step, by ranks", xlabel="time / one rank's step")
    for (b, entry), colour in zip(by_size["block_size"].items(), (figures.GREY, figures.OURS), strict=True):
        slope = entry["slope_of_log_time_by_log_size"]["median"]
        label = f"block_size={b}: time grows as size^{slope:.2f}"
        values = entry["time_a_parameter_to_the_smallest"]
        figures.between(second, values, entry["parameters"], label=label, color=colour)
    second.axhline(1, color=figures.INK, linewidth=0.8, linestyle=":")
    second.set(xscale="log", xlabel="parameters of the model", ylabel="time a parameter / smallest's", ylim=(0, 1.4))
    figures.head(second, "One rank's step, by size")
    model = by_ranks["model"]
    figures.tell(
        figure,
        f"Above: GPT of {model['parameters'] / 1e6:.1f} M parameters, width {model['width']}, as under DDP, over gloo;"
        f" block_size={by_ranks['block_size']}{_not_default(by_ranks['block_size'])}, all else AdaFisher's defaults."
        f" Below: medians of {content['rounds']['by_model_size']} rounds, smallest and largest.",
        figures.machine(content),
    )
    return figure


def _not_default(size: int) -> str:
    return "" if size == DEFAULTS["block_size"] else f" (the default is {DEFAULTS['block_size']})"


if __name__ == "__main__":
    common.start(main)
