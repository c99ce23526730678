"""Checkpoints under tensor parallelism: saved at one degree and layout, loaded at any other."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from models import same, same_state
from ranks import run_ranks
from safetensors.torch import load_file
from tensor_parallel_runs import SETTINGS, Block, alone, alone_in_parts, loss_of, parallel
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from typer.testing import CliRunner

from adafisher_dist import AdaFisher, CheckpointError, ds, load_checkpoint, save_checkpoint
from adafisher_dist.blocks.parts import saved_parts
from adafisher_dist.checkpoint import applying, orders, saving, writer
from adafisher_dist.checkpoint.manifest import CHECKPOINT_FORMAT, WITH_PARTS
from adafisher_dist.checkpoint.open_checkpoint import OpenCheckpoint
from adafisher_dist.tools.cli import app

pytestmark = pytest.mark.dist

BEFORE, AFTER = 4, 8  # steps


def slow(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


# Ranks, and for tensor parallelism replicas, data-parallel ranks and parts.
LAYOUTS: dict[str, tuple[int, tuple[int, int, int] | None]] = {
    "alone": (1, None),
    "ddp": (2, None),
    "zero3": (2, None),
    "fsdp2": (4, None),
    "2x2": (4, (1, 2, 2)),  # data-parallel ranks by parts
    "1x2": (2, (1, 1, 2)),
    "1x4": (4, (1, 1, 4)),
    "2x1": (2, (1, 2, 1)),
    "hsdp": (4, (2, 1, 2)),
}


class Run:
    """A training in one of the layouts, on the same batches in each."""

    def __init__(
        self, layout: str, rank: int, hidden: int = 32, dtype: torch.dtype = torch.float32, **settings: Any
    ) -> None:
        from torch.distributed.device_mesh import init_device_mesh

        self.world, sizes = LAYOUTS[layout]
        self.data, self.own, self.engine = self.world, rank, None
        settings = {**SETTINGS, **settings}
        if sizes is not None:
            mesh = init_device_mesh("cpu", sizes, mesh_dim_names=("replicas", "dp", "tp"))
            mesh = mesh if sizes[0] > 1 else mesh["dp", "tp"]
            self.module = self.plain = parallel(mesh, hidden, dtype)
            self.data, self.own = self.world // sizes[2], rank // sizes[2]
        else:
            self.module = self.plain = Block(hidden=hidden).to(dtype)
        if layout == "zero3":
            from engines import config, engine_of

            self.engine = self.module = engine_of(config(3, self.world, settings), self.plain)
            return
        if layout == "fsdp2":
            from torch.distributed.fsdp import fully_shard

            fully_shard(self.module, mesh=init_device_mesh("cpu", (self.world,)))
        self.optimizer = AdaFisher(self.module.parameters(), **settings)
        if layout == "ddp":
            self.module = DistributedDataParallel(self.module)

    def train(self, first: int, last: int) -> None:
        part = slice(self.own * 8 // self.data, (self.own + 1) * 8 // self.data)
        for step in range(first, last):
            loss = loss_of(self.module, step, part)
            if self.engine is not None:
                self.engine.backward(loss)
                self.engine.step()
            else:
                self.optimizer.zero_grad()
                loss.backward()
                self.optimizer.step()

    def save(self, path: str, **more: Any) -> Any:
        return save_checkpoint(path, self.module, self.optimizer, **more)

    def load(self, path: str, **more: Any) -> Any:
        if self.engine is not None:
            return ds.load_checkpoint(self.engine, str(Path(path).parent), Path(path).name, **more)
        return load_checkpoint(path, self.module, self.optimizer, **more)

    def weights(self) -> dict[str, np.ndarray]:
        if self.engine is not None:
            from engines import masters

            return masters(self.engine)
        full = {n: p.full_tensor() if hasattr(p, "full_tensor") else p for n, p in self.plain.named_parameters()}
        return {name: values.detach().double().numpy() for name, values in full.items()}


def saves(rank: int, world: int, layout: str, path: str, more: dict[str, Any]) -> dict[str, np.ndarray]:
    run = Run(layout, rank, **more)
    run.train(0, BEFORE)
    run.save(path)
    return run.weights()


def goes_on(rank: int, world: int, layout: str, path: str, again: str, more: dict[str, Any]) -> dict[str, np.ndarray]:
    """Load, save again at once, and train on."""
    run = Run(layout, rank, **more)
    run.load(path)
    if run.engine is None:
        run.save(again)
    run.train(BEFORE, AFTER)
    return run.weights()


def on_ranks(fn: Any, layout: str, *arguments: Any) -> list[Any]:
    return run_ranks(fn, LAYOUTS[layout][0], layout, *arguments, deepspeed=layout == "zero3")


class Saved(dict[tuple[Any, ...], Path]):
    """Checkpoints by layout and what differs from the usual; saved when first asked for."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def __missing__(self, key: tuple[Any, ...]) -> Path:
        layout, *more = key
        self[key] = path = self.root / f"{len(self)}" / "here"
        on_ranks(saves, layout, str(path), dict(more))
        return path


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Saved]:
    yield Saved(tmp_path_factory.mktemp("saved"))


