"""DeepSpeed's other modes: refused by name, or trained as without them."""

from __future__ import annotations

from types import FunctionType
from typing import Any

import numpy as np
import pytest
import torch
from engines import (
    config,
    engine_of,
    full_weights,
    run_alone,
    train,
)
from models import distance
from ranks import run_ranks
from test_zero import follow, record
from torch import nn

from adafisher_dist import AdaFisher, UnsupportedLayoutError

pytestmark = [pytest.mark.deepspeed, pytest.mark.dist]

Arrays = dict[str, np.ndarray]


def refused(rank: int, world: int, stage: int, precision: str, attribute: str, value: Any) -> str:
    """Train with a wrapper whose attribute says that it is in another mode."""
    engine = engine_of(config(stage, world, precision=precision))
    kept = ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat", "fp32_groups_flat_partition")
    tensors = [tensor for name in kept for tensor in getattr(engine.optimizer, name, ())]
    before = [tensor.detach().clone() for tensor in tensors]
    # By bits: stage 3 leaves its padding uninitialised, which may be NaN.
    same = lambda a, b: torch.equal(a.detach().view(torch.int32), b.view(torch.int32))  # noqa: E731
    if attribute == "__class__":
        engine.optimizer.__class__ = type(value, (type(engine.optimizer),), {"__module__": "deepspeed.runtime.new"})
    elif value is None:
        del engine.optimizer.__dict__[attribute]
    else:
        setattr(engine.optimizer, attribute, value)
    for tensor in tensors:
        tensor.grad = torch.ones_like(tensor)
    with pytest.raises(UnsupportedLayoutError) as caught:
        # A function of DeepSpeed's, as what looks for it on the stack knows by its module.
        FunctionType(step_as_the_wrapper_would.__code__, {"__name__": "deepspeed.runtime.new"})(engine.optimizer)
    assert all(same(tensor, held) for tensor, held in zip(tensors, before, strict=True))
    return str(caught.value)


def step_as_the_wrapper_would(self: Any) -> None:
    """Calls the optimizer's step() as the wrapper does: with itself as `self` on the stack."""
    if hasattr(self, "fp32_partitioned_groups_flat"):
        self.optimizer.param_groups[0]["params"] = [self.fp32_partitioned_groups_flat[0]]
    self.optimizer.step()


class TensorParallel:
    """As Megatron tells of its groups."""

    def get_tensor_model_parallel_world_size(self) -> int:
        return 2


@pytest.mark.parametrize(
    ("stage", "precision", "attribute", "value", "words"),
    [
        (3, "fp32", "swap_optimizer", True, "NVMe offload of the optimizer (offload_optimizer.device cpu works)"),
        (3, "fp32", "params_in_nvme_and_cpu", True, "NVMe offload of the parameters (offload_param.device cpu works)"),
        (3, "fp32", "zenflow", True, "ZenFlow"),
        (3, "fp32", "elastic_checkpoint", True, "elastic_checkpoint"),
        (2, "fp32", "elastic_checkpoint", True, "elastic_checkpoint"),
        (3, "fp32", "model_parallel_group", object(), "model parallelism"),
        (3, "fp32", "master_weights_and_grads_dtype", torch.float16, "fp16 master weights"),
        (3, "fp32", "__class__", "MiCS_Optimizer", "MiCS_Optimizer, which AdaFisher does not know"),
        (3, "fp32", "sub_group_process_groups", None, "lacks what it is recognised by"),
        (1, "fp32", "zenflow", True, "ZenFlow"),
        (2, "fp32", "mpu", TensorParallel(), "tensor parallelism"),
        (1, "bf16", "master_weights_and_grads_dtype", torch.float16, "fp16 master weights"),
        (1, "fp32", "__class__", "NewZeroOptimizer", "NewZeroOptimizer, which AdaFisher does not know"),
        (1, "bf16-fp32", "mpu", TensorParallel(), "tensor parallelism"),
    ],
)
def test_modes_that_are_not_supported(stage: int, precision: str, attribute: str, value: Any, words: str) -> None:
    if not isinstance(value, (bool, int, str, torch.dtype, type(None), TensorParallel)):
        value = "a group"  # of which only its being there counts
    for message in run_ranks(refused, 2, stage, precision, attribute, value, deepspeed=True):
        assert words in message


