"""Checks of checkpoints: saved on a device, loaded on it or on another."""

from __future__ import annotations

import itertools

import torch
from correct_blocks import same_bits
from correct_runner import Here
from correct_trainings import PARAMS, Given, Settings, known, state_of, weights
from models import distance

import adafisher_dist
from adafisher_dist import AdaFisher


def checkpoint(here: Here) -> str:
    """Saved at once and in the background; a fresh model and optimizer go on bit for bit."""
    variants: list[Settings] = [
        {},
        {"inverse_update_freq": 2, "packed": True, "fisher_dtype": torch.bfloat16, "rows_per_block": 2},
    ]
    for (number, variant), asynchronous in itertools.product(enumerate(variants), (False, True)):
        settings = {**PARAMS, **variant}
        module = Given(here)
        ours = AdaFisher(module.named_parameters(), **settings)
        module.train(ours, range(3))
        path = here.folder / f"checkpoint-{number}-{int(asynchronous)}" / "step3"
        extra = {"step": 3, "seen": torch.arange(4, device=here.device)}
        saving = adafisher_dist.save_checkpoint(path, module, ours, extra=extra, asynchronous=asynchronous)
        module.train(ours, range(3, 6))  # while it may still be written
        saving.wait()
        with torch.no_grad():
            again = Given(here)
            for p in again.parameters():
                p.zero_()
        resumed = AdaFisher(again.named_parameters(), **settings)
        restored = adafisher_dist.load_checkpoint(path, again, resumed)
        assert restored.extra["step"] == 3 and restored.extra["seen"].tolist() == [0, 1, 2, 3], restored.extra
        again.train(resumed, range(3, 6))
        same_bits([p.detach() for p in again.parameters()], [p.detach() for p in module.parameters()])
        same_bits([known(value) for value in state_of(resumed)], [known(value) for value in state_of(ours)])
    return f"{len(variants)} settings, at once and in the background: the same bits three steps later"


def checkpoint_elsewhere(here: Here) -> str:
    """Saved on the device, loaded on the CPU, and the other way round."""
    cpu, apart = torch.device("cpu"), 0.0
    for name, first, second in (("to-cpu", here.device, cpu), ("from-cpu", cpu, here.device)):
        module, again = Given(here, first), Given(here, second)
        ours, other = (AdaFisher(m.named_parameters(), **PARAMS) for m in (module, again))
        module.train(ours, range(3))
        path = here.folder / name / "step3"
        adafisher_dist.save_checkpoint(path, module, ours)
        adafisher_dist.load_checkpoint(path, again, other)
        saved, loaded = ([known(value.cpu()) for value in state_of(o)] for o in (ours, other))
        same_bits(loaded, saved)
        module.train(ours, range(3, 6))
        again.train(other, range(3, 6))
        apart = max(apart, distance(weights(module), weights(again)))
        assert apart < 1e-4, f"{name}: three steps later the weights are {apart:.2g} apart"
    return f"the same state; three steps later the weights are {apart:.1e} apart"
