"""The stages of a training run, shared by `moonwhale train`, `sft` and `grpo`: check, build, carry out, finish."""

import shlex
import typing
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from moonwhale.errors import UserError, did_you_mean
from moonwhale.processes import is_main_process, print_on_rank_0, world_size
from moonwhale.train import run_folder
from moonwhale.train.run_options import RunOptions
from moonwhale.train.run_result import RunResult

if typing.TYPE_CHECKING:
    import torch
    from transformers import Trainer, TrainerCallback

    from moonwhale.precision import ComputeSettings


def publish_last_model(trainer: "Trainer", out: Path) -> None:
    """Copies the model of the trainer's last checkpoint into the run's folder."""
    from moonwhale.checkpoint import publish_model

    publish_model(out / f"checkpoint-{trainer.state.global_step}", out)


@dataclass
class Run:
    """A run that a verb has built.

    make_trainer: called with `callbacks`, returns the transformers Trainer.
    log_line: the line to print for an entry of the Trainer's log, or None for no line.
    summarize: the lines to print at the end, from the log history.
    publish: writes the trained model into the run's folder.
    evaluate_first: whether to evaluate the model before its first step.
    make_sampler: called with the trainer, returns a callback that prints samples; None for no samples.
    """

    config: RunOptions
    choice: "ComputeSettings"  # device and precision
    make_trainer: Callable[..., "Trainer"]
    log_line: Callable[[dict], str | None]
    summarize: Callable[[list[dict]], str]
    publish: Callable[["Trainer", Path], None] = publish_last_model
    evaluate_first: bool = False
    make_sampler: Callable[["Trainer"], "TrainerCallback"] | None = None

    @property
    def out(self) -> Path:
        return Path(self.config.out)


def execute(
    config: RunOptions, build: Callable[[RunOptions], Run], plot: Callable[[list[dict], Path], None]
) -> RunResult:
    """Carries out the run that `config` describes, or goes on with it. Mistakes are reported before torch is imported.

    Args:
        build: prepares the data, the model, and how to make the trainer.
        plot: draws the Trainer's log history into the run's folder.
    """
    with run_folder.owned_folder(config), silent_libraries():
        checkpoint = checkpoint_to_resume(config)
        check_reporters(config.report_to)
        out = Path(config.out)
        from moonwhale.checkpoint import log_history
        from moonwhale.train.milestones import describe_best

        if already_finished(config, checkpoint, plot):
            return RunResult(out, log_history(checkpoint))
        run = build(config)
        trainer = carry_out(run, checkpoint, plot)
        history = trainer.state.log_history
        if is_main_process():
            run.publish(trainer, out)
        print_on_rank_0(run.summarize(history))
        if best := describe_best(history, out):
            print_on_rank_0(best)
        return RunResult(out, history)


def prepare_process(device: "torch.device") -> None:
    """Prepares this process for training on `device`: the allocator, and on a CPU the compiled functions."""
    from moonwhale.native.training import use_kernels
    from moonwhale.precision import tune_allocator

    tune_allocator()
    use_kernels(device)


def checkpoint_to_resume(config: RunOptions) -> Path | None:
    """Returns the checkpoint that `resuming.find_checkpoint` finds, or None if `config` resumes no run.

    Raises:
        UserError: see `resuming.find_checkpoint`.
    """
    if not config.resume:
        return None

    from moonwhale.train.resuming import find_checkpoint

    return find_checkpoint(config)


def check_reporters(names: list[str]) -> None:
    """Raises UserError for a reporter that the Trainer does not know, or whose package is missing."""
    from transformers.integrations import get_available_reporting_integrations
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    if names in (["none"], ["all"]):
        return
    usable = get_available_reporting_integrations()
    choices = f"give {', '.join([*usable, 'none'])}, or all"
    for name in names:
        if name in ("none", "all"):
            raise UserError(f"`report_to`: {name} stands alone, not in {','.join(names)}: {choices}")
        if name not in INTEGRATION_TO_CALLBACK:
            near = did_you_mean(name, [*INTEGRATION_TO_CALLBACK, "none", "all"])
            raise UserError(f"`report_to`: {name!r} is no reporter of the Trainer{near}: {choices}")
        if name not in usable:
            raise UserError(f"`report_to`: the package of {name} is not installed: install it, or {choices}")


