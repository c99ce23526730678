"""From AdamW by changing one word: Adam's keys in code, in param groups and in a JSON config."""

from __future__ import annotations

import copy
import inspect
import logging
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from engines import config, engine_of, full_weights, train
from models import batch, distance, model, weights
from ranks import run_ranks
from torch import nn

from adafisher_dist import AdaFisher
from adafisher_dist.settings import DEFAULTS, normalized

AUTO = {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}

# What Hugging Face's Trainer puts in the place of "auto", with learning_rate=3e-3.
FILLED = {"lr": 3e-3, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.0}

# "params" of public configs whose type is Adam or AdamW, each with its source and ZeRO stage.
# Axolotl's and LLaMA-Factory's files of today leave the section out, and Trainer then takes its own
# optimizer.
PUBLIC: dict[str, tuple[int, dict[str, Any]]] = {
    "huggingface/transformers tests/deepspeed/ds_config_zero2.json": (2, AUTO),
    "huggingface/transformers tests/deepspeed/ds_config_zero3.json": (3, AUTO),
    "huggingface/transformers tests/deepspeed/ds_config_zero3.json, before 2021-03": (
        3,
        {"lr": 3e-5, "betas": [0.8, 0.999], "eps": 1e-8, "weight_decay": 3e-7},
    ),
    "axolotl-ai-cloud/axolotl deepspeed/zero2.json, 2023": (2, AUTO),
    "hiyouga/LLaMA-Factory examples/deepspeed/ds_z3_offload_config.json, with lr alone": (3, {"lr": "auto"}),
    "microsoft/DeepSpeed docs/_tutorials/cifar-10.md": (
        0,
        {"lr": 1e-3, "betas": [0.8, 0.999], "eps": 1e-8, "weight_decay": 3e-7},
    ),
    "microsoft/DeepSpeed docs/_pages/config-json.md, Adam's further keys": (
        2,
        {"lr": 1e-3, "torch_adam": True, "adam_w_mode": True},
    ),
    "deepspeedai/DeepSpeedExamples training/tensor_parallel/hf_integration/configs/ds_config.json": (2, AUTO),
    "deepspeedai/DeepSpeedExamples training/DeepSpeed-ZenFlow/finetuning/zf_config.json": (
        2,
        {"lr": 2e-5, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.01},
    ),
    "Megatron-DeepSpeed's arguments (--adam-beta1 0.9 --adam-beta2 0.95 --weight-decay 0.1) as a section": (
        1,
        {"lr": 1e-3, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1, "adam_w_mode": True},
    ),
    "OpenRLHF/OpenRLHF what create_optimizer is called with (lr, betas, weight_decay)": (
        3,
        {"lr": 1e-3, "betas": [0.9, 0.95], "weight_decay": 0.0},
    ),
    "microsoft/unilm beit/utils.py create_ds_config": (
        1,
        {"lr": 1e-3, "weight_decay": 0.05, "bias_correction": True, "betas": [0.9, 0.999], "eps": 1e-8},
    ),
    "huggingface/accelerate tests: AdamW with torch_adam": (
        2,
        {"lr": "auto", "weight_decay": "auto", "torch_adam": True, "adam_w_mode": True},
    ),
}

Build = Callable[..., AdaFisher]


def by_constructor(**written: Any) -> AdaFisher:
    return AdaFisher([nn.Parameter(torch.ones(4, 3))], **written)


def by_group(**written: Any) -> AdaFisher:
    return AdaFisher([{"params": [nn.Parameter(torch.ones(4, 3))], **written}])


def by_added_group(**written: Any) -> AdaFisher:
    optimizer = AdaFisher([nn.Parameter(torch.ones(2))])
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(4, 3))], **written})
    return optimizer


def by_json(**written: Any) -> AdaFisher:
    return torch.optim.AdaFisher([nn.Parameter(torch.ones(4, 3))], **written)


def by_preset(**written: Any) -> AdaFisher:
    return AdaFisher.for_image_classification([nn.Parameter(torch.ones(4, 3))], **written)


BUILDS = [by_constructor, by_group, by_added_group, by_json, by_preset]
everywhere = pytest.mark.parametrize("build", BUILDS, ids=lambda build: build.__name__)


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "adafisher_dist"]


# ---- betas ----


