"""A checkpoint saved in one layout goes on in any other as if training had not been interrupted."""

from __future__ import annotations

import os
import shutil
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from engines import config, engine_of, fp16_on_the_cpu, masters, train
from layout_runs import AFTER, BEFORE, LAYOUTS, SETTINGS, Run, contents
from models import batch, distance, model
from ranks import run_ranks
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from adafisher_dist import AdaFisher, CheckpointError, ds, load_checkpoint, save_checkpoint
from adafisher_dist.checkpoint.latest import read_latest
from adafisher_dist.checkpoint.manifest import read
from adafisher_dist.checkpoint.ranges import RANGE_NUMEL

pytestmark = [pytest.mark.deepspeed, pytest.mark.dist]


def save_and_go_on(rank: int, world: int, layout: str, folder: str) -> tuple[Any, Any]:
    """The weights when the checkpoint was saved, and those of the uninterrupted run."""
    with fp16_on_the_cpu():
        run = Run(layout, rank, world)
        run.train(0, BEFORE)
        run.save(folder)
        saved = run.weights()
        run.train(BEFORE, AFTER)
        return saved, run.weights()


def load_and_go_on(rank: int, world: int, layout: str, folder: str) -> tuple[Any, Any]:
    with fp16_on_the_cpu():
        run = Run(layout, rank, world)
        run.load(folder)
        loaded = run.weights()
        run.train(BEFORE, AFTER)
        return loaded, run.weights()


DESK = ("alone", "ddp", "zero1", "zero3", "fsdp2")


@pytest.mark.parametrize(
    "layout", [pytest.param(layout, marks=[pytest.mark.desk] if layout in DESK else []) for layout in LAYOUTS]
)
def test_the_same_layout_goes_on_bit_for_bit(layout: str, tmp_path: Path) -> None:
    world = 1 if layout == "alone" else 4 if layout == "hsdp" else 2
    straight = run_ranks(save_and_go_on, world, layout, str(tmp_path), deepspeed=True)
    resumed = run_ranks(load_and_go_on, world, layout, str(tmp_path), deepspeed=True)
    for one, other in zip(straight, resumed, strict=True):
        for before, after in zip(one, other, strict=True):
            assert before.keys() == after.keys()
            assert all(np.array_equal(before[name], after[name]) for name in before)


# ---- resharding ----


def load_save_and_go_on(rank: int, world: int, layout: str, source: str, target: str) -> Any:
    with fp16_on_the_cpu():
        run = Run(layout, rank, world)
        run.load(source)
        run.save(target)
        run.train(BEFORE, AFTER)
        return run.weights()


_sources: dict[tuple[str, int], tuple[str, Any]] = {}


