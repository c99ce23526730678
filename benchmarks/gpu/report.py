"""The page of what `make gpu` has found, from the JSON of its parts.

    python benchmarks/gpu/report.py FOLDER              # writes FOLDER/gpu.md and FOLDER/trains.svg
    python benchmarks/gpu/report.py --publish FOLDER    # and puts them into docs/: JSON and picture
                                                        # into docs/gpu/, the page between the
                                                        # markers of docs/gpu.md

docs/gpu.md is written by hand but for what lies between
`<!-- results: begin -->` and `<!-- results: end -->`, and for its first paragraph, which says
whether a GPU has run this code. A part that FOLDER lacks stays as it was published before. A
rehearsal is never published.
"""

from __future__ import annotations

import argparse
import json
import shutil
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from common_gpu import FINISHED, ROOT, read_json  # first: it puts the other folders into sys.path  # isort: skip

import figures

PARTS = ("correct", "fast", "trains")
BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"
NO_NCCL = "no run over several ranks of NCCL has been seen"
NO_RESULTS = f"**No GPU has run this code yet, and {NO_NCCL}.**"
TERMS = (
    "What they say: a gate is the number on the device by which a step changes all (open) or nothing (shut); `u` is"
    " the update; `not-numbers` puts ∞, NaN and 3e37 into one block of F, and the other blocks have to stay the same."
)
PICTURE = "trains.svg"
WIDTH = 100

Found = dict[str, dict[str, Any]]


def read(folder: Path) -> Found:
    """What the parts have written, by part."""
    found = {part: read_json(folder / f"{part}.json") for part in PARTS}
    return {part: content for part, content in found.items() if content is not None}


# ---- Markdown ----


