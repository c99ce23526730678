"""What torch's own test suite asks of an optimizer, in one process."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from models import batch, distance, model, same_state, train_steps, weights
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from adafisher_dist import AdaFisher, save_checkpoint
from adafisher_dist.settings import DEFAULTS

SETTINGS: list[dict[str, Any]] = [
    {},
    {"block_size": 8, "rows_per_block": 4, "inverse_update_freq": 3, "max_blocks": 5},
    {"block_size": 8, "rows_per_block": 4, "inverse_update_freq": 3, "max_blocks": 5, "packed": True, "exponent": 1.0},
    {"fisher_dtype": torch.bfloat16, "exponent": 0.5, "grafting": "none"},
    {"fisher_dtype": torch.float64, "block_grid": "flat", "fisher_update_freq": 2},
]


@pytest.mark.parametrize("older", [1, 2])
def test_a_state_dict_of_an_older_format_is_refused(older: int) -> None:
    parameter = torch.nn.Parameter(torch.zeros(3, 2))
    parameter.grad = torch.ones(3, 2)
    optimizer = AdaFisher([parameter])
    optimizer.step()
    saved = optimizer.state_dict()
    saved["adafisher_dist"]["format"] = older
    told = f"format {older}, whose Fisher blocks are cut and weighed otherwise; .* reads 3"
    with pytest.raises(ValueError, match=told):
        AdaFisher([parameter]).load_state_dict(saved)


def test_signature_is_the_documented_one() -> None:
    expected = {**DEFAULTS, "process_group": None}
    assert list(expected.values()) == [
        *(1e-3, 0.9, True, 0.97, 0.01, 1e-8, 128, 64, "rows", 0.01, True, None, 1, 1, 0.5, "rms", torch.float32),
        *(False, False, None, None),
    ]
    parameters = list(inspect.signature(AdaFisher).parameters.values())
    assert parameters[0].name == "params"
    assert {p.name: p.default for p in parameters[1:]} == expected


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_dict_restores_bit_for_bit(settings: dict[str, Any], dtype: torch.dtype) -> None:
    module = model(dtype)
    optimizer = AdaFisher(module.named_parameters(), lr=1e-2, **settings)
    train_steps(module, optimizer, 0, 5)
    file = io.BytesIO()
    torch.save({"optimizer": optimizer.state_dict(), "model": module.state_dict()}, file)
    train_steps(module, optimizer, 5, 9)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again = model(dtype)
    again.load_state_dict(saved["model"])
    resumed = AdaFisher(again.named_parameters(), lr=5.0, block_size=3)  # the saved settings win, as in torch.optim
    resumed.load_state_dict(saved["optimizer"])
    assert same_state(resumed.state_dict(), saved["optimizer"])
    train_steps(again, resumed, 5, 9)
    assert distance(weights(again), weights(module)) == 0
    assert same_state(resumed.state_dict(), optimizer.state_dict())


def test_loading_copies() -> None:
    module = model()
    optimizer = AdaFisher(module.parameters())
    train_steps(module, optimizer, 0, 2)
    saved = copy.deepcopy(optimizer.state_dict())
    other = AdaFisher(module.parameters())
    other.load_state_dict(saved)
    (key,) = (key for key in saved["state"][2] if key.startswith("momentum"))
    saved["state"][2][key].fill_(7)
    assert not (other.state_dict()["state"][2][key] == 7).any()
    train_steps(module, other, 2, 3)
    assert saved["state"][2]["step"] == 2


def test_state_shows_in_the_state_attribute() -> None:
    module = model()
    optimizer = AdaFisher(module.parameters(), block_size=16)
    assert len(optimizer.state) == 0 and optimizer.state_dict()["state"] == {}
    train_steps(module, optimizer, 0, 3)
    state = optimizer.state[module.mix.weight]
    assert state["step"] == 3 and state["fisher_updates"] == 3
    # 5 rows of 37, cut into 10, 10, 10 and 7: blocks of so few rows have at most twice as many
    # columns
    assert state["momentum_10x5"].shape == (3, 5, 10) and state["fisher_7x5"].shape == (1, 7, 7)
    assert state["square_10x5"].shape == (3, 5)
    assert module.frozen not in optimizer.state


@pytest.mark.parametrize("how", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("taken", [0, 4])
def test_a_copy_goes_on_as_the_original(how: Any, taken: int) -> None:
    module = model()
    optimizer = AdaFisher(module.named_parameters(), lr=1e-2, inverse_update_freq=3, block_size=8)
    train_steps(module, optimizer, 0, taken)
    module2, optimizer2 = how((module, optimizer))
    train_steps(module, optimizer, taken, taken + 4)
    train_steps(module2, optimizer2, taken, taken + 4)
    assert distance(weights(module2), weights(module)) == 0
    assert same_state(optimizer2.state_dict(), optimizer.state_dict())
    public = lambda o: {k for k in dir(o) if not k.startswith("_") and not callable(getattr(o, k))}  # noqa: E731
    assert public(optimizer2) == public(optimizer)


def test_entries_of_no_parameter_go_along() -> None:
    """Users may keep what they like in `state`, as in torch's optimizers."""
    module = model()
    optimizer = AdaFisher(module.parameters())
    train_steps(module, optimizer, 0, 2)
    optimizer.state["note"], optimizer.state["number"] = {"best": 1.5}, 5
    again = AdaFisher(model().parameters())
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for other in (again, copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert (other.state["note"], other.state["number"]) == ({"best": 1.5}, 5)
    train_steps(module, optimizer, 2, 3)
    assert optimizer.state["number"] == 5 and optimizer.state[module.mix.weight]["step"] == 3


class CountedReads(TorchDispatchMode):
    """How often a tensor becomes a number: where it is on an accelerator, its host waits."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_a_tensor_lr_is_read_once_for_each_group() -> None:
    def reads(lr: Any) -> int:
        parameters = [nn.Parameter(torch.ones(6, 5)) for _ in range(2)]
        optimizer = AdaFisher([{"params": [p], "lr": lr} for p in parameters])
        for parameter in parameters:
            parameter.grad = torch.ones(6, 5)
        optimizer.step()
        with CountedReads() as counted:
            optimizer.step()
        return counted.count

    assert reads(torch.tensor(1e-3)) - reads(1e-3) == 2


def test_hooks() -> None:
    module = model()
    optimizer = AdaFisher(module.parameters())
    order: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: order.append("pre"))
    optimizer.register_step_post_hook(lambda *_: order.append("post"))
    train_steps(module, optimizer, 0, 1)
    optimizer.register_state_dict_pre_hook(lambda _: order.append("save"))
    optimizer.register_state_dict_post_hook(lambda _, saved: {**saved, "mine": 1})
    saved = optimizer.state_dict()
    assert saved["mine"] == 1

    def renumber(_: Any, saved: dict[str, Any]) -> dict[str, Any]:
        order.append("load")
        groups = [{**group, "lr": 0.5} for group in saved["param_groups"]]
        return {**saved, "param_groups": groups}

    def after(o: AdaFisher) -> None:
        order.append(f"loaded {len(o.state)}")  # the state is there when the user's hook runs

    optimizer.register_load_state_dict_pre_hook(renumber)
    optimizer.register_load_state_dict_post_hook(after)
    optimizer.load_state_dict(saved)
    assert order == ["pre", "post", "save", "load", f"loaded {len(saved['state'])}"]
    assert optimizer.get_lr() == 0.5
    assert same_state(optimizer.state_dict(), saved)


def test_no_gradients_is_a_no_op() -> None:
    module = model()
    before = weights(module)
    optimizer = AdaFisher(module.parameters(), weight_decay=0.5)
    optimizer.step()
    assert distance(weights(module), before) == 0 and len(optimizer.state) == 0
    assert AdaFisher([nn.Parameter(torch.empty(0, 3))]).step() is None


def test_zero_gradients_move_nothing_but_by_weight_decay() -> None:
    module = model()
    before = weights(module)
    optimizer = AdaFisher(module.parameters(), weight_decay=0.0)
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert distance(weights(module), before) == 0


def test_closure_and_tensor_lr() -> None:
    module = model()
    optimizer = AdaFisher(module.parameters(), lr=torch.tensor(1e-2))
    reference = model()
    other = AdaFisher(reference.parameters(), lr=1e-2)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(module(x), y)
        loss.backward()
        return loss

    x, y = batch(0, 0, 1)
    assert optimizer.step(closure).item() > 0
    train_steps(reference, other, 0, 1)
    assert distance(weights(module), weights(reference)) < 1e-6


@pytest.mark.parametrize(
    "schedule",
    [
        lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 10),
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=10),
        lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: step / 10),
    ],
)
def test_schedulers(schedule: Any) -> None:
    module = model()
    optimizer = AdaFisher(module.parameters(), lr=0.1)
    scheduler = schedule(optimizer)
    seen = []
    for step in range(6):
        train_steps(module, optimizer, step, step + 1)
        scheduler.step()
        seen.append(optimizer.get_lr())
    assert len(set(seen)) > 3
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.get_lr() == seen[-1]


def test_groups_keep_their_own_settings() -> None:
    a, b = nn.Parameter(torch.ones(6)), nn.Parameter(torch.ones(6))
    optimizer = AdaFisher([{"params": [a], "lr": 0.1, "weight_decay": 0.0}, {"params": [b]}], lr=0.2, weight_decay=0.5)
    optimizer.set_lr(0.3, group=1)
    a.grad, b.grad = torch.zeros(6), torch.zeros(6)
    optimizer.step()
    assert torch.equal(a.detach(), torch.ones(6)) and torch.allclose(b.detach(), torch.full((6,), 1 - 0.3 * 0.5))
    optimizer.set_lr(0.4)
    assert [optimizer.get_lr(i) for i in range(2)] == [0.4, 0.4]
    assert optimizer.num_parameters() == 2


@pytest.mark.parametrize("presses", [1, 2])
def test_ctrl_c_waits_for_the_end_of_a_step(presses: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Who saves when interrupted can; a second one does not wait."""
    from adafisher_dist.stepping import step as stepping

    compute = stepping.compute_chunk

    def pressed(*arguments: Any) -> None:
        for _ in range(presses):
            signal.raise_signal(signal.SIGINT)
        compute(*arguments)

    module = nn.Linear(6, 8)
    optimizer = AdaFisher(module.parameters())
    module(torch.ones(3, 6)).sum().backward()
    with monkeypatch.context() as patched:
        patched.setattr(stepping, "compute_chunk", pressed)
        before = signal.signal(signal.SIGINT, signal.default_int_handler)  # which may be ignored in the background
        with pytest.raises(KeyboardInterrupt):
            optimizer.step()
    assert signal.signal(signal.SIGINT, before) is signal.default_int_handler
    if presses == 1:
        assert int(optimizer.state[module.weight]["step"]) == 1
        save_checkpoint(tmp_path / "a", module, optimizer)
        optimizer.step()
    else:
        with pytest.raises(RuntimeError, match="incomplete"):
            optimizer.step()


def test_a_new_rate_after_a_load_holds_for_a_scheduler_that_is_built_then() -> None:
    old = AdaFisher(model().parameters(), lr=0.1)
    torch.optim.lr_scheduler.LambdaLR(old, lambda step: 1.0)
    optimizer = AdaFisher(model().parameters(), lr=0.3)
    optimizer.load_state_dict(old.state_dict())
    assert optimizer.param_groups[0]["initial_lr"] == 0.1  # as torch.optim has it
    optimizer.set_lr(0.2)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1))
    assert optimizer.get_lr() == 0.2
    scheduler.step()
    assert optimizer.get_lr() == 0.1
    fresh = AdaFisher(model().parameters(), lr=0.3)
    fresh.set_lr(0.2)
    assert "initial_lr" not in fresh.param_groups[0]


