"""Draws the figures of docs/ again from their JSON, and measures nothing.

python benchmarks/redraw.py            # all
python benchmarks/redraw.py memory     # one
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import figures
from matplotlib.figure import Figure

DOCS = Path(__file__).resolve().parent.parent / "docs"
ALIKE = ("step_time", "host_time", "scaling", "latency", "memory", "stages", "checkpoint", "metrics")
# By name: the JSON, and the module and function that draw it.
FIGURES = {name: (name, name, "draw") for name in ALIKE} | {
    "convergence": ("convergence", "convergence_report", "draw"),
    "convergence_seconds": ("convergence", "convergence_report", "draw_seconds"),
    "gpu/trains": ("gpu/trains", "report", "draw"),
}
sys.path.append(str(Path(__file__).parent / "gpu"))


def figure(name: str) -> Figure:
    numbers, module, function = FIGURES[name]
    content = json.loads((DOCS / f"{numbers}.json").read_text(encoding="utf-8"))
    return getattr(importlib.import_module(module), function)(content)


def main() -> None:
    for name in sys.argv[1:] or FIGURES:
        figures.write(figure(name), DOCS / f"{name}.svg")
        print(f"Written: docs/{name}.svg")


if __name__ == "__main__":
    main()
