"""What a step costs the host beside torch's AdamW (foreach): processor time of one thread.

    python benchmarks/host_time.py       # writes docs/host_time.json and .svg

300 small parameters, of 25 layers of a GPT of width 16, so that the host's work is nearly all there
is. The arithmetic of blocks,
which a GPU does, is timed apart and left out; what is left includes the copies, which a CPU does
here. Under DDP, FSDP2 and ZeRO on 2 ranks, by gloo; what is measured there is the base optimizer's
own step. Llama-7B's shapes are those of rank 0 of 8 under DDP by a process group that is `fake`:
kernels and collectives do nothing, and only the host's own work is left. Its tensors are memory
that nobody touches, since on meta tensors every view takes Python's time.

What `python -m adafisher_dist estimate` tells of the host's time (`blocks/host_time.py`) is for
each layout a line through two cases, the other with a fifth of the parameters; for what is gathered
one through Llama-7B in many and in few slices, and one through 8 ranks and 1,024, since a slice
has a part of each rank.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import common
import figures
import torch
import torch.distributed as dist
from common import Quick
from rich.table import Table
from torch import nn
from torch.optim import Optimizer

from adafisher_dist import AdaFisher
from adafisher_dist.blocks import sharding
from adafisher_dist.comm import collectives
from adafisher_dist.state import shard
from adafisher_dist.stepping import consistency, exchange

WIDTH, LAYERS, FEW_LAYERS, ROUNDS, ROUNDS_QUICK = 16, 25, 5, 60, 12
_LAYER = [(3 * WIDTH, WIDTH), (WIDTH, WIDTH), (4 * WIDTH, WIDTH), (WIDTH, 4 * WIDTH)]


def shapes_of(layers: int) -> list[tuple[int, ...]]:
    return [shape for rows, columns in _LAYER * layers for shape in ((rows, columns), (rows,), (columns,))]


_LLAMA_LAYER = [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)] + [(4096,)] * 2
LLAMA: list[tuple[int, ...]] = [(32000, 4096), *_LLAMA_LAYER * 32, (4096,), (32000, 4096)]

Build = Callable[[list[nn.Parameter]], Optimizer]


class Found(NamedTuple):
    """Milliseconds of a step; of AdaFisher, runs of parameters that a rank stores, and slices."""

    milliseconds: float
    pieces: int
    slices: int


OPTIMIZERS: dict[str, Build] = {
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, foreach=True),
    "AdaFisher": lambda parameters: AdaFisher(parameters, lr=1e-3),
}


class Clock:
    """Processor time of this thread in calls of a step, without the arithmetic of blocks."""

    def __init__(self) -> None:
        self._apart = 0.0
        self.times: list[float] = []

    def timed(self, step: Callable[..., Any]) -> Callable[..., Any]:
        """The same step, watched."""

        def watched(*arguments: Any, **more: Any) -> Any:
            self._apart, began = 0.0, time.thread_time()
            result = step(*arguments, **more)
            self.times.append(time.thread_time() - began - self._apart)
            return result

        return watched

    @contextmanager
    def blocks_apart(self) -> Iterator[None]:
        """Meanwhile the arithmetic of blocks does not count."""
        real = shard.update_blocks

        def apart(*arguments: Any) -> None:
            began = time.thread_time()
            real(*arguments)
            self._apart += time.thread_time() - began

        shard.update_blocks = apart
        try:
            yield
        finally:
            shard.update_blocks = real

    @property
    def milliseconds(self) -> float:
        """The median, after the first steps."""
        return 1e3 * statistics.median(self.times[len(self.times) // 4 :])


def measured(optimizer: Optimizer, rounds: int, step: Callable[[], object] | None = None) -> Found:
    """Of `optimizer.step`, which `step` is or calls."""
    clock = Clock()
    optimizer.step = clock.timed(optimizer.step)  # type: ignore[method-assign]
    with clock.blocks_apart():
        for _ in range(rounds):
            (step or optimizer.step)()
    shards = optimizer._registry.shards if isinstance(optimizer, AdaFisher) else []
    pieces = sum(len(own.storage.stored_spans[own.storage.group.rank]) for own in shards)
    return Found(clock.milliseconds, pieces, sum(len(own.plan_summary.gathered) for own in shards))


def parameters_of(shapes: list[tuple[int, ...]], new: Callable[..., torch.Tensor] = torch.ones) -> list[nn.Parameter]:
    parameters = [nn.Parameter(new(shape)) for shape in shapes]
    for parameter in parameters:
        parameter.grad = new(parameter.shape)
    return parameters


def replicated(build: Build, rounds: int, layers: int) -> Found:
    return measured(build(parameters_of(shapes_of(layers))), rounds)


def fsdp2(build: Build, rounds: int, layers: int) -> Found:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = nn.ParameterList(parameters_of(shapes_of(layers)))
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    return measured(build(list(model.parameters())), rounds)


class Sum(nn.Module):
    """A loss to which each parameter contributes."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.weights = nn.ModuleList(_Squares(shape) for shape in shapes_of(layers))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([weight(x) for weight in self.weights]).sum()


