"""Run a Lightning script with DeepSpeedStrategy on CPUs: `python lightning_on_cpu.py SCRIPT ARGS`.

Lightning 2.6 refuses DeepSpeedStrategy without CUDA, though DeepSpeed itself trains on CPUs. That
check is taken out here, and CPUs get a device index, which DeepSpeed is given as a rank's. All else
is Lightning's own.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import torch
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.strategies import DeepSpeedStrategy


def setup_environment(self: DeepSpeedStrategy) -> None:
    super(DeepSpeedStrategy, self).setup_environment()


def parallel_devices(devices: int) -> list[torch.device]:
    return [torch.device("cpu", index) for index in range(devices)]


if __name__ == "__main__":
    DeepSpeedStrategy.setup_environment = setup_environment
    CPUAccelerator.get_parallel_devices = staticmethod(parallel_devices)
    sys.argv = sys.argv[1:]
    sys.path[0] = str(Path(sys.argv[0]).parent)
    runpy.run_path(sys.argv[0], run_name="__main__")
