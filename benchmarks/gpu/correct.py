"""Is the package right on GPUs? Compares nearly all of it with tests/oracle.py; one line a check.

    python benchmarks/gpu/correct.py                        # one GPU
    launch/check_gpus.sh                                    # all GPUs of this machine, by torchrun
    python benchmarks/gpu/correct.py --rehearse --only comm 'zero1-*'

With several ranks every check runs on all of them, and the first one writes. `--only NAME …`
chooses checks; a name may have wildcards. `--show FILE` prints what a run has written as a report
to paste, and nothing else is done. The exit status is 1 if a check failed. In the environment,
PART_SECONDS: a check that would begin later is left out.

The default process group has NCCL alone, as most trainings have; some checks use another one, of
gloo and NCCL. It needs pytest and hypothesis, and DeepSpeed for what is named zero…: those checks
are left out where it is missing.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import logging
import os
import shutil
import socket
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

import common_gpu
from correct_runner import TIMEOUT, Check, Here, Report, line, run_checks

SECONDS, REHEARSAL_SECONDS = 200, 300


def main() -> int:
    own = argparse.ArgumentParser(add_help=False)
    own.add_argument("--only", nargs="+", default=[])
    own.add_argument("--show", type=Path)
    chosen, rest = own.parse_known_args()
    if chosen.show is not None:
        return show(chosen.show)
    sys.argv[1:] = rest
    given = common_gpu.options("correct", __doc__, SECONDS, REHEARSAL_SECONDS)
    missing = [name for name in ("numpy", "pytest", "hypothesis") if find_spec(name) is None]
    if missing:
        raise SystemExit(f"correct: Python has no {', '.join(missing)}. python -m pip install {' '.join(missing)}")
    prepare(given.rehearse)
    from correct_checks import all_checks

    checks = select(all_checks(), chosen.only)
    here = start(given.rehearse, limit=min(600.0, 0.7 * given.seconds))
    code = check(checks, here, given)
    leave(code, here)


def prepare(rehearsing: bool) -> None:
    """What has to be set before DeepSpeed and cuBLAS are loaded."""
    warnings.simplefilter("ignore")  # those of torch and DeepSpeed of each other
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ["DS_ACCELERATOR"] = "cpu" if rehearsing else "cuda"
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # the same bits in the same training
    import torch

    torch.set_num_threads(1)
    logging.getLogger("adafisher_dist").addHandler(logging.NullHandler())  # what it warns of is provoked
    torch.backends.cudnn.deterministic = True


def select(checks: Mapping[str, Check], only: Sequence[str]) -> dict[str, Check]:
    """Those of these names; all where none is given."""
    unknown = [pattern for pattern in only if not fnmatch.filter(checks, pattern)]
    if unknown:
        raise SystemExit(f"correct: there is no check {', '.join(unknown)}. There are: {', '.join(checks)}")
    return {name: work for name, work in checks.items() if not only or any(fnmatch.fnmatch(name, p) for p in only)}


def start(rehearsing: bool, limit: float) -> Here:
    """Join the other ranks, by torchrun's environment, or be the only one."""
    import torch
    import torch.distributed as dist

    if "RANK" not in os.environ:
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        os.environ.update(alone, MASTER_PORT=str(_free_port()))
        for library in ("GLOO", "NCCL"):  # the machine may have no network
            os.environ.setdefault(f"{library}_SOCKET_IFNAME", "lo")
    device, local_rank = torch.device("cpu"), int(os.environ["LOCAL_RANK"])
    if not rehearsing:
        if local_rank >= torch.cuda.device_count():
            raise SystemExit(
                f"correct: local rank {local_rank}, but {torch.cuda.device_count()} GPUs: start fewer ranks"
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    dist.init_process_group("gloo" if rehearsing else "nccl", timeout=timedelta(seconds=TIMEOUT))
    rank, world = dist.get_rank(), dist.get_world_size()
    folder = [tempfile.mkdtemp(prefix="adafisher-checks-")] if rank == 0 else [""]
    if world > 1:
        control = dist.new_group(backend="gloo", timeout=timedelta(seconds=TIMEOUT))
        dist.broadcast_object_list(folder, 0, control)
    if not Path(folder[0]).is_dir():
        raise SystemExit(f"correct: rank {rank} does not see {folder[0]} of rank 0: start all ranks on one machine")
    return Here(rank, world, device, Path(folder[0]), limit)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def check(checks: Mapping[str, Check], here: Here, given: argparse.Namespace) -> int:
    """Run them, and keep what they found in correct.json."""
    results = common_gpu.Results(given, ranks=here.world, **versions(), checks=[]) if here.rank == 0 else None
    before: list[dict[str, Any]] = list(results.content["checks"]) if results is not None else []
    if results is not None and results.content.get("running"):
        said = "the run before this one ended in it, without a word"
        before.append({"name": results.content["running"], "ok": False, "seconds": 0.0, "said": said})

    def save(found: list[dict[str, Any]], running: str | None) -> None:
        assert results is not None
        results.content.update(checks=before + found, running=running)
        results.save()

    names = _agreed([entry["name"] for entry in before], here)
    report = Report(here.rank, save)
    left = {name: work for name, work in checks.items() if name not in names}
    code = run_checks(left, here, report, left=lambda: common_gpu.left(given))
    if results is not None:
        counts = Counter(entry["ok"] for entry in results.content["checks"])
        print(f"{counts[True]} passed, {counts[False]} failed, {counts[None]} not checked: {results.path}", flush=True)
        results.finish()
        code = int(counts[False] > 0)
    return code


def _agreed(value: Any, here: Here) -> Any:
    """The first rank's, on all."""
    import torch.distributed as dist

    values = [value]
    if here.world > 1:
        dist.broadcast_object_list(values, 0, dist.new_group(backend="gloo", timeout=timedelta(seconds=TIMEOUT)))
    return values[0]


def versions() -> dict[str, str]:
    """What common_gpu's head does not tell."""
    import torch

    found = {}
    for name, package in (("deepspeed", "deepspeed"), ("adafisher_dist", "adafisher-dist")):
        try:
            found[name] = version(package)
        except PackageNotFoundError:
            found[name] = "not installed"
    nccl = torch.cuda.nccl.version() if torch.cuda.is_available() else ()
    return {**found, "nccl": ".".join(map(str, nccl)) or "none"}


def leave(code: int, here: Here) -> NoReturn:
    """Without Python's own shutdown, as launch/ranks.py tells; a rank that failed has told so."""
    import torch.distributed as dist

    if here.rank == 0:
        shutil.rmtree(here.folder, ignore_errors=True)
    try:
        dist.destroy_process_group()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


# ---- what to report ----


def show(path: Path) -> int:
    """Print a run's report; 0 if it passed, 1 if it did not, 2 where there is none."""
    if not path.exists():
        print(f"There is no {path}: no rank has come as far as to write it. What is above tells why.")
        return 2
    found = json.loads(path.read_text(encoding="utf-8"))
    failed = [entry for entry in found["checks"] if entry["ok"] is False]
    whole = found["ended"] == common_gpu.FINISHED and not failed
    print("\n".join(["", "---- please report from here ----", *_block(found, failed), "---- to here ----", ""]))
    print(f"All of it is in {path.resolve()}.")
    if found["rehearsal"]:
        print("This was a rehearsal on CPUs: it says nothing of any GPU.")
    else:
        print(
            "Please open an issue in the repository that you have adafisher_dist from, and paste the block there",
            end="",
        )
        print(": nobody may have run it on such GPUs yet." if whole else "; attach correct.json.")
    return int(not whole)


def _block(found: Mapping[str, Any], failed: Sequence[Mapping[str, Any]]) -> list[str]:
    keys = ("card", "driver", "cuda", "nccl", "torch", "deepspeed", "adafisher_dist", "python", "commit")
    lines = [f"{key:15} {found.get(key, 'unknown')}" for key in (*keys, "ranks", "command", "date")]
    counts = Counter(entry["ok"] for entry in found["checks"])
    lines += ["", f"{counts[True]} checks passed, {counts[False]} failed, {counts[None]} were not made"]
    if found["ended"] != common_gpu.FINISHED:
        lines.append(f"The run did not come to its end. It was in: {found.get('running') or 'between two checks'}")
    for entry in found["checks"]:
        lines.append(line({**entry, "said": ""}).split("\n")[0].rstrip() if entry["ok"] is False else line(entry)[:160])
    for entry in failed:
        last = [text for text in entry["said"].splitlines() if text.strip()][-8:]
        lines += ["", f"{entry['name']} ended with", *(f"    {text}" for text in last)]
    return lines


if __name__ == "__main__":
    sys.exit(main())
