"""The training loop around a DeepSpeed engine: build, step, validate, save, resume."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import corpus as texts
import torch
from corpus import Corpus
from model import ByteTransformer
from ranks import Place, gather, total
from report import Board, Log, Row
from settings import Settings, UsageError
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

# A checkpoint goes on only with these unchanged: they shape its tensors, are restored from it, or
# make it another run.
_FIXED = ("model", "optimizer", "zero_stage", "world_size", "global_batch", "seed", "corpus")


@dataclass
class Spent:
    """What training has taken so far, validation and checkpoints left out."""

    seconds: float = 0.0
    optimizer_seconds: float = 0.0
    tokens: int = 0


class Stopwatch:
    """Times steps, and the optimizer's own step() in them, without DeepSpeed's work around it."""

    def __init__(self, optimizer: Optimizer, device: torch.device) -> None:
        self.device = device
        self.began = self.entered = self.in_optimizer = 0.0
        optimizer.register_step_pre_hook(self._start)
        optimizer.register_step_post_hook(self._stop)

    def restart(self) -> None:
        self.began, self.in_optimizer = self._now(), 0.0

    def read(self) -> tuple[float, float]:
        """Seconds since the restart, and how many of them in the optimizer."""
        return self._now() - self.began, self.in_optimizer

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # what was asked of the device is done by then
        return time.perf_counter()

    def _start(self, *_: Any) -> None:
        self.entered = self._now()

    def _stop(self, *_: Any) -> None:
        self.in_optimizer += self._now() - self.entered


def build(settings: Settings, config: dict[str, Any]) -> Any:
    """A DeepSpeed engine with the model, the optimizer of the config, and its schedule.

    Raises:
        UsageError: the config is not accepted.
    """
    import deepspeed

    torch.manual_seed(settings.seed)
    model = ByteTransformer(**settings.model)
    parameters = model.groups() if settings.optimizer == "adafisher" else model.parameters()
    # A scheduler in the JSON is the user's choice; else, warm-up and cosine.
    schedule = None if "scheduler" in config else lambda optimizer: LambdaLR(optimizer, _warm_up_and_cosine(settings))
    try:
        engine, *_ = deepspeed.initialize(
            model=model, model_parameters=parameters, config=config, lr_scheduler=schedule
        )
    except (TypeError, ValueError) as error:
        raise UsageError(f"DeepSpeed or the optimizer refuses the configuration.\n{error}") from error
    return engine


def _warm_up_and_cosine(settings: Settings) -> Callable[[int], float]:
    warm = max(1, round(settings.warmup * settings.steps))

    def factor(step: int) -> float:
        if step < warm:
            return (step + 1) / warm
        done = (step - warm) / max(1, settings.steps - warm)
        return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))

    return factor


class Trainer:
    """Trains an engine on a corpus. Batches and results do not depend on the number of ranks."""

    def __init__(self, engine: Any, settings: Settings, config: dict[str, Any], corpus: Corpus, place: Place) -> None:
        self.engine, self.settings, self.config, self.corpus, self.place = engine, settings, config, corpus, place
        self.watch = Stopwatch(engine.basic_optimizer, place.device)
        self.has_share = settings.optimizer != "muon"  # ZeRO orthogonalizes outside of the optimizer's step()
        self.step = 0
        self.spent = Spent()
        self.rows: list[Row] = []
        self.held_out = texts.held_out_batch(corpus, settings.held_out, settings.seq_len)

    # ---- training ----

    def fit(self, board: Board, log: Log | None) -> None:
        """Train from the current step to the last, reporting and saving on the way.

        Raises:
            UsageError: the loss is no longer finite.
        """
        settings = self.settings
        validate_every = settings.validate_every or max(1, settings.steps // 10)

        def report(row: Row) -> None:
            self.rows.append(row)
            board.show(row)
            if log:
                log.write(row)

        if self.step == 0:
            report(Row(0, None, self.validate(), self.lr, None, None, 0.0))
        losses, lrs = [], []
        self.watch.restart()
        while self.step < settings.steps:
            lrs.append(self.lr)
            losses.append(self._train_step())
            board.advance()
            last = self.step == settings.steps
            validating = last or self.step % validate_every == 0
            saving = not last and settings.save_every is not None and self.step % settings.save_every == 0
            if validating or saving or self.step % settings.log_every == 0:
                report(self._row(losses, lrs[-1], validating))
                if saving:
                    self.save()
                losses, lrs = [], []
                self.watch.restart()

    def _row(self, losses: list[Tensor], lr: float, validating: bool) -> Row:
        """Account for the steps since the watch was started."""
        seconds, in_optimizer = self.watch.read()
        tokens = len(losses) * self.config["train_batch_size"] * self.settings.seq_len
        self.spent.seconds += seconds
        self.spent.optimizer_seconds += in_optimizer
        self.spent.tokens += tokens
        share = in_optimizer / seconds if self.has_share else None
        loss = (total(torch.stack(losses).mean()) / self.place.world_size).item()
        if not math.isfinite(loss):
            raise UsageError(f"The training loss is {loss} at step {self.step}; try a lower --lr than {lr:g}.")
        val_loss = self.validate() if validating else None
        return Row(self.step, loss, val_loss, lr, tokens / seconds, share, self.spent.seconds)

    def _train_step(self) -> Tensor:
        """One step on this rank's slice of the global batch; the slice's mean loss."""
        size, accumulation = self.config["train_batch_size"], self.config["gradient_accumulation_steps"]
        batch = texts.train_batch(self.corpus, self.step, self.settings.seed, size, self.settings.seq_len)
        mine = batch.chunk(self.place.world_size)[self.place.rank].to(self.place.device)
        losses = []
        for part in mine.chunk(accumulation):
            loss = self.engine(part[:, :-1], part[:, 1:]).mean()
            self.engine.backward(loss)
            self.engine.step()
            losses.append(loss.detach())
        self.step += 1
        return torch.stack(losses).mean()

    @torch.no_grad()
    def validate(self) -> float:
        """Mean loss over the held-out sequences; every rank gets equally many batches."""
        self.engine.eval()
        size = self.config["train_micro_batch_size_per_gpu"]
        share = math.ceil(len(self.held_out) / self.place.world_size)
        # Every rank calls the model equally often, since ZeRO-3 communicates in it; what is too
        # much has weight 0.
        numbers = torch.arange(self.place.rank * share, (self.place.rank + 1) * share)
        weights = (numbers < len(self.held_out)).to(self.place.device)
        mine = self.held_out[numbers.clamp(max=len(self.held_out) - 1)].to(self.place.device)
        losses = [self.engine(part[:, :-1], part[:, 1:]) for part in mine.split(size)]
        self.engine.train()
        return (total((torch.cat(losses) * weights).sum()) / len(self.held_out)).item()

    @property
    def lr(self) -> float:
        """The learning rate of the next step."""
        return float(self.engine.get_lr()[0])

    # ---- checkpoints ----

    def save(self) -> Path:
        """Write a checkpoint of the current step. A collective."""
        folder = self.settings.folder / "checkpoint"
        progress = {"step": self.step, "spent": asdict(self.spent)}
        if self.place.is_main:
            # Before the checkpoint, and in one go: whenever the run is killed, what it has saved
            # can be gone on with.
            folder.mkdir(parents=True, exist_ok=True)
            identity = _identity(self.settings, self.config, self.corpus, self.place)
            folder.joinpath("run.json.new").write_text(json.dumps(identity, indent=2))
            folder.joinpath("run.json.new").replace(folder / "run.json")
        self.engine.save_checkpoint(str(folder), tag=f"step{self.step}", client_state=progress)
        return folder

    def resume(self) -> None:
        """Go on from the checkpoint that `find_checkpoint` accepted.

        Raises:
            UsageError: it has no steps left, and the run is not restartable.
        """
        folder = find_checkpoint(self.settings, self.config, self.corpus, self.place)
        path, progress = self.engine.load_checkpoint(str(folder))
        if path is None:
            raise UsageError(f"DeepSpeed could not load the checkpoint in {folder}.")
        self.step, self.spent = progress["step"], Spent(**progress["spent"])
        if self.step >= self.settings.steps and not self.settings.restartable:
            raise UsageError(
                f"The checkpoint in {folder} has done {self.step} steps already; give more than that with --steps, not"
                f" {self.settings.steps}."
            )

    # ---- the end ----

    def summary(self) -> dict[str, Any]:
        """What summary.json holds. A collective."""
        trained = [row for row in self.rows if row.loss is not None]
        tail = trained[-max(1, len(trained) // 20) :]
        memory = getattr(self.engine.basic_optimizer, "memory_usage", None)
        usage = gather(memory()["rank"]["total"] if memory else None)
        return {
            **_identity(self.settings, self.config, self.corpus, self.place),
            "steps": self.step,
            "loss": sum(row.loss for row in tail) / len(tail),
            "val_loss": self.rows[-1].val_loss,
            "seconds": self.spent.seconds,
            "tokens_per_s": self.spent.tokens / self.spent.seconds,
            "optimizer_share": self.spent.optimizer_seconds / self.spent.seconds if self.has_share else None,
            "optimizer_bytes_by_rank": usage if memory else None,
            "skipped_steps": getattr(self.engine.basic_optimizer, "skipped_steps", None),
            "parameters": sum(p.numel() for p in self.engine.module.parameters()),
            "tokens_a_step": self.config["train_batch_size"] * self.settings.seq_len,
            "text": self.corpus.source,
            "device": str(self.place.device.type),
            "torch": torch.__version__,
        }


def _identity(settings: Settings, config: dict[str, Any], corpus: Corpus, place: Place) -> dict[str, Any]:
    return {
        "model": settings.model,
        "optimizer": config["optimizer"],
        "zero_stage": (config.get("zero_optimization") or {}).get("stage", 0),
        "world_size": place.world_size,
        "global_batch": config["train_batch_size"],
        "seed": settings.seed,
        "corpus": corpus.digest,
    }


def from_checkpoint(settings: Settings) -> Settings:
    """Add what a checkpoint decides: whether a restartable run resumes, and the global batch size.

    Raises:
        ValueError: a restartable run is told to --resume another.
    """
    if settings.restartable:
        if settings.resume:
            raise ValueError("--restartable goes on from the run's own checkpoint; leave --resume out.")
        own = settings.folder / "checkpoint"
        if (own / "latest").is_file() and (own / "run.json").is_file():
            settings = replace(settings, resume=settings.folder)
    if settings.resume and not settings.batch_size and not settings.global_batch:
        saved = checkpoint_folder(settings.resume) / "run.json"
        if saved.is_file():
            settings = replace(settings, global_batch=json.loads(saved.read_text())["global_batch"])
    return settings


def checkpoint_folder(run: Path) -> Path:
    """Of a run's folder, or the folder itself."""
    return run / "checkpoint" if (run / "checkpoint").is_dir() else run


def find_checkpoint(settings: Settings, config: dict[str, Any], corpus: Corpus, place: Place) -> Path:
    """The checkpoint folder that --resume names, if it fits this run.

    Raises:
        ValueError: there is none, or it was made by another model, optimizer, ZeRO stage, number of
            ranks, batch size, seed or text.
    """
    assert settings.resume is not None
    folder = checkpoint_folder(settings.resume)
    if not (folder / "latest").is_file() or not (folder / "run.json").is_file():
        raise ValueError(f"--resume {settings.resume}: no checkpoint of launch/train.py there; give a run's folder.")
    saved, here = json.loads((folder / "run.json").read_text()), _identity(settings, config, corpus, place)
    # With AdaFisher, engine.load_checkpoint goes on at any number of ranks and ZeRO stage;
    # DeepSpeed alone does not.
    free = ("world_size", "zero_stage") if config["optimizer"]["type"] == "AdaFisher" else ()
    fixed = [key for key in _FIXED if key not in free]
    different = [f"  {key}: {saved.get(key)} there, {here[key]} here" for key in fixed if saved.get(key) != here[key]]
    if different:
        raise ValueError("\n".join([f"The checkpoint in {folder} does not fit this run:", *different]))
    return folder
