"""Run a test's function on several gloo processes, and show the failing rank's own traceback."""

from __future__ import annotations

import multiprocessing as mp
import os
import socket
import tempfile
import traceback
from collections.abc import Callable, Collection
from datetime import timedelta
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

from tally import Hung


def run_ranks(
    fn: Callable[..., Any], world: int, *args: Any, timeout: float = 120, deepspeed: bool = False,
    group_timeout: float | None = None, store: str = "file", lost: Collection[int] = (),
    killed: Collection[int] = (),
) -> list[Any]:  # fmt: skip
    """Call `fn(rank, world, *args)` on `world` processes of a gloo group; returns all results.

    `fn` and its result must be picklable, so a function at the top of a test module that returns
    numbers, numpy arrays or CPU tensors turned into them. A rank that raises fails the test with
    its own traceback; one that hangs is named.

    `group_timeout` goes to init_process_group, in seconds. `store` is "file", or "tcp", which rank
    0's process keeps. Nobody waits for the ranks in `lost`, which a test kills, stops or keeps
    away: None stands for what they return. Those in `killed` may be killed, and are waited for.
    """
    context = mp.get_context("forkserver")
    _start_server(context)
    with tempfile.TemporaryDirectory() as folder:
        where = f"file://{folder}/store" if store == "file" else f"tcp://127.0.0.1:{free_port()}"
        processes, ends = [], []
        for rank in range(world):
            mine, theirs = context.Pipe(duplex=False)
            process = context.Process(
                target=_main,
                args=(fn, rank, world, (deepspeed, group_timeout, where, bool(lost or killed)), theirs, args),
                daemon=True,
            )
            process.start()
            theirs.close()
            processes.append(process)
            ends.append(mine)
        try:
            return _collect(processes, ends, timeout, lost, killed)
        finally:
            for process in processes:
                process.kill()
                process.join()


def _start_server(context: Any) -> None:
    """Start the process that ranks fork from, if needed. It finds modules by Python's path."""
    context.set_forkserver_preload(["preloaded"])
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *([before] if before else [])])
    try:
        forkserver.ensure_running()
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


def free_port() -> int:
    """One on which nobody listens now: a number written into a test may be another program's."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _collect(
    processes: list[Any], ends: list[Any], timeout: float, lost: Collection[int], killed: Collection[int]
) -> list[Any]:
    from multiprocessing.connection import wait
    from time import monotonic

    results: dict[int, Any] = {}
    failures: dict[int, str] = {}
    pending = {end: rank for rank, end in enumerate(ends) if rank not in lost}
    deadline = monotonic() + timeout
    while pending:
        # After a first failure the others may wait for it for ever: a moment for their own errors,
        # then stop.
        ready = wait(list(pending), max(0.0, (min(deadline, monotonic() + 5) if failures else deadline) - monotonic()))
        if not ready:
            break
        for end in ready:
            rank = pending.pop(end)
            try:
                ok, value = end.recv()
            except EOFError:
                processes[rank].join(5)
                ok, value = rank in killed, None
                if not ok:
                    value = f"died without a word, exit code {processes[rank].exitcode}"
            (results if ok else failures)[rank] = value
    if failures:
        raise AssertionError(
            "\n".join(f"--- rank {rank} of {len(ends)} ---\n{text}" for rank, text in sorted(failures.items()))
        )
    if pending:
        raise Hung(f"hung for {timeout} s: ranks {sorted(pending.values())} of {len(ends)}")
    return [results.get(rank) for rank in range(len(ends))]


def _main(fn: Any, rank: int, world: int, how: Any, end: Any, args: tuple[Any, ...]) -> None:
    deepspeed, group_timeout, where, some_are_lost = how
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "OMP_NUM_THREADS": "1"}
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    try:
        limit = None if group_timeout is None else timedelta(seconds=group_timeout)
        if deepspeed:
            _init_deepspeed(where, rank, world, limit)
        else:
            dist.init_process_group("gloo", init_method=where, rank=rank, world_size=world, timeout=limit)
        value = fn(rank, world, *args)
        if not some_are_lost:
            dist.barrier()
            dist.destroy_process_group()
        end.send((True, value))
    except BaseException:
        end.send((False, traceback.format_exc()))


def _init_deepspeed(where: str, rank: int, world: int, limit: timedelta | None) -> None:
    os.environ["DS_ACCELERATOR"] = "cpu"
    import logging

    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    deepspeed.init_distributed(
        dist_backend="gloo", init_method=where, rank=rank, world_size=world, verbose=False, auto_mpi_discovery=False,
        **({} if limit is None else {"timeout": limit}),
    )  # fmt: skip