def wrap(text: str, indent: str = "") -> str:
    """A paragraph in lines of at most WIDTH characters, those after the first with an indent."""
    line = " ".join(text.split())
    return textwrap.fill(line, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def cell(value: Any, most: int = 240) -> str:
    """In a table: one line, and no bar."""
    text = " ".join(str(value).split()).replace("|", "\\|")
    return text if len(text) <= most else text[: most - 2] + " …"


def table(headings: Sequence[str], rows: Iterable[Sequence[Any]], texts: int = 1) -> str:
    """A Markdown table; right-aligned except for the first `texts` columns and those headed ""."""
    sides = ["---" if number < texts or not heading else "---:" for number, heading in enumerate(headings)]
    lines = [[cell(heading) for heading in headings], sides, *([cell(value) for value in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def number(value: Any, digits: int = 3) -> str:
    """A number in so many digits, with an exponent only if very large or small; a dash for None."""
    if value is None:
        return "–"
    if value == 0 or 1e-3 <= abs(value) < 1e6:
        text = f"{value:.{digits}g}"
        return f"{value:,.0f}" if "e" in text else text
    return f"{value:.1e}"


def percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f} %"


def megabytes(value: Any) -> str:
    return "–" if value is None else f"{value / 1e6:,.0f}"


# ---- the page ----


def lead(found: Found) -> str:
    """The page's first paragraph: on what, when and by which command."""
    if not found:
        return NO_RESULTS
    if any(content["rehearsal"] for content in found.values()):
        return "**A rehearsal on a CPU: these numbers say that the scripts work, and nothing else.**"
    runs: dict[tuple[str, str, str], list[str]] = {}
    for part, content in found.items():
        runs.setdefault((content["card"], content["date"][:10], content["command"]), []).append(part)
    told = [
        f"`{command}` ran the part{'s' * (len(parts) > 1)} {', '.join(f'`{part}`' for part in parts)}"
        f" on {'an' if card[:1] in 'AN' else 'a'} {card} on {date}"
        for (card, date, command), parts in runs.items()
    ]
    several = found.get("correct", {}).get("ranks", 1) > 1
    return wrap(f"**{'; '.join(told)}{'' if several else f'; {NO_NCCL}'}.**")


def body(found: Found, links: str = "") -> str:
    """What lies between the markers.

    Args:
        found: by part.
        links: the folder of the JSON and the picture, as the page has to call it.
    """
    sections = [_runs(found), _correct(found.get("correct")), *_fast(found.get("fast"))]
    sections.append(_trains(found.get("trains"), links))
    files = ", ".join(f"[{part}.json]({links}{part}.json)" for part in found)
    if files:
        sections.append(f"All numbers: {files}.")
    return "\n\n".join(section for section in sections if section)


def page(found: Found) -> str:
    return f"# On a GPU\n\n{lead(found)}\n\n{BEGIN}\n\n{body(found)}\n\n{END}\n"


def _runs(found: Found) -> str:
    keys = ("ended", "card", "driver", "cuda", "torch", "python", "date", "commit")
    parts = [*found, *(part for part in PARTS if part not in found)]
    known = {part: dict.fromkeys(keys, "unknown") | content for part, content in found.items()}
    absent = {**dict.fromkeys(keys, ""), "ended": "not run"}
    # A column for each part: nine columns of keys would not fit a page.
    rows = [[key, *(known.get(part, absent)[key] for part in parts)] for key in keys]
    return "## What was run\n\n" + table(("part", *parts), rows, texts=len(parts) + 1)


def _unfinished(content: Mapping[str, Any] | None) -> str:
    if content is None:
        return "This part was not run."
    return "" if content.get("ended") == FINISHED else f"**This part did not come to its end: {content.get('ended')}.**"


def _left_out(content: Mapping[str, Any]) -> str:
    by_reason: dict[str, list[str]] = {}
    for entry in content.get("left_out", []):
        by_reason.setdefault(entry["why"], []).append(entry["name"])
    told = "; ".join(f"{', '.join(names)} ({why})" for why, names in by_reason.items())
    return wrap(f"Left out: {told}.") if told else ""


def _section(title: str, content: Mapping[str, Any] | None, *paragraphs: str) -> str:
    return "\n\n".join(filter(None, (f"## {title}", _unfinished(content), *paragraphs)))


# ---- correct ----

_SAID = {True: "right", False: "WRONG", None: "not checked"}
_ORDER = {False: 0, None: 1, True: 2}


def _checks(content: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The failed ones first."""
    return sorted(content.get("checks", []), key=lambda check: _ORDER[check["ok"]])


def _counts(content: Mapping[str, Any]) -> str:
    by_answer = [sum(check["ok"] is answer for check in content.get("checks", [])) for answer in (True, False, None)]
    return "{} checks were right, {} wrong, {} not made".format(*by_answer)


def _correct(content: Mapping[str, Any] | None) -> str:
    title = "Is it right? (part `correct`)"
    if content is None:
        return _section(title, None)
    rows = [
        (check["name"], _SAID[check["ok"]], number(check.get("seconds")), check.get("said") or "")
        for check in _checks(content)
    ]
    ranks = content.get("ranks", 1)
    intro = wrap(f"{_counts(content)}, on {ranks} rank{'s' if ranks != 1 else ''}. {TERMS}")
    return _section(
        title, content, intro, table(("check", "", "seconds", ""), rows) if rows else "", _left_out(content)
    )


# ---- fast ----


def _fast(content: Mapping[str, Any] | None) -> list[str]:
    if content is None:
        return [_section("How fast is it? (part `fast`)", None)]
    parts = [_blocks(content), _steps(content), _share(content)]
    return [_section("How fast is it? (part `fast`)", content, _left_out(content)), *filter(None, parts)]


def _blocks(content: Mapping[str, Any]) -> str:
    if not content.get("blocks"):
        return ""
    keys = ("copy_bytes_a_second", "flops_a_second", "half_flops_a_second")
    bandwidth, rate, half = ((content.get(key) or 0) / 1e12 for key in keys)
    by_kernel = (
        f", or three times as many at the {half:.0f} of one in float16 where the kernel takes it" if half else ""
    )
    intro = f"""One step of about 1 GB of blocks, by the default settings.{_kernel(content)} "bytes": what moving F,
        momentum, gradients and updates once takes at the {bandwidth:.2f} TB/s of a large copy. "flops": what the step's
        products of matrices take at the {rate:.1f} TFLOP/s of a large product in float32{by_kernel}; "–" where they
        were not counted. All rates were measured here; "of the floor" is the larger of the two over the step."""
    headings = ("blocks", "step ms", "bytes ms", "flops ms", "of the floor")
    rows = []
    for row in content["blocks"]:
        if "failure" in row:
            rows.append((row["name"], f"FAILED: {row['failure']}", "", "", ""))
            continue
        times = (number(row[key]) if row[key] else "–" for key in ("step_ms", "bytes_ms", "flops_ms"))
        rows.append((row["name"], *times, percent(row["of_the_floor"])))
    return f"### Blocks of one kind\n\n{wrap(intro)}\n\n{table(headings, rows)}"


def _kernel(content: Mapping[str, Any]) -> str:
    if not content.get("kernel"):
        return ""
    return " The kernel (ADAFISHER_KERNEL=1, which is not a default) took it, but for exponent 1, which torch took."


def _steps(content: Mapping[str, Any]) -> str:
    if not content.get("steps"):
        return ""
    intro = f"""One optimizer's step on all parameters of a GPT, with random gradients; AdaFisher's by the default
        settings but for what its line says.{_kernel(content)} "device": between two events,
        with the launches queued ahead. "host": until `step()` returns. "wall": from an idle device to an idle device.
        Medians, but for the mean; where median and mean differ, some steps take longer than others. State, and the peak
        while a step runs, are bytes that torch's allocator gave out, without parameters and gradients."""
    headings = (
        "model",
        "optimizer",
        "device ms",
        "× AdamW",
        "host ms",
        "wall ms",
        "wall ms, mean",
        "state MB",
        "peak MB",
    )
    rows = []
    for row in content["steps"]:
        if "failure" in row:
            rows.append(("", row["name"], f"FAILED: {row['failure']}", *[""] * 6))
            continue
        ratio = number(row.get("to_adamw", {}).get("device_ms"))
        times = (number(row["host_ms"]), number(row["wall_ms"]), number(row["wall_ms_mean"]))
        bytes_ = (megabytes(row["state_bytes"]), megabytes(row["peak_bytes"]))
        rows.append((row["model"], row["optimizer"], number(row["device_ms"]), ratio, *times, *bytes_))
    return f"### The whole step\n\n{wrap(intro)}\n\n{table(headings, rows, texts=2)}"


def _share(content: Mapping[str, Any]) -> str:
    parts = []
    for row in content.get("share", []):
        if "failure" in row:
            parts.append(f"FAILED: {cell(row['failure'])}")
            continue
        whole = row["forward_and_backward"]
        milliseconds, by_clock = number(whole["device_ms"]), number(whole["wall_ms"])
        intro = f"""Forward and backward of the GPT of {row["model"]} parameters in bfloat16 autocast, {row["tokens"]}
            tokens, take {milliseconds} ms on the device ({by_clock} ms by the wall clock). Beside it, the step on an
            eighth of its blocks ({row["own"]:,} of {row["parameters"]:,} parameters), which is what one of
            {row["ranks"]} ranks owns.{_kernel(content)} What travels between ranks is not in it."""
        headings = ("optimizer", "device ms", "of a training step", "wall ms", "of a training step")
        rows = []
        for name, case in row["cases"].items():
            if "failure" in case:
                rows.append((name, f"FAILED: {case['failure']}", "", "", ""))
                continue
            by_device = (number(case["device_ms"]), percent(case["share_device"]))
            rows.append((name, *by_device, number(case["wall_ms"]), percent(case["share_wall"])))
        parts.append(f"{wrap(intro)}\n\n{table(headings, rows)}")
    return "### The share of a training step\n\n" + "\n\n".join(parts) if parts else ""


# ---- trains ----


def _trains(content: Mapping[str, Any] | None, links: str) -> str:
    title = "Does it train? (part `trains`)"
    if content is None or not content.get("runs"):
        return _section(title, content)
    model, text = content["model"], content["text"]
    shape = f"{model['parameters']:,} parameters (width {model['width']}, {model['layers']} layers)"
    intro = f"""A byte-level GPT of {shape} in bfloat16 autocast, {model["batch"]} × {model["seq_len"]} bytes a step,
        {content["steps"]} steps each, on {number(text["train_bytes"] / 1e6)} MB of Python sources, none of it seen
        twice. Warm-up of 5 %, then a cosine to zero; weight decay 0.1, gradients clipped at 1. Losses are nats a
        byte."""
    elsewhere = "[How fast it trains](convergence.md)" if links else "How fast it trains (docs/convergence.md)"
    caution = f"""This is a check that it trains on a GPU, and not evidence that it trains better: with two learning
        rates each, the best one lies at the edge of its grid, and there is one seed. {elsewhere} is measured elsewhere,
        on small models."""
    headings = ("optimizer", "lr", "held out", "training", "steps", "ms a step", "seconds", "")
    rows = [_run(run) for run in sorted(content["runs"], key=lambda run: (run["optimizer"], run["lr"]))]
    checks = [wrap(f"- {_SAID[each['ok']]}: {each['name']}: {each['said']}", "  ") for each in content["checks"]]
    picture = f"![Losses by step and by second]({links}{PICTURE})"
    paragraphs = (wrap(intro), table(headings, rows), wrap(caution), picture)
    return _section(title, content, *paragraphs, "\n".join(checks), _left_out(content))


def _run(run: Mapping[str, Any]) -> tuple[str, ...]:
    step, seconds, held_out = run["held_out"][-1] if run["held_out"] else (0, 0.0, None)
    training = run["train"][-1][2] if run["train"] else None
    each = 1e3 * seconds / step if step else None
    told = run.get("failure") or ("" if run["ended"] == FINISHED else run["ended"])
    numbers = (f"{run['lr']:g}", number(held_out, 4), number(training, 4), str(step), number(each), number(seconds))
    return (run["optimizer"], *numbers, told)


def draw(content: Mapping[str, Any]) -> Any:
    """Losses by step and by second."""
    figure, panels = figures.panels([3.6, 2.8])
    colours = {"AdaFisher": figures.OURS, "AdamW": figures.INK, "Muon": figures.THEIRS}
    rates: dict[str, list[float]] = {}
    for run in content["runs"]:
        rates.setdefault(run["optimizer"], []).append(run["lr"])
    for run in sorted(content["runs"], key=lambda run: (run["optimizer"], run["lr"])):
        style = "-" if run["lr"] == max(rates[run["optimizer"]]) else "--"
        held_out = [e for e in run["held_out"] if e[2] is not None]
        label = f"{run['optimizer']}, lr {run['lr']:g}" + (f": {held_out[-1][2]:.3f} at the end" if held_out else "")
        for at, panel in enumerate(panels):
            colour = colours.get(run["optimizer"], "black")
            panel.plot([e[at] for e in held_out], [e[2] for e in held_out], style, color=colour, lw=1.8, label=label)
    # The first value, of weights that know nothing, would take most of the height.
    early = [e[2] for run in content["runs"] for e in run["held_out"][1:] if e[2] is not None]
    for panel, what in zip(panels, ("step", "second of training, evaluations not counted"), strict=True):
        panel.set(xlabel=what, ylabel="held-out loss, nats a byte")
        if early:
            panel.set_ylim(0.95 * min(early), 1.02 * max(early))
    figures.head(panels[0], f"Held-out loss on one {content['card']}")
    model = content["model"]
    figures.tell(
        figure,
        "REHEARSAL." if content["rehearsal"] else "",
        f"Byte-level GPT of {model['parameters'] / 1e6:.1f} M parameters,"
        f" {content['steps']} steps of {model['batch']} × {model['seq_len']} bytes, bf16 autocast; AdaFisher's other"
        " settings are the defaults. Two rates each, so the best lies at the edge of its grid, and one seed: no"
        " evidence of which trains better.",
        f"torch {content['torch']}; {content['date'][:10]}.",
    )
    return figure


# ---- what is called ----


def make(folder: Path) -> Found:
    """Write FOLDER/gpu.md and the picture from what is there."""
    found = read(folder)
    if found.get("trains", {}).get("runs"):
        temporary = folder / f".{PICTURE}"
        figures.write(draw(found["trains"]), temporary)
        temporary.replace(folder / PICTURE)
    (folder / "gpu.md").write_text(page(found), encoding="utf-8")
    return found


def summary(folder: Path, most: int = 8000) -> str:
    """For the terminal: what is wrong first, then the numbers, in a few lines."""
    found = read(folder)
    lines = [f"{part}: {found[part].get('ended') if part in found else 'not run'}" for part in PARTS]
    correct, fast, trains = (found.get(part, {}) for part in PARTS)
    if correct.get("checks"):
        lines.append(_counts(correct))
    for check in _checks(correct) + _checks(trains):
        if check["ok"] is not True:
            lines.append(f"  {_SAID[check['ok']]}: {check['name']}: {cell(check.get('said') or '', 160)}")
    for row in [*fast.get("blocks", []), *fast.get("steps", [])]:
        lines.append(f"  {_fast_line(row)}")
    for row in fast.get("share", []):
        for name, case in row.get("cases", {}).items():
            lines.append(f"  share of a step, {name}: {case.get('failure') or percent(case['share_device'])}")
    for run in trains.get("runs", []):
        optimizer, lr, held_out, _, steps, each, _, told = _run(run)
        lines.append(f"  {optimizer}, lr {lr}: held out {held_out} after {steps} steps, {each} ms each {told}")
    for part, content in found.items():
        left = [entry["name"] for entry in content.get("left_out", [])]
        lines += [f"  left out of {part}: {', '.join(left)}"] if left else []
    text = "\n".join(lines)
    return text if len(text) <= most else text[: most - 30] + "\n… (the rest is in gpu.md)"


def _fast_line(row: Mapping[str, Any]) -> str:
    if "failure" in row:
        return f"{row['name']}: FAILED: {cell(row['failure'], 160)}"
    if "step_ms" in row:
        return f"{row['name']}: {number(row['step_ms'])} ms, {percent(row['of_the_floor'])} of the floor"
    ratio = number(row.get("to_adamw", {}).get("device_ms"))
    return f"{row['name']}: device {number(row['device_ms'])} ms ({ratio} × AdamW), host {number(row['host_ms'])}"


def publish(folder: Path, docs: Path) -> None:
    """Publish FOLDER: its results into docs/gpu/, the page of all results into docs/gpu.md.

    Raises:
        SystemExit: there is nothing to publish, a rehearsal, or a page without its markers; then
            nothing changes.
    """
    found = make(folder)
    rehearsals = [part for part, content in found.items() if content["rehearsal"]]
    if rehearsals:
        raise SystemExit(f"report: {folder} is a rehearsal ({', '.join(rehearsals)}), which is never published.")
    if not found:
        raise SystemExit(f"report: {folder} has no results.")
    target, path = docs / "gpu", docs / "gpu.md"
    before = path.read_text(encoding="utf-8") if path.exists() else page({})
    split(before, path)
    target.mkdir(parents=True, exist_ok=True)
    for name in (*(f"{part}.json" for part in found), *([PICTURE] if "trains" in found else [])):
        if (folder / name).exists():
            shutil.copy(folder / name, target / name)
    published = read(target)
    head, _, tail = split(before, path)
    path.write_text(f"{head}{lead(published)}{tail[0]}{body(published, 'gpu/')}{tail[1]}", encoding="utf-8")


def split(text: str, path: Path) -> tuple[str, str, tuple[str, str]]:
    """A page's text before its first paragraph, that paragraph, and what surrounds the results.

    Raises:
        SystemExit: it has no such places.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise SystemExit(f"report: {path} needs {BEGIN} and, below it, {END}, once each.")
    start = next((at for at in _starts(text) if not text.startswith(("#", "\n"), at)), len(text))
    stop = text.find("\n\n", start)
    if not text.startswith("**", start) or not start < stop < text.index(BEGIN):
        raise SystemExit(f"report: the first paragraph of {path} is to say in bold whether a GPU has run this.")
    middle = text[stop : text.index(BEGIN)] + BEGIN + "\n\n"
    return text[:start], text[start:stop], (middle, "\n\n" + text[text.index(END) :])


def _starts(text: str) -> list[int]:
    """Where each line begins."""
    return [0, *(at + 1 for at, letter in enumerate(text) if letter == "\n")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--publish", action="store_true", help="into docs/")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="another folder than docs/")
    given = parser.parse_args()
    try:
        if given.publish:
            publish(given.folder, given.docs)
        else:
            make(given.folder)
    except json.JSONDecodeError as error:
        raise SystemExit(f"report: a file of {given.folder} is no JSON: {error}") from None
    print(f"Written: {given.docs / 'gpu.md' if given.publish else given.folder / 'gpu.md'}")


if __name__ == "__main__":
    main()