@everywhere
def test_the_first_of_betas_is_momentum_and_the_second_is_left_out(
    build: Build, caplog: pytest.LogCaptureFixture
) -> None:
    group = build(betas=[0.8, 0.999]).param_groups[-1]
    assert (group["momentum"], group["fisher_decay"]) == (0.8, DEFAULTS["fisher_decay"]) and "betas" not in group
    (warning,) = warnings_of(caplog)
    assert "momentum is 0.8, the first of them" in warning
    assert f"fisher_decay is {DEFAULTS['fisher_decay']}" in warning


@everywhere
def test_a_momentum_that_is_given_wins_also_where_it_is_the_default(
    build: Build, caplog: pytest.LogCaptureFixture
) -> None:
    for momentum in (DEFAULTS["momentum"], 0.7):
        group = build(betas=(0.8, 0.999), momentum=momentum, fisher_decay=0.9).param_groups[-1]
        assert (group["momentum"], group["fisher_decay"]) == (momentum, 0.9)
        assert f"momentum is {momentum}, as given" in warnings_of(caplog)[-1]
        assert "fisher_decay is 0.9." in warnings_of(caplog)[-1]


def test_a_momentum_given_by_its_place_wins_too() -> None:
    assert AdaFisher([nn.Parameter(torch.ones(2))], 1e-3, 0.85, betas=(0.5, 0.9)).param_groups[0]["momentum"] == 0.85
    with pytest.raises(TypeError, match="multiple values for argument 'lr'"):
        AdaFisher([nn.Parameter(torch.ones(2))], 1e-3, lr=1e-2)
    with pytest.raises(TypeError, match="missing a required argument: 'params'"):
        AdaFisher(lr=1e-2)  # type: ignore[call-arg]
    assert AdaFisher(params=[nn.Parameter(torch.ones(2))], betas=(0.6, 0.9)).param_groups[0]["momentum"] == 0.6


def test_one_warning_an_optimizer(caplog: pytest.LogCaptureFixture) -> None:
    groups = [{"params": [nn.Parameter(torch.ones(2))], "betas": (0.7 + i / 10, 0.99)} for i in range(3)]
    optimizer = AdaFisher(groups, betas=(0.5, 0.9))
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], "betas": (0.6, 0.99)})
    assert [round(group["momentum"], 9) for group in optimizer.param_groups] == [0.7, 0.8, 0.9, 0.6]
    assert len(warnings_of(caplog)) == 1
    by_constructor(momentum=0.9)
    assert len(warnings_of(caplog)) == 1, "without betas there is nothing to say"


