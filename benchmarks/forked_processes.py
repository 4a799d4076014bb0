"""Processes forked from a server that has imported everything. They start at once; a new Python imports for seconds."""

import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable
from multiprocessing import connection, forkserver
from pathlib import Path
from unittest import mock

# Imported by the server, of which there is one for a whole Python: what trains and draws its curve, and the other verbs
ROOMS = ["train.pipeline_trainer", "train.pretrain", "posttrain.sft_trainer", "serve.app", "evaluate.evaluation"]
ROOMS += ["export.deepseek", "export.gguf", "inspect.xray"]
PRELOADED = [*(f"moonwhale.{room}" for room in ROOMS), "matplotlib.backends.backend_agg"]


class ForkedProcess:
    """`target(*args)` in a process of its own, whose exit status is what the target returns.

    Args:
        out: file for what it prints to stdout; stderr goes to the file `err` of the same name.
        variables: environment variables in addition to this process's.
    """

    def __init__(self, out: Path, variables: dict[str, str], target: Callable, *args):
        self.out, self.err = out, out.with_suffix(".err")
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        # The server finds modules where this process does
        paths = os.pathsep.join(filter(None, sys.path))
        with mock.patch.dict(os.environ, {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}):
            forkserver.ensure_running()
        environment = dict(os.environ) | variables
        self.process = context.Process(target=_run, args=(self.out, self.err, environment, target, args), daemon=True)
        self.process.start()

    @property
    def said(self) -> str:
        return "".join(path.read_text() for path in (self.out, self.err) if path.exists())

    def until(self, beginning: str, seconds: float = 120) -> None:
        """Wait until it prints a line that begins so."""
        end = time.monotonic() + seconds
        while not any(line.startswith(beginning) for line in self.said.splitlines()):
            if not self.process.is_alive() or time.monotonic() > end:
                raise RuntimeError(f"no line began with {beginning!r}: {self.said}")
            time.sleep(0.02)

    def wait(self, seconds: float = 120) -> int:
        """Wait for its end, and return its exit status."""
        self.process.join(seconds)
        if self.process.exitcode is None:
            raise RuntimeError(f"it still runs after {seconds} s: {self.said}")
        return self.process.exitcode

    def kill(self) -> None:
        self.process.kill()
        self.process.join()


def _run(out: Path, err: Path, environment: dict[str, str], target: Callable, args: tuple) -> None:
    os.environ.clear()
    os.environ.update(environment)
    for stream, path in ((1, out), (2, err)):
        with path.open("w") as file:
            os.dup2(file.fileno(), stream)
    sys.exit(target(*args))


def rank_variables(world_size: int) -> list[dict[str, str]]:
    """Return the environment variables by which torchrun tells each rank of a run who it is."""
    if world_size == 1:
        return [{}]
    with socket.socket() as free:
        free.bind(("localhost", 0))
        run = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(world_size)}
    return [run | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world_size)]


def finish(processes: list[ForkedProcess], seconds: float = 300) -> str:
    """Wait until all processes have succeeded, and return what they printed.

    If one fails, the others are killed, since they may wait for it.

    Raises:
        RuntimeError: if one fails or takes too long.
    """
    end, forked = time.monotonic() + seconds, [process.process for process in processes]
    try:
        while not any(p.exitcode for p in forked) and (running := [p for p in forked if p.exitcode is None]):
            if not connection.wait([p.sentinel for p in running], max(0, end - time.monotonic())):
                break
    finally:
        for process in processes:
            process.kill()
    said = "".join(process.said for process in processes)
    if any(p.exitcode != 0 for p in forked):
        raise RuntimeError(f"exit statuses {[p.exitcode for p in forked]}: {said}")
    return said
