"""Shared parts of the benchmarks: timing that notices a busy machine, the environment, result files and pictures.

Each benchmark answers one question. Its last line of output is one JSON object, which is also written to
results/NAME.json, with `environment` (the machine and the versions) among its keys.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path
from statistics import median

import psutil
import torch
from transformers import DeepseekV3Config

from moonwhale.errors import UserError, with_option_names
from moonwhale.model import MoonwhaleConfig

ROOT = Path(__file__).parent.parent
TOY = {  # a model that has every mechanism and trains in seconds
    "vocab_size": 300,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "moba_block_size": 8,
    "moba_topk": 2,
    "moba_full_attention_layers": [1],
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "num_nextn_predict_layers": 1,
    "mtp_num_blocks": 1,
}
QUIET = 0.1  # cores that other processes may use during a valid round


def options(description: str) -> argparse.ArgumentParser:
    """Returns a parser with the option that all benchmarks have."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results", help="folder for the result")
    return parser


def run_main(main: Callable[[], object]) -> None:
    """Runs the `main` of a benchmark that trains as `moonwhale` does, and ends as its verbs do.

    Bad input ends in one line and status 2. So does an interrupt, with status 130: after Ctrl-C or SIGTERM, a run saves
    a checkpoint and raises KeyboardInterrupt.
    """
    try:
        main()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except UserError as error:
        print(f"error: {with_option_names(str(error))}", file=sys.stderr)
        sys.exit(2)


def timed_rounds(
    contenders: dict[str, Callable], draw: Callable[[], object], rounds: int, limit: int | None = None
) -> dict:
    """Times `contender(draw())`. Each round draws once and runs all contenders, in alternating order.

    A round is valid if other processes used at most 0.1 of a core during it. An invalid round is repeated, up to
    `limit` rounds in total (by default three times `rounds`). If there are too few valid rounds even then, the quietest
    ones are used, which `busiest` shows.

    Returns:
        seconds: the median of each contender.
        rounds: the number of rounds used.
        discarded: the number of rounds not used.
        busiest: the most cores that other processes used during a round that is used.
    """
    seen, given = [], draw()
    for contender in contenders.values():  # the first run allocates and compiles
        contender(given)
    while sum(others <= QUIET for others, _ in seen) < rounds and len(seen) < (limit or 3 * rounds):
        order = list(contenders) if len(seen) % 2 else list(contenders)[::-1]
        given, seconds, others = draw(), {}, watch_others()
        for name in order:
            start = time.perf_counter()
            contenders[name](given)
            seconds[name] = time.perf_counter() - start
        seen.append((others(), seconds))
    kept = sorted(seen, key=lambda round: round[0])[:rounds]
    discarded = len(seen) - len(kept)
    print(f"{len(kept)} rounds used, {discarded} discarded because of other processes", file=sys.stderr)
    return {
        "seconds": {name: median(seconds[name] for _, seconds in kept) for name in contenders},
        "rounds": len(kept),
        "discarded": discarded,
        "busiest": round(kept[-1][0], 3),
    }


def watch_others() -> Callable[[], float]:
    """Returns a function that says how many cores other processes have used since now, on average."""
    before = _cpu_seconds()

    def others() -> float:
        wall, own, total = (after - b for after, b in zip(_cpu_seconds(), before, strict=True))
        return max(0.0, total - own) / wall

    return others


def _cpu_seconds() -> tuple[float, float, float]:
    """Returns the clock, and the processor time of this process and of all processes, stolen time included."""
    own, all_ = psutil.Process().cpu_times(), psutil.cpu_times()._asdict()
    counted_twice = ("guest", "guest_nice")  # already in user and nice
    total = sum(spent for name, spent in all_.items() if name not in ("idle", "iowait", *counted_twice))
    return time.perf_counter(), own.user + own.system, total


def deepseek_config(ours: MoonwhaleConfig, **changes) -> DeepseekV3Config:
    """Returns transformers' configuration with the same dimensions."""
    names = {f.name for f in fields(DeepseekV3Config)} & {f.name for f in fields(MoonwhaleConfig)}
    return DeepseekV3Config(**{name: getattr(ours, name) for name in names} | changes)


def environment(dtype: str, allocator_tuned: bool) -> dict:
    """Describes the machine and the versions behind a figure."""
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
    """Returns the commit checked out, with "+" if sources have changed since, or None outside of git."""
    try:
        head = subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=ROOT, text=True, stderr=subprocess.DEVNULL)
        changed = subprocess.call(["git", "diff", "--quiet", "HEAD", "--", "src", "benchmarks/*.py"], cwd=ROOT)
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.strip() + ("+" if changed else "")


def write(folder: Path, name: str, result: dict, **curves) -> None:
    """Writes folder/name.json, one line per key, and prints the result without the curves as one line."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in (result | curves).items()]
    unfinished = folder / f".{name}.json"
    unfinished.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    os.replace(unfinished, folder / f"{name}.json")
    print(json.dumps(result))


@contextmanager
def picture(path: Path, rows: int = 1, columns: int = 1, figsize=None, **axes_options) -> Iterator[tuple]:
    """Yields a new figure and its axes, and writes the figure to the SVG file `path` at the end.

    axes_options: arguments of `Figure.subplots`, as `sharex`.

    Equal contents give equal bytes: the file has no date and no random ids.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    style = {"svg.hashsalt": "moonwhale", "font.size": 10, "axes.spines.top": False, "axes.spines.right": False}
    with rc_context(style):
        figure = Figure(figsize, layout="constrained")
        yield figure, figure.subplots(rows, columns, **axes_options)
        figure.savefig(path, metadata={"Date": None})