@contextmanager
def silent_libraries() -> Iterator[None]:
    """Context without the libraries' progress bars and warnings. A notebook has them back after the run."""
    import datasets
    from transformers.utils import logging

    level, bar, bars = logging.get_verbosity(), logging.is_progress_bar_enabled(), datasets.are_progress_bars_disabled()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        datasets.disable_progress_bars()
        try:
            yield
        finally:
            logging.set_verbosity(level)
            if bar:
                logging.enable_progress_bar()
            if not bars:
                datasets.enable_progress_bars()


def already_finished(config: RunOptions, checkpoint: Path | None, plot: Callable[[list[dict], Path], None]) -> bool:
    """Whether `checkpoint` was written after the run's last step.

    If so, its model is copied into the run's folder again, since a run may be killed before or during that.
    """
    if checkpoint is None:
        return False

    from moonwhale.checkpoint import log_history, publish_model, read_state, step_of

    if step_of(checkpoint) < (config.steps or read_state(checkpoint)["max_steps"]):
        return False
    out = Path(config.out)
    holds_model = (checkpoint / "config.json").exists()  # a LoRA checkpoint holds only the adapters
    if not holds_model and not (out / "config.json").exists():
        return False
    if holds_model and is_main_process():
        publish_model(checkpoint, out)
        plot(log_history(checkpoint), out)
    print_on_rank_0(f"finished   already, with all {step_of(checkpoint)} steps: the model is in {out}")
    return True


def carry_out(run: Run, checkpoint: Path | None, plot: Callable[[list[dict], Path], None]) -> "Trainer":
    """Trains from `checkpoint`, or from the beginning if it is None. Plots the log history even if training fails.

    Returns:
        the trainer after its last step.

    Raises:
        KeyboardInterrupt: the user asked to stop; a checkpoint has been written.
        UserError: the device ran out of memory, or the trainer raised it.
    """
    import transformers

    from moonwhale.checkpoint import STATE, step_of
    from moonwhale.train.callbacks import ProgressLines, StopAtStepEnd
    from moonwhale.train.memory import out_of_memory_as_advice
    from moonwhale.train.milestones import SaveLastSharedStep

    memory_advice = out_of_memory_as_advice(run.config, run.choice.device)
    with memory_advice, ProgressLines(run.log_line) as lines, StopAtStepEnd() as stop:
        trainer = run.make_trainer(callbacks=[lines, stop, SaveLastSharedStep()])
        trainer.remove_callback(transformers.PrinterCallback)
        if run.make_sampler:
            trainer.add_callback(run.make_sampler(trainer))
        try:
            if checkpoint and step_of(checkpoint) >= trainer.args.max_steps:
                # Killed before its adapters were merged. `train` would take one step more.
                trainer.state = transformers.TrainerState.load_from_json(str(checkpoint / STATE))
                trainer._load_from_checkpoint(str(checkpoint))
            else:
                trainer.args.keep_milestones = True
                trainer.args.eval_on_start = run.evaluate_first and checkpoint is None
                trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        finally:
            if is_main_process():
                plot(trainer.state.log_history, run.out)
    step = trainer.state.global_step
    if step < trainer.state.max_steps:
        print_on_rank_0(
            f"stopped    at step {step}, which is saved; go on with: "
            f"moonwhale {run.config.verb} `out` {shlex.quote(run.config.out)} `resume`"
        )
        raise KeyboardInterrupt
    return trainer


def common_trainer_arguments(config: RunOptions, choice: "ComputeSettings", max_steps: int) -> dict:
    """TrainingArguments for the options that all verbs share.

    Raises:
        UserError: the device is a GPU that the Trainer would not take.
    """
    if choice.device.index and world_size() == 1:
        raise UserError(
            f"`device`: training takes the first visible GPU: instead of {config.device}, set CUDA_VISIBLE_DEVICES="
            f"{choice.device.index} in the environment"
        )
    on_cuda = choice.device.type == "cuda"
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
        "muon": config.optimizer == "muon",
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
        "dataloader_pin_memory": on_cuda,
        "accelerator_config": {"non_blocking": on_cuda},  # copies batches to the device while it computes
        "ddp_find_unused_parameters": False,
    }
