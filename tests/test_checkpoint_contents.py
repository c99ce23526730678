"""What a checkpoint holds, and what of it a slightly different optimizer or model restores."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint_runs import as_version_0_1_wrote_it, change_manifest
from models import Tied, distance, model, param_groups, weights
from oracle import rough_inverse_root
from safetensors.torch import load_file
from small_trainings import SETTINGS, same, state, steps, trained
from torch import Tensor, nn
from typer.testing import CliRunner

from adafisher_dist import AdaFisher, CheckpointError, load_checkpoint, save_checkpoint
from adafisher_dist.checkpoint import CheckpointDirectory, target_of
from adafisher_dist.checkpoint.loading import load
from adafisher_dist.checkpoint.manifest import read
from adafisher_dist.checkpoint.open_checkpoint import OpenCheckpoint
from adafisher_dist.checkpoint.options import Options
from adafisher_dist.numerics.packing import pack
from adafisher_dist.tools.cli import app
from adafisher_dist.tools.export import export_weights

# ---- settings that differ ----


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_another_fisher_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    module, optimizer = trained()
    save_checkpoint(tmp_path / "a", module, optimizer)
    other, converted = trained(count=0, fisher_dtype=dtype)
    load_checkpoint(tmp_path / "a", other, converted)
    before, after = state(optimizer), state(converted)
    for key, value in before.items():
        wanted = value.to(dtype) if "/fisher_" in key and "updates" not in key else value
        assert torch.equal(after[key].double(), wanted.double()), key
    dense, diagonal = converted.state[other.mix.weight]["fisher_8x5"], converted.state[other.scale]["fisher_diagonal"]
    assert dense.dtype == diagonal.dtype == dtype
    steps(module, optimizer, 4, 8)
    steps(other, converted, 4, 8)
    assert distance(weights(other), weights(module)) < (2e-2 if dtype == torch.bfloat16 else 1e-4)
    save_checkpoint(tmp_path / "b", other, converted)  # and back
    load_checkpoint(tmp_path / "b", module, optimizer)
    assert distance(weights(other), weights(module)) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("keeps", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_packed_or_not(packed: bool, keeps: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    """A checkpoint holds lower triangles; packed or not, training resumes from it bit for bit."""
    settings = {"inverse_update_freq": 3 if keeps else 1, "rows_per_block": 2, "max_blocks": 12, "fisher_dtype": dtype}
    module, optimizer = trained(packed=packed, **settings)
    save_checkpoint(tmp_path / "a", module, optimizer)
    # Rows of 37: 8, 8, 8, 8, 5; two row groups of two rows.
    stored = read(tmp_path / "a").tensors["fisher/mix.weight"].numel
    assert stored == 2 * (4 * 36 + 15) + 37
    other, resumed = trained(count=0, packed=not packed, **settings)
    load_checkpoint(tmp_path / "a", other, resumed)
    assert resumed.param_groups[0]["packed"] is not packed
    before, after = state(optimizer), state(resumed)
    assert before.keys() == after.keys()
    for key, value in before.items():
        if "/fisher" in key and value.dim() + after[key].dim() == 5:  # one is packed
            value, after[key] = (x if x.dim() == 2 else pack(x) for x in (value, after[key]))
        assert torch.equal(value, after[key]), key
    save_checkpoint(tmp_path / "b", other, resumed)
    with OpenCheckpoint(tmp_path / "a") as first, OpenCheckpoint(tmp_path / "b") as second:
        for key in first.manifest.tensors:
            if not key.startswith("random/"):
                assert torch.equal(first.read_tensor(key), second.read_tensor(key)), key
    steps(module, optimizer, 4, 8)
    steps(other, resumed, 4, 8)
    assert distance(weights(other), weights(module)) == 0


def exact_inverse_root(a: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(a)
    return (vectors / np.sqrt(values)) @ vectors.T


# A^(−p) by exponent and grafting: A^(−1/2) is exact where the length of the update depends on it.
ROOTS = {
    (1.0, "rms"): np.linalg.inv,
    (0.5, "rms"): partial(rough_inverse_root, damping=0.3),
    (0.5, "none"): exact_inverse_root,
}


@pytest.mark.parametrize(("exponent", "grafting"), ROOTS)
def test_factors_that_were_not_saved_are_made_from_the_fisher(exponent: float, grafting: str, tmp_path: Path) -> None:
    module, optimizer = trained(damping=0.3, fisher_decay=0.9, grafting=grafting)
    save_checkpoint(tmp_path / "a", module, optimizer)
    other, keeping = trained(count=0, inverse_update_freq=3, exponent=exponent, grafting=grafting)
    load_checkpoint(tmp_path / "a", other, keeping)
    entry = keeping.state[other.mix.weight]  # 5 rows of 37
    fisher, unbias = entry["fisher_8x5"].double(), 1 / (1 - 0.9**4)
    d = fisher.diagonal(dim1=1, dim2=2).mean(dim=1) * unbias
    assert torch.allclose(entry["curvature_8x5"].double(), d, rtol=1e-5)
    eye = (0.3 + 1e-8) * torch.eye(8)  # of the saved damping, not of the optimizer's own
    for f_hat, own_d, root in zip(fisher * unbias, d, entry["factor_8x5"], strict=True):
        right = ROOTS[exponent, grafting]((f_hat / own_d + eye).numpy())
        assert np.allclose(root.double().numpy(), right, atol=1e-4 * np.abs(right).max())
    steps(other, keeping, 4, 8)
    save_checkpoint(tmp_path / "b", other, keeping)
    load_checkpoint(tmp_path / "b", module, optimizer)  # factors that are not needed are left out
    assert same({k: v for k, v in state(keeping).items() if "factor" not in k and "curv" not in k}, state(optimizer))


def test_settings_come_from_the_checkpoint_and_structure_stays(tmp_path: Path) -> None:
    module = model()
    optimizer = AdaFisher(param_groups(module), **SETTINGS)
    optimizer.param_groups[0] |= {"lr": 0.5, "initial_lr": 0.7, "note": ("mine", 1)}
    save_checkpoint(tmp_path / "a", module, optimizer)
    other = AdaFisher(param_groups(module), lr=torch.tensor(1.0), block_size=8, inverse_update_freq=7, damping=9.0)
    lr = other.param_groups[0]["lr"]
    load_checkpoint(tmp_path / "a", module, other)
    group = other.param_groups[0]
    assert group["lr"] is lr and lr.item() == 0.5 and group["initial_lr"] == 0.7 and group["note"] == ("mine", 1)
    assert (group["damping"], group["inverse_update_freq"], group["block_size"]) == (0.2, 7, 8)
    assert other.param_groups[1]["momentum"] == 0.8 and other.param_groups[1]["block_size"] == 4


@pytest.mark.parametrize(("saved", "own"), [("rms", "none"), ("none", "rms")])
def test_another_grafting_is_refused_by_name(saved: str, own: str, tmp_path: Path) -> None:
    """The Fisher then averages other vectors: rows over their root mean square, or plain rows."""
    module, optimizer = trained(grafting=saved)
    save_checkpoint(tmp_path / "a", module, optimizer)
    other, another = trained(count=2, grafting=own)
    before, of_state = weights(other), state(another)
    told = rf"the Fisher of inner\.weight was kept for grafting='{saved}', here '{own}'"
    with pytest.raises(CheckpointError, match=told) as caught:
        load_checkpoint(tmp_path / "a", other, another)
    assert "Nothing was changed" in str(caught.value)
    assert distance(weights(other), before) == 0 and same(state(another), of_state)
    steps(other, another, 2, 3)  # and training may go on
    result = load_checkpoint(tmp_path / "a", other, another, strict=False)
    assert all("grafting" in text for text in result.not_restored) and not state(another)
    assert distance(weights(other), weights(module)) == 0 and another.param_groups[0]["grafting"] == own


def test_a_checkpoint_of_version_0_1_gives_its_weights_alone(tmp_path: Path) -> None:
    """Its state has other blocks and is refused with the reason; its weights load by an export."""
    module, optimizer = trained()
    save_checkpoint(tmp_path / "a", module, optimizer)
    change_manifest(tmp_path / "a", as_version_0_1_wrote_it)
    other, own = trained(count=2)
    before, of_state = weights(other), state(own)
    told = r"optimizer state is of adafisher_dist 0\.1\.0 \(format 3; this version's is 4\)"
    for strict in (True, False):
        with pytest.raises(CheckpointError, match=told) as caught:
            load_checkpoint(tmp_path / "a", other, own, strict=strict)
        assert "adafisher_dist export" in str(caught.value) and "Nothing was changed" in str(caught.value)
    assert distance(weights(other), before) == 0 and same(state(own), of_state)
    steps(other, own, 2, 3)  # and training may go on
    assert CliRunner().invoke(app, ["inspect", str(tmp_path / "a"), "--verify"]).exit_code == 0
    (file,) = export_weights(tmp_path / "a", tmp_path / "out")
    other.load_state_dict(load_file(file))
    assert distance(weights(other), weights(module)) == 0


def test_other_blocks_are_refused_or_left_out(tmp_path: Path) -> None:
    module, optimizer = trained()
    save_checkpoint(tmp_path / "a", module, optimizer)
    other, blocks = trained(count=2, block_size=4)
    before, of_state = weights(other), state(blocks)
    with pytest.raises(CheckpointError, match=r"inner\.weight were made with block_size=8, here 4") as caught:
        load_checkpoint(tmp_path / "a", other, blocks)
    assert "Nothing was changed" in str(caught.value)
    assert distance(weights(other), before) == 0 and same(state(blocks), of_state)
    steps(other, blocks, 2, 3)  # and training may go on
    result = load_checkpoint(tmp_path / "a", other, blocks, strict=False)
    assert len(result.not_restored) == 2 and all("block_size=8, here 4" in text for text in result.not_restored)
    assert distance(weights(other), weights(module)) == 0
    kept = state(blocks)  # of what has the same blocks all the same
    assert len({key.rsplit("/", 1)[0] for key in kept}) == 6  # the vectors, and the convolution
    assert same(kept, {key: value for key, value in state(optimizer).items() if key in kept})
    steps(other, blocks, 4, 5)
    assert sorted(stats.fisher_updates for stats in blocks.fisher_stats().values()) == [1] * 2 + [5] * 6


def test_settings_that_make_the_same_blocks_are_none_others(tmp_path: Path) -> None:
    """No row of the model is longer than 64 elements, and no parameter has more than 200 blocks."""
    module, optimizer = trained(block_size=64)
    save_checkpoint(tmp_path / "a", module, optimizer)
    other, larger = trained(count=2, block_size=128, max_blocks=200)
    load_checkpoint(tmp_path / "a", other, larger)
    assert same(state(larger), state(optimizer)) and larger.param_groups[0]["block_size"] == 128
    for each, own in ((module, optimizer), (other, larger)):
        steps(each, own, 4, 6)
    assert distance(weights(other), weights(module)) == 0


# ---- models that differ ----


class Larger(nn.Module):
    """The model inside another, with one layer more."""

    def __init__(self, core: nn.Module) -> None:
        super().__init__()
        self.core = core
        self.more = nn.Linear(1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.more(self.core(x))


def test_a_larger_model_and_renamed_parameters(tmp_path: Path) -> None:
    module, optimizer = trained()
    save_checkpoint(tmp_path / "a", module, optimizer)
    larger = Larger(model())
    fresh = AdaFisher(larger.parameters(), **SETTINGS)
    with pytest.raises(CheckpointError, match=r"core\.inner\.weight is not in the checkpoint"):
        load_checkpoint(tmp_path / "a", larger, fresh)
    names = {f"{part}.": f"core.{part}." for part in ("inner", "mix", "conv", "out")}
    rename = {**names, "scale": "core.scale", "frozen": "core.frozen"}
    with pytest.raises(CheckpointError, match=r"more\.weight is not in the checkpoint") as caught:
        load_checkpoint(tmp_path / "a", larger, fresh, rename=rename)
    assert "core.inner" not in str(caught.value)
    result = load_checkpoint(tmp_path / "a", larger, fresh, rename=rename, strict=False)
    assert sorted(result.not_restored) == [f"more.{name} is not in the checkpoint" for name in ("bias", "weight")]
    assert distance(weights(larger.core), weights(module)) == 0
    restored = {key.removeprefix("0."): value for key, value in state(fresh).items()}
    assert torch.equal(restored["0/fisher_diagonal"], state(optimizer)["0.0/fisher_diagonal"])
    assert len(restored) == len(state(optimizer))
    steps(larger, fresh, 4, 5)
    save_checkpoint(tmp_path / "b", larger, fresh)
    with pytest.raises(CheckpointError, match=r"core\.inner\.weight is not in the model"):
        load_checkpoint(tmp_path / "b", module, optimizer)
    back = {new: old for old, new in rename.items()}
    load_checkpoint(tmp_path / "b", module, optimizer, rename=back, strict=False)
    assert distance(weights(larger.core), weights(module)) == 0


def test_a_parameter_that_became_a_buffer(tmp_path: Path) -> None:
    module, optimizer = trained(count=1)
    save_checkpoint(tmp_path / "a", module, optimizer)
    other = model()
    frozen = other.frozen.detach().clone()
    del other.frozen
    other.register_buffer("frozen", frozen)
    _, fresh = trained(other, count=1)
    with pytest.raises(CheckpointError, match="frozen is a buffer in the model, and was a parameter"):
        load_checkpoint(tmp_path / "a", other, fresh)
    result = load_checkpoint(tmp_path / "a", other, fresh, strict=False)
    assert result.not_restored == ["frozen is a buffer in the model, and was a parameter"]
    save_checkpoint(tmp_path / "b", other, fresh)
    with pytest.raises(CheckpointError, match="frozen is a parameter in the model, and was a buffer"):
        load_checkpoint(tmp_path / "b", module, optimizer)


def test_a_wrong_rename(tmp_path: Path) -> None:
    module, optimizer = trained(count=1)
    save_checkpoint(tmp_path / "a", module, optimizer)
    with pytest.raises(CheckpointError, match=r"the checkpoint has no \['outer\.'\]"):
        load_checkpoint(tmp_path / "a", module, optimizer, rename={"outer.": "inner."})
    with pytest.raises(CheckpointError, match="would become"):
        load_checkpoint(tmp_path / "a", module, optimizer, rename={"inner.bias": "conv.bias"})


def test_another_shape(tmp_path: Path) -> None:
    module, optimizer = trained(count=1)
    save_checkpoint(tmp_path / "a", module, optimizer)
    module.mix = nn.Linear(37, 6, bias=False)
    with pytest.raises(CheckpointError, match=r"mix\.weight has shape \(6, 37\), and \(5, 37\) in the checkpoint"):
        load_checkpoint(tmp_path / "a", module, AdaFisher(module.parameters(), **SETTINGS))


def test_rearranged_groups(tmp_path: Path) -> None:
    module = model()
    optimizer = AdaFisher(param_groups(module), **{**SETTINGS, "block_size": 4})
    steps(module, optimizer, 0, 2)
    save_checkpoint(tmp_path / "a", module, optimizer)
    one = AdaFisher(module.parameters(), **{**SETTINGS, "lr": 0.125, "block_size": 4})
    with pytest.raises(CheckpointError, match=r"param group 0 has parameters of the groups \[0, 1\]"):
        load_checkpoint(tmp_path / "a", module, one)
    result = load_checkpoint(tmp_path / "a", module, one, strict=False)
    assert len(result.not_restored) == 1 and one.param_groups[0]["lr"] == 0.125
    split = [{"params": [p]} for p in module.parameters()]  # every new group has one source
    load_checkpoint(tmp_path / "a", module, AdaFisher(split, **{**SETTINGS, "block_size": 4}))


def test_frozen_or_freed_since(tmp_path: Path) -> None:
    module, optimizer = trained(count=2)
    save_checkpoint(tmp_path / "a", module, optimizer)
    part = AdaFisher(module.inner.parameters(), **SETTINGS)
    with pytest.raises(CheckpointError, match=r"the state of mix\.weight is in the checkpoint"):
        load_checkpoint(tmp_path / "a", module, part)
    load_checkpoint(tmp_path / "a", module, part, strict=False)
    save_checkpoint(tmp_path / "b", module, part)
    with pytest.raises(CheckpointError, match=r"the optimizer had no mix\.weight"):
        load_checkpoint(tmp_path / "b", module, optimizer)


def test_tied_parameters_and_their_names(tmp_path: Path) -> None:
    module, optimizer = trained(model(kind=Tied))
    save_checkpoint(tmp_path / "a", module, optimizer)
    manifest = read(tmp_path / "a")
    assert manifest.about["model"]["aliases"] == {"again.weight": "inner.weight"}
    assert "weight/again.weight" not in manifest.tensors
    untied = Tied()
    untied.again.weight = nn.Parameter(torch.zeros(37, 11))
    other = AdaFisher(untied.parameters(), **SETTINGS)
    load_checkpoint(tmp_path / "a", untied, other)
    assert torch.equal(untied.again.weight, module.inner.weight) and torch.equal(
        untied.inner.weight, untied.again.weight
    )
    again = model(kind=Tied)
    load_checkpoint(tmp_path / "a", again, fresh := AdaFisher(again.parameters(), **SETTINGS))
    steps(module, optimizer, 4, 6)
    steps(again, fresh, 4, 6)
    assert distance(weights(again), weights(module)) == 0


class Kinds(nn.Module):
    """Tensors of every kind that a model may have."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(11)
        self.conv = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
        self.scalar = nn.Parameter(torch.tensor(0.5))
        self.nothing = nn.Parameter(torch.empty(0, 4))
        self.register_buffer("mask", torch.tensor([True, False]))
        self.register_buffer("phase", torch.tensor([1 + 2j]))
        self.register_buffer("temporary", torch.zeros(3), persistent=False)
        self.shared = self.norm
        self.calls = 0

    def get_extra_state(self) -> Any:
        return {"calls": self.calls}

    def set_extra_state(self, saved: Any) -> None:
        self.calls = saved["calls"]

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        image = self.norm(x).repeat(1, 7)[:, :75].view(-1, 3, 5, 5)
        return (self.conv(image).flatten(1).sum(1, keepdim=True) * self.scalar + self.nothing.sum()).tanh()


