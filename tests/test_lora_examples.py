"""LoRA by PEFT, and TRL's SFTTrainer: the examples on two ranks, resumed, and their adapters."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("peft", reason="the extra 'lora' is not installed")
pytest.importorskip("trl", reason="the extra 'lora' is not installed")

from test_examples import (
    CONFIG,
    ROOT,
    Losses,
    assert_losses_fall,
    assert_same,
    history,
    trainer_config,
    trainer_losses,
)
from torchrun import EXAMPLES, succeed

pytestmark = [pytest.mark.dist, pytest.mark.deepspeed]


def base() -> Any:
    """The frozen model of the examples, in this process, and the sequences that they evaluate."""
    from transformers import LlamaForCausalLM, set_seed

    sys.path.insert(0, str(EXAMPLES))
    try:
        from tiny import LLAMA, held_out_set
    finally:
        sys.path.remove(str(EXAMPLES))
    set_seed(0)
    return LlamaForCausalLM(LLAMA), held_out_set().sequences


# ---- PEFT ----

LAYOUTS = {
    "zero2": ("peft_lora_deepspeed.py", ["--stage", 2]),
    "zero3": ("peft_lora_deepspeed.py", ["--stage", 3]),
    "fsdp2": ("peft_lora_fsdp2.py", []),
}
SHORT = ["--steps", 24, "--save-every", 8]


def result(folder: Path) -> tuple[Losses, float]:
    """Losses by step, and the loss on what was held out."""
    told = json.loads((folder / "losses.json").read_text())
    return dict(enumerate(told["losses"], 1)), told["held_out"]


@pytest.fixture(scope="module", params=list(LAYOUTS))
def lora(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A layout, and the folder in which it trained on two ranks."""
    where = tmp_path_factory.mktemp("lora")
    script, arguments = LAYOUTS[request.param]
    succeed(2, script, *arguments, *SHORT, "--out", "a", cwd=where)
    return request.param, where


def test_lora_trains(lora: tuple[str, Path]) -> None:
    losses, _ = result(lora[1] / "a")
    assert sorted(losses) == list(range(1, 25))
    assert_losses_fall(losses)


def test_lora_resumes(lora: tuple[str, Path]) -> None:
    layout, where = lora
    script, arguments = LAYOUTS[layout]
    succeed(2, script, *arguments, *SHORT, "--out", "b", "--resume", "a/step16", cwd=where)
    assert_same(result(where / "b")[0], result(where / "a")[0], 16, exact=True)
    assert result(where / "b")[1] == result(where / "a")[1]


def test_loras_checkpoint_is_of_the_adapters_size(lora: tuple[str, Path]) -> None:
    """Factors, momentum and the second moment in 12 bytes an element; of the base nothing."""
    layout, where = lora
    model, _ = base()
    adapter = (where / "a" / "adapter" / "adapter_model.safetensors").stat().st_size
    step = where / "a" / "step24"
    ours = step if layout == "fsdp2" else step / "adafisher_dist"
    tensors = json.loads((ours / "manifest.json").read_text())["content"]["tensors"]
    weights = [name for name in tensors if name.startswith("weight/")]
    assert len(weights) == 28 and all("lora_" in name for name in weights)
    saved = sum(path.stat().st_size for path in ours.glob("*.safetensors"))
    whole = sum(4 * parameter.numel() for parameter in model.parameters())
    assert 2.5 * adapter < saved < 5 * adapter < whole


def test_loras_adapter_is_pefts(lora: tuple[str, Path]) -> None:
    """It loads over the base, and computes what the engine computed."""
    from peft import PeftModel

    model, held_out = base()
    with torch.no_grad():
        untrained = float(model(input_ids=held_out, labels=held_out).loss)
        adapted = PeftModel.from_pretrained(model, lora[1] / "a" / "adapter")
        loaded = float(adapted(input_ids=held_out, labels=held_out).loss)
    assert loaded == pytest.approx(result(lora[1] / "a")[1], abs=1e-4) and loaded < untrained - 1


@pytest.mark.slow
def test_lora_resumes_on_one_rank_at_another_stage(lora: tuple[str, Path]) -> None:
    layout, where = lora
    script, arguments = LAYOUTS[layout]
    other = ["--stage", 5 - int(layout[-1])] if layout.startswith("zero") else arguments
    succeed(1, script, *other, *SHORT, "--out", "c", "--resume", "a/step16", cwd=where)
    assert_same(result(where / "c")[0], result(where / "a")[0], 16, exact=False)


# ---- TRL ----

STEPS = ["--max_steps", 12, "--save_steps", 4, "--disable_tqdm", "True"]
FSDP2 = {"version": 2, "transformer_layer_cls_to_wrap": "LlamaDecoderLayer", "state_dict_type": "SHARDED_STATE_DICT"}
ADAPTER = "adapter_model.safetensors"


def sft(layout: str, where: Path) -> tuple[str, list[object]]:
    """How TRL's script is started in a layout."""
    if layout == "fsdp2":
        (where / "fsdp2.json").write_text(json.dumps(FSDP2))
        shim = f"{ROOT / 'tests/accelerate_on_cpu.py'} trl_sft.py"
        return shim, ["--fsdp", "full_shard", "--fsdp_config", "fsdp2.json", *STEPS]
    if layout == "ddp":
        return "trl_sft.py", STEPS
    config = trainer_config(where, int(layout[-1]))
    if layout == "zero3":  # without an optimizer in the config, so that the script's class is taken
        config.write_text(json.dumps({k: v for k, v in json.loads(config.read_text()).items() if k != "optimizer"}))
    return "trl_sft.py", ["--deepspeed", config, *STEPS]


