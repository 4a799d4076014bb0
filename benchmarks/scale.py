"""How do the speed and memory of a training step grow with the context, the batch and the number of experts?

    python benchmarks/scale.py

A step is the forward and backward pass of a model with the `small` preset's shapes and all its mechanisms, with fp32
weights and, if the CPU is fast in it, bf16 autocast. The points are one row of 512 to 16,384 tokens, with MoBA and with
full attention; 1 to 16 rows of 512 tokens; and 4 to 64 routed experts, with the same number of experts per token.

Each point is measured in a process of its own with the allocator that training uses: the median of three steps after a
warm-up step, and the process's peak memory minus its memory before the model was built. The script also writes
docs/scale.md and draws docs/scale.svg. It takes five to ten minutes on two cores.

Keys of the answer (results/scale.json):
    context: the points of "MoBA" and "full attention"; `at` is the number of tokens.
    batch, experts: points with MoBA; `at` is the number of rows or of routed experts.
    fits: for each curve and quantity, a, b, c of a + b T + c T², T in units of 1,024 tokens.
    preset, model, steps: the preset, its shapes, and the timed steps of a point.
    environment: the machine and the versions.
    A point has `seconds` and `teraflop` (10^12 operations) per step, `megabytes` (peak), `tokens_per_second`,
    `parameters`, `active_parameters` and `flops_per_token`. Measured values are null if memory does not suffice.
"""

import sys
from itertools import combinations
from pathlib import Path

import psutil
import torch

from common import ROOT, environment, options, picture, timed_rounds, write
from moonwhale.costs import flops_per_token, model_size
from moonwhale.model import MoonwhaleConfig, MoonwhaleForCausalLM
from moonwhale.native.training import use_kernels
from moonwhale.precision import choose, tune_allocator
from moonwhale.presets import PRESETS
from train import FP32, Contender, fresh, peak_of_process, step

PRESET = "small"
CONTEXTS = (512, 1024, 2048, 4096, 8192, 16_384)
ROWS, EXPERTS = (1, 2, 4, 8, 16), (4, 8, 16, 32, 64)
CONTEXT, EXPERT_ROWS = 512, 8  # tokens per row, except in `context`; rows in `experts`
COLOURS = {"MoBA": "#2563eb", "full attention": "#d97706"}
UNIT = 1024  # tokens per unit of T in the fits
BEFORE_KERNELS = "d989a3b4867a4e7ae91b593d0385b73a729d7aeb"  # of the scale.json that is from before the kernels
QUANTITIES = {"seconds": "seconds", "teraflop": "TFLOP", "megabytes": "MB"}

PAGE = """# How a training step scales

This page shows how the speed and memory of a training step grow with the context, the batch and the number of experts.
A step is the forward and backward pass of a model with the `{preset}` preset's shapes ({parameters} parameters, MTP
modules included), in {dtype} with fp32 weights.{since}{age}
The processor is {cpu} ({threads} threads on {cores} cores), with torch {torch}. Each line is measured in a process of
its own: the median time of {steps} steps, and the peak memory in addition to what the libraries take.
[scale.py](../benchmarks/scale.py) measures this and writes the page.

![Speed and memory against context, batch and number of experts; dashed, the fits of the seconds](scale.svg)

## Context

Each step has one row of the given number of tokens. TFLOP are the operations of a step, computed by
[costs.py](../src/moonwhale/costs.py).

{contexts}

MoBA is faster at {faster} tokens. At {longest} tokens it takes {of_full[seconds]} of the time of full
attention, {of_full[teraflop]} of the operations and {of_full[megabytes]} of the memory.

Which part of the cost is quadratic in the length? To see this, each curve is fitted by a + b T + c T², with T in units
of 1,024 tokens, non-negative coefficients, and least squares of relative errors. The fitted seconds differ from the
measured ones by at most {missed}. GFLOP/s are the operations of a term divided by its seconds.

{terms}

- **a**: the cost of a step that does not depend on its length. For memory, these are weights and gradients.
- **b**: the cost per token of matrices, experts and heads. With MoBA it includes the keys that a query reads, at most
  {config.moba_topk} blocks of {config.moba_block_size}. For memory, these are the activations saved for backward.
- **c**: the quadratic cost of attention. With full attention a query reads (T + 1)/2 keys on average. With MoBA two
  things still grow quadratically: the gate, which compares a query with the mean of each earlier block, and the
  {full_blocks} of {config.num_blocks} transformer blocks that keep full attention. For memory, c stands for stored
  scores.
- If c has a larger share of the seconds than of the operations, attention reaches fewer GFLOP/s than the rest; if it
  has a smaller share, more.

## Batch

Rows of {context} tokens, with MoBA. The operations per token are the same for any batch.

{batches}

{more_rows}

## Experts

{rows} rows of {context} tokens. A token uses {config.num_experts_per_tok} experts; all experts have the same width.

{experts}

{more_experts}
"""


