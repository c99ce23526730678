"""DeepSpeed configs that AdaFisher refuses when the engine is built, each with a remedy that works.

The remedy that each message names is applied, and the training is then that of one process.
"""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import PARAMS, config, engine_of, fp16_on_the_cpu, full_weights, run_alone, train
from models import distance, model
from ranks import run_ranks
from refused_configs import CASES, ZENFLOW, Case

from adafisher_dist import AdaFisher, UnsupportedLayoutError

pytestmark = [pytest.mark.deepspeed, pytest.mark.dist]


def refused_then_mended(rank: int, world: int, case: Case) -> tuple[list[str], Any]:
    stage, zero, more, _, mended_zero, mended_more = case
    with fp16_on_the_cpu():
        told = []
        ds_config = config(stage, world, zero=zero, **more)
        with pytest.raises(UnsupportedLayoutError) as caught:
            engine_of(ds_config)
        told.append(str(caught.value))
        by_object = {key: value for key, value in ds_config.items() if key != "optimizer"}
        module = model()
        optimizer = AdaFisher([p for p in module.parameters() if p.requires_grad], **PARAMS)
        with pytest.raises(UnsupportedLayoutError) as caught:
            engine_of({**by_object, "zero_force_ds_cpu_optimizer": False}, module, optimizer=optimizer)
        told.append(str(caught.value))
        engine = engine_of(config(stage, world, zero=mended_zero, **mended_more))
        if "compile" in mended_more:
            engine.compile(backend="eager")
        train(engine, 0, 6, rank, world)
        return told, full_weights(engine)


@pytest.mark.parametrize("name", CASES)
def test_refused_when_the_engine_is_built_and_the_remedy_trains(name: str) -> None:
    case = CASES[name]
    bound = 0.05 if name.endswith("masters") else 1e-4  # of 16 bits
    alone = run_alone(steps=6)
    for told, weights in run_ranks(refused_then_mended, 2, case, deepspeed=True):
        for message in told:
            assert message.startswith("AdaFisher does not support this DeepSpeed config.")
            assert all(words in message for words in case[3]), message
        assert distance(weights, alone) < bound


def all_at_once(rank: int, world: int) -> str:
    with pytest.raises(UnsupportedLayoutError) as caught:
        zero = {"offload_optimizer": {"device": "nvme", "nvme_path": "/nowhere", "ratio": 0.5}, "zenflow": ZENFLOW}
        engine_of(config(3, world, zero=zero))
    return str(caught.value)


def test_all_that_is_refused_is_one_error() -> None:
    for message in run_ranks(all_at_once, 2, deepspeed=True):
        assert all(key in message for key in ("offload_optimizer.device is", "offload_optimizer.ratio is", "zenflow"))


class Plain(torch.optim.AdamW):
    """An optimizer that is none of ours."""


def others(rank: int, world: int) -> list[str]:
    """What DeepSpeed itself says to other optimizers, or does with them."""
    AdaFisher(model().parameters())  # from here on DeepSpeed's engine is looked at
    told = []
    for zero in ({"elastic_checkpoint": True}, {"offload_optimizer": {"device": "cpu", "ratio": 0.5}}):
        ds_config = config(3, world, zero=zero, zero_allow_untested_optimizer=True, zero_force_ds_cpu_optimizer=False)
        del ds_config["optimizer"]
        module = model()
        try:
            engine_of(ds_config, module, optimizer=Plain([p for p in module.parameters() if p.requires_grad]))
            told.append("trains")
        except Exception as error:
            told.append(f"{type(error).__name__}: {error}")
    return told


def test_other_optimizers_are_left_alone() -> None:
    for told in run_ranks(others, 2, deepspeed=True):
        assert told == ["trains", "AssertionError: Hybrid Optimizer Only Supports DeepSpeedCPUAdam"]


def mics(rank: int, world: int) -> str:
    with pytest.raises(Exception, match="MiCS ZeRO-3 sharding has been removed") as caught:
        engine_of(copy.deepcopy(config(3, world, zero={"mics_shard_size": 2})))
    return str(caught.value)


def test_deepspeed_itself_refuses_mics() -> None:
    """Its remedy is hpZ, which trains: test_zero_modes.py::test_hierarchical_partitions."""
    assert all("mics_shard_size" in message for message in run_ranks(mics, 2, deepspeed=True))


# ---- node-local checkpoints ----


def node_local(rank: int, world: int, nodes: int, folder: str) -> str:
    """With as many nodes as ranks have the local rank 0, as launchers number them."""
    os.environ["LOCAL_RANK"] = str(rank % (world // nodes))
    ds_config = config(2, world, checkpoint={"use_node_local_storage": True})
    if nodes > 1:
        with pytest.raises(UnsupportedLayoutError) as caught:
            engine_of(ds_config)
        ds_config = config(2, world)  # the remedy
    engine = engine_of(ds_config)
    train(engine, 0, 3, rank, world)
    engine.save_checkpoint(folder)
    train(engine, 3, 6, rank, world)
    again = engine_of(ds_config)
    again.load_checkpoint(folder)
    train(again, 3, 6, rank, world)
    assert distance(full_weights(again), full_weights(engine)) == 0
    return str(caught.value) if nodes > 1 else ""


@pytest.mark.parametrize("nodes", [1, 2])
def test_node_local_checkpoints_are_refused_before_training_on_several_nodes(nodes: int, tmp_path: Path) -> None:
    for message in run_ranks(node_local, 2, nodes, str(tmp_path), deepspeed=True):
        if nodes > 1:
            assert "checkpoint.use_node_local_storage is true on 2 nodes" in message
            assert "a folder on a file system that all nodes share" in message
