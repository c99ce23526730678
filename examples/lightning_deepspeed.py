"""Lightning's DeepSpeedStrategy with AdaFisher, by the config alone: no import of adafisher_dist.

    torchrun --nproc-per-node 2 examples/lightning_deepspeed.py --out runs/lightning
    torchrun --nproc-per-node 2 examples/lightning_deepspeed.py --out runs/more \
        --resume runs/lightning/epoch=0.ckpt

It needs GPUs: DeepSpeedStrategy refuses to run on CPUs. A run may be resumed on another number of
ranks.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DeepSpeedStrategy
from tiny import CONFIG, training_set
from torch.utils.data import DataLoader, DistributedSampler
from transformers import GPT2LMHeadModel

GLOBAL_BATCH = 16


def config(stage: int, steps: int) -> dict[str, Any]:
    """The DeepSpeed config; Lightning adds batch size, accumulation, clipping and precision."""
    schedule = {"total_num_steps": steps, "warmup_num_steps": 4, "warmup_min_ratio": 0.1}
    return {
        "zero_optimization": {"stage": stage},
        "optimizer": {"type": "AdaFisher", "params": {"lr": 1e-2, "weight_decay": 0.01}},
        "scheduler": {"type": "WarmupCosineLR", "params": schedule},
    }


class LanguageModel(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = GPT2LMHeadModel(CONFIG)

    def configure_optimizers(self) -> None:
        """Optimizer and schedule are in the config; Lightning asks for the method all the same."""

    def training_step(self, batch: dict[str, torch.Tensor], _: int) -> torch.Tensor:
        loss = self.model(**batch).loss
        self.log("loss", loss, prog_bar=True, sync_dist=True)
        return loss

    def train_dataloader(self) -> DataLoader[Any]:
        # A sampler of our own, since Lightning's would order the data otherwise on one rank than on
        # several.
        ranks, rank = self.trainer.world_size, self.trainer.global_rank
        sampler = DistributedSampler(training_set(), ranks, rank, drop_last=True)
        return DataLoader(training_set(), GLOBAL_BATCH // ranks, sampler=sampler)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", type=int, default=2, help="of ZeRO")
    parser.add_argument("--out", type=Path, default=Path("runs/lightning"))
    parser.add_argument("--resume", help="a checkpoint of --out")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--devices", type=int, default=-1, help="ranks, as torchrun starts them; -1: all GPUs")
    args = parser.parse_args()
    seed_everything(0)
    steps = args.epochs * len(training_set()) // GLOBAL_BATCH
    trainer = Trainer(
        strategy=DeepSpeedStrategy(config=config(args.stage, steps)),
        devices=args.devices,
        max_epochs=args.epochs,
        gradient_clip_val=1.0,
        use_distributed_sampler=False,
        callbacks=[ModelCheckpoint(args.out, filename="{epoch}", save_top_k=-1)],
        logger=CSVLogger(args.out, name="", version=""),
        log_every_n_steps=1,
    )
    # At the ends of epochs, as here, a resumed run is the undisturbed one. Within an epoch
    # Lightning would begin the data anew, unless the loader keeps its place itself (torchdata's
    # StatefulDataLoader does).
    trainer.fit(LanguageModel(), ckpt_path=args.resume)


if __name__ == "__main__":
    main()
