"""launch/train.py as users start it: under torchrun, its files, resumed, and with bad input."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

LAUNCH = Path(__file__).parent.parent / "launch"
sys.path.append(str(LAUNCH))  # behind tests/, which has a `ranks` of its own

import corpus  # noqa: E402
from model import ByteTransformer  # noqa: E402
from settings import Settings, deepspeed_config  # noqa: E402

pytestmark = [pytest.mark.dist, pytest.mark.deepspeed]

TINY = "--steps 8 --width 16 --layers 1 --heads 2 --seq-len 16 --corpus-mb 0.2 --held-out 32 --global-batch 16"


def train(world: int, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run launch/train.py on some ranks, with --device cpu."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
    command = [*launcher, str(LAUNCH / "train.py"), "--device", "cpu", *TINY.split(), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("DS_ACCELERATOR", None)
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment, timeout=180)


def rows(folder: Path) -> list[dict[str, float | None]]:
    with (folder / "log.csv").open(newline="") as file:
        return [{k: float(v) if v else None for k, v in row.items()} for row in csv.DictReader(file)]


def losses(folder: Path) -> list[tuple[float, float | None, float | None]]:
    return [(row["step"], row["loss"], row["val_loss"]) for row in rows(folder)]


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run on two ranks at stage 2 that saved halfway."""
    where = tmp_path_factory.mktemp("train")
    done = train(2, "--config", str(LAUNCH.parent / "configs/zero2.json"), "--save-every", "5", "--out", "a", cwd=where)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "layout ZeRO-2, 2 rank(s)" in done.stdout and "Python's standard library" in done.stdout
    assert "step 8/8" in done.stdout and "tok/s" in done.stdout and "optimizer" in done.stdout
    return where / "a"


def test_a_run_leaves_log_curve_summary_and_checkpoint(two_ranks: Path) -> None:
    log = rows(two_ranks)
    assert log[0]["step"] == 0 and log[-1]["step"] == 8
    assert log[-1]["val_loss"] < log[0]["val_loss"]
    assert all(0 < row["optimizer_share"] < 1 and row["tokens_per_s"] > 0 for row in log[1:])
    assert (two_ranks / "loss.png").read_bytes().startswith(b"\x89PNG")
    summary = json.loads((two_ranks / "summary.json").read_text())
    assert summary["world_size"] == 2 and summary["zero_stage"] == 2 and summary["skipped_steps"] == 0
    assert summary["val_loss"] == pytest.approx(log[-1]["val_loss"], rel=1e-5)
    assert len(summary["optimizer_bytes_by_rank"]) == 2
    assert {"latest", "step5", "step8", "run.json"} <= {path.name for path in (two_ranks / "checkpoint").iterdir()}


def test_one_rank_at_stage_0_gives_the_same_losses(two_ranks: Path) -> None:
    done = train(1, "--config", str(LAUNCH.parent / "configs/zero0.json"), "--out", "b", cwd=two_ranks.parent)
    assert done.returncode == 0, done.stderr[-3000:]
    folders = two_ranks.parent / "b", two_ranks
    one, two = ({row["step"]: row["val_loss"] for row in rows(folder)} for folder in folders)
    assert one == pytest.approx(two, rel=1e-4) and len(one) > 5


def test_a_resumed_run_gives_the_same_losses(two_ranks: Path) -> None:
    (two_ranks / "checkpoint" / "latest").write_text("step5")
    config = str(LAUNCH.parent / "configs/zero2.json")
    done = train(2, "--config", config, "--resume", str(two_ranks), "--out", "c", cwd=two_ranks.parent)
    assert done.returncode == 0, done.stderr[-3000:]
    resumed = losses(two_ranks.parent / "c")
    assert [row[0] for row in resumed] == [6, 7, 8]
    assert resumed == losses(two_ranks)[-3:], "not bit for bit"
    done = train(2, "--config", config, "--resume", str(two_ranks), "--seed", "7", "--out", "x", cwd=two_ranks.parent)
    assert done.returncode != 0 and "seed: 0 there, 7 here" in done.stderr


