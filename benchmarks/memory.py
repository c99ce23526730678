"""State bytes on each rank, measured and predicted, by layout, ranks, block size and Fisher dtype.

    python benchmarks/memory.py       # writes docs/memory.json and docs/memory.svg

Real DeepSpeed engines, DDP and FSDP2 on the CPU over gloo take one step. Measured is what the
optimizer then keeps: the bytes of all tensor storages that can be reached from it, each counted
once, without parameters and gradients. So the state, the flat buffer, the buffers of what travels,
the counters. Not in it: temporaries of a step, which a chunk bounds.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import common
import figures
import numpy as np
import torch
import torch.distributed as dist
from common import Quick
from model import ByteTransformer
from rich.table import Table
from torch import Tensor, nn

from adafisher_dist import AdaFisher
from adafisher_dist.layouts.storage import GivenParameters, Storage
from adafisher_dist.settings import DEFAULTS

WORLDS = (1, 2, 4)
LAYOUTS = ("DDP", "ZeRO-0", "ZeRO-1", "ZeRO-2", "ZeRO-3", "FSDP2")
BLOCK_SIZES = (64, DEFAULTS["block_size"])
DTYPES = ("float32", "bfloat16")
CASES = [(layout, b, dtype) for b in BLOCK_SIZES for dtype in DTYPES for layout in LAYOUTS]
CASES_QUICK = [case for case in CASES if case[0] in ("DDP", "ZeRO-2", "ZeRO-3") and case[2] == "float32"]
BATCH, SEQ_LEN = 4, 16  # small: only the shapes of parameters count
MODEL = {"width": 128, "layers": 4, "heads": 4, "seq_len": SEQ_LEN}

WITHOUT_STATE = (AdaFisher, GivenParameters, Storage)
MOST_APART = 0.01  # measured from predicted
ADAMW_BYTES = 8  # two moments in float32; ZeRO-1 to 3 and FSDP2 share them out

Case = tuple[str, int, str]


class Loss(nn.Module):
    """The model and its loss in one module, as DDP and engines want to call it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = ByteTransformer(**MODEL)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        return self.model(tokens_BT[:, :-1], tokens_BT[:, 1:]).mean()


def measure(rank: int, world: int, cases: list[Case]) -> list[dict[str, int]]:
    """Of each case, this rank's bytes after one step."""
    return [measure_case(rank, world, *case) for case in cases]


