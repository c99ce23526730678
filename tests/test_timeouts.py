"""No rank waits longer than the process group's timeout, and the missing rank is named.

A rank that goes on with its part may take longer than that: the others wait.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from checkpoint_runs import Run
from engines import config, engine_of
from engines import train as train_engine
from models import batch, model
from ranks import run_ranks
from torch import nn
from torch.distributed import distributed_c10d
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from adafisher_dist import AdaFisher, CheckpointError, ds, save_checkpoint
from adafisher_dist.checkpoint import open_checkpoint, reader, saving, writer
from adafisher_dist.checkpoint.checksums import checksum_of
from adafisher_dist.checkpoint.read_ahead import ReadAhead
from adafisher_dist.comm import collectives, host_groups
from adafisher_dist.comm.timeouts import Meetings, meetings, timeout_of
from adafisher_dist.stepping.metrics import Meter

pytestmark = pytest.mark.dist

TIMEOUT = 5.0
LOST = 1  # the rank that dies, stops or stays away


def caught(work: Callable[[], Any]) -> tuple[float, str, str]:
    """How long it took to fail, and with what; the type is empty where it did not."""
    began = time.monotonic()
    try:
        work()
    except Exception as error:
        return time.monotonic() - began, type(error).__name__, str(error)
    return time.monotonic() - began, "", ""


def disappear(how: str) -> None:
    """Let this rank be killed, stopped, or elsewhere for the rest of the test."""
    if how == "away":
        time.sleep(1000)
    os.kill(os.getpid(), signal.SIGKILL if how == "killed" else signal.SIGSTOP)


def disappear_in(owner: Any, name: str, how: str, at_call: int = 1) -> None:
    """Let this rank disappear when it calls the function for the n-th time."""
    real, calls = getattr(owner, name), [0]

    def there(*arguments: Any, **more: Any) -> Any:
        calls[0] += 1
        if calls[0] == at_call:
            disappear(how)
        return real(*arguments, **more)

    setattr(owner, name, there)


def check(answers: list[Any], error: str, *words: str, limit: float = TIMEOUT + 5) -> None:
    """Every rank but the lost one ended in time, and names that one alone."""
    for rank, answer in enumerate(answers):
        if rank != LOST:
            seconds, kind, text = answer
            assert kind == error, f"rank {rank}: {kind} {text}"
            assert seconds < limit, f"rank {rank} waited {seconds:.1f} s"
            assert f"Rank {LOST} " in text and "Ranks" not in text, f"rank {rank}: {text}"
            assert all(word in text for word in words), f"rank {rank}: {text}"


# ---- steps ----


def in_a_step(rank: int, world: int, how: str, where: str) -> Any:
    run = Run().train(1)
    if rank == LOST and where == "before":
        disappear(how)
    if rank == LOST and where == "gather":
        disappear_in(collectives, "gather", how)
    if where == "host":  # as under NCCL, where the hosts agree over a group of their own
        collectives.join = lambda *_: collectives.Group(dist.group.WORLD, rank, world, "cuda:nccl")
        run = Run()
        if rank == LOST:
            disappear(how)
    return caught(lambda: run.train(2))


@pytest.mark.parametrize(
    ("how", "where"), [("killed", "before"), ("stopped", "before"), ("stopped", "gather"), ("away", "host")]
)
def test_a_step(how: str, where: str) -> None:
    answers = run_ranks(in_a_step, 3, how, where, group_timeout=TIMEOUT, lost=[LOST], timeout=90)
    check(answers, "RuntimeError", "a step of AdaFisher")


def with_deepspeed(rank: int, world: int, stage: int) -> Any:
    engine = engine_of(config(stage, world))
    train_engine(engine, 0, 1, rank, world)
    if rank == LOST:
        disappear_in(AdaFisher, "step", "stopped")
    real, answers = AdaFisher.step, []

    def step(self: AdaFisher, *arguments: Any) -> Any:
        answers.append(caught(lambda: real(self, *arguments)))
        raise SystemExit

    AdaFisher.step = step  # type: ignore[method-assign]
    with pytest.raises(SystemExit):
        train_engine(engine, 1, 2, rank, world)
    return answers[0]


@pytest.mark.deepspeed
@pytest.mark.parametrize("stage", [0, 1, 3])
def test_a_step_under_deepspeed(stage: int) -> None:
    """Its groups are clones of the world, made with torch's default of half an hour."""
    answers = run_ranks(with_deepspeed, 2, stage, group_timeout=TIMEOUT, lost=[LOST], deepspeed=True, timeout=90)
    check(answers, "RuntimeError", "a step of AdaFisher within 5 s")


