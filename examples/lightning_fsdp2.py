"""Lightning's ModelParallelStrategy (FSDP2) with AdaFisher.

    torchrun --nproc-per-node 2 examples/lightning_fsdp2.py --devices 2 --out runs/fsdp2
    torchrun --nproc-per-node 2 examples/lightning_fsdp2.py --devices 2 --out runs/more \
        --resume runs/fsdp2/epoch0

The callback here saves with `adafisher_dist.save_checkpoint`, whose checkpoints load in any layout
and are not unpickled; Lightning's own work too. A run may be resumed on another number of ranks.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import ModelParallelStrategy
from tiny import CONFIG, training_set
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, DistributedSampler
from transformers import GPT2LMHeadModel

from adafisher_dist import AdaFisher, load_checkpoint, save_checkpoint

GLOBAL_BATCH = 16


class LanguageModel(LightningModule):
    def __init__(self, steps: int) -> None:
        super().__init__()
        self.model = GPT2LMHeadModel(CONFIG)
        self.steps = steps

    def configure_model(self) -> None:
        mesh = self.device_mesh["data_parallel"]
        for block in self.model.transformer.h:
            fully_shard(block, mesh=mesh)
        fully_shard(self.model, mesh=mesh)

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = AdaFisher(self.named_parameters(), lr=1e-2)

        def factor(step: int) -> float:
            return min(1.0, (step + 1) / 4) * (1 + math.cos(math.pi * step / self.steps)) / 2

        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

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


class Checkpoints(Callback):
    """Saves model, optimizer, schedule and Lightning's counters each epoch; resumes from them."""

    def __init__(self, folder: Path, resume: Path | None) -> None:
        self.folder = folder
        self.resume = resume

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.resume is not None:
            scheduler = trainer.lr_scheduler_configs[0].scheduler
            restored = load_checkpoint(self.resume, pl_module, trainer.optimizers[0], lr_scheduler=scheduler)
            trainer.fit_loop.load_state_dict(restored.extra["fit_loop"])

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        scheduler = trainer.lr_scheduler_configs[0].scheduler
        extra = {"fit_loop": trainer.fit_loop.state_dict()}
        path = self.folder / f"epoch{trainer.current_epoch}"
        save_checkpoint(path, pl_module, trainer.optimizers[0], lr_scheduler=scheduler, extra=extra)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/fsdp2"))
    parser.add_argument("--resume", type=Path, help="a checkpoint of --out, epochN")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--devices", type=int, default=2, help="ranks, as torchrun starts them")
    args = parser.parse_args()
    seed_everything(0)
    trainer = Trainer(
        strategy=ModelParallelStrategy(data_parallel_size=args.devices, tensor_parallel_size=1),
        devices=args.devices,
        max_epochs=args.epochs,
        gradient_clip_val=1.0,
        use_distributed_sampler=False,
        enable_checkpointing=False,  # Lightning's own
        callbacks=[Checkpoints(args.out, args.resume)],
        logger=CSVLogger(args.out, name="", version=""),
        log_every_n_steps=1,
    )
    trainer.fit(LanguageModel(args.epochs * len(training_set()) // GLOBAL_BATCH))


if __name__ == "__main__":
    main()
