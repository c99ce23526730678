"""What a step calls for: operations of torch, allocations and collectives, counted and not timed.

python tests/step_costs.py      # writes tests/step_costs.json, after a change that costs more
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from layout_runs import Run
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from adafisher_dist.comm import collectives

KEPT = Path(__file__).with_suffix(".json")

# Of the layouts: the default arithmetic in blocks that cut parameters in every way, two ranks; and
# settings that take other ways.
_CUT = {"lr": 1e-2, "block_size": 8, "rows_per_block": 4}
CASES: dict[str, tuple[str, int, dict[str, Any]]] = {
    **{
        layout: (layout, world, _CUT)
        for layout, world in (("alone", 1), ("ddp", 2), ("fsdp2", 2), ("zero1", 2), ("zero2", 2), ("zero3", 2))
    },
    "kept factors": ("alone", 1, {**_CUT, "inverse_update_freq": 3}),
    "natural gradient": ("alone", 1, {**_CUT, "exponent": 1.0, "grafting": "none"}),
    "bfloat16 Fisher": ("alone", 1, {**_CUT, "fisher_dtype": "bfloat16"}),
    "packed": ("ddp-packed", 2, _CUT),
}
STEP = 4  # steps before: the fifth and sixth are none in which ranks compare all they have, 1, 2, 4, 8, …


class _Operations(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return function(*args, **(kwargs or {}))


def counts(rank: int, world: int, case: str) -> dict[str, int]:
    """Of one step of one rank; DeepSpeed calls the optimizer's once for each param group."""
    layout, _, settings = CASES[case]
    run = Run(layout, rank, world, settings)
    optimizer = run.optimizer if run.engine is None else run.engine.basic_optimizer
    real, found = optimizer.step, dict.fromkeys(("operations", "collectives", "allocations"), 0)

    def operations(*args: Any, **keywords: Any) -> Any:
        with _Operations() as mode, counted_collectives() as calls:
            result = real(*args, **keywords)
        found["operations"] += mode.count
        found["collectives"] += len(calls)
        return result

    def allocations(*args: Any, **keywords: Any) -> Any:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
            result = real(*args, **keywords)
        events = profiled.profiler.kineto_results.events()
        found["allocations"] += sum(event.name() == "[memory]" and event.nbytes() > 0 for event in events)
        return result

    run.train(0, STEP)
    for number, counting in enumerate((operations, allocations)):
        optimizer.step = counting
        run.train(STEP + number, STEP + number + 1)
    return found


@contextmanager
def counted_collectives() -> Iterator[list[str]]:
    """The names of those that are called meanwhile."""
    calls: list[str] = []

    def counted(name: str, real: Callable[..., Any], *args: Any, **more: Any) -> Any:
        calls.append(name)
        return real(*args, **more)

    with pytest.MonkeyPatch.context() as patch:
        for name in ("minimum", "minimum_on_device", "all_gather", "all_to_all"):
            patch.setattr(collectives, name, partial(counted, name, getattr(collectives, name)))
        yield calls


def release() -> str:
    """Of torch: another calls for other operations."""
    return ".".join(torch.__version__.split(".")[:2])


def measure(case: str) -> dict[str, int]:
    """The largest of the ranks."""
    from ranks import run_ranks

    layout, world, _ = CASES[case]
    by_rank = run_ranks(counts, world, case, deepspeed=layout.startswith("zero"))
    return {kind: max(found[kind] for found in by_rank) for kind in by_rank[0]}


if __name__ == "__main__":
    torch.set_num_threads(1)
    measured = {case: measure(case) for case in CASES}
    KEPT.write_text(json.dumps({"torch": release(), **measured}, indent=1) + "\n")
    for case, found in measured.items():
        print(f"{case:20}", found)
    sys.exit(0)
