"""The container of examples/torchtitan_container.py in torchtitan's own trainer, on two CPU ranks.

It trains like a plain loop of ours in one process from the same weights, its checkpoints have the
state of that loop, and a run that was stopped goes on bit for bit. What is not torchtitan's own
there, tests/torchtitan_on_cpu.py tells.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from ranks import run_ranks
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict
from torchrun import EXAMPLES, succeed

pytest.importorskip("torchtitan", reason="it is not installed: launch/venv.sh has how")

ROOT = Path(__file__).parent.parent
RANKS, STEPS, MIDDLE = 2, 6, 3
PARAMETERS = 17  # of two layers, whose state dict tells queries, keys and values apart, which are one weight
# As command-line arguments of torchtitan and in the loop here.
ARGUMENTS = [
    *(
        "--training.steps",
        str(STEPS),
        "--training.mixed_precision_param",
        "float32",
        "--training.local_batch_size",
        "2",
    ),
    *("--checkpoint.enable", "--checkpoint.interval", str(MIDDLE), "--debug.seed", "0"),
]

pytestmark = pytest.mark.dist


def titan(folder: Path, *arguments: str) -> None:
    script, path = str(ROOT / "tests/torchtitan_on_cpu.py"), f"{EXAMPLES}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    fixed = ["--module", "torchtitan_container", "--config", "tiny", "--dump_folder", folder]
    succeed(RANKS, script, *fixed, *ARGUMENTS, *arguments, cwd=folder.parent, PYTHONPATH=path)


Arrays = dict[str, np.ndarray]


def plain(rank: int, world: int, folder: Path) -> tuple[Arrays, Arrays]:
    """torchtitan's model in a loop of ours, from weights that are saved as its step 0.

    Returns the weights and the optimizer's state, under the names of a checkpoint's entries.
    """
    sys.path.insert(0, str(ROOT / "examples"))
    import torchtitan_container
    import torchtitan_on_cpu  # noqa: F401

    from adafisher_dist import AdaFisher

    config = torchtitan_container.tiny()
    config.model_spec.model.update_from_config(config=config)
    torch.manual_seed(0)
    model = config.model_spec.model.build()
    with torch.no_grad():
        model.init_weights(buffer_device=None)
    dcp.save({**model.state_dict()}, checkpoint_id=folder / "checkpoint/step-0")

    (group,) = config.optimizer.param_groups
    optimizer = AdaFisher(model.named_parameters(), **group.optimizer_kwargs)
    schedule = config.lr_scheduler.build(optimizers=[optimizer], training_steps=STEPS)
    sequences = torchtitan_container.Sequences(0, 1, config.training.seq_len).tokens
    for step in range(STEPS):
        tokens = sequences[4 * step : 4 * step + 4]
        positions = torch.arange(tokens.shape[1] - 1).expand(len(tokens), -1)
        masks = model.get_attention_masks(positions=positions)
        logits = model(tokens[:, :-1], positions=positions, attention_masks=masks)
        optimizer.zero_grad()
        nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.training.max_norm)
        optimizer.step()
        schedule.step()
    flat = StateDictOptions(flatten_optimizer_state_dict=True)
    state = get_optimizer_state_dict(model, optimizer, options=flat)
    return arrays(model.state_dict()), arrays({f"optimizer.{key}": value for key, value in state.items()})


def arrays(state: dict[str, Any]) -> Arrays:
    """Its tensors; of Fisher blocks the lower triangles, since nothing reads the rest."""
    tensors = {key: value for key, value in state.items() if isinstance(value, torch.Tensor)}
    return {
        key: (value.tril() if ".fisher_" in key and value.dim() == 3 else value).detach().numpy().copy()
        for key, value in tensors.items()
    }


def saved(folder: Path, like: Arrays) -> Arrays:
    """Those entries of a checkpoint of torchtitan's, by whatever ranks it was written."""
    room: dict[str, Any] = {key: torch.empty_like(torch.from_numpy(value)) for key, value in like.items()}
    dcp.load(room, checkpoint_id=folder, no_dist=True)
    return arrays(room)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Arrays, Arrays]:
    """The folder of a run of torchtitan's, and what the plain loop made of the same weights."""
    folder = tmp_path_factory.mktemp("titan") / "a"
    [(weights, state)] = run_ranks(plain, 1, folder, timeout=250)
    titan(folder)
    return folder, weights, state


def test_trains_like_a_plain_loop(trained: tuple[Path, Arrays, Arrays]) -> None:
    folder, weights, state = trained
    before = saved(folder / "checkpoint/step-0", weights)
    after = saved(folder / f"checkpoint/step-{STEPS}", weights)
    for name, value in weights.items():
        moved = np.abs(value - before[name]).max()
        assert np.abs(after[name] - value).max() <= 0.02 * moved, name
    assert any(np.abs(value - before[name]).max() > 1e-3 for name, value in weights.items())

    found = saved(folder / f"checkpoint/step-{STEPS}", state)
    assert len([name for name in state if name.endswith(".step")]) == PARAMETERS
    for name, value in state.items():
        assert np.abs(found[name] - value).max() <= 0.02 * np.abs(value).max(), name


