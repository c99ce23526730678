"""Manifests whose checksum is right, and one value in them another: refused, or loaded whole."""

from __future__ import annotations

import copy
import json
import math
import random
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from checkpoint_runs import content_of, trained, write_manifest
from tally import Foreign, Hung, Tally, Wrong, explained
from typer.testing import CliRunner
from whole_runs import Whole, digest

from adafisher_dist import CheckpointError, load_checkpoint
from adafisher_dist.checkpoint.manifest import MANIFEST
from adafisher_dist.tools.cli import app

# ---- other values ----

Steps = tuple[Any, ...]  # from a manifest's content to a value in it


def values_in(value: Any, path: Steps = ()) -> Iterator[Steps]:
    """The paths of all JSON values in a value, inner ones too."""
    yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inner:
        yield from values_in(item, (*path, key))


OTHERS = [
    *(None, True, False, 0, 1, 2, 3, -1, 2**31, 2**63, -(2**63), 10**30),
    *(0.5, 1.5, -0.5, 1e300, math.nan, math.inf, -math.inf),
    *("", "x", "1", "torch.float64", "a" * 300, [], [1], [[]], {}, {"x": 1}),
    *({"$tensor": 0}, {"$tensor": -1}, {"$float": "nan"}, {"$float": "inf"}, {"$tuple": [1]}, {"$what": 1}),
]
CHANGES: list[Callable[[Any], Any]] = [
    *(lambda value, other=other: other for other in OTHERS),
    *(lambda value, by=by: value + by if isinstance(value, int | float) else [value] for by in (1, -1, 4, 1000)),
    lambda value: -value if isinstance(value, int | float) else str(value),
    lambda value: str(value) if not isinstance(value, str) else value[1:],
    lambda value: value * 2 if isinstance(value, list | str) else {"x": value},
    lambda value: value[::-1] if isinstance(value, list | str) else float(value) if isinstance(value, int) else [],
    lambda value: value[1:] if isinstance(value, list) else {**value, "more": 1} if isinstance(value, dict) else None,
]
REMOVED = object()
CHANGES.append(lambda value: REMOVED)


def mutant(content: Any, path: Steps, change: Callable[[Any], Any]) -> Any:
    """A copy of the content with one value changed; None where that makes no difference."""
    whole = [copy.deepcopy(content)]
    *before, last = (0, *path)
    holder: Any = whole
    for key in before:
        holder = holder[key]
    other = change(holder[last])
    if other is REMOVED:
        del holder[last]
    elif type(other) is type(holder[last]) and json.dumps(other) == json.dumps(holder[last]):
        return None
    else:
        holder[last] = other
    return whole[0] if whole else {}


def mutants(content: Any, count: int, seed: int) -> Iterator[tuple[Steps, int, Any]]:
    """So many, of all values and changes."""
    draw = random.Random(seed)
    every = [(path, number) for path in values_in(content) for number in range(len(CHANGES))]
    for path, number in draw.sample(every, min(count, len(every))):
        changed = mutant(content, path, CHANGES[number])
        if changed is not None:
            yield path, number, changed


class Target:
    """A training that mutants of a checkpoint are loaded into."""

    def __init__(self, scheduler: str, folder: Path) -> None:
        saved = Whole(1, scheduler)
        saved.step(3)
        saved.save(folder / "saved")
        self.saved, self.own, self.scheduler = folder / "saved", folder / "own", scheduler
        self.right = {name: value.clone() for name, value in saved.model.state_dict().items() if "_extra" not in name}
        self.run = Whole(2, scheduler)
        self.run.step(5)
        self.run.save(self.own)
        self.before, self.content = digest(self.run.everything()), content_of(self.saved)

    def load(self, path: Steps, changed: Any, verify: bool) -> str:
        """Load one; what came of it."""
        write_manifest(self.saved, changed)
        try:
            self.run.load(self.saved, verify=verify)
        except Exception as error:
            if self.run.optimizer._registry.stepper.incomplete or digest(self.run.everything()) != self.before:
                raise Wrong(f"changed state: {error}") from error
            explained(error, str(self.saved))
            return "refused"
        for name, value in self.right.items():
            if not torch.equal(self.run.model.state_dict()[name], value):
                raise Wrong(f"loaded, and {name} is another")
        if not {"settings", "lr_scheduler"} & set(path):  # a huge lr, say, is a lr
            self.run.step()
            if not all(p.isfinite().all() for p in self.run.model.parameters()):
                raise Wrong("loaded, and a step gives what is not finite")
        return "loaded"

    def restore(self) -> None:
        """After what changed it."""
        if digest(self.run.everything()) == self.before:
            return
        self.run = Whole(2, self.scheduler)
        self.run.load(self.own)
        if digest(self.run.everything()) != self.before:
            raise Wrong("then not even a whole checkpoint loads")


