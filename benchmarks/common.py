"""What the benchmarks share: timing that notices a busy machine, where they ran, and the files of their results."""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path
from statistics import median

import psutil
import torch
from transformers import DeepseekV3Config

from moonwhale.model import MoonwhaleConfig

ROOT = Path(__file__).parent.parent
QUIET = 0.1  # cores that other processes may use in a round that counts


def options(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results", help="where the result goes")
    return parser


def timed_rounds(
    contenders: dict[str, Callable], draw: Callable[[], object], rounds: int, limit: int | None = None
) -> dict:
    """Times `contender(draw())`: every round draws once and runs all contenders in turn, forwards and backwards by
    turns.

    A round counts if other processes used at most 0.1 of a core meanwhile; else it is repeated, up to `limit` rounds in
    all (three times `rounds`). Where even that finds too few quiet ones, the quietest count, and `busiest` shows it.

    Returns:
        seconds: the median of each contender; rounds: how many count; discarded: how many do not; busiest: cores that
        others used in the worst round that counts.
    """
    seen, given = [], draw()
    for contender in contenders.values():  # the first run allocates and compiles
        contender(given)
    while sum(others <= QUIET for others, _ in seen) < rounds and len(seen) < (limit or 3 * rounds):
        order = list(contenders) if len(seen) % 2 else list(contenders)[::-1]
        given, seconds, before = draw(), {}, _cpu_seconds()
        for name in order:
            start = time.perf_counter()
            contenders[name](given)
            seconds[name] = time.perf_counter() - start
        wall, own, everybody = (after - b for after, b in zip(_cpu_seconds(), before, strict=True))
        seen.append((max(0.0, everybody - own) / wall, seconds))
    kept = sorted(seen, key=lambda round: round[0])[:rounds]
    discarded = len(seen) - len(kept)
    print(f"{len(kept)} rounds count, {discarded} discarded for what others did meanwhile", file=sys.stderr)
    return {
        "seconds": {name: median(seconds[name] for _, seconds in kept) for name in contenders},
        "rounds": len(kept),
        "discarded": discarded,
        "busiest": round(kept[-1][0], 3),
    }


def _cpu_seconds() -> tuple[float, float, float]:
    """Now: the clock, processor time of this process, and of everybody (what the hypervisor took away included)."""
    own, all_ = psutil.Process().cpu_times(), psutil.cpu_times()._asdict()
    counted_twice = ("guest", "guest_nice")  # already in user and nice
    everybody = sum(spent for name, spent in all_.items() if name not in ("idle", "iowait", *counted_twice))
    return time.perf_counter(), own.user + own.system, everybody


def deepseek_config(ours: MoonwhaleConfig, **changes) -> DeepseekV3Config:
    """transformers' configuration of the same dimensions."""
    names = {f.name for f in fields(DeepseekV3Config)} & {f.name for f in fields(MoonwhaleConfig)}
    return DeepseekV3Config(**{name: getattr(ours, name) for name in names} | changes)


def environment(dtype: str, allocator_tuned: bool) -> dict:
    """Where a figure comes from."""
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "dtype": dtype,
        "allocator": "glibc, keeps freed memory" if allocator_tuned else "as it comes",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "commit": _commit(),
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return (names or [platform.processor() or platform.machine()])[0]


def _commit() -> str | None:
    """The commit checked out, "+" if its sources were changed since; None outside of git."""
    try:
        head = subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=ROOT, text=True, stderr=subprocess.DEVNULL)
        changed = subprocess.call(["git", "diff", "--quiet", "HEAD", "--", "src", "benchmarks/*.py"], cwd=ROOT)
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.strip() + ("+" if changed else "")


def write(folder: Path, name: str, result: dict, **curves) -> None:
    """Writes folder/name.json, a line for each key, and prints the result as one line, without the curves."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in (result | curves).items()]
    unfinished = folder / f".{name}.json"
    unfinished.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    os.replace(unfinished, folder / f"{name}.json")
    print(json.dumps(result))
