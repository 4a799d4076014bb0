"""The sweep that settles the values of moonwhale/model/thresholds.py on a GPU, a part of gpu.py."""

import sys
import time
from datetime import date

import torch

from decode import TOKENS, Ours, seed_model
from moonwhale.infer import graphs
from moonwhale.infer.decoder import Decoder
from moonwhale.infer.feed_forward import ExpertLayer
from moonwhale.infer.graphs import MIN_CONTEXT_BOUND
from moonwhale.model import flex, thresholds
from moonwhale.model.documents import Documents

MULTIPLES = (4, 8, 16)  # lengths tried, in keys that a query reads
TOKEN_COUNTS = (64, 128, 256, 512, 1024, 2048)


def long_context(bench, attention, setting: tuple[int, int], shapes: tuple[int, int, int]) -> dict:
    """Times MoBA forward and backward with and without sorted queries.

    Returns:
        LONG_CONTEXT, half of the least multiple from which sorting is always faster (so that a context of that length
        is long), and the seconds of both.
    """
    heads, width, value_width = shapes
    taken, usual = {}, flex.LONG_CONTEXT
    for multiple in MULTIPLES:
        length = multiple * setting[0] * setting[1]
        documents = Documents.from_inputs(1, length, bench.device, None, None)
        *inputs, d_out = (
            torch.randn(1, heads, length, w, device=bench.device, dtype=torch.bfloat16)
            for w in (width, width, value_width, value_width)
        )
        inputs = [x.requires_grad_() for x in inputs]
        for name, limit in (("tiles", 10**6), ("sorted", 0)):
            torch._dynamo.reset()
            flex.LONG_CONTEXT = limit
            try:
                taken[name, multiple] = bench.seconds(
                    lambda inputs=inputs, d_out=d_out, documents=documents: torch.autograd.grad(
                        attention(*inputs, width**-0.5, documents, *setting), inputs, d_out
                    )
                )
            finally:
                flex.LONG_CONTEXT = usual
    faster = [m for m in MULTIPLES if all(taken["sorted", n] < taken["tiles", n] for n in MULTIPLES if n >= m)]
    return {
        "LONG_CONTEXT": faster[0] // 2 if faster else MULTIPLES[-1],
        "long_context_seconds": {f"{name}, {multiple}": seconds for (name, multiple), seconds in taken.items()},
    }


@torch.inference_mode()
def capture_after(bench, decoder: Decoder) -> dict:
    """Returns CAPTURE_AFTER, the steps that take as long uncaptured as capturing costs, and what was measured."""
    prompt = torch.randint(decoder.config.vocab_size, (1, bench.context), device=bench.device)
    captures, right, usual, recorded = [], graphs.capture, graphs.CAPTURE_AFTER, decoder.graphs

    def timed(function, device, pool):
        bench.synchronize()
        start = time.perf_counter()
        made = right(function, device, pool)
        bench.synchronize()
        captures.append(time.perf_counter() - start)
        return made

    decoder.graphs = None
    alone = bench.seconds(Ours(decoder, prompt)) / TOKENS
    decoder.graphs, graphs.capture, graphs.CAPTURE_AFTER = recorded, timed, 0
    try:
        captured = bench.seconds(Ours(decoder, prompt)) / TOKENS
    finally:
        graphs.capture, graphs.CAPTURE_AFTER = right, usual
    cost, gain = max(captures, default=0.0), alone - captured
    return {
        "CAPTURE_AFTER": max(1, round(cost / gain)) if cost and gain > 0 else None,
        "capture_seconds": {"capture": cost, "step": alone, "captured step": captured, "bound": MIN_CONTEXT_BOUND},
    }


@torch.inference_mode()
def all_experts(bench, decoder: Decoder, moe) -> dict:
    """Returns MAX_TOKENS_FOR_ALL_EXPERTS, the most tokens for which running all experts is faster, and the seconds."""
    layer = next(block.feed_forward for block in decoder.main if isinstance(block.feed_forward, ExpertLayer))
    layer.stacks = moe.experts
    taken, most = {}, 0
    for tokens in TOKEN_COUNTS:
        rows = torch.randn(tokens, decoder.config.hidden_size, device=bench.device, dtype=decoder.dtype)
        _, index, gates = layer.gate(rows)
        each = bench.seconds(lambda rows=rows, index=index, gates=gates: layer._all_experts(rows, index, gates))
        chosen = bench.seconds(lambda rows=rows, index=index, gates=gates: layer.stacks(rows, index, gates))
        taken[tokens] = {"all": each, "chosen": chosen}
        if each > chosen:
            break
        most = tokens
    return {"MAX_TOKENS_FOR_ALL_EXPERTS": most, "all_experts_seconds": taken}


def sweep(bench, attention, setting: tuple[int, int], shapes: tuple[int, int, int], gpu: str) -> dict:
    """Measures the three thresholds, and keeps each as soon as it is known."""
    ours = seed_model(2 * bench.context).to(bench.device)
    decoder, moe = Decoder(ours), ours.model.main_blocks[-1].mlp
    found = {"MEASURED_ON": f"{gpu}, {date.today()}"}
    for measure in (
        lambda: all_experts(bench, decoder, moe),
        lambda: capture_after(bench, decoder),
        lambda: long_context(bench, attention, setting, shapes),
    ):
        found |= measure()
        bench.keep({"thresholds": found})
    values = {name: found[name] for name in vars(thresholds) if name.isupper() and found.get(name) is not None}
    print(f"for thresholds.py: {values}", file=sys.stderr)
    return {"thresholds": found}
