"""What users get wrong in a load: param groups, paths, arguments, objects; each is told at once."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from engines import PARAMS, config, engine_of, train
from models import model
from ranks import run_ranks
from torch import nn

from adafisher_dist import AdaFisher, CheckpointError, ds, load_checkpoint, save_checkpoint
from adafisher_dist.checkpoint.folders import those_in
from adafisher_dist.checkpoint.matching import Match, keep_apart

# ---- param groups ----


def trained(*decays: float) -> tuple[nn.Module, AdaFisher]:
    """A model after a step, with a param group for each weight decay."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 4))
    parts = [module] if len(decays) == 1 else list(module)
    groups = [
        {"params": list(part.named_parameters(name)), "weight_decay": decay}
        for part, decay, name in zip(parts, decays, ("",) if len(decays) == 1 else ("0", "1"), strict=True)
    ]
    optimizer = AdaFisher(groups, lr=1e-2 / len(decays))
    module(torch.randn(3, 6)).square().mean().backward()
    optimizer.step()
    return module, optimizer


def test_groups_that_were_one_keep_what_makes_them_differ(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "a", *trained(0.05))
    module, optimizer = trained(0.1, 0.0)
    before = [p.detach().clone() for p in module.parameters()]
    with pytest.raises(CheckpointError, match=r"param group 0 .* differ here: weight_decay 0\.1, 0\.0"):
        load_checkpoint(tmp_path / "a", module, optimizer)
    assert all(torch.equal(p, old) for p, old in zip(module.parameters(), before, strict=True))
    restored = load_checkpoint(tmp_path / "a", module, optimizer, strict=False)
    assert [line.partition(" of")[0] for line in restored.not_restored] == ["param group 0"]
    assert [(group["weight_decay"], group["lr"]) for group in optimizer.param_groups] == [(0.1, 5e-3), (0.0, 5e-3)]
    (saved, _) = trained(0.05)
    for p, want in zip(module.parameters(), saved.parameters(), strict=True):
        assert torch.equal(p, want)


def test_groups_that_were_one_and_are_alike_take_its_settings(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "a", *trained(0.05))
    module, optimizer = trained(0.1, 0.1)
    assert load_checkpoint(tmp_path / "a", module, optimizer).not_restored == []
    assert [(group["weight_decay"], group["lr"]) for group in optimizer.param_groups] == [(0.05, 1e-2)] * 2


@pytest.mark.parametrize("tensor_rate", [False, True])
def test_a_rate_that_rounding_has_made_negative(tensor_rate: bool, tmp_path: Path) -> None:
    """As torch's LinearLR ends where its factor begins with 1/3."""

    def build() -> tuple[nn.Module, AdaFisher, torch.optim.lr_scheduler.LRScheduler]:
        module = nn.Linear(6, 8)
        optimizer = AdaFisher(module.parameters(), lr=torch.tensor(1e-3) if tensor_rate else 1e-3, weight_decay=0.5)
        return module, optimizer, torch.optim.lr_scheduler.LinearLR(optimizer, end_factor=0.0, total_iters=4)

    module, optimizer, scheduler = build()
    for _ in range(4):
        module(torch.ones(3, 6)).square().mean().backward()
        optimizer.step()
        scheduler.step()
    if tensor_rate:
        optimizer.param_groups[0]["lr"].fill_(-1e-11)  # float32 in place of a scheduler's recursion
    assert -1e-8 < optimizer.param_groups[0]["lr"] < 0, "rounding went the other way: this shows nothing"
    save_checkpoint(tmp_path / "a", module, optimizer, lr_scheduler=scheduler)
    again, other, follower = build()
    load_checkpoint(tmp_path / "a", again, other, lr_scheduler=follower)
    other.load_state_dict(optimizer.state_dict())
    again(torch.ones(3, 6)).square().mean().backward()
    other.step()
    assert all(torch.equal(*pair) for pair in zip(again.parameters(), module.parameters(), strict=True))
    with pytest.raises(ValueError, match="lr should be at least 0"):
        AdaFisher(module.parameters(), lr=-1e-7)


