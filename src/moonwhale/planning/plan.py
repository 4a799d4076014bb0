"""`moonwhale plan`: how to spread a run over many GPUs, and what each layout would cost, before you rent them."""

import itertools
import json
import math
import shlex
from collections.abc import Iterator
from dataclasses import asdict, dataclass

from moonwhale import options
from moonwhale.errors import UserError, did_you_mean
from moonwhale.options import above_zero
from moonwhale.parallel.options import divisors
from moonwhale.parallel.schedule_properties import SCHEDULES
from moonwhale.presets import PRESETS, get_preset
from moonwhale.reports import add_json, reporting
from moonwhale.train.config import ModelOverrides, TrainConfig, build_model_config
from moonwhale.train.effects import require_effects
from moonwhale.units import in_bytes, si


@dataclass(frozen=True)
class Gpu:
    """A GPU by NVIDIA's data sheets: its dense bf16 peak, and its share of a DGX's network in one direction."""

    memory: float  # GB
    flops: float  # TFLOP/s
    bandwidth: float  # GB/s


GPUS = {"a100": Gpu(80, 312, 25), "h100": Gpu(80, 989, 50), "h200": Gpu(141, 989, 50), "b200": Gpu(180, 2250, 50)}
UTILIZATION = 0.35  # DeepSeek-V3 (§1): 180,000 H800 hours for 10^12 tokens of 37 G parameters, 6 operations each
PLANNED_SCHEDULES = ("dualpipev", "dualpipe", "1f1b")  # the schedules whose idle time has a formula
MOST_GPUS, MOST_ROWS, MOST_LAYOUTS = 1_000_000, 65_536, 20_000  # rows of a micro-batch; layouts that are compared
# A larger micro-batch may be slower by this factor: kernels are faster with more tokens, which no formula counts
TOLERATED_SLOWDOWN = 1.05


def main(argv: list[str]) -> int:
    parser = options.Parser(
        prog="moonwhale plan",
        description="List layouts of a run over many GPUs, the fastest first, with memory, traffic and idle time.\n"
        "--model.FIELD VALUE overrides a field of the model's configuration: see `moonwhale train --help`.",
        examples=(
            "moonwhale plan --gpus 64 --preset seed_190m",
            "moonwhale plan --gpus 1024 --preset large --tokens-per-step 16777216 --gpu h200",
        ),
        epilog="GPUs (memory, dense bf16, network):\n"
        + "\n".join(f"  {n:<6}{g.memory:g} GB, {g.flops:g} TFLOP/s, {g.bandwidth:g} GB/s" for n, g in GPUS.items())
        + "\n\nThe plan assumes that messages between pipeline ranks overlap with computation, and that gradients and\n"
        "tokens for experts do not, and use the network even inside a machine. More in docs/parallelism.md.",
    )
    add, count, figure = parser.add_argument, above_zero(int), above_zero(float)
    add("--gpus", type=count, metavar="N", required=True, help="number of GPUs")
    add("--preset", metavar="NAME", default="demo", help=f"{', '.join(PRESETS)} (demo)").suggestions = PRESETS
    add("--context", type=count, metavar="N", help="tokens per row (the preset's)")
    add("--batch-size", type=count, metavar="N", help="largest number of rows per micro-batch (the preset's)")
    add("--tokens-per-step", type=count, metavar="N", help="tokens per optimizer step (the preset's)")
    add("--gpu", metavar="NAME", default="h100", help="a GPU of the list below (h100)").suggestions = GPUS
    add("--memory", type=figure, metavar="GB", help="memory of a GPU (that of --gpu)")
    add("--flops", type=figure, metavar="TFLOPS", help="peak of a GPU in bf16 (that of --gpu)")
    add("--bandwidth", type=figure, metavar="GBS", help="GB/s that a GPU sends to others (that of --gpu)")
    reached = f"fraction of --flops that a busy GPU reaches ({UTILIZATION}, DeepSeek-V3's)"
    add("--utilization", type=figure, metavar="FRACTION", help=reached)
    add("--layouts", type=count, metavar="N", default=10, help="number of layouts to print (10)")
    add_json(parser)
    options.add_options(parser, ModelOverrides, show=False)
    overrides, arguments = options.read_argv(parser, ModelOverrides, argv)
    if arguments.gpu not in GPUS:
        near = did_you_mean(arguments.gpu, GPUS)
        raise UserError(f"`gpu`: {arguments.gpu!r} is none of {', '.join(GPUS)}{near}; `memory` and so on say the rest")
    known = asdict(GPUS[arguments.gpu]) | {"utilization": UTILIZATION}
    figures = {name: getattr(arguments, name) or value for name, value in known.items()}
    if figures["utilization"] > 1:
        raise UserError(f"`utilization`: {figures['utilization']:g} is impossible: it lies in (0, 1]")
    options.require(arguments, "gpus", arguments.gpus <= MOST_GPUS, f"give at most {MOST_GPUS:,}")
    preset = get_preset(arguments.preset).train
    if arguments.batch_size is None:
        arguments.batch_size = preset["batch_size"]
    context, tokens = arguments.context or preset["context"], arguments.tokens_per_step or preset["tokens_per_step"]
    if tokens % context:
        near = max(1, round(tokens / context)) * context
        raise UserError(f"`tokens_per_step`: {tokens} is no multiple of `context` {context}: give {near}")
    options.require(arguments, "batch_size", arguments.batch_size <= MOST_ROWS, f"give at most {MOST_ROWS:,}")
    given = {name: getattr(arguments, name) for name in ("context", "tokens_per_step") if getattr(arguments, name)}
    # Layouts have micro-batches of any size up to the largest: a step need not be a multiple of that.
    run = TrainConfig.resolve(given | {"preset": arguments.preset, "batch_size": 1} | overrides)
    require_effects(run.idle(), overrides)
    shown = rank(run, arguments.gpus, arguments.batch_size, figures)[: arguments.layouts]
    with reporting(arguments.json) as show:
        result = {"gpus": arguments.gpus, "preset": run.preset, **figures, "layouts": shown}
        show(result, report(run, arguments.gpus, arguments.gpu, figures, shown))
    return 0


