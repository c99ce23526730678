"""Checks of `correct.py`: the optimizer on a device beside an oracle, or bit for bit beside a twin.

The oracle is the numpy one of tests/oracle.py. Each check is given a `Here`, returns in a line what
it found, and raises where something is wrong.

With several ranks each check runs on all of them: batches are cut by rank, and what is not data is
the same on each. A check asks nothing that a rank knows alone before a collective, so that the
ranks stay together while all goes well.

Everything also runs on CPU tensors, in a rehearsal.
"""

from __future__ import annotations

import itertools
from functools import partial

import torch
from correct_blocks import blocks, dead_rows, gate, ladder, not_numbers
from correct_checkpoints import checkpoint, checkpoint_elsewhere
from correct_comm import communication
from correct_deepspeed import zero, zero_bad_gradient, zero_checkpoint
from correct_optimizer import bad_gradients, metrics, metrics_wait, moved_away, optimizer, rounding, tf32, waiting
from correct_runner import Check
from correct_trainings import both
from correct_wrappers import fsdp2, replicated, scaler


def all_checks() -> dict[str, Check]:
    """By name, in the order in which they are made: what is most likely to be wrong first."""
    checks: dict[str, Check] = {
        "blocks": blocks,
        "ladder": ladder,
        "not-numbers": not_numbers,
        "dead-rows": dead_rows,
        "gate": gate,
        "optimizer": optimizer,
        "tf32": tf32,
        "rounding": rounding,
        "moved-away": moved_away,
        "skipped": bad_gradients,
        "skipped-bf16": partial(bad_gradients, max_blocks=3, fisher_dtype=torch.bfloat16),
        "skipped-by-hosts": partial(bad_gradients, exponent=1.0, inverse_update_freq=2),
        "waiting": waiting,
        "waiting-bf16": partial(waiting, packed=True, max_blocks=3, fisher_dtype=torch.bfloat16),
        "waiting-plain": partial(waiting, grafting="none", fisher_update_freq=2),
        "metrics": metrics,
        "waiting-metrics": metrics_wait,
        "comm": communication,
        "comm-both": partial(communication, group=both),
    }
    for precision in ("fp32", "bf16", "fp16"):
        checks[f"train-{precision}"] = partial(replicated, precision=precision)
    checks["train-fp32-both"] = partial(replicated, precision="fp32", group=both)
    checks["train-fp32-p1"] = partial(replicated, precision="fp32", exponent=1.0, inverse_update_freq=2)
    checks["scaler"] = scaler
    for policy in ("fp32", "bf16", "offload"):
        checks[f"fsdp2-{policy}"] = partial(fsdp2, policy=policy)
    checks["fsdp2-offload-both"] = partial(fsdp2, policy="offload", group=both)
    checks["checkpoint"] = checkpoint
    checks["checkpoint-elsewhere"] = checkpoint_elsewhere
    for stage, precision, offload in itertools.product(range(4), ("fp32", "bf16", "fp16"), (False, True)):
        if stage or not offload:
            name = f"zero{stage}-{precision}{'-offload' if offload else ''}"
            checks[name] = partial(zero, stage=stage, precision=precision, offload=offload)
    for stage, precision in ((1, "bf16-fp32"), (3, "bf16-fp32")):
        checks[f"zero{stage}-{precision}"] = partial(zero, stage=stage, precision=precision, offload=False)
    for stage in (1, 3):
        checks[f"zero{stage}-skipped"] = partial(zero_bad_gradient, stage=stage)
        checks[f"zero{stage}-checkpoint"] = partial(zero_checkpoint, stage=stage)
    return checks
