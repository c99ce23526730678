"""Elements that lie evenly spaced, in a stored tensor and in a workspace: one strided view each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Run:
    """Blocks that lie evenly spaced in a stored tensor, and in the workspace.

    Attributes:
        shape: row groups, blocks of each, rows of a block, elements of a row, before which may
            stand parameters that follow each other evenly; where they are all of the stored tensor,
            in its order, the shape of that, so that it needs no view.
        strides: of these in the stored tensor, which is contiguous.
        whole: whether it is all of the stored tensor.
        tensor: the number of the stored tensor.
        offset: the first element there.
        in_chunk: the first element where all of the chunk stand in a row.
        in_work: the same in the workspace, of this shape.
    """

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    whole: bool
    tensor: int
    offset: int
    in_chunk: int
    in_work: Tensor

    def of(self, stored: Tensor) -> Tensor:
        """A view of the stored tensor."""
        if self.whole:
            return stored
        return stored.as_strided(self.shape, self.strides, stored.storage_offset() + self.offset)

    def of_chunk(self, flat: Tensor) -> Tensor:
        """A view of a 1-d tensor with all elements of the chunk."""
        return flat.as_strided(self.shape, self.strides, flat.storage_offset() + self.in_chunk)


@dataclass(frozen=True, slots=True)
class Lattice:
    """Elements that lie evenly spaced: where they are stored, or staged, and in the workspace.

    Attributes:
        tensor: the number of the stored tensor; None for the staging buffer.
        sizes: of the view.
        strides: in the tensor, and where all elements of the chunk stand in a row.
        work_strides: in the workspace.
        offset: the first element in the tensor.
        in_chunk: where all of the chunk stand in a row.
        begin: in the stack's part of the workspace.
    """

    tensor: int | None
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    work_strides: tuple[int, ...]
    offset: int
    in_chunk: int
    begin: int

    def of_work(self, gradient_NRB: Tensor) -> Tensor:
        """A view of the stack's part of the workspace."""
        return gradient_NRB.as_strided(self.sizes, self.work_strides, gradient_NRB.storage_offset() + self.begin)

    def distance(self, other: Lattice) -> tuple[int, int] | None:
        """How far the other is behind this one, if it has the same form."""
        form, others = ((own.tensor, own.sizes, own.strides, own.work_strides) for own in (self, other))
        apart = other.offset - self.offset
        if form != others or apart <= 0 or other.in_chunk - self.in_chunk != apart:
            return None
        return apart, other.begin - self.begin


def merged(lattices: Sequence[Lattice]) -> list[Lattice]:
    """The same elements: those of one form that follow each other evenly become one.

    The layers of a model, which lie in one flat tensor, do: a step then takes a few large copies.
    """
    by_form: dict[object, list[Lattice]] = {}
    for own in lattices:
        by_form.setdefault((own.tensor, own.sizes, own.strides, own.work_strides), []).append(own)
    result = []
    for members in by_form.values():
        row = [members[0]]
        for own in members[1:]:
            apart = row[-1].distance(own)
            if apart is None or (len(row) > 1 and apart != row[0].distance(row[1])):
                result.append(_one(row))
                row = []
            row.append(own)
        result.append(_one(row))
    return result


def _one(row: Sequence[Lattice]) -> Lattice:
    if len(row) == 1:
        return row[0]
    apart = row[0].distance(row[1])
    assert apart is not None
    return replace(
        row[0],
        sizes=(len(row), *row[0].sizes),
        strides=(apart[0], *row[0].strides),
        work_strides=(apart[1], *row[0].work_strides),
    )


def run_of(lattice: Lattice, stored: torch.Size, in_work: Tensor) -> Run:
    """Of a stored tensor of this shape."""
    sizes, strides, tensor = lattice.sizes, lattice.strides, lattice.tensor
    assert tensor is not None
    is_whole = stored.numel() == in_work.numel() and in_work.is_contiguous() and _in_order(sizes, strides)
    if is_whole:
        in_work = in_work.view(stored)
        sizes, strides = tuple(stored), in_work.stride()
    return Run(sizes, strides, is_whole, tensor, lattice.offset, lattice.in_chunk, in_work)


def _in_order(sizes: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether the elements of such a view are contiguous."""
    numel = 1
    for size, stride in zip(reversed(sizes), reversed(strides), strict=True):
        if size != 1 and stride != numel:
            return False
        numel *= size
    return True