@everywhere
@pytest.mark.parametrize(
    ("betas", "error", "words"),
    [
        ("auto", TypeError, r"betas should be two numbers, got 'auto'.*Accelerate replace"),
        ("[0.9, 0.999]", TypeError, "betas should be two numbers, got '.*Write a number, without quotes"),
        (torch.tensor([0.9, 0.99]), TypeError, "betas should be two numbers, got tensor"),
        (np.array([0.9, 0.99]), TypeError, "betas should be two numbers, got array"),
        ((0.9,), TypeError, r"betas should be two numbers, got \(0.9,\)"),
        ((0.9, 0.99, 0.999), TypeError, "betas should be two numbers"),
        (0.9, TypeError, "betas should be two numbers, got 0.9"),
        (["0.9", 0.999], TypeError, r"betas\[0\] should be a number, got '0.9' of type str"),
        ((0.9, None), TypeError, r"betas\[1\] should be a number, got None"),
        ((1.0, 0.999), ValueError, r"betas\[0\] should be at least 0 and below 1, got 1.0"),
        ((0.9, 1.999), ValueError, r"betas\[1\] should be at least 0 and below 1, got 1.999"),
    ],
    ids=str,
)
def test_bad_betas(build: Build, betas: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        build(betas=betas)


# ---- the other keys ----

HARMLESS: list[dict[str, Any]] = [
    {"foreach": True, "fused": False},
    {"foreach": None, "fused": None, "capturable": True},
    {"amsgrad": False, "maximize": False, "differentiable": False, "capturable": False},
    {"decoupled_weight_decay": True},
    {"torch_adam": True, "adam_w_mode": True, "adamw_mode": True},
    {"torch_adam": False, "set_grad_none": True, "fp32_optimizer_states": True, "use_triton": True},
    {"optim_bits": 32, "is_paged": False, "block_wise": True, "percentile_clipping": 100, "min_8bit_size": 4096},
    {"correct_bias": True, "no_deprecation_warning": True, "use_kahan_summation": False, "max_grad_norm": 0.0},
    {"betas": None, "amsgrad": None, "adam_w_mode": None},
]


@everywhere
@pytest.mark.parametrize("written", HARMLESS, ids=lambda written: "-".join(written))
def test_harmless_keys_change_nothing(build: Build, written: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    one, other = build(lr=1e-2, **written), build(lr=1e-2)
    for optimizer in (one, other):
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.arange(parameter.numel(), dtype=torch.float32).view_as(parameter) - 1
        optimizer.step()
    assert torch.equal(one.param_groups[-1]["params"][0], other.param_groups[-1]["params"][0])
    assert one.state_dict()["param_groups"] == other.state_dict()["param_groups"]
    assert not warnings_of(caplog)


IMPOSSIBLE = [
    ("amsgrad", True, ValueError, "an average over steps"),
    ("maximize", True, ValueError, "Negate the loss"),
    ("differentiable", True, ValueError, r"No gradient flows through step\(\)"),
    ("adam_w_mode", False, ValueError, "for L2 set weight_decay to 0"),
    ("adamw_mode", False, ValueError, "decoupled, as in AdamW"),
    ("decoupled_weight_decay", False, ValueError, "decoupled, as in AdamW"),
    ("correct_bias", False, ValueError, "bias_correction=False"),
    ("fp32_optimizer_states", False, ValueError, 'fisher_dtype="bfloat16"'),
    ("optim_bits", 8, ValueError, 'fisher_dtype="bfloat16"'),
    ("is_paged", True, ValueError, "offload_optimizer"),
    ("percentile_clipping", 5, ValueError, "gradient_clipping"),
    ("max_grad_norm", 1.0, ValueError, "clip_grad_norm_"),
    ("use_kahan_summation", True, ValueError, "stochastic_rounding=True is for weights in bfloat16"),
    ("fused", "true", TypeError, "fused should be True or False, got 'true'"),
    ("torch_adam", "auto", TypeError, "torch_adam should be True or False, got 'auto'"),
    ("amsgrad", 1, TypeError, "amsgrad should be True or False, got 1"),
]


@everywhere
@pytest.mark.parametrize(("key", "value", "error", "words"), IMPOSSIBLE, ids=str)
def test_what_cannot_be_is_refused_with_what_to_do(
    build: Build, key: str, value: Any, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words) as raised:
        build(**{key: value})
    assert key in str(raised.value) and repr(value) in str(raised.value)


def test_every_key_of_theirs_is_known() -> None:
    """Pin the keys of torch and DeepSpeed: one that they add must be accepted or refused here."""
    from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam

    kinds = [torch.optim.Adam, torch.optim.AdamW, DeepSpeedCPUAdam, FusedAdam]
    for kind in kinds:
        defaults = {name: p.default for name, p in inspect.signature(kind).parameters.items()}
        defaults.pop("params", None), defaults.pop("model_params", None)
        if kind is torch.optim.Adam:
            assert defaults.pop("decoupled_weight_decay") is False, "L2 is refused"
        by_constructor(**defaults)


def test_param_groups_of_adamw_are_taken_and_left_as_they_are() -> None:
    module = model()
    adamw = torch.optim.AdamW(module.parameters(), lr=2e-3, betas=(0.7, 0.99), weight_decay=0.3)
    optimizer = AdaFisher(adamw.param_groups)
    (group,) = optimizer.param_groups
    assert (group["lr"], group["momentum"], group["weight_decay"]) == (2e-3, 0.7, 0.3)
    assert adamw.param_groups[0]["betas"] == (0.7, 0.99) and "momentum" not in adamw.param_groups[0]
    assert not {"betas", "foreach", "fused", "amsgrad"} & set(group)
    module(batch(0, 0, 1)[0]).sum().backward()
    optimizer.step()
    own = {"params": [nn.Parameter(torch.ones(2))], "name": "mine"}
    optimizer.add_param_group(own)
    assert optimizer.param_groups[-1] is own, "as in torch.optim, where nothing has to be translated"


def test_a_group_that_is_refused_changes_nothing() -> None:
    optimizer = by_constructor()
    group = {"params": [nn.Parameter(torch.ones(2))], "betas": (0.9, 0.99), "maximize": True}
    before = dict(group)
    with pytest.raises(ValueError, match="maximize"):
        optimizer.add_param_group(group)
    assert len(optimizer.param_groups) == 1 and group == before


def test_a_copy_tells_nothing_anew(caplog: pytest.LogCaptureFixture) -> None:
    optimizer = by_constructor(betas=(0.8, 0.999), fused=True)
    for other in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert other.param_groups[0]["momentum"] == 0.8
    assert len(warnings_of(caplog)) == 1


def test_the_signature_shows_the_settings_alone() -> None:
    assert list(inspect.signature(AdaFisher).parameters) == ["params", *DEFAULTS, "process_group"]
    assert "betas" in (AdaFisher.__doc__ or "")

    class Own(AdaFisher):
        def __init__(self, params: Any, **settings: Any) -> None:
            super().__init__(params, **settings)

    assert Own([nn.Parameter(torch.ones(2))], betas=(0.6, 0.9)).param_groups[0]["momentum"] == 0.6


def test_a_captured_step_is_refused_before_anything_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer = by_constructor(capturable=True)
    (parameter,) = optimizer.param_groups[0]["params"]
    parameter.grad = torch.ones_like(parameter)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="while a CUDA graph is captured"):
        optimizer.step()
    assert torch.equal(parameter.detach(), torch.ones(4, 3)) and not optimizer.state
    monkeypatch.undo()
    optimizer.step()
    assert optimizer.state[parameter]["step"] == 1


# ---- all that is wrong, at once ----


@pytest.mark.parametrize("build", [by_constructor, by_json, by_preset], ids=lambda build: build.__name__)
def test_one_message_tells_all_that_has_to_change(build: Build) -> None:
    with pytest.raises(TypeError) as raised:
        build(
            learning_rate=1e-3, ns_steps=5, beta1=0.9, amsgrad=True, betas="auto", eps="1e-8", weight_decay="auto",
            momentum=1.5, fisher_decy=0.9,
        )  # fmt: skip
    message = str(raised.value)
    for part in (
        "no parameter 'learning_rate'. Did you mean 'lr'?",
        "no parameter 'ns_steps'. AdaFisher",
        "no parameter 'beta1'. Did you mean 'momentum'?",
        "no parameter 'fisher_decy'. Did you mean 'fisher_decay'?",
        "no setting 'amsgrad' (got True)",
        "betas should be two numbers, got 'auto'",
        "eps should be a number, got '1e-8' of type str. Write a number, without quotes.",
        "YAML takes 1e-8 for text: write 1.0e-8 there.",
        "weight_decay should be a number, got 'auto'",
        "momentum should be at least 0 and below 1, got 1.5",
    ):
        assert part in message, part
    assert message.count("Its parameters are: ") == 1


def test_a_group_tells_all_at_once_too() -> None:
    with pytest.raises(TypeError) as raised:
        by_group(learning_rate=1e-3, weigth_decay=0.1, maximize=True, eps="1e-8", name="mine", lr_scale=0.5)
    message = str(raised.value)
    assert "'learning_rate', which is no setting. Did you mean 'lr'?" in message
    assert "Did you mean 'weight_decay'?" in message and "'maximize'" in message and "eps should be" in message
    assert "mine" not in message and "lr_scale" not in message


MEANT = {
    "learning_rate": "lr", "Learning-Rate": "lr", "LR": "lr", "beta": "momentum", "beta1": "momentum",
    "beta2": "fisher_decay", "wd": "weight_decay", "weigth_decay": "weight_decay", "epsilon": "eps",
    "precondition_frequency": "inverse_update_freq", "max_preconditioner_dim": "block_size", "blocksize": "block_size",
    "use_nesterov": "nesterov", "dampening": "damping", "max_block": "max_blocks", "factor_decay": "fisher_decay",
    "inv_update_steps": "inverse_update_freq", "factor_update_steps": "fisher_update_freq", "momentun": "momentum",
    "ns_steps": None, "freeze_step": None, "muon_lr": None, "cuda_aware": None, "steps": None, "rho": None,
}  # fmt: skip


@pytest.mark.parametrize(("name", "meant"), MEANT.items())
def test_only_what_is_really_near_is_suggested(name: str, meant: str | None) -> None:
    with pytest.raises(TypeError) as raised:
        by_json(**{name: 1})
    assert f"no parameter {name!r}." in str(raised.value)
    assert (f"Did you mean {meant!r}?" in str(raised.value)) if meant else ("Did you mean" not in str(raised.value))


def test_what_is_a_key_elsewhere() -> None:
    with pytest.raises(TypeError, match=r"'preset'\. In code presets are AdaFisher.for_language_models"):
        by_constructor(preset="language_models")
    with pytest.raises(TypeError, match=r"'metrics_every'\. It is a key of a DeepSpeed config"):
        by_constructor(metrics_every=5)
    with pytest.raises(ValueError, match=r"'process_group'.* It is an argument of AdaFisher"):
        by_group(process_group=None)
    with pytest.raises(ValueError, match="'preset', which is no setting"):
        by_group(preset="language_models")


def test_what_schedulers_leave_in_the_groups_is_no_setting() -> None:
    optimizer = by_constructor()
    torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=10)
    AdaFisher(optimizer.param_groups)


