"""The command line: what it tells of a checkpoint, and what it makes of one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tomllib
import torch
from engines import config, engine_of, masters, train
from models import Tied, batch, model, param_groups
from ranks import run_ranks
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from typer.testing import CliRunner

import adafisher_dist
from adafisher_dist import AdaFisher, CheckpointError
from adafisher_dist.checkpoint import checkpoint_directory
from adafisher_dist.checkpoint.manifest import read
from adafisher_dist.checkpoint.open_checkpoint import OpenCheckpoint
from adafisher_dist.tools import export as exporting
from adafisher_dist.tools.cli import app
from adafisher_dist.tools.export import export_weights
from adafisher_dist.tools.inspection import summarize

SETTINGS = {"block_size": 8, "inverse_update_freq": 3, "max_blocks": 60}
ROOT = Path(__file__).parent.parent
SHARD = "shard-00000-of-00001.safetensors"


class Served(Tied):
    """Tied and frozen parameters, buffers, other dtypes, an empty parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen.data = self.frozen.data.bfloat16()
        self.empty = nn.Parameter(torch.empty(0, 3), requires_grad=False)
        self.register_buffer("seen", torch.tensor(7))
        self.register_buffer("mean", torch.arange(6, dtype=torch.float64).view(2, 3) / 7)
        self.register_buffer("scratch", torch.zeros(2), persistent=False)


def served() -> Served:
    """The same at every call."""
    torch.manual_seed(1)
    return Served()


class Note(nn.Module):
    """Has extra state."""

    def get_extra_state(self) -> Any:
        return {"note": 1}

    def set_extra_state(self, state: Any) -> None:
        pass


def saved(path: Path, module: nn.Module, steps: int = 2, **settings: Any) -> nn.Module:
    """The module, trained for some steps and saved."""
    groups = [{**g, "params": [p for p in g["params"] if p.requires_grad]} for g in param_groups(module)]
    optimizer = AdaFisher(groups, **{**SETTINGS, **settings})
    for step in range(steps):
        x, y = batch(step, 0, 1)
        optimizer.zero_grad()
        nn.functional.mse_loss(module(x), y).backward()
        optimizer.step()
    adafisher_dist.save_checkpoint(path, module, optimizer, extra={"epoch": 3})
    return module


def run(*arguments: object, code: int = 0) -> Any:
    """Run the command line in this process; an exit code other than `code` fails the test."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, (result.exit_code, result.output, result.exception)
    return result


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 4
    path.write_bytes(data)


def assert_loads(module: nn.Module, state: dict[str, torch.Tensor]) -> None:
    """The state loads strictly, and is the module's bit for bit."""
    other = Served()
    other.load_state_dict(state, strict=True)
    for name, tensor in module.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor), name
        assert state[name].dtype == tensor.dtype, name


@pytest.fixture(scope="module")
def module() -> nn.Module:
    """The model that is saved in `checkpoint`."""
    return served()


