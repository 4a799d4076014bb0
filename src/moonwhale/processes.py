"""The processes that torchrun started: which one this is, how they find each other, and who may print."""

import functools
import os
import time
import typing
import uuid
from datetime import timedelta

from moonwhale.errors import UserError, with_option_names

if typing.TYPE_CHECKING:
    import torch.distributed as dist


@functools.cache  # a pipeline takes RANK out of the environment
def is_main_process() -> bool:
    return int(os.environ.get("RANK", 0)) == 0


def world_size() -> int:
    """The processes that torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", 1))


def restarted() -> bool:
    """Whether torchrun has started the processes again, after one of them died."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0


def print_once(line: str) -> None:
    """Prints a line in the main process only. Options in backquotes are spelled as on the command line."""
    if is_main_process():
        print(with_option_names(line), flush=True)


def init_process_group(on_cpu: bool, timeout: int) -> None:
    """Makes the process group of all that torchrun started; none for a process that is alone.

    torch would do it with the keys of torchrun's store as they are. But that store outlives the processes: after a
    restart it still has the addresses of those before, and the new ones would try to reach them. So each start keeps
    its keys under a name of its own.

    Raises:
        UserError: not all came within `timeout` seconds.
    """
    if world_size() == 1:
        return
    import torch.distributed as dist

    limit = timedelta(seconds=timeout)
    store, rank, world = next(dist.rendezvous("env://", timeout=limit))
    store.set_timeout(limit)
    try:
        name = _name_of_start(store, rank, world, timeout)
    except (dist.DistStoreError, TimeoutError) as error:
        raise UserError(
            f"rank {rank}: not all {world} ranks came within {timeout} s: see what the others say, or, in "
            "moonwhale train, raise `parallel.timeout`"
        ) from error
    own = dist.PrefixStore(name, store)
    dist.init_process_group("gloo" if on_cpu else "nccl", store=own, rank=rank, world_size=world, timeout=limit)


def _name_of_start(store: "dist.Store", rank: int, world: int, timeout: int) -> str:
    """A name that the processes started together know, and none before them did.

    Rank 0 draws it. Every other rank asks for it under a number of its own, since what stands in the store may be an
    older one's, and rank 0 answers until all have heard it. (torchrun's count of restarts would do on one machine, but
    on several each counts its own.)
    """
    own = uuid.uuid4().hex
    if rank:
        store.set(f"asks/{rank}", own)
        name = store.get(f"answer/{own}").decode()
        store.add(f"heard/{name}", 1)
        return name
    end = time.monotonic() + timeout
    while store.add(f"heard/{own}", 0) < world - 1:
        if time.monotonic() > end:
            raise TimeoutError
        for other in range(1, world):
            if store.check([f"asks/{other}"]):
                store.set(f"answer/{store.get(f'asks/{other}').decode()}", own)
        time.sleep(0.05)
    return own
