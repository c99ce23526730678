"""The scripts of examples/ as users start them: under torchrun, with falling losses, and resumed.

A resumed run must give the losses of the one that was never stopped: bit for bit on the same ranks,
to float rounding on others or at another ZeRO stage.
"""

from __future__ import annotations

import ast
import csv
import json
from pathlib import Path
from typing import Any

import pytest
from torchrun import EXAMPLES, succeed

pytest.importorskip("transformers", reason="the extra 'hf' is not installed")
pytest.importorskip("accelerate", reason="the extra 'hf' is not installed")

ROOT = Path(__file__).parent.parent
CONFIG = json.loads((ROOT / "configs/huggingface_zero2.json").read_text())

pytestmark = [pytest.mark.dist, pytest.mark.deepspeed]

Losses = dict[int, float]  # by step


def assert_losses_fall(losses: Losses) -> None:
    values = [losses[step] for step in sorted(losses)]
    assert sum(values[-3:]) / 3 < 0.85 * values[0], values


def assert_same(resumed: Losses, straight: Losses, after: int, exact: bool) -> None:
    """The steps after the resumption, all of them."""
    late = {step: loss for step, loss in straight.items() if step > after}
    assert late and set(late) == {step for step in resumed if step > after}
    for step, loss in late.items():
        assert resumed[step] == loss if exact else resumed[step] == pytest.approx(loss, abs=2e-5), step


@pytest.mark.parametrize("script", ["huggingface_trainer", "accelerate_deepspeed", "lightning_deepspeed", "tiny"])
def test_what_deepspeed_builds_needs_no_import_of_ours(script: str) -> None:
    nodes = list(ast.walk(ast.parse((EXAMPLES / f"{script}.py").read_text())))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [str(node.module) for node in nodes if isinstance(node, ast.ImportFrom)]
    assert names and not [name for name in names if name.startswith("adafisher")]


def test_every_example_is_listed() -> None:
    listed = (EXAMPLES / "README.md").read_text()
    assert all(path.name in listed for path in EXAMPLES.glob("*.py"))


# ---- Hugging Face's Trainer ----

STEPS = ["--max_steps", 12, "--save_steps", 4, "--eval_steps", 4, "--disable_tqdm", "True"]


def trainer_config(folder: Path, stage: int, **params: Any) -> Path:
    """configs/huggingface_zero2.json at another stage, with other settings of AdaFisher."""
    gathered = {"stage3_gather_16bit_weights_on_model_save": True} if stage == 3 else {}
    optimizer = {"type": "AdaFisher", "params": {**CONFIG["optimizer"]["params"], **params}}
    path = folder / f"zero{stage}.json"
    path.write_text(json.dumps({**CONFIG, "zero_optimization": {"stage": stage, **gathered}, "optimizer": optimizer}))
    return path


def history(folder: Path) -> list[dict[str, float]]:
    return json.loads((folder / "trainer_state.json").read_text())["log_history"]


def trainer_losses(folder: Path) -> Losses:
    return {int(row["step"]): row["loss"] for row in history(folder) if "loss" in row}