def test_a_rate_that_is_a_tensor_is_each_groups_own() -> None:
    a, b = nn.Parameter(torch.ones(6)), nn.Parameter(torch.ones(6))
    optimizer = AdaFisher([{"params": [a]}, {"params": [b]}], lr=0.1)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    rate = torch.tensor(0.2)
    optimizer.set_lr(rate)
    kept = [group[key] for group in optimizer.param_groups for key in ("lr", "initial_lr")]
    kept[0].fill_(9)  # as a scheduler does
    assert rate == 0.2 and [float(each) for each in kept[1:]] == pytest.approx([0.2] * 3)


def test_reset_state() -> None:
    module = model()
    start = copy.deepcopy(module.state_dict())
    optimizer = AdaFisher(module.parameters(), lr=1e-2)
    train_steps(module, optimizer, 0, 3)
    first = weights(module)
    optimizer.reset_state()
    assert (
        optimizer.num_parameters() == 0 and len(optimizer.state) == 0 and optimizer.memory_usage()["all"]["total"] == 0
    )
    module.load_state_dict(start)
    train_steps(module, optimizer, 0, 3)
    assert distance(weights(module), first) == 0


def test_presets() -> None:
    language = AdaFisher.for_language_models(model().parameters(), damping=0.2).param_groups[0]
    assert (language["lr"], language["fisher_decay"], language["block_size"]) == (6e-4, 0.97, 128)
    assert (language["weight_decay"], language["damping"]) == (0.1, 0.2)
    image = AdaFisher.for_image_classification(model().parameters(), lr=0.5).param_groups[0]
    assert (image["lr"], image["fisher_decay"], image["block_size"], image["weight_decay"]) == (0.5, 0.97, 128, 0.05)
    with pytest.raises(TypeError, match="Did you mean 'damping'"):
        AdaFisher.for_language_models(model().parameters(), dampening=1)


