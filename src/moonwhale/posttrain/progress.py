"""What a GRPO run shows of itself: a line now and then, and a picture at the end."""

from pathlib import Path

from moonwhale.train.plots import save_plot, step_plot


def log_line(logs: dict) -> str | None:
    """What to say of an entry of the Trainer's log; nothing of its last one, which only sums up."""
    return reward_evaluation_line(logs) if "eval_reward" in logs else reward_line(logs) if "loss" in logs else None


def rewards_of(logs: dict, prefix: str = "") -> dict[str, float]:
    """The mean of each reward that was given, by its name."""
    names = {key: key.removeprefix(prefix).split("/")[1] for key in logs if key.startswith(f"{prefix}rewards/")}
    return {name: logs[key] for key, name in names.items() if key.endswith("/mean") and logs[key] is not None}


def reward_line(logs: dict) -> str:
    """One line of a GRPO step. "no signal" is the share of groups whose answers all got the same reward."""
    parts = []
    if "reward" in logs:  # not where a step learns from the last one's answers again
        parts += [f"reward {logs['reward']:.3f}"]
        parts += [f"{name} {value:.3f}" for name, value in rewards_of(logs).items()]
        parts += [f"no signal {logs['frac_reward_zero_std']:.0%}", f"length {logs['completions/mean_length']:.0f}"]
        parts += [f"cut off {logs['completions/clipped_ratio']:.0%}"] if logs["completions/clipped_ratio"] else []
    parts += [f"KL {logs['kl']:.4f}"] if "kl" in logs else []
    parts += [f"clipped {logs['clip_ratio/region_mean']:.1%}"] if logs.get("clip_ratio/region_mean") else []
    parts += [f"entropy {logs['entropy']:.3f}", f"grad {logs['grad_norm']:.2f}", f"{logs['step_time']:.1f} s"]
    return "  ".join(parts)


def reward_evaluation_line(logs: dict) -> str:
    """One line of the rewards on held-out questions."""
    return "held out: " + "  ".join(f"{name} {value:.3f}" for name, value in rewards_of(logs, "eval_").items())


def reward_summary(history: list[dict], out: Path) -> str:
    """What a finished GRPO run came to, and what to do with it."""
    held_out = next(reward_evaluation_line(entry) for entry in reversed(history) if "eval_reward" in entry)
    return (
        f"done       {history[-1]['step']:,} steps; {held_out}\n"
        f"curves     {out / 'rewards.png'}; answers: {out / 'completions'}; all of it: tensorboard --logdir {out}\n"
        f"model      {out}; more of its answers: moonwhale eval {out} --task TASK"
    )


def plot_rewards(history: list[dict], out: Path) -> None:
    """Draws each reward, held-out ones dashed, the length of answers and the share of groups without a signal into
    `rewards.png` in `out`.

    history: the Trainer's log history. Without a training step in it, no file is written.
    """
    train, held_out = ([e for e in history if name in e] for name in ("reward", "eval_reward"))
    if not train:
        return
    figure, (rewards, lengths, no_signal) = step_plot(
        ["mean reward", "tokens an answer", "no signal"], [4, 1, 1], height=7
    )
    steps = [e["step"] for e in train]
    for i, name in enumerate(rewards_of(train[0])):
        rewards.plot(steps, [rewards_of(e).get(name) for e in train], color=f"C{i}", label=name)
        values = [rewards_of(e, "eval_").get(name) for e in held_out]
        rewards.plot([e["step"] for e in held_out], values, "o--", color=f"C{i}", label=f"{name}, held out")
    lengths.plot(steps, [e["completions/mean_length"] for e in train], color="gray")
    no_signal.plot(steps, [e["frac_reward_zero_std"] for e in train], color="gray")
    no_signal.set_ylim(0, 1)
    save_plot(figure, out / "rewards.png")