def trainer_evaluations(folder: Path) -> Losses:
    """At each step where there was one; of several the first."""
    return {int(row["step"]): row["eval_loss"] for row in reversed(history(folder)) if "eval_loss" in row}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which run `a` trained at stage 2 on two ranks, with the config as it is."""
    where = tmp_path_factory.mktemp("huggingface")
    config = ROOT / "configs/huggingface_zero2.json"
    succeed(2, "huggingface_trainer.py", "--deepspeed", config, "--output_dir", "a", *STEPS, cwd=where)
    return where


def test_trainer(trained: Path) -> None:
    losses, evaluations = trainer_losses(trained / "a"), trainer_evaluations(trained / "a")
    assert sorted(losses) == list(range(1, 13)) and sorted(evaluations) == [4, 8, 12]
    assert_losses_fall(losses)
    assert evaluations[12] < evaluations[8] < evaluations[4]
    saved = trained / "a" / "checkpoint-8" / "global_step8" / "adafisher_dist" / "manifest.json"
    (group,) = json.loads(saved.read_text())["content"]["about"]["optimizer"]["groups"]
    assert group["settings"]["weight_decay"] == 0.01 and group["settings"]["initial_lr"] == 0.01  # for "auto"


def test_trainer_resumes_and_loads_the_best(trained: Path) -> None:
    # The "best" is the worst here, the first: so that it is not what the model is anyway.
    best = ["--load_best_model_at_end", "True", "--metric_for_best_model", "loss", "--greater_is_better", "True"]
    config = ROOT / "configs/huggingface_zero2.json"
    arguments = ["--deepspeed", config, "--output_dir", "b", "--resume_from_checkpoint", "a/checkpoint-4", *STEPS]
    succeed(2, "huggingface_trainer.py", *arguments, *best, cwd=trained)
    assert_same(trainer_losses(trained / "b"), trainer_losses(trained / "a"), 4, exact=True)
    evaluations = trainer_evaluations(trained / "b")
    assert_same(evaluations, trainer_evaluations(trained / "a"), 4, exact=True)
    last = history(trained / "b")[-1]["eval_loss"]
    assert last == pytest.approx(max(evaluations[8], evaluations[12])) and last > evaluations[12]


def test_trainer_resumes_on_one_rank_at_another_stage(trained: Path) -> None:
    config = trainer_config(trained, 3)
    arguments = ["--deepspeed", config, "--output_dir", "c", "--resume_from_checkpoint", "a/checkpoint-8"]
    succeed(1, "huggingface_trainer.py", *arguments, "--per_device_train_batch_size", 16, *STEPS, cwd=trained)
    assert_same(trainer_losses(trained / "c"), trainer_losses(trained / "a"), 8, exact=False)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 3])
def test_trainer_at_other_stages(trained: Path, tmp_path: Path, stage: int) -> None:
    config = trainer_config(tmp_path, stage)
    one = ["--deepspeed", config, "--output_dir", "one", "--per_device_train_batch_size", 16, *STEPS]
    succeed(1, "huggingface_trainer.py", *one, cwd=tmp_path)
    assert_same(trainer_losses(tmp_path / "one"), trainer_losses(trained / "a"), 0, exact=False)
    two = ["--deepspeed", config, "--output_dir", "two", "--resume_from_checkpoint", "one/checkpoint-8", *STEPS]
    succeed(2, "huggingface_trainer.py", *two, cwd=tmp_path)
    assert_same(trainer_losses(tmp_path / "two"), trainer_losses(trained / "a"), 8, exact=False)


FSDP2_TRAINER = """
import sys
sys.path.insert(0, sys.argv.pop(1))
import torch
from tiny import llama, training_set
from transformers import HfArgumentParser, Trainer, TrainingArguments
from adafisher_dist import AdaFisher
parser = HfArgumentParser(TrainingArguments)
parser.set_defaults(
    max_steps=12, save_steps=4, learning_rate=1e-2, per_device_train_batch_size=8, logging_steps=1, report_to="none",
    use_cpu=True, disable_tqdm=True,
)
(args,) = parser.parse_args_into_dataclasses()
adafisher = (AdaFisher, {"lr": args.learning_rate})
trainer = Trainer(llama(), args, train_dataset=training_set(), optimizer_cls_and_kwargs=adafisher)
trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
trainer.save_state()
print(f"END {type(trainer.optimizer.optimizer).__name__} {type(next(trainer.model.parameters())).__name__}")
torch.distributed.destroy_process_group()
"""
FSDP2 = {"version": 2, "transformer_layer_cls_to_wrap": "LlamaDecoderLayer", "state_dict_type": "SHARDED_STATE_DICT"}


def test_trainer_under_fsdp2(tmp_path: Path) -> None:
    """Given the class; without DeepSpeed."""
    (tmp_path / "trainer.py").write_text(FSDP2_TRAINER)
    (tmp_path / "fsdp2.json").write_text(json.dumps(FSDP2))

    def train(*more: object) -> str:
        shim = f"{ROOT / 'tests/accelerate_on_cpu.py'} {tmp_path / 'trainer.py'} {EXAMPLES}"
        return succeed(2, shim, "--fsdp", "full_shard", "--fsdp_config", "fsdp2.json", *more, cwd=tmp_path)

    assert train("--output_dir", "a").count("END AdaFisher DTensor") == 2
    assert_losses_fall(trainer_losses(tmp_path / "a"))
    train("--output_dir", "b", "--resume_from_checkpoint", "a/checkpoint-8")
    assert_same(trainer_losses(tmp_path / "b"), trainer_losses(tmp_path / "a"), 8, exact=True)


@pytest.mark.slow
def test_trainer_clips_gradients(trained: Path, tmp_path: Path) -> None:
    config = ROOT / "configs/huggingface_zero2.json"
    arguments = ["--deepspeed", config, "--output_dir", "d", "--max_grad_norm", 0.5, *STEPS]
    succeed(2, "huggingface_trainer.py", *arguments, cwd=tmp_path)
    assert_losses_fall(trainer_losses(tmp_path / "d"))
    assert max(row["grad_norm"] for row in history(trained / "a") if "grad_norm" in row) > 1.0
    with pytest.raises(AssertionError):
        assert_same(trainer_losses(tmp_path / "d"), trainer_losses(trained / "a"), 0, exact=False)


# ---- Accelerate ----


def accelerate_losses(folder: Path) -> Losses:
    return dict(enumerate(json.loads((folder / "losses.json").read_text()), 1))


def accelerate_arguments(script: str, folder: Path, out: str) -> list[object]:
    arguments = ["--steps", 24, "--save-every", 10, "--out", out]
    if "deepspeed" in script:  # "auto" in place of the block size is refused; a budget alone means the same
        return [*arguments, "--config", trainer_config(folder, 2, memory_budget_gb=1.0)]
    return arguments


@pytest.fixture(scope="module", params=["accelerate_deepspeed.py", "accelerate_ddp.py"])
def accelerated(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A script, and the folder in which it trained on two ranks."""
    where = tmp_path_factory.mktemp("accelerate")
    succeed(2, request.param, *accelerate_arguments(request.param, where, "a"), cwd=where)
    return request.param, where