class _Squares(nn.Module):
    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(shape))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.weight * x).square().sum()


def zero(stage: int, build: Build, rounds: int, layers: int) -> Found:
    import deepspeed

    model = Sum(layers)
    optimizer = build(list(model.parameters()))
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    x = torch.ones(())

    def step() -> None:
        engine.backward(engine(x))
        engine.step()

    return measured(optimizer, max(8, rounds // 4), step)


def _zeros_that_nobody_touches(zeros: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Large ones are not filled."""

    def made(*shape: Any, **more: Any) -> torch.Tensor:
        empty = torch.empty(*shape, **more)
        return empty if empty.numel() > 2**16 else zeros(*shape, **more)

    return made


def llama(world: int, build: Build, rounds: int, layers: int) -> Found:
    """Where there are few layers, the same ones in few slices."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.destroy_process_group()
    dist.init_process_group("fake", rank=0, world_size=world, store=FakeStore())
    for name in dir(torch):
        if name.startswith("_foreach_") and name.endswith("_"):
            setattr(torch, name, lambda *arguments, **more: None)
    replaced: dict[Any, dict[str, Any]] = {
        torch.Tensor: {"mul_": lambda tensor, factor: tensor},
        collectives: {
            "all_gather": lambda group, mine, out: lambda: None,
            "minimum": lambda group, values, purpose="": values,
            "_wait": lambda *arguments: None,
        },
        collectives.Group: {"comm_buffer": lambda group, tensor: collectives.CommBuffer(tensor, tensor)},
        exchange: {"largest_gradient": lambda inputs, stored, shard: torch.zeros(())},
        consistency: {"_checksum": lambda tensors: 0},
        torch: {"zeros": _zeros_that_nobody_touches(torch.zeros)},
        shard: {"update_blocks": lambda blocks, gradient_NRB, context: None},
        sharding: {"GATHERED_NUMEL": sharding.GATHERED_NUMEL * (1 if layers == LAYERS else 4)},
    }
    for owner, names in replaced.items():
        for name, value in names.items():
            setattr(owner, name, value)
    return measured(build(parameters_of(LLAMA, torch.empty)), max(6, rounds // 5))


LLAMAS = {f"Llama-7B under DDP at {world:,} ranks": world for world in (8, 1024)}
FEW, MANY = LLAMAS
CASES: dict[str, tuple[int, Callable[[Build, int, int], Found]]] = {
    "one process": (1, replicated),
    "DDP": (2, replicated),
    "FSDP2": (2, fsdp2),
    "ZeRO-1": (2, partial(zero, 1)),
    "ZeRO-2": (2, partial(zero, 2)),
    "ZeRO-3": (2, partial(zero, 3)),
    **{case: (1, partial(llama, world)) for case, world in LLAMAS.items()},
}


def work(rank: int, world: int, case: str, name: str, rounds: int, layers: int) -> Found:
    return CASES[case][1](OPTIMIZERS[name], rounds, layers)


def on_ranks(case: str, name: str, rounds: int, layers: int = LAYERS) -> Found:
    """Of the rank that takes longest."""
    found = common.on_ranks(work, CASES[case][0], case, name, rounds, layers, deepspeed=case.startswith("ZeRO"))
    return max(found)


def main(quick: Quick = False) -> None:
    """Measure all cases."""
    rounds = ROUNDS_QUICK if quick else ROUNDS
    table = Table("milliseconds of the host", *OPTIMIZERS, "ratio")
    cases: dict[str, dict[str, float]] = {}
    ours: dict[str, Found] = {}
    for case in CASES:
        names = [name for name in OPTIMIZERS if case not in LLAMAS or name == "AdaFisher"]
        found = {name: on_ranks(case, name, rounds) for name in names}
        own = {name: of.milliseconds for name, of in found.items()}
        ratio = f"{own['AdaFisher'] / own['AdamW']:.2f}" if "AdamW" in own else ""
        table.add_row(case, *(f"{own[n]:.2f}" if n in own else "" for n in OPTIMIZERS), ratio)
        cases[case], ours[case] = own, found["AdaFisher"]
    common.show(table)
    result = {"parameters": len(shapes_of(LAYERS)), "milliseconds": cases, "lines": lines(ours, rounds)}
    common.save("host_time", quick, common.rounded(result), draw)


def lines(found: dict[str, Found], rounds: int) -> dict[str, dict[str, float]]:
    """What the cases tell of a piece, a slice, and a rank's part of a slice."""
    fewer = {case: on_ranks(case, "AdaFisher", rounds, FEW_LAYERS) for case in CASES if case != MANY}
    result = {}
    for case in (case for case in CASES if case not in LLAMAS):
        us = slope(found[case], fewer[case], found[case].pieces - fewer[case].pieces)
        result[case] = {"ms_a_step": found[case].milliseconds - us * found[case].pieces / 1e3, "us_a_piece": us}
    few, many = found[FEW], found[MANY]
    us_a_part = slope(many, few, many.slices * LLAMAS[MANY] - few.slices * LLAMAS[FEW])
    us = slope(few, fewer[FEW], few.slices - fewer[FEW].slices)
    return result | {FEW: {"us_a_slice": us - LLAMAS[FEW] * us_a_part}, MANY: {"us_a_part": us_a_part}}


def slope(many: Found, few: Found, more: int) -> float:
    """Microseconds for each of what the first case has more than the second."""
    return 1e3 * (many.milliseconds - few.milliseconds) / more


def draw(content: dict[str, Any]) -> Any:
    cases = content["milliseconds"]
    colours = dict(zip(OPTIMIZERS, (figures.THEIRS, figures.OURS), strict=True))
    small, large = (
        [
            (f"rank 0 of {LLAMAS[case]:,}, DDP" if llama else f"{case}: {name}", ms, f"{ms:.3g} ms", colours[name])
            for case, own in cases.items()
            if (case in LLAMAS) == llama
            for name, ms in own.items()
        ]
        for llama in (False, True)
    )
    figure, (first, second) = figures.panels([figures.height(len(small)), figures.height(len(large))])
    figures.bars(first, small)
    ranks = max(ranks for case, (ranks, _) in CASES.items() if case not in LLAMAS)
    first.set(title=f"{content['parameters']} small parameters, {ranks} ranks", xlabel="ms of the host a step")
    figures.bars(second, large)
    second.set(title=f"Llama-7B's {len(LLAMA)} parameters, AdaFisher", xlabel="ms of the host a step")
    figures.tell(
        figure,
        f"Processor time of the thread that steps, without the blocks' arithmetic. Above: {LAYERS} layers of a GPT of"
        f" width {WIDTH}, over gloo; under ZeRO the wrapper gives AdamW one flat tensor. Below: kernels and collectives"
        " do nothing; AdamW was not measured.",
        "AdaFisher: the defaults. AdamW: torch's, foreach.",
        figures.machine(content),
    )
    return figure


if __name__ == "__main__":
    common.start(main)