@pytest.fixture(scope="module")
def checkpoint(module: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that no test changes."""
    path = tmp_path_factory.mktemp("runs") / "step2"
    saved(path, module)
    return path


# ---- inspect ----


def test_inspect_shows_tables(checkpoint: Path) -> None:
    out = run("inspect", checkpoint).stdout
    assert run("inspect", checkpoint.parent).stdout.endswith(out)  # by `latest`
    lines = [line.split() for line in out.splitlines()]
    assert ["step", "2"] in lines
    assert ["by", "adafisher_dist", f"{adafisher_dist.__version__},", "torch", torch.__version__] in lines
    assert ["ranks", "1"] in lines
    assert ["layout", "replicated"] in lines or ["layout", "one", "process"] in lines
    manifest = read(checkpoint)
    blocks = manifest.about["optimizer"]["state"]["inner.weight"]["blocks"]
    assert ["inner.weight", "37", "×", "11", "float32", "float32", str(blocks), "2", "float32"] in lines
    assert ["=", "again.weight"] in lines
    assert ["frozen", "(frozen)", "5", "bfloat16", "bfloat16", "–", "–", "–"] in lines
    kinds = [line[0] for line in lines if len(line) > 4 and line[-1] in ("bytes", "kB")]
    assert kinds == [
        "weight",
        "weight",
        "buffer",
        "buffer",
        "momentum",
        "fisher",
        "square",
        "factor",
        "curvature",
        "random",
    ]
    file = manifest.files[SHARD]
    assert [SHARD, f"{file.nbytes:,}", f"{file.crc32:08x}"] in lines


def test_inspect_lists_a_folder_of_checkpoints(tmp_path: Path) -> None:
    """The oldest first, a damaged one too, and those in DeepSpeed's folders; then the newest."""
    for name in ("old", "deep/adafisher_dist", "damaged", "new"):
        saved(tmp_path / name, model(), steps=1)
    (tmp_path / "damaged" / "manifest.json").write_text("{}")
    (tmp_path / "deep" / "latest").unlink()
    result = run("inspect", tmp_path)
    lines = [line.split() for line in result.stdout.splitlines()]
    rows = [line for line in lines if len(line) > 3 and line[0] in ("old", "deep", "new")]
    assert [row[0] for row in rows] == ["old", "deep", "new"]
    assert all(row[1] == "1" and row[3] == "1" for row in rows)
    assert rows[2][4:] == ["latest:", "the", "one", "below"] and len(rows[0]) == 4
    assert any(line[:4] == ["damaged", "–", "–", "–"] for line in lines)
    assert run("inspect", tmp_path / "new").stdout in result.stdout
    facts = json.loads(run("inspect", tmp_path, "--json").stdout)
    assert [(own["tag"], own["latest"]) for own in facts["checkpoints"] if own["tag"] != "damaged"] == [
        ("old", False), ("deep", False), ("new", True)
    ]  # fmt: skip
    assert json.loads(run("inspect", tmp_path / "old", "--json").stdout)["checkpoints"] == []


def test_the_version() -> None:
    assert run("--version").stdout.startswith(f"adafisher_dist {adafisher_dist.__version__}, torch")


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("option", ["--memory-budget-gb", "--device-tflops", "--network-gbs", "--exponent"])
def test_numbers_that_are_none(option: str, value: str) -> None:
    result = run("estimate", "--params", "1e6", "--zero-stage", "1", f"{option}={value}", code=2)
    assert option in result.output and "finite number" in result.output


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_shard_of_no_size(value: str, checkpoint: Path, tmp_path: Path) -> None:
    words = ("export", checkpoint, "--to", "safetensors", "--out", tmp_path / "out", f"--max-shard-gb={value}")
    assert "finite number" in run(*words, code=2).output and not (tmp_path / "out").exists()


def test_inspect_as_json(checkpoint: Path) -> None:
    facts = json.loads(run("inspect", checkpoint, "--json").stdout)
    module, manifest = Served(), read(checkpoint)
    assert facts["step"] == 2 and facts["world_size"] == 1 and facts["damage"] is None
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["zero_stage"] is None and facts["precision"] is None
    assert facts["values"] == ["extra"]
    assert {p["name"]: p["shape"] for p in facts["parameters"]} == {
        n: list(p.shape) for n, p in module.named_parameters()
    }
    totals = facts["totals"]
    assert totals["elements"] == sum(p.numel() for p in module.parameters())
    assert totals["trainable_elements"] == sum(p.numel() for p in module.parameters() if p.requires_grad)
    assert totals["blocks"] == sum(s["blocks"] for s in manifest.about["optimizer"]["state"].values())
    tied = next(p for p in facts["parameters"] if p["name"] == "inner.weight")
    assert tied["aliases"] == ["again.weight"] and tied["fisher_dtype"] == "float32" and tied["trainable"]
    assert [b["name"] for b in facts["buffers"]] == ["seen", "mean"]
    assert [len(g["names"]) for g in facts["groups"]] == [
        len(g["names"]) for g in manifest.about["optimizer"]["groups"]
    ]
    assert facts["groups"][1]["settings"]["fisher_dtype"] == "float32"
    assert sum(k["nbytes"] for k in facts["kinds"]) == sum(t.nbytes for t in manifest.tensors.values())
    assert [f["nbytes"] for f in facts["files"]] == [(checkpoint / SHARD).stat().st_size]


def test_inspect_shows_a_tensor_lr_as_a_number(tmp_path: Path) -> None:
    saved(tmp_path / "a", model(), steps=0, lr=torch.tensor(0.25))
    facts = json.loads(run("inspect", tmp_path / "a", "--json").stdout)
    assert facts["groups"][0]["settings"]["lr"] == 0.25


def test_inspect_lists_a_part_of_many_parameters(tmp_path: Path) -> None:
    module = nn.ModuleList([nn.Linear(1, 1, bias=False) for _ in range(43)])
    adafisher_dist.save_checkpoint(tmp_path / "a", module, AdaFisher(module.parameters()))
    out = run("inspect", tmp_path / "a").stdout
    assert "39.weight" in out and "40.weight" not in out and "3 more" in out
    assert "42.weight" in run("inspect", tmp_path / "a", "--all").stdout


def test_verify(checkpoint: Path, tmp_path: Path) -> None:
    assert "the right checksum" in run("inspect", checkpoint, "--verify").stdout
    assert json.loads(run("inspect", checkpoint, "--verify", "--json").stdout)["damage"] == []
    saved(tmp_path / "bad", served())
    flip_a_bit(tmp_path / "bad" / SHARD)
    run("inspect", tmp_path / "bad")
    result = run("inspect", tmp_path / "bad", "--verify", code=1)
    assert SHARD in result.stderr and "checksum" in result.stderr and result.stderr.count("\n") == 1
    result = run("inspect", tmp_path / "bad", "--verify", "--json", code=1)
    assert SHARD in json.loads(result.stdout)["damage"][0] and SHARD in result.stderr
    (tmp_path / "bad" / SHARD).unlink()
    assert "cannot be read" in run("inspect", tmp_path / "bad", "--verify", code=1).stderr


def test_a_damaged_manifest(tmp_path: Path) -> None:
    saved(tmp_path / "bad", served(), steps=0)
    flip_a_bit(tmp_path / "bad" / "manifest.json")
    for command in (["inspect"], ["export", "--to", "safetensors"]):
        result = run(*command, tmp_path / "bad", code=1)
        assert "manifest.json is damaged" in result.stderr and result.stderr.count("\n") == 1 and not result.stdout
    assert not (tmp_path / "bad-safetensors").exists()


@pytest.mark.parametrize("path", ["nothing", "", "a_file", "a_file/in", "latest", ".hidden"])
@pytest.mark.parametrize("command", [["inspect"], ["export", "--to", "safetensors"]])
def test_a_path_that_is_no_checkpoint(tmp_path: Path, path: str, command: list[str]) -> None:
    (tmp_path / "a_file").write_text("x")
    result = run(*command, tmp_path / path, code=2)
    assert not result.stdout and result.stderr.count("\n") == 1 and "Traceback" not in result.stderr, result.stderr


def test_a_folder_of_checkpoints_without_latest(tmp_path: Path) -> None:
    saved(tmp_path / "step0", served(), steps=0)
    (tmp_path / "latest").unlink()
    assert "step0" in run("inspect", tmp_path, code=2).stderr


# ---- export ----


def test_export_is_the_model(checkpoint: Path, module: nn.Module, tmp_path: Path) -> None:
    out = tmp_path / "served"
    result = run("export", checkpoint, "--to", "safetensors", "--out", out)
    assert result.stdout.splitlines() == [str(out / "model.safetensors")] and not result.stderr
    assert [path.name for path in out.iterdir()] == ["model.safetensors"]
    state = load_file(out / "model.safetensors")
    assert_loads(module, state)
    assert set(state) == set(module.state_dict())
    with safe_open(out / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    (out / "any").touch()
    assert (out / "model.safetensors").stat().st_mode == (out / "any").stat().st_mode  # others may read it too


def test_export_goes_beside_the_checkpoint(tmp_path: Path) -> None:
    module = saved(tmp_path / "step2", served())
    run("export", tmp_path, "--to", "safetensors", "--no-verify")
    assert_loads(module, load_file(tmp_path / "step2-safetensors" / "model.safetensors"))
    assert checkpoint_directory(tmp_path).find() == tmp_path / "step2"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_export_in_another_dtype(checkpoint: Path, module: nn.Module, tmp_path: Path, dtype: str) -> None:
    run("export", checkpoint, "--to", "safetensors", "--out", tmp_path, "--dtype", dtype)
    state = load_file(tmp_path / "model.safetensors")
    parameters = dict(module.named_parameters(remove_duplicate=False))
    for name, tensor in module.state_dict().items():
        wanted = tensor.to(getattr(torch, dtype)) if name in parameters else tensor
        assert state[name].dtype == wanted.dtype and torch.equal(state[name], wanted), name


def test_export_in_shards(checkpoint: Path, module: nn.Module, tmp_path: Path) -> None:
    limit = 1800  # bytes; inner.weight has 1628
    run("export", checkpoint, "--to", "safetensors", "--out", tmp_path, "--max-shard-gb", limit / 1e9)
    names = sorted(path.name for path in tmp_path.iterdir())
    count = len(names) - 1
    assert count > 2
    parts = [f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]
    assert names == [*parts, "model.safetensors.index.json"]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    state: dict[str, torch.Tensor] = {}
    for part in parts:
        tensors = load_file(tmp_path / part)
        assert sum(t.nbytes for t in tensors.values()) <= limit
        assert set(tensors) == {name for name, file in index["weight_map"].items() if file == part}
        state |= tensors
    assert_loads(module, state)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in state.values())


def test_a_tensor_larger_than_a_shard_has_its_own(checkpoint: Path, tmp_path: Path) -> None:
    files = export_weights(checkpoint, tmp_path, max_shard_bytes=1)
    held = [len(load_file(path)) for path in files[:-1]]
    assert max(held) <= 2 and sum(held) == len(Served().state_dict())  # the empty one goes with another


def test_overwrite(checkpoint: Path, module: nn.Module, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / ".model-00007-of-00009.safetensors.saving").write_text("of an export that was killed")
    command = ["export", checkpoint, "--to", "safetensors", "--out", tmp_path]
    run(*command, "--max-shard-gb", 1e-6)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    result = run(*command, code=2)
    assert "--overwrite" in result.stderr and result.stderr.count("\n") == 1
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    run(*command, "--overwrite")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    assert_loads(module, load_file(tmp_path / "model.safetensors"))
    run(*command, "--overwrite", "--max-shard-gb", 1e-6)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_export_of_a_damaged_checkpoint_writes_nothing(tmp_path: Path) -> None:
    saved(tmp_path / "bad", served())
    shard, out = tmp_path / "bad" / SHARD, tmp_path / "out"
    whole = shard.read_bytes()
    command = ["export", tmp_path / "bad", "--to", "safetensors", "--out", out]
    flip_a_bit(shard)
    result = run(*command, code=1)
    assert SHARD in result.stderr and "checksum" in result.stderr and result.stderr.count("\n") == 1
    shard.write_bytes(whole[:-1])
    assert SHARD in run(*command, "--no-verify", code=1).stderr
    assert not out.exists()
    with pytest.raises(CheckpointError, match=SHARD):
        export_weights(tmp_path / "bad", out)


def test_a_failure_while_writing_leaves_nothing(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, calls = exporting.save_file, []

    def fails_at_the_second(tensors: Any, path: Path, metadata: Any) -> None:
        calls.append(path)
        save(tensors, path if len(calls) < 2 else path / "nowhere", metadata)

    monkeypatch.setattr(exporting, "save_file", fails_at_the_second)
    command = ["export", checkpoint, "--to", "safetensors", "--max-shard-gb", 1e-6, "--out"]
    result = run(*command, tmp_path / "new", code=1)
    assert "could not be written" in result.stderr and len(calls) == 2
    assert not (tmp_path / "new").exists()


def test_what_float16_cannot_hold(tmp_path: Path) -> None:
    module = model()
    with torch.no_grad():
        module.mix.weight[0, :2] = 1e5
        module.out.weight[0, 0] = float("inf")  # as it was trained
    saved(tmp_path / "a", module, steps=0)
    command = ["export", tmp_path / "a", "--to", "safetensors"]
    result = run(*command, "--dtype", "float16", code=1)
    assert "2 values of mix.weight" in result.stderr and "65504" in result.stderr
    assert not (tmp_path / "a-safetensors").exists()
    run(*command, "--dtype", "bfloat16")


def test_extra_state_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    module = model()
    module.note = Note()
    saved(tmp_path / "a", module, steps=0)
    with OpenCheckpoint(tmp_path / "a") as opened:
        assert summarize(opened)["extra_state"] == ["note"]
    run("export", tmp_path / "a", "--to", "safetensors")
    assert "extra state of note" in caplog.text
    missing, unexpected = module.load_state_dict(load_file(tmp_path / "a-safetensors/model.safetensors"), strict=False)
    assert missing == ["note._extra_state"] and not unexpected


def save_with_deepspeed(rank: int, world: int, folder: str) -> dict[str, Any]:
    engine = engine_of(config(3, world, precision="bf16"), kind=Tied)
    train(engine, 0, 2, rank, world)
    engine.save_checkpoint(folder)
    return masters(engine)


@pytest.mark.dist
@pytest.mark.deepspeed
def test_a_checkpoint_of_deepspeed(tmp_path: Path) -> None:
    """The shards of two ranks; the default export is the model's bf16, from the stored fp32."""
    trained, _ = run_ranks(save_with_deepspeed, 2, str(tmp_path / "runs"), deepspeed=True)
    facts = json.loads(run("inspect", tmp_path / "runs", "--verify", "--json").stdout)
    found = [facts[key] for key in ("step", "world_size", "zero_stage", "precision", "damage")]
    assert found == [2, 2, 3, "bf16", []] and len(facts["files"]) == 2
    weight = next(p for p in facts["parameters"] if p["name"] == "inner.weight")
    assert (weight["dtype"], weight["stored_dtype"]) == ("bfloat16", "float32")
    command = ["export", tmp_path / "runs", "--to", "safetensors"]
    run(*command)
    run(*command, "--dtype", "float32", "--out", tmp_path / "full")
    own, full = (
        load_file(p / "model.safetensors") for p in (tmp_path / "runs/global_step2-safetensors", tmp_path / "full")
    )
    Tied().load_state_dict(own, strict=True)
    for name, values in trained.items():
        wanted = torch.from_numpy(values).float()
        assert torch.equal(full[name], wanted) and torch.equal(own[name], wanted.bfloat16()), name
    assert torch.equal(own["again.weight"], own["inner.weight"])


@pytest.mark.parametrize("options", [["--out", "x.safetensors"], ["--max-shard-gb", "0"], ["--dtype", "int8"]])
def test_arguments_that_are_wrong(checkpoint: Path, options: list[str]) -> None:
    run("export", checkpoint, "--to", "safetensors", *options, code=2)
    assert not (checkpoint.parent / "step2-safetensors").exists()


# ---- the process ----


def test_as_a_process(checkpoint: Path) -> None:
    """Without pytest's own imports: JSON on stdout and nothing on stderr."""
    command = [sys.executable, "-m", "adafisher_dist", "inspect", str(checkpoint), "--verify", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["step"] == 2
    assert not done.stderr


@pytest.mark.parametrize("library", ["typer", "rich", "safetensors"])
def test_without_the_extra(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(sys.modules):
        if name.split(".")[0] == library or name in ("adafisher_dist.tools.cli", "adafisher_dist.tools.export"):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, library, None)  # as if it were not installed
    from adafisher_dist.__main__ import main

    with pytest.raises(SystemExit) as exit_:
        main()
    extra = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["cli"]
    assert f"needs {library}: pip install {' '.join(extra)}" in str(exit_.value.code)
