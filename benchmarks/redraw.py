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
NAMES = ("step_time", "host_time", "scaling", "latency", "memory", "stages", "checkpoint", "metrics")
GPU = "gpu/trains"
sys.path.append(str(Path(__file__).parent / "gpu"))


def figure(name: str) -> Figure:
    content = json.loads((DOCS / f"{name}.json").read_text(encoding="utf-8"))
    return importlib.import_module("report" if name == GPU else name).draw(content)


def main() -> None:
    for name in sys.argv[1:] or [*NAMES, GPU]:
        figures.write(figure(name), DOCS / f"{name}.svg")
        print(f"Written: docs/{name}.svg")


if __name__ == "__main__":
    main()
