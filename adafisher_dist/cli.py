"""The command line: python -m adafisher_dist. Facts go to stdout, what is wrong and progress to stderr.

Exit codes: 1, a checkpoint is damaged, or something could not be read or written; 2, what was asked for is wrong.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Annotated, NoReturn

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from typer import Argument, Option

from adafisher_dist.checkpoint import CheckpointError, Place, place_of
from adafisher_dist.checkpoint.export import MAX_SHARD_BYTES, export_weights
from adafisher_dist.checkpoint.manifest import Manifest, read
from adafisher_dist.checkpoint.summary import damage, summarize
from adafisher_dist.tables import tables_of

app = typer.Typer(
    help="Look into checkpoints of adafisher_dist, and make something of them.",
    add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False,
)  # fmt: skip

DAMAGED, WRONG = 1, 2  # exit codes
_MAX_PARAMETERS = 40
_MAX_SHARD_GB = MAX_SHARD_BYTES / 1e9
_WIDTH_OF_A_FILE = 120  # columns, where stdout is no terminal

Checkpoint = Annotated[
    Path,
    Argument(help="Its folder, or one of checkpoints: the newest, as its file `latest` has it."),
]


class Format(str, Enum):
    """What `export` writes."""

    safetensors = "safetensors"


class Dtype(str, Enum):
    """The dtypes that `export` converts to."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


@app.command()
def inspect(
    checkpoint: Checkpoint,
    verify: Annotated[
        bool, Option("--verify", help="Check every file's checksum; exit code 1 if one is wrong.")
    ] = False,
    as_json: Annotated[bool, Option("--json", help="Print one JSON object instead of tables.")] = False,
    every: Annotated[bool, Option("--all", help=f"List all parameters, not the first {_MAX_PARAMETERS}.")] = False,
) -> None:
    """Tell what is in a checkpoint."""
    _, folder = _find(checkpoint)
    manifest = _read(folder)
    problems = damage(folder, manifest, bar) if verify else None
    summary = summarize(folder, manifest)
    if as_json:
        print(json.dumps({**summary.as_json(), "damage": problems}))
    else:
        console = Console(
            width=None if sys.stdout.isatty() else _WIDTH_OF_A_FILE, markup=False, emoji=False, highlight=False
        )
        console.print(*tables_of(summary, None if every else _MAX_PARAMETERS))
    if problems:
        fail(f"{folder} is damaged: {'; '.join(problems)}.", DAMAGED)
    if verify and not as_json:
        print("All files have the right checksum.")


@app.command()
def export(
    checkpoint: Checkpoint,
    to: Annotated[Format, Option(help="The format.")],
    out: Annotated[Path | None, Option(help="The folder to write to; by default CHECKPOINT-safetensors.")] = None,
    dtype: Annotated[Dtype | None, Option(help="Of the parameters; by default what they had in the model.")] = None,
    max_shard_gb: Annotated[float, Option(help="What a file holds at most, in GB (10⁹ bytes).")] = _MAX_SHARD_GB,
    overwrite: Annotated[bool, Option("--overwrite", help="Replace an earlier export.")] = False,
    verify: Annotated[bool, Option(help="Check every file's checksum first.")] = True,
) -> None:
    """Write a checkpoint's weights and buffers alone, for serving."""
    place, folder = _find(checkpoint)
    out = out or place.root / f"{place.tag}-{to.value}"
    if out.suffix == f".{to.value}":
        fail(f"--out names a folder, in which model.safetensors is written; got {out}.", WRONG)
    wanted = getattr(torch, dtype.value) if dtype else None
    try:
        files = export_weights(
            folder, out, wanted, int(max_shard_gb * 1e9), overwrite=overwrite, verify=verify, bar=bar
        )
    except (FileExistsError, ValueError) as error:
        fail(error, WRONG)
    except (CheckpointError, OSError, OverflowError) as error:
        fail(error, DAMAGED)
    for file in files:
        print(file)


def fail(problem: object, code: int) -> NoReturn:
    """Say what is wrong on stderr, and end."""
    typer.echo(str(problem), err=True)
    raise typer.Exit(code)


@contextmanager
def bar(what: str, nbytes: int) -> Iterator[Callable[[int], object]]:
    """A progress bar on stderr, if that is a terminal; see `summary.Bar`."""
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(what, total=nbytes)
        yield lambda done: progress.advance(task, done)


def _find(checkpoint: Path) -> tuple[Place, Path]:
    """The place of a checkpoint that exists, and its folder."""
    path = Path(os.path.abspath(checkpoint))  # not resolve(): it would follow links, to names that nobody gave
    try:
        place = place_of(path)
        return place, place.find()
    except (CheckpointError, OSError, ValueError) as error:
        fail(error, WRONG)


def _read(folder: Path) -> Manifest:
    try:
        return read(folder)
    except (CheckpointError, OSError) as error:
        fail(error, DAMAGED)