# ---- schedulers that change momentum ----

SCHEDULES: list[Callable[[Any], Any]] = [
    lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=5e-3, total_steps=12),
    lambda o: torch.optim.lr_scheduler.CyclicLR(o, base_lr=1e-3, max_lr=5e-3, step_size_up=4, cycle_momentum=True),
]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=["OneCycleLR", "CyclicLR"])
def test_momentum_follows_a_schedule_as_adamws_first_beta_does(schedule: Callable[[Any], Any]) -> None:
    torch.manual_seed(0)
    ours, theirs = nn.Linear(16, 4), nn.Linear(16, 4)
    theirs.load_state_dict(ours.state_dict())
    as_adamw = {"max_blocks": 0, "nesterov": False, "fisher_decay": 0.95}
    optimizers = [
        AdaFisher(ours.parameters(), lr=1e-3, betas=(0.9, 0.95), **as_adamw),
        torch.optim.AdamW(theirs.parameters(), lr=1e-3, betas=(0.9, 0.95)),
    ]
    schedulers = [schedule(optimizer) for optimizer in optimizers]
    seen = []
    for _ in range(11):
        inputs = torch.randn(8, 16)
        for module, optimizer, scheduler in zip((ours, theirs), optimizers, schedulers, strict=True):
            optimizer.zero_grad()
            module(inputs).square().mean().backward()
            optimizer.step()
            scheduler.step()
        group, reference = (optimizer.param_groups[0] for optimizer in optimizers)
        assert group["momentum"] == reference["betas"][0] and group["lr"] == reference["lr"]
        seen.append(group["momentum"])
    assert len(set(seen)) > 4
    torch.testing.assert_close(ours.weight, theirs.weight)
    optimizers[0].load_state_dict(optimizers[0].state_dict())
    assert optimizers[0].param_groups[0]["momentum"] == seen[-1]


