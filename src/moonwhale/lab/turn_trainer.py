"""`TurnTrainer`: the trainer of `moonwhale train`, which stops after a turn and can follow a budget of seconds."""

import time
from collections.abc import Callable

import torch

from moonwhale.lab.config import Budget
from moonwhale.train.mtp_trainer import MTPTrainer

ENDLESS = 10**9  # steps; a budget of seconds ends the run


class TurnTrainer(MTPTrainer):
    """Trains until the end of the run's next turn, evaluates, saves a checkpoint and stops.

    Turn k of n ends when the run has used k/n of its budget. With a budget of steps, the run is bit-equal to one that
    is trained in one go. With a budget of seconds, the learning rate and the MTP weight follow the share of the seconds
    that has passed.

    Only training counts: neither evaluations nor checkpoints, and a turn's first step, which compiles and allocates,
    counts as long as its second. Where no second step follows, it counts at most the mean of the steps before.

    Args:
        budget: seconds or steps.
        turns: number of turns.
        seconds: training time of the turns before.
        schedule_steps: number of steps for which the arguments describe the schedule.
        on_step: called after each step with the position in the budget.
    """

    def __init__(
        self,
        *args,
        budget: Budget,
        turns: int,
        seconds: float,
        schedule_steps: int,
        on_step: Callable[[float], None],
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        self.budget, self.turns, self.seconds, self.on_step = budget, turns, seconds, on_step
        self.schedule_steps = schedule_steps
        self._timed = budget.unit == "seconds"
        self._first_took: float | None = None  # time of the turn's first step, until it is counted
        self._counted: int | None = None  # the last step that was counted
        self._turn_end = self._clock = 0.0

    @property
    def position(self) -> float:
        """How much of the budget is used, in its unit."""
        return self.seconds if self._timed else self.state.global_step

    @property
    def share(self) -> float:
        """The used share of the budget, in [0, 1]."""
        return min(1.0, self.position / self.budget.amount)

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        scheduler = super().create_scheduler(self.schedule_steps, optimizer)
        if self._timed:
            of_step = scheduler.lr_lambdas
            scheduler.lr_lambdas = [lambda _, f=f: f(self.share * self.schedule_steps) for f in of_step]
        return scheduler

    def _steps_done_and_left(self) -> tuple[float, float]:
        done = self.share * self.schedule_steps if self._timed else self.state.global_step
        return done, self.schedule_steps - done

    def _inner_training_loop(self, *args, **kwargs):
        self._counted = self._first_took = None
        self._clock = time.perf_counter()
        return super()._inner_training_loop(*args, **kwargs)

    def _maybe_log_save_evaluate(self, *args, **kwargs) -> None:
        if self.state.global_step != self._counted:  # Trainer also calls this at the end of an epoch
            self._count_step()
            if self._timed:
                self.lr_scheduler.step()  # Trainer called it before the time of this step was counted
            self.on_step(self.position)
        super()._maybe_log_save_evaluate(*args, **kwargs)
        self._clock = time.perf_counter()

    def _count_step(self) -> None:
        """Adds the time of a step, and ends the turn when it is over."""
        if self.args.device.type != "cpu":
            torch.accelerator.synchronize()
        took, control = time.perf_counter() - self._clock, self.control
        if self._counted is None:
            self._first_took = took
            done = next(k for k in range(self.turns) if self._end(k + 1) > self._before_step())
            self._turn_end = self._end(done + 1)
        else:
            self.seconds += took if self._first_took is None else 2 * took
            self._first_took = None
        self._counted = self.state.global_step
        if self._first_took is not None and (control.should_save or self.position >= self._turn_end):
            self.seconds, self._first_took = self.seconds + self._only_step_took(), None
        if self.position >= self._turn_end:
            control.should_log = control.should_evaluate = control.should_save = control.should_training_stop = True

    def _only_step_took(self) -> float:
        """Returns the time to count for the only step of a turn.

        If it is the first step of the run, no other step tells its time without warm-up. A budget of seconds leaves it
        out.
        """
        if before := self.state.global_step - 1:
            return min(self._first_took, self.seconds / before)
        return 0.0 if self._timed else self._first_took

    def _before_step(self) -> float:
        return self.seconds if self._timed else self.state.global_step - 1

    def _end(self, turn: int) -> float:
        return self.budget.amount * turn / self.turns

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Trainer's method, which adds the training time so far: a resumed run reads it from there."""
        super().log(logs | {"seconds": self.seconds}, start_time)
