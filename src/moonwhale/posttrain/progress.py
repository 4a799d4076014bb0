"""What a GRPO run shows of its progress: log lines, a summary, and a plot of the rewards at the end."""

import shlex
from pathlib import Path

from moonwhale.train.plots import save_plot, step_plot


def log_line(logs: dict) -> str | None:
    """Returns the line for an entry of the Trainer's log, or None for the last entry, which only sums up."""
    if "eval_reward" in logs:
        return evaluation_line(logs)
    return step_line(logs) if "loss" in logs else None


def rewards_of(logs: dict, prefix: str = "") -> dict[str, float]:
    """Returns the mean of each reward in a log entry, by the reward's name."""
    names = {key: key.removeprefix(prefix).split("/")[1] for key in logs if key.startswith(f"{prefix}rewards/")}
    return {name: logs[key] for key, name in names.items() if key.endswith("/mean") and logs[key] is not None}


def step_line(logs: dict) -> str:
    """Returns the line of an optimizer step.

    "no signal" is the share of groups in which all answers got the same reward, so that they teach nothing.
    """
    parts = []
    if "reward" in logs and logs["reward"] is None:
        parts += ["no reward applies"]
    elif "reward" in logs:  # missing in a step that reuses the answers of the step before (`iterations` > 1)
        parts += [f"reward {logs['reward']:.3f}"]
        parts += [f"{name} {value:.3f}" for name, value in rewards_of(logs).items()]
        parts += [f"no signal {logs['frac_reward_zero_std']:.0%}", f"length {logs['completions/mean_length']:.0f}"]
        parts += [f"cut off {logs['completions/clipped_ratio']:.0%}"] if logs["completions/clipped_ratio"] else []
    parts += [f"over limit {logs['over_limit']:.1%}"] if logs.get("over_limit") else []
    parts += [f"KL {logs['kl']:.4f}"] if "kl" in logs else []
    parts += [f"clipped {logs['clip_ratio/region_mean']:.1%}"] if logs.get("clip_ratio/region_mean") else []
    parts += [f"entropy {logs['entropy']:.3f}", f"grad {logs['grad_norm']:.2f}", f"{logs['step_time']:.1f} s"]
    return "  ".join(parts)


def evaluation_line(logs: dict) -> str:
    """Returns the line of the rewards on held-out questions."""
    rewards = [f"{name} {value:.3f}" for name, value in rewards_of(logs, "eval_").items()]
    rewards += [f"over limit {logs['eval_over_limit']:.1%}"] if logs.get("eval_over_limit") else []
    return "held out: " + ("  ".join(rewards) or "no reward applies")


def summary(history: list[dict], out: Path) -> str:
    """Returns the last lines of a finished run: the result, and what to do with it."""
    held_out = next(evaluation_line(entry) for entry in reversed(history) if "eval_reward" in entry)
    folder = shlex.quote(str(out))
    return (
        f"done       {history[-1]['step']:,} steps; {held_out}\n"
        f"curves     {out / 'rewards.png'}; answers: {out / 'completions'}; everything: tensorboard --logdir {folder}\n"
        f"model      {out}; measure its answers: moonwhale eval {folder} --task TASK"
    )


def plot_rewards(history: list[dict], out: Path) -> None:
    """Plots the Trainer's log history into `rewards.png` in `out`. Writes nothing without a training step with rewards.

    From top to bottom: each reward, with the held-out ones dashed; the length of the answers; the share of groups
    without a signal.
    """
    train, held_out = ([e for e in history if e.get(name) is not None] for name in ("reward", "eval_reward"))
    if not train:
        return
    figure, (rewards, lengths, no_signal) = step_plot(
        ["mean reward", "tokens per answer", "no signal"], [4, 1, 1], height=7
    )
    steps = [e["step"] for e in train]
    for i, name in enumerate(dict.fromkeys(name for e in train for name in rewards_of(e))):
        rewards.plot(steps, [rewards_of(e).get(name) for e in train], color=f"C{i}", label=name)
        values = [rewards_of(e, "eval_").get(name) for e in held_out]
        rewards.plot([e["step"] for e in held_out], values, "o--", color=f"C{i}", label=f"{name}, held out")
    lengths.plot(steps, [e["completions/mean_length"] for e in train], color="gray")
    no_signal.plot(steps, [e["frac_reward_zero_std"] for e in train], color="gray")
    no_signal.set_ylim(0, 1)
    save_plot(figure, out / "rewards.png")
