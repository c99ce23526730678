"""The command line: python -m adafisher_dist. Facts go to stdout, errors and progress to stderr.

Exit codes: 1, a checkpoint is damaged, or something could not be read or written; 2, what was asked
for is wrong, or no checkpoint is found there.
"""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from enum import Enum
from math import isfinite, nan
from pathlib import Path
from typing import Annotated, NoReturn

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from typer import Argument, Option

from adafisher_dist.blocks.estimate import LAYOUTS, shapes_of, transformer_shapes
from adafisher_dist.blocks.forecast import Asked, forecast_of
from adafisher_dist.checkpoint import CheckpointDirectory, CheckpointError, checkpoint_directory
from adafisher_dist.checkpoint.directory import find
from adafisher_dist.checkpoint.errors import damaged, os_problem
from adafisher_dist.checkpoint.open_checkpoint import OpenCheckpoint, open_checkpoint
from adafisher_dist.printable import printable
from adafisher_dist.settings import DEFAULTS
from adafisher_dist.tools.export import MAX_SHARD_BYTES, export_weights
from adafisher_dist.tools.inspection import damage, summarize
from adafisher_dist.tools.listing import Listed, checkpoints_in
from adafisher_dist.tools.tables import forecast_table, forecast_text, list_table, tables_of
from adafisher_dist.version import __version__

app = typer.Typer(
    help="Foretell what AdaFisher costs, look into its checkpoints and make something of them.",
    add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False,
)  # fmt: skip

DAMAGED, WRONG = 1, 2  # exit codes


def _finite(value: float | None) -> float | None:
    """Refuse the NaN and inf that `float` takes."""
    if value is not None and not isfinite(value):
        raise typer.BadParameter(f"it should be a finite number, got {value}.")
    return value


def _tell_version(asked: bool) -> None:
    if asked:
        print(f"adafisher_dist {__version__}, torch {torch.__version__}, Python {platform.python_version()}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, Option("--version", callback=_tell_version, is_eager=True, help="Tell the version.")
    ] = False,
) -> None:
    """See `app`; what is asked for of no command."""


_MAX_PARAMETERS = 40
_MAX_SHARD_GB = MAX_SHARD_BYTES / 1e9
_WIDTH_OF_A_FILE = 120  # columns, where stdout is no terminal

Checkpoint = Annotated[
    Path,
    Argument(help="Its folder, or one of checkpoints: the newest, as its file `latest` has it."),
]


# What options take: what `export` writes and converts to, and the values of --layout and
# --block-grid.
Format = Enum("Format", {"safetensors": "safetensors"}, type=str)
Dtype = Enum("Dtype", {"float32": "float32", "bfloat16": "bfloat16", "float16": "float16"}, type=str)
Layout = Enum("Layout", {name: name for name in LAYOUTS}, type=str)  # type: ignore[misc]
Grids = Enum("Grids", {"rows": "rows", "flat": "flat"}, type=str)


@app.command()
def inspect(
    checkpoint: Checkpoint,
    verify: Annotated[
        bool, Option("--verify", help="Check every file's checksum; exit code 1 if one is wrong.")
    ] = False,
    as_json: Annotated[bool, Option("--json", help="Print one JSON object instead of tables.")] = False,
    every: Annotated[bool, Option("--all", help=f"List all parameters, not the first {_MAX_PARAMETERS}.")] = False,
) -> None:
    """Tell what is in a checkpoint; in a folder of them, list them, and tell of the newest."""
    listed = _listed(checkpoint)
    if listed and not as_json:
        _console().print(list_table(str(checkpoint), listed))
    with _open(checkpoint, verify) as opened:
        folder = opened.folder
        problems = damage(opened, bar) if verify else None
        summary = summarize(opened)
    if as_json:
        print(json.dumps({**summary, "damage": problems, "checkpoints": [asdict(own) for own in listed]}))
    else:
        _console().print(*tables_of(summary, None if every else _MAX_PARAMETERS))
    if problems:
        fail(damaged(folder, "; ".join(problems)), DAMAGED)
    if verify and not as_json:
        print("All files have the right checksum.")


