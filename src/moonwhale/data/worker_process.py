"""A process that does work which may never end or fill the memory, and that the operating system ends in that case.

Mathematics that a model wrote is computed there. Templates and tokenizers that came with a checkpoint are tried there.
This file is the process's script too: it imports one module, calls its function `prepare`, and answers each request by
its function `answer`.
"""

import contextlib
import importlib
import json
import logging
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

DOCTOR = "moonwhale doctor names what is missing"
MEMORY_LIMIT = 1 << 30  # bytes that the process may add to what its imports took, where the system can limit it


class WorkerProcess:
    """The process for `module`. It is started at the first request, and after each that ended it.

    `seconds` bounds one request. What `prepare` does is not counted.
    """

    def __init__(self, module: str, seconds: float):
        self.command = [sys.executable, __file__, module, str(seconds)]
        self.lock = threading.Lock()
        self.process: subprocess.Popen | None = None
        self.owner: int | None = None  # a forked process must not share the pipes of its parent
        if hasattr(os, "register_at_fork"):  # Windows does not fork
            os.register_at_fork(after_in_child=lambda: setattr(self, "lock", threading.Lock()))

    def ask(self, request: object) -> object | None:
        """Returns the answer to a request, both JSON values, or None if a limit was exceeded."""
        with self.lock:
            if self.process is None or self.owner != os.getpid():
                self._start()
            try:
                self.process.stdin.write(json.dumps(request).encode() + b"\n")
                self.process.stdin.flush()
                line = self.process.stdout.readline()
            except BrokenPipeError:
                line = b""
            except BaseException:  # an interrupt leaves an answer unread: the next request would take it as its own
                self._end()
                raise
            if line.endswith(b"\n"):
                return json.loads(line)
            self._end()
            return None

    def _start(self) -> None:
        if not hasattr(signal, "SIGALRM"):
            from moonwhale.errors import UserError  # not for the process's script, which has another path

            work = "templates, tokenizers and answers"
            raise UserError(f"{sys.platform} cannot bound the time of {work}: use Linux or macOS")
        # A session of its own keeps Ctrl-C from the process. It ends when its input does.
        self.process = subprocess.Popen(
            self.command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        self.owner = os.getpid()
        if not self.process.stdout.readline():
            from moonwhale.errors import UserError

            self._end()
            raise UserError(f"the worker process of {self.command[2]} ended at its start: {DOCTOR}")

    def _end(self) -> None:
        self.process.kill()
        self.process.wait()
        self.process.stdin.raw.close()
        self.process.stdout.close()
        self.process = None


def _limit_memory() -> None:
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + MEMORY_LIMIT
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _serve(module: str, seconds: float) -> None:
    """Answers each line of the input by a line. The alarm ends the process, also within C code."""
    sys.path[0] = str(Path(__file__).parents[2])  # not this folder, whose modules have the names of others
    work = importlib.import_module(module)
    work.prepare()
    logging.disable()
    _limit_memory()
    print("ready", flush=True)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_REAL, seconds)
        reply = json.dumps(work.answer(json.loads(line)))
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(reply, flush=True)


if __name__ == "__main__":
    _serve(sys.argv[1], float(sys.argv[2]))