def test_buffers_strides_and_extra_state(tmp_path: Path) -> None:
    module, optimizer = trained(Kinds())
    module.temporary.fill_(1)
    save_checkpoint(tmp_path / "a", module, optimizer)
    other, fresh = trained(Kinds(), count=0)
    assert read(tmp_path / "a").about["model"]["aliases"]["shared.running_mean"] == "norm.running_mean"
    other.mask[:] = False
    load_checkpoint(tmp_path / "a", other, fresh)
    assert other.calls == 4 and other.norm.num_batches_tracked == 4 and other.mask.tolist() == [True, False]
    assert torch.equal(other.phase, module.phase) and torch.equal(other.norm.running_var, module.norm.running_var)
    assert not other.temporary.any()
    steps(module, optimizer, 4, 6)
    steps(other, fresh, 4, 6)
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_parameters_of_another_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    module, optimizer = trained(model(dtype))
    save_checkpoint(tmp_path / "a", module, optimizer)
    other, fresh = trained(model(dtype), count=0)
    load_checkpoint(tmp_path / "a", other, fresh)
    steps(module, optimizer, 4, 6)
    steps(other, fresh, 4, 6)
    assert distance(weights(other), weights(module)) == 0
    single, _ = trained(count=0)
    load_checkpoint(tmp_path / "a", single, AdaFisher(single.parameters(), **SETTINGS))
    assert distance(weights(single), {k: v.astype(np.float32) for k, v in read_weights(tmp_path / "a").items()}) == 0


