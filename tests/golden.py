"""What every layout computes, frozen: weights, state and checkpoints after six steps.

In a checkout:

    python tests/golden.py freeze FOLDER     # before a change that is to change no bit
    python tests/golden.py compare FOLDER    # after it, same machine: lists tensors that differ
    python tests/golden.py freeze --kept     # only the weights, for the tolerant test_golden.py
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

STEPS = 6
KEPT = Path(__file__).with_suffix(".npz")

# Settings that take every path of the arithmetic; the names of the layouts are those of
# layout_runs.LAYOUTS.
_CUT = {"lr": 1e-2, "block_size": 8, "rows_per_block": 4}
SETTINGS: dict[str, dict[str, Any]] = {
    "default": _CUT,
    "kept": {**_CUT, "damping": 0.2, "inverse_update_freq": 3, "max_blocks": 16},
    "natural": {**_CUT, "grafting": "none", "exponent": 1.0, "damping": 0.3, "fisher_update_freq": 2},
    "flat": {**_CUT, "block_grid": "flat", "bias_correction": False, "nesterov": False},
    "bfloat16": {**_CUT, "fisher_dtype": "bfloat16"},
    "float64": {**_CUT, "fisher_dtype": "float64"},
}
RUNS = [
    *((("alone", 1), settings) for settings in SETTINGS),
    *(
        (layout, settings)
        for layout in (("ddp", 2), ("zero0", 2), ("zero1", 2), ("zero2", 2), ("zero3", 2), ("fsdp2", 2), ("hsdp", 4))
        for settings in ("default", "kept")
    ),
    (("ddp-packed", 2), "default"),
    (("zero2-bf16", 2), "default"),
    (("zero3-subgroups", 2), "bfloat16"),
]

Trace = dict[str, np.ndarray]


def name_of(run: Any) -> str:
    (layout, world), settings = run
    return f"{layout}-{world}-{settings}"


def train(rank: int, world: int, layout: str, settings: dict[str, Any], folder: str | None) -> Trace | None:
    """Six steps; rank 0 has the weights, and a checkpoint is left in the folder."""
    from layout_runs import Run

    run = Run(layout, rank, world, settings)
    run.train(0, STEPS)
    if folder is not None:
        run.save(folder)
    weights = run.weights()
    return weights if rank == 0 else None


def reload(rank: int, world: int, layout: str, settings: dict[str, Any], source: str, target: str) -> None:
    """A checkpoint loaded, and saved again."""
    from layout_runs import Run

    run = Run(layout, rank, world, settings)
    run.load(source)
    run.save(target)


def trace(run: Any, folder: Path | None) -> Trace:
    from layout_runs import contents
    from ranks import run_ranks

    (layout, world), settings = run
    where = None if folder is None else str(folder)
    weights = run_ranks(train, world, layout, SETTINGS[settings], where, deepspeed=True)[0]
    found = {f"trained/{key}": value for key, value in weights.items()}
    return found if folder is None else found | {key: _bits(t) for key, t in contents(folder / "here").items()}


def _bits(tensor: torch.Tensor) -> np.ndarray:
    return (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def facts(folder: Path) -> str:
    """What the manifest tells, but for what no two saves have alike."""
    from adafisher_dist.checkpoint.manifest import read

    about = dict(read(folder).about)
    for key in ("id", "created", "versions"):
        about.pop(key)
    return json.dumps(about, sort_keys=True)


def freeze(folder: Path) -> None:
    for run in RUNS:
        own = folder / name_of(run)
        np.savez(folder / f"{name_of(run)}.npz", **trace(run, own), facts=np.array(facts(own / "here")))
        print(f"{name_of(run)} frozen", flush=True)


def compare(folder: Path) -> int:
    """How many runs differ in any bit; tells where each first does."""
    from layout_runs import contents
    from ranks import run_ranks

    wrong = 0
    for run in RUNS:
        name, ((layout, world), settings) = name_of(run), run
        before = dict(np.load(folder / f"{name}.npz"))
        with tempfile.TemporaryDirectory() as made:
            own, again = Path(made) / "own", Path(made) / "again"
            after = trace(run, own) | {"facts": np.array(facts(own / "here"))}
            told = _differences(before, after)
            old = str(folder / name)
            run_ranks(reload, world, layout, SETTINGS[settings], old, str(again), deepspeed=True)
            resaved = {key: _bits(tensor) for key, tensor in contents(again / "here").items()}
            saved = {key: value for key, value in before.items() if not key.startswith(("trained/", "facts"))}
            told += [f"loaded and saved again: {line}" for line in _differences(saved, resaved)]
        wrong += bool(told)
        print(
            f"{name}: {'; '.join(told[:3]) or f'{len(before)} arrays the same bit for bit, and reloaded'}", flush=True
        )
    return wrong


def _differences(before: Trace, after: Trace) -> list[str]:
    told = [f"{key} is {'new' if key in after else 'gone'}" for key in sorted(before.keys() ^ after.keys())]
    for key in sorted(before.keys() & after.keys()):
        one, other = before[key], after[key]
        if one.dtype != other.dtype or one.shape != other.shape or one.tobytes() != other.tobytes():
            numbers = one.dtype.kind == "f" and one.shape == other.shape
            told.append(f"{key} differs" + (f" by up to {np.abs(one - other).max():.3g}" if numbers else ""))
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("freeze", "compare"))
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--kept", action="store_true")
    given = parser.parse_args()
    if given.kept:
        kept = {f"{name_of(run)}/{key}": value for run in RUNS for key, value in trace(run, None).items()}
        np.savez_compressed(KEPT, **kept)
    elif given.folder is None:
        parser.error("name a folder")
    elif given.what == "freeze":
        given.folder.mkdir(parents=True)
        freeze(given.folder)
    else:
        sys.exit(min(compare(given.folder), 1))


if __name__ == "__main__":
    main()
