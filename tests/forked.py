"""Processes that are forked from one with everything imported: there at once, where a fresh one imports for seconds."""

import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable
from multiprocessing import connection, forkserver
from pathlib import Path

import pytest

# Imported before a process is forked: what trains, and what draws its curve. There is one server for a whole Python:
# if benchmarks/parallel_runs.py has started it first, it has imported much the same.
PRELOAD = ["moonwhale.train.pipeline_trainer", "moonwhale.train.pretrain", "matplotlib.backends.backend_agg"]


class Forked:
    """`target(*args)` in a process of its own, which has this one's environment and what it is `told`, and ends with
    the status that the target returns. What it prints is in the file `out`, and what it complains of in `err`.
    """

    def __init__(self, out: Path, told: dict[str, str], target: Callable, *args):
        self.out, self.err = out, out.with_suffix(".err")
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))  # where it finds what to import
            patch.setenv("OMP_NUM_THREADS", "1")
            forkserver.ensure_running()
        environment = dict(os.environ) | told
        self.process = context.Process(target=_run, args=(self.out, self.err, environment, target, args), daemon=True)
        self.process.start()

    @property
    def said(self) -> str:
        return "".join(path.read_text() for path in (self.out, self.err) if path.exists())

    def until(self, beginning: str) -> None:
        """Waits for a line that begins so."""
        end = time.monotonic() + 120
        while not any(line.startswith(beginning) for line in self.said.splitlines()):
            assert self.process.is_alive() and time.monotonic() < end, self.said
            time.sleep(0.02)

    def wait(self, seconds: float = 120) -> int:
        self.process.join(seconds)
        assert self.process.exitcode is not None, self.said
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


def finish(processes: list[Forked], seconds: float = 300) -> str:
    """What they say until all have ended well. Where one fails, the others, which may wait for it, are killed."""
    end, forked = time.monotonic() + seconds, [process.process for process in processes]
    try:
        while not any(p.exitcode for p in forked) and (running := [p for p in forked if p.exitcode is None]):
            if not connection.wait([p.sentinel for p in running], max(0, end - time.monotonic())):
                break
    finally:
        for process in processes:
            process.kill()
    said = "".join(process.said for process in processes)
    assert [p.exitcode for p in forked] == [0] * len(forked), said
    return said


def train(argv: list[str]) -> int:
    import torch

    from moonwhale import cli
    from moonwhale.optim import muonclip

    muonclip._fast_dtype = lambda device: torch.float32  # so that rounding stays rounding
    return cli.main(["train", *argv])


def start(folder: Path, *argvs: list[str]) -> list[Forked]:
    """`moonwhale train` once for each list of arguments, as ranks of one run, told what torchrun would tell."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        told = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(len(argvs))}
    return [
        Forked(folder / f"rank{rank}.out", told | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, train, list(argv))
        for rank, argv in enumerate(argvs)
    ]
