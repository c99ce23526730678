"""What is foretold from shapes alone, beside what real runs hold, send and compute."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import backward, config, engine_of, train
from models import batch, model
from ranks import run_ranks
from rich.filesize import decimal
from step_costs import counted_collectives
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from typer.testing import CliRunner

from adafisher_dist import AdaFisher
from adafisher_dist.blocks import estimate, host_time
from adafisher_dist.blocks.estimate import LAYOUTS, transformer_shapes
from adafisher_dist.blocks.model_memory import model_memory
from adafisher_dist.settings import DEFAULTS, StateConfig, normalize, state_config
from adafisher_dist.tools.cli import app

SHAPES = [tuple(p.shape) for p in model().parameters() if p.requires_grad]

SETTINGS: dict[str, dict[str, Any]] = {
    "default": {"block_size": 8},
    "bfloat16, packed": {"block_size": 16, "fisher_dtype": "bfloat16", "packed": True},
    "kept factors, limited": {"block_size": 4, "inverse_update_freq": 3, "max_blocks": 20, "packed": True},
    "flat, float64": {"block_size": 12, "block_grid": "flat", "fisher_dtype": "float64"},
}


def kind_of(settings: dict[str, Any]) -> StateConfig:
    group = {**DEFAULTS, **settings}
    normalize(group)
    return state_config(group)


def held(optimizer: AdaFisher) -> int:
    """Bytes of all tensors of an optimizer except parameters, gradients and the host's counters."""
    shards = optimizer._registry.shards
    theirs = {id(shard.storage) for shard in shards} | {id(shard.counters) for shard in shards}
    storages: dict[int, int] = {}
    for tensor in tensors_in(
        [(exchange, exchange.shard) for exchange in optimizer._registry.stepper._exchanges], theirs
    ):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(storages.values())


def tensors_in(item: Any, seen: set[int]) -> Iterator[Tensor]:
    if id(item) in seen:
        return
    seen.add(id(item))
    if isinstance(item, Tensor):
        yield item
    elif isinstance(item, list | tuple):
        for each in item:
            yield from tensors_in(each, seen)
    elif isinstance(item, dict):
        for each in item.values():
            yield from tensors_in(each, seen)
    elif type(item).__module__.startswith("adafisher_dist."):
        names = getattr(item, "__slots__", None) or vars(item)
        for name in names:
            if name not in ("views", "storage"):
                yield from tensors_in(getattr(item, name), seen)


def wrapped(layout: str, world: int, dtype: torch.dtype) -> nn.Module:
    module: nn.Module = model(dtype)
    if layout == "fsdp2":
        return fully_shard(module, mesh=init_device_mesh("cpu", (world,)))
    return DistributedDataParallel(module) if world > 1 else module


def train_plain(
    layout: str, rank: int, world: int, settings: dict[str, Any], dtype: torch.dtype
) -> tuple[AdaFisher, int]:
    module = wrapped(layout, world, dtype)
    optimizer = AdaFisher(module.parameters(), **settings)
    for step in range(3):
        x, y = batch(step, rank, world, dtype=dtype)
        optimizer.zero_grad()
        nn.functional.mse_loss(module(x), y).backward()
        with counted_collectives() as calls:
            optimizer.step()
    return optimizer, len(calls)


def measured(rank: int, world: int, layout: str, settings: dict[str, Any], dtype: torch.dtype):
    if layout.startswith("zero"):
        engine = engine_of(config(int(layout[-1]), world, {**settings, "lr": 1e-2}))
        train(engine, 0, 2, rank, world)
        with counted_collectives() as calls:
            train(engine, 2, 3, rank, world)
        optimizer, count = engine.basic_optimizer, len(calls)
    else:
        numbers = {**settings, "fisher_dtype": kind_of(settings).fisher_dtype}
        optimizer, count = train_plain(layout, rank, world, numbers, dtype)
    return held(optimizer), optimizer.memory_usage(), optimizer.communication_usage(), count


def check(layout: str, world: int, name: str, dtype: torch.dtype = torch.float32) -> None:
    settings = SETTINGS[name]
    foretold = estimate.estimate(SHAPES, layout, world, kind_of(settings), dtype)
    if world == 1 and layout == "ddp":
        found = [measured(0, 1, layout, settings, dtype)]
    else:
        found = run_ranks(measured, world, layout, settings, dtype, deepspeed=layout.startswith("zero"))
    totals = [bytes_held for bytes_held, *_ in found]
    assert foretold.memory["total"] == max(totals)
    assert foretold.least == min(totals)
    sent = []
    for bytes_held, memory, traffic, calls in found:
        assert memory["rank"]["total"] == bytes_held
        assert memory["all"]["total"] == sum(totals)
        last, planned = traffic["last_step"], traffic["rank"]
        assert {kind: last[kind] for kind in ("weights", "blocks")} == {k: planned[k] for k in ("weights", "blocks")}
        # DESIGN.md, "Bytes": 23 numbers before a step and one after it, of 8 bytes each.
        assert last["verdicts"] == 192 * (world - 1)
        sent.append(planned["total"])
        if world > 1:
            assert foretold.collectives == calls
    assert foretold.sent == max(sent)


