"""Does training over several processes compute what one process does, survive their deaths, save checkpoints in little
memory, and how much of a step do the pipeline's schedules leave idle?

    python benchmarks/parallel.py [bubble] [equality] [memory] [saving] [kills]

Each part writes its own keys into results/parallel.json and keeps those of the other parts. Without arguments all parts
run.

**equality**, **memory**, **saving** and **kills** run `moonwhale train` at toy size, in parallel_runs.py.

- `max_gradient_error` and `max_loss_error` compare all LAYOUTS with one process, relative.
- `max_memory_error` compares what each rank holds in a step with the prediction of `moonwhale plan`.
- `peak_rank0_over_share` is the memory that rank 0 needs at most while it saves a checkpoint, relative to its own share
  of weights and optimizer state, for the worst of SAVED_LAYOUTS on four processes. The extra memory is the rise of the
  process's resident memory during the save. Linux only.
- `kills_survived` counts how often a rank was killed (kill -9) and the run, which torchrun restarts, still ended with
  the weights and logs of an undisturbed run, bit for bit.

Each takes up to a quarter of an hour on two cores.

**bubble** needs a quiet machine for three minutes. Its stages sleep: a forward pass F takes one unit for each half of a
rank's share of the model. The backward pass takes as long for the inputs and as long again for the weights (W), so
B = 2 F. The processes talk over gloo, as in training, and record when each rank did what. The bubble is the time from
the first rank's start to the last one's end, minus the time that a rank works. The formulas are those of DeepSeek-V3,
table 2, where a V over P ranks has 2 P stages. Two chunks that overlap take as long as one after the other, as here:

    1F1B        (P - 1) (F + B)
    DualPipe    (P/2 - 1) (F + B + B - 3 W)
    DualPipeV   (P - 1) (F + B + B - 3 W), of half stages

It draws docs/schedules.svg from the recorded events.
"""

import json
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from statistics import mean

import matplotlib
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import nn

from common import ROOT, environment, options, write
from moonwhale.parallel.schedule_properties import SCHEDULES, stage_ranks
from moonwhale.parallel.schedules import EngineStage, build_engine
from moonwhale.parallel.stages import StageSpec
from parallel_runs import LAYOUTS, SAVED_LAYOUTS, equality, kills, memory, saving

COST = {"F": 1, "B": 2, "I": 1, "W": 1}
COLOURS = {"F": "#fbbf24", "B": "#22c55e", "I": "#38bdf8", "W": "#1d4ed8"}
NAMES = {"F": "forward", "B": "backward", "I": "backward, inputs only", "W": "backward, weights only"}
STEPS = 3  # of each schedule; the shortest counts, since other work of the machine only makes steps longer
LIMIT = 300  # seconds for a process
PARTS = ("bubble", "equality", "memory", "saving", "kills")


class Toy(nn.Module):
    """A stage with one parameter."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, *carried, x):
        return (carried[0] if carried else x.mean()) * self.weight


class Sleeping(EngineStage):
    """A stage that sleeps instead of computing: `unit` seconds for a forward pass."""

    unit = 0.0

    def _timed(self, kind, micro_batch, do, *args):
        def slowly(*args):
            time.sleep(COST[kind] * self.unit)
            return do(*args)

        return super()._timed(kind, micro_batch, slowly, *args)


def unit_of(schedule: str) -> int:
    """Return how many half stages a stage of this schedule is."""
    return 2 // SCHEDULES[schedule].stages_per_rank


def formula(schedule: str, ranks: int, f: float, b: float, w: float) -> float | None:
    """Return the bubble by formula, in the unit of the times f, b and w of a stage's passes."""
    return {
        "1f1b": (ranks - 1) * (f + b),
        "dualpipe": (ranks / 2 - 1) * (f + b + b - 3 * w),
        "dualpipev": (ranks - 1) * (f + b + b - 3 * w),
    }.get(schedule)


