"""Memory is the machine's, or what a cgroup leaves of it."""

import psutil
import pytest

from moonwhale import memory
from moonwhale.inspect import doctor

MIB = 2**20
LIMITS = {  # the process's cgroup; files under /sys/fs/cgroup; expected bytes in total and still free
    "v2": ("0::/job\n", {"job": (100, 30, 10)}, (100, 80)),
    "v2, the group around it is tighter": ("0::/a/b\n", {"a": (50, 20, 0), "a/b": (100, 1, 0)}, (50, 30)),
    "v2, without a limit": ("0::/job\n", {"job": ("max", 30, 10)}, None),
    "v2, a container that sees its group as the root": ("0::/\n", {"": (64, 4, 0)}, (64, 60)),
    "v2, a path that the container does not see": ("0::/../../job\n", {"": (64, 4, 0)}, (64, 60)),
    "v1": ("9:cpu:/x\n8:memory:/docker/1\n", {"memory/docker/1": (100, 30, 10)}, (100, 80)),
    "v1, several controllers": ("8:cpu,memory:/1\n", {"memory/1": (100, 30, 0)}, (100, 70)),
    "v1, without a limit": ("8:memory:/1\n", {"memory/1": (2**63 // MIB, 30, 0)}, None),
    "both": ("8:memory:/1\n0::/1\n", {"memory/1": (100, 30, 0), "unified/1": (60, 10, 0)}, (60, 50)),
    "more used than allowed": ("0::/job\n", {"job": (100, 130, 10)}, (100, 0)),
    "none": ("", {}, None),
}


def write_cgroups(root, of_process, groups):
    """Write the files that describe a process's cgroups, for (limit, use, file cache) in MiB."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(of_process)
    for name, (limit, used, cache) in groups.items():
        folder, old = root / "sys/fs/cgroup" / name, name.startswith("memory")
        folder.mkdir(parents=True, exist_ok=True)
        limit = limit if limit == "max" else limit * MIB
        (folder / ("memory.limit_in_bytes" if old else "memory.max")).write_text(f"{limit}\n")
        (folder / ("memory.usage_in_bytes" if old else "memory.current")).write_text(f"{used * MIB}\n")
        (folder / "memory.stat").write_text(f"anon 5\n{'total_' * old}inactive_file {cache * MIB}\n")


@pytest.mark.parametrize(("of_process", "groups", "expected"), LIMITS.values(), ids=LIMITS)
def test_a_cgroups_limit_counts(tmp_path, monkeypatch, of_process, groups, expected):
    write_cgroups(tmp_path, of_process, groups)
    monkeypatch.setattr(memory, "SYSTEM", tmp_path)
    if expected:
        assert (memory.total_bytes(), memory.available_bytes()) == tuple(n * MIB for n in expected)
    else:
        assert memory.total_bytes() == psutil.virtual_memory().total
        assert memory.available_bytes() == pytest.approx(psutil.virtual_memory().available, rel=0.2)


def test_files_that_make_no_sense_are_no_limit(tmp_path, monkeypatch):
    write_cgroups(tmp_path, "0::/job\n", {"job": (100, 30, 10)})
    (tmp_path / "sys/fs/cgroup/job/memory.max").write_text("much\n")
    monkeypatch.setattr(memory, "SYSTEM", tmp_path)
    assert memory.total_bytes() == psutil.virtual_memory().total
    monkeypatch.setattr(memory, "SYSTEM", tmp_path / "nothing here")
    assert memory.total_bytes() == psutil.virtual_memory().total


def test_the_cache_takes_half_of_what_is_left(tmp_path, monkeypatch, small_engine):
    write_cgroups(tmp_path, "0::/job\n", {"job": (100, 30, 10)})
    monkeypatch.setattr(memory, "SYSTEM", tmp_path)
    assert small_engine().scheduler.memory == 40 * MIB
    assert "; 0.1 GiB" in doctor._devices()["cpu"]["note"]
