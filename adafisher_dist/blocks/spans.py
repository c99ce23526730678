"""Ranges of parameters: what ranks own and store is told in these."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Span:
    """Elements [start, stop) of a parameter, flattened row-major, with `numel` elements in all."""

    parameter: int
    numel: int
    start: int
    stop: int

    def __post_init__(self) -> None:
        assert 0 <= self.start <= self.stop <= self.numel, self

    def __len__(self) -> int:
        return self.stop - self.start

    def intersect(self, other: Span) -> Span | None:
        """The common elements, or None where there are none."""
        if self.parameter != other.parameter:
            return None
        start, stop = max(self.start, other.start), min(self.stop, other.stop)
        return Span(self.parameter, self.numel, start, stop) if start < stop else None


@dataclass(frozen=True, slots=True)
class StoredSpan:
    """A span that a rank stores; it begins at element `offset` of the rank's tensor `tensor`."""

    span: Span
    tensor: int
    offset: int


Spans = tuple[Span, ...]
