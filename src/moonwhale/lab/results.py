"""Reads back what a comparison's runs left in its folder, which someone may have changed meanwhile."""

from pathlib import Path

from moonwhale.checkpoint import STATE, log_history
from moonwhale.errors import NotFiniteError, UserError
from moonwhale.files import read_json
from moonwhale.options import LARGEST
from moonwhale.train.resuming import check_state

SIZES = ("parameters", "active_parameters", "cache_bytes_per_token")
FIGURES = ("bits_per_byte", "tuning_bits_per_byte", "steps", "tokens", "seconds", "tokens_per_second")
POINT = ("seconds", "tokens", "bits_per_byte")  # of a curve


def read_result(path: Path) -> dict:
    """Returns the result of a run that has ended, as `Run` wrote it.

    Raises:
        UserError: it is damaged.
    """
    fix = f"or delete {path.parent} to train this run again"
    try:
        result = read_json(path)
    except UserError as error:
        raise UserError(f"{error}, {fix}") from error
    diverged, options, peak = result.get("diverged"), result.get("options"), result.get("peak_memory_bytes")
    whole = all(isinstance(result.get(name), str) for name in ("variant", "folder"))
    whole = whole and _has_numbers(result, ("seed", *SIZES)) and _has_numbers(options, ("lr",))
    if diverged is None:
        curve = result.get("curve")
        whole = whole and _has_numbers(result, FIGURES) and (peak is None or _is_number(peak))
        whole = whole and isinstance(curve, list) and all(_has_numbers(point, POINT) for point in curve)
        whole = whole and all(point["seconds"] and point["tokens"] for point in curve)
    if not whole or not isinstance(diverged, str | None):
        raise UserError(f"cannot read {path}: it is no result of a run; save or copy it again, {fix}")
    return result


def read_log(checkpoint: Path, ended: bool = False) -> list[dict]:
    """Returns the log entries of a checkpoint of a comparison's run, at least one, each with `step` and `seconds`.

    ended: whether the run must have been evaluated.

    Raises:
        NotFiniteError: an evaluation found that the model is broken.
        UserError: the Trainer's state is damaged.
    """
    check_state(checkpoint)
    entries = log_history(checkpoint)
    evaluated = [entry for entry in entries if "eval_bits_per_byte" in entry]
    whole = entries and all(_has_numbers(entry, ("step", "seconds")) for entry in entries)
    whole = whole and all(isinstance(entry["eval_bits_per_byte"], float) for entry in evaluated)
    if not whole or (ended and not (evaluated and entries[-1]["seconds"])):
        path = checkpoint / STATE
        raise UserError(f"cannot read {path}: it is no state of a comparison's run; delete {checkpoint} to go on")
    for entry in evaluated:
        require_finite(entry["eval_bits_per_byte"], entry["step"])
    return entries


def require_finite(bits_per_byte: float, step: int) -> float:
    """Returns the bits per byte of a run after a step.

    Raises:
        NotFiniteError: they are not finite, or too large for a result.
    """
    if not _is_number(bits_per_byte):
        raise NotFiniteError(f"step {step}: the held-out text takes {bits_per_byte} bits per byte")
    return bits_per_byte


def _has_numbers(values: object, names: tuple[str, ...]) -> bool:
    return isinstance(values, dict) and all(_is_number(values.get(name)) for name in names)


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and 0 <= value <= LARGEST
