"""Step time beside AdamW, Muon, SOAP, Shampoo and forward and backward, in one process.

    python benchmarks/step_time.py                # writes docs/step_time.json and .svg
    python benchmarks/step_time.py --width 256    # a wider model, into runs/bench

Rounds of all candidates in turn, so that a machine whose speed drifts slows all alike, each on a
copy of the same parameters and with the same gradients. Ratios; absolute times are given for a GPU
only.
"""

from __future__ import annotations

import inspect
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import common
import figures
import torch
from common import Quick, rounded, spread
from model import ByteTransformer
from optimizers import polar_in_float32
from rich.table import Table
from torch import Tensor, nn
from typer import Option

from adafisher_dist import AdaFisher

# What is refreshed every few steps is counted over whole cycles of this many steps.
CYCLE = 10
# AdaFisher's interval between refreshes grows from 1 to inverse_update_freq = 10 while the Fisher
# fills, as round(10 (1 − ρᵏ)) (DESIGN.md, "Old factors"). At ρ = 0.95 it is 10 from k = 59 on, and
# only then is counted.
WARM_UP, FILLED = 12, 60
CYCLES, CYCLES_QUICK = 3, 2
BATCH, SEQ_LEN = 32, 128
WIDTH = 96
MODEL = {"width": WIDTH, "layers": 3, "heads": 4, "seq_len": SEQ_LEN}
DEFAULT_SIZE = 128
BASE, FORWARD = "AdamW (foreach)", "forward and backward"

Named = dict[str, nn.Parameter]


@dataclass(slots=True)
class Candidate:
    """An optimizer with its own copy of the parameters.

    Attributes:
        parameters: the copies, in the model's order.
        step: takes one step on the gradients that are there.
        warm_up: steps before the counted ones.
        periodic: whether it does other work in some steps of a cycle than in others.
        seconds: of each counted step.
    """

    parameters: list[nn.Parameter]
    step: Callable[[], Any]
    warm_up: int = WARM_UP
    periodic: bool = False
    seconds: list[float] = field(default_factory=list)


def candidates(model: nn.Module, quick: bool) -> dict[str, Candidate]:
    """All by name, AdamW first."""
    made: dict[str, Candidate] = {}

    def add(name: str, build: Callable[[Named], Callable[[], Any]], **more: Any) -> None:
        named = {key: nn.Parameter(p.detach().clone()) for key, p in model.named_parameters()}
        for parameter in named.values():
            parameter.grad = torch.zeros_like(parameter)
        made[name] = Candidate(list(named.values()), build(named), **more)

    add(BASE, lambda named: torch.optim.AdamW(named.values(), foreach=True).step)
    add("AdamW (fused)", lambda named: torch.optim.AdamW(named.values(), fused=True).step)
    if hasattr(torch.optim, "Muon"):  # torch 2.9
        in_float32 = next(model.parameters()).device.type == "cpu"
        if in_float32:  # where bfloat16 is slow
            torch.optim._muon._zeropower_via_newtonschulz = polar_in_float32
        add(f"Muon{' in float32' if in_float32 else ''}, AdamW for the rest", muon)
    for name, settings in adafishers(quick).items():
        periodic = settings["inverse_update_freq"] > 1
        add(
            name,
            lambda named, settings=settings: AdaFisher(named.items(), **settings).step,
            warm_up=FILLED if periodic else WARM_UP,
            periodic=periodic,
        )
    others(add, quick)
    return made


def muon(named: Named) -> Callable[[], Any]:
    """Muon for the matrices between embeddings and head, as its authors use it."""
    hidden = {key: p for key, p in named.items() if p.dim() == 2 and key.startswith("layers.")}
    first = torch.optim.Muon(hidden.values())
    second = torch.optim.AdamW([p for key, p in named.items() if key not in hidden], foreach=True)
    return lambda: (first.step(), second.step())


def adafishers(quick: bool) -> dict[str, dict[str, Any]]:
    """Settings by name. Rows of 96 and 384 have pieces of 32, 48 or 64, and 96 or 128."""
    sizes, packs = ((32, DEFAULT_SIZE) if quick else (32, 64, DEFAULT_SIZE)), [False]
    if "packed" in inspect.signature(AdaFisher.__init__).parameters:
        packs.append(True)
    result = {}
    for size in sizes:
        for packed in packs if size == DEFAULT_SIZE else [False]:
            for dtype in [torch.float32] if quick else [torch.float32, torch.bfloat16]:
                for every in (1, CYCLE):
                    name = f"AdaFisher b={size}" + (" (default)" if size == DEFAULT_SIZE else "")
                    name += ", bf16" if dtype == torch.bfloat16 else ""
                    name += (", packed" if packed else "") + (f", every {every}" if every > 1 else "")
                    settings = {"block_size": size, "fisher_dtype": dtype, "inverse_update_freq": every}
                    result[name] = settings | ({"packed": True} if packed else {})
    return result


