"""Does training over several processes compute what one process does, outlive their deaths, and how much of a step do
the pipeline's schedules leave idle?

    python benchmarks/parallel.py [bubble] [equality] [memory] [kills]

Each part writes its own keys into results/parallel.json and leaves those of the others; none given means all.

**equality**, **memory** and **kills** are runs of `moonwhale train` at toy size, in parallel_runs.py.
`max_gradient_error` and `max_loss_error` compare with one process, relative, over all LAYOUTS. `max_memory_error`
compares what each rank holds in a step with what `moonwhale plan` says. `kills_survived` counts how often a rank was
killed (kill -9) and the run, which torchrun starts again, still ended with the undisturbed one's weights and logs, bit
for bit. Up to a quarter of an hour each on two cores.

**bubble** needs a quiet machine for three minutes. Stages that sleep: a forward pass F takes one unit for each half of
a rank's share of the model, the backward pass as long for its inputs and as long again for its weights (W), so B = 2 F.
What each rank did when is recorded, by processes that talk over gloo as in training. The bubble is the time from the
first rank's start to the last one's end, less what a rank works. Formulas (DeepSeek-V3, table 2; a V over P ranks is
one over 2 P stages), where two chunks that overlap take as long as one after the other, as they do here:

    1F1B        (P - 1) (F + B)
    DualPipe    (P/2 - 1) (F + B + B - 3 W)
    DualPipeV   (P - 1) (F + B + B - 3 W), of half stages

Draws docs/schedules.svg from the recorded events.
"""

import json
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from statistics import mean

import matplotlib
import matplotlib.pyplot as plt
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from common import ROOT, environment, options, write
from moonwhale.parallel.schedule_properties import SCHEDULES, stage_ranks
from moonwhale.parallel.schedules import EngineStage, build_engine
from moonwhale.parallel.stages import StageSpec
from parallel_runs import LAYOUTS, equality, kills, memory

COST = {"F": 1, "B": 2, "I": 1, "W": 1}
COLOURS = {"F": "#fbbf24", "B": "#22c55e", "I": "#38bdf8", "W": "#1d4ed8"}
NAMES = {"F": "forward", "B": "backward", "I": "backward, inputs only", "W": "backward, weights only"}
STEPS = 3  # of each schedule, of which the shortest counts: what else the machine does can only make one longer
LIMIT = 300  # seconds a process may take
PARTS = ("bubble", "equality", "memory", "kills")


class Toy(nn.Module):
    """A stage of one parameter."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, *carried, x):
        return (carried[0] if carried else x.mean()) * self.weight


class Sleeping(EngineStage):
    """A stage whose work is to sleep: `unit` seconds for a forward pass."""

    unit = 0.0

    def _timed(self, kind, micro_batch, do, *args):
        def slowly(*args):
            time.sleep(COST[kind] * self.unit)
            return do(*args)

        return super()._timed(kind, micro_batch, slowly, *args)


def unit_of(schedule: str) -> int:
    """Half stages that a stage of this schedule is."""
    return 2 // SCHEDULES[schedule].stages_per_rank


def formula(schedule: str, ranks: int, f: float, b: float, w: float) -> float | None:
    """The bubble, in what the times of a stage's passes are given in."""
    return {
        "1f1b": (ranks - 1) * (f + b),
        "dualpipe": (ranks / 2 - 1) * (f + b + b - 3 * w),
        "dualpipev": (ranks - 1) * (f + b + b - 3 * w),
    }.get(schedule)


