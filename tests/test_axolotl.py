"""The plugin of examples/axolotl_plugin.py, called as Axolotl calls it, on two ranks under DDP.

Axolotl pins its libraries to other versions than the tests', so its own code takes no part here but
where it is installed beside them; `tests/axolotl_calls.py` stands in for it.
"""

from __future__ import annotations

import ast
import importlib
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="the extra 'hf' is not installed")

from test_examples import assert_losses_fall, assert_same, trainer_losses
from torchrun import EXAMPLES, succeed

CALLS = str(Path(__file__).parent / "axolotl_calls.py")

pytestmark = pytest.mark.dist


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which run `a` trained by the plugin."""
    where = tmp_path_factory.mktemp("axolotl")
    succeed(2, CALLS, "a", cwd=where)
    return where


def test_the_plugin_trains_like_the_class_handed_to_trainer(trained: Path) -> None:
    succeed(2, CALLS, "plain", "plain", cwd=trained)
    assert_same(trainer_losses(trained / "a"), trainer_losses(trained / "plain"), 0, exact=True)
    assert_losses_fall(trainer_losses(trained / "a"))


def test_the_plugin_resumes(trained: Path) -> None:
    succeed(2, CALLS, "b", "a/checkpoint-4", cwd=trained)
    assert_same(trainer_losses(trained / "b"), trainer_losses(trained / "a"), 4, exact=True)


def test_it_is_a_plugin_of_axolotls(monkeypatch: pytest.MonkeyPatch) -> None:
    base = pytest.importorskip("axolotl.integrations.base", reason="Axolotl pins other versions, and is not here")
    monkeypatch.syspath_prepend(str(EXAMPLES))
    plugin = base.load_plugin("axolotl_plugin.AdaFisherPlugin")
    assert isinstance(plugin, base.BasePlugin)
    module, _, name = plugin.get_input_args().rpartition(".")
    fields = getattr(importlib.import_module(module), name).model_fields
    assert set(fields) == {"adafisher"}
    monkeypatch.delitem(sys.modules, "axolotl_plugin")


def test_the_plugin_uses_only_hooks_that_are_called() -> None:
    """So that a hook which tests/axolotl_calls.py never calls is not taken for tested."""
    (plugin,) = (
        node
        for node in ast.parse((EXAMPLES / "axolotl_plugin.py").read_text()).body
        if isinstance(node, ast.ClassDef) and node.name == "AdaFisherPlugin"
    )
    hooks = {node.name for node in plugin.body if isinstance(node, ast.FunctionDef)}
    assert hooks == {"get_input_args", "post_trainer_create", "add_callbacks_post_trainer"}
