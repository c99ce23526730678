"""DeepSpeed: what `"optimizer": {"type": "AdaFisher", "params": {…}}` builds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from adafisher_dist.optimizer import AdaFisher
from adafisher_dist.settings import DEFAULTS, check_names, fisher_dtype, preset

if TYPE_CHECKING:
    from torch.optim.optimizer import ParamsT


def from_config(params: ParamsT, **config: Any) -> AdaFisher:
    """Build AdaFisher from the `params` of a JSON config.

    Args:
        params: what DeepSpeed passes on: the model's parameters or param groups.
        config: AdaFisher's arguments; fisher_dtype by name ("bfloat16"); and "preset", "language_models" or
            "image_classification", which the other keys override.

    Raises:
        TypeError: a key is unknown; the message names the nearest valid one and lists all.
        ValueError: a value is out of bounds, or the preset is unknown.
    """
    check_names(config, [*DEFAULTS, "preset"])
    name = config.pop("preset", None)
    settings = {**(preset(name) if name is not None else {}), **config}
    if "fisher_dtype" in settings:
        settings["fisher_dtype"] = fisher_dtype(settings["fisher_dtype"])
    return AdaFisher(params, **settings)