def with_hsdp(rank: int, world: int) -> Any:
    module = fully_shard(model(), mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard")))
    optimizer = AdaFisher(module.named_parameters(), block_size=8)
    x, y = batch(0, rank, world)
    for last in (False, True):
        nn.functional.mse_loss(module(x), y).backward()
        if rank == LOST and last:
            disappear("stopped")
        answer = caught(optimizer.step)
    return answer


def test_a_step_under_hsdp() -> None:
    """The same for the groups of DeviceMesh; not every rank shares one with the lost rank."""
    answers = run_ranks(with_hsdp, 4, group_timeout=TIMEOUT, lost=[LOST], timeout=120)
    for rank in (0, 2, 3):
        seconds, kind, text = answers[rank]
        assert kind == "RuntimeError" and seconds < TIMEOUT + 5, (seconds, kind, text)
    assert "Rank 1 did not come" in answers[0][2] and "Rank 1 did not come" in answers[3][2], answers


def consolidation(rank: int, world: int) -> Any:
    run = Run().train(1)
    if rank == LOST:
        disappear("away")
    return caught(lambda: run.optimizer.consolidate_state_dict(to=None))


def test_consolidate_state_dict() -> None:
    answers = run_ranks(consolidation, 3, group_timeout=TIMEOUT, lost=[LOST], timeout=90)
    check(answers, "RuntimeError", "did not come to consolidate_state_dict() within 5 s")


def metrics(rank: int, world: int) -> Any:
    run = Run()
    run.optimizer.report_metrics(lambda step, found: None, 1)
    run.train(1, 2)
    if rank == LOST:
        disappear_in(Meter, "_read", "stopped")
    return caught(lambda: run.train(3))


def test_metrics() -> None:
    answers = run_ranks(metrics, 3, group_timeout=TIMEOUT, lost=[LOST], timeout=90)
    check(answers, "RuntimeError", "a step of AdaFisher within 5 s")


# ---- saves and loads ----


def in_a_save(rank: int, world: int, folder: str, scene: str) -> Any:
    root = Path(folder)
    run = Run().train(1)
    if not scene.startswith("first"):
        run.save(root / "first", 1)
    asynchronous = "background" in scene
    if rank == LOST:
        if scene in ("first, killed", "first, away"):
            disappear(scene.removeprefix("first, "))
        if scene in ("second, away", "next to one in the background"):
            if asynchronous:
                run.save(root / "second", 1, asynchronous=True).wait()
            disappear("away")
        disappear_in(writer, "as_bytes", "away" if scene == "stuck" else "stopped", at_call=3)
        if scene == "gathered":
            disappear_in(saving, "_about", "stopped")
        if scene == "planned":
            disappear_in(writer.RangeSavePlanner, "create_local_plan", "stopped")
    if scene == "in the background":
        going = run.save(root / "second", 1, asynchronous=True)
        return caught(going.wait)
    if scene == "next to one in the background":
        run.save(root / "second", 1, asynchronous=True)
    return caught(lambda: run.save(root / "third", 1))


SAVES = {
    "first, killed": "did not come to a save or load within 5 s",
    "first, away": "did not come to a save or load within 5 s",
    "second, away": "did not come to a save or load within 5 s",
    "stopped": "within 5 s (the timeout of the process group)",
    "stuck": "within 5 s (the timeout of the process group)",
    "gathered": "did not come to a save or load within 5 s",
    "planned": "a save or load within 5 s",
    "in the background": "within 5 s (the timeout of the process group)",
    "next to one in the background": "did not come to a save or load within 5 s",
}


@pytest.mark.parametrize("scene", SAVES)
def test_a_save(scene: str, tmp_path: Path) -> None:
    answers = run_ranks(in_a_save, 3, str(tmp_path), scene, group_timeout=TIMEOUT, lost=[LOST], timeout=90)
    check(answers, "CheckpointError", SAVES[scene])
    kept = {path.name for path in tmp_path.iterdir() if not path.name.startswith(".")} - {"latest"}
    expected = {"first"} if not scene.startswith("first") else set()
    assert kept == expected | ({"second"} if scene == "next to one in the background" else set())


def in_a_load(rank: int, world: int, folder: str, how: str, where: str) -> Any:
    run = Run().train(1)
    run.save(Path(folder) / "first", 1)
    if rank == LOST and where == "before":
        disappear(how)
    elif where != "before":
        owner, name = {"verify": (open_checkpoint, "checksum_of"), "read": (reader._Reads, "_read")}[where]
        assert hasattr(owner, name)  # the lost rank's own errors are not heard of
        if rank == LOST:
            disappear_in(owner, name, how)
    return caught(lambda: run.load(Path(folder)))


@pytest.mark.parametrize(
    ("how", "where"),
    [("away", "before"), ("stopped", "verify"), ("killed", "verify"), ("stopped", "read"), ("killed", "read")],
)
def test_a_load(how: str, where: str, tmp_path: Path) -> None:
    answers = run_ranks(in_a_load, 3, str(tmp_path), how, where, group_timeout=TIMEOUT, lost=[LOST], timeout=90)
    check(answers, "CheckpointError", "a save or load")
    assert all("incomplete" in answers[rank][2] for rank in (0, 2)) == (where == "read")


def with_deepspeed_saved(rank: int, world: int, folder: str) -> Any:
    engine = engine_of(config(1, world))
    train_engine(engine, 0, 1, rank, world)
    ds.save_checkpoint(engine, folder)
    if rank == LOST:
        disappear("away")
    return caught(lambda: ds.load_checkpoint(engine, folder))


@pytest.mark.deepspeed
def test_a_load_under_deepspeed(tmp_path: Path) -> None:
    answers = run_ranks(
        with_deepspeed_saved, 2, str(tmp_path), group_timeout=TIMEOUT, lost=[LOST], deepspeed=True, timeout=90
    )
    check(answers, "CheckpointError", "did not come to a save or load within 5 s")


def the_store_is_gone(rank: int, world: int, folder: str, made: bool) -> Any:
    run = Run().train(1)
    if made:
        run.save(Path(folder) / "first", 1)
    if rank == 0:
        disappear("stopped")
    return caught(lambda: run.save(Path(folder) / "second", 1))


@pytest.mark.parametrize("made", [False, True], ids=["first", "second"])
def test_the_rank_that_keeps_the_store_is_stopped(made: bool, tmp_path: Path) -> None:
    """Then nobody can ask who came; but nobody waits for the answer."""
    answers = run_ranks(
        the_store_is_gone, 3, str(tmp_path), made, store="tcp", group_timeout=TIMEOUT, lost=[0], timeout=90
    )
    for seconds, kind, text in answers[1:]:
        assert kind == "CheckpointError" and seconds < TIMEOUT + 5, (seconds, kind, text)
        assert "A rank (which one is not known: " in text and "rank 0" in text, text


# ---- slow, and at work ----


def slowly(rank: int, world: int, folder: str) -> dict[str, float]:
    """Rank 1 takes some 1.5 times the timeout for each part of a save and a load, in pieces."""
    run = Run().train(1)
    run.save(Path(folder) / "first", 1)
    seconds: dict[str, float] = {}

    def timed(name: str, work: Callable[[], Any]) -> Any:
        began = time.monotonic()
        result = work()
        seconds[name] = time.monotonic() - began
        return result

    def slow(owner: Any, name: str, calls: int) -> Callable[[], None]:
        real = getattr(owner, name)

        def there(*arguments: Any) -> Any:
            time.sleep(3 * TIMEOUT / calls)
            return real(*arguments)

        if rank == LOST:
            setattr(owner, name, there)
        return lambda: setattr(owner, name, real)

    pieces = len(saving._ranges(saving_of(run), []))
    fast = slow(writer, "as_bytes", pieces)
    timed("save", lambda: run.save(Path(folder) / "second", 1))
    going = timed("start", lambda: run.save(Path(folder) / "third", 1, asynchronous=True))
    timed("background", lambda: run.save(Path(folder) / "fourth", 1))
    assert going.done()
    fast()
    fast = slow(saving, "_copied", pieces)
    timed("copy", lambda: run.save(Path(folder) / "fifth", 1, asynchronous=True).wait())
    fast()
    fast = slow(open_checkpoint.OpenCheckpoint, "read_at", pieces)
    timed("load", lambda: run.load(Path(folder) / "fifth"))
    fast()
    if rank == LOST:  # a file as long as one that takes three timeouts to read

        def long(handle: int, nbytes: int) -> int:
            with ReadAhead() as ahead:
                list(ahead.in_order(lambda _: time.sleep(TIMEOUT / 2), range(12)))  # two at a time
            return checksum_of(handle, nbytes)

        open_checkpoint.checksum_of = long
    timed("verify", lambda: run.load(Path(folder) / "fifth"))
    return seconds


def saving_of(run: Run) -> Any:
    from adafisher_dist.checkpoint import target_of

    return target_of(run.module, run.optimizer, None)


@pytest.mark.slow
def test_a_slow_rank_that_goes_on_is_waited_for(tmp_path: Path) -> None:
    answers = run_ranks(slowly, 2, str(tmp_path), group_timeout=TIMEOUT, timeout=280)
    for seconds in answers:
        for part in ("save", "background", "copy", "load", "verify"):
            assert seconds[part] > 2 * TIMEOUT, (part, seconds)
        assert seconds["start"] < TIMEOUT


def slow_writer(rank: int, world: int, folder: str) -> float:
    run = Run().train(1)
    pieces = len(saving._ranges(saving_of(run), []))
    real = writer.as_bytes

    def slow(tensor: Any) -> Any:
        time.sleep(3 * 2.0 / pieces)
        return real(tensor)

    if rank == LOST:
        writer.as_bytes = slow
    began = time.monotonic()
    run.save(Path(folder) / "first", 1)
    seconds = time.monotonic() - began
    assert run.load(Path(folder)) == 1
    return seconds


def test_a_slow_writer_that_goes_on_is_waited_for(tmp_path: Path) -> None:
    assert all(seconds > 2 * 2.0 for seconds in run_ranks(slow_writer, 3, str(tmp_path), group_timeout=2.0, timeout=90))


def stuck_writer(rank: int, world: int, folder: str) -> Any:
    """It goes on for longer than the timeout, and then no more; another one goes on."""
    run = Run().train(1)
    run.save(Path(folder) / "first", 1)
    pieces = len(saving._ranges(saving_of(run), []))
    real, calls = writer.as_bytes, [0]

    def stuck(tensor: Any) -> Any:
        calls[0] += 1
        time.sleep(1000 if rank == LOST and calls[0] == pieces else 6 / (pieces - 1))
        return real(tensor)

    if rank > 0:
        writer.as_bytes = stuck
    began = time.monotonic()
    caught_ = caught(lambda: run.save(Path(folder) / "second", 1))
    return began, caught_


def test_a_writer_that_comes_no_further_is_named(tmp_path: Path) -> None:
    answers = run_ranks(stuck_writer, 3, str(tmp_path), group_timeout=TIMEOUT, lost=[LOST], timeout=90)
    check([answer and answer[1] for answer in answers], "CheckpointError", "made no progress", limit=6 + TIMEOUT + 5)
    assert (tmp_path / "first").is_dir() and not (tmp_path / "second").exists()


def late(rank: int, world: int, folder: str, made: bool) -> list[Any]:
    """Rank 1 comes to a save after the others have given up; the next save finds all of them."""
    root = Path(folder)
    run = Run().train(1)
    if made:
        run.save(root / "first", 1)
    if rank == LOST:
        time.sleep(TIMEOUT + 3)
    answers = [caught(lambda: run.save(root / "late", 1))]
    (root / f"rank{rank}").touch()
    while len(list(root.glob("rank*"))) < world:
        time.sleep(0.1)
    answers.append(caught(lambda: run.save(root / "whole", 1)))
    return answers


@pytest.mark.parametrize("made", [False, True], ids=["first", "second"])
def test_saves_go_on_when_a_late_rank_is_there_again(made: bool, tmp_path: Path) -> None:
    for rank, (first, last) in enumerate(run_ranks(late, 2, str(tmp_path), made, group_timeout=TIMEOUT, timeout=120)):
        assert first[1] == "CheckpointError" and first[0] < TIMEOUT + 5, (rank, first)
        assert last[1] == "", (rank, last)
    assert (tmp_path / "whole").is_dir() and not (tmp_path / "late").exists()


# ---- what it is made of ----


def of_backend(group: Any) -> float:
    return group._get_backend(torch.device("cpu")).options._timeout.total_seconds()


def timeouts(rank: int, world: int, folder: str) -> dict[str, float]:
    found = {"world": timeout_of(None), "backend": of_backend(dist.group.WORLD)}
    other = dist.new_group([0, 1], timeout=timedelta(seconds=77))
    plain = dist.new_group([0, 1])
    mesh = init_device_mesh("cpu", (1, world), mesh_dim_names=("a", "b"))
    found |= {"other": timeout_of(other), "plain": timeout_of(plain), "mesh": timeout_of(mesh["b"].get_group())}
    module = model()
    optimizer = AdaFisher(module.parameters(), process_group=other)
    x, y = batch(0, 0, 1)
    nn.functional.mse_loss(module(x), y).backward()
    optimizer.step()
    Run().train(1).save(Path(folder) / "world", 1)
    save_checkpoint(Path(folder) / "other", module, optimizer)
    found["controls"] = sorted({of_backend(known.handle) for _, known in host_groups._host_groups.values()})
    step = host_groups.host_group(range(world), dist.group.WORLD)
    found["step"] = of_backend(step.handle)
    save = host_groups.host_group(range(world), None, "a save or load", CheckpointError)
    found["apart"] = step.handle is not save.handle and step.handle is not dist.group.WORLD
    dist.destroy_process_group()
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/again", rank=rank, world_size=world, timeout=timedelta(seconds=44)
    )
    found["again"] = of_backend(host_groups.host_group(None, None).handle)
    dist.barrier()
    return found