def test_parts_of_parallel_layers_are_refused() -> None:
    for mark, value, words in (
        ("tensor_model_parallel", True, "parallelize_module with FSDP2"),
        ("allreduce", False, "marked as an expert.s"),
        ("_fsdp_flattened", True, "FSDP1"),
    ):
        parameter = nn.Parameter(torch.ones(3))
        setattr(parameter, mark, value)
        with pytest.raises(UnsupportedLayoutError, match=words):
            AdaFisher([("weight", parameter)])


def hpz(rank: int, world: int, ds_config: dict[str, Any]):
    engine = engine_of(ds_config)
    train(engine, 0, 6, rank, world)
    assert engine.optimizer.zero_hpz_partition_size == 2
    assert next(engine.module.parameters()).ds_zero_param_process_group is not None
    return full_weights(engine)


def test_hierarchical_partitions() -> None:
    # ZeRO++: a second copy of the weights within a node; what the optimizer sees is the same.
    ds_config = config(3, 4, zero={"zero_hpz_partition_size": 2, "stage3_param_persistence_threshold": 0})
    alone = run_alone(steps=6)
    for result in run_ranks(hpz, 4, ds_config, deepspeed=True):
        assert distance(result, alone) < 1e-4


class Even(nn.Module):
    """Matrices whose parts on two ranks are multiples of 8, as DeepSpeed's quantisation wants."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(16, 32)
        self.mix = nn.Linear(32, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mix(torch.tanh(self.inner(nn.functional.pad(x, (0, 5))))).mean(dim=1, keepdim=True)


class Quantizer:
    """DeepSpeed's CUDA kernel in torch: symmetric codes of 8 bits, and a scale a group."""

    Symmetric = 0
    called = 0

    @staticmethod
    def quantize(values: torch.Tensor, groups: int, bits: int, kind: int) -> tuple[torch.Tensor, torch.Tensor]:
        Quantizer.called += 1
        rows = values.float().view(groups, -1)
        scales = rows.abs().amax(dim=1).clamp(min=1e-12) / 127
        return (rows / scales[:, None]).round().to(torch.int8).view_as(values), scales

    @staticmethod
    def dequantize(codes: torch.Tensor, scales: torch.Tensor, groups: int, bits: int, kind: int) -> torch.Tensor:
        return (codes.float().view(groups, -1) * scales.view(-1, 1)).view_as(codes)


def record_quantised(*arguments: Any) -> Any:
    """`record` with DeepSpeed's quantisation, of which only the kernels are not its own."""
    from deepspeed.ops.op_builder import QuantizerBuilder
    from deepspeed.runtime.comm.coalesced_collectives import reduce_scatter_coalesced
    from deepspeed.runtime.zero import stage3

    def reduced(gradients: list[torch.Tensor], groups: dict[str, Any]) -> list[torch.Tensor]:
        exact = reduce_scatter_coalesced(gradients)
        coded = [Quantizer.quantize(part, 1, 8, 0) for part in exact]
        return [Quantizer.dequantize(*code, 1, 8, 0).to(part.dtype) for code, part in zip(coded, exact, strict=True)]

    QuantizerBuilder.load = lambda self, verbose=True: Quantizer
    stage3.all_to_all_quant_reduce = reduced
    result = record(*arguments)
    assert Quantizer.called >= 5  # in each step
    return result


@pytest.mark.parametrize("what", ["zero_quantized_weights", "zero_quantized_gradients"])
def test_quantised_communication(what: str) -> None:
    """ZeRO++: what is sent is rounded, and the fp32 weights that AdaFisher steps are not."""
    zero = {what: True, "stage3_param_persistence_threshold": 0}
    results = follow(config(3, 2, zero=zero), 2, groups=False, kind=Even, recorder=record_quantised)  # type: ignore[arg-type]
    exact = follow(config(3, 2), 2, groups=False, kind=Even)  # type: ignore[arg-type]
    last, unrounded = results[0][0][-1][2], exact[0][0][-1][2]
    assert 1e-6 < distance(last, unrounded) < 0.2, "not rounded, or not the same training"
