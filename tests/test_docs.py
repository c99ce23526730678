"""The documentation's site builds, its code runs, its outputs and figures are up to date."""

from __future__ import annotations

import html
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torchrun import succeed

import adafisher_dist
from adafisher_dist.checkpoint.latest import read_latest
from adafisher_dist.settings import DEFAULTS, PRESETS

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"


def text(page: str) -> str:
    return (DOCS / page).read_text(encoding="utf-8")


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text(page), flags=re.MULTILINE | re.DOTALL)


# ---- the site ----


def test_it_builds_with_all_pages(site: Path) -> None:
    for page in [*DOCS.glob("*.md"), Path("DESIGN.md"), Path("LOG.md"), Path("CHANGELOG.md")]:
        assert (site / page.with_suffix(".html").name).is_file(), page
    assert not list(site.glob("*.py")), "scripts are no part of the site"


def test_it_loads_nothing_from_elsewhere(site: Path) -> None:
    for page in site.glob("*.html"):
        html = page.read_text(encoding="utf-8")
        loaded = re.findall(r'<(?:script|img|link|iframe)\b[^>]*?(?:src|href)="((?:https?:)?//[^"]*)"', html)
        assert not loaded, f"{page.name} loads {loaded}"


def test_the_reference_has_everything_public(site: Path) -> None:
    html = (site / "reference.html").read_text(encoding="utf-8")
    names = [name for name in adafisher_dist.__all__ if name != "__version__"]
    for name in [*names, "ds.from_config", "ds.save_checkpoint", "ds.load_checkpoint"]:
        assert f'id="adafisher_dist.{name}"' in html, name
    own = [kind for kind in adafisher_dist.AdaFisher.__mro__ if kind.__module__.startswith("adafisher_dist.")]
    public = [name for kind in own for name in vars(kind) if not name.startswith("_")]
    assert {"step", "state_dict", "skipped_steps"} <= set(public)
    for name in public:
        assert f'id="adafisher_dist.AdaFisher.{name}"' in html, name
    for name in [*DEFAULTS, "process_group"]:
        assert f"<code>{name}</code>" in html, name
    for role in (":math:", ".. math::", ":class:"):
        assert role not in html, f"{role} is shown as it stands"


def test_the_papers_of_the_top_level_are_reached(site: Path) -> None:
    assert 'href="LOG.html"' in (site / "convergence.html").read_text(encoding="utf-8")


# ---- in the repository, where nobody builds the site ----

PAGES = sorted(DOCS.rglob("*.md"))
PAGES += [ROOT / name for name in ("DESIGN.md", "CONTRIBUTING.md", "CHANGELOG.md")]


