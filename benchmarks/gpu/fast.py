"""How fast it is on a GPU: the kernel beside its bytes, the whole step beside other optimizers, its share of training.

    python benchmarks/gpu/fast.py [--out FOLDER] [--rehearse]       # writes FOLDER/fast.json; `make gpu` calls it

- kernel: `benchmarks/kernel.py`'s measurement, some kinds of blocks of it. Each kind is compiled, and tried on a few
  blocks, in a process of its own first, all at once: a kernel that crashes takes nothing else along.
- steps: one optimizer's step on all parameters of a GPT, with random gradients. `device_ms`: between two events, the
  launches queued ahead as they are behind a backward; `host_ms`: until `step()` returns, which is what keeps the
  next forward from being queued; `wall_ms`: from an idle device to an idle device. Medians; `wall_ms_mean` is the mean
  of wall_ms, since some optimizers have a slow step in every ten. A step that waits for the device, as AdaFisher's
  torch path does, cannot be queued ahead: its device_ms has those waits in it.
- share: forward and backward of a GPT, and the step on an eighth of each of its parameters' blocks, which is what one
  of eight ranks owns. What travels between ranks is not in it.

The most important comes first; what the time does not suffice for is named in `left_out`. An error ends one number, and
one after which the device answers no more ends the process, which starts again behind it.
"""

from __future__ import annotations

import common_gpu  # first: it puts the other folders into sys.path  # isort: skip

import argparse
import importlib.util
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import gpt
import kernel
import torch
from clocks import Memory, Row, Step, answers, free, synchronize, time_step
from common_gpu import Results, left, said
from gpt import GPT, SHAPES, TINY, Shape
from kernel import Effort
from torch import nn

from adafisher_dist import AdaFisher
from adafisher_dist.grid import Kind
from adafisher_dist.settings import DEFAULTS

SECONDS, REHEARSAL_SECONDS = 122, 70
RANKS, ROWS = 8, DEFAULTS["rows_per_block"]
EFFORT, REHEARSAL_EFFORT = Effort(3, 20), Effort(0, 1)
COMPILE_SECONDS = 75
SOAP_SECONDS, SOAP_CYCLE = 40, 10
BASE = "AdamW (fused)"

Named = Mapping[str, nn.Parameter]


@dataclass(frozen=True, slots=True)
class Block:
    """A kind of block, as the kernel is compiled for it."""

    size: int
    rows: int
    dtype: str = "float32"
    packed: bool = False

    @property
    def name(self) -> str:
        return f"b={self.size} rows={self.rows} {self.dtype}{' packed' if self.packed else ''}"

    @property
    def kind(self) -> Kind:
        return Kind(self.size, self.rows, True)

    @property
    def bytes(self) -> int:
        """Of the state of one, as kernel.measure counts it."""
        return self.size**2 * getattr(torch, self.dtype).itemsize + 8 * self.size * self.rows


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


# ---- the kernel ----


def try_kernel(block: Block, count: int, on_gpu: bool) -> float:
    """Compile the kernel for a kind of block and take a step of some; returns the seconds of that."""
    device = torch.device("cuda" if on_gpu else "cpu")
    batch = kernel.make(block.kind, getattr(torch, block.dtype), block.packed, count, device)
    steps = kernel.Steps(batch, torch.randn_like(batch.gradient_NDB), "triton", count)
    steps.prepare()
    synchronize(device)
    began = time.perf_counter()
    steps.run()
    synchronize(device)
    if not bool(batch.gradient_NDB.isfinite().all()):
        raise RuntimeError("the kernel's update is not finite")
    return time.perf_counter() - began


class Compilers:
    """Processes that try the kernel for each kind of block; the compiled code stays in Triton's cache."""

    def __init__(self, given: argparse.Namespace, results: Results, blocks: Iterable[Block]) -> None:
        self.given, self.results = given, results
        self.told = results.content["compile"]
        self.until = time.time() + COMPILE_SECONDS
        count = 2 if given.rehearse else 1000
        self.going = {b: Apart(try_kernel, b, count, not given.rehearse) for b in blocks if b.name not in self.told}

    def need(self, blocks: Iterable[Block]) -> None:
        """Wait for these.

        Raises:
            RuntimeError: the kernel failed on one of them.
        """
        for block in blocks:
            if block.name not in self.told:
                try:
                    row = {"seconds": self.going[block].result(min(self.until - time.time(), left(self.given) - 5))}
                except (RuntimeError, LeftOutError) as error:
                    row = {"failure": str(error)}
                self.told[block.name] = row
                self.results.save()
                print(f"  compiled for {block.name}: {row.get('failure') or format(row['seconds'], '.1f') + ' s'}")
            if "failure" in self.told[block.name]:
                raise RuntimeError(f"the kernel failed on {block.name}: {self.told[block.name]['failure']}")

    def end(self) -> None:
        for apart in self.going.values():
            apart.end()


