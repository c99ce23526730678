"""DeepSpeed configs that AdaFisher refuses, and what mends them."""

from __future__ import annotations

from typing import Any

CPU = {"offload_optimizer": {"device": "cpu"}}
ZENFLOW = {"topk_ratio": 0.1, "select_strategy": "step", "select_interval": 4, "update_interval": 2}
BF16, FP16 = {"enabled": True}, {"enabled": True, "initial_scale_power": 8}

# By name: stage, keys of zero_optimization, other keys; what the message has; the same after the
# remedy (None: no key of that part is left).
Case = tuple[int, dict[str, Any], dict[str, Any], tuple[str, ...], dict[str, Any], dict[str, Any]]
CASES: dict[str, Case] = {
    "nvme": (
        3, {"offload_optimizer": {"device": "nvme", "nvme_path": "/nowhere"}}, {},
        ('zero_optimization.offload_optimizer.device is "nvme"', 'Use "device": "cpu"'), CPU, {},
    ),
    "nvme-parameters": (
        3, {"offload_param": {"device": "nvme", "nvme_path": "/nowhere"}}, {},
        ('zero_optimization.offload_param.device is "nvme"', 'Use "device": "cpu"'),
        {"offload_param": {"device": "cpu"}, **CPU}, {},
    ),
    "ratio": (
        3, {"offload_optimizer": {"device": "cpu", "ratio": 0.5}}, {},
        ("zero_optimization.offload_optimizer.ratio is 0.5", 'Use "ratio": 1.0'),
        {"offload_optimizer": {"device": "cpu", "ratio": 1.0}}, {},
    ),
    "superoffload": (
        3, {"offload_optimizer": {"device": "cpu", "super_offload": True}}, {},
        ("zero_optimization.offload_optimizer.super_offload is true", '"super_offload": false'),
        {"offload_optimizer": {"device": "cpu", "super_offload": False}}, {},
    ),
    "zenflow-2": (2, {**CPU, "zenflow": ZENFLOW}, {}, ("zero_optimization.zenflow is set", "Leave it out"), CPU, {}),
    "zenflow-3": (3, {**CPU, "zenflow": ZENFLOW}, {}, ("zero_optimization.zenflow is set", "Leave it out"), CPU, {}),
    "quantised-frozen-weights": (
        3, {"zero_quantized_nontrainable_weights": True}, {},
        ("zero_optimization.zero_quantized_nontrainable_weights is true", "Use false"),
        {"zero_quantized_nontrainable_weights": False}, {},
    ),
    "elastic": (2, {"elastic_checkpoint": True}, {}, ("zero_optimization.elastic_checkpoint is true",), {}, {}),
    "deepcompile": (
        1, {}, {"compile": {"deepcompile": True}}, ("compile.deepcompile is true", 'Use "deepcompile": false'),
        {}, {"compile": {"deepcompile": False}},
    ),
    "autoep": (
        2, {}, {"expert_parallel": {"enabled": True, "autoep_size": 2}},
        ("expert_parallel is set", 'use "autoep_size": 1'), {}, {},
    ),
    "bf16-masters": (
        2, CPU, {"bf16": {**BF16, "bf16_master_weights_and_grads": True}},
        ("bf16.bf16_master_weights_and_grads is true", '"bf16_optimizer_states": true', "leave both out"),
        CPU, {"bf16": BF16},
    ),
    "fp16-masters": (
        3, CPU, {"fp16": {**FP16, "fp16_master_weights_and_grads": True}},
        ("fp16.fp16_master_weights_and_grads is true", "Leave it out"), CPU, {"fp16": FP16},
    ),
}  # fmt: skip