def layouts(run: TrainConfig, gpus: int, most_rows: int, config) -> Iterator:
    """Yield every `ParallelLayout` that can work: its numbers divide, and micro-batches and blocks suffice.

    A micro-batch has up to `most_rows` rows.
    """
    from moonwhale.planning.cost_model import ParallelLayout

    rows = run.tokens_per_step // run.context
    experts = config.n_routed_experts if config.first_k_dense_replace < config.num_blocks else 1
    for pp, schedule in itertools.product(divisors(gpus), PLANNED_SCHEDULES):
        dp, properties = gpus // pp, SCHEDULES[schedule]
        multiple = 1 + properties.bidirectional
        least = properties.min_micro_batches_per_rank * pp
        num_stages = properties.stages_per_rank * pp
        works = num_stages <= config.num_hidden_layers and pp % multiple == 0 if pp > 1 else schedule == "1f1b"
        if rows % dp or not works:
            continue
        shared = divisors(math.gcd(dp, experts))
        for size in range(1, min(most_rows, rows // dp) + 1):
            count, rest = divmod(rows // dp, size)
            if rest or (pp > 1 and (count < least or count % multiple)):
                continue
            for ep in shared:
                yield ParallelLayout(pp, dp, schedule, count, size, ep, fsdp=False)
                if ep == 1 and dp * (multiple if pp > 1 else 1) > 1:
                    yield ParallelLayout(pp, dp, schedule, count, size, ep, fsdp=True)


def rank(run: TrainConfig, gpus: int, most_rows: int, figures: dict[str, float]) -> list[dict]:
    """Return the layouts with their figures, ready for JSON.

    The layouts that fit come first, sorted by time, then the others, sorted by memory.

    Args:
        most_rows: the largest number of rows per micro-batch.
        figures: of a GPU: memory in GB, flops in TFLOP/s, bandwidth in GB/s, and the utilization of its flops.

    Raises:
        UserError: if no layout can work.
    """
    from moonwhale.planning.cost_model import LayoutCosts

    config = build_model_config(run)
    layout_costs, best = LayoutCosts(config, run.context), {}
    for i, layout in enumerate(layouts(run, gpus, most_rows, config)):
        if i == MOST_LAYOUTS:
            raise UserError(
                f"`batch_size`: there are more than {MOST_LAYOUTS:,} layouts: give fewer rows than {most_rows}"
            )
        plan = _plan(run, layout, layout_costs.costs(layout), figures)
        best.setdefault((layout.pp, layout.schedule, layout.ep, layout.fsdp), []).append(plan)
    if not best:
        rows = run.tokens_per_step // run.context
        near = max(n for n in range(1, gpus + 1) if rows % n == 0)
        raise UserError(
            f"`gpus`: {run.tokens_per_step:,} tokens a step are {rows} rows of {run.context}, which {gpus} GPUs can't "
            f"share: give `gpus` {near} or `tokens_per_step` {-(-rows // gpus) * gpus * run.context}"
        )
    chosen = [_choose(sizes) for sizes in best.values()]
    return sorted(chosen, key=lambda p: (not p["fits"], p["seconds"] if p["fits"] else p["memory"]["memory"]))


def _plan(run: TrainConfig, layout, costs: list, figures: dict[str, float]) -> dict:
    """Return a layout's figures, from the costs of a pipeline's ranks."""
    from moonwhale.planning.cost_model import idle_over_busy

    fullest = max(costs, key=lambda cost: cost.memory)
    idle = idle_over_busy(layout)
    busy_seconds = max(cost.flops for cost in costs) / (figures["flops"] * 1e12 * figures["utilization"])
    network_seconds = max(cost.reduce + cost.experts for cost in costs) / (figures["bandwidth"] * 1e9)
    seconds = busy_seconds * (1 + idle) + network_seconds
    return asdict(layout) | {
        "fits": fullest.memory <= figures["memory"] * 1e9,
        "memory": {n: getattr(fullest, n) for n in ("weights", "gradients", "optimizer", "activations", "memory")},
        "sent": {n: max(getattr(cost, n) for cost in costs) for n in ("pipeline", "reduce", "experts")},
        "idle": idle / (1 + idle),
        "seconds": seconds,
        "tokens_per_second": run.tokens_per_step / seconds,
    }


def _choose(sizes: list[dict]) -> dict:
    """Choose, among layouts that differ in the size of micro-batches, the largest that fits and is hardly slower."""
    fitting = [plan for plan in sizes if plan["fits"]] or [min(sizes, key=lambda plan: plan["memory"]["memory"])]
    fastest = min(plan["seconds"] for plan in fitting)
    return max((p for p in fitting if p["seconds"] <= TOLERATED_SLOWDOWN * fastest), key=lambda plan: plan["rows"])


def report(run: TrainConfig, gpus: int, gpu: str, figures: dict[str, float], plans: list[dict]) -> str:
    """Return two tables of the plans, and the command that starts the first."""
    overview = [("pp x dp", "schedule", "ep", "fsdp", "batches", "memory", "sent", "idle", "step", "tokens/s")]
    details = [("pp x dp", "weights", "gradients", "optimizer", "activations", "neighbours", "gradients", "experts")]
    for p in plans:
        place, pipelined = f"{p['pp']} x {p['dp']}", p["pp"] > 1
        overview.append(
            (
                place,
                p["schedule"] if pipelined else "-",
                f"{p['ep']}",
                "yes" if p["fsdp"] else "-",
                f"{p['micro_batches']} x {p['rows']}",
                in_bytes(p["memory"]["memory"]) + ("" if p["fits"] else " (too much)"),
                in_bytes(sum(p["sent"].values())),
                f"{100 * p['idle']:.1f} %",
                f"{p['seconds']:.3g} s",
                si(p["tokens_per_second"]),
            )
        )
        held = [p["memory"][name] for name in ("weights", "gradients", "optimizer", "activations")]
        details.append((place, *map(in_bytes, [*held, *p["sent"].values()])))
    lines = [
        f"{run.preset} on {gpus} {gpu}: {run.tokens_per_step:,} tokens a step in rows of {run.context}",
        f"one GPU: {figures['memory']:g} GB, {figures['flops']:g} TFLOP/s at {100 * figures['utilization']:g} % "
        f"utilization, {figures['bandwidth']:g} GB/s to others",
        "",
        *_table(overview),
        "",
        "memory of the fullest rank, and the most that a rank sends in a step to neighbours, as gradients, to experts:",
        *_table(details),
        "",
    ]
    if not plans[0]["fits"]:
        lines.append("no layout fits: give more --gpus, or a smaller --batch-size or --context")
    return "\n".join([*lines, "to start the first:", f"  {command(run, plans[0])}"])


def command(run: TrainConfig, plan: dict) -> str:
    """Return the command that starts a plan's run."""
    gpus = plan["pp"] * plan["dp"]
    machines = f"--nnodes {gpus // 8} --nproc-per-node 8" if gpus > 8 and gpus % 8 == 0 else f"--nproc-per-node {gpus}"
    words, preset = [f"torchrun {machines} -m moonwhale train --preset {run.preset}"], PRESETS[run.preset]
    for name in ("context", "tokens_per_step"):
        if getattr(run, name) != preset.train[name]:
            words.append(f"--{name.replace('_', '-')} {getattr(run, name)}")
    words.append(f"--batch-size {plan['rows']}")
    for name, value in run.model.items():
        if (name, value) not in preset.model.items():
            text = value if isinstance(value, str) else json.dumps(value)  # JSON is YAML, which the option reads
            words.append(f"--model.{name} {shlex.quote(text)}")
    if plan["pp"] > 1:
        words.append(f"--parallel.pp {plan['pp']} --parallel.schedule {plan['schedule']}")
    if plan["ep"] > 1:
        words.append(f"--parallel.ep {plan['ep']}")
    if plan["fsdp"]:
        words.append("--parallel.fsdp true")
    return " ".join(words)


def _table(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  " + "  ".join(f"{cell:>{w}}" for cell, w in zip(row, widths, strict=True)) for row in rows]
