"""How far long work on a text has come: a bar in a terminal, and lines elsewhere, such as in the log of a job."""

import sys
import time

from tqdm import tqdm

EVERY = 20.0  # seconds between two lines


class Progress:
    """Counts what is done, and shows a bar or writes lines to standard error. Use it as a context manager.

    The first line comes after EVERY seconds, so short work writes none. A bar is removed at the end.
    """

    def __init__(self, work: str, unit: str, total: int | None = None):
        """`unit` is the plural of what is counted, and `total` how much of it there is, if that is known."""
        self._work, self._unit, self._total, self._done = work, unit, total, 0
        self._bar = tqdm(desc=work, total=total, unit=f" {unit}", leave=False, disable=None)  # only in a terminal
        self._is_long_at = self._next_line_at = time.monotonic() + EVERY

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_) -> None:
        self._bar.close()

    def add(self, n: int, note: str = "") -> None:
        """Counts `n` more. `note` is what else there is to say."""
        self._done += n
        self._bar.update(n)
        if note:
            self._bar.set_postfix_str(note)
        if time.monotonic() >= self._next_line_at:
            self._write_line(note)

    def say(self, note: str) -> None:
        """Says what comes next, if the work so far has been long."""
        self._bar.set_postfix_str(note)
        if time.monotonic() >= self._is_long_at:
            self._write_line(note)

    def _write_line(self, note: str) -> None:
        if not self._bar.disable:
            return
        self._next_line_at = time.monotonic() + EVERY
        total = "" if self._total is None else f" of {self._total:,}"
        print(f"{self._work}: {self._done:,}{total} {self._unit}{note and f', {note}'}", file=sys.stderr, flush=True)