@pytest.mark.parametrize("packed", [False, True])
def test_memory_usage_counts_the_tensors(packed: bool) -> None:
    module = model()
    settings = {"block_size": 8, "rows_per_block": 4, "inverse_update_freq": 2, "max_blocks": 7, "packed": packed}
    optimizer = AdaFisher(module.parameters(), **settings)
    train_steps(module, optimizer, 0, 1)
    bytes_of = {"fisher": 0, "square": 0, "momentum": 0, "factor": 0, "curvature": 0}
    for entry in optimizer.state_dict()["state"].values():
        for key, value in entry.items():
            if key.partition("_")[0] in bytes_of and value.dim():
                bytes_of[key.partition("_")[0]] += value.numel() * value.element_size()
    usage = optimizer.memory_usage()["rank"]
    assert usage["fisher"] == bytes_of["fisher"] + bytes_of["square"] and bytes_of["square"]
    assert usage["momentum"] == bytes_of["momentum"]
    assert usage["factors"] == bytes_of["factor"] + bytes_of["curvature"]
    assert usage["total"] == sum(value for key, value in usage.items() if key != "total")


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"lr": -1}, ValueError, "lr should be at least 0 and at most"),
        ({"lr": float("nan")}, ValueError, "lr should be"),
        ({"lr": torch.ones(2)}, TypeError, "tensor of shape"),
        ({"momentum": 1.0}, ValueError, "momentum should be at least 0 and below 1, got 1.0"),
        ({"fisher_decay": 1.5}, ValueError, "fisher_decay should be"),
        ({"damping": -0.1}, ValueError, "damping should be"),
        ({"damping": "much"}, TypeError, "damping should be a number, got 'much'"),
        ({"eps": 0.0}, ValueError, "eps should be at least"),
        ({"block_size": 0}, ValueError, "block_size should be at least 1, got 0"),
        ({"block_size": 2.5}, TypeError, "block_size should be an integer"),
        ({"block_grid": "columns"}, ValueError, "one of 'rows', 'flat'"),
        ({"max_blocks": -1}, ValueError, "max_blocks should be at least 0"),
        ({"fisher_update_freq": 0}, ValueError, "fisher_update_freq should be at least 1"),
        ({"inverse_update_freq": True}, TypeError, "inverse_update_freq should be an integer"),
        ({"exponent": 0.7}, ValueError, "exponent should be one of 1.0, 0.5"),
        ({"grafting": "adam"}, ValueError, "grafting should be one of 'rms', 'none'"),
        ({"nesterov": 1}, TypeError, "nesterov should be True or False"),
        ({"packed": "yes"}, TypeError, "packed should be True or False, got 'yes'"),
        ({"fisher_dtype": torch.float16}, ValueError, "float16 is not offered"),
    ],
)
def test_bad_settings(settings: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        AdaFisher(model().parameters(), **settings)
    optimizer = AdaFisher([nn.Parameter(torch.ones(2))])
    with pytest.raises(error, match=words if "fisher_dtype" not in settings else "fisher_dtype"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3))], **settings})
    assert len(optimizer.param_groups) == 1


