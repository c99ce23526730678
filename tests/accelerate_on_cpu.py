"""Run a script with Accelerate's FSDP2 on CPUs: `python accelerate_on_cpu.py SCRIPT ARGS`.

Accelerate 1.15 takes an FSDP plugin on GPUs only; on CPUs it trains by DDP, without a word. Here it
is told that it shards. All else is Accelerate's own.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any

from accelerate import DistributedType
from accelerate.state import AcceleratorState

before = AcceleratorState.__init__


def with_fsdp(self: AcceleratorState, *arguments: Any, fsdp_plugin: Any = None, **options: Any) -> None:
    before(self, *arguments, fsdp_plugin=fsdp_plugin, **options)
    if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin


if __name__ == "__main__":
    AcceleratorState.__init__ = with_fsdp
    sys.argv = sys.argv[1:]
    sys.path[0] = str(Path(sys.argv[0]).parent)
    runpy.run_path(sys.argv[0], run_name="__main__")