def measure_kernel(block: Block, bandwidth: float, rehearse: bool) -> Row:
    dtype = getattr(torch, block.dtype)
    if rehearse:
        arguments = (3 * block.bytes, bandwidth, torch.device("cpu"), Effort(0, 1), Effort(0, 1))
    else:
        arguments = (kernel.STATE_BYTES, bandwidth, torch.device("cuda"), kernel.KERNEL, kernel.TORCH)
    return kernel.measure(block.kind, dtype, block.packed, *arguments)


# ---- steps ----


def optimizers() -> dict[str, Callable[[Named], Step]]:
    """By name, what builds them and returns their step; AdamW first."""
    return {
        BASE: lambda named: torch.optim.AdamW(named.values(), fused=True).step,
        "AdaFisher, kernel": partial(adafisher, backend="triton"),
        "AdaFisher, torch": partial(adafisher, backend="torch"),
        "Muon, AdamW (fused) for the rest": muon,
        "AdaFisher, kernel, packed": partial(adafisher, backend="triton", packed=True),
        "AdaFisher, kernel, bf16 Fisher": partial(adafisher, backend="triton", fisher_dtype=torch.bfloat16),
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
    """What one rank of eight owns, with its gradients: an eighth of the layers, and of the embeddings' rows."""
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


def measure_share(shape: Shape, rehearse: bool, need: Callable[[str], None]) -> Row:
    """Forward and backward of the whole, and optimizers' steps on an eighth; of those, one may fail.

    Args:
        shape: of the model.
        rehearse: whether it is on a CPU.
        need: raises where the kernel cannot be had for an optimizer of this name.
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
    for name in ("AdaFisher, kernel", "AdaFisher, torch", BASE):
        free(device)
        try:
            need(name)
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
        blocks: kinds of blocks for the part "kernel", by dtype; the first two are those that a GPT's parameters have.
    """

    def __init__(self, given: argparse.Namespace, results: Results) -> None:
        self.given, self.results = given, results
        self.usual, self.slow = (1.0, 1.0) if given.rehearse else (9.0, 20.0)
        self.shapes = TINY if given.rehearse else SHAPES
        self.blocks = _blocks(given.rehearse)
        of_gpt = {"AdaFisher, kernel": "float32", "AdaFisher, kernel, packed": "packed"}
        of_gpt["AdaFisher, kernel, bf16 Fisher"] = "bfloat16"
        # A rehearsal interprets: nothing needs to be compiled.
        self.of_gpt = {} if given.rehearse else {name: self.blocks[key][:2] for name, key in of_gpt.items()}
        self.compilers = Compilers(given, results, [block for each in self.blocks.values() for block in each])

    def need(self, name: str) -> None:
        """Wait until the kernel is compiled for the optimizer of this name; raises where it cannot be."""
        self.compilers.need(self.of_gpt.get(name, ()))

    def items(self) -> list[Item]:
        first, *others = self.shapes
        usual, more, slow = list(optimizers())[:4], list(optimizers())[4:6], list(optimizers())[6]
        return [
            *(self._kernel(block) for block in self.blocks["float32"]),
            *(self._step(first, name) for name in usual),
            self._share(first),
            *(self._step(other, name) for other in others for name in usual),
            *(self._step(first, name) for name in more),
            *(self._kernel(block) for block in self.blocks["bfloat16"]),
            *(self._step(other, name) for other in others for name in more),
            *(self._step(shape, slow) for shape in (*others, first)),
        ]

    def _kernel(self, block: Block) -> Item:
        def run() -> Row:
            self.compilers.need([block])
            return measure_kernel(block, self.results.content["copy_bytes_a_second"], self.given.rehearse)

        return Item("kernel", block.name, self.usual, run)

    def _step(self, key: str, name: str) -> Item:
        shape, rows, slow = self.shapes[key], self.results.content["steps"], name == "SOAP"

        def run() -> Row:
            missing = lacking(name)
            if missing is not None:
                raise LeftOutError(missing)
            self.need(name)
            measure = partial(measure_step, shape, name, self.given.rehearse)
            # SOAP's first step takes long and cannot be interrupted; in a process of its own it can.
            seconds = min(SOAP_SECONDS, left(self.given) - 3)
            row = Apart(measure).result(seconds) if slow else measure()
            return {**row, "to_adamw": to_adamw(row, rows)}

        return Item("steps", f"{name}, {shape.title}", self.slow if slow else self.usual, run)

    def _share(self, key: str) -> Item:
        run = partial(measure_share, self.shapes[key], self.given.rehearse, self.need)
        return Item("share", f"share, {self.shapes[key].title}", 1.5 * self.usual, run)


def _blocks(rehearse: bool) -> dict[str, list[Block]]:
    if rehearse:
        return {"float32": [Block(4, 2)], "bfloat16": [], "packed": []}
    order = [(128, 64), (128, 1), (64, 64), (128, 16), (64, 16), (64, 1)]
    return {
        "float32": [Block(*each) for each in order],
        "bfloat16": [Block(*each, "bfloat16") for each in order],
        "packed": [Block(*each, "float32", True) for each in order[:2]],
    }


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
                start_again(plan)
        else:
            _tell(results, item, row)
        results.save()
        free(device)


def _tell(results: Results, item: Item, row: Row) -> None:
    results.content[item.section].append({"name": item.name, **row})
    results.save()
    if "failure" in row:
        print(f"{item.name}: FAILED: {row['failure']}")
    elif item.section == "kernel":
        print(
            f"{item.name}: kernel {row['kernel_ms']:.3f} ms, floor {row['floor_ms']:.3f}, torch {row['torch_ms']:.1f}"
        )
    elif item.section == "steps":
        times = ", ".join(f"{key} {row[f'{key}_ms']:.2f} ms" for key in ("device", "host", "wall"))
        print(f"{item.name}: {times}, first step {row['first_step_seconds']:.1f} s")
    else:
        print(f"{item.name}: forward and backward {row['forward_and_backward']['device_ms']:.1f} ms")
        for name, case in row["cases"].items():
            told = case.get("failure") or f"{case['device_ms']:.2f} ms, {100 * case['share_device']:.1f} % of a step"
            print(f"  {name}: {told}")


def start_again(plan: Plan) -> None:
    """As a new process, behind what the JSON has."""
    print("The device answers no more: starting again behind that.")
    plan.compilers.end()
    sys.stdout.flush()
    again = [word for word in sys.argv[1:] if word != "--resume"]
    os.execv(sys.executable, [sys.executable, sys.argv[0], *again, "--resume"])


def failures(content: Mapping[str, Any]) -> list[str]:
    """The names of what failed."""
    rows = [row for section in ("kernel", "steps", "share") for row in content[section]]
    failed = [row["name"] for row in rows if "failure" in row]
    cases = [(row["name"], name, case) for row in rows for name, case in row.get("cases", {}).items()]
    return failed + [f"{of}: {name}" for of, name, case in cases if "failure" in case]


def main() -> int:
    given = common_gpu.options("fast", __doc__, SECONDS, REHEARSAL_SECONDS)
    torch.set_num_threads(1)
    results = Results(given, copy_bytes_a_second=None, compile={}, kernel=[], steps=[], share=[], left_out=[])
    if results.content["copy_bytes_a_second"] is None:  # while nothing else uses the device
        device, numel = ("cpu", 2**20) if given.rehearse else ("cuda", kernel.STATE_BYTES)
        results.content["copy_bytes_a_second"] = kernel.copy_bandwidth(torch.device(device), numel)
        free(torch.device(device))
    plan = Plan(given, results)
    try:
        work(given, results, plan)
    finally:
        plan.compilers.end()
    results.finish()
    failed = failures(results.content)
    print(f"fast: {len(failed)} failed, {len(results.content['left_out'])} left out")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