def others(add: Callable[..., None], quick: bool) -> None:
    """SOAP and Shampoo of pytorch_optimizer 4.1.0 with their defaults except the refresh interval.

    SOAP: every 10 steps is its default and its paper's; every step is what AdaFisher's default is
    to be compared with. It refreshes all its eigenbases in the same step, by one QR each; vectors
    are left to Adam (precondition_1d=False). Every dimension here is below max_precondition_dim, so
    it keeps the whole factors of up to 384 × 384.

    Shampoo: its default is every step (preconditioning_compute_steps=1), by an SVD of every factor,
    those of vectors included, and without momentum. Every 10 steps stands beside AdaFisher's and
    SOAP's 10. Its ScalableShampoo cuts factors into blocks and would start at step 25, refreshing
    every 1000 steps: every 10 and a start at once are set, the inverse root by Schur-Newton as by
    default. Blocks of 128 instead of 512 are what suits matrices this small.
    """
    try:
        from pytorch_optimizer import SOAP, ScalableShampoo, Shampoo
    except ImportError:
        print("pytorch_optimizer is not installed, so SOAP and Shampoo are left out: pip install '.[bench]'")
        return
    for every in [CYCLE] if quick else [1, CYCLE]:
        more = {"periodic": every > 1}
        end = f", every {every}" if every > 1 else ""
        add(
            f"SOAP{end}",
            lambda named, every=every: SOAP(list(named.values()), precondition_frequency=every).step,
            **more,
        )
        add(
            f"Shampoo{end}",
            lambda named, every=every: Shampoo(list(named.values()), preconditioning_compute_steps=every).step,
            **more,
        )
    scalable = {"block_size": 128, "start_preconditioning_step": 1, "preconditioning_compute_steps": CYCLE}
    add(
        f"ScalableShampoo, every {CYCLE}",
        lambda named: ScalableShampoo(list(named.values()), **scalable).step,
        periodic=True,
    )


def main(
    quick: Quick = False,
    width: Annotated[int, Option(min=8, help="Of the model; figures of another are not kept in docs.")] = WIDTH,
) -> None:
    """Time an optimizer's step as a ratio to AdamW's and to forward and backward."""
    MODEL["width"] = width
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    model = ByteTransformer(**MODEL).to(device)
    everyone = candidates(model, quick)
    forward = rounds(model, everyone, device, CYCLE * (CYCLES_QUICK if quick else CYCLES))
    report = {name: ratios(candidate, everyone[BASE], forward, device) for name, candidate in everyone.items()}
    base = everyone[BASE].seconds
    ratio = spread([statistics.median(b) / statistics.median(a) for a, b in paired(base, forward)])
    show(report, ratio, sum(p.numel() for p in model.parameters()), device)
    result = {
        "device": device.type,
        "model": {**MODEL, "batch": BATCH, "parameters": sum(p.numel() for p in model.parameters())},
        "counted_steps": len(forward),
        "forward_and_backward_to_adamw": ratio,
        **({"forward_and_backward_milliseconds": 1e3 * statistics.median(forward)} if device.type == "cuda" else {}),
        "optimizers": report,
    }
    options = (" --quick" if quick else "") + (f" --width {width}" if width != WIDTH else "")
    command = f"python benchmarks/step_time.py{options}"
    common.save("step_time", bool(options), rounded(result), draw, command=command)


def rounds(model: nn.Module, everyone: dict[str, Candidate], device: torch.device, counted: int) -> list[float]:
    """Fill in the seconds of each candidate's counted steps; returns those of forward and backward.

    The model is trained meanwhile, by an AdamW of its own, so that gradients are those of a
    training. A candidate that cannot go on is taken out.
    """
    trainer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    forward: list[float] = []
    longest = max(candidate.warm_up for candidate in everyone.values())
    for number in range(-longest, counted):
        tokens = torch.randint(256, (BATCH, SEQ_LEN + 1), device=device)
        took = timed(lambda tokens=tokens: forward_and_backward(model, tokens), device)
        gradients = [p.grad for p in model.parameters()]
        for name, candidate in list(everyone.items()):
            if number >= -candidate.warm_up:
                # Its own, since Shampoo changes the gradient.
                torch._foreach_copy_([p.grad for p in candidate.parameters], gradients)
                try:
                    own = timed(candidate.step, device)
                except torch.linalg.LinAlgError as error:  # of Shampoo's SVD, of which no library is free
                    print(f"{name} is left out, since it failed: {error}")
                    del everyone[name]
                    continue
                if number >= 0:
                    candidate.seconds.append(own)
        trainer.step()
        if number >= 0:
            forward.append(took)
    return forward


def forward_and_backward(model: nn.Module, tokens: Tensor) -> None:
    model.zero_grad()
    model(tokens[:, :-1], tokens[:, 1:]).mean().backward()