def measure(shapes: dict, rows: int, context: int, steps: int) -> dict:
    """Measures the seconds and the megabytes of a step in this process."""
    before, precision = psutil.Process().memory_info().rss, choose("cpu")
    tune_allocator()
    use_kernels(precision.device)
    torch.manual_seed(0)
    model = MoonwhaleForCausalLM(MoonwhaleConfig(**shapes)).train()
    run = step(model, Contender("moonwhale", FP32, precision.dtype))

    def draw() -> torch.Tensor:
        return torch.randint(shapes["vocab_size"], (rows, context))

    timing = timed_rounds({"step": run}, draw, steps, limit=steps + 2)
    return {"seconds": timing["seconds"]["step"], "megabytes": round((peak_of_process() - before) / 1e6)}


def point(what: str, at: int, shapes: dict, rows: int, context: int, steps: int) -> dict:
    """Returns the figures of a point. The measured ones are None if memory does not suffice."""
    config, tokens, name = MoonwhaleConfig(**shapes), rows * context, f"{what} {at:,}"
    size, flops = model_size(config), flops_per_token(config, context)
    found = {
        "at": at,
        "parameters": size.parameters,
        "active_parameters": size.active_parameters,
        "flops_per_token": round(flops),
        "teraflop": tokens * flops / 1e12,
    }
    measured = fresh(name, measure, shapes, rows, context, steps)
    if measured is None:
        return found | {"seconds": None, "tokens_per_second": None, "megabytes": None}
    speed = round(tokens / measured["seconds"])
    print(f"{name}: {speed:,} tokens/s, {measured['megabytes']:,} MB", file=sys.stderr)
    return found | measured | {"tokens_per_second": speed}


def measured(points: list[dict]) -> list[dict]:
    return [p for p in points if p["seconds"] is not None]


def fit(lengths: list[int], amounts: list[float]) -> list[float]:
    """Fits a + b T + c T², T in units of 1,024 tokens, and returns (a, b, c).

    The coefficients minimize the squared relative errors among all non-negative ones, because no cost is negative.
    """
    t = torch.tensor(lengths, dtype=torch.float64) / UNIT
    powers = torch.stack([t**0, t, t**2], 1) / torch.tensor(amounts, dtype=torch.float64)[:, None]
    candidates = []
    for columns in (list(chosen) for n in (1, 2, 3) for chosen in combinations(range(3), n)):
        found = torch.zeros(3, dtype=torch.float64)
        found[columns] = torch.linalg.lstsq(powers[:, columns], torch.ones(len(t), 1, dtype=t.dtype)).solution[:, 0]
        if (found >= 0).all():
            candidates.append((((powers @ found - 1) ** 2).sum().item(), found.tolist()))
    return min(candidates)[1]


def value(coefficients: list[float], length: int) -> float:
    a, b, c = coefficients
    return a + b * length / UNIT + c * (length / UNIT) ** 2


