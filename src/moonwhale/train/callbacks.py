"""Callbacks of every run: a progress bar with log lines, and a clean stop on Ctrl-C."""

import contextlib
import math
import signal
import sys
import threading
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerState

from moonwhale.model.documents import needs_static_shapes
from moonwhale.units import duration

ESTIMATE_AFTER = 10, 20.0  # timed micro-batches, or seconds if these come first
STOP_SIGNALS = [signal.SIGINT, signal.SIGTERM]
if hasattr(signal, "SIGHUP"):  # the terminal or ssh was closed; Windows has no such signal
    STOP_SIGNALS.append(signal.SIGHUP)


def write_line(line: str) -> None:
    """Prints a line above the progress bar."""
    tqdm.write(line, file=sys.stdout)
    sys.stdout.flush()


class StepClock:
    """Measures the time of steps, evaluations and checkpoints included, to tell how long the steps to come will take.

    It ticks after every micro-batch. The first one is left out, since it warms up.
    """

    def __init__(self):
        self.start: tuple[float, float] | None = None  # the steps done after the first micro-batch, and when that was
        self.done = 0.0
        self.timed = 0  # micro-batches

    def tick(self, done: float) -> None:
        """Notes that so many steps are done; within a step it is a fraction."""
        self.done = done
        if self.start is None:
            self.start = done, time.monotonic()
        else:
            self.timed += 1

    @property
    def elapsed(self) -> float:
        """The seconds since the first micro-batch."""
        return time.monotonic() - self.start[1] if self.start else 0.0

    def left(self, max_steps: int) -> float | None:
        """The seconds that the steps to come will take, or None if nothing has been timed."""
        return self.elapsed / (self.done - self.start[0]) * (max_steps - self.done) if self.timed else None


class ProgressLines(TrainerCallback):
    """Prints a line for each log entry and evaluation, and shows a bar over the steps in a terminal.

    The lines of training say how long the run will take, and so does a line of its own early on (ESTIMATE_AFTER).

    Use it as a context manager: leaving it clears the bar. (transformers' ProgressCallback prints whole dicts, leaves
    its bar in place, and starts it at 0 in a resumed run.)

    log_line: returns the line for a log entry, or None for no line.
    """

    def __init__(self, log_line: Callable[[dict], str | None]):
        self.log_line = log_line
        self.clock = StepClock()
        self.substeps = 0  # micro-batches of the step that is under way
        self.told_time = False
        self.bar: tqdm | None = None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.bar is not None:
            self.bar.close()

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self.bar = tqdm(
                total=state.max_steps,
                initial=state.global_step,
                unit="step",
                dynamic_ncols=True,
                leave=False,
                disable=None,  # shown only in a terminal
            )

    def on_step_end(self, args, state, control, **kwargs):
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)
        self.substeps = 0
        self._tick(state, state.global_step)

    def on_substep_end(self, args, state, control, **kwargs):
        self.substeps += 1
        self._tick(state, state.global_step + self.substeps / args.gradient_accumulation_steps)

    def _tick(self, state: TrainerState, done: float) -> None:
        self.clock.tick(done)
        micro_batches, seconds = ESTIMATE_AFTER
        enough = self.clock.timed >= micro_batches or (self.clock.timed and self.clock.elapsed >= seconds)
        if not enough or self.told_time or state.max_steps - done < 1:
            return
        self.told_time = True
        if state.is_world_process_zero:
            write_line(f"time       {duration(self.clock.left(state.max_steps))} for the steps to come")

    def on_log(self, args, state, control, logs=None, **kwargs):
        line = self.log_line(logs)
        if line and state.is_world_process_zero:
            seconds = self.clock.left(state.max_steps) if "loss" in logs else None
            left = f"  {duration(seconds)} left" if seconds else ""
            write_line(f"step {state.global_step:>6}  {line}{left}")


class StopAtStepEnd(TrainerCallback):
    """Turns Ctrl-C, SIGTERM or SIGHUP into a checkpoint and a stop at the end of the step. Use it as a context manager.

    GRPO stops where its next step draws new answers, since a checkpoint does not hold the old ones.
    All ranks stop after the same step. With several GPUs it is the step after the one in which a rank was asked.
    A second Ctrl-C stops at once, without a checkpoint.
    """

    def __init__(self):
        self.stop_requested = False
        self._read_last: Callable[[], float] = lambda: 0.0  # the ranks' answer in the step before

    def __enter__(self):
        in_main_thread = threading.current_thread() is threading.main_thread()  # elsewhere Python sets no handlers
        self.previous_handlers = {
            number: signal.signal(number, self._request_stop) for number in STOP_SIGNALS if in_main_thread
        }
        return self

    def __exit__(self, *_):
        for number, handler in self.previous_handlers.items():
            signal.signal(number, handler)

    def _request_stop(self, number, frame):
        if self.stop_requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.stop_requested = True
        with contextlib.suppress(OSError):  # the terminal may be gone
            tqdm.write("stopping at the end of a step (Ctrl-C again: at once, without saving)", file=sys.stderr)

    def on_step_end(self, args, state, control, **kwargs):
        several = dist.is_initialized() and dist.get_world_size() > 1
        stop = self._any_rank_requested(args.device) if several else self.stop_requested
        micro_batches = getattr(args, "steps_per_generation", 1) * getattr(args, "num_iterations", 1)
        accumulation = args.gradient_accumulation_steps
        steps_per_rollout = math.lcm(micro_batches, accumulation) // accumulation
        if stop and state.global_step % steps_per_rollout == 0:
            control.should_training_stop = control.should_save = True

    def _any_rank_requested(self, device: torch.device) -> bool:
        """Returns whether any rank was asked to stop; all ranks get the same answer.

        On GPUs it is the answer of the step before, since reading this step's would force a host sync.
        """
        requested = torch.full((), float(self.stop_requested), device=device)  # torch.tensor would force a host sync
        dist.all_reduce(requested, dist.ReduceOp.MAX)
        read = _start_copy(requested)
        if needs_static_shapes(device):
            read, self._read_last = self._read_last, read
        stop = bool(read())
        self.stop_requested |= stop
        return stop


def _start_copy(value: Tensor) -> Callable[[], float]:
    """Starts to copy a number to the host. Returns a function that waits for this copy alone and reads the number."""
    if not value.is_cuda:
        return value.item
    copy = value.to("cpu", non_blocking=True)  # into pinned memory
    copied = torch.cuda.Event()
    copied.record(torch.cuda.current_stream(value.device))

    def read() -> float:
        copied.synchronize()
        return copy.item()

    return read
