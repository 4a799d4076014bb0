"""Checks what a Trainer reads from a checkpoint to go on from it, and refuses it in one line."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers import PreTrainedConfig, TrainerState

from moonwhale.checkpoint import STATE, read_state
from moonwhale.errors import UserError, one_line
from moonwhale.model import MoonwhaleConfig
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
