"""The package's version, for whoever has to tell it; pyproject.toml has it too (tests/smoke.py compares them)."""

__version__ = "0.2.0.dev0"
