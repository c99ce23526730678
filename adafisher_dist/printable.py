"""Text that may be shown: names in a file may hold what a terminal would obey."""

from __future__ import annotations

import logging
import os


def printable(text: object) -> str:
    r"""The text with all that is not printable escaped, as \x1b, but line ends."""
    told = str(text)
    if told.isprintable():
        return told
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in told)


def _printable_argument(value: object) -> object:
    return printable(value) if isinstance(value, str | os.PathLike | BaseException) else value


def printable_record(record: logging.LogRecord) -> bool:
    """A filter for a logger: escapes what is not printable in names and errors that it tells of."""
    if isinstance(record.args, tuple):
        record.args = tuple(map(_printable_argument, record.args))
    record.msg = _printable_argument(record.msg)
    return True


logging.getLogger("adafisher_dist").addFilter(printable_record)
