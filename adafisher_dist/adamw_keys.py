"""Translate what a user wrote into AdaFisher's own settings.

Adam's keys are translated or dropped. Everything that is wrong is reported at once.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from difflib import get_close_matches
from functools import wraps
from numbers import Real
from reprlib import repr as short
from typing import Any, ParamSpec, cast

from adafisher_dist.settings import DEFAULTS, check_number, hint_of, problems_of, raise_all

P = ParamSpec("P")

# What Adam and AdamW of torch, DeepSpeed, bitsandbytes and transformers take and AdaFisher has not:
# keys, values that ask for nothing that it does not do (none: any value), and what to do where
# another is asked for. None means, as there, that the key is not set.
_BY_REMEDY: tuple[tuple[tuple[str, ...], tuple[bool | int, ...], str], ...] = (
    # Which implementation computes: there is one. Where step() is captured, it says so.
    (("foreach", "fused", "torch_adam", "use_triton", "capturable"), (True, False), ""),
    (("backend",), (), ""),  # AdaFisher's own of version 0.1, which had a Triton kernel
    (("set_grad_none", "block_wise", "no_deprecation_warning"), (True, False), ""),
    (("min_8bit_size",), (), ""),
    # what is computed
    (("amsgrad",), (False,), "The Fisher is an average over steps, never a maximum: leave it out."),
    (("maximize",), (False,), "Negate the loss, and leave it out."),
    (("differentiable",), (False,), "No gradient flows through step(): leave it out."),
    (
        ("adam_w_mode", "adamw_mode", "decoupled_weight_decay"),
        (True,),
        "weight_decay is decoupled, as in AdamW: leave it out; for L2 set weight_decay to 0 and add the penalty to the"
        " loss.",
    ),
    (("correct_bias",), (True,), "Write bias_correction=False in its place."),
    (("max_grad_norm",), (0,), "Leave it out; DeepSpeed's gradient_clipping or torch's clip_grad_norm_ clips."),
    (("percentile_clipping",), (100,), "Leave it out; DeepSpeed's gradient_clipping or torch's clip_grad_norm_ clips."),
    (
        ("use_kahan_summation", "kahan_sum"),
        (False,),
        "Leave it out; stochastic_rounding=True is for weights in bfloat16.",
    ),
    # how much memory it takes
    (("fp32_optimizer_states",), (True,), 'Leave it out; fisher_dtype="bfloat16" halves the Fisher.'),
    (("optim_bits",), (32,), 'Leave it out; fisher_dtype="bfloat16" halves the Fisher.'),
    (("is_paged",), (False,), "Leave it out; DeepSpeed's offload_optimizer keeps the state on the CPU."),
)
_FOREIGN = {key: (accepted, remedy) for keys, accepted, remedy in _BY_REMEDY for key in keys}

# What others call a setting. Suggested and not taken: the numbers do not mean quite the same.
_BY_SETTING = {
    "lr": ("learning_rate", "learningrate", "learn_rate", "lrate"),
    "momentum": ("beta", "beta1", "beta_1", "adam_beta1"),
    "fisher_decay": ("beta2", "beta_2", "adam_beta2", "shampoo_beta", "factor_decay"),
    "weight_decay": ("wd", "weightdecay"),
    "eps": ("epsilon", "adam_epsilon"),
    "nesterov": ("use_nesterov",),
    "bias_correction": ("use_bias_correction",),
    "block_size": ("max_preconditioner_dim", "max_precond_dim"),
    "inverse_update_freq": (
        "precondition_frequency",
        "preconditioner_update_freq",
        "inv_update_steps",
        "inv_update_freq",
    ),
    "fisher_update_freq": ("factor_update_steps", "factor_update_freq"),
    "stochastic_rounding": ("bf16_stochastic_round", "use_stochastic_rounding"),
}
_CALLED_ELSEWHERE = {other: own for own, others in _BY_SETTING.items() for other in others}

# What is a setting in another place only.
_IN_ANOTHER_PLACE = {
    "preset": "In code presets are AdaFisher.for_language_models() and AdaFisher.for_image_classification().",
    "metrics_every": "It is a key of a DeepSpeed config; in code call optimizer.report_metrics().",
    "process_group": "It is an argument of AdaFisher, for all its param groups.",
}


# AdaFisher's own settings, and a warning that says what became of Adam's betas, if given.
Translated = tuple[dict[str, Any], str | None]


def translate(written: Mapping[str, Any], more: Sequence[str] = ()) -> Translated:
    """What a user wrote for a whole optimizer, in code or in JSON.

    Args:
        written: what was written, so without the defaults.
        more: names that are valid beside the settings; their values pass unseen.

    Raises:
        TypeError: a name does not exist, or a value has the wrong type.
        ValueError: a value is out of bounds, or asks for what AdaFisher does not do. Either message
            tells all that is wrong, with the nearest valid name, and is raised before anything
            changes.
    """
    valid = [*DEFAULTS, *more]
    unknown = [
        f"AdaFisher has no parameter {key!r}.{_hint(key, valid, near=0.8)}"
        for key in written
        if not _is_known(key, valid)
    ]
    problems: list[Exception] = []
    if unknown:
        problems.append(TypeError(f"{' '.join(unknown)} Its parameters are: {', '.join(valid)}."))
    return _translate(written, DEFAULTS, problems)


def translate_group(group: dict[str, Any], defaults: Mapping[str, Any]) -> Translated:
    """Translate what a user wrote for a param group.

    Keys that are no setting are the user's own, unless they look like one. A group that needs no
    translation is returned as it is, not copied: torch.optim keeps the one that it is given.

    Raises:
        TypeError: a value has the wrong type.
        ValueError: a key looks misspelt or is a setting elsewhere; a value is out of bounds, or
            asks for what AdaFisher does not do.
    """
    problems: list[Exception] = []
    for key in group:
        hint = "" if not isinstance(key, str) or _is_known(key, DEFAULTS) else _hint(key, list(DEFAULTS), near=0.85)
        if hint:
            problems.append(ValueError(f"The param group has a key {key!r}, which is no setting.{hint}"))
    settings, notice = _translate(group, defaults, problems)
    return (group if settings.keys() == group.keys() else settings), notice


def _translate(written: Mapping[str, Any], defaults: Mapping[str, Any], problems: list[Exception]) -> Translated:
    """`problems` are those that were found in the names."""
    own = {key: value for key, value in written.items() if key != "betas" and key not in _FOREIGN}
    notice = None
    if written.get("betas") is not None:
        try:
            first = _momentum_of(written["betas"])
        except (TypeError, ValueError) as error:
            problems.append(error)
        else:
            taken = own.setdefault("momentum", first)
            decay = defaults["fisher_decay"]
            if "momentum" not in written and first**2 > decay == DEFAULTS["fisher_decay"]:
                own.setdefault("fisher_decay", first)  # Adam's second beta is above the first: see `doubts_of`
            notice = (
                f"AdaFisher: betas={tuple(written['betas'])} are Adam's. momentum is {taken}"
                f"{', the first of them' if 'momentum' not in written else ', as given'}; the second is for"
                " averages of squares and left out; for the Fisher's, fisher_decay is"
                f" {own.get('fisher_decay', defaults['fisher_decay'])}. Write momentum and fisher_decay in place of"
                " betas to choose both, and this warning goes."
            )
    found = (_problem_of_foreign(key, value) for key, value in written.items() if key in _FOREIGN)
    problems += [problem for problem in found if problem is not None]
    problems += problems_of({**defaults, **{key: own[key] for key in DEFAULTS if key in own}})
    raise_all(problems)
    return own, notice


def _is_known(key: str, valid: Iterable[str]) -> bool:
    return key in valid or key in _FOREIGN or key == "betas"


def _hint(key: str, valid: Sequence[str], near: float) -> str:
    """What may be meant by a key that is no setting; nothing where nothing is near."""
    name = key.lower().replace("-", "_")
    if name in _IN_ANOTHER_PLACE and name not in valid:
        return f" {_IN_ANOTHER_PLACE[name]}"
    meant = [_CALLED_ELSEWHERE[name]] if name in _CALLED_ELSEWHERE else get_close_matches(name, valid, 1, near)
    return f" Did you mean {meant[0]!r}?" if meant else ""


def _momentum_of(betas: object) -> float:
    """Adam's β₁; β₂ is checked as well, since a slip there may be one in both."""
    if isinstance(betas, str) or not isinstance(betas, Sequence) or len(betas) != 2:
        raise TypeError(f"betas should be two numbers, got {short(betas)}.{hint_of(betas)}")
    pair = {"betas[0]": betas[0], "betas[1]": betas[1]}
    for name in pair:
        check_number(pair, name, low=0.0, below=1.0)
    return float(pair["betas[0]"])


def _problem_of_foreign(key: str, value: object) -> Exception | None:
    accepted, remedy = _FOREIGN[key]
    if value is None or not accepted or (isinstance(value, Real) and value in accepted):
        return None
    if isinstance(accepted[0], bool) and not isinstance(value, bool):
        return TypeError(f"{key} should be True or False, got {short(value)}.")
    return ValueError(f"AdaFisher has no setting {key!r} (got {short(value)}). {remedy}")


def translated(init: Callable[P, None]) -> Callable[P, None]:
    """Wrap a constructor so that Adam's keys are translated to its own settings before the call.

    The constructor itself could not tell a momentum that was given from the default. Its signature
    also shows only the settings that exist.
    """
    signature = inspect.signature(init)

    @wraps(init)
    def construct(*values: Any, **written: Any) -> None:
        foreign = {key: value for key, value in written.items() if key not in signature.parameters}
        own = {key: value for key, value in written.items() if key not in foreign}
        given = signature.bind(*values, **own).arguments
        optimizer, params = given.pop("self"), given.pop("params")
        settings, notice = translate({**foreign, **given}, more=("process_group",))
        cast(Callable[..., None], init)(optimizer, params, **settings)
        optimizer._notices.betas(notice)

    return cast(Callable[P, None], construct)
