"""Reads on threads beside the caller's, which tells waiting ranks that they get on."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from threading import Event
from types import TracebackType
from typing import TypeVar

from adafisher_dist.comm.host_groups import beat

T = TypeVar("T")
R = TypeVar("R")

# What is read at a time; and so many results at most are being made, wait or are in use: with as
# many as there are threads, one would wait for the other.
_THREADS, _BEGUN = 2, 4

# Seconds after which the other ranks are told again: to be woken by each read slows the threads.
_TELL = 0.1


class ReadAhead:
    """Two threads that read. Use as a context manager: it leaves none behind."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(_THREADS, "adafisher_dist-read")
        self._moved = Event()

    def __enter__(self) -> ReadAhead:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._pool.shutdown(cancel_futures=True)

    def tick(self) -> None:
        """Something was read; for threads. A disk that answers no more makes no others wait."""
        self._moved.set()

    def in_order(self, work: Callable[[T], R], items: Iterable[T]) -> Iterator[tuple[T, R]]:
        """Each item, and what `work` makes of it on a thread.

        At most four are begun that the caller is not done with.

        Raises:
            Exception: what `work` raises, when its item's turn comes; or another rank was lost.
        """
        begun: deque[tuple[T, Future[R]]] = deque()
        for item in items:
            begun.append((item, self._pool.submit(work, item)))
            if len(begun) == _BEGUN:
                yield self._first(begun)
        while begun:
            yield self._first(begun)

    def _first(self, begun: deque[tuple[T, Future[R]]]) -> tuple[T, R]:
        item, future = begun.popleft()
        while not future.done():
            wait([future], _TELL)
            if future.done() or self._moved.is_set():
                self._moved.clear()
                beat()
        return item, future.result()
