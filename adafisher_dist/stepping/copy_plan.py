"""Pieces of stored tensors and their places in a buffer, as lists of views for one copy call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from adafisher_dist.blocks.sharding import TensorPiece

Flats = Sequence[Tensor | None]  # of each stored tensor, 1-d; None where it takes no part


@dataclass(frozen=True, slots=True, eq=False)
class _Cut:
    """How a stored tensor is cut: lengths of its parts, which are pieces, their buffer views."""

    tensor: int
    lengths: list[int]
    chosen: list[int]
    parts: list[Tensor]
    bounds: list[tuple[int, int]]

    def pieces(self, flat: Tensor) -> list[Tensor]:
        """Views of the flattened tensor."""
        if len(self.lengths) == 1:
            return [flat]
        if len(self.bounds) < 4:  # to split makes the views that are not wanted too
            return [flat[start:stop] for start, stop in self.bounds]
        views = flat.split_with_sizes(self.lengths)
        return [views[index] for index in self.chosen]


class CopyPlan:
    """Pieces of stored tensors, and for each its view of a buffer.

    The buffer's views are made once; those of the tensors in each step, since libraries replace
    gradients, and the memory of parameters.
    """

    def __init__(self, pieces: Sequence[TensorPiece], parts: Sequence[Tensor], numels: Sequence[int]) -> None:
        """Match pieces with views of a buffer.

        Args:
            pieces: in any order.
            parts: for each piece, its 1-d view of the buffer.
            numels: of each stored tensor.
        """
        by_tensor: dict[int, list[tuple[TensorPiece, Tensor]]] = {}
        for piece, part in zip(pieces, parts, strict=True):
            by_tensor.setdefault(piece.tensor, []).append((piece, part))
        self._cuts = [_cut(tensor, pairs, numels[tensor]) for tensor, pairs in by_tensor.items()]

    def of(self, flats: Flats) -> tuple[list[Tensor], list[Tensor]]:
        """For the tensors that take part, two lists that match: their views, and the buffer's."""
        present = [(cut, flat) for cut in self._cuts if (flat := flats[cut.tensor]) is not None]
        theirs = [view for cut, flat in present for view in cut.pieces(flat)]
        return theirs, [part for cut, _ in present for part in cut.parts]

    def places(self, flats: Flats) -> list[tuple[int, int, int]]:
        """Of the views of `of`: the stored tensor, the first element, the one after the last."""
        return [(cut.tensor, *bounds) for cut in self._cuts if flats[cut.tensor] is not None for bounds in cut.bounds]

    def missing(self, flats: Flats) -> list[Tensor]:
        """The buffer's views of the tensors that take no part."""
        return [part for cut in self._cuts if flats[cut.tensor] is None for part in cut.parts]


def _cut(tensor: int, pairs: list[tuple[TensorPiece, Tensor]], numel: int) -> _Cut:
    pairs = sorted(pairs, key=lambda pair: pair[0].tensor_offset)
    lengths: list[int] = []
    chosen: list[int] = []
    reached = 0
    for piece, _ in pairs:
        if piece.tensor_offset > reached:
            lengths.append(piece.tensor_offset - reached)
        chosen.append(len(lengths))
        lengths.append(piece.numel)
        reached = piece.tensor_offset + piece.numel
    if reached < numel:
        lengths.append(numel - reached)
    bounds = [(piece.tensor_offset, piece.tensor_offset + piece.numel) for piece, _ in pairs]
    return _Cut(tensor, lengths, chosen, [part for _, part in pairs], bounds)
