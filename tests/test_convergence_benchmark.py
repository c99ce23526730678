"""benchmarks/convergence.py: which trainings it runs, what it keeps, what it reads from curves."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("sklearn")
for folder in ("benchmarks", "launch"):
    sys.path.append(str(Path(__file__).parent.parent / folder))  # behind tests/

import convergence  # noqa: E402
import convergence_report as report  # noqa: E402
import optimizers  # noqa: E402
import trainings  # noqa: E402
import turns  # noqa: E402
from convergence import CONTENDERS, Plan, grid, pairs_of, wanted  # noqa: E402
from tasks import tasks  # noqa: E402
from trainings import Curve, Run  # noqa: E402

PAIR = ("autoencoder", "SGD")


def plan(folder: Path = Path(), extensions: int = 6) -> Plan:
    return Plan(("autoencoder",), (0.01, 0.02, 0.04), (0, 1), 20, extensions, folder)


def run(lr: float = 0.01, seed: int = 0, optimizer: str = "SGD") -> Run:
    return plan().run(("autoencoder", optimizer), lr, seed)


def finish(loss: Callable[[float], float], extensions: int = 6) -> list[Run]:
    """All that the plan asks for, one after the other, where a learning rate has this loss."""
    done: dict[Run, Curve] = {}
    while missing := wanted(plan(extensions=extensions), [PAIR], done):
        final = loss(missing[0].lr)
        done[missing[0]] = Curve([0, 20], [9.0, final], diverged=math.isinf(final))
    return list(done)


def lrs(runs: list[Run]) -> list[float]:
    return sorted({run.lr for run in runs})


# ---- the grid ----


def test_the_grid_grows_until_the_best_is_inside() -> None:
    assert lrs(finish(lambda lr: abs(math.log(lr / 0.02)))) == [0.01, 0.02, 0.04]
    assert lrs(finish(lambda lr: abs(math.log(lr / 0.16)))) == [0.01, 0.02, 0.04, 0.08, 0.16, 0.32]
    assert lrs(finish(lambda lr: abs(math.log(lr / 0.005)))) == [0.0025, 0.005, 0.01, 0.02, 0.04]


def test_the_grid_grows_so_often_and_no_more() -> None:
    assert lrs(finish(lambda lr: -lr))[-1] == 0.04 * 2**6
    assert lrs(finish(lambda lr: -lr, extensions=0)) == [0.01, 0.02, 0.04]
    assert lrs(finish(lambda lr: math.inf, extensions=2)) == [0.0025, 0.005, 0.01, 0.02, 0.04]  # all diverge


def test_the_grid_waits_for_what_is_not_known() -> None:
    assert grid((1.0, 2.0), lambda lr: None if lr == 1.0 else 0.0, 6) == [1.0, 2.0]


def test_first_seed_first_and_only_the_optimizer_at_the_edge_goes_on() -> None:
    runs = finish(lambda lr: -lr, extensions=1)
    assert [run.seed for run in runs] == [0, 0, 0, 1, 1, 1, 0, 1]
    done = {run: Curve([0, 20], [9.0, 1 / run.lr], False) for run in runs}
    other = wanted(plan(extensions=1), [PAIR, ("autoencoder", "AdamW")], done)
    assert {run.optimizer for run in other} == {"AdamW"} and lrs(other) == [0.01, 0.02, 0.04]


# ---- the file ----


def test_finished_runs_are_not_repeated_and_a_torn_line_is_cut_off(tmp_path: Path) -> None:
    path = plan(tmp_path).file
    curve = Curve([0, 1], [2.5, 1.25], False)
    assert trainings.read(path) == {}
    trainings.append(path, run(seed=0), curve)
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"task": "autoenc')
    assert trainings.read(path) == {run(seed=0): curve} and path.read_bytes() == whole
    path.write_bytes(whole + b'{"task": "autoenc')
    trainings.append(path, run(seed=1), Curve([0], [2.5], True))
    done = trainings.read(path)
    assert len(path.read_bytes().splitlines()) == 2 and done[run(seed=1)].final == math.inf
    missing = wanted(plan(), [PAIR], done)
    assert [(each.lr, each.seed) for each in missing] == [(0.02, 0), (0.04, 0), (0.02, 1), (0.04, 1)]


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    path = plan(tmp_path).file
    path.write_text("{}\n")
    with pytest.raises(ValueError, match="line 1, is no finished training"):
        trainings.read(path)


def test_several_may_append_and_an_optimizer_is_forgotten(tmp_path: Path) -> None:
    path = plan(tmp_path).file
    runs = [run(seed=seed, optimizer=name) for seed in range(40) for name in ("SGD", "AdamW")]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda each: trainings.append(path, each, Curve([0], [1.0], False)), runs))
    assert set(trainings.read(path)) == set(runs)
    assert trainings.forget(path, lambda each: each.optimizer == "SGD") == 40
    assert {each.optimizer for each in trainings.read(path)} == {"AdamW"} and list(tmp_path.iterdir()) == [path]


def test_runs_with_other_settings_are_other_runs() -> None:
    old = Run(*PAIR, trainings.written({"momentum": 0.5}), 0.01, 0, 20)
    assert plan().has(run(), [PAIR]) and not plan().has(old, [PAIR])
    assert run() in wanted(plan(), [PAIR], {old: Curve([], [], True)})


# ---- a training ----


@pytest.mark.parametrize("name", CONTENDERS)
def test_a_training_is_a_function_of_its_run(name: str) -> None:
    if CONTENDERS[name].missing:
        pytest.skip(CONTENDERS[name].missing)
    first, again, other = (trainings.train(replace(run(1e-3, seed, name), steps=4)) for seed in (0, 0, 1))
    assert first == again and first.losses[-1] < first.losses[0] and not first.diverged
    assert first.at == [0, 1, 2, 3, 4] and first.losses != other.losses


def test_a_training_that_diverges_stops_there() -> None:
    curve = trainings.train(run(lr=1e30))
    assert curve.diverged and curve.final == math.inf and 0 < len(curve.losses) < 20
    assert all(math.isfinite(loss) for loss in curve.losses)


@pytest.mark.parametrize("name", ["autoencoder", "cnn", "vit"])
def test_tasks_are_functions_of_the_seed(name: str) -> None:
    task = tasks()[name]
    torch.manual_seed(0)
    model = task.build()
    torch.manual_seed(0)
    twin = task.build()
    assert all(map(torch.equal, model.parameters(), twin.parameters()))
    losses = [task.loss(each, *at).item() for each in (model, twin) for at in ((0, 5), (0, 6), (1, 5))]
    assert losses[:3] == losses[3:] and len(set(losses)) == 3
    assert trainings.validate(task, model) == trainings.validate(task, twin)
    assert model.training


def test_the_schedule_is_that_of_train_py() -> None:
    factors = [trainings.schedule(step, 200) for step in range(200)]
    assert factors[0] == 1 / 20 and factors[19] == factors[20] == 1 and factors[110] == pytest.approx(0.51)
    assert 0.02 < factors[-1] < 0.0202 and trainings.schedule(0, 1) == 1


@pytest.mark.skipif(CONTENDERS["Muon"].missing is not None, reason="this torch has no Muon")
def test_muon_is_for_matrices_and_left_out_where_there_are_none() -> None:
    task = tasks()["vit"]
    model = task.build()
    first, rest = CONTENDERS["Muon"].build(model, task, 1e-3)
    inner = [p for name, p in model.named_parameters() if name.startswith("layers.") and p.dim() == 2]
    assert first.param_groups[0]["params"] == inner and len(inner) == 8
    assert len(inner) + len(rest.param_groups[0]["params"]) == len(list(model.parameters()))
    assert pairs_of(["cnn", "vit"], ["Muon"]) == [("vit", "Muon")]


# ---- what is read from the curves ----


def test_steps_to_a_loss() -> None:
    curve = {"at": [0, 10, 20, 30], "loss": [4.0, 2.0, 3.0, 1.0]}
    assert report.part_to(curve, 3.0, 40) == 5 / 40
    assert report.part_to(curve, 1.5, 40) == 27.5 / 40
    assert report.part_to(curve, 1.0, 30) == 1.0
    assert report.part_to(curve, 0.9, 40) is None and report.part_to(curve, math.inf, 40) is None
    assert report.part_to(curve, 5.0, 40) == 0


def test_width() -> None:
    assert report.width({1.0: 5.0, 2.0: 1.0, 4.0: 5.0}) == 1
    assert report.width({1.0: 1.01, 2.0: 1.0, 4.0: 1.02, 8.0: 1.03, 16.0: 1.0}) == 4  # a gap ends it
    assert report.width({1.0: math.inf, 2.0: math.inf}) == 1


def test_a_report_of_a_task() -> None:
    def curves(*finals: float) -> dict[float, list[Curve]]:
        return {
            lr: [Curve([0, 10, 20], [4.0, (4 + final) / 2, final], math.isinf(final))] * 2
            for lr, final in zip((1.0, 2.0, 4.0, 8.0), finals, strict=False)
        }

    ours, adamw = curves(1.5, 1.0, math.inf, 9.0), curves(3.0, 2.0, 2.5)
    found = report.task_report(
        tasks()["autoencoder"], 20, {"AdaFisher": ours, "AdamW": adamw}, (1.0, 2.0, 4.0), {"AdaFisher": {"median": 3.0}}
    )
    own = found["optimizers"]["AdaFisher"]
    assert (own["best_lr"], own["final"]["mean"], own["width"], own["lrs_beyond_the_base_grid"]) == (2.0, 1.0, 1, [8.0])
    assert own["steps_to_adamw"] == pytest.approx(2 / 3) and own["time_to_adamw"] == pytest.approx(2)
    assert own["worst_to_adamw"] == {"ratio": math.inf, "lr": 4.0}
    assert found["optimizers"]["AdamW"]["steps_to_adamw"] == 1 and found["optimizers"]["AdamW"]["time_to_adamw"] is None
    assert report.plain(own)["by_lr"][2]["mean"] == "inf"
    found |= {"runs_missing": 3, "left_out": {"Muon": "no matrix"}}
    text = report.markdown({"autoencoder": found}, "command")
    assert "| AdaFisher | 2 | 1.000 | 1.000 to 1.000 | 0.67 | 2.00 | 1 × | ∞ |" in text
    assert (
        "AdaFisher: ∞ (at 4;" in text
        and "beyond it: AdaFisher (8)" in text
        and "INCOMPLETE: 3" in text
        and "Muon is left out" in text
    )


def test_ratios_of_cycles() -> None:
    base = [1.0] * 10 + [2.0] * 10 + [4.0] * 10
    own = [2.0] * 10 + [4.0] * 9 + [14.0] + [8.0] * 10
    assert turns.ratios(own, base) == {"min": 2.0, "median": 2.0, "max": 2.5}
    assert convergence.FULL.file.name == convergence.QUICK.file.name == "convergence.jsonl"


def test_trainings_by_another_update_are_other_trainings(monkeypatch: pytest.MonkeyPatch) -> None:
    before = optimizers.contenders()["AdaFisher"].settings
    assert optimizers.contenders()["AdaFisher"].settings == before
    for name, other in (
        ("update_rule.polar_factor", lambda x: x),
        ("block_step.diagonal_update", lambda m, v, eps: m),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(f"adafisher_dist.numerics.{name}", other)
            now = optimizers.contenders()["AdaFisher"].settings
        assert now["update"] != before["update"] and {**now, "update": before["update"]} == before
