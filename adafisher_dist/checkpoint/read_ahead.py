"""Reads on threads beside the caller's, which tells waiting ranks that they get on."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Event
from types import TracebackType
from typing import TypeVar

from adafisher_dist.comm.host_groups import beat

T = TypeVar("T")
R = TypeVar("R")

# What is read at a time: so many results may be waiting, or in use.
_THREADS = 2


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

        The next one begins when the caller is done with the one before the last.

        Raises:
            Exception: what `work` raises, when its item's turn comes; or another rank was lost.
        """
        begun: deque[tuple[T, Future[R]]] = deque()
        for item in items:
            future = self._pool.submit(work, item)
            future.add_done_callback(lambda _: self.tick())
            begun.append((item, future))
            if len(begun) == _THREADS:
                yield self._first(begun)
        while begun:
            yield self._first(begun)

    def _first(self, begun: deque[tuple[T, Future[R]]]) -> tuple[T, R]:
        item, future = begun.popleft()
        while not future.done():
            self._moved.wait()
            self._moved.clear()
            beat()
        return item, future.result()
