"""LoRA by PEFT under FSDP2 (fully_shard).

    torchrun --nproc-per-node 2 examples/peft_lora_fsdp2.py --out runs/lora
    torchrun --nproc-per-node 2 examples/peft_lora_fsdp2.py --out runs/more \
        --resume runs/lora/step20

Checkpoints have the adapter and its optimizer's state, not the frozen base. A run may be resumed
on another number of ranks. At the end the adapter alone is saved as PEFT saves it, in OUT/adapter.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import batch, held_out_set, llama
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from adafisher_dist import AdaFisher, load_checkpoint, save_checkpoint


def main() -> None:
    args = arguments()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    if device == "cuda":
        torch.cuda.set_device(rank % torch.cuda.device_count())
    model = get_peft_model(llama(), LoraConfig(r=args.rank, lora_alpha=2 * args.rank, target_modules="all-linear"))
    model.to(device)
    mesh = init_device_mesh(device, (ranks,))
    for layer in model.get_base_model().model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    # After fully_shard, and only what is trained: the base needs no state.
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    optimizer = AdaFisher(trained, lr=args.lr, weight_decay=0.0)

    losses: list[float] = []
    if args.resume:
        losses = load_checkpoint(args.resume, model, optimizer).extra["losses"]
    for step in range(len(losses), args.steps):
        tokens = batch(step, rank, ranks).to(device)
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_([parameter for _, parameter in trained], 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(mean(loss))
        if rank == 0:
            print(f"step {step + 1} loss {losses[-1]:.4f}", flush=True)
        if (step + 1) % args.save_every == 0:
            extra = {"losses": losses}
            path = args.out / f"step{step + 1}"
            save_checkpoint(path, model, optimizer, extra=extra, exclude_frozen_parameters=True)
    held_out = evaluate(model, rank, ranks, device)
    save_adapter(model, args.out / "adapter", rank)
    if rank == 0:
        (args.out / "losses.json").write_text(json.dumps({"losses": losses, "held_out": held_out}))
    dist.destroy_process_group()


def save_adapter(model: PeftModel, folder: Path, rank: int) -> None:
    """Each rank has a part of the factors: all of them gather them, without the base."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    state = get_model_state_dict(model, options=options)
    if rank == 0:
        model.save_pretrained(folder, state_dict=state)


def evaluate(model: Any, rank: int, ranks: int, device: str) -> float:
    tokens = held_out_set().sequences[rank::ranks].to(device)
    model.eval()
    with torch.no_grad():
        return mean(model(input_ids=tokens, labels=tokens).loss)


def mean(loss: torch.Tensor) -> float:
    """Over all ranks."""
    total = loss.detach().float().clone()
    dist.all_reduce(total)
    return total.item() / dist.get_world_size()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank", type=int, default=4, help="of the adapters")
    parser.add_argument("--lr", type=float, default=1e-2)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--save-every", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path("runs/lora"))
    parser.add_argument("--resume", type=Path, help="a folder of --out, stepN")
    return parser.parse_args()


if __name__ == "__main__":
    main()