def measure_case(rank: int, world: int, layout: str, block_size: int, dtype: str) -> dict[str, int]:
    generator = torch.Generator().manual_seed(rank)
    tokens = torch.randint(256, (BATCH // world, SEQ_LEN + 1), generator=generator)
    if layout.startswith("ZeRO"):
        optimizer, engine = step_of_engine(int(layout[-1]), world, tokens, block_size, dtype)
    else:
        module, engine = wrap(layout), None
        optimizer = AdaFisher(
            module.named_parameters(), lr=1e-3, block_size=block_size, fisher_dtype=getattr(torch, dtype)
        )
        module(tokens).backward()
        optimizer.step()
    result = {"measured": sum(storages(optimizer).values()), "predicted": predicted(optimizer)}
    if engine is not None:
        engine.destroy()
    return result


def step_of_engine(stage: int, world: int, tokens: Tensor, block_size: int, dtype: str) -> tuple[AdaFisher, Any]:
    import deepspeed

    config = {
        "train_batch_size": BATCH,
        "train_micro_batch_size_per_gpu": BATCH // world,
        "zero_optimization": {"stage": stage},
        "optimizer": {
            "type": "AdaFisher",
            "params": {"lr": 1e-3, "block_size": block_size, "fisher_dtype": dtype},
        },
    }
    engine, *_ = deepspeed.initialize(model=Loss(), config=config, dist_init_required=False)
    engine.backward(engine(tokens))
    engine.step()
    return engine.basic_optimizer, engine


def wrap(layout: str) -> nn.Module:
    if layout == "DDP":
        return nn.parallel.DistributedDataParallel(Loss())
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    module, mesh = Loss(), init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in module.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(module, mesh=mesh)


def predicted(optimizer: AdaFisher) -> int:
    """What the optimizer says of itself, from its plan."""
    return optimizer.memory_usage()["rank"]["total"]


def storages(optimizer: AdaFisher) -> dict[int, int]:
    """Bytes by address of all storages that the optimizer keeps, without asking `memory_usage`."""
    given = [tensor for group in optimizer.param_groups for tensor in group["params"]]
    given += [tensor for shard in optimizer._registry.shards for tensor in shard.storage.tensors]
    theirs = {local(t).untyped_storage().data_ptr() for p in given for t in (p, p.grad) if t is not None}
    found = {}
    for tensor in tensors_in([list(optimizer.state.values()), optimizer._registry], set()):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in theirs and storage.nbytes():
            found[storage.data_ptr()] = storage.nbytes()
    return found


def tensors_in(item: Any, seen: set[int]) -> Iterator[Tensor]:
    """All tensors in containers, and in the attributes of this package's own objects.

    Not in those of WITHOUT_STATE: all their tensors are parameters.
    """
    if id(item) in seen:
        return
    seen.add(id(item))
    if isinstance(item, Tensor):
        yield local(item)
        return
    kind = type(item)
    inside: list[Any] = []
    if isinstance(item, dict):
        inside = list(item.values())
    elif isinstance(item, list | tuple | set):
        inside = list(item)
    elif kind.__module__.startswith("adafisher_dist.") and kind not in WITHOUT_STATE:
        names = [name for base in kind.__mro__ for name in getattr(base, "__slots__", ())] + list(vars_of(item))
        inside = [getattr(item, name) for name in names if hasattr(item, name)]
    for entry in inside:
        yield from tensors_in(entry, seen)


def vars_of(item: Any) -> dict[str, Any]:
    with contextlib.suppress(TypeError):
        return vars(item)
    return {}


def local(tensor: Tensor) -> Tensor:
    return (tensor.to_local() if hasattr(tensor, "to_local") else tensor).detach()


def main(quick: Quick = False) -> None:
    """Measure the bytes of AdaFisher's state on each rank, beside those predicted."""
    worlds, cases = (WORLDS[:2], CASES_QUICK) if quick else (WORLDS, CASES)
    rows = []
    for world in worlds:
        by_rank = common.on_ranks(measure, world, cases, deepspeed=True)
        for number, (layout, block_size, dtype) in enumerate(cases):
            entry = {key: [rank[number][key] for rank in by_rank] for key in ("measured", "predicted")}
            rows.append({"layout": layout, "block_size": block_size, "fisher_dtype": dtype, "W": world, **entry})
    parameters = sum(p.numel() for p in Loss().parameters())
    furthest = max(abs(a / b - 1) for row in rows for a, b in zip(row["predicted"], row["measured"], strict=True))
    show(rows, worlds, parameters)
    print(f"Predicted and measured differ by at most {100 * furthest:.4f} % on any rank.")
    if furthest > MOST_APART:
        raise SystemExit(f"That is more than {100 * MOST_APART:g} %: the prediction, or this benchmark, is wrong.")
    result = {
        "model": {**MODEL, "parameters": parameters},
        "largest_relative_difference": float(f"{furthest:.3g}"),
        "bytes_by_rank": rows,
    }
    common.save("memory", quick, result, draw)


def select(rows: list[dict[str, Any]], **wanted: Any) -> list[dict[str, Any]]:
    return [row for row in rows if all(row[key] == value for key, value in wanted.items())]


def show(rows: list[dict[str, Any]], worlds: tuple[int, ...], parameters: int) -> None:
    title = f"{parameters:,} parameters: MiB on the fullest rank (predicted / measured), share of one rank"
    table = Table(title=title)
    for heading in ("layout", "b", "Fisher"):
        table.add_column(heading)
    for world in worlds:
        table.add_column(f"W = {world}", justify="right")
    for row in select(rows, W=worlds[0]):
        keys = {key: row[key] for key in ("layout", "block_size", "fisher_dtype")}
        cells = []
        for world in worlds:
            (there,) = select(rows, **keys, W=world)
            measured = max(there["measured"])
            share = 100 * measured / max(row["measured"])
            cells.append(f"{measured / 2**20:.1f} ({max(there['predicted']) / measured:.4f}), {share:.0f} %")
        table.add_row(keys["layout"], str(keys["block_size"]), keys["fisher_dtype"], *cells)
    common.show(table)


def draw(content: dict[str, Any]) -> Any:
    """Bars for the fullest rank's measured bytes, marks for those predicted, and for AdamW's."""
    rows, parameters = content["bytes_by_rank"], content["model"]["parameters"]
    settings = list(dict.fromkeys((row["block_size"], row["fisher_dtype"]) for row in rows))
    layouts, worlds = (list(dict.fromkeys(row[key] for row in rows)) for key in ("layout", "W"))
    figure, axes = figures.panels([1.75] * len(settings), sharex=True, sharey=True)
    for axis, (block_size, dtype) in zip(axes, settings, strict=True):
        for number, world in enumerate(worlds):
            at = np.arange(len(layouts)) + (number - (len(worlds) - 1) / 2) * 0.27
            those = [
                select(rows, layout=layout, W=world, block_size=block_size, fisher_dtype=dtype)[0] for layout in layouts
            ]
            measured = [max(row["measured"]) / parameters for row in those]
            ranks = f"{world} ranks" if world > 1 else "1 rank"
            axis.bar(at, measured, 0.25, label=ranks, color=(figures.GREY, figures.THIRD, figures.OURS)[number])
            told = [max(row["predicted"]) / parameters for row in those]
            axis.plot(at, told, linestyle="", marker="_", color="black", markersize=9, label="predicted")
            adamw = [ADAMW_BYTES / (1 if layout in ("DDP", "ZeRO-0") else world) for layout in layouts]
            axis.plot(at, adamw, linestyle="", marker="_", color=figures.THEIRS, markersize=9, mew=2.5, label="AdamW's")
        axis.set_title(f"block_size={block_size}, Fisher in {dtype}")
        axis.grid(axis="x", visible=False)
    axes[-1].set_xticks(range(len(layouts)), layouts)
    figure.supylabel("bytes of state a parameter of the model, fullest rank", fontsize=10)
    only_once = {label: handle for handle, label in zip(*axes[0].get_legend_handles_labels(), strict=True)}
    figure.legend(only_once.values(), only_once.keys(), loc="outside upper left", ncols=5, frameon=False, **NARROW)
    figures.tell(
        figure,
        f"GPT of {parameters / 1e6:.2f} M parameters, width {content['model']['width']}, after one step on CPUs over"
        f" gloo. AdaFisher's defaults (block_size={DEFAULTS['block_size']}, float32) but for what the panels say."
        " With buffers, which are bounded, and so weigh more in a small model."
        f" AdamW's: {ADAMW_BYTES} bytes an element, not measured.",
        f"torch {content['torch']}; {content['date']}.",
    )
    return figure


NARROW = {"columnspacing": 0.8, "handletextpad": 0.4, "handlelength": 1.0}


if __name__ == "__main__":
    common.start(main)