# ---- tensors without values, or of other kinds ----


def on_meta(rank: int, world: int, folder: Path) -> None:
    from torch.distributed.fsdp import fully_shard

    module, optimizer = trained(0.1)
    save_checkpoint(folder / "a", module, optimizer)
    with torch.device("meta"):
        empty = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 4))
    frozen = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 4, device="meta").requires_grad_(False))
    if world > 1:
        fully_shard(empty)
    for there in (empty, frozen):
        other = AdaFisher([p for p in there.named_parameters() if p[1].requires_grad])
        with pytest.raises(CheckpointError, match=r"1\.weight is on the meta device.*to_empty"):
            load_checkpoint(folder / "a", there, other)
        with pytest.raises((CheckpointError, ValueError), match=r"weight is on the meta device.*to_empty"):
            save_checkpoint(folder / "b", there, other)
    save_checkpoint(folder / "b", frozen, other, exclude_frozen_parameters=True)  # as where a base is offloaded
    assert load_checkpoint(folder / "b", frozen, other).not_restored == []


@pytest.mark.parametrize("world", [1, pytest.param(2, marks=pytest.mark.dist)])
def test_a_model_without_values(world: int, tmp_path: Path) -> None:
    run_ranks(on_meta, world, tmp_path)


def test_a_sparse_buffer_is_named(tmp_path: Path) -> None:
    module, optimizer = trained(0.1)
    module.register_buffer("adjacency", torch.eye(3).to_sparse())
    with pytest.raises(
        (CheckpointError, ValueError), match=r"adjacency is no dense tensor \(torch\.sparse_coo\).*persistent=False"
    ):
        save_checkpoint(tmp_path / "a", module, optimizer)
    module.register_buffer("adjacency", torch.eye(3).to_sparse(), persistent=False)
    save_checkpoint(tmp_path / "a", module, optimizer)


def test_groups_that_differ_between_ranks() -> None:
    """As of a pipeline's stages, each of which may have one group alone; all decide alike."""
    stages = [[(0, {"weight_decay": 0.1, "lr": 0.1})], [(0, {"weight_decay": 0.0, "lr": 0.1 + 1e-17}), (1, {})], []]
    for groups in ([0], [0, 1], []):
        found = Match(groups=list(groups))
        keep_apart(found, stages)
        assert found.groups == [None if number == 0 else number for number in groups]
        assert len(found.problems) == 1 and "weight_decay 0.1, 0.0" in found.problems[0]
        assert "lr" not in found.problems[0]


# ---- paths ----


