"""What a DeepSpeed config asks for and AdaFisher does not do: refused when the engine is built.

The wrappers are looked at once more in the first step (`refuse_modes`); by then a job may have
waited for its data. All ranks have the same config, so all of them raise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from adafisher_dist.comm.host_groups import host_group
from adafisher_dist.layouts.storage import UnsupportedLayoutError


class _Mode(NamedTuple):
    """A key of the config, and why some of its values are refused.

    Attributes:
        key: where the user wrote it, with dots.
        attribute: where DeepSpeed's parsed config has it, with dots.
        refused: whether a value is; for a None there is none.
        why: what would happen.
        remedy: what to write instead.
        stages: at which it counts; all where empty.
    """

    key: str
    attribute: str
    refused: Callable[[Any], bool]
    why: str
    remedy: str
    stages: tuple[int, ...] = ()


_OFFLOAD = "zero_optimization.offload_optimizer"
_MASTERS = "DeepSpeed keeps weights in 16 bits alone for its own CPU Adam"
_COPIES = "weights are trained in fp32 copies, which are sharded over the ranks"


def _is_nvme(device: Any) -> bool:
    return bool(getattr(device, "value", device) == "nvme")


_MODES = (
    _Mode(
        f"{_OFFLOAD}.device", "zero_config.offload_optimizer.device", _is_nvme,
        "DeepSpeed swaps the fp32 weights to files between steps, and AdaFisher's state would stay in memory",
        'Use "device": "cpu"', (3,),
    ),
    _Mode(
        "zero_optimization.offload_param.device", "zero_config.offload_param.device", _is_nvme,
        "this rank's part of the weights lies in files when AdaFisher is to read it",
        'Use "device": "cpu"', (3,),
    ),
    _Mode(
        f"{_OFFLOAD}.ratio", "zero_config.offload_optimizer.ratio", lambda ratio: ratio < 1,
        "DeepSpeed trains the part that stays on the accelerator with an AdamW of its own",
        'Use "ratio": 1.0 (all of it on the CPU), or leave offload_optimizer out (none)', (3,),
    ),
    _Mode(
        f"{_OFFLOAD}.super_offload", "zero_config.offload_optimizer.super_offload", bool,
        "SuperOffload steps every parameter with a CPU Adam of its own", 'Use "super_offload": false', (3,),
    ),
    _Mode(
        "zero_optimization.zenflow", "zero_config.zenflow", lambda zenflow: True,
        "ZenFlow steps the most important columns of each matrix with an AdamW of its own", "Leave it out",
    ),
    _Mode(
        "zero_optimization.zero_quantized_nontrainable_weights", "zero_config.zero_quantized_nontrainable_weights",
        bool, "AdaFisher's checkpoints would hold the frozen weights' 8-bit codes without their scales",
        "Use false (zero_quantized_weights, which quantises what is sent, works)", (3,),
    ),
    _Mode(
        "zero_optimization.elastic_checkpoint", "zero_config.elastic_checkpoint", bool,
        "its files cannot be loaded",
        "Leave it out: AdaFisher's checkpoints load at any number of ranks",
    ),
    _Mode(
        "fp16.fp16_master_weights_and_grads", "float16_config.fp16_master_weights_and_grads", bool,
        _MASTERS, f"Leave it out: then the {_COPIES}",
    ),
    _Mode(
        "expert_parallel", "expert_parallel_config", lambda own: own.enabled and own.autoep_size > 1,
        "AutoEP gives the ranks' different experts one name, so that checkpoints would keep those of one rank",
        'Leave it out, or use "autoep_size": 1: ZeRO shards experts as other weights. For expert parallelism use'
        " deepspeed.moe.layer.MoE",
    ),
    _Mode(
        "compile.deepcompile", "compile_config.deepcompile", bool,
        "DeepCompile changes how gradients are gathered on GPUs, where AdaFisher has not been tried with it",
        'Use "deepcompile": false; engine.compile() works',
    ),
)  # fmt: skip


def refuse_config(engine: Any, groups: Iterable[Mapping[str, Any]]) -> None:
    """Refuse what a DeepSpeed engine's config asks for, before its optimizer is wrapped.

    A collective where the config has `use_node_local_storage`.

    Args:
        engine: a DeepSpeedEngine that has its config, and is about to train with AdaFisher.
        groups: the optimizer's param groups.

    Raises:
        UnsupportedLayoutError: on all ranks; names each key, its value, why, and what to do.
    """
    stage = int(engine.zero_optimization_stage())
    problems = []
    for mode in _MODES:
        value = _at(engine._config, mode.attribute)
        if value is not None and (not mode.stages or stage in mode.stages) and mode.refused(value):
            problems.append(f"{mode.key} is {_as_written(value)}: {mode.why}. {mode.remedy}.")
    problems += [*_bf16_masters(engine), *_rounding(engine, groups), *_node_local_storage(engine)]
    if problems:
        raise UnsupportedLayoutError(f"AdaFisher does not support this DeepSpeed config. {' '.join(problems)}")


def _at(config: Any, attribute: str) -> Any:
    """A value of the parsed config; None where this version has none."""
    for name in attribute.split("."):
        config = getattr(config, name, None)
    return config


def _as_written(value: Any) -> str:
    """A value as JSON has it; of one with parts only that it is there."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return repr(value)
    written = getattr(value, "value", value)
    return f'"{written}"' if isinstance(written, str) else "set"


def _bf16_masters(engine: Any) -> list[str]:
    """What is wrong where weights in bf16 alone are asked for as for DeepSpeed's own CPU Adam."""
    own = engine._config.bfloat16_config
    if not getattr(own, "bf16_master_weights_and_grads", False):
        return []
    if getattr(own, "bf16_optimizer_states", False) and not engine.zero_use_cpu_optimizer():
        return []
    return [
        f"bf16.bf16_master_weights_and_grads is true: {_MASTERS} if the optimizer is offloaded, and for others with"
        f' "bf16_optimizer_states": true. Add that without offload_optimizer, or leave both out: then the {_COPIES}.'
    ]


def _rounding(engine: Any, groups: Iterable[Mapping[str, Any]]) -> list[str]:
    """What is wrong where weights are to be rounded by chance."""
    as_given = engine.zero_optimization_stage() == 0 and not (engine.bfloat16_enabled() or engine.fp16_enabled())
    if as_given or not any(group.get("stochastic_rounding") for group in groups):
        return []
    return [
        f"optimizer.params.stochastic_rounding is true: it is for weights in bfloat16 that have no copy, and {_COPIES}"
        " and lose nothing. Leave it out; with bf16_master_weights_and_grads, which has no such copies, rounding by"
        " chance is not supported."
    ]


def _node_local_storage(engine: Any) -> list[str]:
    """Whether several nodes are about to save, each to its own disk.

    A checkpoint is one folder, into which each rank writes its part. It is asked here, since the
    first save may come after hours of training.
    """
    if not getattr(engine._config, "use_node_local_storage", False):
        return []
    hosts = host_group(None, None, "deepspeed.initialize", UnsupportedLayoutError)
    nodes = sum(rank == 0 for rank in hosts.gather(int(engine.local_rank)))
    if nodes <= 1:
        return []
    return [
        f"checkpoint.use_node_local_storage is true on {nodes} nodes: a checkpoint is one folder, into which all ranks"
        " write. Leave it out, and give save_checkpoint a folder on a file system that all nodes share."
    ]