def contents(path: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint but random states, in the whole parameter's order."""
    found = {}
    with OpenCheckpoint(path) as opened:
        about = opened.manifest.about
        for key in opened.manifest.tensors:
            kind, _, name = key.partition("/")
            if kind in ("random", "value"):
                continue
            values = opened.read_tensor(key)
            parts = saved_parts(about["model"]["parameters"].get(name, {}))
            if parts is not None:
                settings = about["optimizer"]["state"][name]["structure"]
                order = orders.of_field("momentum" if kind == "weight" else kind, parts.whole, parts, settings)
                assert order is not None
                whole = torch.full_like(values, torch.nan)
                for place, at, numel in orders.runs(orders.PLAIN, order, 0, len(values), len(values)).tolist():
                    whole[place : place + numel] = values[at : at + numel]
                values = whole
            found[key] = values
    return found


def assert_same_contents(one: Path, other: Path) -> None:
    found, wanted = contents(one), contents(other)
    assert found.keys() == wanted.keys()
    for key, values in wanted.items():
        assert values.dtype == found[key].dtype and torch.equal(values, found[key]), key


@pytest.mark.parametrize("to", ["2x2", "1x2", "fsdp2", "alone", "1x4", "2x1", "hsdp", slow("ddp"), "zero3"])
def test_goes_on_at_any_degree_and_layout(to: str, saved: Saved, tmp_path: Path) -> None:
    """Half of the training before a checkpoint, half after it; its state is carried bit for bit."""
    path, again = saved["2x2",], tmp_path / "again"
    same(on_ranks(goes_on, to, str(path), str(again), {}), alone(32, SETTINGS))
    if to != "zero3":
        assert_same_contents(again, path)


@pytest.mark.parametrize(("layout", "to"), [("alone", "2x2"), ("fsdp2", "1x2"), ("hsdp", "2x2"), slow("1x4", "hsdp")])
def test_goes_on_from_other_layouts(layout: str, to: str, saved: Saved, tmp_path: Path) -> None:
    path, again = saved[layout,], tmp_path / "again"
    same(on_ranks(goes_on, to, str(path), str(again), {}), alone(32, SETTINGS))
    assert_same_contents(again, path)


@pytest.mark.parametrize(
    "more",
    [
        {"exponent": 1.0, "inverse_update_freq": 2},
        slow({"packed": True, "fisher_dtype": torch.bfloat16}),
        {"block_grid": "flat"},
        slow({"max_blocks": 0}),
        {"dtype": torch.bfloat16},
    ],
    ids=lambda more: next(iter(more)),
)
def test_other_settings_and_dtypes(more: dict[str, Any], saved: Saved, tmp_path: Path) -> None:
    """By way of one process, and back."""
    path = saved[("2x2", *more.items())]
    layouts = ["2x2"] if "block_grid" in more else ["1x4", "alone", "2x2"]  # flat blocks go over the edges
    for layout in layouts:
        again = tmp_path / layout
        on_ranks(goes_on, layout, str(path), str(again), more)
        assert_same_contents(again, path)
        path = again


def exactly(rank: int, world: int, path: str) -> bool:
    """Whether training from a checkpoint is bit for bit what it is without."""
    straight, resumed = Run("2x2", rank), Run("2x2", rank)
    straight.train(0, AFTER)
    resumed.load(path)
    resumed.train(BEFORE, AFTER)
    one, other = straight.weights(), resumed.weights()
    return all(np.array_equal(one[name], other[name]) for name in one)


def test_the_same_ranks_go_on_bit_for_bit(saved: Saved) -> None:
    assert all(run_ranks(exactly, 4, str(saved["2x2",])))


def reads_apart(rank: int, world: int, path: str) -> bool:
    """Whether a load is the same where runs are read one by one, with nothing between them."""
    runs = []
    for gap in (orders._GAP, 0):
        orders._GAP = gap
        runs.append(Run("2x1", rank))
        runs[-1].load(path)
    one, other = (run.optimizer.state_dict() for run in runs)
    return same_state(one, other) and all(np.array_equal(w, runs[1].weights()[n]) for n, w in runs[0].weights().items())


def test_runs_that_are_far_apart_are_read_apart(saved: Saved) -> None:
    assert all(run_ranks(reads_apart, 2, str(saved["1x4",])))


# ---- edges that are not on the grid ----


@pytest.mark.parametrize("to", ["1x2", "2x2"])
def test_off_the_grid_the_same_degree_goes_on(to: str, saved: Saved, tmp_path: Path) -> None:
    path = saved["2x2", ("hidden", 20)]
    same(on_ranks(goes_on, to, str(path), str(tmp_path / "again"), {"hidden": 20}), alone_in_parts(20, 2))


def off_the_grid(rank: int, world: int, layout: str, path: str) -> tuple[str, list[str], dict[str, np.ndarray]]:
    run = Run(layout, rank, hidden=20)
    before = run.weights()
    with pytest.raises(CheckpointError) as told:
        run.load(path)
    assert all(np.array_equal(values, before[name]) for name, values in run.weights().items())
    restored = run.load(path, strict=False)
    loaded = run.weights()
    run.train(BEFORE, BEFORE + 1)
    return str(told.value), restored.not_restored, loaded


@pytest.mark.parametrize("to", ["alone", "1x4"])
def test_off_the_grid_another_degree_is_refused_and_the_weights_load(to: str, saved: Saved, tmp_path: Path) -> None:
    path = saved["2x2", ("hidden", 20)]
    weights = exported(path, tmp_path)
    for told, left, loaded in on_ranks(off_the_grid, to, str(path)):
        for name, shape in (("up.weight", "(10, 16)"), ("down.weight", "(16, 10)")):
            assert (
                f"the Fisher blocks of {name}" in told and f"where it was saved it is cut into parts of {shape}" in told
            )
        assert "strict=False" in told and "embedding" not in told
        assert len(left) == 2
        assert loaded.keys() == weights.keys()
        for name, values in weights.items():
            assert np.array_equal(loaded[name], values.double().numpy()), name


# ---- what is in it ----


def exported(path: Path, tmp_path: Path) -> dict[str, Tensor]:
    result = CliRunner().invoke(app, ["export", str(path), "--to", "safetensors", "--out", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    return load_file(tmp_path / "out" / "model.safetensors")


def test_export_and_inspect(saved: Saved, tmp_path: Path) -> None:
    path = saved["2x2",]
    weights = exported(path, tmp_path)
    Block().load_state_dict(weights)
    for name, values in contents(path).items():
        if name.startswith("weight/"):
            assert torch.equal(weights[name.removeprefix("weight/")].view(-1), values)
    result = CliRunner().invoke(app, ["inspect", str(path), "--verify"])
    assert result.exit_code == 0 and "tensor parallelism" in result.output


def test_what_is_whole_on_all_parts_is_saved_once_and_little_is_listed(saved: Saved) -> None:
    """Each rank writes one chunk of a tensor, whatever parts that is cut into."""
    with OpenCheckpoint(saved["2x2",]) as opened:
        manifest = opened.manifest
        facts = manifest.about["model"]["parameters"]
        cut = {name: (fact["parts"]["dim"], fact["parts"]["count"]) for name, fact in facts.items() if "parts" in fact}
        assert manifest.format == WITH_PARTS
        assert cut == {
            "embedding.weight": (0, 2), "up.weight": (0, 2), "up.bias": (0, 2), "down.weight": (1, 2),
            "head.weight": (0, 2),
        }  # fmt: skip
        for key, tensor in manifest.tensors.items():
            if not key.startswith(("random/", "value/")):
                assert len(tensor.chunks) <= (4 if key.partition("/")[2] in cut else 2), key
    with OpenCheckpoint(saved["fsdp2",]) as opened:
        assert opened.manifest.format == CHECKPOINT_FORMAT


def with_buffers(rank: int, world: int, layout: str, path: str) -> tuple[float, float]:
    """A buffer that `parallelize_module` has made a DTensor, a plain one, and a frozen weight."""
    from torch.distributed.tensor import DTensor, Replicate

    found = []
    for save in (True, False):
        run = Run(layout, rank)
        run.plain.head.weight.requires_grad_(requires_grad=False)
        run.optimizer = AdaFisher([p for p in run.plain.parameters() if p.requires_grad], **SETTINGS)
        value = torch.full((3,), 2.0 if save else 0.0)
        run.plain.register_buffer("plain", value.clone())
        mesh = run.plain.up.weight.device_mesh["tp"]
        run.plain.register_buffer("cut", DTensor.from_local(value.clone(), mesh, [Replicate()], run_check=False))
        run.train(0, 1)
        if save:
            run.save(path, exclude_frozen_parameters=True, asynchronous=True).wait()
        else:
            run.load(path)
        found = [float(run.plain.plain.sum()), float(run.plain.cut.to_local().sum())]
    return found[0], found[1]


def test_buffers_and_frozen_weights(tmp_path: Path) -> None:
    assert run_ranks(with_buffers, 4, "2x2", str(tmp_path / "here")) == [(6.0, 6.0)] * 4


# ---- failures ----


def apart(rank: int, world: int, path: str) -> str:
    """One part of a weight is stepped less often than the other."""
    run = Run("2x2", rank)
    run.train(0, 2)
    run.optimizer.zero_grad()
    loss_of(run.module, 2).backward()
    if rank % 2:
        run.plain.up.weight.grad = None
    run.optimizer.step()
    with pytest.raises(CheckpointError) as told:
        run.save(path)
    return str(told.value)


def test_parts_that_were_not_stepped_alike_are_not_saved(tmp_path: Path) -> None:
    told = run_ranks(apart, 4, str(tmp_path / "here"))
    assert len(set(told)) == 1 and "up.weight" in told[0] and "[(3, 3), (2, 2), (3, 3), (2, 2)]" in told[0]
    assert not (tmp_path / "here").exists()


class Fault(OSError):
    """What a rank fails by."""


def fault(*_: Any, **__: Any) -> Any:
    raise Fault("the test's fault")


def fails_in_a_save(rank: int, world: int, path: str, where: str) -> str:
    run = Run("2x2", rank)
    run.train(0, 1)
    run.save(path)
    run.train(1, 2)
    if rank == 3:
        owner, name = {"collecting": (saving, "_ranges"), "writing": (writer, "_stream")}[where]
        setattr(owner, name, fault)
    with pytest.raises((CheckpointError, Fault)) as told:
        run.save(path)
    return str(told.value)


@pytest.mark.parametrize("where", ["collecting", "writing"])
def test_a_rank_that_fails_in_a_save_leaves_the_last_whole(where: str, saved: Saved, tmp_path: Path) -> None:
    told = run_ranks(fails_in_a_save, 4, str(tmp_path / "here"), where)
    assert all("the test's fault" in message for message in told)
    with OpenCheckpoint(tmp_path / "here") as opened:
        assert opened.manifest.about["step"] == 1
    assert os.listdir(tmp_path) in (["here", "latest"], ["latest", "here"])
    again = on_ranks(goes_on, "1x2", str(tmp_path / "here"), str(tmp_path / "again"), {})
    assert len(again) == 2


def fails_in_a_load(rank: int, world: int, path: str, where: str) -> tuple[str, bool, str]:
    run = Run("1x4", rank)
    run.train(0, 1)
    before = run.weights()
    if rank == 1:
        if where == "checking":
            OpenCheckpoint.problems = fault  # type: ignore[method-assign]
        else:
            applying.read_ranges = fault
    with pytest.raises((CheckpointError, Fault)) as told:
        run.load(path)
    unchanged = all(np.array_equal(values, before[name]) for name, values in run.weights().items())
    after = ""
    try:
        run.train(1, 2)
    except RuntimeError as error:
        after = str(error)
    dist.barrier()
    return str(told.value), unchanged, after


@pytest.mark.parametrize("where", ["checking", "reading"])
def test_a_rank_that_fails_in_a_load_stops_all(where: str, saved: Saved) -> None:
    """Before anything changes; or while reading, after which no step is taken."""
    for told, unchanged, after in run_ranks(fails_in_a_load, 4, str(saved["2x2",]), where):
        assert "the test's fault" in told
        if where == "checking":
            assert unchanged and not after
        else:
            assert "incomplete" in after
