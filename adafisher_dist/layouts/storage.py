"""What a layout tells of the tensors that the optimizer was handed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

from torch import Tensor, nn

from adafisher_dist.blocks.parts import Parts
from adafisher_dist.blocks.placement import Placement
from adafisher_dist.comm.collectives import Group


class UnsupportedLayoutError(RuntimeError):
    """The layout of the tensors over ranks is unknown to AdaFisher, or does not train correctly."""


@dataclass(frozen=True, slots=True)
class ParameterInfo:
    """A parameter as the optimizer was given it: name, position among all of them, param group."""

    name: str
    position: int
    group: int


@dataclass(frozen=True, slots=True)
class Parameter:
    """A model parameter: how it was given, its shape, and which stored tensor holds it.

    Where tensor-parallel ranks each have a part of it, `shape` is of this rank's part, `part` the
    number of that, and `parts` tells of all.
    """

    info: ParameterInfo
    shape: tuple[int, ...]
    tensor: int
    parts: Parts | None = None
    part: int = 0

    @property
    def whole(self) -> tuple[int, ...] | None:
        """The shape of the parameter, where this rank has a part of it."""
        return None if self.parts is None else self.parts.whole

    @property
    def name(self) -> str:
        """Its name."""
        return self.info.name


class GivenParameters:
    """The parameters the optimizer was given, in order, even if a wrapper replaces them later."""

    def __init__(self) -> None:
        # The tensors too, so that no id is used again. No weak references: torch.utils.swap_tensors
        # refuses those.
        self._given: dict[int, tuple[Tensor, ParameterInfo]] = {}
        self._shapes: list[tuple[int, ...]] = []
        self._groups: list[list[int]] = []  # ids, by param group

    def add(self, tensor: Tensor, name: str, group: int) -> None:
        """Register the next parameter, of this param group."""
        self._given[id(tensor)] = tensor, ParameterInfo(name, len(self._shapes), group)
        self._shapes.append(whole_shape(tensor))
        self._groups += [[] for _ in range(group + 1 - len(self._groups))]
        self._groups[group].append(id(tensor))

    def could_be(self, tensors: Sequence[Tensor]) -> bool:
        """Whether the tensors may replace all that were given: parameters of the same shapes."""
        return len(tensors) == len(self._shapes) and all(
            isinstance(tensor, nn.Parameter) and whole_shape(tensor) == shape
            for tensor, shape in zip(tensors, self._shapes, strict=True)
        )

    def stands_as(self, groups: Sequence[Mapping[str, Any]]) -> bool:
        """Whether these param groups are made of the registered parameters, in their order."""
        standing = [list(map(id, group["params"])) for group in groups]
        while standing and not standing[-1]:
            standing.pop()
        return standing == self._groups

    def __iter__(self) -> Iterator[Tensor]:
        return map(itemgetter(0), self._given.values())

    def items(self) -> Iterator[tuple[Tensor, ParameterInfo]]:
        """The parameters, and how each was given."""
        return iter(self._given.values())

    def places(self) -> dict[int, tuple[int, int]]:
        """By the id of each parameter: its param group, and its number there."""
        numbers: Counter[int] = Counter()
        found = {}
        for key, (_, info) in self._given.items():
            found[key] = info.group, numbers[info.group]
            numbers[info.group] += 1
        return found

    def find(self, tensor: Tensor) -> ParameterInfo | None:
        """How a parameter was given; None where it was not."""
        return self._given[id(tensor)][1] if id(tensor) in self._given else None


@dataclass(frozen=True, slots=True, eq=False)
class Storage:
    """Tensors of this rank, and which elements of which parameters every rank stores.

    Attributes:
        layout: its name, for reports.
        group: the ranks that the parameters are spread over, or replicated on.
        tensors: what `param_groups` holds on this rank; their `.grad` are the gradients, averaged
            over ranks.
        parameters: in the order of `param_groups`.
        stored_spans: for each rank, the spans that it stores. Where `replicated`, the same for
            every rank.
        replicated: every rank stores everything; otherwise, every element is stored on one rank.
    """

    layout: str
    group: Group
    tensors: Sequence[Tensor]
    parameters: Sequence[Parameter]
    stored_spans: Placement
    replicated: bool

    @property
    def mesh(self) -> Any:
        """The device mesh of the tensors, where they are DTensors; else None."""
        return next((tensor.device_mesh for tensor in self.tensors if hasattr(tensor, "device_mesh")), None)

    @property
    def one_each(self) -> bool:
        """Whether each tensor is one given parameter, not pieces of several as under ZeRO."""
        return self.replicated or self.mesh is not None

    @property
    def tensor_parallel(self) -> bool:
        """Whether other ranks have other parts of a parameter, whose blocks they hold."""
        return any(parameter.parts is not None for parameter in self.parameters)

    @property
    def on_ranks(self) -> bool:
        """Whether a rank may hold only a part of the state."""
        return self.group.size > 1 or self.mesh is not None

    def name_of(self, index: int) -> str:
        """The parameter that a stored tensor holds, or the first of several."""
        return next(parameter.name for parameter in self.parameters if parameter.tensor == index)

    def values(self, index: int) -> Tensor:
        """A stored tensor, or of a DTensor what this rank holds."""
        return local(self.tensors[index]).detach()


@dataclass(frozen=True, slots=True, eq=False)
class LocalShard:
    """What this rank holds of a parameter or buffer: elements [start, stop), flattened row-major.

    Where tensor parallelism cuts it, elements are counted in the order of `blocks.parts`.

    Attributes:
        values: they, in any shape; padding may follow.
        start: first element.
        stop: element after the last.
        group: the ranks that hold the parts, or the same whole.
        replicated: every rank holds the whole.
    """

    values: Tensor
    start: int
    stop: int
    group: Group
    replicated: bool


def whole_shape(tensor: Tensor) -> tuple[int, ...]:
    """The shape of a parameter, whatever of it is here."""
    return tuple(getattr(tensor, "ds_shape", tensor.shape))  # ZeRO-3 empties a parameter, and remembers its shape


def local(tensor: Tensor) -> Tensor:
    """What this rank holds: of a DTensor its part, else all."""
    to_local = getattr(tensor, "to_local", None)  # of a DTensor; its module is not imported for those who have none
    return tensor if to_local is None else to_local()