def quadratic_share(coefficients: list[float], length: int) -> float:
    return coefficients[2] * (length / UNIT) ** 2 / value(coefficients, length)


def draw(result: dict, path: Path) -> None:
    """Draws speed above memory, with one column for each quantity that grows. The fits of the seconds are dashed."""
    columns = {
        "tokens of context, one row": result["context"],
        f"rows of {CONTEXT}": {"MoBA": result["batch"]},
        "routed experts": {"MoBA": result["experts"]},
    }
    with picture(path, 2, 3, figsize=(10, 5.2), sharex="col") as (_, axes):
        for (top, bottom), (what, curves) in zip(axes.T, columns.items(), strict=True):
            for name, points in curves.items():
                done, colour = measured(points), COLOURS[name]
                at = [p["at"] for p in done]
                top.plot(at, [p["tokens_per_second"] for p in done], "o-", color=colour, label=name)
                bottom.plot(at, [p["megabytes"] / 1e3 for p in done], "o-", color=colour)
                if curves is result["context"]:
                    seconds = result["fits"][name]["seconds"]
                    top.plot(at, [x / value(seconds, x) for x in at], "--", color="black", linewidth=0.8)
            ticks = [p["at"] for p in points]
            bottom.set(xlabel=what)
            bottom.set_xscale("log", base=2)
            bottom.set_xticks(ticks, [f"{x:,}" for x in ticks], rotation=30 if max(ticks) > 999 else 0)
            for ax in (top, bottom):
                ax.set_ylim(0, 1.05 * ax.get_ylim()[1])
                ax.grid(alpha=0.25)
        for ax, title in zip(axes[0], ("a longer context", "a larger batch", "more experts"), strict=True):
            ax.set_title(title, loc="left")
        axes[0, 0].legend(frameon=False)
        axes[0, 0].set_ylabel("tokens/s")
        axes[1, 0].set_ylabel("peak memory, GB")


def main(argv: list[str] | None = None) -> None:
    parser = options(__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=3, help="timed steps per point (3)")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="folder for scale.md and scale.svg")
    arguments = parser.parse_args(argv)
    shapes, steps = PRESETS[PRESET].model, arguments.steps

    kinds = {"MoBA": shapes, "full attention": shapes | {"moba_topk": 0}}
    contexts = {
        name: [point(f"{name}, context", n, kind, 1, n, steps) for n in CONTEXTS] for name, kind in kinds.items()
    }
    batch = [point("rows", n, shapes, n, CONTEXT, steps) for n in ROWS]
    experts = [point("experts", n, shapes | {"n_routed_experts": n}, EXPERT_ROWS, CONTEXT, steps) for n in EXPERTS]
    fits = {}
    for name, points in contexts.items():
        points = measured(points)
        fits[name] = {q: fit([p["at"] for p in points], [p[q] for p in points]) for q in QUANTITIES}
    result = {
        "preset": PRESET,
        "model": shapes,
        "steps": steps,
        "fits": fits,
        "environment": environment(f"{choose('cpu').dtype}".removeprefix("torch."), tune_allocator()),
    }
    curves = {"context": contexts, "batch": batch, "experts": experts}
    write(arguments.results, "scale", result, **curves)
    draw(result | curves, arguments.docs / "scale.svg")
    (arguments.docs / "scale.md").write_text(page(result | curves), encoding="utf-8")


def table(head: list[str], rows: list[list]) -> str:
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in [head, ["---"] * len(head), *rows])


def cells(point: dict) -> list[str]:
    if point["seconds"] is None:
        return ["not enough memory", "", ""]
    return [f"{point['tokens_per_second']:,}", f"{point['seconds']:.2f}", f"{point['megabytes']:,}"]


