"""How fast is a training step of the seed model's shapes, and how much memory does it need?

    python benchmarks/train.py

A step is a forward and backward pass with labels. All contenders are interleaved in one run:

- moonwhale with MoBA as in the preset, fp32 weights, and bf16 autocast if the CPU is fast in it. MTP is off, since the
  other contenders have none.
- transformers' DeepseekV3 with the same dimensions and sdpa: in fp32 (its default), under bf16 autocast, and with bf16
  weights. Each runs with every experts implementation that can train on a CPU; the fastest one is compared.
- a dense GPT with as many active parameters.
- moonwhale with its MTP modules, compared with the fastest matrix product measured in the same rounds.

With full attention and equal weights, moonwhale and transformers must give the same loss before anything is timed.

Memory is the peak of one step in a process of its own, weights and gradients included, minus the memory of the process
before it built the model. The allocator is not tuned there; all timed steps use the tuned one.

Keys of the answer (results/train.json):
    vs_transformers_MODE: tokens/s divided by those of transformers in MODE fp32, autocast or bf16;
        vs_transformers_fp32_same_dtype compares moonwhale in fp32 with transformers in fp32.
    vs_dense: tokens/s divided by those of the dense GPT.
    ceiling_share: FLOP/s with MTP divided by those of the fastest matrix product (ceiling_gflops, 10^9 FLOP/s).
    memory_vs_transformers, memory_vs_transformers_fp32: peak memory divided by that of the smallest transformers
        contender, under autocast and in fp32.
    tokens_per_second, peak_megabytes: of each contender; null if memory does not suffice.
    flops_per_token_with_mtp, active_parameters, dense, rows, context: the work, the sizes and the shapes.
    rounds, discarded, busiest: see common.timed_rounds.
"""

import resource
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import psutil
import torch
from torch import nn
from transformers import DeepseekV3ForCausalLM

from common import deepseek_config, environment, options, timed_rounds, write
from dense import DenseLM
from moonwhale.costs import flops_per_token, model_size
from moonwhale.model import MoonwhaleConfig, MoonwhaleForCausalLM
from moonwhale.native.training import use_kernels
from moonwhale.precision import choose, measured_flops, tune_allocator
from moonwhale.presets import PRESETS

FP32, BF16 = torch.float32, torch.bfloat16
EXPERTS = ("eager", "grouped_mm")  # batched_mm copies an expert's weights for every token
MODES = {"fp32": (FP32, FP32), "autocast": (FP32, BF16), "bf16": (BF16, BF16)}  # dtypes of weights and products


class Contender(NamedTuple):
    kind: str  # argument of `build`
    weights: torch.dtype
    products: torch.dtype  # uses autocast if it differs from `weights`
    experts: str | None = None


def contenders(dtype: torch.dtype) -> dict[str, Contender]:
    """Returns the contenders. Our models and the dense GPT compute in `dtype`."""
    kinds = ("moonwhale", "moonwhale with MTP", "dense")
    ours = {kind: Contender(kind, FP32, dtype) for kind in kinds}
    ours["moonwhale, fp32"] = Contender("moonwhale", FP32, FP32)
    theirs = {
        f"transformers {mode}, {experts}": Contender("transformers", *dtypes, experts)
        for mode, dtypes in MODES.items()
        for experts in EXPERTS
    }
    return ours | theirs


def build(kind: str, shapes: dict, context: int) -> nn.Module:
    """Builds a model with newly drawn fp32 weights. Only "moonwhale with MTP" has MTP modules."""
    torch.manual_seed(0)
    whole = MoonwhaleConfig(**shapes)
    config = MoonwhaleConfig(**shapes | {"num_nextn_predict_layers": 0})
    if kind == "dense":
        return DenseLM(**dense_shapes(config, context))
    if kind == "transformers":
        return DeepseekV3ForCausalLM(deepseek_config(config, use_cache=False, attn_implementation="sdpa"))
    return MoonwhaleForCausalLM(whole if kind == "moonwhale with MTP" else config)