def test_every_group_has_the_timeout_of_the_one_that_it_stands_for(tmp_path: Path) -> None:
    for found in run_ranks(timeouts, 2, str(tmp_path), group_timeout=33):
        assert (found["world"], found["backend"], found["other"]) == (33, 33, 77)
        assert (found["plain"], found["mesh"]) == (33, 33)
        assert (found["step"], found["again"], found["controls"]) == (33, 44, [33, 77])
        assert found["apart"], "a save in the background and the steps beside it would meet in one group"


def test_what_torch_keeps_a_timeout_in() -> None:
    """Private names that `waiting` reads; where they are missing, torch's defaults would count."""
    assert run_ranks(names_of_torch, 1, group_timeout=12) == [True]


def names_of_torch(rank: int, world: int) -> bool:
    world_group = dist.group.WORLD
    assert world_group is not None
    backends = [world_group._get_backend(device) for device in world_group._device_types]
    assert {backend.name() for backend in backends} == {"gloo"}
    assert {backend.options._timeout for backend in backends} == {timedelta(seconds=12)}
    assert distributed_c10d._get_default_timeout("gloo") == timedelta(minutes=30)
    store = distributed_c10d.PrefixStore("test", distributed_c10d._get_default_store())
    store.set("a", "1")
    assert store.check(["a"]) and not store.check(["b"]) and store.delete_key("a") and not store.check(["a"])
    if dist.is_nccl_available():
        assert distributed_c10d._get_default_timeout("nccl") == timedelta(minutes=10)
        assert dist.ProcessGroupNCCL.Options()._timeout == timedelta(minutes=10)
        assert hasattr(dist.ProcessGroupNCCL, "options")
    return True


def an_error_of_another_kind(rank: int, world: int) -> str:
    """All ranks came, and the collective failed for another reason: nobody is blamed."""
    found = Meetings(dist.group.WORLD)
    found.begin()
    return found.explain(RuntimeError("sizes differ"), "a test")


def test_nobody_is_blamed_who_came() -> None:
    for text in run_ranks(an_error_of_another_kind, 3, group_timeout=TIMEOUT):
        assert text == "The ranks could not exchange what a test needs. sizes differ"


def healthy(rank: int, world: int) -> bool:
    """Nothing is told to the store in a step that nobody waits in."""
    told = []
    Meetings.announce = lambda self: told.append(1)  # type: ignore[method-assign]
    run = Run().train(1)
    dist.barrier()
    run.train(2, 3, 4)
    return meetings(dist.group.WORLD)._number > 8 and not told


def test_a_healthy_step_asks_no_store() -> None:
    assert run_ranks(healthy, 2) == [True, True]
