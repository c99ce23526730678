"""What the command line asks for, and the DeepSpeed config that follows from it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TYPES = {"adafisher": "AdaFisher", "adamw": "AdamW", "muon": "Muon"}
DEFAULT_LR = {"adafisher": 1e-2, "adamw": 3e-3, "muon": 5e-2}
MUON = {"momentum": 0.95, "adam_lr": 3e-3}  # adam_lr: of what is no hidden matrix
MUON_TAKES = ("lr", "adam_lr", "momentum", "weight_decay", "ns_method", "betas", "eps", "per_head_muon")


class UsageError(Exception):
    """The request cannot be met; raised on all ranks alike, so that none waits for another."""


@dataclass(frozen=True, slots=True)
class Settings:
    """The arguments of launch/train.py, which tells what they are."""

    optimizer: str
    config: Path
    lr: float | None
    overrides: list[str]
    steps: int
    batch_size: int | None
    global_batch: int | None
    seq_len: int
    width: int
    layers: int
    heads: int
    data: Path | None
    corpus_mb: float
    seed: int
    warmup: float
    validate_every: int | None
    log_every: int
    save_every: int | None
    held_out: int
    out: Path | None
    overwrite: bool
    resume: Path | None
    restartable: bool
    device: str

    def check(self) -> None:
        """Refuse what typer's own bounds let through.

        Raises:
            ValueError: two arguments do not go together.
        """
        if self.width % self.heads:
            raise ValueError(f"--width {self.width} is no multiple of --heads {self.heads}.")
        if self.batch_size and self.global_batch:
            raise ValueError("Give --batch-size (sequences a rank) or --global-batch (of all ranks), not both.")
        if not 0 < self.corpus_mb < 1e6:
            raise ValueError(f"--corpus-mb should be above 0 and below 1,000,000, got {self.corpus_mb:g}.")
        if self.lr is not None and any(item.partition("=")[0].strip() == "lr" for item in self.overrides):
            raise ValueError("The learning rate is given twice, by --lr and by --set lr=…; leave one out.")
        if self.restartable and self.overwrite:
            raise ValueError("--restartable goes on with a run, and --overwrite replaces it; leave one out.")
        kept = not self.overwrite and not self.restartable and not self.continues_in_place
        if kept and self.folder.joinpath("log.csv").exists():
            raise ValueError(
                f"{self.folder} already holds a run. Choose another --out, or add --overwrite to replace it, or"
                " --restartable to go on with it."
            )

    @property
    def folder(self) -> Path:
        """Where the run's files go."""
        return self.out or Path("runs") / f"{self.optimizer}-{self.config.stem}"

    @property
    def continues_in_place(self) -> bool:
        """Whether the run is resumed in its own folder, so that its log goes on."""
        return self.resume is not None and self.folder.resolve() in (
            self.resume.resolve(),
            self.resume.resolve().parent,
        )

    @property
    def model(self) -> dict[str, int]:
        """The arguments of the model."""
        return {"width": self.width, "layers": self.layers, "heads": self.heads, "seq_len": self.seq_len}


def deepspeed_config(settings: Settings, world_size: int) -> dict[str, Any]:
    """The JSON of `settings.config` with this run's optimizer and batch size written into it.

    Raises:
        ValueError: the file is no JSON object, `--set` is malformed, or the batch cannot be shared
            out.
    """
    config = _read(settings.config)
    config["optimizer"] = _optimizer(settings, config.get("optimizer") or {})
    if settings.optimizer == "muon":
        # DeepSpeed 0.19.8 clips what Muon has orthogonalized, of norm √rank a matrix, and not the
        # gradient: a limit of 1 would make its steps some thirty times too short.
        config["gradient_clipping"] = 0.0
        zero = config.get("zero_optimization") or {}
        if zero.get("stage") == 3:
            zero["reduce_scatter"] = False  # DeepSpeed asks for it
    for key in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"):
        if key in config and (not isinstance(config[key], int) or isinstance(config[key], bool) or config[key] < 1):
            raise ValueError(f"{settings.config}: {key} should be a positive integer, got {config[key]!r}.")
    accumulation = config.setdefault("gradient_accumulation_steps", 1)
    global_batch = settings.global_batch or _global_batch(settings, config, accumulation, world_size)
    share, rest = divmod(global_batch, world_size * accumulation)
    if rest or not share:
        raise ValueError(
            f"A global batch of {global_batch} sequences cannot be shared out equally to {world_size} ranks with"
            f" {accumulation} gradient accumulation steps; give a multiple of {world_size * accumulation}."
        )
    config["train_micro_batch_size_per_gpu"] = share
    config["train_batch_size"] = global_batch
    config["steps_per_print"] = 2**31
    return config


def _global_batch(settings: Settings, config: dict[str, Any], accumulation: int, world_size: int) -> int:
    if settings.batch_size:
        return settings.batch_size * world_size
    if "train_micro_batch_size_per_gpu" in config:
        return int(config["train_micro_batch_size_per_gpu"]) * accumulation * world_size
    return int(config.get("train_batch_size", 8 * accumulation * world_size))


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(
            f"--config {path}: no such file; the ones that come with the project are configs/zero0.json to 3."
        )
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"--config {path} is not JSON: {error}.") from error
    if not isinstance(config, dict):
        raise ValueError(f"--config {path} holds a {type(config).__name__}; a DeepSpeed config is a JSON object.")
    return config


def _optimizer(settings: Settings, configured: dict[str, Any]) -> dict[str, Any]:
    """The section "optimizer": the file's params if it has the requested type, then --lr, --set."""
    kind = TYPES[settings.optimizer]
    params: dict[str, Any] = {"weight_decay": 0.01}
    if configured.get("type") == kind:
        params = dict(configured.get("params") or {})
    params.setdefault("lr", DEFAULT_LR[settings.optimizer])
    if kind == "Muon":
        params = {**MUON, **params}
    if kind != "AdaFisher":
        params["torch_adam"] = True  # torch.optim.AdamW; DeepSpeed's own would be compiled first
    if settings.lr is not None:
        params["lr"] = settings.lr
    for item in settings.overrides:
        name, equals, value = item.partition("=")
        if not equals or not name.strip():
            raise ValueError(f"--set {item!r} should have the form NAME=VALUE, as in --set damping=0.2.")
        if kind == "Muon" and name.strip() not in MUON_TAKES:  # DeepSpeed would pass over it
            raise ValueError(f"--set {item!r}: Muon has {', '.join(MUON_TAKES)}.")
        params[name.strip()] = _value(value.strip())
    if any(item.partition("=")[0].strip() == "preset" for item in settings.overrides):
        # The file's own settings would override all of the preset.
        own = {item.partition("=")[0].strip() for item in settings.overrides} | ({"lr"} if settings.lr else set())
        params = {name: value for name, value in params.items() if name in own}
    return {"type": kind, "params": params}


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return {"True": True, "False": False, "None": None}.get(text, text)
