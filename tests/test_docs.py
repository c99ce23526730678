"""The documentation's site builds, its code runs, its outputs and figures are up to date."""

from __future__ import annotations

import importlib.util
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


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for module in ("mkdocs", "material", "mkdocstrings"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed: pip install '.[docs]'")
    folder = tmp_path_factory.mktemp("site")
    # Not --quiet, with which --strict passes over warnings.
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    unreachable = {f"{kind}_proxy": "http://127.0.0.1:9" for kind in ("http", "https", "all")}  # it needs no network
    environment = {**os.environ, **unreachable, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


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


@pytest.mark.parametrize("page", ["quickstart.md", "checkpoints.md", "metrics.md", "migrating.md", "integrations.md"])
def test_code_blocks_run_one_after_the_other(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if page == "integrations.md":
        pytest.importorskip("peft", reason="the extra 'lora' is not installed")
    monkeypatch.chdir(tmp_path)
    found = [code for code in blocks(page, "python") if not code.startswith("# train_")]
    assert found
    names: dict[str, Any] = {}
    for code in found:
        exec(compile(code, page, "exec"), names)
    if page == "quickstart.md":
        assert names["optimizer"].skipped_steps == 0
        assert names["loss"].item() < 1.2, "labels of four classes are learnt by heart"
    if page == "integrations.md":
        assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
        kept = json.loads((tmp_path / "ckpt/step1/manifest.json").read_text())["content"]["tensors"]
        assert all("lora_" in name for name in kept if name.startswith("weight/"))


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize("script", ["train_ddp.py", "train_fsdp2.py"])
def test_the_scripts_for_several_ranks_run(script: str, tmp_path: Path) -> None:
    (code,) = (code for code in blocks("quickstart.md", "python") if code.startswith(f"# {script}: torchrun"))
    (tmp_path / script).write_text(code)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, timeout=180, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert read_latest(tmp_path / "ckpt") == "step20"


def test_the_deepspeed_config_is_accepted() -> None:
    (config,) = map(json.loads, blocks("quickstart.md", "json"))
    assert config["optimizer"]["type"] == "AdaFisher"
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = adafisher_dist.AdaFisher([weight], **config["optimizer"]["params"])
    assert optimizer.get_lr() == 6e-4


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


def test_the_presets_are_those_of_the_code() -> None:
    rows = re.findall(r'`"preset": "(\w+)"` \| (.*) \|$', text("settings.md"), flags=re.MULTILINE)
    told = {
        name: {key: float(value) for key, value in re.findall(r"`(\w+)` ([\d.e-]+)", settings)}
        for name, settings in rows
    }
    assert told == PRESETS


def test_each_picture_is_drawn_by_the_script_and_shown() -> None:
    sys.path.append(str(DOCS))
    try:
        import pictures
    finally:
        sys.path.remove(str(DOCS))
    drawn = {"blocks": pictures.blocks(), "ranks": pictures.ranks(), "step": pictures.step()}
    assert {path.stem for path in pictures.FOLDER.iterdir()} == set(drawn)
    shown = set(re.findall(r"\]\(pictures/(\w+)\.svg\)", text("how_it_works.md")))
    assert shown == set(drawn)