def test_accelerate(accelerated: tuple[str, Path]) -> None:
    losses = accelerate_losses(accelerated[1] / "a")
    assert len(losses) == 24
    assert_losses_fall(losses)


def test_accelerate_resumes(accelerated: tuple[str, Path]) -> None:
    script, where = accelerated
    arguments = accelerate_arguments(script, where, "b")
    succeed(2, script, *arguments, "--resume", "a/step20", cwd=where)  # in the middle of an epoch of 16
    assert_same(accelerate_losses(where / "b"), accelerate_losses(where / "a"), 20, exact=True)


@pytest.mark.slow
def test_accelerate_resumes_on_one_rank_and_back(accelerated: tuple[str, Path]) -> None:
    script, where = accelerated
    straight = accelerate_losses(where / "a")
    there = accelerate_arguments(script, where, "c")
    if "deepspeed" in script:
        there += ["--config", trainer_config(where, 3, memory_budget_gb=1.0)]
    succeed(1, script, *there, "--resume", "a/step10", cwd=where)
    assert_same(accelerate_losses(where / "c"), straight, 10, exact=False)
    succeed(2, script, *accelerate_arguments(script, where, "d"), "--resume", "c/step20", cwd=where)
    assert_same(accelerate_losses(where / "d"), straight, 20, exact=False)


