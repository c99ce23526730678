"""Cost of metrics: training steps with and without them, in one process and on two ranks.

    python benchmarks/metrics.py       # writes docs/metrics.json and docs/metrics.svg

Two models of the same kind are trained in the same process, a step of each after the other; only
one's optimizer reports metrics. The ratios of these pairs tell what a measured step costs (it looks
at the blocks), what the next one does (it calls back), and what all others do; medians, since a
busy machine disturbs single steps by more than that. Halfway the other optimizer reports instead.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import common
import figures
import torch
import torch.distributed as dist
from common import Quick
from model import ByteTransformer
from torch import nn

from adafisher_dist import AdaFisher

EVERY = 100  # the default of report_metrics: what the cost is told for
MEASURED = 10  # here, so that there are many to tell from
PAIRS, PAIRS_QUICK, WARM_UP = 800, 80, 2 * MEASURED
MODEL = {"width": 96, "layers": 3, "heads": 4, "seq_len": 128}
SEQUENCES = 16


def measure(rank: int, world: int, pairs: int) -> dict[str, Any]:
    """Ratios of training steps by what metrics do in them, and the cost for every 100 steps."""
    torch.manual_seed(0)
    models = [ByteTransformer(**MODEL) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    optimizers = [AdaFisher(model.named_parameters(), lr=1e-3) for model in models]
    tokens = torch.randint(256, (SEQUENCES // world, MODEL["seq_len"] + 1))
    halves = []
    for reporter in (1, 0):  # where a model lies in memory makes a difference, too
        told: list[int] = []
        ratios: dict[str, list[float]] = {"measured": [], "calls back": [], "others": []}
        optimizers[reporter].report_metrics(lambda step, metrics, told=told: told.append(step), MEASURED)
        for step in range(1, WARM_UP + pairs // 2 + 1):  # the gloo group of metrics is made in the first measured
            seconds = [0.0, 0.0]
            for side in (0, 1) if (step + step // MEASURED) % 2 else (1, 0):
                began = time.perf_counter()
                _step(models[side], optimizers[side], tokens, world)
                seconds[side] = time.perf_counter() - began
            if step > WARM_UP:
                kind = {0: "measured", 1: "calls back"}.get(step % MEASURED, "others")
                ratios[kind].append(seconds[reporter] / seconds[1 - reporter])
        optimizers[reporter].flush_metrics()
        optimizers[reporter].report_metrics(None)
        if rank == 0 and len(told) != (WARM_UP + pairs // 2) // MEASURED:
            raise RuntimeError(f"{told} were measured, and every {MEASURED}th step should have been")
        halves.append({kind: statistics.median(values) for kind, values in ratios.items()})
    middle = {kind: statistics.mean(half[kind] for half in halves) for kind in halves[0]}
    cost = (middle["measured"] + middle["calls back"] + (EVERY - 2) * middle["others"]) / EVERY - 1
    return {"with_to_without": middle, "halves": halves, "cost": cost}


def _step(model: nn.Module, optimizer: AdaFisher, tokens: torch.Tensor, world: int) -> None:
    optimizer.zero_grad()
    model(tokens[:, :-1], tokens[:, 1:]).mean().backward()
    if world > 1:
        for parameter in model.parameters():
            dist.all_reduce(parameter.grad, dist.ReduceOp.AVG if dist.get_backend() == "nccl" else dist.ReduceOp.SUM)
    optimizer.step()


def main(quick: Quick = False) -> None:
    """Measure, print, and write the figures."""
    pairs = PAIRS_QUICK if quick else PAIRS
    found = {f"{world} rank(s)": common.on_ranks(measure, world, pairs)[0] for world in (1, 2)}
    for name, result in found.items():
        middle = result["with_to_without"]
        told = ", ".join(f"{kind} {value:.3f}" for kind, value in middle.items())
        print(f"{name}: {100 * result['cost']:.2f} % with metrics every {EVERY} steps; with to without: {told}")
    settings = {"model": MODEL, "every": EVERY, "measured_here_every": MEASURED, "pairs": pairs}
    common.save("metrics", quick, common.rounded({**settings, "found": found}), draw)


def draw(content: dict[str, Any]) -> Any:
    """Each kind of step with metrics over the same without, in % more or less."""
    figure, (axes,) = figures.panels([figures.height(6)])
    colours = {"1 rank(s)": figures.GREY, "2 rank(s)": figures.OURS}
    rows = []
    for kind, said in KINDS.items():
        for name, colour in colours.items():
            more = 100 * (content["found"][name]["with_to_without"][said] - 1)
            rows.append((f"{kind}, {_ranks(name)}", more, f"{round(more, 1) + 0:+.1f} %", colour))
    figures.bars(axes, rows)
    axes.axvline(0, color=figures.INK, linewidth=0.8)
    axes.set(title="Time that metrics add to a training step", xlabel="% more than the same step without metrics")
    costs = ", ".join(f"{100 * found['cost']:+.1f} % on {_ranks(name)}" for name, found in content["found"].items())
    model = content["model"]
    figures.tell(
        figure,
        f"With metrics every {content['every']} steps, the default: {costs}; less than nothing is noise.",
        f"GPT of width {model['width']} and {model['layers']} layers, {SEQUENCES} × {model['seq_len']} bytes a step;"
        f" medians of {content['pairs']} pairs of steps. AdaFisher: the defaults.",
        figures.machine(content),
    )
    return figure


def _ranks(name: str) -> str:
    return name.replace("(s)", "" if name.startswith("1 ") else "s")


# What a step does, and what the JSON calls it.
KINDS = {"a measured step": "measured", "the next, which calls back": "calls back", "all others": "others"}

if __name__ == "__main__":
    common.start(main)