def one_cycle(optimizer: torch.optim.Optimizer) -> Any:
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-2, total_steps=8)


def cycled(rank: int, world: int, stage: int) -> Any:
    engine = engine_of(config(stage, world), lr_scheduler=one_cycle)
    train(engine, 0, 6, rank, world)
    return full_weights(engine), engine.basic_optimizer.param_groups[0]["momentum"] if stage < 3 else None


@pytest.mark.dist
@pytest.mark.deepspeed
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_cycled_momentum_reaches_every_stage(stage: int) -> None:
    module = model()
    optimizer = torch.optim.AdaFisher(module.parameters(), **config(0, 1)["optimizer"]["params"])
    scheduler = one_cycle(optimizer)
    for step in range(6):
        x, y = batch(step, 0, 1)
        optimizer.zero_grad()
        nn.functional.mse_loss(module(x), y).backward()
        for parameter in module.parameters():
            if parameter.requires_grad and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)  # as under ZeRO
        optimizer.step()
        scheduler.step()
    for result, momentum in run_ranks(cycled, 2, stage, deepspeed=True):
        assert distance(result, weights(module)) < 1e-4
        assert momentum in (None, optimizer.param_groups[0]["momentum"])


# ---- JSON configs ----


def filled(params: dict[str, Any]) -> dict[str, Any]:
    return {key: FILLED[key] if value == "auto" else value for key, value in params.items()}


