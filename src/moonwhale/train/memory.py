"""Whether a training run fits into a device's memory: an estimate before, and advice after it did not."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from moonwhale.costs import one_device_training_bytes
from moonwhale.errors import UserError
from moonwhale.units import in_bytes


def free_bytes(device: torch.device) -> int | None:
    """What a GPU has left for this process; None of a CPU, which can swap."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return torch.mps.recommended_max_memory() if device.type == "mps" else None


def needed_bytes(model_config, run, number_bytes: int) -> dict[str, int]:
    """`costs.one_device_training_bytes` of a micro-batch of `run`, whose activations are `number_bytes` a number.

    Recomputed ones (`gradient_checkpointing`) leave what enters each block, and those of a block at a time.
    """
    tokens = run.batch_size * run.context
    needed = one_device_training_bytes(model_config, tokens, number_bytes)
    if run.gradient_checkpointing:
        blocks = model_config.num_blocks
        kept = number_bytes * tokens * model_config.hidden_size * blocks
        needed["activations"] = min(needed["activations"], kept + needed["activations"] // blocks)
    return needed


def check_gpu_memory(model_config, run, device: torch.device, number_bytes: int) -> str:
    """A line on the memory of `run` (its `batch_size`, `context` and `gradient_checkpointing`) on a GPU; "" on a CPU.

    Raises:
        UserError: weights, gradients and optimizer alone are more than there is. Activations are estimated too roughly
            to refuse for them.
    """
    free = free_bytes(device)
    if free is None:
        return ""
    needed = needed_bytes(model_config, run, number_bytes)
    whole, activations = sum(needed.values()), needed["activations"]
    if whole - activations > free:
        raise UserError(
            f"`device`: weights, gradients and optimizer take {in_bytes(whole - activations)}, and {device} has "
            f"{in_bytes(free)} left: train a smaller `preset` or `model.FIELD`, or on a larger device"
        )
    line = f"memory     about {in_bytes(whole)} of the {in_bytes(free)} that {device} has left"
    return line if whole <= free else f"{line}: it may not suffice ({_smaller(run)})"


@contextmanager
def explained(run, device: torch.device) -> Iterator[None]:
    """Makes one line of advice out of running out of memory.

    Raises:
        UserError: instead of what torch raises on a GPU, MPS or a CPU; everything else passes.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(
            f"{device} is out of memory with `batch_size` {run.batch_size} rows: {_smaller(run)}"
        ) from error


def is_out_of_memory(error: RuntimeError) -> bool:
    signs = ("out of memory", "can't allocate memory", "not enough memory")
    return isinstance(error, torch.OutOfMemoryError) or any(sign in str(error) for sign in signs)


def _smaller(run) -> str:
    """What of a run's options would take less."""
    advice = []
    if run.batch_size > 1:
        advice.append(f"`batch_size` {run.batch_size // 2}")
    if not run.gradient_checkpointing:
        advice.append("`gradient_checkpointing`")
    if hasattr(run, "context"):
        advice.append("a shorter `context`")
    return f"give {', '.join(advice)}, or a smaller model" if advice else "train a smaller model"
