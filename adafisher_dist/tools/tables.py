"""The tables that the command line shows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.box import SIMPLE
from rich.filesize import decimal
from rich.table import Table

from adafisher_dist.printable import printable
from adafisher_dist.tools.listing import Listed

Facts = Mapping[str, Any]


def tables_of(summary: Facts, max_parameters: int | None) -> list[Table]:
    """A checkpoint, as `inspection.summarize` has it: facts, groups, parameters, bytes, files."""
    return [
        _facts(summary),
        _groups(summary),
        _parameters(summary["parameters"], max_parameters),
        _kinds(summary["kinds"]),
        _files(summary),
    ]


def list_table(folder: str, listed: Sequence[Listed]) -> Table:
    """The checkpoints in a folder, by `checkpoints_in`."""
    table = _table(f"Checkpoints in {folder}", ("tag", "step", "saved", "ranks", ""), ("step", "ranks"))
    for own in listed:
        what = own.problem or ("latest: the one below" if own.latest else "")
        table.add_row(own.tag, *map(_or_dash, (own.step, own.created, own.world_size)), what)
    return table


def forecast_table(forecast: Facts) -> Table:
    """What AdamW and AdaFisher cost a rank, by `forecast_of`."""
    columns = ("", "block", "weights", "gradients", "state", "buffers", "a rank", "sent a step", "collectives", "GFLOP")
    title = (
        f"{forecast['elements']:,} elements in {forecast['parameters']:,} parameters, {forecast['weight_dtype']},"
        f" {forecast['layout']} on {forecast['world_size']:,} ranks; of each the rank that has most."
    )
    table = _table(title, columns, columns[1:])
    adamw = forecast["adamw"]
    model = [decimal(adamw["weights"] + adamw["masters"]), decimal(adamw["gradients"])]
    table.add_row("AdamW", "", *model, *map(decimal, (adamw["moments"], 0, adamw["rank_total"], 0)), "0", "")
    for row in forecast["settings"]:
        if _storage(row) != "float32":
            continue
        memory = row["memory"]
        amounts = memory["total"] - memory["buffers"], memory["buffers"], row["rank_total"], row["sent"]
        counts = f"{row['collectives']:,}", f"{row['flops'] / 1e9:,.4g}"
        table.add_row("AdaFisher", str(row["block_size"]), *model, *map(decimal, amounts), *counts)
    return table


def forecast_text(forecast: Facts) -> list[str]:
    """Lines below the table: other storages, times, and what fits the budget."""
    lines = []
    for size in dict.fromkeys(row["block_size"] for row in forecast["settings"]):
        first, *others = (row for row in forecast["settings"] if row["block_size"] == size)
        stored = "; ".join(f"{_storage(row)} {decimal(row['rank_total'])}" for row in others)
        lines.append(f"Blocks of {size} stored otherwise, a rank: {stored}.")
        times = [f"about {first['host_ms']:,.0f} ms of the host (docs/host_time.json)"]
        if "device_ms" in first:
            times.append(f"{first['device_ms']:.3g} ms at {forecast['device_tflops']:g} TFLOP/s")
        if "network_ms" in first:
            times.append(f"sending {first['network_ms']:.3g} ms at {forecast['network_gbs']:g} GB/s")
        lines.append(f"A step: {'; '.join(times)}.")
    fits = [f"{_storage(row)} {row['block_size'] or 'none'}" for row in forecast["largest_block_size"]]
    if fits:
        lines.append(f"Largest block size within {forecast['memory_budget_gb']:g} GB a rank: {'; '.join(fits)}.")
    return lines


def _storage(row: Facts) -> str:
    return str(row["fisher_dtype"]) + (", packed" if row["packed"] else "")


class _Table(Table):
    """Whose cells no terminal takes for commands."""

    def add_row(self, *cells: Any, **more: Any) -> None:
        """See Table."""
        super().add_row(*map(printable, cells), **more)


def _table(title: str, columns: Iterable[str], numbers: Sequence[str] = ()) -> Table:
    """An empty table; the columns in `numbers` are aligned to the right."""
    table = _Table(title=printable(title), title_justify="left", title_style="bold", box=SIMPLE)
    for column in columns:
        table.add_column(column, justify="right" if column in numbers else "left", overflow="fold")
    return table


def _facts(summary: Facts) -> Table:
    totals, files = summary["totals"], len(summary["files"])
    tied = sum(len(parameter["aliases"]) for parameter in summary["parameters"])
    others = [*summary["values"], *(f"extra state of {name}" for name in summary["extra_state"])]
    rows = {
        "step": f"{summary['step']:,}" + (f" ({skipped:,} skipped)" if (skipped := summary["skipped_steps"]) else ""),
        "saved": summary["created"],
        "id": summary["id"],
        "by": ", ".join(f"{package} {version}" for package, version in summary["versions"].items()),
        "ranks": f"{summary['world_size']:,}",
        "layout": summary["layout"],
        "ZeRO stage": _or_dash(summary["zero_stage"]),
        "precision": _or_dash(summary["precision"]),
        "parameters": f"{totals['parameters']:,}" + (f" and {tied:,} other names of tied ones" if tied else ""),
        "elements": f"{totals['elements']:,}, {totals['trainable_elements']:,} of them trainable",
        "buffers": f"{len(summary['buffers']):,}",
        "Fisher blocks": f"{totals['blocks']:,}, {totals['dense_blocks']:,} of them dense",
        "also saved": ", ".join(others) or "–",
        "size": f"{decimal(totals['nbytes'])} in {files:,} file{'s' if files > 1 else ''}",
    }
    table = _table(summary["path"], ("", " "))
    table.show_header = False
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def _groups(summary: Facts) -> Table:
    table = _table("Param groups", ("group", "parameters", "elements", "settings"), ("group", "parameters", "elements"))
    for number, group in enumerate(summary["groups"]):
        settings = ", ".join(f"{name} {value}" for name, value in group["settings"].items())
        table.add_row(str(number), f"{len(group['names']):,}", f"{group['elements']:,}", settings)
    return table


def _parameters(parameters: Sequence[Facts], at_most: int | None) -> Table:
    columns = ("name", "shape", "dtype", "stored as", "blocks", "step", "Fisher")
    table = _table("Parameters", columns, ("blocks", "step"))
    for parameter in parameters[:at_most]:
        name = parameter["name"] + ("" if parameter["trainable"] else " (frozen)")
        table.add_row(
            "\n  = ".join((name, *parameter["aliases"])),
            " × ".join(map(str, parameter["shape"])) or "scalar",
            parameter["dtype"],
            *(_or_dash(parameter[key]) for key in ("stored_dtype", "blocks", "step", "fisher_dtype")),
        )
    if at_most is not None and len(parameters) > at_most:
        table.add_row(f"… and {len(parameters) - at_most:,} more: --all shows them")
    return table


def _kinds(kinds: Sequence[Facts]) -> Table:
    columns = ("kind", "dtype", "tensors", "elements", "size")
    table = _table("Bytes by kind", columns, ("tensors", "elements", "size"))
    for kind in kinds:
        numbers = f"{kind['tensors']:,}", f"{kind['elements']:,}", decimal(kind["nbytes"])
        table.add_row(kind["kind"], kind["dtype"], *numbers)
    return table


def _files(summary: Facts) -> Table:
    table = _table("Files", ("name", "bytes", "CRC-32"), ("bytes",))
    for file in summary["files"]:
        table.add_row(file["name"], f"{file['nbytes']:,}", file["crc32"])
    return table


def _or_dash(value: Any) -> str:
    return "–" if value is None else f"{value:,}" if isinstance(value, int) else str(value)
