"""Ctrl-C in the middle of a step."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def waiting_interrupts(wait: bool) -> Iterator[None]:
    """Let Python's KeyboardInterrupt wait for the end of what is within; a second one does not.

    Half a step could not be saved, as scripts do when they are interrupted, nor could a notebook go
    on from it. Nothing changes where `wait` is False, in other threads, and where the handler of
    SIGINT is another's.
    """
    main = threading.current_thread() is threading.main_thread()
    if not (wait and main and signal.getsignal(signal.SIGINT) is signal.default_int_handler):
        yield
        return
    came = False

    def note(*_: Any) -> None:
        nonlocal came
        if came:
            raise KeyboardInterrupt
        came = True

    signal.signal(signal.SIGINT, note)
    try:
        yield
    except Exception as error:
        if came:
            raise KeyboardInterrupt from error
        raise
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if came:
        raise KeyboardInterrupt
