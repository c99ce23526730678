"""Speed on a GPU: blocks beside their floor, steps beside other optimizers, share of training.

    python benchmarks/gpu/fast.py [--out FOLDER] [--rehearse]    # writes FOLDER/fast.json

`make gpu` calls it.

- blocks: a step of 1 GB of blocks of one kind, beside the least that its bytes and its products
  take (fast_blocks.py).
- steps: one optimizer's step on all parameters of a GPT, with random gradients. `device_ms`:
  between two events, the launches queued ahead as they are behind a backward; `host_ms`: until
  `step()` returns, which is what keeps the next forward from being queued; `wall_ms`: from an idle
  device to an idle device. Medians; `wall_ms_mean` is the mean of wall_ms, since some optimizers
  have a slow step in every ten. A step that waits for the device, as AdaFisher's with exponent 1
  does, cannot be queued ahead: its device_ms has those waits in it.
- share: forward and backward of a GPT, and the step on an eighth of each of its parameters' blocks,
  which is what one of eight ranks owns. What travels between ranks is not in it.

The most important comes first; what the time does not suffice for is named in `left_out`. An error
ends one number, and one after which the device answers no more ends the process, which starts again
behind it.
"""

from __future__ import annotations

import common_gpu  # first: it puts the other folders into sys.path  # isort: skip

import argparse
import importlib.util
import multiprocessing
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import gpt
import torch
from clocks import Effort, Memory, Row, Step, answers, free, synchronize, time_step
from common_gpu import Results, left, said
from fast_blocks import STATE_BYTES, Block, Speeds, measure, speeds
from gpt import GPT, SHAPES, TINY, Shape
from torch import nn

from adafisher_dist import AdaFisher
from adafisher_dist.settings import DEFAULTS

SECONDS, REHEARSAL_SECONDS = 122, 70
RANKS, ROWS = 8, DEFAULTS["rows_per_block"]
EFFORT, REHEARSAL_EFFORT = Effort(3, 20), Effort(0, 1)
SOAP_SECONDS, SOAP_CYCLE = 40, 10
SPEEDS = ("copy_bytes_a_second", "flops_a_second", "half_flops_a_second")
BASE, OURS = "AdamW (fused)", "AdaFisher"

Named = Mapping[str, nn.Parameter]


@dataclass(frozen=True, slots=True)
class Item:
    """A number, or some that belong together.

    Attributes:
        section: the list of fast.json that its row is appended to.
        name: of the row.
        seconds: it is not begun with less left.
        run: makes the row.
    """

    section: str
    name: str
    seconds: float
    run: Callable[[], Row]


class LeftOutError(Exception):
    """Something is not measured, for a reason that is no failure."""


# ---- processes of their own ----


