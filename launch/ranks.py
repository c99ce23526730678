"""Start and end of the process group, on CPUs and GPUs, under torchrun, mpirun or neither."""

from __future__ import annotations

import os
import socket
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn, TypeVar

import torch
import torch.distributed as dist
from settings import UsageError
from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Place:
    """Where this process stands among the ranks."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def rank() -> int:
    """This process's rank as its launcher says, before there is a process group."""
    return int(os.environ.get("RANK") or os.environ.get("OMPI_COMM_WORLD_RANK") or 0)


def start(device: str) -> Place:
    """Join the other ranks: nccl on GPUs, gloo on CPUs.

    Args:
        device: "cpu", "cuda", or "auto" for GPUs where there are any.

    Raises:
        UsageError: there is no GPU, or fewer than ranks on this machine.
    """
    local_rank = int(os.environ.get("LOCAL_RANK") or os.environ.get("OMPI_COMM_WORLD_LOCAL_RANK") or 0)
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE") or 1)
    _refuse_unknown_launchers()
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: torch sees no GPU here. Use --device cpu, or a CUDA build of torch.")
    if device == "cpu" or not torch.cuda.is_available():
        os.environ["DS_ACCELERATOR"] = "cpu"
        place, backend = torch.device("cpu"), "gloo"
        if local_size > 1 and "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(1)
    else:
        if local_size > torch.cuda.device_count():
            raise UsageError(
                f"{local_size} ranks on this machine, but {torch.cuda.device_count()} GPUs: start as many ranks as"
                " GPUs, or use --device cpu."
            )
        place, backend = torch.device("cuda", local_rank), "nccl"
        torch.cuda.set_device(place)
    if "RANK" not in os.environ and "OMPI_COMM_WORLD_SIZE" not in os.environ:
        os.environ.update(
            RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(_free_port())
        )

    # DeepSpeed calls by their old names what torch 2.13 renamed.
    warnings.filterwarnings("ignore", "`torch.distributed", FutureWarning)

    import deepspeed  # reads DS_ACCELERATOR when it is imported

    if place.type == "cpu":
        # Otherwise init_distributed compiles a shared-memory operator, which gloo does without.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend=backend, verbose=False)
    return Place(dist.get_rank(), dist.get_world_size(), place)


def leave(code: int) -> NoReturn:
    """Leave the group and end this process, for ends that all ranks reach alike.

    DeepSpeed's references keep the group alive past destroy_process_group, and a thread of it that
    is still busy while Python shuts down aborts the process after a good run (signal 6, seen in 1
    of 10 runs with 4 ranks at stage 0). So Python's own shutdown is left out.
    """
    if dist.is_initialized():
        dist.destroy_process_group()
    if (
        code == 0 and "mpi4py.MPI" in sys.modules
    ):  # under mpirun, which kills the other ranks of one that leaves without
        sys.modules["mpi4py.MPI"].Finalize()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def run_on_all_ranks(prepare: Callable[[], T]) -> T:
    """Call `prepare` on every rank; what fails on one rank fails on all.

    Raises:
        UsageError: `prepare` raised a ValueError or OSError somewhere; tells of the first such
            rank.
    """
    result, problem = None, None
    try:
        result = prepare()
    except (ValueError, OSError) as error:
        problem = str(error)
    problems = gather(problem)
    for number, found in enumerate(problems):
        if found is not None:
            where = "" if len(set(problems)) == 1 else f" (rank {number} of {len(problems)})"
            raise UsageError(found + where)
    return result  # type: ignore[return-value]  # no problem, so there is a result


def gather(value: T) -> list[T]:
    """Every rank's `value`, a small object, on every rank."""
    values: list[T] = [value] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def total(value: Tensor) -> Tensor:
    """The sum of a tensor over the ranks."""
    result = value.detach().clone()
    dist.all_reduce(result)
    return result


def _refuse_unknown_launchers() -> None:
    """Without this, several processes would each train alone, and write to the same folder."""
    if "RANK" in os.environ or "OMPI_COMM_WORLD_SIZE" in os.environ:
        return
    for name in ("PMI_SIZE", "SLURM_NTASKS"):
        if int(os.environ.get(name) or 1) > 1:
            raise UsageError(
                f"{name} is {os.environ[name]}, but RANK is not set: AdaFisher's script knows torchrun and Open MPI's"
                " mpirun. Start torchrun on each node instead."
            )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
