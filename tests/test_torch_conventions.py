"""What torch's own test suite asks of an optimizer, in one process."""

from __future__ import annotations

import collections
import copy
import inspect
import io
import json
import pickle
from typing import Any

import pytest
import torch
from models import batch, distance, model, weights
from torch import nn

from adafisher_dist import AdaFisher, UnsupportedLayoutError, load_checkpoint, save_checkpoint
from adafisher_dist.settings import DEFAULTS

SETTINGS: list[dict[str, Any]] = [
    {},
    {"block_size": 8, "rows_per_block": 4, "inverse_update_freq": 3, "max_blocks": 5},
    {"block_size": 8, "rows_per_block": 4, "inverse_update_freq": 3, "max_blocks": 5, "packed": True, "exponent": 1.0},
    {"fisher_dtype": torch.bfloat16, "exponent": 0.5, "grafting": "none"},
    {"fisher_dtype": torch.float64, "block_grid": "flat", "fisher_update_freq": 2},
]


def steps(module: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    for step in range(first, last):
        x, y = batch(step, 0, 1, dtype=module.inner.weight.dtype)
        optimizer.zero_grad()
        nn.functional.mse_loss(module(x), y).backward()
        optimizer.step()


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


def same_state(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a["state"].keys() == b["state"].keys() and all(
        torch.equal(value, b["state"][i][key]) and value.dtype == b["state"][i][key].dtype
        for i, entry in a["state"].items()
        for key, value in entry.items()
    )


def test_signature_is_the_documented_one() -> None:
    expected = {**DEFAULTS, "process_group": None}
    assert list(expected.values()) == [
        *(1e-3, 0.9, True, 0.97, 0.01, 1e-8, 128, 64, "rows", 0.01, True, None, 1, 1, 0.5, "rms", torch.float32),
        *(False, None, None),
    ]
    parameters = list(inspect.signature(AdaFisher).parameters.values())
    assert parameters[0].name == "params"
    assert {p.name: p.default for p in parameters[1:]} == expected


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_dict_restores_bit_for_bit(settings: dict[str, Any], dtype: torch.dtype) -> None:
    module = model(dtype)
    optimizer = AdaFisher(module.named_parameters(), lr=1e-2, **settings)
    steps(module, optimizer, 0, 5)
    file = io.BytesIO()
    torch.save({"optimizer": optimizer.state_dict(), "model": module.state_dict()}, file)
    steps(module, optimizer, 5, 9)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again = model(dtype)
    again.load_state_dict(saved["model"])
    resumed = AdaFisher(again.named_parameters(), lr=5.0, block_size=3)  # the saved settings win, as in torch.optim
    resumed.load_state_dict(saved["optimizer"])
    assert same_state(resumed.state_dict(), saved["optimizer"])
    steps(again, resumed, 5, 9)
    assert distance(weights(again), weights(module)) == 0
    assert same_state(resumed.state_dict(), optimizer.state_dict())


def test_loading_copies() -> None:
    module = model()
    optimizer = AdaFisher(module.parameters())
    steps(module, optimizer, 0, 2)
    saved = copy.deepcopy(optimizer.state_dict())
    other = AdaFisher(module.parameters())
    other.load_state_dict(saved)
    (key,) = (key for key in saved["state"][2] if key.startswith("momentum"))
    saved["state"][2][key].fill_(7)
    assert not (other.state_dict()["state"][2][key] == 7).any()
    steps(module, other, 2, 3)
    assert saved["state"][2]["step"] == 2


def test_state_shows_in_the_state_attribute() -> None:
    module = model()
    optimizer = AdaFisher(module.parameters(), block_size=16)
    assert len(optimizer.state) == 0 and optimizer.state_dict()["state"] == {}
    steps(module, optimizer, 0, 3)
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
    steps(module, optimizer, 0, taken)
    module2, optimizer2 = how((module, optimizer))
    steps(module, optimizer, taken, taken + 4)
    steps(module2, optimizer2, taken, taken + 4)
    assert distance(weights(module2), weights(module)) == 0
    assert same_state(optimizer2.state_dict(), optimizer.state_dict())
    public = lambda o: {k for k in dir(o) if not k.startswith("_") and not callable(getattr(o, k))}  # noqa: E731
    assert public(optimizer2) == public(optimizer)


def test_hooks() -> None:
    module = model()
    optimizer = AdaFisher(module.parameters())
    order: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: order.append("pre"))
    optimizer.register_step_post_hook(lambda *_: order.append("post"))
    steps(module, optimizer, 0, 1)
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
    steps(reference, other, 0, 1)
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
        steps(module, optimizer, step, step + 1)
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


def test_reset_state() -> None:
    module = model()
    start = copy.deepcopy(module.state_dict())
    optimizer = AdaFisher(module.parameters(), lr=1e-2)
    steps(module, optimizer, 0, 3)
    first = weights(module)
    optimizer.reset_state()
    assert (
        optimizer.num_parameters() == 0 and len(optimizer.state) == 0 and optimizer.memory_usage()["all"]["total"] == 0
    )
    module.load_state_dict(start)
    steps(module, optimizer, 0, 3)
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
    steps(module, optimizer, 0, 1)
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
        ({"lr": -1}, ValueError, "lr should be at least 0 and finite, got -1"),
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
    steps(module, optimizer, 0, 1)
    before = weights(module)
    optimizer.param_groups[0][name] = value
    with pytest.raises(RuntimeError, match=f"{name} changed after the first step"):
        steps(module, optimizer, 1, 2)
    assert distance(weights(module), before) == 0
    optimizer.reset_state()
    steps(module, optimizer, 1, 2)


def test_a_state_that_does_not_fit_changes_nothing() -> None:
    module = model()
    optimizer = AdaFisher(module.parameters(), lr=1e-2)
    steps(module, optimizer, 0, 2)
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
    steps(module, optimizer, 0, 2)
    optimizer.add_param_group({"params": list(module.out.parameters()), "damping": 0.5})
    steps(module, optimizer, 2, 4)
    saved = optimizer.state_dict()
    assert [int(entry["step"]) for entry in saved["state"].values()] == [4, 2, 2]
    optimizer.load_state_dict(copy.deepcopy(saved))
    assert same_state(optimizer.state_dict(), saved)


# ---- what users and libraries do to an optimizer from outside ----


def test_replaced_state_is_taken_over() -> None:
    # Lightning moves a state to a device this way.
    module, twin = model(), model()
    optimizer, reference = (AdaFisher(m.parameters(), lr=1e-2, block_size=8) for m in (module, twin))
    for m, o in ((module, optimizer), (twin, reference)):
        steps(m, o, 0, 3)
    for parameter, entry in list(optimizer.state.items()):
        optimizer.state[parameter] = {key: value.clone() for key, value in entry.items()}
    for m, o in ((module, optimizer), (twin, reference)):
        steps(m, o, 3, 6)
    assert same_state(optimizer.state_dict(), reference.state_dict())
    assert distance(weights(module), weights(twin)) == 0
    optimizer.state[module.mix.weight]["momentum_8x5"].zero_()  # in place
    number = [id(p) for p in module.parameters()].index(id(module.mix.weight))
    assert not optimizer.state_dict()["state"][number]["momentum_8x5"].any()


@pytest.mark.parametrize("how", ["clear", "new dict", "one entry"])
def test_removed_state_starts_anew(how: str) -> None:
    module = model()
    optimizer = AdaFisher(module.parameters(), lr=1e-2)
    steps(module, optimizer, 0, 3)
    if how == "clear":
        optimizer.state.clear()
    elif how == "new dict":
        optimizer.state = collections.defaultdict(dict)
    else:
        del optimizer.state[module.mix.weight]
    steps(module, optimizer, 3, 4)
    counts = {name: int(optimizer.state[p]["step"]) for name, p in module.named_parameters() if p.requires_grad}
    assert counts["mix.weight"] == 1
    assert counts["inner.weight"] == (4 if how == "one entry" else 1)


def test_a_replaced_state_that_does_not_fit_is_an_error() -> None:
    module = model()
    optimizer = AdaFisher(module.parameters())
    steps(module, optimizer, 0, 1)
    optimizer.state[module.mix.weight] = {"step": torch.tensor(1), "exp_avg": torch.zeros(3)}
    before = weights(module)
    with pytest.raises(ValueError, match="does not fit"):
        steps(module, optimizer, 1, 2)
    assert distance(weights(module), before) == 0


def test_a_parameter_of_another_shape_is_an_error() -> None:
    parameter = nn.Parameter(torch.ones(4))
    optimizer = AdaFisher([("weight", parameter)], lr=0.1)
    parameter.grad = torch.ones(4)
    optimizer.step()
    parameter.grad = None
    parameter.data = torch.ones(8)
    parameter.grad = torch.ones(8)
    with pytest.raises(RuntimeError, match=r"weight was \(4,\), .* on cpu .* and is \(8,\), .* on cpu now"):
        optimizer.step()
    assert torch.equal(parameter.detach(), torch.ones(8))


@pytest.mark.parametrize(
    ("name", "value"), [("momentum", 1.0), ("fisher_decay", 1.0), ("lr", "x"), ("lr", float("nan"))]
)
def test_bad_settings_between_steps_change_nothing(name: str, value: object) -> None:
    module = model()
    optimizer = AdaFisher(module.parameters())
    steps(module, optimizer, 0, 1)
    before, good = weights(module), optimizer.param_groups[0][name]
    optimizer.param_groups[0][name] = value
    with pytest.raises((TypeError, ValueError), match=name):
        steps(module, optimizer, 1, 2)
    assert distance(weights(module), before) == 0
    optimizer.param_groups[0][name] = good
    steps(module, optimizer, 1, 2)
    assert int(optimizer.state[module.mix.weight]["step"]) == 2


def test_loading_what_is_older_newer_or_not_ours() -> None:
    module = model()
    optimizer = AdaFisher(module.parameters(), nesterov=False)
    steps(module, optimizer, 0, 1)
    saved = copy.deepcopy(optimizer.state_dict())
    older = copy.deepcopy(saved)
    del older["param_groups"][0]["nesterov"]
    other = AdaFisher(module.parameters(), nesterov=False)
    other.load_state_dict(older)
    assert other.param_groups[0]["nesterov"] is False
    steps(module, other, 1, 2)
    newer = {**saved, "adafisher_dist": {"format": 99, "part": "whole"}}
    with pytest.raises(ValueError, match="format 99"):
        other.load_state_dict(newer)
    with pytest.raises(ValueError, match="another optimizer"):
        other.load_state_dict(torch.optim.AdamW(module.parameters()).state_dict())
    bad_lr = {**saved, "state": {}, "param_groups": [{**saved["param_groups"][0], "lr": -1.0}]}
    with pytest.raises(ValueError, match="lr should be"):
        other.load_state_dict(bad_lr)
    split = AdaFisher([{"params": [p]} for p in module.parameters()])
    with pytest.raises(ValueError, match="different number of parameter groups"):
        split.load_state_dict(saved)


def test_a_float64_state_takes_the_optimizer_with_it() -> None:
    parameter = nn.Parameter(torch.ones(4))
    saving, loading = (AdaFisher([parameter], fisher_dtype=dtype) for dtype in (torch.float64, torch.float32))
    parameter.grad = torch.ones(4)
    saving.step()
    loading.load_state_dict(saving.state_dict())
    loading.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    assert loading.param_groups[1]["fisher_dtype"] == "float64"


def test_pickles_do_not_carry_the_whole_batch_for_each_parameter() -> None:
    sizes = []
    for count in (2, 16):
        parameters = [nn.Parameter(torch.ones(64, 64)) for _ in range(count)]
        optimizer = AdaFisher(parameters)
        for parameter in parameters:
            parameter.grad = torch.ones(64, 64)
        optimizer.step()
        sizes.append(len(pickle.dumps(optimizer)))
    assert sizes[1] < 9 * sizes[0]


def test_swap_tensors_works() -> None:
    module = nn.Linear(2, 2)
    optimizer = AdaFisher(module.parameters())
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        module.double()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    module(torch.ones(1, 2, dtype=torch.float64)).sum().backward()
    optimizer.step()
    assert optimizer.num_parameters() == 2


def test_settings_of_other_optimizers_are_refused() -> None:
    for key, value in (("maximize", True), ("differentiable", True)):
        with pytest.raises(ValueError, match=f"no setting '{key}'"):
            AdaFisher([{"params": [nn.Parameter(torch.ones(2))], key: value}])
    optimizer = AdaFisher([nn.Parameter(torch.ones(2))])
    with pytest.raises(IndexError):
        optimizer.set_lr(0.5, group=3)
    with pytest.raises(ValueError, match="ranks 0 to 0"):
        optimizer.consolidate_state_dict(to=9)


def test_grad_scaler() -> None:
    module, twin = model(), model()
    optimizer, reference = (AdaFisher(m.parameters(), lr=1e-2) for m in (module, twin))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for step in range(4):
        x, y = batch(step, 0, 1)
        optimizer.zero_grad()
        scaler.scale(nn.functional.mse_loss(module(x), y) * (float("inf") if step == 1 else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
        if step != 1:
            steps(twin, reference, step, step + 1)
    assert distance(weights(module), weights(twin)) < 1e-5
    assert int(optimizer.state[module.mix.weight]["step"]) == 3


@pytest.mark.parametrize(
    "stands_in",
    [lambda p: p.detach().clone(), lambda p: nn.Parameter(p.detach().view(-1)), lambda p: nn.Parameter(p.detach()[:1])],
    ids=["no parameter", "flat", "a part"],
)
def test_shards_and_copies_that_a_library_puts_in_place_are_refused(stands_in: Any) -> None:
    module = nn.Linear(3, 2, bias=False)
    optimizer = AdaFisher(module.parameters())
    other = stands_in(module.weight)
    other.grad = torch.ones_like(other)
    optimizer.param_groups[0]["params"] = [other]
    with pytest.raises(UnsupportedLayoutError, match="were replaced by others"):
        optimizer.step()
    same = nn.Parameter(module.weight.detach().clone())  # as Accelerate does
    same.grad = torch.ones_like(same)
    optimizer.param_groups[0]["params"] = [same]
    optimizer.step()
    assert not torch.equal(same, module.weight)


# ---- parameters that take the places of others ----


def replace_parameter(module: nn.Module, optimizer: AdaFisher, name: str, carry: Any) -> nn.Parameter:
    """As Gaussian splatting does: replace a parameter, with what `carry` makes of its state."""
    old = module.get_parameter(name)
    new = nn.Parameter(old.detach().clone())
    state = optimizer.state.pop(old)
    if carry is not None:
        optimizer.state[new] = carry(state)
    owner, _, own = name.rpartition(".")
    setattr(module.get_submodule(owner), own, new)
    for group in optimizer.param_groups:
        group["params"] = [new if p is old else p for p in group["params"]]
    return new


CARRY: dict[str, Any] = {
    "the same tensors": lambda state: state,
    "the same in a new dict": dict,
    "clones": lambda state: {key: value.clone() for key, value in state.items()},
    "views": lambda state: {key: value.detach() for key, value in state.items()},
}


@pytest.mark.parametrize("how", CARRY)
def test_a_parameter_that_takes_the_place_of_another_keeps_its_state(how: str) -> None:
    module, twin = model(), model()
    optimizer, reference = (AdaFisher(m.named_parameters(), lr=1e-2, inverse_update_freq=3) for m in (module, twin))
    for m, o in ((module, optimizer), (twin, reference)):
        steps(m, o, 0, 4)
    for name in ("mix.weight", "scale", "inner.weight"):  # one after the other, the last twice
        replace_parameter(module, optimizer, name, CARRY[how])
    replace_parameter(module, optimizer, "inner.weight", CARRY[how])
    assert same_state(optimizer.state_dict(), reference.state_dict())
    for m, o in ((module, optimizer), (twin, reference)):
        steps(m, o, 4, 8)
    assert distance(weights(module), weights(twin)) == 0
    assert same_state(optimizer.state_dict(), reference.state_dict())
    assert optimizer.fisher_stats() == reference.fisher_stats()
    assert set(optimizer.state) == {p for p in module.parameters() if p.requires_grad}


def test_states_that_change_places_are_not_mixed_up() -> None:
    a, b = nn.Parameter(torch.ones(4, 6)), nn.Parameter(torch.ones(4, 6))
    optimizer = AdaFisher([a, b], lr=0.0)
    for step in (1.0, 2.0):
        a.grad, b.grad = torch.full((4, 6), step), torch.full((4, 6), -step)
        optimizer.step()
    before = copy.deepcopy({"a": optimizer.state[a], "b": optimizer.state[b]})
    assert not torch.equal(before["a"]["momentum_6x4"], before["b"]["momentum_6x4"])
    optimizer.state[a], optimizer.state[b] = optimizer.state[b], optimizer.state[a]
    saved = optimizer.state_dict()["state"]
    for now, then in ((saved[0], before["b"]), (saved[1], before["a"])):
        assert all(torch.equal(now[key], then[key]) for key in then)


def test_a_parameter_without_the_state_starts_anew() -> None:
    module = model()
    optimizer = AdaFisher(module.parameters(), lr=1e-2)
    steps(module, optimizer, 0, 3)
    new = replace_parameter(module, optimizer, "mix.weight", None)
    steps(module, optimizer, 3, 5)
    assert int(optimizer.state[new]["step"]) == 2 and int(optimizer.state[module.scale]["step"]) == 5


def test_rows_that_share_blocks_cannot_be_cut_or_appended() -> None:
    old = nn.Parameter(torch.ones(10, 3))
    optimizer = AdaFisher([("xyz", old)], lr=1e-2)
    old.grad = torch.ones(10, 3)
    optimizer.step()
    new = nn.Parameter(torch.ones(14, 3))
    optimizer.state[new] = optimizer.state.pop(old)
    optimizer.param_groups[0]["params"] = [new]
    new.grad = torch.ones(14, 3)
    with pytest.raises(ValueError, match=r"state of xyz does not fit.*`del optimizer\.state\[parameter\]`"):
        optimizer.step()
    assert torch.equal(new.detach(), torch.ones(14, 3))
    del optimizer.state[new]
    optimizer.step()
    assert int(optimizer.state[new]["step"]) == 1 and len(optimizer.state) == 1


def test_rows_of_their_own_blocks_can_be_cut_and_appended() -> None:
    old, new = nn.Parameter(torch.randn(10, 3)), nn.Parameter(torch.randn(12, 3))
    keep = torch.tensor([1, 2, 5, 7, 9, 0, 1, 1, 3, 4, 4, 8])
    optimizer = AdaFisher([old], lr=1e-2, momentum=0.85, rows_per_block=1, block_size=3)
    for step in range(3):
        old.grad = torch.randn(10, 3, generator=torch.Generator().manual_seed(step))
        optimizer.step()
    state = optimizer.state.pop(old)
    kept = {key: value[keep].clone() if value.dim() else value.clone() for key, value in state.items()}
    optimizer.state[new] = dict(kept)
    optimizer.param_groups[0]["params"] = [new]
    saved = optimizer.state_dict()["state"][0]
    assert all(torch.equal(saved[key], kept[key]) for key in kept)
    new.grad = torch.ones(12, 3)
    optimizer.step()
    assert int(optimizer.state[new]["step"]) == 4
    assert torch.allclose(optimizer.state[new]["momentum_3"], kept["momentum_3"].lerp(torch.ones(12, 1, 3), 0.15))


def test_groups_shrink_and_grow(caplog: pytest.LogCaptureFixture, tmp_path: Any) -> None:
    module, twin = model(), model()
    optimizer = AdaFisher([{"params": [p]} for p in module.parameters()], lr=1e-2)
    steps(module, optimizer, 0, 3)
    names = [name for name, _ in module.named_parameters()]
    gone = names.index("mix.weight")
    removed = optimizer.param_groups.pop(gone)["params"][0]
    steps(module, optimizer, 3, 5)
    assert removed not in optimizer.state and "forgets the state of 1 parameter(s)" in caplog.text
    saved = optimizer.state_dict()
    assert len(saved["param_groups"]) == len(names) - 1
    assert optimizer.num_parameters() == len(saved["state"]) == len(names) - 2  # and a frozen one
    assert len(optimizer.fisher_stats()) == len(names) - 2
    again = AdaFisher([{"params": [p]} for n, p in twin.named_parameters() if n != "mix.weight"], lr=1e-2)
    again.load_state_dict(copy.deepcopy(saved))
    assert same_state(again.state_dict(), saved)
    before = copy.deepcopy(optimizer.state_dict()["state"])
    save_checkpoint(tmp_path / "ckpt", module, optimizer)  # under the right names, though positions have moved
    load_checkpoint(tmp_path / "ckpt", module, optimizer)
    for number, entry in optimizer.state_dict()["state"].items():
        assert entry.keys() == before[number].keys()
        for key, value in entry.items():
            both = value, before[number][key]
            assert torch.equal(*(v.tril() if key.startswith("fisher") and v.dim() == 3 else v for v in both))
    optimizer.add_param_group({"params": [removed]})
    steps(module, optimizer, 5, 7)
    assert int(optimizer.state[removed]["step"]) == 2 and int(optimizer.state[module.scale]["step"]) == 7


def test_parameters_put_into_a_group_by_hand() -> None:
    # Lightning's BackboneFinetuning puts whole groups there before it loads.
    module = model()
    optimizer = AdaFisher(module.out.parameters(), lr=1e-2)
    groups = [{**optimizer.param_groups[0]}, {**optimizer.param_groups[0], "params": list(module.mix.parameters())}]
    optimizer.param_groups = groups
    steps(module, optimizer, 0, 2)
    assert {int(entry["step"]) for entry in optimizer.state.values()} == {2} and len(optimizer.state) == 3
    groups[0]["params"].append(module.scale)
    steps(module, optimizer, 2, 3)
    assert int(optimizer.state[module.scale]["step"]) == 1
    with pytest.raises(TypeError, match=r"real floating-point parameters; 0\.3 is torch\.complex64"):
        groups[0]["params"].append(nn.Parameter(torch.ones(2, dtype=torch.complex64)))
        steps(module, optimizer, 3, 4)


def test_param_groups_hold_what_json_can() -> None:
    module = model()
    for dtype in (torch.bfloat16, "bfloat16", "bf16", "torch.bfloat16"):
        optimizer = AdaFisher(module.named_parameters(), fisher_dtype=dtype)
        assert optimizer.param_groups[0]["fisher_dtype"] == optimizer.defaults["fisher_dtype"] == "bfloat16"
    steps(module, optimizer, 0, 2)
    saved = optimizer.state_dict()
    assert json.loads(json.dumps(saved["param_groups"])) == saved["param_groups"]
    optimizer.param_groups[0]["fisher_dtype"] = torch.bfloat16  # the same, in the user's own way
    steps(module, optimizer, 2, 3)
    older = copy.deepcopy(saved)
    older["param_groups"][0]["fisher_dtype"] = torch.bfloat16  # as versions before had it
    other = AdaFisher(module.named_parameters())
    other.load_state_dict(older)
    assert same_state(other.state_dict(), saved) and other.param_groups[0]["fisher_dtype"] == "bfloat16"


@pytest.mark.parametrize("key", ["step", "momentum_10x5"])
def test_a_state_that_holds_no_tensors_is_refused(key: str) -> None:
    module = model()
    optimizer = AdaFisher(module.parameters(), block_size=16)
    steps(module, optimizer, 0, 2)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][4][key] = {}  # as torch's flat state dicts have what they do not know
    with pytest.raises(ValueError, match=rf"does not fit: {key}"):
        optimizer.load_state_dict(saved)
    assert int(optimizer.state[module.mix.weight]["step"]) == 2
