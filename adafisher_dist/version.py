"""The package's version; pyproject.toml repeats it (tests/smoke.py compares them)."""

__version__ = "0.2.0.dev0"
