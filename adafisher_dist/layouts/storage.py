"""What a layout tells of the tensors that the optimizer was handed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from adafisher_dist.comm import Group
from adafisher_dist.plan import Placed


class UnsupportedLayoutError(RuntimeError):
    """The tensors are laid out over ranks in a way that AdaFisher does not know, or does not train right."""


@dataclass(frozen=True, slots=True)
class Parameter:
    """A model parameter: its name, its whole shape, and the number of the stored tensor that holds it."""

    name: str
    shape: tuple[int, ...]
    tensor: int


@dataclass(frozen=True, slots=True, eq=False)
class Storage:
    """Tensors of this rank, and which elements of which parameters every rank stores.

    Attributes:
        layout: its name, for reports.
        group: the ranks that the parameters are spread over, or replicated on.
        tensors: what `param_groups` holds on this rank; their `.grad` are the gradients, averaged over ranks.
        parameters: in the order of `param_groups`.
        placed: for each rank, the spans that it stores. Where `replicated`, the same for every rank.
        replicated: every rank stores everything; otherwise, every element is stored on one rank.
    """

    layout: str
    group: Group
    tensors: Sequence[Tensor]
    parameters: Sequence[Parameter]
    placed: Sequence[Sequence[Placed]]
    replicated: bool
