"""Accelerate with DeepSpeed and AdaFisher, by the JSON config alone: no import of adafisher_dist.

    torchrun --nproc-per-node 2 examples/accelerate_deepspeed.py --out runs/accelerate
    torchrun --nproc-per-node 2 examples/accelerate_deepspeed.py --out runs/more \
        --resume runs/accelerate/step20

On GPUs `accelerate launch` does as well; on CPUs it would start one process, whatever its
--num_processes. A run may be resumed on another number of ranks; --global-batch is then shared out
among those.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DataLoaderConfiguration, DeepSpeedPlugin, DummyOptim, DummyScheduler, set_seed
from tiny import CONFIG, training_set
from torch.utils.data import DataLoader
from transformers import GPT2LMHeadModel, get_cosine_schedule_with_warmup


def main() -> None:
    args = arguments()
    plugin = DeepSpeedPlugin(hf_ds_config=str(args.config))
    if not torch.cuda.is_available():
        PartialState(cpu=True)  # Accelerator(cpu=True) would train without DeepSpeed, without a word
    # The order of the data is then a matter of seed and epoch alone, so that a resumed run finds it
    # on any ranks.
    seedable = DataLoaderConfiguration(use_seedable_sampler=True)
    accelerator = Accelerator(deepspeed_plugin=plugin, dataloader_config=seedable)
    set_seed(0)
    model = GPT2LMHeadModel(CONFIG)
    batch = args.global_batch // accelerator.num_processes
    loader = DataLoader(training_set(), batch_size=batch, shuffle=True, drop_last=True)

    # The optimizer is built by DeepSpeed, from the config; DummyOptim has what "auto" stands for
    # there.
    optimizer = DummyOptim(model.parameters(), lr=args.lr, weight_decay=0.01)

    def schedule(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
        return get_cosine_schedule_with_warmup(optimizer, num_warmup_steps=4, num_training_steps=args.steps)

    scheduler = DummyScheduler(optimizer, lr_scheduler_callable=schedule)
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)

    progress = Progress()
    accelerator.register_for_checkpointing(progress)
    if args.resume:
        accelerator.load_state(str(args.resume))
    train(args, accelerator, model, optimizer, loader, scheduler, progress)
    accelerator.end_training()


class Progress:
    """Steps done and their losses, saved with the rest by `register_for_checkpointing`."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def state_dict(self) -> dict[str, Any]:
        return {"losses": self.losses}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.losses = list(state["losses"])


def train(args: Any, accelerator: Any, model: Any, optimizer: Any, loader: Any, scheduler: Any, progress: Any) -> None:
    """Steps up to --steps; the data goes on where the saved run was."""
    epoch, within = divmod(len(progress.losses), len(loader))
    while len(progress.losses) < args.steps:
        loader.set_epoch(epoch)
        for batch in accelerator.skip_first_batches(loader, within) if within else loader:
            loss = model(**batch).loss
            accelerator.backward(loss)  # with DeepSpeed this is also the step, the schedule's too; what follows is
            optimizer.step()  # for what runs without it
            scheduler.step()
            optimizer.zero_grad()
            progress.losses.append(accelerator.reduce(loss.detach(), reduction="mean").item())
            done = len(progress.losses)
            accelerator.print(f"step {done} loss {progress.losses[-1]:.4f} lr {scheduler.get_last_lr()[0]:.5f}")
            if done % args.save_every == 0 or done == args.steps:
                accelerator.save_state(str(args.out / f"step{done}"))
            if done == args.steps:
                break
        epoch, within = epoch + 1, 0
    if accelerator.is_main_process:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "losses.json").write_text(json.dumps(progress.losses))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("configs/huggingface_zero2.json"))
    parser.add_argument("--out", type=Path, default=Path("runs/accelerate"))
    parser.add_argument("--resume", type=Path, help="a folder that --out has, stepN")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--save-every", type=int, default=20)
    parser.add_argument("--global-batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1e-2)
    return parser.parse_args()


if __name__ == "__main__":
    main()
