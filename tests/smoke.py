"""Check an installed adafisher_dist in some minutes, with torch and numpy alone.

    python tests/smoke.py                        # also with DeepSpeed, where it is installed
    python tests/smoke.py --require-deepspeed    # an error where it is not

Prints a line for each check; the exit status is 1 if one failed. `make release-check` runs it on a
built wheel, with the oldest and the newest torch and DeepSpeed. It needs no pytest, and no file of
this repository but itself.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import os
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")  # before DeepSpeed is imported, here and in the ranks
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

BATCH, BEFORE, AFTER = 12, 5, 10  # samples a step; the steps before a checkpoint, and in all
EXACT = {"lr": 1e-2, "block_size": 4, "rows_per_block": 8, "fisher_dtype": torch.float64}
PARAMS = {"lr": 1e-2, "block_size": 4, "rows_per_block": 8}
STAGES = (0, 1, 2, 3)
Weights = dict[str, np.ndarray]


def model(dtype: torch.dtype) -> nn.Module:
    """The same weights at each call; shapes that no number of ranks divides."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 13), nn.Tanh(), nn.Linear(13, 5), nn.Tanh(), nn.Linear(5, 1)).to(dtype)


def batch(step: int, rank: int, world: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """This rank's part of the batch of a step."""
    x = torch.randn(BATCH, 7, generator=torch.Generator().manual_seed(100 + step))
    y = torch.sin(3 * x[:, :1]) + x[:, 1:2] * x[:, 2:3]
    part = slice(rank * BATCH // world, (rank + 1) * BATCH // world)
    return x[part].to(dtype), y[part].to(dtype)


def train(module: nn.Module, optimizer: Any, steps: range, rank: int = 0, world: int = 1) -> None:
    dtype = next(module.parameters()).dtype
    for step in steps:
        x, y = batch(step, rank, world, dtype)
        optimizer.zero_grad()
        nn.functional.mse_loss(module(x), y).backward()
        optimizer.step()


def held_out(module: nn.Module) -> float:
    """The loss on batches that no step trains on."""
    dtype = next(module.parameters()).dtype
    with torch.no_grad():
        losses = [nn.functional.mse_loss(module(x), y).item() for x, y in (batch(n, 0, 1, dtype) for n in range(-9, 0))]
    return sum(losses) / len(losses)


def weights(module: nn.Module) -> Weights:
    full = {n: p.full_tensor() if hasattr(p, "full_tensor") else p for n, p in module.named_parameters()}
    return {n.removeprefix("module."): p.detach().double().numpy().copy() for n, p in full.items()}


def alone(steps: int, dtype: torch.dtype = torch.float64, params: dict[str, Any] = EXACT) -> Weights:
    """What a training in one process ends at."""
    from adafisher_dist import AdaFisher

    module = model(dtype)
    train(module, AdaFisher(module.named_parameters(), **params), range(steps))
    return weights(module)


def expect_equal(what: str, found: Weights, wanted: Weights, tolerance: float) -> str:
    """How far they are apart, relative to the largest element of a tensor.

    Raises:
        AssertionError: farther than `tolerance`.
    """
    assert found.keys() == wanted.keys(), (sorted(found), sorted(wanted))
    apart = max(float(np.abs(found[n] - wanted[n]).max() / np.abs(wanted[n]).max()) for n in wanted)
    assert apart <= tolerance, f"{what}: relative difference {apart:.1e}, allowed {tolerance:.0e}"
    return f"{what}: within {apart:.1e}"


# ---- processes ----


def run_ranks(fn: Callable[..., Any], world: int, *args: Any) -> list[Any]:
    """Call `fn(rank, world, *args)` on `world` processes of a gloo group; returns results by rank.

    Raises:
        torch.multiprocessing.ProcessRaisedException: with the traceback of the first rank that
            failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_rank, (world, folder, fn, args), nprocs=world)
        return [torch.load(f"{folder}/{rank}.pt", weights_only=False) for rank in range(world)]


def _rank(rank: int, world: int, folder: str, fn: Callable[..., Any], args: tuple[Any, ...]) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    warnings.simplefilter("ignore")  # those of torch and DeepSpeed of each other
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", f"file://{folder}/store", world_size=world, rank=rank, timeout=timedelta(seconds=90)
    )  # fmt: skip
    torch.save(fn(rank, world, *args), f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


# ---- the checks; each returns what it found ----


class NotChecked(Exception):
    """Why something cannot be checked with these versions."""


def entry_point(folder: Path) -> str:
    """`import torch` alone puts AdaFisher into torch.optim, and loads next to nothing of ours."""
    import adafisher_dist

    assert importlib.metadata.version("adafisher-dist") == adafisher_dist.__version__
    script = (
        "import sys, torch; loaded = 'adafisher_dist.optimizer' in sys.modules;"
        "print(loaded, torch.optim.AdaFisher([torch.zeros(2, requires_grad=True)], lr=0.5).param_groups[0]['lr'])"
    )
    command = [sys.executable, "-c", script]
    environment = {name: value for name, value in os.environ.items() if name != "TORCH_DEVICE_BACKEND_AUTOLOAD"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment, timeout=120)
    assert done.stdout.split() == ["False", "0.5"], done.stdout + done.stderr
    return "torch.optim.AdaFisher after `import torch`"


def one_process(folder: Path) -> str:
    """The loss of a small model falls, with the defaults."""
    from adafisher_dist import AdaFisher

    module = model(torch.float32)
    first = held_out(module)
    train(module, AdaFisher(module.parameters(), lr=3e-2), range(400))
    last = held_out(module)
    assert last < first / 2, f"the loss went from {first:.3f} to {last:.3f}"
    return f"held-out loss {first:.3f} to {last:.3f} in 400 steps"


def numpy_steps(folder: Path) -> str:
    """A matrix whose rows share one block, beside DESIGN.md, section 2, in numpy and float64."""
    from adafisher_dist import AdaFisher

    lr, mu, rho, delta, eps, decay = 3e-2, 0.9, 0.97, 0.01, 1e-8, 0.01
    rng = np.random.default_rng(0)
    theta = rng.standard_normal((6, 5))
    rows, length = theta.shape
    p = nn.Parameter(torch.from_numpy(theta.copy()))
    optimizer = AdaFisher([p], lr=lr, momentum=mu, fisher_decay=rho, fisher_dtype=torch.float64)
    m, fisher, w = np.zeros_like(theta), np.zeros((length, length)), np.zeros((rows, 1))
    for t in range(1, 9):
        g = rng.standard_normal(theta.shape) * rng.uniform(0.1, 3, length)
        p.grad = torch.from_numpy(g.copy())
        optimizer.step()
        m = mu * m + (1 - mu) * g
        w = rho * w + (1 - rho) * np.mean(g**2, 1, keepdims=True)
        m_hat, w_hat = mu * m / (1 - mu**t) + (1 - mu) * g, w / (1 - rho**t)
        weighed = g / np.sqrt(w_hat)
        fisher = rho * fisher + (1 - rho) * weighed.T @ weighed / rows
        f_hat = fisher / (1 - rho**t)
        d = np.trace(f_hat) / length
        s = m_hat / np.sqrt(w_hat) @ inverse_root(f_hat / d + (delta + eps) * np.eye(length), delta + eps)
        u = np.sqrt(w_hat) / (np.sqrt(w_hat) + eps) * polar_factor(s)
        a = m_hat / (np.sqrt(w_hat * np.diag(f_hat) / d) + eps)
        theta = theta - lr * decay * theta - lr * u * np.linalg.norm(a) / np.linalg.norm(u)
    return expect_equal("8 steps and numpy", {"p": p.detach().numpy()}, {"p": theta}, 1e-12)


def inverse_root(a: np.ndarray, damping: float) -> np.ndarray:
    """A^(−1/2), as far as the package's steps of Newton and Schulz make it, by A's eigenvalues."""
    from adafisher_dist.numerics.factors import root_steps

    values, vectors = np.linalg.eigh(a)
    x = np.sqrt(values / np.linalg.norm(a))
    for first, third, fifth in root_steps(len(a), damping):
        x = first * x + third * x**3 + fifth * x**5
    return vectors * (x / np.sqrt(values)) @ vectors.T


def polar_factor(x: np.ndarray) -> np.ndarray:
    """The polar factor, as far as five steps with Jordan's coefficients make it."""
    x = x / np.linalg.norm(x)
    for _ in range(5):
        gram = x @ x.T
        x = (3.4445 * np.eye(len(x)) - 4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


def adamw(folder: Path) -> str:
    """Without blocks it is torch's AdamW."""
    from adafisher_dist import AdaFisher

    ours, theirs = model(torch.float64), model(torch.float64)
    settings = {"max_blocks": 0, "nesterov": False, "fisher_dtype": torch.float64}
    train(ours, AdaFisher(ours.parameters(), 1e-2, 0.9, fisher_decay=0.99, weight_decay=0.1, **settings), range(20))
    train(theirs, torch.optim.AdamW(theirs.parameters(), 1e-2, (0.9, 0.99), weight_decay=0.1), range(20))
    return expect_equal("20 steps with max_blocks=0 and torch's AdamW", weights(ours), weights(theirs), 1e-10)


def two_ranks(folder: Path) -> str:
    """DDP on two ranks trains like one process."""
    results = run_ranks(_train_ddp, 2, str(folder))
    assert all(np.array_equal(results[0][n], results[1][n]) for n in results[0]), "the two ranks differ"
    return expect_equal(f"{AFTER} steps on two ranks (DDP) and one", results[0], alone(AFTER), 1e-9)


def _train_ddp(rank: int, world: int, folder: str) -> Weights:
    from adafisher_dist import AdaFisher, save_checkpoint

    module = DistributedDataParallel(model(torch.float64))
    optimizer = AdaFisher(module.named_parameters(), **EXACT)
    train(module, optimizer, range(BEFORE), rank, world)
    save_checkpoint(f"{folder}/step{BEFORE}", module, optimizer, extra={"step": BEFORE})
    train(module, optimizer, range(BEFORE, AFTER), rank, world)
    return weights(module)


def resume_alone(folder: Path) -> str:
    """The checkpoint of two ranks goes on in one process."""
    from adafisher_dist import AdaFisher, load_checkpoint

    module = model(torch.float64)
    optimizer = AdaFisher(module.named_parameters(), **EXACT)
    step = load_checkpoint(folder, module, optimizer).extra["step"]  # `two_ranks` saved it
    train(module, optimizer, range(step, AFTER))
    return expect_equal("saved on two ranks, resumed in one process", weights(module), alone(AFTER), 1e-9)


def resume_fsdp2(folder: Path) -> str:
    """The same checkpoint goes on under FSDP2 on three ranks."""
    if not hasattr(torch.cpu.Stream, "record_event"):
        raise NotChecked(f"fully_shard of torch {torch.__version__} does not work on CPUs (torch 2.7 does)")
    found = run_ranks(_resume_fsdp2, 3, str(folder))[0]
    return expect_equal("saved under DDP on two ranks, resumed under FSDP2 on three", found, alone(AFTER), 1e-9)


def _resume_fsdp2(rank: int, world: int, folder: str) -> Weights:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    from adafisher_dist import AdaFisher, load_checkpoint

    module = fully_shard(model(torch.float64), mesh=init_device_mesh("cpu", (world,)))
    optimizer = AdaFisher(module.named_parameters(), **EXACT)
    step = load_checkpoint(folder, module, optimizer).extra["step"]
    train(module, optimizer, range(step, AFTER), rank, world)
    return weights(module)


def deepspeed_engines(folder: Path) -> str:
    """Engines on two ranks train like one process; DeepSpeed's own checkpoint resumes on one."""
    wanted = alone(AFTER, torch.float32, PARAMS)
    straight, resumed = (run_ranks(_train_stages, world, str(folder))[0] for world in (2, 1))
    for stage in STAGES:
        expect_equal(f"ZeRO-{stage}, two ranks and one process", straight[stage], wanted, 1e-3)
        expect_equal(f"ZeRO-{stage}, saved on two ranks, resumed on one", resumed[stage], wanted, 1e-3)
    return f"ZeRO-{STAGES[0]} to {STAGES[-1]}: two ranks and one process; saved on two ranks, resumed on one"


def _train_stages(rank: int, world: int, folder: str) -> dict[int, Weights]:
    """Two ranks train and save, one resumes."""
    import deepspeed
    from deepspeed.ops import __compatible_ops__

    __compatible_ops__["deepspeed_shm_comm"] = False  # else it is compiled at the first use
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
    assert "adafisher_dist.optimizer" not in sys.modules  # the entry point alone has to do
    results = {}
    for stage in STAGES:
        try:
            results[stage] = _train_stage(rank, world, stage, f"{folder}/zero{stage}")
        except Exception as error:
            raise RuntimeError(f"ZeRO stage {stage} on {world} ranks") from error
    return results


def _train_stage(rank: int, world: int, stage: int, folder: str) -> Weights:
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param

    config = {
        "train_batch_size": BATCH,
        "train_micro_batch_size_per_gpu": BATCH // world,
        "optimizer": {"type": "AdaFisher", "params": PARAMS},
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage},
        "steps_per_print": 1000,
    }
    engine, *_ = deepspeed.initialize(model=model(torch.float32), config=config, dist_init_required=False)
    start = engine.load_checkpoint(folder)[1]["step"] if world == 1 else 0
    for step in range(start, AFTER):
        if step == BEFORE and world > 1:
            engine.save_checkpoint(folder, client_state={"step": step})
        x, y = batch(step, rank, world, torch.float32)
        engine.backward(nn.functional.mse_loss(engine(x), y))
        engine.step()
    named = engine.module.named_parameters()
    return {n: (safe_get_full_fp32_param(p) if stage else p).detach().double().numpy().copy() for n, p in named}


# ---- the command ----


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--require-deepspeed", action="store_true", help="fail where DeepSpeed is not installed")
    required = arguments.parse_args().require_deepspeed

    import adafisher_dist

    print(f"Python {sys.version.split()[0]}, torch {torch.__version__}, numpy {np.__version__}")
    print(f"adafisher_dist {adafisher_dist.__version__} from {Path(adafisher_dist.__file__).parent}")
    checks = [entry_point, one_process, numpy_steps, adamw, two_ranks, resume_alone, resume_fsdp2]
    missing = importlib.util.find_spec("deepspeed") is None
    if missing:
        print(f"DeepSpeed is not installed{', and was required' if required else ', and not checked'}")
    else:
        print(f"DeepSpeed {importlib.metadata.version('deepspeed')}")
        checks.append(deepspeed_engines)
    counts = Counter(FAIL=int(missing and required))
    with tempfile.TemporaryDirectory() as folder:
        for check in checks:
            began = time.monotonic()
            try:
                mark, said = "ok", check(Path(folder))
            except NotChecked as reason:
                mark, said = "--", f"not checked: {reason}"
            except Exception:
                mark, said = "FAIL", "\n" + traceback.format_exc()
            counts[mark] += 1
            print(f"{mark:4} {check.__name__:18} {time.monotonic() - began:5.1f} s  {said}", flush=True)
    print(f"{counts['ok']} passed, {counts['FAIL']} failed, {counts['--']} skipped")
    return int(counts["FAIL"] > 0)


if __name__ == "__main__":
    sys.exit(main())
