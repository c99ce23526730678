"""The tables that the command line shows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from rich.box import SIMPLE
from rich.filesize import decimal
from rich.table import Table

from adafisher_dist.blocks.estimate import Forecast
from adafisher_dist.settings import StateConfig
from adafisher_dist.tools.inspection import KindFacts, ParameterFacts, Summary


def tables_of(summary: Summary, max_parameters: int | None) -> list[Table]:
    """A checkpoint: the facts, its param groups, parameters, bytes by kind, files."""
    return [
        _facts(summary),
        _groups(summary),
        _parameters(summary.parameters, max_parameters),
        _kinds(summary.kinds),
        _files(summary),
    ]


def forecast_table(forecast: Forecast) -> Table:
    """What each setting costs a rank; below, what fits the budget."""
    columns = ("block", "Fisher", "a rank", "of it F", "factors", "buffers", "sent a step", "GFLOP a step")
    title = (
        f"{forecast.elements:,} elements in {forecast.parameters:,} parameters, {forecast.layout} on"
        f" {forecast.world:,} ranks; the rank that has most. The model's own parameters and gradients come on top."
    )
    table = _table(title, columns, columns[2:])
    for config, costs in forecast.rows:
        memory = costs.memory
        table.add_row(
            str(config.block_size),
            _storage(config),
            *(decimal(memory[name]) for name in ("total", "fisher", "factors", "buffers")),
            decimal(costs.sent),
            f"{costs.flops / 1e9:,.4g}",
        )
    found = [f"{_storage(config)}: {size or 'none'}" for config, size in forecast.fits]
    if found:
        table.caption = f"Largest block size within {forecast.budget:g} GB a rank: {', '.join(found)}"
        table.caption_justify = "left"
    return table


def _storage(config: StateConfig) -> str:
    return str(config.fisher_dtype).removeprefix("torch.") + (", packed" if config.packed else "")


def _table(title: str, columns: Iterable[str], numbers: Sequence[str] = ()) -> Table:
    """An empty table; the columns in `numbers` are aligned to the right."""
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE)
    for column in columns:
        table.add_column(column, justify="right" if column in numbers else "left", overflow="fold")
    return table


def _facts(summary: Summary) -> Table:
    totals = summary.totals
    tied = sum(len(parameter.aliases) for parameter in summary.parameters)
    rows = {
        "step": f"{summary.step:,}" + (f" ({summary.skipped_steps:,} skipped)" if summary.skipped_steps else ""),
        "saved": summary.created,
        "id": summary.id,
        "by": ", ".join(f"{package} {version}" for package, version in summary.versions.items()),
        "ranks": f"{summary.world_size:,}",
        "layout": summary.layout,
        "ZeRO stage": _or_dash(summary.zero_stage),
        "precision": _or_dash(summary.precision),
        "parameters": f"{totals['parameters']:,}" + (f" and {tied:,} other names of tied ones" if tied else ""),
        "elements": f"{totals['elements']:,}, {totals['trainable_elements']:,} of them trainable",
        "buffers": f"{len(summary.buffers):,}",
        "Fisher blocks": f"{totals['blocks']:,}, {totals['dense_blocks']:,} of them dense",
        "also saved": ", ".join((*summary.values, *(f"extra state of {name}" for name in summary.extra_state))) or "–",
        "size": f"{decimal(totals['nbytes'])} in {len(summary.files):,} file{'s' if len(summary.files) > 1 else ''}",
    }
    table = _table(summary.path, ("", " "))
    table.show_header = False
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def _groups(summary: Summary) -> Table:
    table = _table("Param groups", ("group", "parameters", "elements", "settings"), ("group", "parameters", "elements"))
    for number, group in enumerate(summary.groups):
        settings = ", ".join(f"{name} {value}" for name, value in group.settings.items())
        table.add_row(str(number), f"{len(group.names):,}", f"{group.elements:,}", settings)
    return table


def _parameters(parameters: Sequence[ParameterFacts], at_most: int | None) -> Table:
    columns = ("name", "shape", "dtype", "stored as", "blocks", "step", "Fisher")
    table = _table("Parameters", columns, ("blocks", "step"))
    for parameter in parameters[:at_most]:
        name = parameter.name + ("" if parameter.trainable else " (frozen)")
        table.add_row(
            "\n  = ".join((name, *parameter.aliases)),
            " × ".join(map(str, parameter.shape)) or "scalar",
            parameter.dtype,
            _or_dash(parameter.stored_dtype),
            _or_dash(parameter.blocks),
            _or_dash(parameter.step),
            _or_dash(parameter.fisher_dtype),
        )
    if at_most is not None and len(parameters) > at_most:
        table.add_row(f"… and {len(parameters) - at_most:,} more: --all shows them")
    return table


def _kinds(kinds: Sequence[KindFacts]) -> Table:
    columns = ("kind", "dtype", "tensors", "elements", "size")
    table = _table("Bytes by kind", columns, ("tensors", "elements", "size"))
    for kind in kinds:
        table.add_row(kind.kind, kind.dtype, f"{kind.tensors:,}", f"{kind.elements:,}", decimal(kind.nbytes))
    return table


def _files(summary: Summary) -> Table:
    table = _table("Files", ("name", "bytes", "CRC-32"), ("bytes",))
    for file in summary.files:
        table.add_row(file.name, f"{file.nbytes:,}", file.crc32)
    return table


def _or_dash(value: Any) -> str:
    return "–" if value is None else f"{value:,}" if isinstance(value, int) else str(value)