@pytest.fixture(scope="module", params=["ddp", "zero2", "zero3", "fsdp2"])
def tuned(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A layout, and the folder in which TRL's trainer trained on two ranks."""
    where = tmp_path_factory.mktemp("sft")
    script, arguments = sft(request.param, where)
    succeed(2, script, *arguments, "--output_dir", "a", cwd=where)
    return request.param, where


def test_sft_trains_by_adafisher(tuned: tuple[str, Path]) -> None:
    layout, where = tuned
    assert_losses_fall(trainer_losses(where / "a"))
    step = where / "a" / "checkpoint-12"
    if layout == "ddp":
        entries = torch.load(step / "optimizer.pt", weights_only=True)["state"].values()
        assert len(entries) == 28 and all("fisher_updates" in entry for entry in entries)
    elif layout == "fsdp2":
        from torch.distributed.checkpoint import FileSystemReader

        kept = FileSystemReader(step / "optimizer_0").read_metadata().state_dict_metadata
        assert len([name for name in kept if name.endswith("fisher_updates")]) == 28
    else:
        assert (step / "global_step12" / "adafisher_dist" / "manifest.json").is_file()
    from safetensors.torch import load_file

    assert len(load_file(where / "a" / ADAPTER)) == 28


def test_sft_resumes(tuned: tuple[str, Path]) -> None:
    layout, where = tuned
    script, arguments = sft(layout, where)
    resume = ["--output_dir", "b", "--resume_from_checkpoint", "a/checkpoint-8"]
    succeed(2, script, *arguments, *resume, cwd=where)
    assert_same(trainer_losses(where / "b"), trainer_losses(where / "a"), 8, exact=True)
    assert history(where / "b")[-1]["step"] == 12


WAYS = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tiny import LLAMA
from transformers import LlamaForCausalLM
from trl import SFTConfig, SFTTrainer
from trl_sft import texts, tokenizer
from adafisher_dist import AdaFisher
way, config = sys.argv[2], sys.argv[3] if len(sys.argv) > 3 else None


class DeepSpeedCPUAdam(torch.optim.AdamW):  # for what Accelerate takes with CPU offload, which has to be compiled
    def __init__(self, params, adamw_mode=True, **settings):
        super().__init__(params, **settings)


import deepspeed.ops.adam
deepspeed.ops.adam.DeepSpeedCPUAdam = DeepSpeedCPUAdam
args = SFTConfig(
    "out", max_steps=2, deepspeed=config, use_cpu=True, bf16=False, report_to="none", save_strategy="no",
    gradient_checkpointing=False, learning_rate=1e-2,
)
model, more = LlamaForCausalLM(LLAMA), {}
adapters = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
if way == "object":
    model = get_peft_model(model, adapters)
    more["optimizers"] = (AdaFisher([p for p in model.parameters() if p.requires_grad], lr=1e-2), None)
else:
    more["peft_config"] = adapters
if way == "class":
    more["optimizer_cls_and_kwargs"] = (AdaFisher, {"lr": 1e-2})
elif way == "object before the adapters":
    more["optimizers"] = (AdaFisher(model.parameters(), lr=1e-2), None)
data = Dataset.from_dict({"text": texts()})
trainer = SFTTrainer(model, args, train_dataset=data, processing_class=tokenizer(), **more)
factors = [p for p in trainer.model.parameters() if p.requires_grad]
before = [p.detach().clone() for p in factors]
trainer.train()
used = trainer.model_wrapped.basic_optimizer if config else trainer.optimizer.optimizer
moved = any(not torch.equal(p, old) for p, old in zip(factors, before))
print("END", type(used).__name__, moved)
"""
ADAMW = {"optimizer": {"type": "AdamW", "params": {"lr": "auto", "torch_adam": True}}}
OFFLOAD = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}
NOT_USED = "an AdaFisher that was built for its parameters is not used"


@pytest.mark.parametrize(
    ("way", "more", "ends", "warning"),
    [
        ("class", {}, "AdaFisher True", None),
        ("class", OFFLOAD, "DeepSpeedCPUAdam True", NOT_USED),
        ("class", OFFLOAD | {"zero_force_ds_cpu_optimizer": False}, "AdaFisher True", None),
        ("object", {}, "AdamW True", NOT_USED),
        ("class", ADAMW, "AdamW True", None),
        ("object", None, "AdaFisher True", None),
        ("object before the adapters", None, "AdaFisher False", "found no gradient on any parameter"),
    ],
)
def test_ways_to_hand_over_the_optimizer(
    way: str, more: dict[str, Any] | None, ends: str, warning: str | None, tmp_path: Path
) -> None:
    """The table in docs/integrations.md. `more` goes into DeepSpeed's config; None is DDP."""
    config = {key: value for key, value in CONFIG.items() if key != "optimizer"} | (more or {})
    (tmp_path / "ds.json").write_text(json.dumps(config))
    (tmp_path / "ways.py").write_text(WAYS)
    files = [] if more is None else ["ds.json"]
    told = succeed(1, str(tmp_path / "ways.py"), EXAMPLES, way, *files, cwd=tmp_path)
    assert f"END {ends}" in told
    assert ("AdaFisher" in told.replace(f"END {ends}", "")) == (warning is not None)
    assert warning is None or warning in told
