"""LoRA by PEFT under DeepSpeed ZeRO, by the config alone: no import of adafisher_dist.

    torchrun --nproc-per-node 2 examples/peft_lora_deepspeed.py --stage 3 --out runs/lora
    torchrun --nproc-per-node 2 examples/peft_lora_deepspeed.py --stage 3 --out runs/more \
        --resume runs/lora/step20

Checkpoints have the adapter and its optimizer's state, not the frozen base. A run may be resumed
on another number of ranks and at another stage. At the end the adapter alone is saved as PEFT
saves it, in OUT/adapter.
"""

from __future__ import annotations

import argparse
import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import deepspeed
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import GLOBAL_BATCH, batch, held_out_set, llama


def main() -> None:
    args = arguments()
    deepspeed.init_distributed()
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    model = get_peft_model(llama(), LoraConfig(r=args.rank, lora_alpha=2 * args.rank, target_modules="all-linear"))
    config = {
        "train_micro_batch_size_per_gpu": GLOBAL_BATCH // ranks,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": args.bf16},
        "zero_optimization": {"stage": args.stage},
        "optimizer": {"type": "AdaFisher", "params": {"lr": args.lr, "weight_decay": 0.0}},
    }
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    engine, *_ = deepspeed.initialize(model=model, model_parameters=trained, config=config)

    losses: list[float] = []
    if args.resume:
        _, client = engine.load_checkpoint(str(args.resume.parent), tag=args.resume.name)
        losses = client["losses"]
    for step in range(len(losses), args.steps):
        tokens = batch(step, rank, ranks).to(engine.device)
        loss = engine(input_ids=tokens, labels=tokens).loss
        engine.backward(loss)
        engine.step()
        losses.append(mean(loss))
        if rank == 0:
            print(f"step {step + 1} loss {losses[-1]:.4f}", flush=True)
        if (step + 1) % args.save_every == 0:
            state = {"losses": losses}
            engine.save_checkpoint(str(args.out), f"step{step + 1}", state, exclude_frozen_parameters=True)
    held_out = evaluate(engine, rank, ranks)
    save_adapter(model, trained, args.out / "adapter", args.stage, rank)
    if rank == 0:
        (args.out / "losses.json").write_text(json.dumps({"losses": losses, "held_out": held_out}))
    torch.distributed.destroy_process_group()


def save_adapter(model: PeftModel, trained: list[Any], folder: Path, stage: int, rank: int) -> None:
    """At stage 3 each rank has a part of the factors: all of them gather them, and one writes."""
    with deepspeed.zero.GatheredParameters(trained) if stage == 3 else nullcontext():
        if rank == 0:
            model.save_pretrained(folder)


def evaluate(engine: Any, rank: int, ranks: int) -> float:
    tokens = held_out_set().sequences[rank::ranks].to(engine.device)
    engine.eval()
    with torch.no_grad():
        return mean(engine(input_ids=tokens, labels=tokens).loss)


def mean(loss: torch.Tensor) -> float:
    """Over all ranks."""
    total = loss.detach().float().clone()
    torch.distributed.all_reduce(total)
    return total.item() / torch.distributed.get_world_size()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", type=int, default=2, choices=[0, 1, 2, 3], help="of ZeRO")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--rank", type=int, default=4, help="of the adapters")
    parser.add_argument("--lr", type=float, default=1e-2)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--save-every", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path("runs/lora"))
    parser.add_argument("--resume", type=Path, help="a folder of --out, stepN")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    return parser.parse_args()


if __name__ == "__main__":
    main()