def test_bad_groups_and_parameters() -> None:
    with pytest.raises(ValueError, match="Did you mean 'weight_decay'"):
        AdaFisher([{"params": [nn.Parameter(torch.ones(2))], "weigth_decay": 0.0}])
    with pytest.raises(ValueError, match="one for the whole optimizer"):
        AdaFisher([{"params": [nn.Parameter(torch.ones(2))], "fisher_dtype": torch.bfloat16}])
    with pytest.raises(TypeError, match="complex64"):
        AdaFisher([nn.Parameter(torch.ones(2, dtype=torch.complex64))])
    with pytest.raises(ValueError, match="empty parameter list"):
        AdaFisher([])
    AdaFisher([{"params": [nn.Parameter(torch.ones(2))], "name": "mine", "lr_scale": 0.5}])  # the user's own keys


def test_sparse_gradients_are_refused() -> None:
    embedding = nn.Embedding(10, 3, sparse=True)
    optimizer = AdaFisher(embedding.named_parameters())
    embedding(torch.tensor([1, 2])).sum().backward()
    before = embedding.weight.detach().clone()
    with pytest.raises(RuntimeError, match=r"parameter weight has a sparse gradient.*sparse=False"):
        optimizer.step()
    assert torch.equal(embedding.weight, before)


@pytest.mark.parametrize(("name", "value"), [("block_size", 16), ("grafting", "none"), ("exponent", 1.0)])
def test_structural_settings_may_not_change_under_a_state(name: str, value: object) -> None:
    module = model()
    optimizer = AdaFisher(module.parameters())
    train_steps(module, optimizer, 0, 1)
    before = weights(module)
    optimizer.param_groups[0][name] = value
    with pytest.raises(ValueError, match=f"{name} changed after the first step"):
        train_steps(module, optimizer, 1, 2)
    assert distance(weights(module), before) == 0
    optimizer.reset_state()
    train_steps(module, optimizer, 1, 2)