def dense_shapes(config: MoonwhaleConfig, context: int) -> dict:
    """Returns the shapes of a DenseLM with as many active parameters as `config`. `inner` is a multiple of 32."""
    shapes = {
        "vocab_size": config.vocab_size,
        "layers": config.num_hidden_layers,
        "width": config.hidden_size,
        "heads": config.num_attention_heads,
        "context": context,
    }
    narrow, wide = (dense_active(shapes | {"inner": inner}) for inner in (32, 64))
    steps = (active(config) - narrow) / (wide - narrow)
    return shapes | {"inner": 32 * (1 + max(0, round(steps)))}


def active(config: MoonwhaleConfig) -> int:
    """Returns the active parameters without the embedding."""
    return model_size(config).active_parameters - model_size(config).embedding


def dense_active(shapes: dict) -> int:
    """Returns the same for a DenseLM. Its embedding is also its head and is counted; its positions are not."""
    with torch.device("meta"):
        model = DenseLM(**shapes)
    return sum(p.numel() for p in model.parameters()) - model.positions.weight.numel()


def step(model: nn.Module, contender: Contender) -> Callable[[torch.Tensor], None]:
    """Returns a function that runs one training step on tokens (rows, T)."""

    def run(tokens: torch.Tensor) -> None:
        if contender.experts:
            model.set_experts_implementation(contender.experts)
        with torch.autocast("cpu", contender.products, enabled=contender.products != contender.weights):
            out = model(tokens, labels=tokens)
        (out if isinstance(out, torch.Tensor) else out.loss).backward()
        model.zero_grad()

    return run


def peak_memory(contender: Contender, shapes: dict, rows: int, context: int) -> int:
    """Returns the peak bytes that building a model and one step add to this process."""
    use_kernels(torch.device("cpu"))
    before = psutil.Process().memory_info().rss
    model = build(contender.kind, shapes, context).to(contender.weights).train()
    step(model, contender)(torch.randint(shapes["vocab_size"], (rows, context)))
    return peak_of_process() - before


