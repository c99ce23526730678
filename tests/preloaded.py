"""What every rank of a test imports, done once: ranks fork from a process with it (see `ranks`)."""

from __future__ import annotations

import os

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import checkpoint_runs  # noqa: F401
import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401  DeepSpeed's check imports it at the first engine
import engines  # noqa: F401
import layout_runs  # noqa: F401
import torch._dynamo
import torch.distributed.fsdp
import torch.distributed.tensor  # noqa: F401
from deepspeed.ops import __compatible_ops__

import adafisher_dist.checkpoint.deepspeed  # noqa: F401

__compatible_ops__["deepspeed_shm_comm"] = False  # else it is compiled at the first use