def test_accelerate_refuses_auto_for_the_block_size(tmp_path: Path) -> None:
    """And with it Trainer, which prepares by Accelerate. If this fails, the notes on it can go."""
    from accelerate.utils import DeepSpeedPlugin

    config = trainer_config(tmp_path, 2, block_size="auto", memory_budget_gb=1.0)
    plugin = DeepSpeedPlugin(hf_ds_config=str(config))
    known = {f"optimizer.params.{name}": 0.01 for name in ("lr", "weight_decay")}
    known |= {key: 1 for key in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_clipping")}
    known |= {"gradient_accumulation_steps": 1, "bf16.enabled": False}
    with pytest.raises(ValueError, match=r"optimizer\.params\.block_size` not found"):
        plugin.deepspeed_config_process(must_match=False, **known)


# ---- Lightning ----


def lightning_losses(folder: Path) -> Losses:
    with (folder / "metrics.csv").open(newline="") as file:
        return {int(row["step"]): float(row["loss"]) for row in csv.DictReader(file) if row["loss"]}


# How a script is started here, its checkpoint of the first epoch, arguments of a run that resumes
# elsewhere.
LIGHTNING = {
    "deepspeed": (f"{ROOT / 'tests/lightning_on_cpu.py'} lightning_deepspeed.py", "epoch=0.ckpt", ["--stage", 3]),
    "fsdp2": ("lightning_fsdp2.py", "epoch0", []),
}


@pytest.fixture(scope="module", params=list(LIGHTNING))
def lit(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A kind, and the folder in which it trained for two epochs on two ranks."""
    pytest.importorskip("lightning", reason="the extra 'lightning' is not installed")
    where = tmp_path_factory.mktemp("lightning")
    succeed(2, LIGHTNING[request.param][0], "--epochs", 2, "--devices", 2, "--out", "a", cwd=where)
    return request.param, where


def test_lightning(lit: tuple[str, Path]) -> None:
    losses = lightning_losses(lit[1] / "a")
    assert sorted(losses) == list(range(32))
    assert_losses_fall(losses)


@pytest.mark.slow  # the test before it trains by the same recipe
def test_lightning_resumes(lit: tuple[str, Path]) -> None:
    (kind, where) = lit
    script, first, _ = LIGHTNING[kind]
    succeed(2, script, "--epochs", 2, "--devices", 2, "--out", "b", "--resume", f"a/{first}", cwd=where)
    assert_same(lightning_losses(where / "b"), lightning_losses(where / "a"), 15, exact=True)


@pytest.mark.slow
@pytest.mark.slow  # the test before it trains by the same recipe
def test_lightning_resumes_on_one_rank(lit: tuple[str, Path]) -> None:
    (kind, where) = lit
    script, first, other = LIGHTNING[kind]
    resumed = ["--epochs", 2, "--devices", 1, "--out", "c", "--resume", f"a/{first}", *other]
    succeed(1, script, *resumed, cwd=where)
    assert_same(lightning_losses(where / "c"), lightning_losses(where / "a"), 15, exact=False)


OWN_CHECKPOINT = """
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from lightning_fsdp2 import LanguageModel, ModelParallelStrategy, Trainer, seed_everything
devices, resume = int(sys.argv[3]), sys.argv[4] if len(sys.argv) > 4 else None
seed_everything(0)
if sys.argv[2] == "ddp":
    LanguageModel.configure_model = lambda self: None  # it would shard
    strategy = DDPStrategy()
else:
    strategy = ModelParallelStrategy(devices, 1, save_distributed_checkpoint=sys.argv[2] == "sharded")
saves = ModelCheckpoint("own", "{epoch}", save_top_k=-1)
trainer = Trainer(
    accelerator="cpu", strategy=strategy, devices=devices, max_epochs=2, limit_train_batches=3, logger=False,
    callbacks=[saves], default_root_dir=".", use_distributed_sampler=False,
)
model = LanguageModel(10)
trainer.fit(model, ckpt_path=resume, weights_only=False)
(optimizer,) = trainer.optimizers
weight = next(model.parameters())
weight = (weight if sys.argv[2] == "ddp" else weight.full_tensor()).double().sum().item()
if trainer.global_rank == 0:
    print(f"END {weight!r} {sorted({int(entry['step']) for entry in optimizer.state.values()})}")
"""


@pytest.mark.parametrize("kind", ["ddp", "sharded", pytest.param("full", marks=pytest.mark.slow)])
def test_lightnings_own_checkpoint(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("lightning", reason="the extra 'lightning' is not installed")
    (tmp_path / "own.py").write_text(OWN_CHECKPOINT)

    def end(devices: int, *resume: str) -> tuple[float, str]:
        told = succeed(devices, str(tmp_path / "own.py"), EXAMPLES, kind, devices, *resume, cwd=tmp_path)
        _, weight, steps = next(line for line in told.splitlines() if line.startswith("END ")).split(" ", 2)
        return float(weight), steps

    straight, steps = end(2)
    assert steps == "[6]"
    assert end(2, "own/epoch=0.ckpt") == (straight, "[6]")
    assert end(1, "own/epoch=0.ckpt") == (pytest.approx(straight, rel=1e-3), "[6]")
