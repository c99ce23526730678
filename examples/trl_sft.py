"""TRL's SFTTrainer with LoRA by PEFT and AdaFisher, under DeepSpeed, DDP or FSDP2.

    torchrun --nproc-per-node 2 examples/trl_sft.py --deepspeed configs/huggingface_zero2.json
    torchrun --nproc-per-node 2 examples/trl_sft.py                                 # DDP
    torchrun --nproc-per-node 2 examples/trl_sft.py --fsdp full_shard --fsdp_config fsdp2.json
    torchrun --nproc-per-node 2 examples/trl_sft.py --resume_from_checkpoint runs/sft/checkpoint-20

All of SFTConfig are arguments. fsdp2.json: {"version": 2, "transformer_layer_cls_to_wrap":
"LlamaDecoderLayer", "state_dict_type": "SHARDED_STATE_DICT"}. A DeepSpeed config that names an
optimizer decides; elsewhere `optimizer_cls_and_kwargs` does.
"""

from __future__ import annotations

from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from tiny import LLAMA, training_set
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from transformers import HfArgumentParser, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback, set_seed
from trl import SFTConfig, SFTTrainer

from adafisher_dist import AdaFisher


class Consolidate(TrainerCallback):
    """Collect AdaFisher's state on rank 0 before Trainer saves it there, which DDP needs.

    `consolidate_state_dict` is a collective: all ranks are asked to save at the same steps.
    """

    def on_step_end(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
        if control.should_save:
            optimizer.optimizer.consolidate_state_dict()  # within Accelerate's wrapper

    on_epoch_end = on_step_end


def main() -> None:
    parser = HfArgumentParser(SFTConfig)
    parser.set_defaults(
        output_dir="runs/sft",
        max_steps=40,
        max_length=64,
        per_device_train_batch_size=8,
        learning_rate=1e-2,  # SFTConfig's own default is 2e-5
        lr_scheduler_type="cosine",
        warmup_steps=4,
        max_grad_norm=1.0,
        logging_steps=1,
        save_strategy="steps",
        save_steps=20,
        bf16=False,  # SFTConfig's own default is True
        gradient_checkpointing=False,
        report_to="none",
        use_cpu=not torch.cuda.is_available(),
    )
    (args,) = parser.parse_args_into_dataclasses()
    set_seed(args.seed)
    # The class, not an object: PEFT's factors do not exist before the trainer wraps the model.
    adafisher = (AdaFisher, {"lr": args.learning_rate})
    in_deepspeed = args.deepspeed is not None and "optimizer" in args.hf_deepspeed_config.config
    in_ddp = args.deepspeed is None and not args.fsdp  # on CPUs Trainer takes --fsdp for DDP, without a word
    trainer = SFTTrainer(
        model=LlamaForCausalLM(LLAMA),
        args=args,
        train_dataset=Dataset.from_dict({"text": texts()}),
        processing_class=tokenizer(),
        peft_config=LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"),
        optimizer_cls_and_kwargs=None if in_deepspeed else adafisher,
        callbacks=[Consolidate()] if in_ddp else [],
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    save_adapter(trainer)
    trainer.save_state()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def save_adapter(trainer: SFTTrainer) -> None:
    """The adapter alone, into the output folder.

    With sharded state dicts under FSDP2 `save_model` writes none: all ranks gather it.
    """
    if not trainer.is_fsdp_enabled:
        trainer.save_model()
        return
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    state = get_model_state_dict(trainer.model, options=options)
    if trainer.args.should_save:
        trainer.model.save_pretrained(trainer.args.output_dir, state_dict=state)


def texts() -> list[str]:
    return [bytes(sequence.tolist()).decode("latin-1") for sequence in training_set().sequences]


def tokenizer() -> PreTrainedTokenizerFast:
    """A token a byte, made here so that nothing is downloaded."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({letter: number for number, letter in enumerate(letters)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token=letters[0], pad_token=letters[0])


if __name__ == "__main__":
    main()
