"""Compares answers: as text after normalisation, then as mathematics (math-verify) within a time limit.

An answer such as 9^{9^{9}} would take math-verify longer than a lifetime. So a worker process compares, and an alarm of
the operating system ends it. This file is also the worker's script, and imports only what the worker needs.
"""

import contextlib
import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import unicodedata

TIME_LIMIT = 3.0  # seconds for one comparison
MEMORY_LIMIT = 4 << 30  # bytes of the worker's address space, where the operating system limits it
MAX_LENGTH = 2000  # characters of an answer that are compared as mathematics
QUOTES = ('""', "''", "``", "“”", "‘’", "«»", "„“", "$$")
WRAPPED = re.compile(r"\\(?:boxed|text|textbf|mathrm)\s*\{((?:[^{}]|\{[^{}]*\})*)\}")
KEPT_BY_NFKC = ("<super>", "<sub>", "<fraction>")  # x² is not x2

log = logging.getLogger(__name__)


def normalize(answer: str) -> str:
    r"""Returns an answer without differences of case, spaces, Unicode form, quotes, \boxed, \text and a final period.

    LaTeX keeps its case: \Gamma is not \gamma.
    """
    text = "".join(
        c if unicodedata.decomposition(c).startswith(KEPT_BY_NFKC) else unicodedata.normalize("NFKC", c)
        for c in unicodedata.normalize("NFC", answer)
    )
    text, before = " ".join(text.split()), None
    while text != before:
        before = text
        if wrapped := WRAPPED.fullmatch(text):
            text = wrapped[1].strip()
        if len(text) > 2 and text[0] + text[-1] in QUOTES:
            text = text[1:-1].strip()
        text = text.removesuffix(".").rstrip() or text
    return text if "\\" in text else text.casefold()


def same_answer(right: str, given: str) -> bool:
    """Whether two answers are equal as text after `normalize`, or as mathematics.

    A comparison that exceeds the limits of time or memory counts as wrong, and is reported.
    """
    if normalize(right) == normalize(given):
        return True
    if not given.strip() or len(given) > MAX_LENGTH:
        return False
    return _worker.compare(right, given)


class _Worker:
    """The process that compares answers. It is started at the first comparison, and after each that ended it."""

    def __init__(self):
        self.lock = threading.Lock()
        self.process: subprocess.Popen | None = None
        self.owner: int | None = None  # a forked process must not share the pipes of its parent
        self.out_of_time = 0

    def compare(self, right: str, given: str) -> bool:
        with self.lock:
            if self.process is None or self.owner != os.getpid():
                self._start()
            try:
                self.process.stdin.write(json.dumps([right, given]).encode() + b"\n")
                self.process.stdin.flush()
                answer = self.process.stdout.readline()
            except BrokenPipeError:
                answer = b""
            except BaseException:  # an interrupt leaves an answer unread: the next comparison would take it as its own
                self._end()
                raise
            if answer:
                return answer == b"1\n"
            self._end()
            self.out_of_time += 1
        log.warning("an answer counts as wrong, for comparing it takes too long (%d so far)", self.out_of_time)
        return False

    def _start(self) -> None:
        # A session of its own keeps Ctrl-C from the worker. It ends when its input does.
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        self.owner = os.getpid()
        self.process.stdout.readline()  # the time limit does not cover the worker's imports

    def _end(self) -> None:
        self.process.kill()
        self.process.wait()
        self.process.stdin.raw.close()
        self.process.stdout.close()
        self.process = None


_worker = _Worker()
os.register_at_fork(after_in_child=lambda: setattr(_worker, "lock", threading.Lock()))


def _serve() -> None:
    """Answers each line [right, given] of the input by 1 or 0. The alarm ends the process, also within C code."""
    sys.path.pop(0)  # this file's folder, whose modules have the names of others
    import math_verify

    logging.disable()
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
    print("ready", flush=True)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_REAL, TIME_LIMIT)
        try:
            right, given = (math_verify.parse(text, parsing_timeout=None) for text in json.loads(line))
            same = math_verify.verify(right, given, timeout_seconds=None)
        except Exception:  # sympy fails on some expressions in its own ways, and MemoryError is one of them
            same = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(int(same), flush=True)


if __name__ == "__main__":
    _serve()