@pytest.fixture
def source_of(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A checkpoint of a layout and world size, saved once, and the uninterrupted run's weights."""

    def source(layout: str, world: int) -> tuple[str, Any]:
        if (layout, world) not in _sources:
            folder = str(tmp_path_factory.mktemp(f"{layout}-{world}"))
            _, straight = run_ranks(save_and_go_on, world, layout, folder, deepspeed=True)[0]
            _sources[layout, world] = folder, straight
        return _sources[layout, world]

    return source


SOURCES = [
    ("alone", 1), ("ddp", 2), ("fsdp2", 3), ("hsdp", 4), ("zero0-bf16", 2), ("zero1", 3), ("bf16-optimizer", 2),
    ("zero2", 4), ("zero2-fp16", 2), ("zero3", 2), ("zero3-bf16", 4), ("zero3-packed", 2),
]  # fmt: skip
WORLDS = {"alone": [[1], [1]], "hsdp": [[4], [4]]}
EVERY = [
    (source, (layout, world))
    for number, source in enumerate(SOURCES)
    for layout in LAYOUTS
    for world in WORLDS.get(layout, [[1, 3], [2, 4]])[number % 2]
]
# Each layout as source and as target, world sizes up and down.
FEW = [
    (("alone", 1), ("zero3", 2)), (("ddp", 2), ("zero2-fp16", 3)), (("fsdp2", 3), ("ddp", 2)),
    (("hsdp", 4), ("alone", 1)), (("zero0-bf16", 2), ("zero3-bf16", 3)), (("zero1", 3), ("fsdp2", 2)),
    (("bf16-optimizer", 2), ("zero1-bf16", 4)), (("zero2", 4), ("zero3-subgroups", 3)), (("zero2", 4), ("hsdp", 4)),
    (("zero2-fp16", 2), ("bf16-optimizer", 3)), (("zero3", 2), ("zero2-round-robin", 3)),
    (("zero3", 2), ("zero0-fp16", 2)), (("zero3-bf16", 4), ("zero2-offload", 1)),
    (("ddp", 2), ("zero3-packed", 3)), (("zero3-packed", 2), ("ddp", 3)), (("fsdp2", 3), ("ddp-packed", 2)),
]  # fmt: skip


def named(pair: Any) -> str:
    return "-".join(map(str, pair))


def reshard(source: tuple[str, int], target: tuple[str, int], source_of: Any, folder: Path) -> None:
    saved, straight = source_of(*source)
    resumed = run_ranks(load_save_and_go_on, target[1], target[0], saved, str(folder), deepspeed=True)
    before, after = contents(f"{saved}/here"), contents(folder / "here")
    assert before.keys() == after.keys()
    for key, value in before.items():
        same = after[key].to(value.dtype) if key == "weight/frozen" else after[key]  # it has the model's precision
        assert torch.equal(value, same), key
    old, new = read(Path(saved) / "here").about, read(folder / "here").about
    for group in (*old["optimizer"]["groups"], *new["optimizer"]["groups"]):
        group["settings"].pop("packed")  # the optimizer's own
    assert old["optimizer"] == new["optimizer"]
    low = any(LAYOUTS[layout][1] != "fp32" for layout in (source[0], target[0]))
    apart = max(distance(result, straight) for result in resumed)
    assert apart < (0.05 if low else 1e-4)


@pytest.mark.parametrize(("source", "target"), FEW, ids=named)
def test_reshard(source: tuple[str, int], target: tuple[str, int], source_of: Any, tmp_path: Path) -> None:
    reshard(source, target, source_of, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("source", "target"), EVERY, ids=named)
def test_reshard_everywhere(source: tuple[str, int], target: tuple[str, int], source_of: Any, tmp_path: Path) -> None:
    reshard(source, target, source_of, tmp_path)


# ---- engines ----


def everything_of_an_engine(rank: int, world: int, folder: str) -> None:
    """Scheduler, loss scale, counters, client state, and DeepSpeed's flags."""
    schedule = {"type": "WarmupDecayLR", "params": {"total_num_steps": 20, "warmup_num_steps": 4}}
    with fp16_on_the_cpu():
        ds_config = config(2, world, precision="fp16", scheduler=schedule)
        ds_config["fp16"] |= {"initial_scale_power": 30, "hysteresis": 1, "loss_scale_window": 3}
        engine = engine_of(ds_config)
        train(engine, 0, 12, rank, world)
        assert engine.skipped_steps > 3  # the scale was too large at first, and has learnt
        saving = ds.save_checkpoint(engine, folder, client_state={"epoch": (1, rank)}, asynchronous=True)
        scale, lr, steps = engine.optimizer.loss_scale, engine.get_lr(), engine.global_steps
        saved, counted = masters(engine), (engine.skipped_steps, engine.global_samples)
        train(engine, 12, 16, rank, world)
        straight, final_scale = masters(engine), engine.optimizer.loss_scale
        assert saving.wait().name == "global_step12"
        again = engine_of(ds_config)
        path, client_state = ds.load_checkpoint(again, folder)
        assert Path(path).name == "global_step12" and client_state == {"epoch": (1, 0)}
        assert (again.optimizer.loss_scale, again.get_lr(), again.global_steps) == (scale, lr, steps)
        assert (again.skipped_steps, again.global_samples) == counted
        train(again, 12, 16, rank, world)
        assert again.optimizer.loss_scale == final_scale
        assert all(np.array_equal(value, straight[name]) for name, value in masters(again).items())
        other = engine_of(config(1, world, precision="bf16"))  # another precision keeps its own scale
        with pytest.raises(CheckpointError, match="state of a WarmupDecayLR, and there is no"):
            ds.load_checkpoint(other, folder)
        ds.load_checkpoint(other, folder, load_lr_scheduler_states=False)
        assert other.optimizer.loss_scale == 1.0
        only = engine_of(config(3, world))
        ds.load_checkpoint(only, folder, load_module_only=True)
        assert only.global_steps == 0 and not only.basic_optimizer.fisher_stats()
        assert all(np.array_equal(value, saved[name]) for name, value in masters(only).items())
        assert ds.load_checkpoint(only, f"{folder}/nothing") == (None, None)
        with pytest.raises(ValueError, match="different tags"):
            ds.save_checkpoint(only, folder, f"tag{rank}")
        # Another optimizer goes DeepSpeed's own way, and ours says so.
        del ds_config["optimizer"], ds_config["scheduler"]
        ds_config["zero_allow_untested_optimizer"] = True
        module = model()
        sgd = engine_of(
            ds_config, module, optimizer=torch.optim.SGD([p for p in module.parameters() if p.requires_grad], 0.1)
        )
        with pytest.raises(TypeError, match="is SGD, not AdaFisher"):
            ds.save_checkpoint(sgd, folder)
        sgd.save_checkpoint(f"{folder}/sgd")
        assert sgd.load_checkpoint(f"{folder}/sgd")[0] is not None
        assert not list(Path(f"{folder}/sgd").rglob("adafisher_dist"))


def test_everything_of_an_engine(tmp_path: Path) -> None:
    run_ranks(everything_of_an_engine, 2, str(tmp_path), deepspeed=True)


def own_checkpoints_of_deepspeed(rank: int, world: int, folder: str) -> None:
    """Around the functions that Hugging Face's Trainer and Accelerate call."""
    engine = engine_of(config(2, world))
    train(engine, 0, 3, rank, world)
    engine.save_checkpoint(folder, client_state={"arguments": Namespace(epoch=1)})
    assert {"global_step3", "latest"} <= {path.name for path in Path(folder).iterdir()}
    again = engine_of(config(2, world))
    assert again.load_checkpoint(folder)[1]["arguments"].epoch == 1
    other = engine_of(config(3, world))
    assert other.load_checkpoint(folder)[1]["arguments"].epoch == 1
    assert distance(masters(other), masters(again)) == 0
    bare = engine_of(config(2, world))
    bare.load_checkpoint(folder, load_optimizer_states=False)
    assert not bare.basic_optimizer.fisher_stats() and distance(masters(bare), masters(again)) < 1e-6
    # Positional arguments, a tag that is a path, and what ds.save_checkpoint wrote.
    engine.save_checkpoint(folder, "epoch1/step3", {"epoch": 1}, True)
    assert read_latest(Path(folder)) == "epoch1/step3"
    assert engine_of(config(1, world)).load_checkpoint(folder)[1] == {"epoch": 1}
    ds.save_checkpoint(engine, f"{folder}/ours", "here", {"epoch": 2})
    assert engine_of(config(2, world)).load_checkpoint(f"{folder}/ours")[1] == {"epoch": 2}
    # Damage is found before anything changes.
    if rank == 0:
        shutil.copytree(Path(folder) / "global_step3", Path(folder) / "older")
        shard = next((Path(folder) / "older" / "adafisher_dist").glob("*.safetensors"))
        shard.write_bytes(shard.read_bytes()[:-1] + b"\1")
    torch.distributed.barrier()
    before = masters(bare)
    with pytest.raises(CheckpointError, match="is damaged"):
        bare.load_checkpoint(folder, "older")
    assert distance(masters(bare), before) == 0
    # Without the folder there is no state, and it says so.
    if rank == 0:
        shutil.rmtree(Path(folder) / "older" / "adafisher_dist")
    torch.distributed.barrier()
    with pytest.raises(CheckpointError, match="holds no state of AdaFisher"):
        engine_of(config(2, world)).load_checkpoint(folder, "older")


def test_own_checkpoints_of_deepspeed(tmp_path: Path) -> None:
    run_ranks(own_checkpoints_of_deepspeed, 2, str(tmp_path), deepspeed=True)


class Branches(nn.Module):
    """Of which one parameter has a gradient in some steps only."""

    def __init__(self) -> None:
        super().__init__()
        self.always = nn.Linear(11, 5)
        self.sometimes = nn.Linear(11, 4)
        self.on = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found = self.always(x).mean(1, keepdim=True)
        return found + (self.sometimes(x).mean(1, keepdim=True) if self.on else 0.0)


def uneven_steps(rank: int, world: int, folder: str) -> None:
    """Parameters at different step counts, in one flat partition after the load."""
    torch.manual_seed(0)  # gradients are of rank 1 here, so that rounding is amplified more from some weights
    module = Branches()
    optimizer = AdaFisher(module.parameters(), **SETTINGS)
    for step in range(5):
        module.on = step > 2
        x, y = batch(step, 0, 1)
        optimizer.zero_grad()
        nn.functional.mse_loss(module(x), y).backward()
        optimizer.step()
    save_checkpoint(f"{folder}/a", module, optimizer)
    other = Branches()
    other.on = True
    engine = engine_of(config(1, world, SETTINGS), other)
    ds.load_checkpoint(engine, folder, "a")
    for step in range(5, 8):
        x, y = batch(step, 0, 1)
        optimizer.zero_grad()
        nn.functional.mse_loss(module(x), y).backward()
        optimizer.step()
        x, y = batch(step, rank, world)
        engine.backward(nn.functional.mse_loss(engine(x), y))
        engine.step()
    plain = {name: p.detach().double().numpy() for name, p in module.named_parameters()}
    assert distance(masters(engine), plain) < 1e-5
    updates = {name: stats.fisher_updates for name, stats in engine.basic_optimizer.fisher_stats().items()}
    assert updates["always.weight"] == 8 and updates["sometimes.weight"] == 5


def test_parameters_at_different_steps(tmp_path: Path) -> None:
    run_ranks(uneven_steps, 2, str(tmp_path), deepspeed=True)


# ---- memory ----


def resident(what: str) -> int:
    """Bytes of this process, now ("VmRSS") or at most since `forget_peak` ("VmHWM")."""
    return int(Path("/proc/self/status").read_text().split(f"{what}:")[1].split()[0]) * 1024


def grows_by(work: Any) -> int:
    """Bytes that this process grows by at most during some work."""
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    work()
    return resident("VmHWM") - before


def memory(rank: int, world: int, folder: str) -> tuple[int, int, int, int]:
    """Blocks of two sizes, so that ranges have to be packed."""
    module = nn.Sequential(*[nn.Linear(1000, 1000, bias=False) for _ in range(3)])
    optimizer = AdaFisher(module.parameters(), lr=1e-3, block_size=47, rows_per_block=1)
    for parameter in module.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    save_checkpoint(f"{folder}/warm-up", module, optimizer)
    own = sum(value.nbytes for entry in optimizer.state.values() for value in entry.values())
    saving = grows_by(lambda: save_checkpoint(f"{folder}/a", module, optimizer))
    behind = grows_by(lambda: save_checkpoint(f"{folder}/b", module, optimizer, asynchronous=True).wait())
    optimizer.reset_state()
    loading = grows_by(lambda: load_checkpoint(f"{folder}/a", module, optimizer))
    return own, saving, behind, loading


@pytest.mark.slow
@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the kernel tells no peak memory")
def test_memory_at_save_and_load(tmp_path: Path) -> None:
    """A save needs two buckets, one packed while the other is written; a load its state and one."""
    ((own, saving, behind, loading),) = run_ranks(memory, 1, str(tmp_path))
    bucket = 4 * RANGE_NUMEL + 2**24  # and what the allocator and the interpreter take
    assert own > 5 * bucket
    assert saving < 2.5 * bucket
    assert behind < own + 2 * bucket
    assert loading < own + 2 * bucket


# ---- what ranks do not share ----


class Normalised(nn.Module):
    """Batch statistics differ by rank under DDP, as does a large buffer that each rank fills."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(11)
        self.last = nn.Linear(11, 1)
        self.register_buffer("large", torch.zeros(40_000))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.norm(x))


def buffers_of_rank_0(rank: int, world: int, folder: str) -> None:
    module = Normalised()
    wrapped = DistributedDataParallel(module)
    optimizer = AdaFisher(module.parameters(), **SETTINGS)
    for step in range(3):
        x, y = batch(step, rank, world)
        optimizer.zero_grad()
        nn.functional.mse_loss(wrapped(x), y).backward()
        optimizer.step()
    module.large += rank + 1
    module.norm.running_var += rank
    own = {name: value.clone() for name, value in module.named_buffers()}
    save_checkpoint(f"{folder}/a", torch.compile(wrapped), optimizer)  # under its plain names
    load_checkpoint(f"{folder}/a", wrapped, optimizer)
    for name, value in module.named_buffers():
        first = own[name].clone()
        torch.distributed.broadcast(first, 0)
        assert torch.equal(value, first), name
    assert "buffer/norm.running_var" in read(Path(f"{folder}/a")).tensors


def test_buffers_are_those_of_rank_0(tmp_path: Path) -> None:
    run_ranks(buffers_of_rank_0, 2, str(tmp_path))


def ranks_that_disagree(rank: int, world: int, folder: str) -> None:
    """What only one rank asks for, or only one rank's values break, is an error on both."""
    run = Run("ddp", rank, world)
    run.train(0, 1)
    run.save(folder)
    with pytest.raises(CheckpointError, match="load with different arguments"):
        run.load(folder, rename={"inner.": "inner."} if rank else None)
    with pytest.raises((TypeError, CheckpointError), match=r"extra is a builtins\.object"):
        run.save(folder, extra=object() if rank else None)
    engine = engine_of(config(1, world))
    with pytest.raises((TypeError, CheckpointError), match="sequence"):
        ds.save_checkpoint(engine, folder, "b", client_state=[1] if rank else None)
    run.save(folder, "c")
    run.train(1, 2)


def test_ranks_that_disagree(tmp_path: Path) -> None:
    run_ranks(ranks_that_disagree, 2, str(tmp_path), deepspeed=True, timeout=60)


def background_failure(rank: int, world: int, folder: str) -> None:
    run = Run("ddp", rank, world)
    run.train(0, 1)
    usage = shutil.disk_usage
    shutil.disk_usage = lambda path: SimpleNamespace(free=0)
    saving = run.save(folder, "a", asynchronous=True)
    if rank == 0:
        with pytest.raises(CheckpointError, match="0 free"):
            saving.wait()
    with pytest.raises(CheckpointError, match="0 free"):
        run.save(folder, "b")
    shutil.disk_usage = usage
    run.save(folder, "c")
    assert read_latest(Path(folder)) == "c"


def test_a_background_failure_that_one_rank_knows_of(tmp_path: Path) -> None:
    run_ranks(background_failure, 2, str(tmp_path), timeout=60)


def fsdp2_corners(rank: int, world: int, folder: str) -> None:
    """A mesh in another order, and a root that is whole after an evaluation."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import fully_shard

    module = model()
    fully_shard(module, mesh=DeviceMesh("cpu", [1, 0]))
    optimizer = AdaFisher(module.parameters(), **SETTINGS)
    x, y = batch(0, rank, world)
    nn.functional.mse_loss(module(x), y).backward()
    optimizer.step()
    with torch.no_grad():
        module(x)
    save_checkpoint(f"{folder}/a", module, optimizer, extra=torch.arange(3) if rank == 0 else None)
    with torch.no_grad():
        module(x)
    assert load_checkpoint(f"{folder}/a", module, optimizer).extra.tolist() == [0, 1, 2]


def test_fsdp2_corners(tmp_path: Path) -> None:
    run_ranks(fsdp2_corners, 2, str(tmp_path))
