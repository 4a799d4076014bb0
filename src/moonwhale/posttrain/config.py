"""What `moonwhale sft` and `moonwhale grpo` share: their common options, and the model to start from."""

import os
from dataclasses import dataclass
from pathlib import Path

from moonwhale.errors import UserError, require_package
from moonwhale.options import option, require, require_not_negative
from moonwhale.processes import init_process_group
from moonwhale.train.run import prepare_process
from moonwhale.train.run_options import RunOptions, with_default
from moonwhale.train.starting_model import absolute

TIMEOUT = 600  # seconds that a process waits for the others


@dataclass
class PostTrainOptions(RunOptions):
    """The options that SFT and GRPO share."""

    checkpoint: str | None = option(None, "folder of the model to start from", group="positional")
    out: str | None = option(None, "folder of the run (runs/CHECKPOINT-VERB)", group="run")

    lr: float = with_default("lr", 1e-3)
    warmup_steps: int = with_default("warmup_steps", 10)
    weight_decay: float = with_default("weight_decay", 0.0)
    bias_update_speed: float = option(
        0.0,
        "step γ of the router bias; 0, as at the end of DeepSeek-V3's pretraining: a narrow task would shift it",
        group="optimization",
    )

    eval_every: int = with_default("eval_every", 50)
    save_every: int = with_default("save_every", 50)

    def __post_init__(self):
        if self.checkpoint is None:
            raise UserError("CHECKPOINT: name the folder of the model to start from")
        self.checkpoint = absolute(self.checkpoint)
        require_package("trl", "rl", f"moonwhale {self.verb}")
        super().__post_init__()
        require_not_negative(self, "bias_update_speed")

    def require_room_for_warmup(self, steps: int) -> None:
        """Raises UserError if the run has fewer `steps` than its warm-up. The default warm-up is shortened instead."""
        fits = self.warmup_steps <= steps or self.warmup_steps == type(self).warmup_steps
        require(self, "warmup_steps", fits, f"the run has {steps:,} steps: give at most that")

    @classmethod
    def default_out(cls, given: dict) -> str | None:
        checkpoint = given.get("checkpoint")
        return checkpoint and os.path.join("runs", f"{Path(checkpoint).resolve().name}-{cls.verb}")


def open_model(config: PostTrainOptions, choice):
    """Opens the model of `config.checkpoint` and its tokenizer, ready to train in the precision of `choice`.

    `choice` is what `precision.choose` returned. If torchrun started the process, the process group is initialised
    first.
    """
    from moonwhale import fp8
    from moonwhale.checkpoint import open_checkpoint

    init_process_group(choice.device.type == "cpu", TIMEOUT)
    choice.apply()
    prepare_process(choice.device)
    model, tokenizer = open_checkpoint(config.checkpoint)
    for module in model.modules():
        if hasattr(module, "bias_speed"):
            module.bias_speed = config.bias_update_speed
    if choice.fp8:
        fp8.convert(model, choice.fp8)
    return model, tokenizer
