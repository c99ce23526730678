"""Puts `AdaFisher` into `torch.optim`, where DeepSpeed looks up the `"type"` of its JSON config.

`register` is an entry point of the group `torch.backends`: torch calls it at the end of `import
torch`, in every process, so it must be light and may never fail. AdaFisher itself is imported when
somebody asks for it.
"""

from __future__ import annotations

import os
import sys
import time
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

NAME = "AdaFisher"

# DeepSpeed compiles this at its first use on CPUs, for minutes at the most. Who is killed meanwhile
# leaves a lock.
_OPERATOR = "deepspeed_shm_comm"
_MINUTES = 3


def register() -> None:
    """Make `torch.optim.AdaFisher` resolve, lazily.

    Never raises: where torch is not there or does not allow it, a line on stderr says so.
    """
    try:
        optim = sys.modules["torch.optim"]
        _install(optim)
    except Exception as error:
        print(f"adafisher_dist: no registration in torch.optim ({error!r}); import adafisher_dist.", file=sys.stderr)
    with suppress(Exception):
        _tell_of_locks()


def _install(optim: Any) -> None:
    before = optim.__dict__.get("__getattr__")
    if getattr(before, "adafisher", False):
        return

    def resolve(name: str) -> Any:
        plain = name.lower().replace("_", "").replace("-", "")
        if plain == NAME.lower():
            from adafisher_dist.ds import from_config

            return from_config
        _tell_if_near(name, plain)
        if before is not None:
            return before(name)
        raise AttributeError(f"module {optim.__name__!r} has no attribute {name!r}")

    resolve.adafisher = True  # type: ignore[attr-defined]
    optim.__getattr__ = resolve


def _tell_if_near(name: str, plain: str) -> None:
    """DeepSpeed asks for a default and so drops what an AttributeError says."""
    from difflib import SequenceMatcher

    if NAME.lower() in plain or SequenceMatcher(None, plain, NAME.lower()).ratio() >= 0.8:
        import logging

        logging.getLogger("adafisher_dist").warning("torch.optim has no %r. Did you mean %r?", name, NAME)


@cache
def _tell_of_locks() -> None:
    """Warn of a lock that a killed compilation left: DeepSpeed would wait for it silently, forever.

    Once a process: `import torch` and `import adafisher_dist` both register.
    """
    if os.environ.get("LOCAL_RANK") != "0":  # one rank of a job, on each machine
        return
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or Path(home) / "torch_extensions")
    for lock in (*root.glob(f"{_OPERATOR}/lock"), *root.glob(f"*/{_OPERATOR}/lock")):
        minutes = (time.time() - lock.stat().st_mtime) / 60
        if minutes > _MINUTES:
            print(
                f"adafisher_dist: {lock} is {minutes:.0f} minutes old. On CPUs deepspeed.init_distributed waits for as"
                " long as it is there. A compilation takes a few minutes; one that was killed has left it. If none is"
                f" going on, remove it: rm {lock}",
                file=sys.stderr,
            )