@app.command()
def export(
    checkpoint: Checkpoint,
    to: Annotated[Format, Option(help="The format.")],
    out: Annotated[Path | None, Option(help="The folder to write to; by default TAG-safetensors beside it.")] = None,
    dtype: Annotated[Dtype | None, Option(help="Of the parameters; by default what they had in the model.")] = None,
    max_shard_gb: Annotated[
        float, Option(callback=_finite, help="What a file holds at most, in GB (10⁹ bytes).")
    ] = _MAX_SHARD_GB,
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


@app.command()
def estimate(
    params: Annotated[
        str | None, Option(help="Parameters of a generic transformer: 7e9, 350M.", show_default=False)
    ] = None,
    model: Annotated[
        str | None, Option(help="Instead: package.module:function, which returns the model.", show_default=False)
    ] = None,
    world_size: Annotated[int, Option(help="Data-parallel ranks.")] = 8,
    zero_stage: Annotated[int | None, Option(help="DeepSpeed's, 0 to 3.", show_default=False)] = None,
    layout: Annotated[Layout | None, Option(help="Instead: another layout.", show_default=False)] = None,
    block_size: Annotated[list[int] | None, Option(help="Repeat for several.", show_default="128")] = None,
    rows_per_block: Annotated[int, Option(help="Rows that share a block, at most.")] = DEFAULTS["rows_per_block"],
    block_grid: Annotated[Grids, Option(help="How parameters are cut.")] = Grids.rows,
    exponent: Annotated[float, Option(callback=_finite, help="0.5 or 1.0.")] = 0.5,
    inverse_update_freq: Annotated[int, Option(help="Steps between refreshes of a factor.")] = 1,
    max_blocks: Annotated[int | None, Option(help="Dense blocks a parameter.", show_default=False)] = None,
    weight_dtype: Annotated[Dtype, Option(help="Of the model's weights and gradients.")] = Dtype.float32,
    device_tflops: Annotated[
        float | None,
        Option(callback=_finite, help="Also tell the time at so many 10¹² operations a second.", show_default=False),
    ] = None,
    network_gbs: Annotated[
        float | None,
        Option(callback=_finite, help="Also tell the time at so many 10⁹ bytes a second and rank.", show_default=False),
    ] = None,
    memory_budget_gb: Annotated[
        float | None, Option(callback=_finite, help="Also tell the largest block size that fits.", show_default=False)
    ] = None,
    as_json: Annotated[bool, Option("--json", help="Print one JSON object instead of a table.")] = False,
) -> None:
    """Tell what AdaFisher needs beside AdamW: bytes a rank, bytes sent, collectives, arithmetic."""
    try:
        shapes = _shapes(params, model)
        chosen = _layout(zero_stage, layout)
        settings = {
            "rows_per_block": rows_per_block,
            "block_grid": block_grid.value,
            "exponent": exponent,
            "inverse_update_freq": inverse_update_freq,
            "max_blocks": max_blocks,
        }
        dtype = getattr(torch, weight_dtype.value)
        asked = Asked(shapes, chosen, world_size, dtype, settings, memory_budget_gb, device_tflops, network_gbs)
        forecast = forecast_of(asked, block_size or [DEFAULTS["block_size"]])
    except (TypeError, ValueError) as error:
        fail(error, WRONG)
    if as_json:
        print(json.dumps(forecast))
    else:
        _console().print(forecast_table(forecast))
        _console().print(*forecast_text(forecast), sep="\n")


def _shapes(params: str | None, model: str | None) -> list[tuple[int, ...]]:
    if (params is None) == (model is None):
        raise ValueError("Give either --params, as 7e9, or --model, as package.module:function.")
    if model is not None:
        sys.path.insert(0, os.getcwd())
        return shapes_of(model)
    assert params is not None
    return transformer_shapes(_number(params))


def _number(text: str) -> int:
    """How many "7e9", "350M" or "7B" is."""
    units = {"K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}
    unit = units.get(text[-1:].upper(), 0.0)
    try:
        number = float(text[:-1]) * unit if unit else float(text)
    except ValueError:
        number = nan
    if not 1 <= number < 1e15:
        raise ValueError(f"--params should be a number of elements, as 7e9, 350M or 7B, got {text!r}.")
    return int(number)


def _layout(zero_stage: int | None, layout: Layout | None) -> str:
    if (zero_stage is None) == (layout is None):
        raise ValueError(f"Give either --zero-stage, or --layout ({', '.join(LAYOUTS)}).")
    if layout is not None:
        return str(layout.value)
    if zero_stage not in range(4):
        raise ValueError(f"--zero-stage should be 0, 1, 2 or 3, got {zero_stage}.")
    return f"zero{zero_stage}"


def _console() -> Console:
    width = None if sys.stdout.isatty() else _WIDTH_OF_A_FILE
    return Console(width=width, markup=False, emoji=False, highlight=False)


def fail(problem: object, code: int) -> NoReturn:
    """Say what is wrong on stderr, and end."""
    told = os_problem(problem) if isinstance(problem, OSError) else str(problem)
    typer.echo(printable(told), err=True)
    raise typer.Exit(code)


@contextmanager
def bar(what: str, nbytes: int) -> Iterator[Callable[[int], object]]:
    """A progress bar on stderr, if that is a terminal; see `inspection.Bar`."""
    console = Console(stderr=True)
    text = TextColumn("{task.description}")
    columns = (text, BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(what, total=nbytes)
        yield lambda done: progress.advance(task, done)


def _find(checkpoint: Path) -> tuple[CheckpointDirectory, Path]:
    """The place of a checkpoint that exists, and its folder."""
    path = Path(os.path.abspath(checkpoint))  # not resolve(): it would follow links, to names that nobody gave
    try:
        return find(lambda: checkpoint_directory(path))
    except (CheckpointError, ValueError) as error:
        fail(error, WRONG)


def _listed(checkpoint: Path) -> list[Listed]:
    """The checkpoints in a folder; none where it is one itself."""
    try:
        return checkpoints_in(Path(os.path.abspath(checkpoint)))
    except OSError as error:
        fail(error, DAMAGED)


def _open(checkpoint: Path, verify: bool) -> OpenCheckpoint:
    """Held open with all its files, where they will be checked."""
    try:
        return open_checkpoint(lambda: _find(checkpoint)[1], lambda manifest: manifest.files if verify else ())
    except (CheckpointError, OSError) as error:
        fail(error, DAMAGED)
