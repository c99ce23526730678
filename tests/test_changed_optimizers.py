"""What users and libraries do to an optimizer from outside, and to its param groups."""

from __future__ import annotations

import collections
import copy
import json
import pickle
from typing import Any

import pytest
import torch
from models import batch, distance, model, same_state, train_steps, weights
from torch import nn

from adafisher_dist import AdaFisher, UnsupportedLayoutError, load_checkpoint, save_checkpoint

# ---- what users and libraries do to an optimizer from outside ----


def test_replaced_state_is_taken_over() -> None:
    # Lightning moves a state to a device this way.
    module, twin = model(), model()
    optimizer, reference = (AdaFisher(m.parameters(), lr=1e-2, block_size=8) for m in (module, twin))
    for m, o in ((module, optimizer), (twin, reference)):
        train_steps(m, o, 0, 3)
    for parameter, entry in list(optimizer.state.items()):
        optimizer.state[parameter] = {key: value.clone() for key, value in entry.items()}
    for m, o in ((module, optimizer), (twin, reference)):
        train_steps(m, o, 3, 6)
    assert same_state(optimizer.state_dict(), reference.state_dict())
    assert distance(weights(module), weights(twin)) == 0
    optimizer.state[module.mix.weight]["momentum_8x5"].zero_()  # in place
    number = [id(p) for p in module.parameters()].index(id(module.mix.weight))
    assert not optimizer.state_dict()["state"][number]["momentum_8x5"].any()


@pytest.mark.parametrize("how", ["clear", "new dict", "one entry"])
def test_removed_state_starts_anew(how: str) -> None:
    module = model()
    optimizer = AdaFisher(module.parameters(), lr=1e-2)
    train_steps(module, optimizer, 0, 3)
    if how == "clear":
        optimizer.state.clear()
    elif how == "new dict":
        optimizer.state = collections.defaultdict(dict)
    else:
        del optimizer.state[module.mix.weight]
    train_steps(module, optimizer, 3, 4)
    counts = {name: int(optimizer.state[p]["step"]) for name, p in module.named_parameters() if p.requires_grad}
    assert counts["mix.weight"] == 1
    assert counts["inner.weight"] == (4 if how == "one entry" else 1)


class Lookahead:
    """As timm has it: slow weights in the state of the optimizer that it is around."""

    def __init__(self, optimizer: AdaFisher) -> None:
        self.optimizer, self.steps = optimizer, 0

    def step(self) -> None:
        self.optimizer.step()
        self.steps += 1
        for p in [p for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]:
            state = self.optimizer.state[p]
            slow = state.setdefault("lookahead_slow_buff", p.detach().clone())
            if self.steps % 3 == 0:
                slow.lerp_(p.detach(), 0.5)
                p.data.copy_(slow)


def test_entries_of_others_in_the_state_stay(tmp_path: Any, caplog: pytest.LogCaptureFixture) -> None:
    module, twin = model(), model()
    optimizer = AdaFisher(module.named_parameters(), lr=1e-2)
    optimizer.state[module.scale]["mine"] = ["before the first step"]
    around = Lookahead(optimizer)

    def steps(around: Lookahead, module: nn.Module, first: int, last: int) -> None:
        for step in range(first, last):
            x, y = batch(step, 0, 1)
            around.optimizer.zero_grad()
            nn.functional.mse_loss(module(x), y).backward()
            around.step()

    steps(around, module, 0, 4)
    assert optimizer.state[module.scale]["mine"] == ["before the first step"]
    assert sum("mine" in entry for entry in copy.deepcopy(optimizer).state.values()) == 1
    other = AdaFisher(twin.named_parameters(), lr=1e-2)
    again = Lookahead(other)
    again.steps = around.steps
    twin.load_state_dict(module.state_dict())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert set(other.state[twin.scale]) >= {"mine", "lookahead_slow_buff", "step"}
    steps(around, module, 4, 8)
    steps(again, twin, 4, 8)
    assert distance(weights(module), weights(twin)) == 0
    save_checkpoint(tmp_path / "a", module, optimizer)
    assert "'lookahead_slow_buff', 'mine' in optimizer.state is not AdaFisher's" in caplog.text
    load_checkpoint(tmp_path / "a", twin, other)
    assert "mine" not in other.state[twin.scale] and int(other.state[twin.scale]["step"]) == 8