@pytest.mark.parametrize("name", SETTINGS)
def test_one_process(name: str) -> None:
    check("ddp", 1, name)


@pytest.mark.dist
@pytest.mark.deepspeed
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str) -> None:
    check(layout, 2, "default")


@pytest.mark.dist
@pytest.mark.parametrize("name", [name for name in SETTINGS if name != "default"])
def test_settings(name: str) -> None:
    check("ddp", 3, name)


@pytest.mark.dist
def test_bfloat16_weights_travel_as_such() -> None:
    check("ddp", 2, "default", torch.bfloat16)


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.deepspeed
@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout(layout: str, name: str, world: int) -> None:
    check(layout, world, name)


# ---- the model, and AdamW ----


def bytes_in(item: Any) -> int:
    """Of tensors, and of what is in lists and dicts of them."""
    if isinstance(item, Tensor):
        return item.numel() * item.itemsize
    values = item.values() if isinstance(item, dict) else item if isinstance(item, list | tuple) else ()
    return sum(map(bytes_in, values))


def local(tensor: Any) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def with_adamw(rank: int, world: int, layout: str, dtype: torch.dtype) -> dict[str, int]:
    """What is there of weights, masters and moments, and at most of gradients."""
    largest = [0]

    def look(*_: Any) -> None:
        own = [p.grad for p in parameters if p.grad is not None]
        of_masters = [tensor.grad for tensor in masters if tensor.grad is not None]
        reduced = [getattr(wrapper, name, ()) for name in ("averaged_gradients", "grad_partitions_flat_buffer")]
        if layout == "zero3":
            reduced = reduced[1:]  # the same elements
        largest[0] = max(largest[0], sum(bytes_in(local(grad)) for grad in own) + bytes_in([of_masters, reduced]))

    if layout.startswith("zero"):
        stage, precision = int(layout[-1]), "fp32" if dtype == torch.float32 else "bf16"
        ds_config = config(stage, world, precision=precision, accumulate=2)
        ds_config["optimizer"] = {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}}
        engine = engine_of(ds_config)
        wrapper, optimizer, module = engine.optimizer, engine.basic_optimizer, engine.module
        names = ("fp32_groups", "single_partition_of_fp32_groups", "fp32_partitioned_groups_flat")
        masters = [tensor for name in names for own in getattr(wrapper, name, ()) for tensor in _listed(own)]
        parameters = [p for p in module.parameters() if p.requires_grad]
        optimizer.register_step_pre_hook(look)
        for step in range(2):
            backward(engine, step, rank, world)
            look()
            engine.step()
        flat = getattr(wrapper, "bit16_groups_flat", None)
        weights = flat if flat is not None else [getattr(p, "ds_tensor", p) for p in parameters]
    else:
        module, wrapper, masters = wrapped(layout, world, dtype), None, []
        parameters = [p for p in module.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters)
        optimizer.register_step_pre_hook(look)
        x, y = batch(0, rank, world, dtype=dtype)
        nn.functional.mse_loss(module(x), y).backward()
        optimizer.step()
        weights = [local(p) for p in parameters]
    states = [{k: local(v) for k, v in state.items() if k != "step"} for state in optimizer.state.values()]
    found = {"weights": weights, "masters": masters, "moments": states}
    return {**{name: bytes_in(list(tensors)) for name, tensors in found.items()}, "gradients": largest[0]}


def _listed(item: Any) -> list[Tensor]:
    return [item] if isinstance(item, Tensor) else list(item)


