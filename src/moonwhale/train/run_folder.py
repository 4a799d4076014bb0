"""What all training runs share: a folder that nothing overwrites, a run that goes on where it stopped, and its end."""

import dataclasses
import os
import warnings
from collections.abc import Callable
from pathlib import Path

from moonwhale import options
from moonwhale.errors import UserError
from moonwhale.processes import is_main_process, say

RUN_FILE = "run.yaml"
# May change when a run goes on: they alter how it computes, and what is shown and kept, not what is learned.
FREE_TO_CHANGE = {
    "out",
    "resume",
    "device",
    "gradient_checkpointing",
    "compile",
    "eval_every",
    "eval_rows",
    "save_every",
    "keep_checkpoints",
    "log_every",
    "report_to",
    "parallel",
}


def check_folder(config, read: Callable[[str], object]) -> None:
    """Nothing is overwritten: a folder that holds a run needs --resume, and what goes on must be the same run, whose
    configuration `read` reads from its run.yaml.
    """
    out, run_file = Path(config.out), Path(config.out) / RUN_FILE
    if out.exists() and not out.is_dir():
        raise UserError(f"`out`: {out} is a file: name a folder")
    if not run_file.exists():
        if out.exists() and any(not path.name.startswith(f".{RUN_FILE}") for path in out.iterdir()):
            raise UserError(f"`out`: {out} holds files that are not a run's: name a new or an empty folder")
        return
    if not config.resume:
        raise UserError(f"`out`: {out} already holds a run: go on with it by `resume`, or name another folder")
    now, before = learned(config), learned(read(str(run_file)))
    for name in now | before:
        if now.get(name) != before.get(name):
            raise UserError(
                f"`{name}`: {now.get(name)!r} differs from the {before.get(name)!r} that the run in {out} was started "
                "with: leave it out to go on, or name another `out`"
            )


def learned(config, also: tuple[str, ...] = ()) -> dict:
    """The options that decide what is learned, `also` some others, by field, or FIELD.KEY."""
    values = {}
    for name, value in vars(config).items():
        if name in FREE_TO_CHANGE.difference(also):
            continue
        if isinstance(value, dict):
            values |= {f"{name}.{key}": inner for key, inner in value.items()}
        else:
            values[name] = value
    return values


def quieten() -> None:
    """Silences what libraries print beside our own lines, and TRL, which would tell its makers of every run."""
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")

    import datasets
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()


def trainer_arguments(config, choice, max_steps: int) -> dict:
    """The options that all runs have in transformers' words; `choice` is precision.choose's."""
    return {
        "output_dir": config.out,
        "seed": config.seed,
        "data_seed": config.seed,
        "max_steps": max_steps,
        "per_device_train_batch_size": config.batch_size,
        "per_device_eval_batch_size": config.batch_size,
        "learning_rate": config.lr,
        "warmup_steps": min(config.warmup_steps, max_steps),
        "weight_decay": config.weight_decay,
        "adam_beta2": 0.95,
        "max_grad_norm": config.grad_clip,
        "muon_momentum": config.momentum,
        "qk_clip_tau": config.qk_clip_tau,
        "use_cpu": choice.device.type == "cpu",
        "bf16": choice.autocast,
        "activation_checkpointing": config.gradient_checkpointing,
        "eval_strategy": "steps",
        "eval_steps": config.eval_every or max_steps,
        "save_strategy": "steps",
        "save_steps": config.save_every or max_steps,
        "save_total_limit": config.keep_checkpoints,
        "logging_strategy": "steps",
        "logging_steps": config.log_every,
        "logging_first_step": True,
        "logging_nan_inf_filter": False,
        "report_to": config.report_to,
        "disable_tqdm": True,
        "dataloader_pin_memory": choice.device.type == "cuda",
        "accelerator_config": {"non_blocking": choice.device.type == "cuda"},  # copies to the device
        "ddp_find_unused_parameters": False,
    }


def write(config, path: str | os.PathLike, verb: str) -> None:
    """Writes a run's resolved values, which --config replays; --resume belongs to one call."""
    values = dataclasses.asdict(config)
    del values["resume"]
    options.write_yaml(path, values, f"Replay with: moonwhale {verb} --config THIS_FILE --out NEW_FOLDER")


def own_file(out: str | None) -> str | None:
    """The file of options that a run in `out` wrote, if there is one."""
    path = os.path.join(out or "", RUN_FILE)
    return path if out and os.path.exists(path) else None


def newest_checkpoint(out: str) -> Path | None:
    """The checkpoint to go on from; None if the run has none yet."""
    from moonwhale.checkpoint import list_checkpoints, newest_whole

    checkpoint = newest_whole(out)
    if checkpoint is None and list_checkpoints(out):
        raise UserError(f"`resume`: every checkpoint in {out} is damaged (see above): train anew into another `out`")
    return checkpoint


def carry_out(config, choice, build: Callable[[list], object], checkpoint: Path | None, verb: str, plot, line_of):
    """Trains what `build(callbacks=…)` builds, from `checkpoint` on; says `line_of(logs)` and draws `plot(history)`.

    Returns:
        the trainer, after its last step.

    Raises:
        KeyboardInterrupt: after a stop that was asked for, and a checkpoint.
        UserError: out of memory, among others.
    """
    import transformers

    from moonwhale.train import memory, progress

    explained = memory.explained(config, choice.device)
    with explained, progress.Progress(line_of) as bar, progress.StopAtStepEnd() as interrupt:
        trainer = build(callbacks=[bar, interrupt])
        trainer.remove_callback(transformers.PrinterCallback)
        try:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        finally:
            if is_main_process():
                plot(trainer.state.log_history)
    if trainer.state.global_step < trainer.state.max_steps:
        step = trainer.state.global_step
        say(f"stopped    at step {step}, which is saved; go on with: moonwhale {verb} --out {config.out} --resume")
        raise KeyboardInterrupt
    return trainer
