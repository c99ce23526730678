"""Large states of a CPU lie in huge pages, where Linux gives them on request; all else as usual."""

from __future__ import annotations

import mmap
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from adafisher_dist import AdaFisher
from adafisher_dist.numerics import huge_pages

CPU = torch.device("cpu")
LARGE = 1 << 21  # float32 numbers: 8 MiB


def flags_at(address: int) -> list[str]:
    """What the kernel notes of the mapping an address lies in; "hg": huge pages were asked for."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split()[0]
        if "-" in first and not first.endswith(":"):
            start, stop = (int(bound, 16) for bound in first.split("-"))
            inside = start <= address < stop
        elif inside and first == "VmFlags:":
            return line.split()[1:]
    raise AssertionError("no such mapping")


gives_huge_pages = pytest.mark.skipif(
    not hasattr(mmap, "MADV_HUGEPAGE") or not Path("/sys/kernel/mm/transparent_hugepage/enabled").exists(),
    reason="this kernel gives no huge pages on request",
)


@gives_huge_pages
@pytest.mark.parametrize("new", [huge_pages.empty, huge_pages.zeros])
def test_large_memory_asks_for_huge_pages(new: Callable[..., torch.Tensor]) -> None:
    tensor = new(LARGE, dtype=torch.float32, device=CPU)
    assert "hg" in flags_at(tensor.data_ptr() + tensor.nbytes // 2)
    # A mapping of its own, since malloc may hand out again what another test asked them for.
    usual = torch.frombuffer(mmap.mmap(-1, 4 * LARGE), dtype=torch.float32)
    assert "hg" not in flags_at(usual.data_ptr())


@gives_huge_pages
def test_a_states_large_fields_lie_in_them() -> None:
    weight = nn.Parameter(torch.ones(2048, 1024))
    weight.grad = torch.ones_like(weight)
    optimizer = AdaFisher([weight], lr=1e-3)
    optimizer.step()
    large = {name: value for name, value in optimizer.state[weight].items() if value.nbytes >= 1 << 23}
    assert len(large) == 2, "F and the momentum"
    for name, value in large.items():
        assert "hg" in flags_at(value.data_ptr() + value.nbytes // 2), name


@pytest.mark.parametrize("shape", [(0,), (3, 5), (LARGE,), (3, 1 << 20)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
@pytest.mark.parametrize("has_them", [True, False])
def test_values_and_shapes_are_as_torchs(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], dtype: torch.dtype, has_them: bool
) -> None:
    if not has_them:  # another system, or a C library that cannot be asked
        monkeypatch.setattr(huge_pages, "_madvise", lambda: None)
    zeros = huge_pages.zeros(*shape, dtype=dtype, device=CPU)
    assert torch.equal(zeros, torch.zeros(*shape, dtype=dtype)) and zeros.dtype == dtype
    empty = huge_pages.empty(*shape, dtype=dtype, device=CPU)
    assert (empty.shape, empty.dtype, empty.is_contiguous()) == (zeros.shape, dtype, True)
