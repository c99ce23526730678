"""Adds the project's own papers to the site; the files stay at the repository's top level."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
PAPERS = ("DESIGN.md", "LOG.md", "CHANGELOG.md")


def on_files(files: Files, config: Any, **_: Any) -> Files:
    """Add them to the pages."""
    for name in PAPERS:
        files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Links to them lead out of docs/ in the repository, and not in the site."""
    for name in PAPERS:
        markdown = markdown.replace(f"](../{name}", f"]({name}").replace(f"](../../{name}", f"](../{name}")
    markdown = markdown.replace("](docs/", "](")  # of those papers, which lie above docs/ in the repository
    return markdown