def test_resumes_bit_for_bit(trained: tuple[Path, Arrays, Arrays], tmp_path: Path) -> None:
    folder, weights, state = trained
    middle = f"checkpoint/step-{MIDDLE}"
    shutil.copytree(folder / middle, tmp_path / "b" / middle)
    titan(tmp_path / "b")
    straight, resumed = (
        saved(where / f"checkpoint/step-{STEPS}", weights | state) for where in (folder, tmp_path / "b")
    )
    for name in weights | state:
        assert np.array_equal(straight[name], resumed[name]), name


def stages(rank: int, world: int) -> dict[str, Any]:
    """Two model parts, as of a pipeline on one rank, and AdamW for the vectors of both."""
    sys.path.insert(0, str(ROOT / "examples"))
    import torchtitan_container
    import torchtitan_on_cpu  # noqa: F401
    from torchtitan.components.optimizer import ParamGroupConfig

    def build() -> tuple[list[nn.Module], Any]:
        torch.manual_seed(3)
        parts = [nn.Sequential(), nn.Sequential()]
        parts[0].add_module("first", nn.Linear(12, 8))
        parts[1].add_module("second", nn.Linear(8, 4))
        groups = [
            ParamGroupConfig(pattern="bias", optimizer_name="AdamW", optimizer_kwargs={"lr": 0.02}),
            ParamGroupConfig(pattern=".*", optimizer_name="AdaFisher", optimizer_kwargs={"lr": 0.01}),
        ]
        config = torchtitan_container.AdaFisherContainer.Config(param_groups=groups, implementation="for-loop")
        return parts, config.build(model_parts=parts)

    def train(parts: list[nn.Module], container: Any, first: int, last: int) -> None:
        for step in range(first, last):
            x = torch.randn(16, 12, generator=torch.Generator().manual_seed(step))
            container.zero_grad()
            (parts[1](torch.tanh(parts[0](x))) - x[:, :4]).square().mean().backward()
            container.step()

    parts, container = build()
    assert [type(each).__name__ for each in container] == ["AdamW", "AdaFisher"] * 2
    train(parts, container, 0, 3)
    state, weights = container.state_dict(), [part.state_dict() for part in parts]
    state = {key: value.clone() if isinstance(value, torch.Tensor) else value for key, value in state.items()}
    weights = [{name: value.clone() for name, value in part.items()} for part in weights]
    train(parts, container, 3, 5)

    again, other = build()
    other.state_dict()  # as dcp.load asks for it
    for part, values in zip(again, weights, strict=True):
        part.load_state_dict(values)
    other.load_state_dict(state)
    train(again, other, 3, 5)
    for part, twin in zip(parts, again, strict=True):
        for name, value in part.state_dict().items():
            assert torch.equal(value, twin.state_dict()[name]), name
    (eight_billion,) = torchtitan_container.llama3_8b().optimizer.param_groups
    return {"keys": sorted(state), "8b": eight_billion}


def test_pipeline_stages_and_other_optimizers() -> None:
    [found] = run_ranks(stages, 1)
    names = {key.split(".", 1)[1].rsplit(".", 1)[0] for key in found["keys"] if key.startswith("state.")}
    assert names == {"first.weight", "first.bias", "second.weight", "second.bias"}
    assert found["8b"].optimizer_name == "AdaFisher" and found["8b"].optimizer_kwargs == {
        "lr": 3e-4,
        "weight_decay": 0.1,
    }


def own_container(rank: int, world: int) -> str:
    """What torchtitan's own container saves of AdaFisher under FSDP2, loaded again."""
    import torchtitan_on_cpu  # noqa: F401
    from torch.distributed.fsdp import fully_shard
    from torchtitan.components.optimizer import OptimizersContainer, ParamGroupConfig

    from adafisher_dist import AdaFisher

    class Own(OptimizersContainer):
        @staticmethod
        def _resolve_optimizer_factory(name: str) -> Any:
            return AdaFisher

    module = fully_shard(nn.Linear(40, 64, bias=False))
    settings = {"lr": 0.01, "block_size": 8, "rows_per_block": 4}
    groups = [ParamGroupConfig(pattern=".*", optimizer_name="AdaFisher", optimizer_kwargs=settings)]
    container = Own(OptimizersContainer.Config(param_groups=groups), model_parts=[module])
    module(torch.ones(2, 40)).sum().backward()
    container.step()
    state = container.state_dict()
    try:
        container.load_state_dict(state)
    except ValueError as error:
        return str(error)
    return ""


def test_torchtitans_own_container_loses_the_state_and_says_so_when_it_loads() -> None:
    for said in run_ranks(own_container, 2):
        assert "does not fit" in said, said