def test_a_run_resumed_on_other_ranks_and_at_another_stage_goes_on(two_ranks: Path) -> None:
    (two_ranks / "checkpoint" / "latest").write_text("step5")
    config = str(LAUNCH.parent / "configs/zero3.json")
    done = train(1, "--config", config, "--resume", str(two_ranks), "--out", "e", cwd=two_ranks.parent)
    assert done.returncode == 0, done.stderr[-3000:]
    for row, straight in zip(losses(two_ranks.parent / "e"), losses(two_ranks)[-3:], strict=True):
        assert row == pytest.approx(straight, rel=1e-4)


def test_a_run_resumed_in_its_own_folder_goes_on_with_its_log(two_ranks: Path) -> None:
    before = losses(two_ranks)
    (two_ranks / "checkpoint" / "latest").write_text("step5")
    config = str(LAUNCH.parent / "configs/zero2.json")
    done = train(2, "--config", config, "--resume", "a", "--out", "a", cwd=two_ranks.parent)
    assert done.returncode == 0, done.stderr[-3000:]
    assert losses(two_ranks) == before


@pytest.mark.parametrize(("name", "kind"), [("adamw", "AdamW"), ("muon", "Muon")])
def test_others_beside_it(name: str, kind: str, two_ranks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")  # DeepSpeed compiles Muon for each shape
    seldom = ["--validate-every", "100", "--log-every", "100", "--save-every", "3"]  # and saves in between
    done = train(2, "--optimizer", name, "--out", name, *seldom, cwd=two_ranks.parent)
    assert done.returncode == 0, done.stderr[-3000:]
    saved = {path.name for path in (two_ranks.parent / name / "checkpoint").glob("step*")}
    assert saved == {"step3", "step6", "step8"}
    summary = json.loads((two_ranks.parent / name / "summary.json").read_text())
    assert summary["optimizer"]["type"] == kind and (summary["optimizer_share"] is None) == (name == "muon")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--set", "dampening=0.1"], "Did you mean 'damping'?"),
        (["--data", "nowhere"], "--data nowhere is neither a file nor a folder"),
        (["--global-batch", "15"], "15 sequences cannot be shared out equally to 2 ranks"),
    ],
    ids=["misspelt", "no-data", "odd-batch"],
)
def test_bad_input_ends_all_ranks_with_one_message(arguments: list[str], words: str, tmp_path: Path) -> None:
    done = train(2, *arguments, cwd=tmp_path)
    assert done.returncode != 0
    assert done.stderr.count(words) == 1, done.stderr[-3000:]
    assert not (tmp_path / "runs").exists()


# ---- the corpus and the config, in this process ----


def test_the_corpus_is_the_same_every_time_and_holds_a_tenth_out() -> None:
    one, two = (corpus.load(None, 0.3, 32) for _ in range(2))
    assert one.digest == two.digest and len(one.train) + len(one.held_out) == 300_000
    assert len(one.held_out) == 30_000
    a, b = (corpus.train_batch(one, 3, 0, 4, 32) for _ in range(2))
    assert a.shape == (4, 33) and a.equal(b) and not a.equal(corpus.train_batch(one, 4, 0, 4, 32))
    assert corpus.held_out_batch(one, 10, 32).shape == (10, 33)


