"""Checks whether a run fits into a GPU's memory, and turns an out-of-memory error into advice."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from moonwhale.costs import one_device_training_bytes
from moonwhale.errors import UserError
from moonwhale.units import in_bytes


def free_bytes(device: torch.device) -> int | None:
    """The memory that a GPU has left for this process. None for a CPU, which can swap."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return torch.mps.recommended_max_memory() if device.type == "mps" else None


def needed_bytes(model_config, run, bytes_per_number: int) -> dict[str, int]:
    """The memory of a training step of `run`, by purpose (`costs.one_device_training_bytes`).

    run: has `batch_size`, `context`, `optimizer` and `gradient_checkpointing`.
    bytes_per_number: size of a number of the activations.
    """
    tokens = run.batch_size * run.context
    needed = one_device_training_bytes(model_config, tokens, bytes_per_number, run.gradient_checkpointing)
    if run.optimizer == "adamw":  # two moments of Muon's matrices too
        needed["optimizer"] = 2 * needed["weights"]
    return needed


def check_gpu_memory(model_config, run, device: torch.device, bytes_per_number: int) -> str:
    """Returns a line on the memory that `run` needs and a GPU has, or "" for a CPU. For the arguments see
    `needed_bytes`.

    Raises:
        UserError: weights, gradients and optimizer alone exceed the memory. Activations are only warned of, since their
            size is a rough estimate.
    """
    free = free_bytes(device)
    if free is None:
        return ""
    needed = needed_bytes(model_config, run, bytes_per_number)
    total = sum(needed.values())
    without_activations = total - needed["activations"]
    if without_activations > free:
        raise UserError(
            f"`device`: weights, gradients and optimizer take {in_bytes(without_activations)}, and {device} has "
            f"{in_bytes(free)} left: train a smaller `preset` or `model.FIELD`, or on a larger device"
        )
    line = f"memory     about {in_bytes(total)} of the {in_bytes(free)} that {device} has left"
    return line if total <= free else f"{line}: it may not suffice ({_advice(run)})"


@contextmanager
def out_of_memory_as_advice(run, device: torch.device) -> Iterator[None]:
    """Context that turns torch's out-of-memory errors, on any device, into one line of advice. Other errors pass.

    Raises:
        UserError: the device ran out of memory.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(f"{device} is out of memory with `batch_size` {run.batch_size} rows: {_advice(run)}") from error


def is_out_of_memory(error: RuntimeError) -> bool:
    # Only CUDA raises OutOfMemoryError. The CPU's and MPS's allocators raise a plain RuntimeError.
    signs = ("out of memory", "can't allocate memory", "not enough memory")
    return isinstance(error, torch.OutOfMemoryError) or any(sign in str(error) for sign in signs)


def _advice(run) -> str:
    """The options of `run` that can still be changed to need less memory."""
    changes = []
    if run.batch_size > 1:
        changes.append(f"`batch_size` {run.batch_size // 2}")
    if not run.gradient_checkpointing:
        changes.append("`gradient_checkpointing`")
    if hasattr(run, "context"):  # GRPO's rows are as long as its answers
        changes.append("a shorter `context`")
    return f"give {', '.join(changes)}, or a smaller model" if changes else "train a smaller model"