class Apart:
    """A call in a process of its own: what crashes or hangs there does no harm here."""

    def __init__(self, fn: Callable[..., Any], *args: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self._receiver, sender = context.Pipe(duplex=False)
        self._process = context.Process(target=_answer, args=(sender, fn, args), daemon=True)
        self._process.start()
        sender.close()

    def result(self, seconds: float) -> Any:
        """What it returned; to be asked once.

        Raises:
            RuntimeError: it failed or died.
            LeftOutError: it took more than so many seconds from now.
        """
        try:
            if not self._receiver.poll(max(0.0, seconds)):
                raise LeftOutError(f"it was not done after {seconds:.0f} s")
            good, value = self._receiver.recv()
            self._process.join(10)
        except EOFError:
            self._process.join(10)
            raise RuntimeError(f"its process died (status {self._process.exitcode})") from None
        finally:
            self.end()
        if not good:
            raise RuntimeError(value)
        return value

    def end(self) -> None:
        """Leave no process behind."""
        self._process.kill()
        self._process.join(10)


def _answer(sender: Connection, fn: Callable[..., Any], args: tuple[Any, ...]) -> None:
    try:
        answer = (True, fn(*args))
    except Exception as error:
        answer = (False, said(error))
    sender.send(answer)
    sender.close()


# ---- steps ----


def optimizers() -> dict[str, Callable[[Named], Step]]:
    """By name, what builds them and returns their step; AdamW first."""
    return {
        BASE: lambda named: torch.optim.AdamW(named.values(), fused=True).step,
        OURS: adafisher,
        "Muon, AdamW (fused) for the rest": muon,
        f"{OURS}, packed": partial(adafisher, packed=True),
        f"{OURS}, bf16 Fisher": partial(adafisher, fisher_dtype=torch.bfloat16),
        f"{OURS}, exponent 1": partial(adafisher, exponent=1.0),
        "SOAP": soap,
    }


def adafisher(named: Named, **settings: Any) -> Step:
    return AdaFisher(named.items(), **settings).step


def muon(named: Named) -> Step:
    hidden = [p for name, p in named.items() if gpt.is_hidden(name, p)]
    rest = [p for name, p in named.items() if not gpt.is_hidden(name, p)]
    first, second = torch.optim.Muon(hidden), torch.optim.AdamW(rest, fused=True)

    def step() -> None:
        first.step()
        second.step()

    return step


def soap(named: Named) -> Step:
    from pytorch_optimizer import SOAP

    return SOAP(list(named.values()), precondition_frequency=SOAP_CYCLE).step


def with_gradients(model: nn.Module, device: torch.device) -> dict[str, nn.Parameter]:
    """Its parameters by name, with random gradients as small as a large model's."""
    generator = torch.Generator(device).manual_seed(1)
    named = dict(model.named_parameters())
    for parameter in named.values():
        parameter.grad = torch.empty_like(parameter).normal_(std=1e-3, generator=generator)
    return named


def measure_step(shape: Shape, name: str, rehearse: bool) -> Row:
    """One optimizer on a GPT's parameters."""
    device = torch.device("cpu" if rehearse else "cuda")
    named = with_gradients(gpt.build(shape, device), device)
    memory = Memory(device)
    step = optimizers()[name](named)
    cycle = SOAP_CYCLE if name == "SOAP" and not rehearse else 1
    timed = time_step(step, device, REHEARSAL_EFFORT if rehearse else EFFORT, cycle)
    parameters = sum(p.numel() for p in named.values())
    return {"model": shape.title, "optimizer": name, "parameters": parameters, **timed, **memory.row()}


# ---- the share of a training step ----


def eighth(model: GPT) -> dict[str, nn.Parameter]:
    """What one rank of 8 owns, with gradients: an eighth of the layers and of embedding rows."""
    layers = -(-len(model.layers) // RANKS)
    own = {}
    for name, parameter in model.named_parameters():
        stop = len(parameter)
        if name.startswith("layers."):
            stop = stop if int(name.split(".")[1]) < layers else 0
        elif parameter.dim() == 2:
            stop = min(stop, ROWS * -(-stop // (ROWS * RANKS)))  # no rows that share a block are parted
        if stop and parameter.grad is not None:
            own[name] = nn.Parameter(parameter.detach()[:stop].clone())
            own[name].grad = parameter.grad[:stop].clone()
    return own


def measure_share(shape: Shape, rehearse: bool) -> Row:
    """Time forward and backward of the model, and two optimizers' steps on an eighth of it.

    One of those may fail.
    """
    device = torch.device("cpu" if rehearse else "cuda")
    effort = REHEARSAL_EFFORT if rehearse else EFFORT
    model = gpt.build(shape, device)
    tokens = torch.randint(shape.vocabulary, (shape.batch, shape.seq_len + 1), device=device)

    def forward_and_backward() -> None:
        model.zero_grad()
        with torch.autocast(device.type, torch.bfloat16):
            loss = model(tokens[:, :-1], tokens[:, 1:])
        loss.backward()

    whole = time_step(forward_and_backward, device, effort)
    own = eighth(model)
    cases: dict[str, Row] = {}
    for name in (OURS, BASE):
        free(device)
        try:
            timed = time_step(optimizers()[name](own), device, effort)
        except Exception as error:
            synchronize(device)  # raises where the device is lost: then nothing after it would be true
            cases[name] = {"failure": said(error)}
        else:
            shares = {
                f"share_{k}": timed[f"{k}_ms"] / (timed[f"{k}_ms"] + whole[f"{k}_ms"]) for k in ("device", "wall")
            }
            cases[name] = {**timed, **shares}
    return {
        "model": shape.title,
        "tokens": f"{shape.batch} × {shape.seq_len}",
        "ranks": RANKS,
        "parameters": sum(p.numel() for p in model.parameters()),
        "own": sum(p.numel() for p in own.values()),
        "forward_and_backward": whole,
        "cases": cases,
    }


# ---- in order ----


class Plan:
    """The items, the most important first.

    Attributes:
        usual, slow: seconds that most items may take, and that SOAP's may.
    """

    def __init__(self, given: argparse.Namespace, results: Results) -> None:
        self.given, self.results = given, results
        self.usual, self.slow = (1.0, 1.0) if given.rehearse else (9.0, 20.0)
        self.shapes = TINY if given.rehearse else SHAPES

    def items(self) -> list[Item]:
        first, *others = self.shapes
        usual, more, slow = list(optimizers())[:3], list(optimizers())[3:6], list(optimizers())[6]
        blocks, other_blocks = _blocks(self.given.rehearse)
        return [
            *(self._block(block) for block in blocks),
            *(self._step(first, name) for name in usual),
            self._share(first),
            *(self._step(other, name) for other in others for name in usual),
            *(self._step(first, name) for name in more),
            *(self._block(block) for block in other_blocks),
            *(self._step(other, name) for other in others for name in more),
            *(self._step(shape, slow) for shape in (*others, first)),
        ]

    def _block(self, block: Block) -> Item:
        content = self.results.content
        speed = Speeds(*(content[key] for key in SPEEDS))
        size, device = (3 * block.bytes, "cpu") if self.given.rehearse else (STATE_BYTES, "cuda")
        return Item("blocks", block.name, self.usual, partial(measure, block, size, speed, torch.device(device)))

    def _step(self, key: str, name: str) -> Item:
        shape, rows, slow = self.shapes[key], self.results.content["steps"], name == "SOAP"

        def run() -> Row:
            missing = lacking(name)
            if missing is not None:
                raise LeftOutError(missing)
            measure = partial(measure_step, shape, name, self.given.rehearse)
            # SOAP's first step takes long and cannot be interrupted; in a process of its own it
            # can.
            seconds = min(SOAP_SECONDS, left(self.given) - 3)
            row = Apart(measure).result(seconds) if slow else measure()
            return {**row, "to_adamw": to_adamw(row, rows)}

        return Item("steps", f"{name}, {shape.title}", self.slow if slow else self.usual, run)

    def _share(self, key: str) -> Item:
        run = partial(measure_share, self.shapes[key], self.given.rehearse)
        return Item("share", f"share, {self.shapes[key].title}", 1.5 * self.usual, run)


def _blocks(rehearse: bool) -> tuple[list[Block], list[Block]]:
    """What is measured early, and what late."""
    if rehearse:
        return [Block(4, 2)], [Block(4, 1, "bfloat16", packed=True)]
    first = [Block(size, rows) for size, rows in ((128, 64), (128, 1), (64, 64), (128, 16), (64, 16), (64, 1))]
    return first, [replace(block, **own) for own in ({"dtype": "bfloat16"}, {"packed": True}) for block in first[:3]]


def lacking(name: str) -> str | None:
    """Why an optimizer cannot be built here, or None."""
    if name == "SOAP" and importlib.util.find_spec("pytorch_optimizer") is None:
        return "pytorch_optimizer is not installed"
    if name.startswith("Muon") and not hasattr(torch.optim, "Muon"):
        return f"torch {torch.__version__} has no Muon"
    return None


def to_adamw(row: Row, rows: list[Row]) -> dict[str, float]:
    """Ratios to AdamW's row of the same model, where that is there."""
    base = next((r for r in rows if r.get("model") == row["model"] and r.get("optimizer") == BASE), row)
    keys = ("device_ms", "host_ms", "wall_ms", "state_bytes")
    return {key: row[key] / base[key] for key in keys if row.get(key) and base.get(key)}


def work(given: argparse.Namespace, results: Results, plan: Plan) -> None:
    """Do what is not done yet, while there is time."""
    device = torch.device("cpu" if given.rehearse else "cuda")
    content = results.content
    content["left_out"] = []
    for item in plan.items():
        if any(row["name"] == item.name for row in content[item.section]):
            continue  # before this process started itself again
        try:
            if left(given) < item.seconds:
                raise LeftOutError(f"{left(given):.0f} s were left")
            row = item.run()
        except LeftOutError as why:
            content["left_out"].append({"name": item.name, "why": str(why)})
            print(f"{item.name}: left out, {why}")
        except Exception as error:
            _tell(results, item, {"failure": said(error)})
            if not answers(device):
                start_again()
        else:
            _tell(results, item, row)
        results.save()
        free(device)


def _tell(results: Results, item: Item, row: Row) -> None:
    results.content[item.section].append({"name": item.name, **row})
    results.save()
    if "failure" in row:
        print(f"{item.name}: FAILED: {row['failure']}")
    elif item.section == "blocks":
        print(f"{item.name}: {row['step_ms']:.2f} ms; floors {row['bytes_ms']:.2f} and {row['flops_ms']:.2f} ms")
    elif item.section == "steps":
        times = ", ".join(f"{key} {row[f'{key}_ms']:.2f} ms" for key in ("device", "host", "wall"))
        print(f"{item.name}: {times}, first step {row['first_step_seconds']:.1f} s")
    else:
        print(f"{item.name}: forward and backward {row['forward_and_backward']['device_ms']:.1f} ms")
        for name, case in row["cases"].items():
            told = case.get("failure") or f"{case['device_ms']:.2f} ms, {100 * case['share_device']:.1f} % of a step"
            print(f"  {name}: {told}")


def start_again() -> None:
    """As a new process, behind what the JSON has."""
    print("The device answers no more: starting again behind that.")
    sys.stdout.flush()
    again = [word for word in sys.argv[1:] if word != "--resume"]
    os.execv(sys.executable, [sys.executable, sys.argv[0], *again, "--resume"])


def failures(content: Mapping[str, Any]) -> list[str]:
    """The names of what failed."""
    rows = [row for section in ("blocks", "steps", "share") for row in content[section]]
    failed = [row["name"] for row in rows if "failure" in row]
    cases = [(row["name"], name, case) for row in rows for name, case in row.get("cases", {}).items()]
    return failed + [f"{of}: {name}" for of, name, case in cases if "failure" in case]


def main() -> int:
    given = common_gpu.options("fast", __doc__, SECONDS, REHEARSAL_SECONDS)
    torch.set_num_threads(1)
    results = Results(given, **dict.fromkeys(SPEEDS), blocks=[], steps=[], share=[], left_out=[])
    content = results.content
    if content["copy_bytes_a_second"] is None:
        device = torch.device("cpu" if given.rehearse else "cuda")
        content |= zip(SPEEDS, speeds(device, 2**20, 64) if given.rehearse else speeds(device), strict=True)
        free(device)
    work(given, results, Plan(given, results))
    results.finish()
    failed = failures(results.content)
    print(f"fast: {len(failed)} failed, {len(results.content['left_out'])} left out")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
