"""What a run shows of itself: a progress bar, a line now and then, and a picture at the end."""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm.auto import tqdm
from transformers import TrainerCallback


class Progress(TrainerCallback):
    """A line at each log and evaluation, made by `line_of`, and in a terminal a bar over the steps. Use it as a
    context: leaving it clears the bar.
    """

    def __init__(self, line_of: Callable[[dict], str | None]):
        self.line_of, self.bar = line_of, None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.bar is not None:
            self.bar.close()

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            done = state.global_step
            self.bar = tqdm(
                total=state.max_steps, initial=done, unit="step", dynamic_ncols=True, leave=False, disable=None
            )

    def on_step_end(self, args, state, control, **kwargs):
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args, state, control, logs=None, **kwargs):
        line = self.line_of(logs)
        if line and state.is_world_process_zero:
            tqdm.write(f"step {state.global_step:>6}  {line}", file=sys.stdout)
            sys.stdout.flush()


def line_of(logs: dict) -> str | None:
    """What to say of an entry of the Trainer's log; nothing of its last one, which only sums up."""
    return evaluation_line(logs) if "eval_loss_main" in logs else training_line(logs) if "loss" in logs else None


def training_line(logs: dict) -> str:
    """One line of what matters; everything else is in TensorBoard."""
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
    """One line of an evaluation."""
    parts = [f"held out: loss {logs['eval_loss_main']:.3f}"]
    if "eval_bits_per_byte" in logs:
        parts.append(f"{logs['eval_bits_per_byte']:.3f} bits per byte")
    first, *others = [f"{value:.0%}" for name, value in logs.items() if name.startswith("eval_accuracy_")]
    parts.append(f"next token right {first}" + (f", those after it {' '.join(others)}" if others else ""))
    return "  ".join(parts)


def summary(history: list[dict], tokens_per_step: int | None, out: Path) -> str:
    """What a finished run came to, and what to do with it."""
    steps = history[-1]["step"]
    held_out = next(evaluation_line(entry) for entry in reversed(history) if "eval_loss_main" in entry)
    tokens = f", {steps * tokens_per_step:,} tokens" if tokens_per_step else ""
    return (
        f"done       {steps:,} steps{tokens}; {held_out}\n"
        f"curves     {out / 'loss.png'}; all of them: tensorboard --logdir {out}\n"
        f"model      {out}; talk to it: moonwhale chat {out}"
    )


def plot_loss(history: list[dict], path: str | Path) -> None:
    """Draws the loss of every depth and the held-out one over the steps, and the learning rate, from the Trainer's log
    history; nothing if there is none yet.
    """
    train = [entry for entry in history if "loss_main" in entry]
    held_out = [entry for entry in history if "eval_loss_main" in entry]
    if not train:
        return
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (top, bottom) = plt.subplots(2, 1, figsize=(8, 6), sharex=True, height_ratios=(4, 1), layout="constrained")
    depths = sorted({name for entry in train for name in entry if name.startswith("loss_mtp_")})
    for name, label in [("loss_main", "next token"), *((d, f"MTP module {d[9:]}") for d in depths)]:
        top.plot([e["step"] for e in train], [e[name] for e in train], label=label, linewidth=1.2)
    if held_out:
        losses = [e["eval_loss_main"] for e in held_out]
        top.plot([e["step"] for e in held_out], losses, "k.--", label="next token, held out")
    top.set_ylabel("cross-entropy, nats per token")
    top.grid(alpha=0.3)
    top.legend(frameon=False)
    bottom.plot([e["step"] for e in train], [e["learning_rate"] for e in train], color="gray")
    bottom.set_ylabel("learning rate")
    bottom.set_xlabel("optimizer step")
    bottom.set_ylim(bottom=0)
    figure.align_ylabels()
    unfinished = Path(path).with_name(f".{Path(path).name}")
    figure.savefig(unfinished, format="png", dpi=120)
    plt.close(figure)
    os.replace(unfinished, path)


class StopAtStepEnd(TrainerCallback):
    """As a context, turns Ctrl-C (or SIGTERM) into a checkpoint and a stop at the end of the step, on all ranks after
    the same one; a second Ctrl-C stops at once.
    """

    def __init__(self):
        self.asked = False

    def __enter__(self):
        self.before = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _ask(self, number, frame):
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = True
        tqdm.write("stopping after this step (Ctrl-C again: at once, without saving)", file=sys.stderr)

    def on_step_end(self, args, state, control, **kwargs):
        if dist.is_initialized():
            asked = torch.tensor(float(self.asked), device=args.device)
            dist.all_reduce(asked, dist.ReduceOp.MAX)
            self.asked = bool(asked)
        if self.asked:
            control.should_training_stop = control.should_save = True