def rank_main(rank: int, ranks: int, schedules: list[str], micro_batches: int, unit: float, folder: str) -> None:
    """Run every schedule in one process, the first step of each to warm up, and write its events to `folder`."""
    store = dist.FileStore(f"{folder}/store", ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=LIMIT))
    recorded = {}
    for schedule in schedules:
        holders, properties = stage_ranks(schedule, ranks), SCHEDULES[schedule]
        num_stages = ranks * properties.stages_per_rank
        number = torch.empty((), device="meta", requires_grad=True)
        stages = []
        for index in (i for i, holder in enumerate(holders) if holder == rank):
            spec = StageSpec(index % num_stages, num_stages, 0, 0)
            half = index // num_stages if properties.bidirectional else None
            stage = Sleeping(
                Toy(),
                spec,
                index,
                len(holders),
                torch.device("cpu"),
                half=half,
                input_args=() if spec.is_first else number,
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
    """Return when a step's first rank began and its last one ended."""
    events = [event for rank in step for event in rank]
    return min(begin for *_, begin, _ in events), max(end for *_, end in events)


def record(ranks: int, schedules: list[str], micro_batches: int, unit: float) -> dict[str, list[list[tuple]]]:
    """Return each rank's events by schedule, of the least disturbed step, in units from its begin."""
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
    """Return the mean idle time of a rank, in units and as a part of the step, and the same by formula.

    The formula gets the times that the passes really took.
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
    """Draw a row for each rank and a box with the micro-batch's number for each pass; time is in units."""
    style = {
        "svg.hashsalt": "moonwhale",
        "svg.fonttype": "none",
        "font.size": 12,  # 9.5 points where a page shows the picture 840 pixels wide
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    longest = max(end for events in recorded.values() for rank in events for *_, end in rank)
    with matplotlib.rc_context(style):
        size = (11, 1.6 + sum(0.5 + 0.4 * len(events) for events in recorded.values()))
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots(len(recorded), 1, sharex=True)
        for axis, (schedule, events) in zip(axes, recorded.items(), strict=True):
            second = (
                max(stage_ranks(schedule, len(events))) + 1
            )  # from this number on, a stage is its rank's second one
            for row, rank in enumerate(events):
                for kind, stage, number, begin, end in rank:
                    box = [(begin, end - begin)]
                    faint = 0.55 if stage >= second else 1
                    axis.broken_barh(box, (row - 0.4, 0.8), color=COLOURS[kind], alpha=faint, edgecolor="white", lw=0.4)
                    ink = "white" if kind == "W" and faint == 1 else "black"
                    axis.text((begin + end) / 2, row, number, ha="center", va="center", color=ink)
            axis.set_yticks(range(len(events)), [f"rank {r}" for r in range(len(events))])
            axis.invert_yaxis()
            axis.set_title(schedule, loc="left")
            axis.set_xlim(0, longest)
        axes[-1].set_xlabel("time; 1 = a forward pass of half a rank's part of the model")
        handles = [Rectangle((0, 0), 1, 1, color=COLOURS[kind], label=NAMES[kind]) for kind in COLOURS]
        handles.append(Rectangle((0, 0), 1, 1, color=COLOURS["F"], alpha=0.55, label="of a rank's second stage"))
        figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
        unfinished = path.with_name(f".{path.name}")
        figure.savefig(unfinished, format="svg", metadata={"Date": None})
    unfinished.replace(path)


def bubbles(ranks: int, micro_batches: int, unit: float, picture: Path) -> dict:
    """Compare every schedule's bubble with its formula, and draw the picture."""
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
    parser.add_argument("--picture", type=Path, default=ROOT / "docs" / "schedules.svg", help="file of the drawing")
    parser.add_argument("--ranks", type=int, default=4, help="ranks of the bubble's pipeline")
    parser.add_argument("--micro-batches", type=int, default=10, help="micro-batches of the bubble's step")
    parser.add_argument("--unit", type=float, default=0.15, help="seconds of the forward pass of half a stage")
    parser.add_argument(
        "--layouts", default="; ".join(LAYOUTS), help="layouts of equality and memory, separated by '; '"
    )
    parser.add_argument("--saved-layouts", default="; ".join(SAVED_LAYOUTS), help="layouts of saving")
    parser.add_argument("--width", type=int, default=512, help="hidden size of the model that is saved")
    parser.add_argument("--steps", type=int, default=20, help="steps whose losses are compared")
    parser.add_argument("--runs", type=int, default=5, help="runs in which ranks are killed")
    parser.add_argument("--kills", type=int, default=4, help="kills in each of these runs")
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
        elif part == "saving":
            result = saving(given.saved_layouts.split("; "), given.width)
        else:
            result = kills(given.runs, given.kills)
        path = given.results / "parallel.json"
        before = json.loads(path.read_text()) if path.exists() else {}
        write(given.results, "parallel", before | result)


if __name__ == "__main__":
    main()
