"""The standing harness: hostile inputs, flipped bits, kills at any time, loads beside saves.

    python tests/fuzz.py --minutes 10

Kinds of trials come in turn, in small rounds, each by its share of the time, until it is over. What
a round does follows from (seed, kind, round), and where something goes wrong the command that
repeats it is printed. The exit code is 0 if nothing was lost, wrong or hung, and every error was
one of ours that names what is wrong and what to do. Moments of kills by time vary from run to run.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from threading import Timer
from typing import Any, NamedTuple

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch
from checkpoint_runs import trained
from damage import damage_files, flip_anywhere, save_two
from lives import LAYOUTS, kill_again_and_again
from mutants import load_mutants, load_strange_texts
from ranks import run_ranks
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from save_loops import (
    killed_again_and_again,
    killed_at_any_time,
    launcher_killed,
    load_beside_savers,
    one_of_two_killed,
)
from strange_settings import configure_anything, set_anything
from tally import BAD, Tally

LONGEST_ROUND = 900.0  # seconds, after which the harness itself hangs


class Sources:
    """Checkpoints that rounds copy, saved once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @cached_property
    def one_rank(self) -> Path:
        """step1 and step2."""
        root = self._folder / "one-rank"
        for step in (1, 2):
            trained(step).save(root / f"step{step}", step)
        return root

    @cached_property
    def two_ranks(self) -> Path:
        """Other and here."""
        root = self._folder / "two-ranks"
        run_ranks(save_two, 2, str(root))
        return root


class Round(NamedTuple):
    """What a round is given."""

    number: int
    draw: random.Random
    folder: Path
    sources: Sources
    tally: Tally


def manifests(this: Round) -> None:
    seed = this.draw.randrange(2**32)
    if this.number % 2:
        trained(2).save(this.folder / "saved", 2)
        load_strange_texts(100, seed, this.folder / "saved", this.tally)
    else:
        load_mutants(100, seed, this.draw.choice(["cosine", "plateau", "steps", "in turn"]), this.folder, this.tally)


def files(this: Round) -> None:
    damage_files(25, this.draw, this.sources.two_ranks, this.folder, this.tally)


def settings(this: Round) -> None:
    set_anything(150, this.draw, this.tally)


def configs(this: Round) -> None:
    configure_anything(12, this.draw, this.tally)


def flips(this: Round) -> None:
    flip_anywhere(60, this.draw, this.sources.two_ranks, this.folder, this.tally)


def loads(this: Round) -> None:
    tags = this.draw.choice(["new", "same"])
    load_beside_savers(this.draw.randint(1, 2), tags, 60, this.folder, this.tally)


def saves(this: Round) -> None:
    """Of our save: one process at each change of its disk; all ranks, one of two, the launcher."""
    draw, more = this.draw, (this.folder, this.tally)
    how = this.number % 4
    if how == 0:
        killed_again_and_again(40, draw.randrange(2**32), this.sources.one_rank, *more)
    elif how == 1:
        tags, asynchronous = draw.choice(["new", "same"]), draw.random() < 0.5
        killed_at_any_time(draw.randint(1, 2), tags, asynchronous, 10, draw.randrange(2**32), *more)
    elif how == 2:
        one_of_two_killed(draw, this.sources.one_rank, *more)
    else:
        launcher_killed(draw, *more)


def engines(this: Round) -> None:
    kill_again_and_again(LAYOUTS[this.number % len(LAYOUTS)], "save", 4, this.draw, this.folder, this.tally)


def steps(this: Round) -> None:
    kill_again_and_again(LAYOUTS[this.number % len(LAYOUTS)], "step", 4, this.draw, this.folder, this.tally)


# Each with its share of the time.
KINDS: dict[str, tuple[Callable[[Round], None], float]] = {
    "manifests": (manifests, 1.0), "files": (files, 1.0), "settings": (settings, 0.5), "configs": (configs, 1.0),
    "flips": (flips, 1.0), "loads": (loads, 1.0), "saves": (saves, 2.0), "engines": (engines, 2.5),
    "steps": (steps, 2.5),
}  # fmt: skip


