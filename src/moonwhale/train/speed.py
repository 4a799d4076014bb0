"""The speed of training between two log lines, by the clock of the host."""

import time


class SpeedMeter:
    """Counts the tokens of training steps, and the seconds that they took, until they are logged.

    Evaluations and checkpoints do not count: the clock is stopped before them, and started after them. The first step
    is left out too, since it warms up: nothing counts before the clock has been started.
    """

    def __init__(self):
        self._start: float | None = None  # None until the first step is over
        self._tokens = self._seconds = 0.0

    def begin_run(self) -> None:
        """Leaves out the step that comes next."""
        self._start = None

    def start(self) -> None:
        self._start = time.perf_counter()

    def stop(self) -> None:
        if self._start is not None:
            self._seconds += time.perf_counter() - self._start

    def count(self, tokens: int) -> None:
        """Counts the tokens of a batch, on all ranks together."""
        if self._start is not None:
            self._tokens += tokens

    def leave_out(self, seconds: float) -> None:
        """Leaves out seconds that a callback has taken since the clock was started."""
        if self._start is not None:
            self._start += seconds

    def pop(self) -> float | None:
        """Returns the tokens per second since the last call, and starts anew. None if no step was timed."""
        if not self._seconds:
            return None
        speed = self._tokens / self._seconds
        self._tokens = self._seconds = 0.0
        return speed
