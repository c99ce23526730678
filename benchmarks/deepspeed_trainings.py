"""Whole trainings by DeepSpeed at ZeRO-1, 2 and 3 on two ranks: AdaFisher beside AdamW.

    python benchmarks/deepspeed_trainings.py           # hours; goes on where it was stopped
    python benchmarks/deepspeed_trainings.py --report  # only the table of what is there
    python benchmarks/deepspeed_trainings.py --quick   # one training of the vision transformer

A byte-level GPT on German law and a vision transformer on digits, at the settings that
convergence.py found best for one process. Each rank has half of the batch, so that all stages
should end as one process does, but for rounding. Finished trainings go into
docs/deepspeed_trainings.jsonl, the table into docs/deepspeed_proposal.md.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from functools import partial
from itertools import product
from typing import Annotated, Any

import common
import convergence
import digits
import optimizers
import torch
from common import ROOT, Quick
from convergence import BASE, CELLS, OURS, final_runs
from convergence_report import mean, with_block
from convergence_tasks import SEQ_LEN, SEQUENCES, task_of, text
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer
from trainings import CLIP, Done, Result, Run, carry_out, commit, measured, processor, read, schedule, versions
from typer import Option

FILE = ROOT / "docs" / "deepspeed_trainings.jsonl"
TASKS, STAGES, SEEDS, WORLD = ("laws64x20", "vit"), (1, 2, 3), 3, 2
NAMES = {BASE: "AdamW", OURS: "AdaFisher"}  # as a DeepSpeed config has them


def wanted(done: Done) -> Iterator[Run]:
    """Each seed at each stage, at the settings of the same training in one process."""
    alone = read(convergence.FILE)
    for task, seed, stage, name in product(TASKS, range(SEEDS), STAGES, NAMES):
        cell = next(cell for cell in CELLS if cell.task == task)
        for run in final_runs(cell, name, alone)[0]:
            if run.seed == seed:
                yield Run(f"{task} zero{stage}", run.optimizer, run.lr, run.wd, seed, run.settings)


def quick(done: Done) -> Iterator[Run]:
    yield Run("vit zero2", "adafisher", 3e-3)


def one(run: Run) -> Result:
    """A training by WORLD ranks; what rank 0 measured."""
    return Result(*common.on_ranks(train, WORLD, run, deepspeed=True)[0])


def train(rank: int, world: int, run: Run) -> tuple[Any, ...]:
    """Train by a DeepSpeed engine; a `Result`'s fields, with this rank's own bytes of state."""
    import deepspeed

    name, stage = run.task.split(" zero")
    task = task_of(name)
    torch.manual_seed(run.seed)
    model = task.build(run.seed)
    made = optimizers.build(run.optimizer, model, run.lr, run.wd, json.loads(run.settings))
    engine = deepspeed.initialize(model=model, model_parameters=groups_of(made), config=config(run, int(stage)))[0]
    losses: list[float | None] = []
    marks = {round(task.steps * i / 10) for i in range(1, 11)}
    own = slice(rank, None, world)
    step_loss = partial(_language if name.startswith("laws") else _vision, engine, run.seed, own)
    began = time.process_time()
    for step in range(task.steps):
        for group in engine.optimizer.param_groups:
            group["lr"] = run.lr * schedule(step, task.steps)
        engine.backward(step_loss(step))
        engine.step()
        if step + 1 in marks:
            losses.append(measured(task.test or task.validate, engine))
    seconds = round(time.process_time() - began, 1)
    held = optimizers.state_bytes([engine.basic_optimizer]) / sum(p.numel() for p in task.build(0).parameters())
    used = f"{versions()}, deepspeed {deepspeed.__version__}"
    return tuple(losses), commit(), seconds, processor(), round(held, 2), used


def groups_of(made: list[Optimizer]) -> list[dict[str, Any]]:
    """What the optimizers of one process have as parameter groups, without their learning rates."""
    kept = ("params", "weight_decay", "max_blocks")
    return [{key: group[key] for key in kept if key in group} for each in made for group in each.param_groups]


def config(run: Run, stage: int) -> dict[str, Any]:
    own: dict[str, Any] = {"lr": run.lr, "weight_decay": run.wd, **json.loads(run.settings)}
    if run.optimizer == "adamw":
        own |= {"betas": [own.pop("beta1", 0.9), own.pop("beta2", 0.95)], "torch_adam": True}
    kind = next(NAMES[name] for name, (builder, *_) in convergence.CONTENDERS.items() if builder == run.optimizer)
    return {
        "train_micro_batch_size_per_gpu": 1,  # what is counted is ours to cut
        "optimizer": {"type": kind, "params": own},
        "zero_optimization": {"stage": stage},
        "gradient_clipping": CLIP,
    }


def _language(engine: nn.Module, seed: int, own: slice, step: int) -> Tensor:
    return engine(text("laws").batch(seed, step, SEQUENCES, SEQ_LEN)[own])


def _vision(engine: nn.Module, seed: int, own: slice, step: int) -> Tensor:
    images, labels = digits.batch(seed, step)
    return functional.cross_entropy(engine(images[own]), labels[own])


def table(done: Done) -> str:
    """Final losses by task and optimizer: one process, then each stage."""
    lines = ["| task, optimizer | one process | ZeRO-1 | ZeRO-2 | ZeRO-3 |", "| --- |" + " ---: |" * 4]
    alone = read(convergence.FILE)
    for task, name in product(TASKS, NAMES):
        cell = next(cell for cell in CELLS if cell.task == task)
        runs = final_runs(cell, name, alone)[0][:SEEDS]
        columns = [[alone[run] for run in runs if run in alone]]
        for stage in STAGES:
            here = [Run(f"{task} zero{stage}", r.optimizer, r.lr, r.wd, r.seed, r.settings) for r in runs]
            columns.append([done[run] for run in here if run in done])
        lines.append(f"| {task}, {name} | {' | '.join(_cell(results) for results in columns)} |")
    return "\n".join(lines) + "\n"


def _cell(results: list[Result]) -> str:
    if not results:
        return "–"
    loss, error = mean(results)
    return f"{loss:.4f} ± {error:.4f} ({len(results)})" if len(results) > 1 else f"{loss:.4f} (1)"


def main(
    quickly: Quick = False,
    report: Annotated[bool, Option("--report", help="Train nothing: the table of what is there.")] = False,
) -> None:
    """Train all there is to train, or go on with it, and write the table."""
    if quickly:
        carry_out(quick, ROOT / "runs" / "bench" / "deepspeed_trainings.jsonl", one, 1)
        return
    if not report:
        carry_out(wanted, FILE, one, 1)
    page = ROOT / "docs" / "deepspeed_proposal.md"
    page.write_text(with_block(page.read_text(encoding="utf-8"), "trainings", table(read(FILE))), encoding="utf-8")
    print(table(read(FILE)))


if __name__ == "__main__":
    common.start(main)