def read_weights(folder: Path) -> dict[str, np.ndarray]:
    with OpenCheckpoint(folder) as opened:
        shapes = {name: entry["shape"] for name, entry in opened.manifest.about["model"]["parameters"].items()}
        found = {name: opened.read_tensor(f"weight/{name}").double() for name in shapes}
    return {name: value.numpy().reshape(shapes[name]) for name, value in found.items()}


def test_compiled_and_checkpointed_modules_keep_their_names(tmp_path: Path) -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    module, optimizer = trained()
    save_checkpoint(tmp_path / "a", module, optimizer)
    wrapped = model()
    wrapped.inner = checkpoint_wrapper(wrapped.inner)
    compiled = torch.compile(wrapped)
    load_checkpoint(tmp_path / "a", compiled, AdaFisher(compiled.parameters(), **SETTINGS))
    assert torch.equal(compiled.conv.weight, module.conv.weight)


def test_before_the_first_step(tmp_path: Path) -> None:
    module, optimizer = trained(count=0)
    save_checkpoint(tmp_path / "a", module, optimizer)
    other, used = trained(count=3)
    load_checkpoint(tmp_path / "a", other, used)
    assert distance(weights(other), weights(module)) == 0 and not used.state
    steps(module, optimizer, 0, 2)
    steps(other, used, 0, 2)
    assert distance(weights(other), weights(module)) == 0