def load_mutants(count: int, seed: int, scheduler: str, folder: Path, tally: Tally) -> None:
    """Load so many, of all values and changes."""
    target = Target(scheduler, folder)
    for path, number, changed in mutants(target.content, count, seed):
        with tally.trial(f"{path} by change {number}"):
            try:
                tally.outcomes[target.load(path, changed, number % 2 == 0)] += 1
            finally:
                target.restore()


# ---- strange texts ----


def write_text(folder: Path, text: str) -> None:
    data = text.encode("utf-8", "surrogatepass")
    (folder / MANIFEST).write_bytes(b'{"crc32": "%08x", "content": ' % zlib.crc32(data) + data + b"}")


MARK = "@@@"
LONGEST = 10.0  # seconds
DEEP = 150_000
STRANGE: list[str] = [
    *("null", "true", "-1", "-0", "1e400", "-1e400", "NaN", "Infinity", "1" * 3000, "-" + "9" * 400, "1e-400", "0.5"),
    *(
        '""',
        '"\\u0000"',
        '"\\ud800"',
        '"\\u001b[31mred\\u001b[0m"',
        '"\\u009b2J"',
        '"\\u202eabc"',
        '"../../etc/passwd"',
    ),
    *('"/dev/zero"', '"' + "a" * 100_000 + '"', '"' + "é" * 300 + '"', '"\\n"', '" "', "[]", "{}", "[[]]", '{"": 0}'),
    *("[" * 150 + "]" * 150, "[" * 900 + "]" * 900, "[" * DEEP + "]" * DEEP, '{"a":' * DEEP + "1" + "}" * DEEP),
    *('{"a": 1, "a": 2}', '{"$numpy": ["|V8", 20000000000]}', '{"$numpy": ["|S1", 20000000000]}', '{"$dtype": "x"}'),
    *('{"$tensor": 99}', '{"$bytes": "!"}', '{"$counter": [[[], 1]]}', '{"$set": [[]]}', '{"$bounded_deque": [-1, 0]}'),
    *("[" + ", ".join(["4611686018427387903"] * 50) + "]", "[" + ", ".join(["2"] * 5000) + "]"),
]
KEYS = ['""', '"\\u0000"', '"\\ud800"', '"\\u001b]0;x\\u0007"', '"' + "k" * 5000 + '"', '"$tensor"']


def mutated(content: Any, path: Steps, draw: random.Random) -> tuple[str, str]:
    """What was done, and the text. The path is not empty."""
    whole = json.loads(json.dumps(content))
    holder = whole
    for key in path[:-1]:
        holder = holder[key]
    last, how = path[-1], draw.choice(["value", "value", "value", "missing", "key", "doubled"])
    if how == "missing" or not isinstance(holder, dict):
        if how == "missing":
            del holder[last]
            return f"{path} missing", json.dumps(whole)
        how = "value"
    if how == "value":
        strange = draw.choice(STRANGE)
        holder[last] = MARK
        return f"{path} = {strange[:40]}", json.dumps(whole).replace(f'"{MARK}"', strange)
    key = draw.choice(KEYS) if how == "key" else json.dumps(last)
    own = json.dumps(holder[last])
    if how == "key":
        del holder[last]
    holder[MARK] = 0
    return f"{path} {how} {key[:40]}", json.dumps(whole).replace(f'"{MARK}": 0', f"{key}: {own}")


def load_strange_texts(count: int, seed: int, folder: Path, tally: Tally) -> None:
    """Load so many into the training that saved the checkpoint; `inspect` shows every fifth."""
    run, draw, content = trained(1), random.Random(seed), content_of(folder)
    every, before = [path for path in values_in(content) if path], run.digest()
    for number in range(count):
        what, text = mutated(content, draw.choice(every), draw)
        write_text(folder, text)
        with tally.trial(what):
            began = time.monotonic()
            try:
                load_checkpoint(folder, run.module, run.optimizer, verify=False, strict=bool(number % 3))
                tally.outcomes["loaded"] += 1
                if " doubled " in what:
                    raise Wrong("loaded a key that is there twice")
            except CheckpointError as error:
                tally.outcomes["refused"] += 1
                explained(error, str(folder))
            if number % 5 == 0:
                _inspected(folder)
            if time.monotonic() - began > LONGEST:
                raise Hung(f"took {time.monotonic() - began:.0f} s")
        if run.digest() != before:
            run = trained(1)


def _inspected(folder: Path) -> None:
    result = CliRunner().invoke(app, ["inspect", str(folder)])
    if not isinstance(result.exception, SystemExit | None):
        raise Foreign(f"inspect: {type(result.exception).__name__}: {str(result.exception)[:300]}")
    if not result.output.replace("\n", "").isprintable():
        raise Foreign("inspect shows what a terminal obeys")
