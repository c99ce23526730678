"""Starts the command line: python -m adafisher_dist."""

from __future__ import annotations

import sys

_EXTRA = ("click", "rich", "safetensors", "typer")
_INSTALL = "pip install rich safetensors typer"  # the extra "cli", which only a clone can name


def main() -> None:
    """Run the command line, or say what to install for it."""
    try:
        from adafisher_dist.tools.cli import app
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in _EXTRA:
            raise
        sys.exit(f"The command line needs {package}: {_INSTALL}")
    app()


if __name__ == "__main__":
    main()
