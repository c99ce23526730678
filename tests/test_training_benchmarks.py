"""The training benchmarks: what they train, what they keep, what they read from the losses."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.ci
pytest.importorskip("sklearn")
BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.append(str(BENCHMARKS))  # behind tests/

import convergence  # noqa: E402
import convergence_report as report  # noqa: E402
import convergence_tasks  # noqa: E402
import deepspeed_trainings  # noqa: E402
import digits  # noqa: E402
import optimizers  # noqa: E402
import texts  # noqa: E402
import trainings  # noqa: E402
from convergence import BASE, CELLS, CONTENDERS, LRS, OURS, TUNED_ON, TUNING_SEED, tuning, wanted  # noqa: E402
from convergence_report import Point, speed_up  # noqa: E402
from trainings import Result, Run  # noqa: E402

SHORT = replace(digits.task_of("vit"), steps=20)


def result(*losses: float | None) -> Result:
    return Result(losses, "abc", 1.0, "a processor", 8.0)


def quadratic(run: Run) -> float:
    """A final loss that is best at lr 8e-2, weight decay 0.01 and beta1 0.95."""
    own = 0.0 if json.loads(run.settings) == {"beta1": 0.95} else 0.1
    return 1 + math.log(run.lr / 8e-2) ** 2 + abs(run.wd - 0.01) + own


def all_of(loss: Any = quadratic, most: int = 2000) -> dict[Run, Result]:
    """What the whole plan asks for, one after the other, where a training ends with this loss."""
    done: dict[Run, Result] = {}
    while missing := next((run for run in wanted(done) if run not in done), None):
        done[missing] = result(9.0, loss(missing))
        assert len(done) < most
    return done


# ---- the plan ----


def test_each_is_tuned_until_its_best_rate_is_inside_the_grid() -> None:
    done: dict[Run, Result] = {}
    while missing := [run for run in tuning(BASE, done)[0] if run not in done]:
        done |= {run: result(9.0, quadratic(run)) for run in missing}
    runs, best = tuning(BASE, done)
    assert best == Run(TUNED_ON, "adamw", 8e-2, 0.01, TUNING_SEED, '{"beta1": 0.95}')
    assert sorted({run.lr for run in runs}) == [*LRS, 4e-2, 8e-2, 0.16]
    assert sorted({run.wd for run in runs}) == [0.001, 0.01, 0.1, 0.5]
    assert {run.lr for run in runs if run.wd == 0.01} == {4e-2, 8e-2, 0.16}  # with the best decay once more
    assert len(runs) == len(done) == 7 + 3 + 2 + 2
    assert tuning(BASE, {})[1] is None and len(tuning(BASE, {})[0]) == len(LRS)


def test_a_grid_that_goes_on_for_ever_is_left() -> None:
    done: dict[Run, Result] = {}
    while missing := [run for run in tuning(BASE, done)[0] if run not in done]:
        done |= {run: result(9.0, -run.lr) for run in missing}
    assert len({run.lr for run in tuning(BASE, done)[0]}) == convergence.MOST_LRS


def test_all_are_given_as_many_trials() -> None:
    for name in CONTENDERS:
        done: dict[Run, Result] = {}
        while missing := [run for run in tuning(name, done)[0] if run not in done]:
            done |= {run: result(9.0, math.log(run.lr / 5e-3) ** 2) for run in missing}
        assert len(done) == len(LRS) + 2 + 2, name


def test_fresh_seeds_and_the_best_rivals_alone_are_trained_further() -> None:
    ranking = {"muon": 0.1, "soap": 0.2, "prototype": 0.0}

    def loss(run: Run) -> float:
        return quadratic(run) + ranking.get(run.optimizer, 0.5) + (0.05 if "every" in run.settings else 0)

    done = all_of(loss)
    assert convergence.leaders(done) == [BASE, OURS, "Muon", "SOAP"]
    tasks = {cell.task for cell in CELLS}
    assert {run.task for run in done} == tasks
    rows = convergence.rows(done)
    assert set(rows) == tasks and list(rows["laws64x80"]) == [BASE, OURS, "Muon", "SOAP"]
    assert list(rows["laws64x40"]) == [BASE] and len(rows[TUNED_ON]) == len(CONTENDERS)
    for by_name in rows.values():
        assert all(run.seed != TUNING_SEED for trained in by_name.values() for run, _ in trained)
    assert len(rows[TUNED_ON][OURS]) == 5


def test_a_cells_rate_is_chosen_among_parts_of_the_best() -> None:
    done = all_of(lambda run: quadratic(replace(run, lr=run.lr * 2)) if run.task == "laws64x80" else quadratic(run))
    run = convergence.rows(done)["laws64x80"][OURS][0][0]
    assert run.lr == 4e-2 and convergence.rows(done)[TUNED_ON][OURS][0][0].lr == 8e-2


def test_another_weight_decay_may_be_best_on_another_task() -> None:
    done = all_of(lambda run: quadratic(run) + 2 * (run.task in ("tune64", "lora64") and run.wd != 0.1))
    chosen = {task: by_name[BASE][0][0] for task, by_name in convergence.rows(done).items()}
    assert chosen["tune64"].wd == chosen["lora64"].wd == 0.1
    assert chosen[TUNED_ON].wd == chosen["cnn"].wd == chosen["laws64x80"].wd == 0.01
    tried = {(run.lr, run.wd) for run in done if (run.task, run.optimizer, run.seed) == ("tune64", "adamw", 100)}
    assert {lr for lr, wd in tried if wd == 0.1} == {lr for lr, wd in tried if wd == 0.01}  # as many trials


def test_a_rate_is_carried_on_where_trials_would_take_days() -> None:
    """As it fell from 20 to 80 bytes at width 64, it falls at width 96; and so with the width."""
    falls = {"laws64x80": 4.0, "laws96x20": 2.0}
    done = all_of(lambda run: quadratic(replace(run, lr=run.lr * falls.get(run.task, 1.0))))
    rates = {task: by_name[OURS][0][0].lr for task, by_name in convergence.rows(done).items() if OURS in by_name}
    assert rates[TUNED_ON] == 8e-2 and rates["laws64x80"] == 2e-2 and rates["laws96x20"] == 4e-2
    assert rates["laws96x80"] == pytest.approx(1e-2, rel=1e-2)  # as many times the steps
    power = math.log(convergence.steps_of("laws128x20") / convergence.steps_of("laws96x20")) / math.log(3.79)
    assert 0.5 < power < 1 and rates["laws128x20"] == pytest.approx(4e-2 * 0.5**power, rel=1e-2)
    assert not [run for run in done if run.task == "laws96x80" and run.seed == TUNING_SEED]


def test_a_cells_best_rate_is_inside_too() -> None:
    done = all_of(lambda run: quadratic(replace(run, lr=run.lr * 8)) if run.task == "laws64x80" else quadratic(run))
    tried = {run.lr for run in done if (run.task, run.optimizer, run.seed) == ("laws64x80", "adafisher", TUNING_SEED)}
    assert tried == {8e-2, 4e-2, 2e-2, 1e-2, 5e-3}
    assert convergence.rows(done)["laws64x80"][OURS][0][0].lr == 1e-2
    assert not any(run.seed == TUNING_SEED for run in done if run.task == "laws128x20")  # none is tried


def test_a_cell_is_reported_when_it_is_done_for_all() -> None:
    done = all_of()
    assert "laws64x80" in convergence.rows(done)
    del done[convergence.rows(done)["laws64x80"]["Muon"][0][0]]
    assert "laws64x80" not in convergence.rows(done) and "laws64x40" in convergence.rows(done)


# ---- what is read from the losses ----


def test_speed_up() -> None:
    curve = [Point(100, 2.0, 0.0), Point(200, 1.0, 0.0)]
    assert speed_up(curve, Point(100, 1.5, 0.0)) == pytest.approx((2**0.5, 0))
    value, error = speed_up(curve, Point(50, 1.5, 0.1)) or (0, 0)
    assert value == pytest.approx(2 * 2**0.5) and error == pytest.approx(value * math.log(2) * 0.1)
    assert speed_up(curve, Point(100, 2.0, 0.0)) == pytest.approx((1, 0))
    assert speed_up(curve, Point(100, 2.1, 0.0)) is None  # behind AdamW at its least tokens
    assert (speed_up(curve, Point(100, 0.9, 0.0)) or (0,))[0] == math.inf
    assert speed_up(curve, Point(200, 0.9, 0.0)) is None  # of as many tokens AdamW has had no more
    assert speed_up(curve[:1], Point(100, 1.5, 0.0)) is None
    error = (speed_up([Point(100, 2.0, 0.2), Point(200, 1.0, 0.4)], Point(100, 1.5, 0.0)) or (0, 0))[1]
    assert error == pytest.approx(2**0.5 * math.log(2) * math.hypot(0.1, 0.2))


def test_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = all_of()
    lost = next(run for run in done if (run.task, run.optimizer, run.seed) == ("cnn", "muon", 0))
    done[lost] = result(3.0, None)
    found = report.numbers(convergence.rows(done))
    assert found["laws64x80"][0]["seeds"] == 3 and found[TUNED_ON][0]["optimizer"] == BASE
    text = report.markdown(found)
    assert "### laws64x80: 5,280 steps" in text and "| AdamW | 0.08, 0.01 | " in text
    assert "diverged" in text and text.count("| AdaFisher |") == sum(
        OURS in by for by in convergence.rows(done).values()
    )
    ends = {row["optimizer"]: f"{row['loss']:.4f} ± 0.0000" for row in found["laws64x80"]}
    told = report.summary(found)
    assert f"| laws64x80 | {ends[BASE]} | {ends[OURS]} | {ends['Muon']} | {ends['NorMuon']} |\n" in told
    assert re.search(r"\| laws64x80 \| \*\*\+0\.1000 ± 0\.0000\*\* \|( [+-]0\.0000 ± 0\.0000 \|){2}\n", told)
    assert report.paired([1.0, 1.1, 1.3], [1.5, 1.7, 1.8]) == "**-0.5333 ± 0.1434**"  # t of 2 degrees: 4.303
    assert report.paired([1.0, 1.1], [1.1, 1.1]) == "-0.0500 ± 0.6353"
    assert "| laws64x80 | 0.08 | 0.08 | 0.08 | 0.08 | 0.01 |\n" in report.best_rates(found)
    page = tmp_path / "docs" / "convergence.md"
    page.parent.mkdir()
    for name in ("convergence.md", "convergence_times.json"):
        (page.parent / name).write_text((report.ROOT / "docs" / name).read_text())
    for module in (report, report.common):
        monkeypatch.setattr(module, "ROOT", tmp_path)
    report.write(convergence.rows(done), convergence.tuned(done), done)
    assert "| AdamW | 0.0025 to 0.16 | 0.08, decay 0.01, beta1 0.95 | " in page.read_text()
    pictures = [(page.parent / f"convergence{end}").read_text() for end in (".svg", "_seconds.svg")]
    assert ">parameters × bytes of text a parameter<" in pictures[0] and ">NorMuon: " in pictures[1]
    assert json.loads((tmp_path / "docs/convergence.json").read_text())["tasks"]["cnn"][-1]["loss"] is None


def test_the_page_has_the_tables_of_the_trainings_that_are_committed() -> None:
    done, page = trainings.read(convergence.FILE), (report.ROOT / "docs" / "convergence.md").read_text()
    for name, block in report.blocks(convergence.rows(done), convergence.tuned(done), done).items():
        assert report.with_block(page, name, block) == page, f"{name}: run benchmarks/convergence.py --report"


def test_the_prose_has_the_differences_of_the_trainings_that_are_committed() -> None:
    tasks = report.numbers(convergence.rows(trainings.read(convergence.FILE)))
    page = " ".join((report.ROOT / "docs" / "convergence.md").read_text().partition("<!-- summary")[0].split())
    told = []
    for task in ("laws64x20", "laws64x20large", "laws64x80", "laws96x20", "tune64", "lora64", "cnn"):
        finals = {row["optimizer"]: row["finals"] for row in tasks[task]}
        for name in {BASE, "Muon", "NorMuon", "SOAP", "AdaFisher without F"} & set(finals):
            middle, half = (
                abs(float(part)) for part in report.paired(finals[OURS], finals[name]).strip("*").split(" ± ")
            )
            told.append(any(f"{middle:.{digits}f} ± {half:.{digits}f}" in page for digits in (3, 4)))
            assert told[-1], (task, name, middle, half)
    assert len(told) == 23


def test_the_proposal_has_the_table_of_the_trainings_that_are_committed() -> None:
    page = (report.ROOT / "docs" / "deepspeed_proposal.md").read_text()
    block = deepspeed_trainings.table(trainings.read(deepspeed_trainings.FILE))
    assert report.with_block(page, "trainings", block) == page, "run benchmarks/deepspeed_trainings.py --report"


def test_deepspeed_trains_at_the_settings_of_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deepspeed_trainings, "read", lambda path: all_of())
    runs = list(deepspeed_trainings.wanted({}))
    assert len(runs) == len(set(runs)) == 2 * 3 * 3 * 2
    assert {(run.optimizer, run.lr, run.wd) for run in runs} == {("adamw", 8e-2, 0.01), ("adafisher", 8e-2, 0.01)}
    adamw = next(run for run in runs if run.optimizer == "adamw")
    assert deepspeed_trainings.config(adamw, 3) == {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {
            "type": "AdamW", "params": {"lr": 8e-2, "weight_decay": 0.01, "betas": [0.95, 0.95], "torch_adam": True},
        },
        "zero_optimization": {"stage": 3},
        "gradient_clipping": 1.0,
    }  # fmt: skip
    model = convergence_tasks.GPT(64)
    groups = deepspeed_trainings.groups_of(optimizers.build("adafisher", model, 1e-2, 0.1, {}))
    (tables,) = (group for group in groups if group.get("max_blocks") == 0)
    assert {id(p) for p in tables["params"]} == {id(model.embedding.weight), id(model.head.weight)}


# ---- trainings and their file ----


def test_a_training_is_a_function_of_its_settings() -> None:
    for name in ("adamw", "adafisher", "muon", "normuon", "soap", "kron", "ademamix", "prototype"):
        run = Run("vit", name, 1e-3 if name == "kron" else 3e-3)
        first, again = trainings.train(run, SHORT), trainings.train(run, SHORT)
        assert first.losses == again.losses and len(first.losses) == 10, name
        assert first.final < 2.4 and 4 < first.state_bytes < 60, (name, first)
    assert trainings.train(replace(run, seed=1), SHORT).losses != first.losses
    assert trainings.train(replace(run, optimizer="adamw", lr=1e30), SHORT).final == math.inf


@pytest.mark.parametrize("name", CONTENDERS)
def test_a_training_that_was_stopped_goes_on_to_the_bit(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainings, "SAVE_EVERY", -1.0)
    builder, settings, _ = CONTENDERS[name]
    run, steps = Run("vit", builder, 3e-3, settings=trainings.written(settings)), []

    def loss(model: Any, seed: int, step: int) -> Any:
        steps.append(step)
        if steps == list(range(14)):
            raise KeyboardInterrupt
        return SHORT.loss(model, seed, step)

    whole = trainings.train(run, SHORT)
    with pytest.raises(KeyboardInterrupt):
        trainings.train(run, replace(SHORT, loss=loss), tmp_path)
    last = trainings.train(run, replace(SHORT, loss=loss), tmp_path)
    assert last.losses == whole.losses and not list(tmp_path.iterdir())
    assert steps[14] == (0 if builder in trainings.WITHOUT_STATE_DICT else 13)


def test_schedule() -> None:
    factors = [trainings.schedule(step, 200) for step in range(200)]
    assert factors[:10] == pytest.approx([(i + 1) / 10 for i in range(10)]) and factors[10] == 1
    assert factors[10:] == sorted(factors[10:], reverse=True) and 0 < factors[-1] < 1e-3


def test_the_file_survives_many_writers_and_killed_ones(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b.jsonl"
    assert trainings.read(path) == {}
    runs = [Run("vit", "adamw", 1e-3, seed=seed, settings=trainings.written({"beta2": 0.9})) for seed in range(40)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda run: trainings.append(path, run, result(1.0, None)), runs))
    with path.open("ab") as file:
        file.write(b'{"task": "vi')
    trainings.append(path, runs[0], result(2.0))
    done = trainings.read(path)
    assert set(done) == set(runs) and done[runs[0]] == result(2.0) and done[runs[1]].final == math.inf
    path.write_text('{"task": 1}\n')
    with pytest.raises(ValueError, match="line 1, is no finished training"):
        trainings.read(path)


def test_the_committed_files_are_read() -> None:
    assert len(trainings.read(BENCHMARKS / "development" / "trials.jsonl")) > 180
    trainings.read(convergence.FILE)


# ---- tasks ----


def test_windows_of_a_text_come_once() -> None:
    text = texts.Text(torch.arange(97, dtype=torch.uint8), torch.arange(60, dtype=torch.uint8))
    seen = torch.cat([text.batch(3, step, 2, 8) for step in range(5)])
    assert seen.shape == (10, 9) and len(set(seen[:, 0].tolist())) == 10 and (seen.diff() == 1).all()
    with pytest.raises(ValueError, match="has 11 windows of 8 bytes"):
        text.batch(3, 5, 2, 8)
    assert text.held_out_batch(3, 9)[:, 0].tolist() == [0, 25, 50]


def test_texts_leave_out_what_repeats() -> None:
    lines = [f"{i:050d}" for i in range(39)]
    files = {"a": "\n".join(lines[:20]), "b": "\n".join(lines[:20]), "c": "\n".join(lines[20:]), "d": "short"}
    text = texts.concatenate(files, lambda name: files[name].encode(), 0.0019)
    assert all(line.encode() in text for line in lines) and text.count(lines[10].encode()) == 1
    with pytest.raises(ValueError, match="needed"):
        texts.concatenate(files, lambda name: files[name].encode(), 1)


def test_public_tasks() -> None:
    assert [convergence_tasks.hidden_numel(width) for width in convergence_tasks.SIZES] == [135168, 506880, 1441792]
    small, large = (convergence_tasks.task_of(f"laws64x20{end}") for end in ("", "large"))
    assert small.steps == 1320 and large.steps == 165 and small.tokens == large.tokens == 20 * 135168
    torch.manual_seed(0)
    model, tokens = convergence_tasks.GPT(64), torch.randint(256, (2, 33))
    loss = model(tokens)
    assert loss.item() == pytest.approx(math.log(256), abs=0.1)
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    changed = tokens.clone()
    changed[:, -1] = (changed[:, -1] + 1) % 256
    assert torch.equal(model.layers[0](model.embedding(tokens[:, :-1]), model.turn[:, :32]),
                       model.layers[0](model.embedding(changed[:, :-1]), model.turn[:, :32]))  # fmt: skip
    with pytest.raises(ValueError, match="no such task: laws65x20"):
        convergence_tasks.task_of("laws65x20")


def test_adapters_alone_are_trained() -> None:
    model = convergence_tasks.GPT(64)
    tokens = torch.randint(256, (2, 17))
    before = model(tokens)
    convergence_tasks.freeze_but_adapters(model, model.layers)
    assert torch.equal(model(tokens), before)  # B is 0
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(trained) == 3 * 6 * 2 and all(name.endswith((".a", ".b")) for name in trained)


# ---- the development bench, whose modules have common names: in a process of its own ----

SCRIPT = """
import sys
from pathlib import Path
import torch
import trial  # first: it puts benchmarks/ on the path
import optimizers, prototype