def rank_main(rank: int, ranks: int, schedules: list[str], micro_batches: int, unit: float, folder: str) -> None:
    """One process: runs every schedule, the first step of each to warm up, and leaves its events in `folder`."""
    store = dist.FileStore(f"{folder}/store", ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=LIMIT))
    recorded = {}
    for schedule in schedules:
        where, kind = stage_ranks(schedule, ranks), SCHEDULES[schedule]
        copy, number = ranks * kind.stages_per_rank, torch.empty((), device="meta", requires_grad=True)
        stages = []
        for index in (i for i, place in enumerate(where) if place == rank):
            part = StageSpec(index % copy, copy, 0, 0)
            half = index // copy if kind.bidirectional else None
            stage = Sleeping(
                Toy(),
                part,
                index,
                len(where),
                torch.device("cpu"),
                half=half,
                input_args=() if part.is_first else number,
                output_args=number,
            )
            stages.append(stage)
        engine = build_engine(schedule, stages, micro_batches)
        steps = []
        for asleep in (0.0, *[unit * unit_of(schedule)] * STEPS):  # the first step opens the connections
            for stage in stages:
                stage.events.clear()
                stage.unit = asleep
            dist.barrier()
            x = torch.ones(micro_batches, 1)
            engine.step(target=x, return_outputs=False, x=x)
            steps.append([tuple(event) for stage in stages for event in stage.events])
        recorded[schedule] = steps[1:]
    torch.save(recorded, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def span(step: list[list[tuple]]) -> tuple[float, float]:
    """When a step's first rank began and its last one ended."""
    events = [event for rank in step for event in rank]
    return min(begin for *_, begin, _ in events), max(end for *_, end in events)


def record(ranks: int, schedules: list[str], micro_batches: int, unit: float) -> dict[str, list[list[tuple]]]:
    """Events of each rank by schedule, of the step least disturbed, in units from its begin."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = (ranks, schedules, micro_batches, unit, folder)
        running = mp.start_processes(rank_main, arguments, ranks, join=False, start_method="forkserver")
        end = time.monotonic() + LIMIT
        try:
            while not running.join(timeout=1):
                if time.monotonic() > end:
                    raise TimeoutError(f"{ranks} processes took more than {LIMIT} s")
        finally:
            for process in running.processes:
                process.kill()
        seen = [torch.load(f"{folder}/{rank}.pt", weights_only=True) for rank in range(ranks)]
    recorded = {}
    for schedule in schedules:
        steps = [[rank[schedule][i] for rank in seen] for i in range(STEPS)]
        events = min(steps, key=lambda step: span(step)[1] - span(step)[0])
        start, _ = span(events)
        recorded[schedule] = [
            [
                (kind, stage, number, (begin - start) / unit, (end - start) / unit)
                for kind, stage, number, begin, end in e
            ]
            for e in events
        ]
    return recorded


def bubble(events: list[list[tuple]], schedule: str) -> dict:
    """How long a rank is idle on average, in units and as part of the step, beside what the formula makes of the times
    that the passes really took.
    """
    _, step = span(events)
    took = {kind: [end - begin for rank in events for k, _, _, begin, end in rank if k == kind] for kind in COST}
    idle = step - sum(map(sum, took.values())) / len(events)
    found = {"step": round(step, 2), "bubble": round(idle, 2), "share": round(idle / step, 4)}
    f, b, w = (mean(took[kind] or [COST[kind] * unit_of(schedule)]) for kind in "FBW")
    said = formula(schedule, len(events), f, b, w)
    if said is None:
        return found
    return found | {"formula": round(said, 2), "formula_share": round(said / (step - idle + said), 4)}


def draw(recorded: dict[str, list[list[tuple]]], path: Path) -> None:
    """A row for each rank, a box for each piece of work with the number of its micro-batch, time in units."""
    style = {
        "svg.hashsalt": "moonwhale",
        "svg.fonttype": "none",
        "font.size": 8,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    longest = max(end for events in recorded.values() for rank in events for *_, end in rank)
    with matplotlib.rc_context(style):
        size = (11, 1.1 + sum(0.5 + 0.32 * len(events) for events in recorded.values()))
        figure, axes = plt.subplots(len(recorded), 1, figsize=size, sharex=True, layout="constrained")
        for axis, (schedule, events) in zip(axes, recorded.items(), strict=True):
            second = max(stage_ranks(schedule, len(events))) + 1  # stages from here on are a rank's second ones
            for row, rank in enumerate(events):
                for kind, stage, number, begin, end in rank:
                    box = [(begin, end - begin)]
                    faint = 0.55 if stage >= second else 1
                    axis.broken_barh(box, (row - 0.4, 0.8), color=COLOURS[kind], alpha=faint, edgecolor="white", lw=0.4)
                    axis.text((begin + end) / 2, row, number, ha="center", va="center", fontsize=5.5)
            axis.set_yticks(range(len(events)), [f"rank {r}" for r in range(len(events))])
            axis.invert_yaxis()
            axis.set_title(schedule, loc="left", fontsize=9)
            axis.set_xlim(0, longest)
        axes[-1].set_xlabel("time; 1 = a forward pass of half a rank's part of the model")
        handles = [plt.Rectangle((0, 0), 1, 1, color=COLOURS[kind], label=NAMES[kind]) for kind in COLOURS]
        handles.append(plt.Rectangle((0, 0), 1, 1, color=COLOURS["F"], alpha=0.55, label="of a rank's second stage"))
        figure.legend(handles=handles, loc="outside lower center", ncols=5, frameon=False)
        unfinished = path.with_name(f".{path.name}")
        figure.savefig(unfinished, format="svg", metadata={"Date": None})
        plt.close(figure)
    unfinished.replace(path)


def bubbles(ranks: int, micro_batches: int, unit: float, picture: Path) -> dict:
    """Every schedule's bubble beside its formula; draws the picture."""
    recorded = record(ranks, list(SCHEDULES), micro_batches, unit)
    found = {schedule: bubble(events, schedule) for schedule, events in recorded.items()}
    for schedule, figures in found.items():
        print(f"{schedule:<11}{figures}", file=sys.stderr)
    draw(recorded, picture)
    v = found["dualpipev"]
    return {
        "bubble_vs_formula": round(v["share"] / v["formula_share"], 3),
        "bubble_vs_1f1b": round(v["share"] / found["1f1b"]["share"], 3),
        "schedules": found,
        "ranks": ranks,
        "micro_batches": micro_batches,
        "unit_seconds": unit,
        "environment": environment("fp32", False),
    }


def main(argv: list[str] | None = None) -> None:
    parser = options(" ".join(__doc__.split("\n\n")[0].split()))
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)} (all)")
    parser.add_argument("--picture", type=Path, default=ROOT / "docs" / "schedules.svg", help="where it is drawn")
    parser.add_argument("--ranks", type=int, default=4, help="of the bubble's pipeline")
    parser.add_argument("--micro-batches", type=int, default=10, help="of the bubble's step")
    parser.add_argument("--unit", type=float, default=0.15, help="seconds of half a stage's forward pass")
    parser.add_argument("--layouts", default="; ".join(LAYOUTS), help="of equality and memory")
    parser.add_argument("--steps", type=int, default=20, help="of the losses compared")
    parser.add_argument("--runs", type=int, default=5, help="in which ranks are killed")
    parser.add_argument("--kills", type=int, default=4, help="in each of these runs")
    given = parser.parse_args(argv)
    if unknown := set(given.parts) - set(PARTS):
        parser.error(f"there is no part {', '.join(sorted(unknown))}")
    for part in given.parts or PARTS:
        if part == "bubble":
            result = bubbles(given.ranks, given.micro_batches, given.unit, given.picture)
        elif part == "equality":
            result = equality(given.layouts.split("; "), given.steps)
        elif part == "memory":
            result = memory(given.layouts.split("; "))
        else:
            result = kills(given.runs, given.kills)
        path = given.results / "parallel.json"
        before = json.loads(path.read_text()) if path.exists() else {}
        write(given.results, "parallel", before | result)


if __name__ == "__main__":
    main()
