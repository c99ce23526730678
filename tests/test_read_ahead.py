"""Files are read and summed up on threads: in order, no more at a time than there is room for."""

from __future__ import annotations

import os
import zlib
from pathlib import Path
from threading import Event, Lock

import numpy as np
import pytest

from adafisher_dist.checkpoint import checksums, read_ahead
from adafisher_dist.checkpoint.read_ahead import ReadAhead


def test_in_order_and_four_at_a_time() -> None:
    under_way, most, lock = 0, 0, Lock()

    def work(number: int) -> int:
        nonlocal under_way, most
        with lock:
            under_way += 1
            most = max(most, under_way)
        return number * number

    with ReadAhead() as ahead:
        for item, result in ahead.in_order(work, range(100)):
            assert result == item * item
            with lock:
                under_way -= 1  # the caller is done with it
    assert most == 4


def test_an_error_comes_at_its_turn_and_no_thread_stays() -> None:
    done = []

    def work(number: int) -> int:
        if number == 3:
            raise OSError("the disk is gone")
        return number

    with pytest.raises(OSError, match="the disk is gone"), ReadAhead() as ahead:
        for item, _ in ahead.in_order(work, range(10)):
            done.append(item)
    assert done == [0, 1, 2]
    assert not any(thread.is_alive() for thread in ahead._pool._threads)


def test_waiting_ranks_are_told_of_each_step_and_of_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    told, heard = [], Event()

    def beat() -> None:
        told.append(len(told))
        heard.set()

    def work(number: int) -> None:
        for _ in range(3):
            heard.clear()
            ahead.tick()
            assert heard.wait(10)

    monkeypatch.setattr(read_ahead, "beat", beat)
    with ReadAhead() as ahead:
        list(ahead.in_order(work, [0]))
    assert len(told) in (3, 4)  # the end of the work is a step too, if it is waited for


@pytest.mark.parametrize("nbytes", [0, 1, 999, 1000, 1001, 2000, 12_345])
def test_a_checksum_of_parts_is_that_of_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nbytes: int) -> None:
    monkeypatch.setattr(checksums, "_PART", 1000)
    monkeypatch.setattr(checksums, "_BUFFER", 64)
    data = np.random.default_rng(nbytes).bytes(nbytes)
    (tmp_path / "file").write_bytes(data)
    handle = os.open(tmp_path / "file", os.O_RDONLY)
    try:
        assert checksums.checksum_of(handle, nbytes) == zlib.crc32(data)
    finally:
        os.close(handle)


def test_checksums_are_combined_as_zlib_goes_on() -> None:
    rng = np.random.default_rng(0)
    for first, second in rng.integers(0, 5000, (200, 2)).tolist():
        a, b = rng.bytes(first), rng.bytes(second)
        assert checksums.combined(zlib.crc32(a), zlib.crc32(b), len(b)) == zlib.crc32(a + b)
