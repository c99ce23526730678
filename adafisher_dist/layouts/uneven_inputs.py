"""DDP's `join()`: a rank that has run out of batches takes no step, and the others wait for it.

It goes on to answer DDP's own all-reduces, but has no gradients, and owns blocks.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from weakref import WeakSet

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from adafisher_dist.layouts.storage import UnsupportedLayoutError


class JoinContexts:
    """The DDP modules of an optimizer's parameters, which tell whether they are in `join()`."""

    def __init__(self) -> None:
        self._modules: WeakSet[nn.Module] = WeakSet()

    def problem(self, new: Sequence[Tensor]) -> UnsupportedLayoutError | None:
        """The error to raise in a `join()` in which ranks may run out of batches, at once.

        It cannot wait for the collectives of the step, since a rank may have run out already. All
        ranks that step are in it, so all of them raise. Returned and not raised, so that what else
        goes wrong here can be told to the other ranks.

        Args:
            new: tensors that are stepped for the first time.
        """
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            self._find([tensor for tensor in new if type(tensor) is nn.Parameter])
        for module in self._modules:
            config = getattr(module, "_join_config", None)
            if config is not None and config.enable and not config.throw_on_early_termination:
                return UnsupportedLayoutError(
                    "AdaFisher cannot step within join() of DistributedDataParallel: a rank that has run out of"
                    " batches takes no step, and the others would wait for it. Use"
                    " join(throw_on_early_termination=True), which stops all ranks when the first has no more, or give"
                    " all ranks equally many batches (DistributedSampler)."
                )
        return None

    def _find(self, parameters: Sequence[Tensor]) -> None:
        """Look for the DDP modules that hold some of these parameters, among all live objects.

        Neither a parameter nor an optimizer knows its DDP module. It takes a tenth of a second or
        two, once. What `gc.freeze` has hidden is not found.
        """
        own = {id(parameter) for parameter in parameters}
        if not own:
            return  # DeepSpeed's, or sharded
        everything = gc.get_objects()
        # By type(), since a proxy's __class__ may raise.
        kinds = {kind for kind in set(map(type, everything)) if DistributedDataParallel in kind.__mro__}
        found = [thing for thing in everything if type(thing) in kinds] if kinds else []
        self._modules.update(module for module in found if any(id(p) in own for p in module.parameters()))
