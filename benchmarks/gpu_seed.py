"""A run of `seed_190m` on all text at hand within a number of seconds, a part of gpu.py."""

import math
import tempfile
import time
from pathlib import Path

import transformers

from moonwhale.train.config import TrainConfig
from moonwhale.train.pretrain import build

TOKENS_PER_STEP = 65_536
SHARE_OF_STEPS = 0.7  # of the steps that the measured speed promises; evaluations and Muon take the rest


class TimeKeeper(transformers.TrainerCallback):
    """Evaluates about ten times, evenly in time, and ends the run when its seconds are over."""

    def __init__(self, seconds: float):
        self.seconds, self.start, self.evaluations, self.curve = seconds, time.perf_counter(), 0, []

    def on_step_end(self, args, state, control, **_):
        passed = time.perf_counter() - self.start
        over = passed >= self.seconds or state.global_step >= state.max_steps
        if over or passed >= self.seconds * (self.evaluations + 1) / 10:
            self.evaluations += 1
            control.should_evaluate = True
        control.should_training_stop = control.should_training_stop or over
        control.should_save = False

    def on_evaluate(self, args, state, control, metrics, **_):
        passed = round(time.perf_counter() - self.start, 1)
        self.curve.append([passed, state.global_step, round(metrics["eval_bits_per_byte"], 4)])


def train(seconds: float, texts: list[str], speed: float | None, **changes) -> dict:
    """Trains on the files `texts` and Python's standard library.

    `speed` is the tokens/s that a step without the optimizer's update was measured at. The schedule ends before the
    time does if that is known; otherwise the run may stop on its plateau.

    Returns:
        seed_bits_per_byte: the last held-out value.
        seed_curve: [seconds, step, bits per byte] of each evaluation.
        seed_steps: the steps that were planned, and the texts.
    """
    begin = time.perf_counter()
    data = ",".join(f"{name}={1 / (1 + len(texts)):.4f}" for name in ("python", *texts)) if texts else "python"
    steps = math.ceil(SHARE_OF_STEPS * seconds * (speed or 200_000) / TOKENS_PER_STEP)
    with tempfile.TemporaryDirectory() as folder:
        options = {
            "preset": "seed_190m",
            "out": str(Path(folder) / "run"),
            "data": data,
            "tokens_per_step": TOKENS_PER_STEP,
            "steps": max(2, steps),
            "warmup_steps": min(200, steps // 10),
            "log_every": 10,
            "save_every": 0,
            "eval_every": 0,
            "report_to": ["none"],
        }
        run = build(TrainConfig.resolve(options | changes))
        keeper = TimeKeeper(seconds - (time.perf_counter() - begin))
        trainer = run.make_trainer(callbacks=[keeper])
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
    return {
        "seed_bits_per_byte": keeper.curve[-1][2] if keeper.curve else None,
        "seed_curve": keeper.curve,
        "seed_steps": {"planned": trainer.state.max_steps, "texts": ["python", *(Path(t).name for t in texts)]},
    }
