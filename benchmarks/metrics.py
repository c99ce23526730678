"""What metrics cost: training steps with them and without, in turns, in one process and on two ranks.

    python benchmarks/metrics.py       # writes docs/metrics.json and docs/metrics.png

Two models of the same kind are trained in the same process, in turns of as many steps as lie between two measured ones.
Only one's optimizer reports metrics. The ratio of each turn tells what they cost: the measured step, its collective,
and what they do in the others.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import common
import torch
import torch.distributed as dist
from common import Quick, spread
from model import ByteTransformer
from torch import nn

from adafisher_dist import AdaFisher

EVERY = 100  # the default of report_metrics
TURNS, TURNS_QUICK = 7, 3
MODEL = {"width": 96, "layers": 3, "heads": 4, "seq_len": 128}
SEQUENCES = 16


def measure(rank: int, world: int, turns: int) -> dict[str, Any]:
    """Ratios of the turns, of whole training steps, and seconds of a measured step over those of the others."""
    torch.manual_seed(0)
    models = [ByteTransformer(**MODEL) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    optimizers = [AdaFisher(model.named_parameters(), lr=1e-3) for model in models]
    told: list[int] = []
    optimizers[1].report_metrics(lambda step, metrics: told.append(step), EVERY)
    tokens = torch.randint(256, (SEQUENCES // world, MODEL["seq_len"] + 1))
    seconds: list[list[float]] = [[], []]
    for turn in range(turns + 1):  # the first is warm-up: the gloo group of metrics is made in it, too
        for side in (0, 1) if turn % 2 else (1, 0):
            for _ in range(EVERY):
                began = time.perf_counter()
                _step(models[side], optimizers[side], tokens, world)
                seconds[side].append(time.perf_counter() - began)
    optimizers[1].flush_metrics()
    if rank == 0 and len(told) != turns + 1:
        raise RuntimeError(f"{len(told)} steps were measured, and {turns + 1} should have been")
    sums = [[sum(own[at : at + EVERY]) for at in range(EVERY, len(own), EVERY)] for own in seconds]
    measured = seconds[1][2 * EVERY - 1 :: EVERY]
    return {
        "with_to_without": spread([with_ / without for without, with_ in zip(*sums, strict=True)]),
        "all_with_to_without": sum(sums[1]) / sum(sums[0]),
        "measured_step_to_others": statistics.median(measured) / statistics.median(seconds[1]),
    }


def _step(model: nn.Module, optimizer: AdaFisher, tokens: torch.Tensor, world: int) -> None:
    optimizer.zero_grad()
    model(tokens[:, :-1], tokens[:, 1:]).mean().backward()
    if world > 1:
        for parameter in model.parameters():
            dist.all_reduce(parameter.grad, dist.ReduceOp.AVG if dist.get_backend() == "nccl" else dist.ReduceOp.SUM)
    optimizer.step()


def main(quick: Quick = False) -> None:
    """Measure, print, and write the figures."""
    from matplotlib import pyplot

    turns = TURNS_QUICK if quick else TURNS
    found = {f"{world} rank(s)": common.on_ranks(measure, world, turns)[0] for world in (1, 2)}
    for name, result in found.items():
        ratio = result["with_to_without"]
        print(
            f"{name}: with metrics every {EVERY} steps a training step takes {ratio['median']:.4f} of one without"
            f" (turns: {ratio['min']:.4f} to {ratio['max']:.4f}; all together {result['all_with_to_without']:.4f});"
            f" a measured step {result['measured_step_to_others']:.2f} of the others"
        )
    figure, axis = pyplot.subplots(figsize=(5, 2.6), layout="constrained")
    for place, result in enumerate(found.values()):
        ratio = result["with_to_without"]
        low, high = ratio["median"] - ratio["min"], ratio["max"] - ratio["median"]
        axis.errorbar([place], [ratio["median"]], [[low], [high]], fmt="o", capsize=4)
    axis.axhline(1.02, color="0.6", linestyle=":", label="2 % more")
    axis.axhline(1.0, color="0.8")
    axis.set(xticks=range(len(found)), xticklabels=list(found), ylabel="with metrics / without", xlim=(-0.5, 1.5))
    axis.legend(frameon=False)
    common.save(
        "metrics", quick, common.rounded({"model": MODEL, "every": EVERY, "turns": turns, "found": found}), figure
    )


if __name__ == "__main__":
    common.start(main)