def test_own_text(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.txt").write_text("hello " * 100)
    (tmp_path / "sub" / "b.txt").write_text("world " * 100)
    (tmp_path / ".hidden").write_text("no")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\0\0")
    assert len(corpus.load(tmp_path / "a.txt", 1, 8).train) == 540
    folder = corpus.load(tmp_path, 1, 8)
    assert "2 files" in folder.source and len(folder.train) + len(folder.held_out) == 1200
    with pytest.raises(ValueError, match="has NUL bytes"):
        corpus.load(tmp_path / "picture.png", 1, 8)
    with pytest.raises(ValueError, match=r"has 600 bytes; sequences of 100 need at least 1011"):
        corpus.load(tmp_path / "a.txt", 1, 100)


def arguments(**changed: Any) -> Settings:
    default: dict[str, Any] = dict(
        optimizer="adafisher", config=LAUNCH.parent / "configs/zero1.json", lr=None, overrides=[], steps=1,
        batch_size=None, global_batch=None, seq_len=8, width=8, layers=1, heads=2, data=None, corpus_mb=1.0, seed=0,
        warmup=0.1, validate_every=None, log_every=1, save_every=None, held_out=1, out=None, overwrite=False,
        resume=None, restartable=False, device="cpu",
    )  # fmt: skip
    return Settings(**{**default, **changed})


def test_what_the_command_line_makes_of_the_config() -> None:
    config = deepspeed_config(arguments(overrides=["damping=0.2", "block_grid=flat"], lr=0.5, global_batch=24), 4)
    assert config["train_batch_size"] == 24 and config["train_micro_batch_size_per_gpu"] == 6
    params = config["optimizer"]["params"]
    assert (params["lr"], params["damping"], params["block_grid"]) == (0.5, 0.2, "flat")
    adamw = deepspeed_config(arguments(optimizer="adamw"), 2)["optimizer"]
    assert adamw == {"type": "AdamW", "params": {"weight_decay": 0.01, "lr": 0.003, "torch_adam": True}}
    for stage in (1, 3):
        config = deepspeed_config(arguments(optimizer="muon", config=LAUNCH.parent / f"configs/zero{stage}.json"), 2)
        assert config["gradient_clipping"] == 0
        assert config["zero_optimization"].get("reduce_scatter") is (False if stage == 3 else None)
    with pytest.raises(ValueError, match="Muon has lr, adam_lr"):
        deepspeed_config(arguments(optimizer="muon", overrides=["damping=0.2"]), 2)
    muon = deepspeed_config(arguments(optimizer="muon", overrides=["adam_lr=0.001"]), 2)["optimizer"]["params"]
    assert muon == {"momentum": 0.95, "adam_lr": 1e-3, "weight_decay": 0.01, "lr": 0.05, "torch_adam": True}
    preset = deepspeed_config(arguments(overrides=["preset=language_models", "damping=0.3"]), 2)["optimizer"]["params"]
    assert preset == {"preset": "language_models", "damping": 0.3}
    with pytest.raises(ValueError, match="no multiple of --heads"):
        arguments(width=9).check()


def test_batch_sizes_of_the_users_own_config(tmp_path: Path) -> None:
    path = tmp_path / "own.json"
    path.write_text('{"train_batch_size": 64}')
    assert deepspeed_config(arguments(config=path), 2)["train_micro_batch_size_per_gpu"] == 32
    path.write_text('{"gradient_accumulation_steps": "auto"}')
    with pytest.raises(ValueError, match="gradient_accumulation_steps should be a positive integer, got 'auto'"):
        deepspeed_config(arguments(config=path), 2)
    with pytest.raises(ValueError, match="--corpus-mb should be above 0"):
        arguments(corpus_mb=float("inf")).check()


@pytest.mark.parametrize("path", sorted((LAUNCH.parent / "configs").glob("*.json")), ids=lambda path: path.name)
def test_the_configs_are_what_their_names_say(path: Path) -> None:
    config = json.loads(path.read_text())
    assert config["optimizer"]["type"] == "AdaFisher"
    assert path.name.removeprefix("huggingface_") == f"zero{config['zero_optimization']['stage']}.json"


MPIRUN = shutil.which("mpirun", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")


@pytest.mark.skipif(MPIRUN is None, reason="no mpirun here; the extra `mpi` brings one")
def test_mpirun(tmp_path: Path) -> None:
    command = [MPIRUN, "--allow-run-as-root", "--oversubscribe", "-n", "2", sys.executable, str(LAUNCH / "train.py")]
    environment = {k: v for k, v in os.environ.items() if k not in ("DS_ACCELERATOR", "RANK", "WORLD_SIZE")}
    done = subprocess.run(
        [*command, "--device", "cpu", *TINY.split(), "--out", "a"],
        capture_output=True, text=True, cwd=tmp_path, env={**environment, "OMP_NUM_THREADS": "1"}, timeout=180,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((tmp_path / "a" / "summary.json").read_text())["world_size"] == 2
    assert (tmp_path / "a" / "loss.png").exists()


def test_groups_of_the_model() -> None:
    """Each parameter once; the tables, and they alone, without blocks."""
    model = ByteTransformer(width=8, layers=1, heads=1, seq_len=4)
    others, tables = model.groups()
    assert {name for name, _ in tables["params"]} == {
        "embed_bytes.weight", "embed_positions.weight", "lm_head.weight",
    }  # fmt: skip
    assert tables["max_blocks"] == 0 and "max_blocks" not in others
    assert dict(others["params"] + tables["params"]).keys() == dict(model.named_parameters()).keys()
    assert len(others["params"]) + len(tables["params"]) == len(list(model.parameters()))