@pytest.mark.dist
@pytest.mark.deepspeed
@pytest.mark.parametrize("world", [2, pytest.param(3, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_model_and_adamw(layout: str, dtype: torch.dtype, world: int) -> None:
    """Beside a real engine's tensors."""
    found = run_ranks(with_adamw, world, layout, dtype, deepspeed=layout.startswith("zero"))
    plan = estimate.plan_of([(SHAPES, kind_of({}))], layout, world, torch.float32)
    for rank, seen in enumerate(found):
        foretold = model_memory([prod(shape) for shape in SHAPES], layout, plan.stored_spans, rank, dtype)
        assert asdict(foretold) == seen


class Count(TorchDispatchMode):
    """Adds up the floating-point operations of a step, from the shapes that torch is given."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        result = func(*args, **(kwargs or {}))
        stacked = args and isinstance(args[0], Tensor) and args[0].dim() == 3
        whole = stacked and args[0].shape[1] == args[0].shape[2]  # blocks, not their vectors
        if name.startswith("linalg_cholesky_ex"):
            self.flops += args[0].numel() * args[0].shape[-1] / 3
        elif name == "linalg_solve_triangular":
            self.flops += args[0].numel() * args[1].shape[-1 if (kwargs or {}).get("left", True) else -2]
        elif name == "bmm":
            self.flops += 2 * args[0].numel() * args[1].shape[-1]
        elif name in ("baddbmm", "baddbmm_"):
            self.flops += args[0].numel() + 2 * args[1].numel() * args[2].shape[-1]
        elif name == "addcmul_" and whole:
            self.flops += 2 * args[0].numel()
        elif name in ("mul", "mul_") and whole:
            self.flops += args[0].numel()
        return result


@pytest.mark.parametrize("exponent", [0.5, 1.0])
@pytest.mark.parametrize("freq", [1, 4])
@pytest.mark.parametrize("size", [16, 64])
@pytest.mark.parametrize("rows", [1, 12, 64])
def test_arithmetic(rows: int, size: int, freq: int, exponent: float) -> None:
    layer = nn.Linear(256, 128, bias=False)
    settings = {"block_size": size, "rows_per_block": rows, "inverse_update_freq": freq, "exponent": exponent}
    settings |= {"fisher_decay": 0.9, "max_blocks": 10**6}
    optimizer = AdaFisher(layer.parameters(), **settings)
    layer(torch.randn(8, 256)).pow(2).mean().backward()
    for _ in range(40 if freq > 1 else 1):  # until the Fisher is full
        optimizer.step()
    with Count() as counted:
        for _ in range(freq):
            optimizer.step()
    foretold = estimate.estimate([(128, 256)], "ddp", 1, kind_of(settings), inverse_update_freq=freq).flops
    assert foretold == pytest.approx(counted.flops / freq, rel=0.1)


@pytest.mark.parametrize("parameters", [400_000, 124_000_000, 7_000_000_000])
def test_a_transformer_that_is_made_up(parameters: int) -> None:
    shapes = transformer_shapes(parameters)
    assert sum(rows * columns for rows, columns in shapes) == pytest.approx(parameters, rel=0.01)


# ---- the command ----


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["estimate", *arguments])


def test_command() -> None:
    done = run("--params", "7e9", "--world-size", "64", "--zero-stage", "3", "--block-size", "64", "--json")
    assert done.exit_code == 0
    told = json.loads(done.output)
    kind = kind_of({"block_size": 64})
    want = estimate.estimate(transformer_shapes(7_000_000_000), "zero3", 64, kind)
    dense = next(row for row in told["settings"] if row["fisher_dtype"] == "float32" and not row["packed"])
    assert (dense["memory"], dense["sent"], dense["flops"]) == (want.memory, want.sent, want.flops)
    assert told["elements"] == pytest.approx(7e9, rel=0.001)
    assert (dense["least"], dense["collectives"], dense["chunks"]) == (want.least, want.collectives, want.chunks)
    model = told["adamw"]["weights"] + told["adamw"]["masters"] + told["adamw"]["gradients"]
    assert dense["rank_total"] == model + want.memory["total"]
    assert told["adamw"]["rank_total"] == model + told["adamw"]["moments"]
    packed = next(row for row in told["settings"] if row["packed"] and row["fisher_dtype"] == "float32")
    kind = kind_of({"block_size": 64, "packed": True})
    assert packed["memory"] == estimate.estimate(transformer_shapes(7_000_000_000), "zero3", 64, kind).memory
    assert dense["rank_total"] - packed["rank_total"] == dense["memory"]["fisher"] - packed["memory"]["fisher"]
    alone = run(
        "--params", "7e9", "--world-size", "64", "--zero-stage", "3", "--block-size", "64", "--rows-per-block", "1",
        "--json",
    )  # fmt: skip
    assert json.loads(alone.output)["settings"][0]["memory"]["fisher"] > 10 * dense["memory"]["fisher"]


def test_what_the_command_shows() -> None:
    """A line for AdamW and one for AdaFisher at its defaults; the rest is below."""
    arguments = ("--params", "124M", "--world-size", "8", "--layout", "fsdp2", "--weight-dtype", "bfloat16")
    lines = run(*arguments).output.splitlines()
    told = json.loads(run(*arguments, "--json").output)
    adamw, adafisher = (line.split() for line in lines if line.split()[:1] in (["AdamW"], ["AdaFisher"]))
    first = told["settings"][0]
    assert (first["block_size"], first["fisher_dtype"], first["packed"]) == (128, "float32", False)
    moments = amounts(told["adamw"], "weights", "gradients", "moments")
    assert adamw[1:-1] == [*moments, "0", "bytes", *amounts(told["adamw"], "rank_total"), "0", "bytes"]
    state = first["memory"]["momentum"] + first["memory"]["fisher"]
    wanted = [*amounts(told["adamw"], "weights", "gradients"), *decimal(state).split()]
    wanted += [*amounts(first["memory"], "buffers"), *amounts(first, "rank_total", "sent"), str(first["collectives"])]
    assert adafisher[1:-1] == ["128", *wanted]
    (stored,) = (line for line in lines if line.startswith("Blocks of 128 stored otherwise"))
    for row in told["settings"][1:]:
        assert decimal(row["rank_total"]) in stored
    assert not {"device_ms", "network_ms"} & first.keys() and "TFLOP/s" not in " ".join(lines)


def amounts(of: dict[str, int], *names: str) -> list[str]:
    return [word for name in names for word in decimal(of[name]).split()]


def test_times_are_those_of_rates_that_are_given() -> None:
    arguments = ("--params", "124M", "--layout", "ddp", "--device-tflops", "20", "--network-gbs", "12.5")
    (row, *_) = json.loads(run(*arguments, "--json").output)["settings"]
    assert row["device_ms"] == pytest.approx(row["flops"] / 20e12 * 1e3)
    assert row["network_ms"] == pytest.approx(row["sent"] / 12.5e9 * 1e3)
    shown = " ".join(run(*arguments).output.split())
    assert f"{row['device_ms']:.3g} ms at 20 TFLOP/s; sending {row['network_ms']:.3g} ms at 12.5 GB/s" in shown


def test_the_hosts_time_is_what_was_measured() -> None:
    """The lines are those of docs/host_time.json, and go through the cases that it has."""
    measured = json.loads((Path(__file__).parent.parent / "docs" / "host_time.json").read_text())
    lines = {case: line for case, line in measured["lines"].items() if "ms_a_step" in line}
    assert {case: (line["ms_a_step"], line["us_a_piece"]) for case, line in lines.items()} == host_time.LINES
    more = {key: value for line in measured["lines"].values() for key, value in line.items() if "ms_a_step" not in line}
    assert more == {"us_a_slice": host_time.US_A_SLICE, "us_a_part": host_time.US_A_PART}
    cases = measured["milliseconds"]
    assert host_time.host_ms("ddp", 1, 300, 1) == pytest.approx(cases["one process"]["AdaFisher"], rel=1e-2)
    assert host_time.host_ms("zero0", 2, 300, 1) == pytest.approx(cases["DDP"]["AdaFisher"], rel=1e-2)
    assert host_time.host_ms("fsdp2", 2, 300, 1) == pytest.approx(cases["FSDP2"]["AdaFisher"], rel=1e-2)


def test_command_on_a_model() -> None:
    done = run("--model", "models:model", "--world-size", "2", "--layout", "ddp", "--memory-budget-gb", "1e-5")
    assert done.exit_code == 0, done.output
    assert f"{sum(torch.Size(shape).numel() for shape in SHAPES):,} elements in {len(SHAPES)} parameters" in done.output
    assert "Largest block size within 1e-05 GB a rank" in done.output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--zero-stage", "1"], "either --params"),
        (["--params", "7e9"], "either --zero-stage"),
        (["--params", "7e9", "--zero-stage", "4"], "got 4"),
        (["--params", "many", "--zero-stage", "1"], "got 'many'"),
        (["--params", "7e9", "--zero-stage", "1", "--world-size", "0"], "world size should be at least 1, got 0"),
        (["--params", "7e9", "--zero-stage", "1", "--block-size", "0"], "block_size should be at least 1, got 0"),
        (["--params", "7e9", "--zero-stage", "1", "--device-tflops", "0"], "--device-tflops should be"),
        (["--params", "7e9", "--zero-stage", "1", "--network-gbs", "-3"], "a number above 0, got -3.0"),
        (["--params", "1000", "--zero-stage", "1"], "at least"),
        (["--model", "models", "--zero-stage", "1"], "package.module:function"),
        (["--model", "models:nothing", "--zero-stage", "1"], "no attribute 'nothing'"),
        (["--model", "models:distance", "--zero-stage", "1"], "gave no model"),
        (["--model", "math:nan", "--zero-stage", "1"], "gave no model"),
    ],
)
def test_command_with_bad_arguments(arguments: list[str], words: str) -> None:
    done = run(*arguments)
    assert done.exit_code == 2
    assert words in done.output
