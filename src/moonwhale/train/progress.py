"""What a run on text prints and draws: log lines, a summary, and the loss curves."""

import math
import shlex
from pathlib import Path

from moonwhale.train.plots import save_plot, step_plot


def log_line(logs: dict) -> str | None:
    """The line for an entry of the Trainer's log. None for its last entry, which only sums up."""
    if "eval_loss_main" in logs:
        return evaluation_line(logs)
    return training_line(logs) if "loss" in logs else None


def training_line(logs: dict) -> str:
    """One line with the main figures of a training step. TensorBoard has all of them."""
    mtp = " ".join(f"{value:.3f}" for name, value in logs.items() if name.startswith("loss_mtp_"))
    parts = [f"loss {logs['loss_main']:.3f}"]
    parts += [f"mtp {mtp}"] if mtp else []
    parts += [f"lr {logs['learning_rate']:.1e}", f"grad {logs['grad_norm']:.2f}"]
    if "max_attention_logit" in logs:
        clipped = f" ({logs['clipped_heads']:.0f} clipped)" if logs["clipped_heads"] else ""
        parts.append(f"logit {logs['max_attention_logit']:.1f}{clipped}")
    if "expert_imbalance" in logs:
        parts.append(f"imbalance {logs['expert_imbalance']:.2f}")
    if "tokens_per_second" in logs:
        parts.append(f"{logs['tokens_per_second']:,.0f} tok/s, MFU {logs['mfu']:.1%}")
    return "  ".join(parts)


def evaluation_line(logs: dict) -> str:
    """One line with the figures of an evaluation on held-out rows."""
    parts = [f"held out: loss {logs['eval_loss_main']:.3f}"]
    if "eval_bits_per_byte" in logs:
        parts.append(f"{logs['eval_bits_per_byte']:.3f} bits per byte")
    first, *others = [f"{value:.0%}" for name, value in logs.items() if name.startswith("eval_accuracy_")]
    parts.append(f"next token right {first}" + (f", those after it {' '.join(others)}" if others else ""))
    return "  ".join(parts)


def summary(history: list[dict], out: Path, tokens: int | None = None) -> str:
    """The last lines of a run: its steps and tokens, the final evaluation, where its files are, and what to do next."""
    steps = history[-1]["step"]
    held_out = next(evaluation_line(entry) for entry in reversed(history) if "eval_loss_main" in entry)
    read = f", {tokens:,} tokens" if tokens else ""
    folder = shlex.quote(str(out))
    return (
        f"done       {steps:,} steps{read}; {held_out}\n"
        f"curves     {out / 'loss.png'}; all of them: tensorboard --logdir {folder}\n"
        f"model      {out}; talk to it: moonwhale chat {folder}"
    )


def plot_loss(history: list[dict], out: Path) -> None:
    """Draws the training loss of each depth, the held-out loss and the learning rate into `loss.png` in `out`.

    history: the Trainer's log history. Without a training step in it, no file is written.
    """
    train = [entry for entry in history if "loss_main" in entry]
    held_out = [entry for entry in history if "eval_loss_main" in entry]
    if not train:
        return
    figure, (losses, rate) = step_plot(["cross-entropy, nats per token", "learning rate"], [4, 1], height=6)
    steps = [entry["step"] for entry in train]
    losses.plot(steps, [entry["loss_main"] for entry in train], label="next token", linewidth=1.2)
    for name in sorted({name for entry in train for name in entry if name.startswith("loss_mtp_")}):
        depth = name.removeprefix("loss_mtp_")
        losses.plot(steps, [entry.get(name, math.nan) for entry in train], label=f"MTP module {depth}", linewidth=1.2)
    if held_out:
        values = [entry["eval_loss_main"] for entry in held_out]
        losses.plot([entry["step"] for entry in held_out], values, "k.--", label="next token, held out")
    rate.plot(steps, [entry["learning_rate"] for entry in train], color="gray")
    rate.set_ylim(bottom=0)
    save_plot(figure, out / "loss.png")