def test_a_replaced_state_that_does_not_fit_is_an_error() -> None:
    module = model()
    optimizer = AdaFisher(module.parameters())
    train_steps(module, optimizer, 0, 1)
    optimizer.state[module.mix.weight] = {"step": torch.tensor(1), "exp_avg": torch.zeros(3)}
    before = weights(module)
    with pytest.raises(ValueError, match="does not fit"):
        train_steps(module, optimizer, 1, 2)
    assert distance(weights(module), before) == 0


@pytest.mark.parametrize(("step", "updates"), [(-2, -2), (2, 3), (3.7, 3.0), (float("nan"), 1.0), (2, -1)])
def test_counts_that_cannot_be_are_refused(step: float, updates: float) -> None:
    module = model()
    optimizer = AdaFisher(module.parameters(), lr=1e-2)
    train_steps(module, optimizer, 0, 2)
    saved = copy.deepcopy(optimizer.state_dict())
    next(iter(saved["state"].values())).update(step=torch.tensor(step), fisher_updates=torch.tensor(updates))
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match="step and fisher_updates should be whole numbers"):
        optimizer.load_state_dict(saved)
    assert same_state(optimizer.state_dict(), before)


def test_a_parameter_whose_elements_share_memory_is_refused() -> None:
    parameter, other = nn.Parameter(torch.ones(6, 1).expand(6, 6)), nn.Parameter(torch.ones(4))
    optimizer = AdaFisher([("wide", parameter), ("other", other)])
    parameter.grad, other.grad = torch.ones(6, 6), torch.ones(4)
    with pytest.raises(RuntimeError, match=r"wide has elements that share memory.* Clone it"):
        optimizer.step()
    parameter.grad = None
    optimizer.step()
    assert not torch.equal(other.detach(), torch.ones(4))


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
    train_steps(module, optimizer, 0, 1)
    before, good = weights(module), optimizer.param_groups[0][name]
    optimizer.param_groups[0][name] = value
    with pytest.raises((TypeError, ValueError), match=name):
        train_steps(module, optimizer, 1, 2)
    assert distance(weights(module), before) == 0
    optimizer.param_groups[0][name] = good
    train_steps(module, optimizer, 1, 2)
    assert int(optimizer.state[module.mix.weight]["step"]) == 2


def test_loading_what_is_older_newer_or_not_ours() -> None:
    module = model()
    optimizer = AdaFisher(module.parameters(), nesterov=False)
    train_steps(module, optimizer, 0, 1)
    saved = copy.deepcopy(optimizer.state_dict())
    older = copy.deepcopy(saved)
    del older["param_groups"][0]["nesterov"]
    other = AdaFisher(module.parameters(), nesterov=False)
    other.load_state_dict(older)
    assert other.param_groups[0]["nesterov"] is False
    train_steps(module, other, 1, 2)
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
            train_steps(twin, reference, step, step + 1)
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
        train_steps(m, o, 0, 4)
    for name in ("mix.weight", "scale", "inner.weight"):  # one after the other, the last twice
        replace_parameter(module, optimizer, name, CARRY[how])
    replace_parameter(module, optimizer, "inner.weight", CARRY[how])
    assert same_state(optimizer.state_dict(), reference.state_dict())
    for m, o in ((module, optimizer), (twin, reference)):
        train_steps(m, o, 4, 8)
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
    train_steps(module, optimizer, 0, 3)
    new = replace_parameter(module, optimizer, "mix.weight", None)
    train_steps(module, optimizer, 3, 5)
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
    train_steps(module, optimizer, 0, 3)
    names = [name for name, _ in module.named_parameters()]
    gone = names.index("mix.weight")
    removed = optimizer.param_groups.pop(gone)["params"][0]
    train_steps(module, optimizer, 3, 5)
    assert int(optimizer.state[removed]["step"]) == 3 and "keeps the state of 1 parameter(s)" in caplog.text
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
    train_steps(module, optimizer, 5, 7)
    assert int(optimizer.state[removed]["step"]) == 2 and int(optimizer.state[module.scale]["step"]) == 7


