"""The processes that torchrun started: rank, world size, printing, and the default process group."""

import functools
import os
import time
import typing
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

from moonwhale.errors import UserError, with_option_names

if typing.TYPE_CHECKING:
    import torch.distributed as dist


@functools.cache  # since a pipelined run removes RANK from the environment later
def is_main_process() -> bool:
    """Whether this process has rank 0. It alone prints and writes the run's files."""
    return int(os.environ.get("RANK", 0)) == 0


def world_size() -> int:
    """The number of processes that torchrun started, or 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", 1))


def restarted() -> bool:
    """Whether torchrun has restarted the processes after one of them died."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0


def print_on_rank_0(line: str) -> None:
    """Prints a line in the main process only. Options in backquotes are spelled as on the command line."""
    if is_main_process():
        print(with_option_names(line), flush=True)


def init_process_group(on_cpu: bool, timeout: int) -> None:
    """Initializes the default process group, with gloo on a CPU and NCCL on a GPU. Does nothing in a single process.

    `dist.init_process_group` alone would use the keys of torchrun's store as they are. That store outlives the
    processes: after a restart it still holds the addresses of the processes before. So the keys of each launch get a
    prefix of their own.

    Raises:
        UserError: not all processes joined within `timeout` seconds.
    """
    if world_size() == 1:
        return
    import torch.distributed as dist

    limit = timedelta(seconds=timeout)
    store, rank, world = next(dist.rendezvous("env://", timeout=limit))
    store.set_timeout(limit)
    try:
        name = _launch_name(store, rank, world, timeout)
    except (dist.DistStoreError, TimeoutError) as error:
        raise UserError(
            f"rank {rank}: not all {world} ranks joined within {timeout} s: see what the others print, or, in "
            "moonwhale train, raise `parallel.timeout`"
        ) from error
    own = dist.PrefixStore(name, store)
    dist.init_process_group("gloo" if on_cpu else "nccl", store=own, rank=rank, world_size=world, timeout=limit)


@contextmanager
def left_process_group() -> Iterator[None]:
    """Context at whose end a process that torchrun started has left the default process group.

    If that is left to the interpreter's exit, gloo's threads may abort the process.
    """
    started_by_torchrun = "WORLD_SIZE" in os.environ
    try:
        yield
    finally:
        if started_by_torchrun:
            import torch.distributed as dist

            if dist.is_initialized():
                dist.destroy_process_group()


def _launch_name(store: "dist.Store", rank: int, world: int, timeout: int) -> str:
    """A name unique to this launch, agreed by all its ranks.

    Rank 0 draws it. Each other rank asks for it with a random number of its own, since an answer that is already in the
    store may belong to an earlier launch. Rank 0 answers until all ranks have got the name. (torchrun's restart count
    would do on one machine, but each machine counts its own restarts.)
    """
    own = uuid.uuid4().hex
    if rank:
        store.set(f"asks/{rank}", own)
        name = store.get(f"answer/{own}").decode()  # waits for rank 0
        store.add(f"received/{name}", 1)
        return name
    deadline = time.monotonic() + timeout
    while store.add(f"received/{own}", 0) < world - 1:  # adding 0 reads the counter
        if time.monotonic() > deadline:
            raise TimeoutError
        for other in range(1, world):
            if store.check([f"asks/{other}"]):
                request = store.get(f"asks/{other}").decode()
                store.set(f"answer/{request}", own)
        time.sleep(0.05)
    return own
