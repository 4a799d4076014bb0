"""Finds the checkpoint from which a run goes on, and checks what a Trainer reads from it, in one line."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers import PreTrainedConfig, TrainerState

from moonwhale.checkpoint import STATE, clear_unfinished, list_checkpoints, newest_checkpoint, read_state, step_of
from moonwhale.errors import UserError, one_line
from moonwhale.model import MoonwhaleConfig
from moonwhale.processes import is_main_process, print_on_rank_0
from moonwhale.train.run_options import RunOptions
from moonwhale.weights import check_headers, read_headers, weight_files


@contextmanager
def resuming_from(checkpoint: str | Path | None) -> Iterator[None]:
    """Context in which a checkpoint's files are read: whatever their content makes a library raise is a UserError."""
    try:
        yield
    except (UserError, KeyboardInterrupt):
        raise
    except Exception as error:  # unpicklers, optimizers and random generators each raise their own kinds
        reason = f"{type(error).__name__}: {one_line(error)}".replace("`", "'")  # no option's name
        raise UserError(
            f"`resume`: {checkpoint} cannot be read ({reason}): delete it to go on from the checkpoint before"
        ) from error


def find_checkpoint(config: RunOptions) -> Path | None:
    """Returns the newest undamaged checkpoint of the run that `config` resumes, or None if it has none yet.

    If the run was started with another number of steps, only its first steps are also those of `config` (see
    `RunOptions.shared_steps`). Later checkpoints are left alone.

    Raises:
        UserError: every checkpoint is damaged, or belongs to steps that the run does not share with `config`.
    """
    if is_main_process():
        clear_unfinished(config.out)
    if not list_checkpoints(config.out):
        print_on_rank_0(f"resuming   nothing: {config.out} holds no checkpoint")
        return None
    undamaged: list[Path] = []
    checkpoint = newest_checkpoint(config.out, lambda found: undamaged.append(found) or _is_of(config, found))
    if not undamaged:
        raise UserError(
            f"`resume`: every checkpoint in {config.out} is damaged (see above): train anew into another `out`"
        )
    if checkpoint is None:
        shared = config.shared_steps(_steps_of(undamaged[0]))
        raise UserError(
            f"`steps`: {config.steps} needs a checkpoint of step {shared} or before, after which a run of "
            f"other length differs, and the oldest in {config.out} is of step {step_of(undamaged[-1])}: go on from the "
            "model by `from_`, with another `out`"
        )
    check_state(checkpoint)
    print_on_rank_0(f"resuming   from {checkpoint}")
    before = _steps_of(checkpoint)
    if config.steps not in (None, before):
        print_on_rank_0(f"schedule   {before:,} steps become {config.steps:,}: {config.describe_rate()}")
    return checkpoint


def _steps_of(checkpoint: Path) -> int:
    """The steps in all that were planned when a checkpoint was written."""
    return read_state(checkpoint)["max_steps"]


def _is_of(config: RunOptions, checkpoint: Path) -> bool:
    """Whether the run that `config` describes comes past a checkpoint."""
    steps = _steps_of(checkpoint)
    return config.steps in (None, steps) or step_of(checkpoint) <= config.shared_steps(steps)


def check_state(checkpoint: Path) -> None:
    """Raises UserError if the Trainer's state in a checkpoint is damaged."""
    read_state(checkpoint)
    with resuming_from(checkpoint):
        TrainerState.load_from_json(str(checkpoint / STATE))


def check_weights(checkpoint: Path, config: PreTrainedConfig) -> None:
    """Raises UserError if a checkpoint's weights are not those of a model with the given configuration.

    A checkpoint of adapters, and one of another kind of model, is left to transformers.
    """
    if isinstance(config, MoonwhaleConfig) and (files := weight_files(checkpoint)):
        check_headers(checkpoint, read_headers(files), config)
