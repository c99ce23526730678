"""Files of a checkpoint that are damaged, or no files at all: refused, and nothing is changed."""

from __future__ import annotations

import json
import os
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from checkpoint_runs import Digests, Run, trained
from tally import Foreign, Hung, Tally, Wrong, explained

from adafisher_dist.checkpoint.latest import LATEST
from adafisher_dist.checkpoint.manifest import MANIFEST

SHARDS = ["shard-00000-of-00002.safetensors", "shard-00001-of-00002.safetensors"]
FILES = [*SHARDS, MANIFEST]
LONGEST = 20.0  # seconds that a load may take to refuse, where the processors are busy


def save_two(rank: int, world: int, root: str) -> None:
    trained(1).save(Path(root) / "other", 1)
    trained(2).save(Path(root) / "here", 2)


class Bystander:
    """A training that a load may not touch if it fails."""

    def __init__(self) -> None:
        self.run = Run().train(5)
        self.digest, self.random = self.run.digest(), torch.get_rng_state()

    def refuses(self, path: Path, **more: Any) -> str:
        """Load: the error. It names the path."""
        told = self.load(path, **more)
        if told is None:
            raise Wrong("it was loaded")
        assert str(path) in told, told
        return told

    def load(self, path: Path, *names: str, **more: Any) -> str | None:
        """The error, which has to name these; None where it loads."""
        try:
            self.run.load(path, **more)
        except Exception as error:
            if self.run.digest() != self.digest or not torch.equal(torch.get_rng_state(), self.random):
                raise Wrong(f"changed state: {error}") from error
            explained(error, *names)
            return str(error)
        return None


def flipped(content: bytes, position: int, mask: int) -> bytes:
    return content[:position] + bytes([content[position] ^ mask]) + content[position + 1 :]


def flip(path: Path, position: int, mask: int, bystander: Bystander) -> str:
    """Change a byte of a file of the checkpoint `here`, or of `latest`: it is refused, by its name.

    Returns:
        What came of it.
    """
    content = path.read_bytes()
    damage = flipped(content, position, mask)
    path.write_bytes(damage)
    try:
        if bystander.load(path.parent, path.name) is not None:
            return "refused"
        state, bystander.run = bystander.run.digest(), Run().train(5)
        if state != Digests()[2] or path.name != MANIFEST or not says_the_same(damage, content):
            raise Wrong(f"loaded, with byte {position} changed by {mask}")
        return "without effect"
    finally:
        path.write_bytes(content)


def positions_of(path: Path, count: int, draw: random.Random) -> list[int]:
    """The first and last byte, a safetensors header's length, bytes in it, random others."""
    content = path.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little") if path.name in SHARDS else 0
    positions = [0, len(content) - 1, *(draw.randrange(len(content)) for _ in range(count))]
    return positions + ([*range(8), *(draw.randrange(8, header) for _ in range(20))] if header else [])


def flip_anywhere(count: int, draw: random.Random, root: Path, folder: Path, tally: Tally) -> None:
    """So many, each in a file that is drawn, and half of them of a single bit."""
    here = Path(shutil.copytree(root, folder / "copy")) / "here"
    files, bystander = [*(here / name for name in FILES), here.parent / LATEST], Bystander()
    for _ in range(count):
        path = draw.choice(files)
        position = draw.choice(positions_of(path, 20, draw))
        mask = draw.choice([1 << draw.randrange(8), draw.randrange(1, 256)])
        with tally.trial(f"{path.name}, byte {position}, mask {mask}"):
            tally.outcomes[flip(path, position, mask, bystander)] += 1


def says_the_same(damage: bytes, content: bytes) -> bool:
    """One white space for another, or 1e-05 as 1E-05."""
    try:
        return json.loads(damage) == json.loads(content)
    except ValueError:
        return False


def rewrite(change: Callable[[bytes], bytes]) -> Callable[[Path], Any]:
    return lambda path: path.write_bytes(change(path.read_bytes()))


def swap(path: Path) -> None:
    partner = path.with_name(next(name for name in SHARDS if name != path.name))
    path.rename(path.with_name("aside"))
    partner.rename(path)
    path.with_name("aside").rename(partner)


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "deleted": Path.unlink,
    "empty": rewrite(lambda content: b""),
    "half": rewrite(lambda content: content[: len(content) // 2]),
    "without its last byte": rewrite(lambda content: content[:-1]),
    "with a byte more": rewrite(lambda content: content + b"\0"),
    "twice": rewrite(lambda content: content * 2),
    "zeros": rewrite(lambda content: bytes(len(content))),
    "flipped": rewrite(lambda content: flipped(content, len(content) // 2, 1)),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "a dangling link": lambda path: (path.unlink(), path.symlink_to("nowhere")),
    "of another checkpoint": lambda path: shutil.copy(path.parent.parent / "other" / path.name, path),
    "swapped": swap,
}


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def link(path: Path, target: str) -> None:
    path.unlink()
    path.symlink_to(target)


def moved_out(path: Path) -> None:
    shutil.move(path, path.parent.parent / f"out-{path.name}")
    path.symlink_to(f"../out-{path.name}")


def sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(60 * 10**9)


# What a file may be instead of one.
STRANGE_FILES: dict[str, Callable[[Path], Any]] = {
    "a pipe": pipe,
    "endless": lambda path: link(path, "/dev/zero"),
    "a device": lambda path: link(path, "/dev/null"),
    "a link out": moved_out,
    "links in a circle": lambda path: link(path, path.name),
    "60 GB": sparse,
}


def cut(path: Path, draw: random.Random) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: draw.randrange(len(content))])


def damage_files(count: int, draw: random.Random, root: Path, folder: Path, tally: Tally) -> None:
    """In a copy of a folder with the checkpoints other and here: what `latest` names is refused."""
    every = {**DAMAGES, **STRANGE_FILES, "cut off": lambda path: cut(path, draw)}
    bystander = Bystander()
    for number in range(count):
        here = Path(shutil.copytree(root, folder / f"damaged{number}")) / "here"
        name, how = draw.choice([*FILES, LATEST]), draw.choice([*every])
        if how in ("swapped", "of another checkpoint") and name == LATEST:
            how = "deleted"
        if how == "swapped" and name == MANIFEST:
            name = SHARDS[0]
        verify = how == "flipped" or draw.random() < 0.5
        with tally.trial(f"{name}: {how}, verify={verify}"):
            every[how](here.parent / name if name == LATEST else here / name)
            tally.outcomes[_refused_in_time(here.parent, name, how, verify, bystander)] += 1
        shutil.rmtree(here.parent)


def _refused_in_time(root: Path, name: str, how: str, verify: bool, bystander: Bystander) -> str:
    began = time.monotonic()
    told = bystander.load(root, str(root), verify=verify)
    if time.monotonic() - began > LONGEST:
        raise Hung(f"took {time.monotonic() - began:.0f} s")
    if told is not None:
        named = named_for(name, how)
        if not any(own in told for own in named):
            raise Foreign(f"names none of {named}: {told}")
        return "refused"
    state, bystander.run = bystander.run.digest(), Run().train(5)
    if state != Digests()[2]:
        raise Wrong("loaded another state")
    return "without effect"


def named_for(name: str, how: str) -> list[str]:
    """What the error should name. Another checkpoint's manifest is whole; the shards do not fit."""
    if how == "swapped" or (name, how) == (MANIFEST, "of another checkpoint"):
        return SHARDS
    gone = name == LATEST and how in ("deleted", "a dangling link")
    return ["Checkpoints in"] if gone else [name]