def test_skipped_steps_and_a_failed_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module, optimizer = trained(count=2)
    module.conv.bias.grad = torch.full((3,), math.nan)
    optimizer.step()
    save_checkpoint(tmp_path / "a", module, optimizer)

    def fail(*_: Any, **__: Any) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr("adafisher_dist.numerics.block_step.factorize", fail)
        with pytest.raises(MemoryError):
            steps(module, optimizer, 2, 3)
    with pytest.raises(RuntimeError, match="incomplete"):
        save_checkpoint(tmp_path / "b", module, optimizer)
    assert not (tmp_path / "b").exists()
    load_checkpoint(tmp_path / "a", module, optimizer)
    assert optimizer.skipped_steps == 1
    steps(module, optimizer, 2, 3)


@pytest.mark.parametrize("first", ["weights", "everything"])
def test_a_load_completes_what_a_failed_one_left(first: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module, optimizer = trained(count=2)
    save_checkpoint(tmp_path / "a", module, optimizer)
    place = CheckpointDirectory(tmp_path, "a")

    def restore(states: bool) -> None:  # without states as load_module_only of DeepSpeed's engines does
        load(lambda: place, target_of(module, optimizer, None), Options(states=states, random=states))

    def fail(*_: Any) -> None:
        raise OSError("the disk is gone")

    with monkeypatch.context() as patch:
        patch.setattr("adafisher_dist.checkpoint.reader._Reads._read", fail)
        with pytest.raises(CheckpointError, match="incomplete"):
            restore(states=first == "everything")
    with pytest.raises(RuntimeError, match="incomplete"):
        steps(module, optimizer, 2, 3)
    restore(states=False)
    if first == "everything":  # the state is not there yet
        with pytest.raises(RuntimeError, match="incomplete"):
            steps(module, optimizer, 2, 3)
        restore(states=True)
    steps(module, optimizer, 2, 3)


def test_nothing_is_left_out_in_silence(tmp_path: Path) -> None:
    """Untied weights for a tied model, extra state under another name, a missing param group."""
    untied = model(kind=Tied)
    untied.again.weight = nn.Parameter(torch.ones(37, 11))
    save_checkpoint(tmp_path / "a", untied, AdaFisher(untied.parameters(), **SETTINGS))
    tied = model(kind=Tied)
    with pytest.raises(CheckpointError, match=r"again\.weight is tied to inner\.weight in the model"):
        load_checkpoint(tmp_path / "a", tied, AdaFisher(tied.parameters(), **SETTINGS))

    one = nn.ModuleDict({"one": Kinds()})
    one["one"].calls = 7
    save_checkpoint(tmp_path / "b", one, AdaFisher(one.parameters(), **SETTINGS))
    two = nn.ModuleDict({"two": Kinds()})
    load_checkpoint(tmp_path / "b", two, AdaFisher(two.parameters(), **SETTINGS), rename={"one.": "two."})
    assert two["two"].calls == 7
    plain = nn.ModuleDict({"one": nn.Linear(1, 1)})
    result = load_checkpoint(tmp_path / "b", plain, AdaFisher(plain.parameters(), **SETTINGS), strict=False)
    assert "one._extra_state is not in the model" in result.not_restored

    module = model()
    save_checkpoint(tmp_path / "c", module, AdaFisher(param_groups(module), **SETTINGS))
    with pytest.raises(CheckpointError, match="no parameter of param group 1 of the checkpoint"):
        load_checkpoint(tmp_path / "c", module, AdaFisher(param_groups(module)[0]["params"], **SETTINGS))