def test_a_folder_that_may_not_be_looked_into(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`lost+found`, say, beside the checkpoints; root may look into all, so that it is feigned."""
    module, optimizer = trained(0.0)
    save_checkpoint(tmp_path / "a", module, optimizer)
    (tmp_path / "lost+found").mkdir()
    is_file = Path.is_file

    def denied(self: Path) -> bool:
        if "lost+found" in self.parts:
            raise PermissionError(13, "Permission denied", str(self))
        return is_file(self)

    monkeypatch.setattr(Path, "is_file", denied)
    with pytest.raises(CheckpointError, match=r"b does not exist\. Checkpoints in .*: a; load one"):
        load_checkpoint(tmp_path / "b", module, optimizer)
    assert "a; load one" in those_in(tmp_path)


def test_paths_that_are_no_checkpoint(tmp_path: Path) -> None:
    module, optimizer = trained(0.0)
    save_checkpoint(tmp_path / "run" / "a", module, optimizer)
    (tmp_path / "run" / "theirs").mkdir()
    shutil.copytree(tmp_path / "run" / "a", tmp_path / "run" / "theirs" / "adafisher_dist")  # as DeepSpeed's saves lie
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("nowhere")
    run = tmp_path / "run"
    told = {
        run / "b": f"{run / 'b'} does not exist. Checkpoints in {run}: a, theirs; load one by its name.",
        run / "a" / "manifest.json": f"is no checkpoint of adafisher_dist. {run / 'a'} is a checkpoint itself.",
        tmp_path: f"is no checkpoint of adafisher_dist. Checkpoints in {tmp_path}: none; there are some in {run}.",
        tmp_path / "no": f"{tmp_path / 'no'} does not exist. Checkpoints in {tmp_path}: none; there are some in {run}.",
        tmp_path / "link": f"{tmp_path / 'link'} is a link that leads nowhere. Checkpoints in {tmp_path}: none",
        tmp_path / "empty" / "a": f"Checkpoints in {tmp_path / 'empty'}: none; if there should be some, give the",
    }  # fmt: skip
    for path, words in told.items():
        with pytest.raises(CheckpointError) as caught:
            load_checkpoint(path, module, optimizer)
        assert words in str(caught.value)
    assert load_checkpoint(run / "theirs", module, optimizer).not_restored == []


# ---- engines ----


def mistakes(rank: int, world: int, folder: str) -> None:
    engine = engine_of(config(1, world))
    train(engine, 0, 1, rank, world)
    engine.save_checkpoint(f"{folder}/theirs", tag="one")
    ds.save_checkpoint(engine, f"{folder}/ours", tag="two")

    def refused(kind: type[Exception], words: str, call: Callable[[], object]) -> None:
        with pytest.raises(kind) as caught:
            call()
        assert words in str(caught.value), caught.value

    for load in (engine.load_checkpoint, lambda *words: ds.load_checkpoint(engine, *words)):
        for place, tag in (("theirs", "one"), ("ours", "two")):
            assert load(f"{folder}/{place}")[0] is not None
            itself = f"is a checkpoint itself: load it from {folder}/{place} with tag='{tag}'"
            refused(CheckpointError, itself, lambda load=load, at=f"{folder}/{place}/{tag}": load(at))
            told = f"Checkpoints in {folder}/{place}: {tag}; load one by its name."
            refused(CheckpointError, told, lambda load=load, at=f"{folder}/{place}": load(at, "three"))
        assert load(f"{folder}/nowhere") == (None, None)  # as DeepSpeed has it; a warning says so
    told = "'foo'. strict, rename and verify are arguments of adafisher_dist.ds.load_checkpoint"
    refused(TypeError, told, lambda: engine.load_checkpoint(f"{folder}/theirs", foo=1))
    refused(TypeError, "is no DeepSpeed engine", lambda: ds.save_checkpoint(engine.module, f"{folder}/ours"))
    wrapper = engine.optimizer
    refused(
        TypeError, "give the engine to adafisher_dist.ds", lambda: load_checkpoint(f"{folder}/ours", model(), wrapper)
    )
    other = config(1, world)
    other["optimizer"]["params"] = {**PARAMS, "block_size": 5}
    other = engine_of(other)
    refused(CheckpointError, "load_module_strict=False", lambda: other.load_checkpoint(f"{folder}/theirs"))
    assert other.load_checkpoint(f"{folder}/theirs", load_module_strict=False)[0] is not None
    refused(CheckpointError, "rename={old name", lambda: ds.load_checkpoint(other, f"{folder}/theirs"))


@pytest.mark.deepspeed
@pytest.mark.dist
def test_mistakes_with_engines(tmp_path: Path) -> None:
    run_ranks(mistakes, 2, str(tmp_path), deepspeed=True)


def other_paths(rank: int, world: int, folder: str) -> None:
    module = model()
    optimizer = AdaFisher(module.parameters(), lr=1e-2)
    with pytest.raises(CheckpointError, match="all ranks have to give the same path"):
        save_checkpoint(f"{folder}/rank{rank}", module, optimizer)


@pytest.mark.dist
def test_ranks_that_save_to_other_paths(tmp_path: Path) -> None:
    run_ranks(other_paths, 2, str(tmp_path))


# ---- dtypes ----


def frozen_and_trained(frozen: torch.Tensor) -> tuple[nn.Module, AdaFisher]:
    """A base that is not trained, and a part that is."""
    module = nn.Linear(8, 8)
    module.weight = nn.Parameter(frozen, requires_grad=False)
    return module, AdaFisher([("bias", module.bias)], lr=1e-2)


@pytest.mark.parametrize(("saved", "into"), [(torch.float32, torch.int8), (torch.int8, torch.bfloat16)])
def test_codes_are_no_numbers(saved: torch.dtype, into: torch.dtype, tmp_path: Path) -> None:
    """A base in 8 bits, loaded over one in 16, or the reverse."""
    save_checkpoint(tmp_path / "a", *frozen_and_trained(torch.full((8, 8), 3).to(saved)))
    module, optimizer = frozen_and_trained(torch.full((8, 8), 5).to(into))
    with pytest.raises(CheckpointError, match=rf"weight is {into} in the model, and was {saved}: it is not converted"):
        load_checkpoint(tmp_path / "a", module, optimizer)
    restored = load_checkpoint(tmp_path / "a", module, optimizer, strict=False)
    assert [line.split()[0] for line in restored.not_restored] == ["weight"]
    assert (module.weight == 5).all()


@pytest.mark.parametrize("kind", ["weight", "buffer"])
def test_numbers_that_float16_has_not(kind: str, tmp_path: Path) -> None:
    def built(dtype: torch.dtype, value: float) -> tuple[nn.Module, AdaFisher]:
        module, optimizer = frozen_and_trained(torch.ones(8, 8, dtype=dtype))
        module.register_buffer("seen", torch.ones(4, dtype=dtype))
        (module.weight if kind == "weight" else module.seen)[1] = value
        return module, optimizer

    save_checkpoint(tmp_path / "a", *built(torch.float32, 1e6))
    with pytest.raises(CheckpointError, match=rf"{kind}/.* has numbers that float16 has not, as 1e\+06"):
        load_checkpoint(tmp_path / "a", *built(torch.float16, 0))
    save_checkpoint(tmp_path / "b", *built(torch.float32, float("inf")))
    module, optimizer = built(torch.float16, 0)
    assert load_checkpoint(tmp_path / "b", module, optimizer).not_restored == []
    assert (module.weight if kind == "weight" else module.seen)[1].isinf().all()


def test_stochastic_rounding_stays_the_optimizers_own(tmp_path: Path) -> None:
    """The weights that it is for may have another dtype here."""

    def built(dtype: torch.dtype) -> tuple[nn.Module, AdaFisher]:
        module = nn.Linear(8, 8).to(dtype)
        optimizer = AdaFisher(module.parameters(), stochastic_rounding=dtype == torch.bfloat16)
        step(module, optimizer)
        return module, optimizer

    def step(module: nn.Module, optimizer: AdaFisher) -> None:
        module(torch.ones(2, 8, dtype=module.weight.dtype)).square().mean().backward()
        optimizer.step()

    for saved, into in ((torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)):
        save_checkpoint(tmp_path / str(saved), *built(saved))
        module, optimizer = built(into)
        assert load_checkpoint(tmp_path / str(saved), module, optimizer).not_restored == []
        assert optimizer.param_groups[0]["stochastic_rounding"] == (into == torch.bfloat16)
        step(module, optimizer)


def test_an_8_bit_float_loads_into_float16(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "a", *frozen_and_trained(torch.full((8, 8), 1.5).to(torch.float8_e4m3fn)))
    module, optimizer = frozen_and_trained(torch.zeros(8, 8, dtype=torch.float16))
    assert load_checkpoint(tmp_path / "a", module, optimizer).not_restored == []
    assert (module.weight == 1.5).all()
