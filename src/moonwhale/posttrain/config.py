"""What `moonwhale sft` and `moonwhale grpo` share: their common options, how these are parsed, and the model."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from moonwhale import options
from moonwhale.errors import UserError
from moonwhale.options import option, require
from moonwhale.processes import init_process_group, restarted
from moonwhale.train import run_folder
from moonwhale.train.config import DEVICES, PRECISIONS
from moonwhale.train.run import check_run

AT_LEAST_ONE = ("batch_size", "keep_checkpoints", "log_every")
NOT_NEGATIVE = (
    "seed",
    "warmup_steps",
    "weight_decay",
    "grad_clip",
    "qk_clip_tau",
    "bias_update_speed",
    "eval_every",
    "save_every",
)

TIMEOUT = 600  # seconds that a process waits for the others


@dataclass
class PostTrainOptions:
    """The options that SFT and GRPO share. Rates are per optimizer step.

    Raises:
        UserError: an option is impossible. The message names the option, its value and the fix.
    """

    checkpoint: str | None = option(None, "folder of the model to start from", group="positional")
    out: str | None = option(None, "folder of the run (runs/CHECKPOINT-VERB)", group="run")
    resume: bool = option(False, "resume from the newest undamaged checkpoint in --out", group="run")
    seed: int = option(0, "seed of all random draws", group="run")

    batch_size: int = option(8, "rows per micro-batch on each device", group="optimization")
    lr: float = option(1e-3, "peak learning rate, on AdamW's scale, for both Muon and AdamW", group="optimization")
    warmup_steps: int = option(10, "steps in which the learning rate rises to its peak", group="optimization")
    weight_decay: float = option(0.0, "decoupled weight decay of matrices", group="optimization")
    momentum: float = option(0.95, "momentum of Muon", group="optimization")
    grad_clip: float = option(1.0, "largest gradient norm; 0 turns clipping off", group="optimization")
    qk_clip_tau: float = option(
        100.0, "attention logit above which QK-clip scales a head down; 0 turns it off", group="optimization"
    )
    bias_update_speed: float = option(
        0.0,
        "step γ of the router bias; 0, as at the end of DeepSeek-V3's pretraining: a narrow task would shift it",
        group="optimization",
    )

    device: str = option("auto", "cpu, cuda or mps; auto takes the fastest", group="device", suggestions=DEVICES)
    precision: str = option(
        "auto", f"precision of matrix products: {', '.join(PRECISIONS)}", group="device", suggestions=PRECISIONS
    )
    gradient_checkpointing: bool = option(False, "recompute activations: less memory, more time", group="device")

    eval_every: int = option(50, "steps between evaluations; 0: only at the end", group="reports and checkpoints")
    save_every: int = option(50, "steps between checkpoints; 0: only at the end", group="reports and checkpoints")
    keep_checkpoints: int = option(2, "number of newest checkpoints to keep", group="reports and checkpoints")
    log_every: int = option(10, "steps between log lines", group="reports and checkpoints")
    report_to: list[str] = option(
        ["tensorboard"], "any of the Trainer's reporters, or none", group="reports and checkpoints"
    )

    def __post_init__(self):
        if self.checkpoint is None:
            raise UserError("CHECKPOINT: name the folder of the model to start from")
        self.out = self.out or default_out(self.checkpoint, self.verb)
        require(self, "lr", self.lr > 0, "it must be above 0")
        require(self, "momentum", 0 <= self.momentum < 1, "it must be in [0, 1)")
        for name in AT_LEAST_ONE:
            require(self, name, getattr(self, name) >= 1, "it must be at least 1")
        for name in NOT_NEGATIVE:
            require(self, name, getattr(self, name) >= 0, "it must not be negative")


Options = TypeVar("Options", bound=PostTrainOptions)


def default_out(checkpoint: str, verb: str) -> str:
    """Returns the run's folder if the user names none."""
    return os.path.join("runs", f"{Path(checkpoint).resolve().name}-{verb}")


def parse(cls: type[Options], argv: list[str], description: str, epilog: str | None = None) -> Options:
    """Resolves a run's options: defaults, then a YAML file (`--config`), then the command line.

    A resumed run reads the `run.yaml` in its own folder, unless `--config` names another file.
    """
    parser = options.Parser(prog=f"moonwhale {cls.verb}", description=description, epilog=epilog)
    options.add_options(parser, cls)
    parser.add_argument("--config", metavar="YAML", help="file of options; every run writes its own as run.yaml")
    given, rest = options.read_argv(parser, cls, argv)
    path = rest.config
    if restarted():
        given["resume"] = True
    if given.get("resume") and path is None:
        out = given.get("out")
        if out is None and "checkpoint" in given:
            out = default_out(given["checkpoint"], cls.verb)
        path = run_folder.find_run_file(out)
    return cls(**options.merge(options.read_yaml(path, cls) if path else {}, given))


def check(config: PostTrainOptions) -> Path | None:
    """Checks the run's folder and silences the libraries. Returns the checkpoint to resume from, or None."""
    return check_run(config, lambda run_file: parse(type(config), ["--config", run_file], ""))


def open_model(config: PostTrainOptions, choice):
    """Opens the model of `config.checkpoint` and its tokenizer, ready to train in the precision of `choice`.

    `choice` is what `precision.choose` returned. If torchrun started the process, the process group is initialised
    first.
    """
    from moonwhale import fp8, precision
    from moonwhale.checkpoint import open_checkpoint

    init_process_group(choice.device.type == "cpu", TIMEOUT)
    choice.apply()
    precision.tune_allocator()
    model, tokenizer = open_checkpoint(config.checkpoint)
    for module in model.modules():
        if hasattr(module, "bias_speed"):
            module.bias_speed = config.bias_update_speed
    if choice.fp8:
        fp8.convert(model, choice.fp8)
    return model, tokenizer
