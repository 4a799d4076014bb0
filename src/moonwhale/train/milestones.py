"""The checkpoints of a run that outlive newer ones: the best on held-out data, and the last before the decay."""

from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from transformers import TrainerCallback, TrainerState, TrainingArguments

from moonwhale.checkpoint import list_checkpoints, log_history, step_of
from moonwhale.errors import UserError


def _held_out_name(history: list[dict]) -> str:
    """Returns the log's name for the held-out figure: the reward of a GRPO run, else the loss of the next token."""
    return "eval_reward" if any("eval_reward" in entry for entry in history) else "eval_loss_main"


def held_out_figures(history: list[dict]) -> dict[int, float]:
    """Returns the held-out reward, or loss in nats per token, after each evaluated step, as logged."""
    name = _held_out_name(history)
    figures = {entry["step"]: entry[name] for entry in history if name in entry}
    return {step: figure for step, figure in figures.items() if figure is not None}


def best_step(history: list[dict], steps: Iterable[int]) -> int | None:
    """Returns the step with the largest reward, or the smallest loss, of those among `steps` that were evaluated: the
    earliest of equal ones.
    """
    figures = held_out_figures(history)
    best = max if _held_out_name(history) == "eval_reward" else min
    return best(sorted(figures.keys() & set(steps)), key=figures.get, default=None)


def evaluated_checkpoints(history: list[dict], out: str | Path) -> dict[int, Path]:
    """Returns a run's checkpoints that were evaluated, by step.

    One whose own log has another figure for its step is left over: the run was extended or shortened, and came past
    this step again with another learning rate.
    """
    figures, found = held_out_figures(history), {}
    for path in list_checkpoints(out):
        step = step_of(path)
        with suppress(UserError):  # a damaged checkpoint
            if step in figures and held_out_figures(log_history(path)).get(step) == figures[step]:
                found[step] = path
    return found


def milestones(state: TrainerState, args: TrainingArguments, out: str) -> set[str]:
    """Returns the names of the checkpoints in `out` to keep besides the newest ones, that of the current step included.

    The last one of the steps that a longer run would share (`last_shared_step`) is where the run can be extended.
    """
    history = state.log_history
    kept = {best_step(history, [state.global_step, *evaluated_checkpoints(history, out)])}
    steps = {state.global_step, *map(step_of, list_checkpoints(out))}
    kept.add(max((step for step in steps if step <= args.last_shared_step), default=None))
    return {f"checkpoint-{step}" for step in kept if step is not None}


class SaveLastSharedStep(TrainerCallback):
    """Saves a checkpoint of the last step that a longer run would share, so that every run can be extended."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == args.last_shared_step:
            control.should_save = True


def best_checkpoint(history: list[dict], out: str | Path) -> Path | None:
    """Returns the best checkpoint of those in a run's folder that were evaluated."""
    evaluated = evaluated_checkpoints(history, out)
    return evaluated.get(best_step(history, evaluated))


def describe_best(history: list[dict], out: str | Path) -> str | None:
    """Returns a line that names the best checkpoint of a finished run, or None if only one was evaluated."""
    figures, best = held_out_figures(history), best_checkpoint(history, out)
    if best is None or len(figures.keys() - {0}) < 2:  # step 0 is that of the model from which the run went on
        return None
    last = max(figures)
    if step_of(best) == last:
        return f"best       the last step, of those that were evaluated and saved: {figures[last]:.3f}"
    return (
        f"best       {best}, with {figures[step_of(best)]:.3f} on held-out data; the last step has {figures[last]:.3f}"
    )