def timed(run: Callable[[], Any], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def cycles(seconds: Sequence[float]) -> list[Sequence[float]]:
    return [seconds[start : start + CYCLE] for start in range(0, len(seconds), CYCLE)]


def paired(a: Sequence[float], b: Sequence[float]) -> Iterator[tuple[Sequence[float], Sequence[float]]]:
    return zip(cycles(a), cycles(b), strict=True)


def by_phase(seconds: Sequence[float]) -> list[float]:
    """Median over cycles of each step of a cycle: random stalls disappear, real spikes remain."""
    return [statistics.median(seconds[phase::CYCLE]) for phase in range(CYCLE)]


def ratios(candidate: Candidate, base: Candidate, forward: list[float], device: torch.device) -> dict[str, Any]:
    """An optimizer's ratios, cycle by cycle, so that both sides ran under the same conditions."""
    average = statistics.fmean if candidate.periodic else statistics.median

    def compare(others: list[float]) -> dict[str, float]:
        return spread([average(own) / statistics.median(other) for own, other in paired(candidate.seconds, others)])

    to_forward = compare(forward)
    phases = by_phase(candidate.seconds)
    return {
        "to_adamw": compare(base.seconds),
        "to_forward_and_backward": to_forward,
        "share_of_training_step": to_forward["median"] / (1 + to_forward["median"]),
        "slowest_to_median_step": max(phases) / statistics.median(phases),
        **({"milliseconds": 1e3 * average(candidate.seconds)} if device.type == "cuda" else {}),
    }


def show(report: dict[str, dict[str, Any]], forward: dict[str, float], parameters: int, device: torch.device) -> None:
    on_gpu = device.type == "cuda"
    table = Table(title=f"Optimizer step, {parameters:,} parameters, {BATCH} × {SEQ_LEN} bytes, {device.type}")
    headings = ("/ AdamW (foreach)", "min to max", f"/ {FORWARD}", "of a training step", "slowest / median step")
    for heading in ("", *headings, *(["ms"] if on_gpu else [])):
        table.add_column(heading, justify="right" if heading else "left")
    table.add_row(FORWARD, f"{forward['median']:.1f}", f"{forward['min']:.1f} to {forward['max']:.1f}", "1.000", "", "")
    for name, row in report.items():
        adamw = row["to_adamw"]
        table.add_row(
            name,
            f"{adamw['median']:.1f}",
            f"{adamw['min']:.1f} to {adamw['max']:.1f}",
            f"{row['to_forward_and_backward']['median']:.3f}",
            f"{100 * row['share_of_training_step']:.1f} %",
            f"{row['slowest_to_median_step']:.2f}",
            *([f"{row['milliseconds']:.2f}"] if on_gpu else []),
        )
    common.show(table)


def draw(content: dict[str, Any]) -> Any:
    """The mean cost of each optimizer; and how much of it one step of a cycle takes."""
    found = content["optimizers"]
    shown = [name for name in found if not name.startswith("AdaFisher") or _differs_once(name)]
    spiky = [name for name in shown if name in (BASE, OURS) or name.endswith(f"every {CYCLE}")]
    figure, (shares, spikes) = figures.panels([figures.height(len(shown)), figures.height(len(spiky))])
    rows = []
    for name in shown:
        percent = 100 * found[name]["share_of_training_step"]
        times = f"{percent:.1f} %, {found[name]['to_adamw']['median']:.2g} × AdamW's"
        rows.append((name.replace(" b=", ", block_size="), percent, times, _colour(name)))
    figures.bars(shares, rows)
    shares.set(title="The optimizer's share of a training step", xlabel="% of forward, backward and the optimizer")
    slowest = {name: found[name]["slowest_to_median_step"] for name in spiky}
    rows = [(name.replace(" b=", ", block_size="), v, f"{v:.1f} ×", _colour(name)) for name, v in slowest.items()]
    figures.bars(spikes, rows)
    spikes.set(title="The slowest step of ten", xlabel="time of the slowest step / time of the median step")
    model = content["model"]
    figures.tell(
        figure,
        f"GPT of {model['parameters'] / 1e6:.2f} M parameters, width {model['width']}, {model['batch']} ×"
        f" {model['seq_len']} bytes a step; on one {content['device'].upper()}. Medians of {content['counted_steps']}"
        " steps.",
        "AdaFisher: the defaults, but for what its line says. SOAP, ScalableShampoo: pytorch_optimizer's defaults, but"
        " for how often they refresh. SOAP alone keeps whole factors, no blocks.",
        figures.machine(content),
    )
    return figure


OURS = f"AdaFisher b={DEFAULT_SIZE} (default)"


def _differs_once(name: str) -> bool:
    """AdaFisher's default, or with one setting of another value: all pairs are in the JSON."""
    return name.count(",") <= (1 if name.startswith(OURS) else 0)


def _colour(name: str) -> str:
    if name.startswith("AdamW"):
        return figures.THEIRS
    return figures.OURS if name.startswith("AdaFisher") else figures.GREY


if __name__ == "__main__":
    common.start(main)
