"""Calls the plugin of examples/axolotl_plugin.py where Axolotl 0.19 does, around a Trainer.

    torchrun --nproc-per-node 2 tests/axolotl_calls.py OUT [plain | CHECKPOINT]

Where Axolotl is installed its own `BasePlugin` is the plugin's base, else the stand-in here, which
has the same hooks. The trainer is Hugging Face's own, which Axolotl's is a subclass of. `plain`: no
plugin, and the class handed to Trainer by its constructor.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

from tiny import llama, training_set
from transformers import Trainer, TrainingArguments

from adafisher_dist import AdaFisher

SETTINGS = {"block_size": 16, "rows_per_block": 8}


class StandIn:
    """The hooks of `axolotl.integrations.base.BasePlugin` that are used here."""

    def get_input_args(self) -> str | None:
        return None

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        pass

    def add_callbacks_post_trainer(self, cfg: Any, trainer: Any) -> list[Any]:
        return []


def provide_base() -> None:
    """A module `axolotl.integrations.base`, unless the real one is there."""
    if importlib.util.find_spec("axolotl") is None:
        for name in ("axolotl", "axolotl.integrations", "axolotl.integrations.base"):
            sys.modules[name] = ModuleType(name)
        sys.modules["axolotl.integrations.base"].BasePlugin = StandIn


def main() -> None:
    out, what = sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else None
    save = "no" if what == "plain" else "steps"
    arguments = TrainingArguments(
        out, max_steps=8, save_steps=4, logging_steps=1, per_device_train_batch_size=4, learning_rate=1e-2,
        weight_decay=0.1, use_cpu=True, report_to=[], disable_tqdm=True, save_strategy=save,
    )  # fmt: skip
    by_class = (AdaFisher, {"lr": 1e-2, "weight_decay": 0.1, **SETTINGS}) if what == "plain" else None
    trainer = Trainer(llama(), arguments, train_dataset=training_set(), optimizer_cls_and_kwargs=by_class)
    if what != "plain":
        provide_base()
        from axolotl_plugin import AdaFisherPlugin

        plugin = AdaFisherPlugin()
        module, _, name = plugin.get_input_args().rpartition(".")
        keys = getattr(importlib.import_module(module), name)  # by which Axolotl checks the YAML file
        cfg = SimpleNamespace(**keys(adafisher=SETTINGS).model_dump())
        plugin.post_trainer_create(cfg, trainer)
        for callback in plugin.add_callbacks_post_trainer(cfg, trainer):
            trainer.add_callback(callback)
    trainer.train(resume_from_checkpoint=None if what == "plain" else what)
    trainer.save_state()
    assert isinstance(trainer.optimizer.optimizer, AdaFisher), type(trainer.optimizer)


if __name__ == "__main__":
    main()