def anchors(page: Path) -> set[str]:
    """Of its headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_and_headings_of_the_repository(page: Path) -> None:
    prose = re.sub(r"^```.*?^```|`[^`\n]*`", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", prose) if not link.startswith("http")]
    wrong = []
    for link in links:
        path, _, heading = link.partition("#")
        target = page.parent / path if path else page
        if not target.is_file() or (heading and heading not in anchors(target)):
            wrong.append(link)
    assert not wrong


# ---- what it says of the package ----


def test_the_command_line_page_has_all_options_and_defaults() -> None:
    import typer

    from adafisher_dist.tools.cli import app

    command: Any = typer.main.get_command(app)
    page = text("command_line.md")
    sections = {part.partition("\n")[0]: part for part in re.split(r"^## ", page, flags=re.MULTILINE)[1:]}
    assert set(sections) == set(command.commands)
    for name, sub in command.commands.items():
        rows = re.findall(r"^\| (`--.*?) \| (.*?) \|", sections[name], flags=re.MULTILINE)
        told = {option: default for options, default in rows for option in re.findall(r"`(--[\w-]+)`", options)}
        options = [param for param in sub.params if param.opts[0].startswith("--")]
        names = {option for param in options for option in (*param.opts, *param.secondary_opts)}
        assert set(told) == names - {"--help"}, name
        for param in options:
            default = getattr(param.default, "value", param.default)
            if isinstance(default, (int, float, str)) and not isinstance(default, bool):
                assert told[param.opts[0]] == str(default), param.opts


# ---- its code and outputs ----


PAGES_WITH_CODE = [
    "index.md",
    "quickstart.md",
    "checkpoints.md",
    "metrics.md",
    "migrating.md",
    "integrations.md",
    "embeddings_and_heads.md",
]


@pytest.mark.parametrize("page", PAGES_WITH_CODE)
def test_code_blocks_run_one_after_the_other(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if page == "integrations.md":
        pytest.importorskip("peft", reason="the extra 'lora' is not installed")
    monkeypatch.chdir(tmp_path)
    found = [code for code in blocks(page, "python") if not code.startswith("# train_")]
    assert found
    names: dict[str, Any] = {}
    for code in found:
        exec(compile(code, page, "exec"), names)
    if page == "index.md":
        told = re.findall(r"# prints ([\d.]+) → ([\d.]+)$", found[0], flags=re.MULTILINE)
        first, last = re.findall(r"[\d.]+", capsys.readouterr().out)
        assert told == [(first, last)]
    if page == "quickstart.md":
        assert names["optimizer"].skipped_steps == 0
        assert names["loss"].item() < 1.2, "labels of four classes are learnt by heart"
    if page == "integrations.md":
        assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
        kept = json.loads((tmp_path / "ckpt/step1/manifest.json").read_text())["content"]["tensors"]
        assert all("lora_" in name for name in kept if name.startswith("weight/"))


SCRIPTS = {
    match[1]: code
    for page in ("quickstart.md", "embeddings_and_heads.md")
    for code in blocks(page, "python")
    if (match := re.match(r"# (train_\w+\.py): torchrun --standalone --nproc-per-node \d (train_\w+\.py)\n", code))
}


def run_script(script: str, ranks: int, folder: Path) -> str:
    (folder / script).write_text(SCRIPTS[script])
    return succeed(ranks, str(folder / script), cwd=folder)


def test_each_script_for_several_ranks_is_run_below() -> None:
    assert set(SCRIPTS) == {f"train_{name}.py" for name in ("ddp", "fsdp2", "resume", "deepspeed", "trainer", "groups")}
    for script, code in SCRIPTS.items():
        assert code.splitlines()[0].endswith(f" {script}"), "it is started by its own name"


@pytest.mark.slow
@pytest.mark.dist
def test_the_scripts_for_several_ranks_run(tmp_path: Path) -> None:
    """FSDP2's, and DDP's, whose checkpoint goes on under FSDP2 on twice as many ranks."""
    run_script("train_fsdp2.py", 2, tmp_path)
    assert read_latest(tmp_path / "ckpt_fsdp2") == "step20"
    run_script("train_ddp.py", 2, tmp_path)
    run_script("train_resume.py", 4, tmp_path)
    assert read_latest(tmp_path / "ckpt") == "step40"


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.deepspeed
def test_the_deepspeed_script_runs_and_resumes_on_other_ranks(tmp_path: Path) -> None:
    assert "adafisher" not in SCRIPTS["train_deepspeed.py"], "it imports nothing of ours"
    (tmp_path / "ds.json").write_text(blocks("quickstart.md", "json")[0])
    assert "nothing is loaded" in run_script("train_deepspeed.py", 2, tmp_path)
    assert read_latest(tmp_path / "ckpt_ds") == "global_step20"
    run_script("train_deepspeed.py", 1, tmp_path)
    assert read_latest(tmp_path / "ckpt_ds") == "global_step40"


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.deepspeed
@pytest.mark.parametrize("script", ["train_trainer.py", "train_groups.py"])
def test_the_scripts_with_trainer_run(script: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="the extra 'hf' is not installed")
    run_script(script, 2, tmp_path)
    if script == "train_trainer.py":
        assert (tmp_path / "runs/trainer/checkpoint-20/global_step20/adafisher_dist/manifest.json").is_file()


def test_the_deepspeed_config_is_accepted() -> None:
    (config,) = map(json.loads, blocks("quickstart.md", "json"))
    assert config["optimizer"]["type"] == "AdaFisher"
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = adafisher_dist.AdaFisher([weight], **config["optimizer"]["params"])
    assert optimizer.get_lr() == 6e-4


def test_the_three_numbers_are_those_of_their_pages() -> None:
    page = text("index.md")
    trained = json.loads((DOCS / "convergence.json").read_text())["tasks"]["laws64x20"]
    losses = {row["optimizer"]: f"{row['loss']:.3f}" for row in trained}
    table = re.findall(r"^\| \*\*(.*?)\*\*.*? \| (.*?) \| (.*?) \| (.*) \|$", page, flags=re.MULTILINE)
    assert [row[0] for row in table] == ["final loss", "state", "share of a training step"]
    (_, ours, adamw, others), (_, *state, _), (_, *shares, _) = table
    assert (ours, adamw) == (losses["AdaFisher"], losses["AdamW"])
    assert re.findall(r"(\w+): (\d\.\d+)", others) == [(name, losses[name]) for name in ("NorMuon", "SOAP", "Muon")]
    assert state == ["12", "8"], "test_the_bytes_an_element_are_those_of_the_code has it"
    (measured,) = json.loads((DOCS / "gpu/fast_by_torch.json").read_text())["share"]
    told = [measured["cases"][name]["share_device"] * 100 for name in ("AdaFisher", "AdamW (fused)")]
    assert shares == [f"{told[0]:.0f} %", f"{told[1]:.1f} %"] and measured["ranks"] == 8


def test_what_the_default_costs_on_a_gpu_is_what_was_measured() -> None:
    found = [json.loads((DOCS / f"gpu/{name}.json").read_text()) for name in ("fast_by_torch", "fast")]
    assert [each["kernel"] for each in found] == [False, True]
    steps = [{row["name"]: row.get("device_ms") for row in each["steps"]} for each in found]
    for size in ("124 M", "350 M"):
        told = re.findall(rf"^\| step of a GPT of {size} parameters, ms \| (.+) \|$", text("gpu.md"), re.MULTILINE)
        names = [(0, "AdaFisher"), (1, "AdaFisher"), (0, "Muon, AdamW (fused) for the rest"), (0, "AdamW (fused)")]
        assert told == [" | ".join(f"{steps[at][f'{name}, {size}']:.3g}" for at, name in names)]


def test_the_table_of_embeddings_and_heads_is_that_of_the_code() -> None:
    from adafisher_dist.blocks.grid import grid_of
    from adafisher_dist.settings import state_config

    rows = re.findall(r"^\| [^|]+ \| \((\d+), (\d+)\) \| (\w+) \|$", text("embeddings_and_heads.md"), re.MULTILINE)
    assert len(rows) == 13
    for high, wide, told in rows:
        dense = grid_of((int(high), int(wide)), state_config(DEFAULTS)).dense_row_groups
        assert told == ("blocks" if dense else "elements"), (high, wide)


def test_the_table_of_what_makes_a_step_cheaper_is_todays() -> None:
    from adafisher_dist.blocks.estimate import estimate, transformer_shapes
    from adafisher_dist.settings import normalize, state_config

    page = text("troubleshooting.md")
    rows = re.findall(r"^\| (\d+) \| (\d+) \| (\d+) \| (\d+) MB \|$", page, flags=re.MULTILINE)
    assert [row[:2] for row in rows] == [("128", "1"), ("64", "1"), ("128", "10"), ("64", "10")]
    shapes = transformer_shapes(int(350e6))
    for size, often, flops, state in rows:
        group = {**DEFAULTS, "block_size": int(size), "inverse_update_freq": int(often)}
        normalize(group)
        costs = estimate(shapes, "zero2", 8, state_config(group), inverse_update_freq=int(often))
        held = costs.memory["total"] - costs.memory["buffers"]
        assert (flops, state) == (f"{costs.flops / 1e9:.0f}", f"{held / 1e6:.0f}")


# What people type when something goes wrong, and the heading that has to turn up.
SYMPTOMS = {
    "loss nan": "The loss is NaN or grows",
    "loss does not move": "The loss does not move",
    "worse than adamw": "The loss is worse than with AdamW",
    "learning rate to start": "Which learning rate to start from",
    "job hangs at start": "The job hangs at start, before the first line",
    "out of memory": "Out of memory",
    "resume refused": "Resume is refused",
    "step slow": "A step is slow",
    "not a valid optimizer": '"AdaFisher is not a valid optimizer"',
    "config refused": "The config or the model is refused",
    "metrics do not appear": "Metrics do not appear",
    "save fails": "A save fails",
    "job aborts": "The job aborts at its end",
}


def test_search_finds_the_symptoms_by_their_headings(site: Path) -> None:
    index = json.loads((site / "search/search_index.json").read_text(encoding="utf-8"))["docs"]
    titles = [html.unescape(entry["title"]) for entry in index if entry["location"].startswith("troubleshooting.html#")]
    for typed, heading in SYMPTOMS.items():
        found = [title for title in titles if set(typed.split()) <= set(re.findall(r"\w+", title.lower()))]
        assert found == [heading], typed
    page = text("troubleshooting.md")
    listed = set(re.findall(r"\]\(#([\w-]+)\) \|$", page, flags=re.MULTILINE))
    (symptoms,) = (re.findall(r'<h2 id="([\w-]+)"', (site / "troubleshooting.html").read_text(encoding="utf-8")),)
    assert listed == set(symptoms), "the table at the top has every symptom"


def test_the_outputs_of_estimate_are_todays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from typer.testing import CliRunner

    from adafisher_dist.tools.cli import app

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (model,) = blocks("memory.md", "python")
    (tmp_path / "mymodel.py").write_text(model)
    page = text("memory.md").replace("\\\n", " ")
    shown = re.findall(r"^    \$ python -m adafisher_dist (estimate .*)\n((?:    .*\n|\n)+)", page, flags=re.MULTILINE)
    assert len(shown) == 3
    for command, output in shown:
        result = CliRunner().invoke(app, command.split())
        assert result.exit_code == 0, result.output
        assert output.split() == result.stdout.split(), command
    sys.modules.pop("mymodel", None)


def test_the_table_of_rows_per_block_is_todays() -> None:
    from adafisher_dist.blocks.estimate import estimate, transformer_shapes
    from adafisher_dist.settings import normalize, state_config

    shapes = transformer_shapes(int(7e9))
    rows = re.findall(
        r"^\| (\d+) \| ([\d.]+) GB \| ([\d.]+) GB \| ([\d.]+) GB \| ([\d.]+) MB \|$", text("memory.md"), re.M
    )
    assert [row[0] for row in rows] == ["1", "16", "64"]
    for depth, *told in rows:
        group = {**DEFAULTS, "rows_per_block": int(depth)}
        normalize(group)
        costs = estimate(shapes, "zero3", 64, state_config(group))
        amounts = costs.memory["fisher"] / 1e9, costs.memory["total"] / 1e9, costs.least / 1e9
        assert told == [*(f"{amount:.1f}" for amount in amounts), f"{costs.sent / 1e6:.3g}"]


@pytest.mark.parametrize(
    ("shape", "dtype", "bytes_an_element"),
    [((4096, 4096), "float32", 12), ((4096,), "float32", 8), ((50257, 768), "float32", 8), ((4096,), "bfloat16", 10)],
)
def test_the_bytes_an_element_are_those_of_the_code(shape: tuple[int, ...], dtype: str, bytes_an_element: int) -> None:
    from adafisher_dist.blocks.estimate import estimate
    from adafisher_dist.settings import normalize, state_config

    group = {**DEFAULTS, "fisher_dtype": dtype}
    normalize(group)
    memory = estimate([shape], "ddp", 1, state_config(group)).memory
    # Without the workspace, whose size does not depend on the model's; of a bfloat16 F the seeds
    # are buffers too.
    seeds = 0 if dtype == "float32" else 4 * math.prod(shape)
    assert round((memory["total"] - memory["buffers"] + seeds) / math.prod(shape)) == bytes_an_element
    page = " ".join(text("memory.md").split())
    if dtype == "float32":
        assert f"= {bytes_an_element}" in page
    else:
        assert "Elements without blocks take 2 bytes more" in page


def test_the_table_of_storages_is_that_of_the_code() -> None:
    from adafisher_dist.blocks.estimate import estimate
    from adafisher_dist.settings import normalize, state_config

    chosen: dict[str, dict[str, Any]] = {
        "the default": {},
        "`packed`": {"packed": True},
        "`fisher_dtype` bfloat16": {"fisher_dtype": torch.bfloat16},
        "both": {"fisher_dtype": torch.bfloat16, "packed": True},
    }
    told = re.findall(r"^\| ([^|]+) \| ([\d.]+) \| ([\d.]+) \|$", text("memory.md"), flags=re.MULTILINE)
    assert [row[0] for row in told] == list(chosen)
    for name, *amounts in told:
        group = {**DEFAULTS, **chosen[name]}
        normalize(group)
        for shape, amount in zip([(4096, 4096), (4096 * 4096,)], amounts, strict=True):
            memory = estimate([shape], "ddp", 1, state_config(group)).memory
            # All but the workspace of a chunk: seeds are buffers too.
            workspace = estimate([shape], "ddp", 1, state_config(DEFAULTS)).memory["buffers"]
            assert float(amount) == pytest.approx((memory["total"] - workspace) / 4096**2, abs=0.06), (name, shape)


def test_the_presets_are_those_of_the_code() -> None:
    rows = re.findall(r'`"preset": "(\w+)"` \| (.*) \|$', text("settings.md"), flags=re.MULTILINE)
    told = {
        name: {key: float(value) for key, value in re.findall(r"`(\w+)` ([\d.e-]+)", settings)}
        for name, settings in rows
    }
    assert told == PRESETS


def test_each_picture_is_drawn_by_the_script_and_shown(tmp_path: Path) -> None:
    sys.path.append(str(DOCS))
    try:
        import pictures
    finally:
        sys.path.remove(str(DOCS))
    drawn = {"blocks": pictures.blocks(), "ranks": pictures.ranks(), "step": pictures.step()}
    assert {path.stem for path in pictures.FOLDER.iterdir()} == set(drawn)
    shown = set(re.findall(r"\]\(pictures/(\w+)\.svg\)", text("how_it_works.md")))
    assert shown == set(drawn)
    for name, figure in drawn.items():
        pictures.figures.write(figure, tmp_path / "drawn.svg")
        assert (tmp_path / "drawn.svg").read_text() == (pictures.FOLDER / f"{name}.svg").read_text(), name


REDRAW = """
import pathlib, sys, figures, redraw
for name in redraw.FIGURES:
    path = pathlib.Path(sys.argv[1]) / f"{name}.svg"
    path.parent.mkdir(exist_ok=True)
    figures.write(redraw.figure(name), path)
"""


def test_each_figure_is_drawn_from_its_numbers(tmp_path: Path) -> None:
    command = [sys.executable, "-c", REDRAW, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT / "benchmarks", env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=120)
    assert done.returncode == 0
    drawn = {path.relative_to(tmp_path) for path in tmp_path.rglob("*.svg")}
    assert drawn == {path.relative_to(DOCS) for path in (*DOCS.glob("*.svg"), *DOCS.glob("gpu/*.svg"))}
    for path in drawn:
        assert (tmp_path / path).read_text() == (DOCS / path).read_text(), f"{path}: python benchmarks/redraw.py"
    pages = "".join(text(page) for page in ("benchmarks.md", "gpu.md", "convergence.md"))
    assert {str(path) for path in drawn} == set(re.findall(r"\]\(([\w/]+\.svg)\)", pages))
