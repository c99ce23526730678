"""The registration in torch.optim: there after pip install, light, and harmless when it fails."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import entry_points

import pytest


def python(script: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120, env={**os.environ, **environment}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_entry_point_is_installed() -> None:
    values = [entry.value for entry in entry_points(group="torch.backends")]
    assert "adafisher_dist.autoload:register" in values, (
        "run the tests in an environment that the package is installed in"
    )


def test_import_torch_is_enough_and_loads_nothing_of_ours() -> None:
    out = python(
        "import torch, sys; ours = sorted(m for m in sys.modules if m.startswith('adafisher'));"
        "print(ours, torch.optim.AdaFisher.__module__, hasattr(torch.optim, 'NoSuch'))"
    )
    assert out.split("]")[0] == "['adafisher_dist', 'adafisher_dist.autoload', 'adafisher_dist.version'"
    assert out.split("]")[1].split() == ["adafisher_dist.ds", "False"]


@pytest.mark.parametrize("name", ["AdaFisher", "adafisher", "Adafisher"])
def test_any_case(name: str) -> None:
    assert "from_config" in python(f"import torch; print(torch.optim.{name}.__name__)")


def test_explicit_import_where_autoload_is_off() -> None:
    off = {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    assert "False" in python("import torch; print(hasattr(torch.optim, 'AdaFisher'))", **off)
    assert "True" in python("import adafisher_dist, torch; print(hasattr(torch.optim, 'AdaFisher'))", **off)
    assert "True" in python("import torch, adafisher_dist; print(hasattr(torch.optim, 'AdaFisher'))", **off)


def test_a_registration_that_fails_does_not_break_torch() -> None:
    out = python(
        "import sys, types; import torch; from adafisher_dist import autoload;"
        "sys.modules['torch.optim'] = types.MappingProxyType({}); autoload.register(); print(torch.ones(2).sum())"
    )
    assert "2." in out


def test_registration_loads_only_two_small_modules() -> None:
    # What the entry point adds to `import torch`, which takes seconds.
    out = python(
        "import torch, sys, time\n"
        "for name in [m for m in sys.modules if m.startswith('adafisher')]: del sys.modules[name]\n"
        "del torch.optim.__getattr__\n"
        "start = time.perf_counter(); import adafisher_dist.autoload as a; a.register()\n"
        "print(sorted(m for m in sys.modules if m.startswith('adafisher')), time.perf_counter() - start)"
    )
    assert "optimizer" not in out and "shard" not in out


def test_misspelt_names_are_not_ours() -> None:
    with pytest.raises(AssertionError):
        python("import torch; torch.optim.AdaFish")
