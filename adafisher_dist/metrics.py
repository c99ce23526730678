"""Metrics of every n-th step, for users: what each is, and a callback that writes a CSV file."""

from adafisher_dist.stepping.metrics import NAMES, Callback, CsvLog

__all__ = ["NAMES", "Callback", "CsvLog"]