def public_configs(rank: int, world: int) -> dict[str, Any]:
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("adafisher_dist").addHandler(handler)
    result = {}
    for source, (stage, params) in PUBLIC.items():
        lines.clear()
        engine = engine_of(config(stage, world, filled(params)))
        train(engine, 0, 2, rank, world)
        told = sum("are Adam's" in line for line in lines)
        # ZeRO-3 empties the param groups between steps
        group = engine.basic_optimizer.defaults
        result[source] = told, group["momentum"], group["fisher_decay"], full_weights(engine)
    return result


@pytest.mark.dist
@pytest.mark.deepspeed
def test_public_configs_train_when_only_the_type_is_changed() -> None:
    first, second = run_ranks(public_configs, 2, deepspeed=True, timeout=280)
    start = weights(model())
    for source, (_, params) in PUBLIC.items():
        told, momentum, decay, trained = first[source]
        assert told == ("betas" in params) and second[source][0] == 0, (source, "one warning, of the first rank")
        first_beta = filled(params).get("betas", [DEFAULTS["momentum"]])[0]
        assert (momentum, decay) == (first_beta, DEFAULTS["fisher_decay"]), source
        assert 0 < distance(trained, start) < 1 and distance(trained, second[source][3]) == 0, source


def test_trainer_fills_what_the_table_says() -> None:
    pytest.importorskip("accelerate")
    transformers = pytest.importorskip("transformers")
    from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

    section = {"optimizer": {"type": "AdaFisher", "params": dict(AUTO)}, "train_micro_batch_size_per_gpu": "auto"}
    arguments = transformers.TrainingArguments(output_dir="unused", learning_rate=3e-3, use_cpu=True)
    process = HfTrainerDeepSpeedConfig(section)
    process.trainer_config_process(arguments)
    params = process.config["optimizer"]["params"]
    assert params == FILLED
    group = by_json(**params).param_groups[0]
    assert (group["lr"], group["momentum"], group["eps"], group["weight_decay"]) == (3e-3, 0.9, 1e-8, 0.0)


@pytest.mark.parametrize("name", ["AdaFisher", "adafisher", "Adafisher", "ADAFISHER", "ada_fisher", "Ada-Fisher"])
def test_the_type_in_any_spelling(name: str) -> None:
    assert isinstance(getattr(torch.optim, name)([nn.Parameter(torch.ones(2))], lr=1e-3), AdaFisher)


@pytest.mark.parametrize("name", ["AdaFischer", "AdaFish", "adafisher_dist.AdaFisher", "AdaFisherW"])
def test_a_misspelt_type_is_told_of_where_deepspeed_drops_the_error(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert getattr(torch.optim, name, None) is None  # as DeepSpeed asks
    assert warnings_of(caplog) == [f"torch.optim has no {name!r}. Did you mean 'AdaFisher'?"]


def test_other_names_are_not_told_of(caplog: pytest.LogCaptureFixture) -> None:
    for name in ("NoSuch", "_ada", "AdaBelief", "Adahessian", "FusedAdam"):
        assert getattr(torch.optim, name, None) is None
    assert not warnings_of(caplog)


@pytest.mark.parametrize(
    ("wrong", "error", "messages"),
    [
        ({"packed": 0}, TypeError, ["packed"]),
        ({"momentum": True}, TypeError, ["momentum"]),
        ({"lr": -1.0}, ValueError, ["lr should be at least 0"]),
        ({"lr": -1.0, "momentum": 1.5}, ValueError, ["lr should be", "momentum should be"]),
        ({"damping": torch.tensor(1.0)}, TypeError, ["damping"]),
    ],
)
def test_settings_that_were_right_before_are_checked_again(
    wrong: dict[str, Any], error: type[Exception], messages: list[str]
) -> None:
    """Each step looks at them; 0 is False, and 1.0 True, to whoever keeps what was right."""
    group = {**DEFAULTS, "momentum": 0.0}
    for lr in (1e-3, 2e-3):
        assert normalized({**group, "lr": lr}) == {**group, "lr": lr, "fisher_dtype": "float32"}
    with pytest.raises(error) as raised:
        normalized({**group, **wrong})
    assert all(message in str(raised.value) for message in messages)
    assert normalized({**group, "packed": True})["packed"] is True
