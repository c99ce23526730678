"""Run torchtitan's trainer on CPUs: `python torchtitan_on_cpu.py ARGS`, as `-m torchtitan.train`.

torchtitan 0.3 asks torch for an accelerator, and takes CUDA where there is none; here it is told
that the CPU is one, whose memory it measures as 0. Its language models attend by FlexAttention,
which has no backward on CPUs: here by torch's scaled_dot_product_attention with a causal mask,
which is the same where a sequence is one document. It has fully_shard scale gradients by a way of
reduction that gloo lacks: here by sums, the same as the factor is 1. All else is torchtitan's own.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
import torch._utils

torch._utils._get_available_device_type = lambda: "cpu"
torch.cpu.get_device_name = lambda _: "CPU"
torch.cpu.get_device_properties = lambda _: SimpleNamespace(total_memory=1)
torch.cpu.current_device = lambda: 0
torch.cpu.memory_stats = lambda _: {}
torch.cpu.empty_cache = torch.cpu.reset_peak_memory_stats = lambda: None

from torch.distributed.distributed_c10d import _set_pg_timeout  # noqa: E402
from torch.distributed.fsdp import FSDPModule  # noqa: E402
from torchtitan.models.common.attention import FlexAttention  # noqa: E402
from torchtitan.train import main  # noqa: E402


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **flex: Any) -> tuple[torch.Tensor, None]:
    attend = torch.nn.functional.scaled_dot_product_attention
    return attend(q, k, v, is_causal=True, scale=flex["scale"], enable_gqa=flex["enable_gqa"]), None


set_factor = FSDPModule.set_gradient_divide_factor


def set_factor_and_sum(self: FSDPModule, factor: float) -> None:
    set_factor(self, factor)
    self.set_force_sum_reduction_for_comms(True)


torch.distributed.set_timeout = _set_pg_timeout  # its name in torch after 2.13
FlexAttention._compiled_flex_attn = staticmethod(attention)
FSDPModule.set_gradient_divide_factor = set_factor_and_sum

if __name__ == "__main__":
    main()
