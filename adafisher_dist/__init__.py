"""AdaFisher, a second-order optimizer whose Fisher blocks are sharded over the data-parallel ranks.

Importing this package registers `"type": "AdaFisher"` with DeepSpeed, as installing it does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch.optim  # noqa: F401  what register() adds to; torch itself imports this package, so nothing heavier here

from adafisher_dist.autoload import register
from adafisher_dist.version import __version__

if TYPE_CHECKING:
    from adafisher_dist.checkpoint import CheckpointError, OptimizerState, load_checkpoint, save_checkpoint
    from adafisher_dist.layouts.storage import UnsupportedLayoutError
    from adafisher_dist.optimizer.adafisher import AdaFisher

__all__ = [
    "AdaFisher",
    "CheckpointError",
    "OptimizerState",
    "UnsupportedLayoutError",
    "__version__",
    "load_checkpoint",
    "save_checkpoint",
]

_HOMES = {
    "AdaFisher": "adafisher_dist.ds",
    "CheckpointError": "adafisher_dist.checkpoint",
    "OptimizerState": "adafisher_dist.checkpoint",
    "UnsupportedLayoutError": "adafisher_dist.layouts",
    "load_checkpoint": "adafisher_dist.checkpoint",
    "save_checkpoint": "adafisher_dist.checkpoint",
}

register()


def __getattr__(name: str) -> Any:
    # Lazy, since torch imports this package at the end of its own import, for
    # adafisher_dist.autoload.
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
