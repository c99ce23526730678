"""Draws docs/training_curves.png from trials.jsonl: `python benchmarks/development/curve.py`.

Held-out loss by text seen, AdamW, Muon and AdaFisher on gpt64x20 at their best rate tried, seeds 0
to 2.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path

from matplotlib.figure import Figure

HERE = Path(__file__).parent
PICTURE = HERE.parents[1] / "docs" / "training_curves.png"
TASK, LR, SEEDS, BYTES = "gpt64x20", 1e-2, (0, 1, 2), 20
OPTIMIZERS = {
    "adamw": ("AdamW", "#30343B", ":"),
    "muon": ("Muon", "#DD8452", "--"),
    "adafisher": ("AdaFisher", "#4C72B0", "-"),
}
CAPTION = (
    "Byte-level GPT of 0.18 M parameters, Python sources, on CPUs;\n"
    "lr 0.01 and weight decay 0.1 for each, the mean of 3 seeds\n"
    "and their range. On this bench the update was chosen."
)


def losses() -> dict[str, list[tuple[float, ...]]]:
    """Of each optimizer: at each tenth of the training the held-out loss of each seed."""
    trials = [json.loads(line) for line in (HERE / "trials.jsonl").read_text(encoding="utf-8").splitlines()]
    found = {}
    for optimizer in OPTIMIZERS:
        seen = {
            trial["seed"]: trial["losses"]
            for trial in trials
            if (trial["task"], trial["optimizer"], trial["settings"], trial["lr"]) == (TASK, optimizer, {}, LR)
        }
        found[optimizer] = list(zip(*(seen[seed] for seed in SEEDS), strict=True))
    return found


def curve() -> Figure:
    """780 pixels wide, to be read at half of that."""
    figure = Figure(figsize=(5.2, 4.6), layout="constrained")
    axes = figure.subplots()
    for optimizer, points in losses().items():
        name, colour, style = OPTIMIZERS[optimizer]
        means = [statistics.fmean(point) for point in points]
        seen = [BYTES * tenth / len(points) for tenth in range(1, len(points) + 1)]
        axes.fill_between(seen, [min(p) for p in points], [max(p) for p in points], color=colour, alpha=0.2, lw=0)
        axes.plot(seen, means, style, color=colour, lw=2.2, label=f"{name}, {means[-1]:.3f} at the end")
    axes.set_xlabel("bytes of text seen, for each parameter", fontsize=13)
    axes.set_ylabel("held-out loss, nats a byte", fontsize=13)
    axes.set_xlim(0, BYTES)
    axes.set_xticks(range(0, BYTES + 1, 4))
    axes.tick_params(labelsize=12)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=12.5, frameon=False)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.supxlabel(CAPTION, fontsize=11, x=0.02, ha="left")
    return figure


if __name__ == "__main__":
    curve().savefig(PICTURE, dpi=150, metadata={"Software": None})