torch.manual_seed(0)
x = torch.linalg.qr(torch.randn(2, 40, 30)).Q * torch.linspace(0.05, 1, 30)
sigma = torch.linalg.svdvals(prototype.polar(x, 5))
assert 0.6 < sigma.min() and sigma.max() < 1.3, sigma
a = x.mT @ x + 0.01 * torch.eye(30)
values, vectors = torch.linalg.eigh(a)
exact = (vectors * values.rsqrt().unsqueeze(1)) @ vectors.mT
ratio = torch.linalg.svdvals(torch.linalg.solve(exact, prototype.inverse_root(a, 5)))
assert 0.6 < ratio.min() and ratio.max() < 1.3, ratio
model = torch.nn.Linear(4, 4)
for wrong in ({"a": 1, "coupled": 5}, {"length": 1, "polar": "whole"}, {"nope": 1}):
    try:
        optimizers.build("prototype", model, 1e-3, 0.1, wrong)
    except ValueError as error:
        print(error)
    else:
        raise AssertionError(wrong)
trial.table("gpt64x80")
"""


def test_candidates_of_the_development_bench() -> None:
    folder = BENCHMARKS / "development"
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        cwd=folder, capture_output=True, text=True, timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{folder}:{os.environ.get('PYTHONPATH', '')}"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no such setting" in done.stdout and "lr 0.005 wd 0.1  muon" in done.stdout


def test_the_command_refuses_what_is_not_there() -> None:
    command = [sys.executable, str(BENCHMARKS / "convergence.py"), "--repeat", "laws64x20", "Adam", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env={**os.environ, "COLUMNS": "200"})
    assert done.returncode == 2 and "give a task, a name (AdamW; AdaFisher;" in done.stderr.replace("\n", " ")
    assert optimizers.BUILDERS.keys() >= {builder for builder, _, _ in CONTENDERS.values()}