def test_entries_that_are_all_of_others_are_told_of() -> None:
    module = model()
    optimizer = AdaFisher(module.parameters(), lr=1e-2)
    train_steps(module, optimizer, 0, 2)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"] = {n: {f"exp_{key}": value for key, value in e.items()} for n, e in saved["state"].items()}
    with pytest.raises(ValueError, match="does not fit: missing"):
        optimizer.load_state_dict(saved)
    optimizer.state[module.scale] = {"exp_avg": torch.zeros(1)}
    with pytest.raises(ValueError, match="does not fit: missing"):
        train_steps(module, optimizer, 2, 3)


def test_parameters_put_into_a_group_by_hand() -> None:
    # Lightning's BackboneFinetuning puts whole groups there before it loads.
    module = model()
    optimizer = AdaFisher(module.out.parameters(), lr=1e-2)
    groups = [{**optimizer.param_groups[0]}, {**optimizer.param_groups[0], "params": list(module.mix.parameters())}]
    optimizer.param_groups = groups
    train_steps(module, optimizer, 0, 2)
    assert {int(entry["step"]) for entry in optimizer.state.values()} == {2} and len(optimizer.state) == 3
    groups[0]["params"].append(module.scale)
    train_steps(module, optimizer, 2, 3)
    assert int(optimizer.state[module.scale]["step"]) == 1
    with pytest.raises(TypeError, match=r"real floating-point parameters; 0\.3 is torch\.complex64"):
        groups[0]["params"].append(nn.Parameter(torch.ones(2, dtype=torch.complex64)))
        train_steps(module, optimizer, 3, 4)


def test_param_groups_hold_what_json_can() -> None:
    module = model()
    for dtype in (torch.bfloat16, "bfloat16", "bf16", "torch.bfloat16"):
        optimizer = AdaFisher(module.named_parameters(), fisher_dtype=dtype)
        assert optimizer.param_groups[0]["fisher_dtype"] == optimizer.defaults["fisher_dtype"] == "bfloat16"
    train_steps(module, optimizer, 0, 2)
    saved = optimizer.state_dict()
    assert json.loads(json.dumps(saved["param_groups"])) == saved["param_groups"]
    optimizer.param_groups[0]["fisher_dtype"] = torch.bfloat16  # the same, in the user's own way
    train_steps(module, optimizer, 2, 3)
    older = copy.deepcopy(saved)
    older["param_groups"][0]["fisher_dtype"] = torch.bfloat16  # as versions before had it
    other = AdaFisher(module.named_parameters())
    other.load_state_dict(older)
    assert same_state(other.state_dict(), saved) and other.param_groups[0]["fisher_dtype"] == "bfloat16"


@pytest.mark.parametrize("key", ["step", "momentum_10x5"])
def test_a_state_that_holds_no_tensors_is_refused(key: str) -> None:
    module = model()
    optimizer = AdaFisher(module.parameters(), block_size=16)
    train_steps(module, optimizer, 0, 2)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][4][key] = {}  # as torch's flat state dicts have what they do not know
    with pytest.raises(ValueError, match=rf"does not fit: {key}"):
        optimizer.load_state_dict(saved)
    assert int(optimizer.state[module.mix.weight]["step"]) == 2
