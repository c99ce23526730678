"""Does it train on a GPU? A byte-level GPT of 9 M parameters: AdaFisher, AdamW, Muon at two rates.

    python benchmarks/gpu/trains.py [--out FOLDER] [--rehearse]    # writes FOLDER/trains.json

`make gpu` calls it.

In bfloat16 autocast, on the sources of the Python packages that this machine has; no window is seen
twice, and all see the same ones in the same order. How many steps there is time for is timed first,
and all runs have as many: 5 % of them warm up, and the rate falls to zero by a cosine. Training
losses are means over the steps since the last one, kept on the device until the next evaluation;
what evaluations take is not counted.

With two rates each this says that it trains, and not who is better: `benchmarks/convergence.py` is
for that.
"""

from __future__ import annotations

import common_gpu  # first: it puts the other folders into sys.path  # isort: skip

import hashlib
import logging
import math
import sysconfig
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from clocks import Clock, answers, free, synchronize
from common_gpu import Results, left, said
from model import ByteTransformer
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from adafisher_dist import AdaFisher

SECONDS, REHEARSAL_SECONDS = 122, 40
MODEL = {"width": 384, "layers": 5, "heads": 6, "seq_len": 512}
TINY_MODEL = {"width": 16, "layers": 1, "heads": 2, "seq_len": 32}
BATCH, TINY_BATCH = 64, 4
TRAIN_BYTES, HELD_OUT_BYTES = 120_000_000, 2_000_000
TINY_TRAIN_BYTES, TINY_HELD_OUT_BYTES = 200_000, 20_000
LARGEST_FILE = 1_000_000  # longer ones are tables
EVALUATIONS, EVALUATION_WINDOWS = 16, 512
TRAINING_LOSSES = 200
MOST_STEPS = 3000
TIMED, WARM_UP = 20, 8  # steps of the first timing
SPARE = 0.85  # of the time that is left is planned with
WARM_UP_SHARE, WEIGHT_DECAY, CLIP, BETAS = 0.05, 0.1, 1.0, (0.9, 0.95)
# The first of each first, should time run out.
RUNS = (
    ("AdaFisher", 1e-2), ("AdamW", 3e-3), ("Muon", 1e-2), ("AdaFisher", 3e-3), ("AdamW", 1e-3), ("Muon", 3e-3),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Setup:
    """What all runs share.

    Attributes:
        device: where they train.
        model: of ByteTransformer.
        batch: windows a step.
        train: the bytes, on the device.
        order: where each window begins, in the order in which they are seen.
        held_out: windows, (n, seq_len + 1).
    """

    device: torch.device
    model: dict[str, int]
    batch: int
    train: Tensor
    order: Tensor
    held_out: Tensor

    @property
    def steps(self) -> int:
        """As many as no window is seen twice in."""
        return len(self.order) // self.batch

    def windows(self, step: int) -> Tensor:
        """The batch of a step, (batch, seq_len + 1)."""
        start = self.order[step * self.batch : (step + 1) * self.batch]
        return _windows(self.train, start, self.model["seq_len"])

    def build(self) -> ByteTransformer:
        torch.manual_seed(0)
        return ByteTransformer(**self.model).to(self.device)

    def loss(self, model: nn.Module, windows: Tensor) -> Tensor:
        """The mean cross-entropy in nats a byte."""
        with torch.autocast(self.device.type, torch.bfloat16):
            return model(windows[:, :-1], windows[:, 1:]).mean()


# ---- text ----


def sources() -> Iterator[bytes]:
    """Each Python source of this machine's packages once, in an order that their names decide."""
    paths = sysconfig.get_paths()
    by_name: dict[str, Path] = {}
    for root in dict.fromkeys(Path(paths[key]).resolve() for key in ("purelib", "platlib", "stdlib")):
        by_name |= {path.relative_to(root).as_posix(): path for path in root.rglob("*.py")}
    seen: set[bytes] = set()
    for name in sorted(by_name, key=lambda name: hashlib.sha256(name.encode()).digest()):
        text = _read(by_name[name])
        digest = hashlib.sha256(text).digest()
        if text and digest not in seen:  # packages bring copies of each other
            seen.add(digest)
            yield text


def _read(path: Path) -> bytes:
    try:
        text = path.read_bytes() if path.stat().st_size <= LARGEST_FILE else b""
    except OSError:  # a link to nowhere
        return b""
    return b"" if b"\0" in text else text


def read_text(train_bytes: int, held_out_bytes: int) -> tuple[bytes, bytes, dict[str, Any]]:
    """Text to train on, other files' text that is held out, and what it is."""
    files = sources()
    held_out, of_held_out = _take(files, held_out_bytes)
    train, of_train = _take(files, train_bytes)
    about = {
        "source": "Python sources of this machine's packages, each once",
        "train_bytes": len(train),
        "train_files": of_train,
        "held_out_bytes": len(held_out),
        "held_out_files": of_held_out,
        "sha256": hashlib.sha256(held_out + train).hexdigest(),
    }
    return train, held_out, about


def _take(files: Iterator[bytes], limit: int) -> tuple[bytes, int]:
    parts: list[bytes] = []
    size = 0
    while size < limit and (text := next(files, None)) is not None:
        parts.append(text)
        size += len(text)
    return b"".join(parts), len(parts)


def _windows(data: Tensor, starts: Tensor, seq_len: int) -> Tensor:
    return data[starts[:, None] + torch.arange(seq_len + 1, device=data.device)].long()


def set_up(rehearse: bool) -> tuple[Setup, dict[str, Any]]:
    device = torch.device("cpu" if rehearse else "cuda")
    sizes = (TINY_TRAIN_BYTES, TINY_HELD_OUT_BYTES) if rehearse else (TRAIN_BYTES, HELD_OUT_BYTES)
    text, other, about = read_text(*sizes)
    model = TINY_MODEL if rehearse else MODEL
    seq_len = model["seq_len"]
    train, held_out = (torch.frombuffer(bytearray(each), dtype=torch.uint8).to(device) for each in (text, other))
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm((len(train) - 1) // seq_len, generator=generator) * seq_len
    count = min(8 if rehearse else EVALUATION_WINDOWS, (len(held_out) - 1) // seq_len)
    spread = torch.linspace(0, len(held_out) - seq_len - 1, count, dtype=torch.float64).long()
    windows = _windows(held_out, spread.to(device), seq_len)
    return Setup(device, model, TINY_BATCH if rehearse else BATCH, train, order.to(device), windows), about


# ---- optimizers ----


def build(name: str, model: ByteTransformer, lr: float) -> list[Optimizer]:
    if name == "AdaFisher":
        return [AdaFisher(model.groups(), lr=lr, weight_decay=WEIGHT_DECAY)]
    if name == "AdamW":
        return [_adamw(list(model.parameters()), lr)]
    hidden = [p for key, p in model.named_parameters() if p.dim() == 2 and key.startswith("layers.")]
    rest = [p for key, p in model.named_parameters() if not (p.dim() == 2 and key.startswith("layers."))]
    first = torch.optim.Muon(hidden, lr=lr, weight_decay=WEIGHT_DECAY, adjust_lr_fn="match_rms_adamw")
    return [first, _adamw(rest, lr)]


def _adamw(parameters: list[nn.Parameter], lr: float) -> Optimizer:
    return AdamW(parameters, lr=lr, betas=BETAS, weight_decay=WEIGHT_DECAY, fused=True)


def factor(step: int, steps: int) -> float:
    """Of the peak learning rate, at step 0 and later."""
    warm_up = max(1, round(WARM_UP_SHARE * steps))
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))


# ---- training ----


class Training:
    """A model with its optimizers, on the way."""

    def __init__(self, setup: Setup, name: str, lr: float) -> None:
        self.setup, self.lr = setup, lr
        self.model = setup.build()
        self.parameters = list(self.model.parameters())
        self.optimizers = build(name, self.model, lr)

    def step(self, step: int, steps: int) -> Tensor:
        """Take a step; returns its loss on the device."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.lr * factor(step, steps)
        loss = self.setup.loss(self.model, self.setup.windows(step))
        self.model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, CLIP)
        for optimizer in self.optimizers:
            optimizer.step()
        return loss.detach()

    @torch.no_grad()
    def held_out(self) -> float:
        losses = [self.setup.loss(self.model, part) for part in self.setup.held_out.split(4 * self.setup.batch)]
        sizes = [len(part) for part in self.setup.held_out.split(4 * self.setup.batch)]
        return sum(float(loss) * size for loss, size in zip(losses, sizes, strict=True)) / sum(sizes)

    def told(self) -> dict[str, Any]:
        """What AdaFisher says of itself."""
        if not isinstance(self.optimizers[0], AdaFisher):
            return {}
        return {"skipped_steps": self.optimizers[0].skipped_steps}


def seconds_of(setup: Setup, name: str) -> tuple[float, float]:
    """Seconds of a step and of an evaluation; compiling is left out."""
    training = Training(setup, name, 1e-3)
    for step in range(WARM_UP):
        training.step(step, TIMED)
    training.held_out()
    clock = Clock(setup.device)
    clock.start()
    for step in range(WARM_UP, WARM_UP + TIMED):
        training.step(step, WARM_UP + TIMED)
    clock.pause()
    began = time.perf_counter()
    training.held_out()
    return clock.seconds / TIMED, time.perf_counter() - began


def choose_steps(setup: Setup, timed: dict[str, tuple[float, float]], seconds: float) -> int:
    """As many as all runs can have in so many seconds."""
    evaluations = sum((EVALUATIONS + 1) * timed[name][1] for name, _ in RUNS)
    each = sum(timed[name][0] for name, _ in RUNS)
    steps = int((SPARE * seconds - evaluations) / each)
    return max(min(steps // EVALUATIONS * EVALUATIONS, MOST_STEPS, setup.steps), EVALUATIONS)


def train(
    setup: Setup, curve: dict[str, Any], steps: int, save: Callable[[], None], enough: Callable[[], bool]
) -> None:
    """Fill in the curve of a run; `ended` tells how far it came.

    Args:
        setup: what all runs share.
        curve: has the optimizer's name and learning rate.
        steps: of the whole schedule.
        save: writes it all down.
        enough: whether to stop before the end, since the time is over.
    """
    training = Training(setup, curve["optimizer"], curve["lr"])
    clock = Clock(setup.device)
    curve["held_out"].append([0, 0.0, training.held_out()])
    every = max(1, steps // TRAINING_LOSSES)
    total = torch.zeros((), device=setup.device)
    since = 0
    ends = sorted({round(steps * number / EVALUATIONS) for number in range(EVALUATIONS + 1)})
    for begin, end in pairwise(ends):
        kept: list[tuple[int, Tensor]] = []
        clock.start()
        for step in range(begin, end):
            total += training.step(step, steps)
            since += 1
            if since == every:
                kept.append((step + 1, total / since))
                clock.mark()
                total, since = torch.zeros_like(total), 0
        marks = clock.pause()
        values = torch.stack([loss for _, loss in kept]).tolist() if kept else []
        curve["train"] += [[at, when, loss] for (at, _), when, loss in zip(kept, marks, values, strict=True)]
        curve["held_out"].append([end, clock.seconds, training.held_out()])
        curve |= {"seconds": clock.seconds, **training.told()}
        save()
        if not math.isfinite(curve["held_out"][-1][2]):
            curve["ended"] = "diverged"
            return
        if end < steps and enough():
            curve["ended"] = f"stopped at step {end}: the time was over"
            return
    curve["ended"] = common_gpu.FINISHED


def all_runs(given: Any, results: Results, setup: Setup, steps: int) -> None:
    content = results.content
    needed = {name: steps * each + (EVALUATIONS + 1) * other for name, (each, other) in content["timed"].items()}
    for name, lr in RUNS:
        if left(given) < needed[name]:
            content["left_out"].append({"name": f"{name}, lr {lr:g}", "why": f"{left(given):.0f} s were left"})
            continue
        curve: dict[str, Any] = {"optimizer": name, "lr": lr, "ended": common_gpu.RUNNING, "train": [], "held_out": []}
        content["runs"].append(curve)
        try:
            train(setup, curve, steps, results.save, lambda: left(given) < 2)
        except Exception as error:
            curve |= {"ended": "failed", "failure": said(error)}
            if not answers(setup.device):
                results.save()
                raise
        results.save()
        last = curve["held_out"][-1] if curve["held_out"] else [0, 0.0, math.nan]
        print(f"{name}, lr {lr:g}: {curve['ended']}, held-out loss {last[2]:.3f} at step {last[0]}, {last[1]:.1f} s")
        free(setup.device)


def checks(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Whether AdaFisher's runs brought the held-out loss down."""
    found = []
    for run in runs:
        if run["optimizer"] != "AdaFisher":
            continue
        first, last = (run["held_out"][at][2] if run["held_out"] else math.nan for at in (0, -1))
        ok = last < first and "failure" not in run and run.get("skipped_steps", 0) == 0
        told = f"held-out loss from {first:.3f} to {last:.3f}, {run.get('skipped_steps')} steps skipped"
        found.append({"name": f"AdaFisher trains at lr {run['lr']:g}", "ok": ok, "said": run.get("failure", told)})
    return found


def main() -> int:
    given = common_gpu.options("trains", __doc__, SECONDS, REHEARSAL_SECONDS)
    logging.basicConfig(level=logging.WARNING)
    results = Results(given, text={}, model={}, timed={}, steps=0, runs=[], checks=[], left_out=[])
    content = results.content
    setup, content["text"] = set_up(given.rehearse)
    print(f"{content['text']['train_bytes'] / 1e6:.1f} MB of text, {left(given):.0f} s left")
    parameters = sum(p.numel() for p in setup.build().parameters())
    content["model"] = {**setup.model, "batch": setup.batch, "parameters": parameters}
    names = list(dict.fromkeys(name for name, _ in RUNS))
    for name in names:
        content["timed"][name] = seconds_of(setup, name)
        results.save()
        free(setup.device)
        print(f"{name}: {1e3 * content['timed'][name][0]:.2f} ms a step, {left(given):.0f} s left")
    steps = choose_steps(setup, content["timed"], left(given))
    content["steps"] = min(steps, 2 * EVALUATIONS) if given.rehearse else steps
    print(f"{parameters:,} parameters, {content['steps']} steps each of {setup.batch} × {setup.model['seq_len']} bytes")
    all_runs(given, results, setup, content["steps"])
    synchronize(setup.device)
    content["checks"] = checks(content["runs"])
    results.finish()
    failed = [run for run in content["runs"] if "failure" in run]
    return 1 if failed or not all(check["ok"] for check in content["checks"]) else 0


if __name__ == "__main__":
    raise SystemExit(main())