def peak_of_process() -> int:
    """Returns this process's peak memory in bytes. (getrusage may report the parent's peak instead.)"""
    (peak,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:")]
    return 1024 * int(peak.split()[1])


def fresh(name: str, function: Callable, *arguments):
    """Runs `function(*arguments)` in a new process that is limited to the available memory, and returns its result.

    If memory does not suffice, prints a line with `name` and returns None.
    """
    free = psutil.virtual_memory().available
    limit = (resource.RLIMIT_DATA, (free, free))
    try:
        with ProcessPoolExecutor(1, get_context("spawn"), resource.setrlimit, limit) as process:
            return process.submit(function, *arguments).result()
    except (MemoryError, BrokenProcessPool):
        pass
    except RuntimeError as error:
        if not any(sign in str(error) for sign in ("allocate memory", "bad_alloc")):
            raise
    print(f"{name}: left out, {free / 1e9:.1f} GB of memory do not suffice", file=sys.stderr)
    return None


def shared(who: dict[str, Contender], shapes: dict, context: int) -> dict[str, nn.Module]:
    """Builds the models. All except the dense one share their weights, which are in memory once per dtype."""
    weights, models = build("moonwhale with MTP", shapes, context).state_dict(), {}
    for contender in who.values():
        if (key := contender[:2]) not in models:
            model = build(contender.kind, shapes, context)
            if contender.kind != "dense":
                model.load_state_dict({name: weights[name] for name in model.state_dict()}, assign=True)
            models[key] = model.to(contender.weights).train()
    return {name: models[contender[:2]] for name, contender in who.items()}


@torch.no_grad()
def check_same(theirs: nn.Module, shapes: dict, tokens: torch.Tensor) -> None:
    """Checks that our model with full attention computes the same loss as theirs, so that only speed differs."""
    ours = build("moonwhale", shapes | {"moba_topk": 0}, tokens.shape[1]).train()
    ours.load_state_dict(theirs.state_dict(), assign=True)
    loss = ours(tokens, labels=tokens).losses[0]
    for experts in EXPERTS:
        theirs.set_experts_implementation(experts)
        torch.testing.assert_close(theirs(tokens, labels=tokens).loss, loss, atol=1e-4, rtol=0)


def ratio(above: float | None, below: float | None) -> float | None:
    """Divides two figures; None if one is missing."""
    return round(above / below, 3) if above and below else None


def best(figures: dict[str, float | None], mode: str, of: Callable) -> float | None:
    """Returns the `of` (max or min) of transformers' figures in a mode."""
    found = [figures[f"transformers {mode}, {experts}"] for experts in EXPERTS]
    return of((figure for figure in found if figure is not None), default=None)


def memory_of(who: dict[str, Contender], shapes: dict, rows: int, context: int) -> dict[str, float | None]:
    """Measures the megabytes of a step in a process of its own; None if memory does not suffice."""
    found = {}
    for name, contender in who.items():
        peak = fresh(name, peak_memory, contender, shapes, rows, context)
        found[name] = None if peak is None else round(peak / 1e6, 1)
        print(f"{name}: {found[name]} MB", file=sys.stderr)
    return found


def main(argv: list[str] | None = None) -> None:
    parser = options(__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="valid rounds (5)")
    parser.add_argument("--rows", type=int, default=2, help="rows per batch (2)")
    parser.add_argument("--context", type=int, default=1024, help="tokens per row (1024)")
    arguments = parser.parse_args(argv)
    rows, context, shapes = arguments.rows, arguments.context, PRESETS["seed_190m"].model
    precision, generator, ceilings = choose("cpu"), torch.Generator().manual_seed(1), []

    def draw() -> torch.Tensor:
        print("next round", file=sys.stderr)
        return torch.randint(shapes["vocab_size"], (rows, context), generator=generator)

    def product(_) -> None:
        ceilings.append(measured_flops.__wrapped__(precision.device, precision.dtype))

    who = contenders(precision.dtype)
    memory = memory_of(who, shapes, rows, context)
    check_same(build("transformers", shapes, context).train(), shapes, draw())
    tuned = tune_allocator()
    use_kernels(precision.device)
    models = shared({name: who[name] for name in who if memory[name] is not None}, shapes, context)
    free, timed = psutil.virtual_memory().available / 1e6, {}
    for name, model in models.items():
        if memory[name] <= free:
            timed[name] = step(model, who[name])
        else:
            print(f"{name}: not timed, {free:.0f} MB of memory do not suffice next to the others", file=sys.stderr)
    timing = timed_rounds(timed | {"product": product}, draw, arguments.rounds)
    seconds = timing.pop("seconds")
    speeds = {name: round(rows * context / seconds[name], 1) if name in timed else None for name in who}

    whole = MoonwhaleConfig(**shapes)
    alone = MoonwhaleConfig(**shapes | {"num_nextn_predict_layers": 0})
    dense, flops = dense_shapes(alone, context), flops_per_token(whole, context)
    result = {f"vs_transformers_{mode}": ratio(speeds["moonwhale"], best(speeds, mode, max)) for mode in MODES}
    result |= {
        "vs_transformers_fp32_same_dtype": ratio(speeds["moonwhale, fp32"], best(speeds, "fp32", max)),
        "vs_dense": ratio(speeds["moonwhale"], speeds["dense"]),
        "ceiling_share": ratio(speeds["moonwhale with MTP"], max(ceilings) / flops),
        "memory_vs_transformers": ratio(memory["moonwhale"], best(memory, "autocast", min)),
        "memory_vs_transformers_fp32": ratio(memory["moonwhale, fp32"], best(memory, "fp32", min)),
        "tokens_per_second": speeds,
        "peak_megabytes": memory,
        "ceiling_gflops": round(max(ceilings) / 1e9),
        "flops_per_token_with_mtp": round(flops),
        "active_parameters": {"moonwhale": active(alone), "dense": dense_active(dense)},
        "dense": dense,
        "rows": rows,
        "context": context,
        **timing,
        "environment": environment(f"{precision.dtype}, theirs as named".removeprefix("torch."), tuned),
        "memory_allocator": "as it comes",
    }
    write(arguments.results, "train", result)


if __name__ == "__main__":
    main()
