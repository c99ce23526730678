"""AdaFisher in Axolotl, by a plugin: `plugins: [axolotl_plugin.AdaFisherPlugin]` in the YAML file.

    PYTHONPATH=examples axolotl train config.yaml

    plugins:
      - axolotl_plugin.AdaFisherPlugin
    learning_rate: 2e-4
    weight_decay: 0.1
    adafisher:            # AdaFisher's other settings; may be left out
      block_size: 64

`learning_rate` and `weight_decay` are Axolotl's own. Its `optimizer:` wants a name that it knows,
and is not used; leave `optim_args` out. With a DeepSpeed config name AdaFisher there: that decides.
"""

from __future__ import annotations

from typing import Any

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel
from transformers import TrainerCallback

from adafisher_dist import AdaFisher


class AdaFisherArgs(BaseModel):
    """What the plugin adds to the keys that Axolotl knows."""

    adafisher: dict[str, Any] | None = None


class AdaFisherPlugin(BasePlugin):
    """Hands AdaFisher to Axolotl's trainer, which builds it where it builds its own optimizers."""

    def get_input_args(self) -> str:
        return f"{__name__}.AdaFisherArgs"

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        # Not by create_optimizer, which no trainer of Axolotl's calls.
        settings = {"lr": trainer.args.learning_rate, "weight_decay": trainer.args.weight_decay}
        trainer.optimizer_cls_and_kwargs = (AdaFisher, {**settings, **(cfg.adafisher or {})})

    def add_callbacks_post_trainer(self, cfg: Any, trainer: Any) -> list[TrainerCallback]:
        in_ddp = not (trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled)
        return [Consolidate()] if in_ddp else []


class Consolidate(TrainerCallback):
    """Collect the state on rank 0 before Trainer saves it there, which DDP needs.

    `consolidate_state_dict` is a collective: all ranks are asked to save at the same steps.
    """

    def on_step_end(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
        if control.should_save:
            optimizer.optimizer.consolidate_state_dict()  # within Accelerate's wrapper

    on_epoch_end = on_step_end