def growth(name: str, fits: dict, longest: int) -> list[list[str]]:
    """Returns the rows of a curve in the table of fits, and the operations divided by the seconds."""
    rows = []
    for quantity, unit in QUANTITIES.items():
        terms = [f"{float(f'{x:.3g}'):,g}" if x > 1e-9 else "0" for x in fits[quantity]]
        rows.append([f"{name}, {unit}", *terms, f"{quadratic_share(fits[quantity], longest):.1%}"])
    both = list(zip(fits["teraflop"], fits["seconds"], strict=True))[1:]
    return [*rows, [f"{name}, GFLOP/s", "", *(f"{1e3 * flop / s:,.0f}" if s else "" for flop, s in both), ""]]


def compared(points: list[dict], what: str, **named: str) -> str:
    """Compares the last point with the first, in one sentence."""
    first, last = measured(points)[0], measured(points)[-1]
    factors = [f"{last[key] / first[key]:.2f}× the {name}" for key, name in named.items()]
    return f"From {first['at']} to {last['at']} {what}: {', '.join(factors)}."


def page(result: dict) -> str:
    """Returns docs/scale.md. Its figures, and every sentence that has one, come from the result."""
    contexts, fits, config = result["context"], result["fits"], MoonwhaleConfig(**result["model"])
    longest = min(measured(points)[-1]["at"] for points in contexts.values())
    moba, full = ({p["at"]: p for p in measured(points)} for points in contexts.values())
    faster = [f"{at:,}" for at in moba if at in full and moba[at]["seconds"] < full[at]["seconds"]]
    missed = [
        abs(value(fits[name]["seconds"], p["at"]) / p["seconds"] - 1)
        for name, points in contexts.items()
        for p in measured(points)
    ]
    heads = [f"{name}: {what}" for name in contexts for what in ("tokens/s", "seconds", "MB", "TFLOP")]
    pairs = [
        [f"{a['at']:,}", *cells(a), f"{a['teraflop']:.2f}", *cells(b), f"{b['teraflop']:.2f}"]
        for a, b in zip(*contexts.values(), strict=True)
    ]
    experts = [
        [p["at"], f"{p['parameters'] / 1e6:.1f} M", f"{p['active_parameters'] / 1e6:.1f} M", *cells(p)]
        for p in result["experts"]
    ]
    then, now = (model_size(c).parameters for c in (config, MoonwhaleConfig(**PRESETS[result["preset"]].model)))
    old = result["environment"]["commit"] == BEFORE_KERNELS
    terms = ["", "a, fixed", "b, per 1,024 tokens", "c, per 1,024² tokens", f"c T² at {longest:,} tokens"]
    return PAGE.format(
        **result["environment"],
        preset=result["preset"],
        parameters=f"{then / 1e6:.1f} M",
        since="" if now == then else f" The preset has changed since: it has {now / 1e6:.1f} M parameters now.",
        age="\nSteps were measured before training had [kernels](training.md#kernels-for-a-cpu)." if old else "",
        steps=result["steps"],
        config=config,
        full_blocks=sum(not config.is_moba_layer(i) for i in range(config.num_blocks)),
        rows=EXPERT_ROWS,
        context=CONTEXT,
        faster=", ".join(faster) or "no number of",
        longest=f"{longest:,}",
        of_full={what: f"{moba[longest][what] / full[longest][what]:.0%}" for what in QUANTITIES},
        missed=f"{max(missed):.1%}",
        contexts=table(["tokens", *heads], pairs),
        terms=table(terms, [row for name in contexts for row in growth(name, fits[name], longest)]),
        batches=table(["rows", "tokens/s", "seconds", "MB"], [[p["at"], *cells(p)] for p in result["batch"]]),
        more_rows=compared(result["batch"], "rows", tokens_per_second="tokens/s", megabytes="memory"),
        experts=table(["experts", "parameters", "active", "tokens/s", "seconds", "MB"], experts),
        more_experts=compared(
            result["experts"],
            "experts",
            parameters="parameters",
            flops_per_token="operations per token",
            tokens_per_second="tokens/s",
            megabytes="memory",
        ),
    )


if __name__ == "__main__":
    main()