def test_a_state_that_does_not_fit_changes_nothing() -> None:
    module = model()
    optimizer = AdaFisher(module.parameters(), lr=1e-2)
    train_steps(module, optimizer, 0, 2)
    good = copy.deepcopy(optimizer.state_dict())
    other = AdaFisher([nn.Parameter(p.detach()[:1].clone()) for p in module.parameters()])
    with pytest.raises(ValueError, match="does not fit"):
        other.load_state_dict(good)
    adam = torch.optim.AdamW(module.parameters())
    adam.step()
    broken = copy.deepcopy(good)
    del broken["state"][3]["fisher_diagonal"]
    for bad, words in ((adam.state_dict(), "does not fit"), (broken, "missing .'fisher_diagonal'.")):
        with pytest.raises(ValueError, match=words):
            optimizer.load_state_dict(bad)
        assert same_state(optimizer.state_dict(), good)
    optimizer.load_state_dict({**good, "state": {}})  # as in torch.optim: no state, so a fresh start
    assert optimizer.num_parameters() == 0


def test_repr_and_add_param_group() -> None:
    module = model()
    optimizer = AdaFisher(module.mix.parameters(), lr=1e-2)
    assert "block_size: 128" in repr(optimizer)
    train_steps(module, optimizer, 0, 2)
    optimizer.add_param_group({"params": list(module.out.parameters()), "damping": 0.5})
    train_steps(module, optimizer, 2, 4)
    saved = optimizer.state_dict()
    assert [int(entry["step"]) for entry in saved["state"].values()] == [4, 2, 2]
    optimizer.load_state_dict(copy.deepcopy(saved))
    assert same_state(optimizer.state_dict(), saved)


def test_a_compiled_step_breaks_the_graph_at_one_place() -> None:
    """While it was traced it broke at ten, and parts of it were compiled."""

    def trained(compiled: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3))
        optimizer = AdaFisher(module.parameters(), lr=1e-2)

        def step(x: torch.Tensor) -> None:
            module(x).square().mean().backward()
            optimizer.step()

        run = torch.compile(step, backend="eager") if compiled else step
        for number in range(3):
            optimizer.zero_grad()
            run(torch.randn(4, 6, generator=torch.Generator().manual_seed(number)))
        return [parameter.detach() for parameter in module.parameters()]

    expected = trained(False)
    counters = torch._dynamo.utils.counters["graph_break"]
    counters.clear()
    assert all(map(torch.equal, trained(True), expected))
    (reason,) = (reason for reason in counters if "Tensor.backward" not in reason)
    assert "AdaFisher.step" in reason