class Harness:
    """Rounds of some kinds, and what came of them."""

    def __init__(self, seed: int, kinds: Sequence[str]) -> None:
        self.seed = seed
        self.tallies = {kind: Tally() for kind in kinds}
        self.rounds, self.seconds = dict.fromkeys(kinds, 0), dict.fromkeys(kinds, 0.0)

    def run_for(self, seconds: float, sources: Sources) -> None:
        """The kind that has had least of its share is next."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            kind = min(self.seconds, key=lambda kind: self.seconds[kind] / KINDS[kind][1])
            self.run(kind, self.rounds[kind], sources)

    def run(self, kind: str, number: int, sources: Sources) -> None:
        """One round."""
        tally, began = self.tallies[kind], time.monotonic()
        known, draw = len(tally.problems), random.Random(f"{self.seed}/{kind}/{number}")
        repeat = f"python tests/fuzz.py --seed {self.seed} --only {kind} --round {number}"
        guard = Timer(LONGEST_ROUND, _hang, [repeat])
        guard.start()
        with tempfile.TemporaryDirectory(dir=memory()) as folder, tally.noting("the round"):
            KINDS[kind][0](Round(number, draw, Path(folder), sources, tally))
        guard.cancel()
        for column, text in tally.problems[known:]:
            print(f"{column}: {text}", file=sys.stderr)
        if len(tally.problems) > known:
            print(f"repeat it by: {repeat}", file=sys.stderr, flush=True)
        self.rounds[kind] += 1
        self.seconds[kind] += time.monotonic() - began

    def counts(self) -> dict[str, dict[str, Any]]:
        """By kind, as JSON."""
        return {
            kind: {
                "rounds": self.rounds[kind],
                "trials": tally.trials,
                "outcomes": dict(tally.outcomes),
                **{column: tally.count(column) for column in BAD},
                "seconds": round(self.seconds[kind], 1),
            }
            for kind, tally in self.tallies.items()
        }


def memory() -> str | None:
    return "/dev/shm" if os.path.isdir("/dev/shm") else None


def _hang(repeat: str) -> None:
    print(f"hung: a round took {LONGEST_ROUND:.0f} s; repeat it by: {repeat}", file=sys.stderr, flush=True)
    os._exit(1)


def added(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """Counts of two runs, key by key."""
    return {
        key: added(one.get(key, {}), other.get(key, {}))
        if isinstance(one.get(key, other.get(key)), Mapping)
        else one.get(key, 0) + other.get(key, 0)
        for key in dict.fromkeys([*one, *other])
    }


def table(title: str, counts: Mapping[str, Mapping[str, Any]]) -> Table:
    columns = ("rounds", "trials", *BAD, "seconds")
    shown = Table(title=title, box=SIMPLE, title_justify="left")
    shown.add_column("kind")
    for column in columns:
        shown.add_column(column, justify="right")
    shown.add_column("otherwise")
    for kind, own in counts.items():
        outcomes = ", ".join(f"{count:,} {name}" for name, count in sorted(own["outcomes"].items()))
        shown.add_row(kind, *(f"{own[column]:,.0f}" for column in columns), outcomes)
    shown.add_section()
    shown.add_row("all", *(f"{sum(own[column] for own in counts.values()):,.0f}" for column in columns))
    return shown


def asked(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--minutes", type=float, default=10.0, help="how long; a round that has begun is ended")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=KINDS, default=[*KINDS], metavar="KIND", help=", ".join(KINDS))
    parser.add_argument("--round", type=int, help="this one alone, of each kind")
    parser.add_argument("--sum", type=Path, help="add the counts to those in this file (JSON), and show these too")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = asked(arguments)
    torch.set_num_threads(1)
    harness = Harness(options.seed, options.only)
    with tempfile.TemporaryDirectory(dir=memory()) as folder:
        sources = Sources(Path(folder))
        if options.round is None:
            harness.run_for(60 * options.minutes, sources)
        else:
            for kind in options.only:
                harness.run(kind, options.round, sources)
    counts = harness.counts()
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    console.print(table(f"Seed {options.seed}", counts))
    if options.sum is not None:
        whole = added(json.loads(options.sum.read_text()) if options.sum.exists() else {}, counts)
        options.sum.write_text(json.dumps(whole, indent=1) + "\n")
        console.print(table("All runs", whole))
    return int(any(own[column] for own in counts.values() for column in BAD))


if __name__ == "__main__":
    sys.exit(main())
