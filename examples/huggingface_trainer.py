"""Hugging Face's Trainer with AdaFisher, by the DeepSpeed config alone: no adafisher_dist import.

    torchrun --nproc-per-node 2 examples/huggingface_trainer.py \
        --deepspeed configs/huggingface_zero2.json
    torchrun --nproc-per-node 2 examples/huggingface_trainer.py \
        --deepspeed configs/huggingface_zero2.json \
        --resume_from_checkpoint runs/huggingface/checkpoint-20

All of TrainingArguments are arguments. Learning rate, weight decay, batch size, gradient clipping
and precision go from there into the config, where it says "auto".
"""

from __future__ import annotations

import torch
from tiny import CONFIG, held_out_set, training_set
from transformers import GPT2LMHeadModel, HfArgumentParser, Trainer, TrainingArguments, set_seed


def main() -> None:
    parser = HfArgumentParser(TrainingArguments)
    parser.set_defaults(
        output_dir="runs/huggingface",
        max_steps=40,
        per_device_train_batch_size=8,
        learning_rate=1e-2,  # Trainer's own default is 5e-5, for fine-tuning with AdamW
        weight_decay=0.01,  # Trainer's own default is 0
        lr_scheduler_type="cosine",
        warmup_steps=4,
        max_grad_norm=1.0,
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=10,
        save_strategy="steps",
        save_steps=10,
        report_to="none",
        use_cpu=not torch.cuda.is_available(),
    )
    (args,) = parser.parse_args_into_dataclasses()
    set_seed(args.seed)
    model = GPT2LMHeadModel(CONFIG)
    trainer = Trainer(model=model, args=args, train_dataset=training_set(), eval_dataset=held_out_set())
    # "last" would be True; a path, also to a checkpoint that another number of ranks saved, goes on
    # from there.
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.evaluate()
    trainer.save_model()
    trainer.save_state()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
