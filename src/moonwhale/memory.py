"""The memory that this process may use: the machine's, or less where a control group (cgroup) limits it.

A container sees the machine's whole memory, and its processes are killed at the limit of their cgroup.
"""

from collections.abc import Iterator
from pathlib import Path

import psutil

SYSTEM = Path("/")  # the root of the file system that describes this process
LIMIT_AND_USE = {  # for each version of cgroups: files with a limit and the bytes in use; the file cache within these
    "v2": ("memory.max", "memory.current", "inactive_file"),
    "v1": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


def total_bytes() -> int:
    """Return the bytes of memory that this process could ever use."""
    return min([psutil.virtual_memory().total, *(limit for limit, _ in _cgroup_limits())])


def available_bytes() -> int:
    """Return the bytes of memory that this process can still allocate."""
    return max(0, min([psutil.virtual_memory().available, *(limit - used for limit, used in _cgroup_limits())]))


def _cgroup_limits() -> Iterator[tuple[int, int]]:
    """Yield limit and use, in bytes, of each cgroup that holds this process and limits its memory.

    File cache that the kernel can drop does not count as use.
    """
    for folder, version in _cgroup_folders():
        limit_file, use_file, cache_name = LIMIT_AND_USE[version]
        try:
            limit = (folder / limit_file).read_text().strip()
            if limit == "max":
                continue
            used = int((folder / use_file).read_text())
            statistics = dict(line.split(maxsplit=1) for line in (folder / "memory.stat").read_text().splitlines())
            yield int(limit), used - int(statistics.get(cache_name, 0))
        except (OSError, ValueError):
            continue  # the root has no limit, and a container does not see the groups around it


def _cgroup_folders() -> Iterator[tuple[Path, str]]:
    """Yield the folders of this process's cgroup and of those around it, with the version of cgroups."""
    try:
        lines = (SYSTEM / "proc/self/cgroup").read_text().splitlines()
    except OSError:  # not Linux
        return
    mounts = SYSTEM / "sys/fs/cgroup"
    for line in lines:
        number, controllers, group = line.split(":", 2)  # "0::/user.slice" in v2, "9:memory:/docker/1f3a" in v1
        if number == "0":
            roots, version = (mounts, mounts / "unified"), "v2"
        elif "memory" in controllers.split(","):
            roots, version = (mounts / "memory",), "v1"
        else:
            continue
        for root in roots:
            folder = root / group.lstrip("/")
            yield from ((around, version) for around in (folder, *folder.parents) if around.is_relative_to(root))
