"""What share of a training step does MuonClip take, and how many of AdamW's tokens does it need to reach AdamW's loss?

    python benchmarks/optimizer.py [TEXT]
    python benchmarks/optimizer.py --cost-only

Cost: the script times a step of the `seed_190m` shapes on 8,192 tokens in rows of 1,024, as the trainer computes it
(micro-batches, bf16 autocast where it is faster, clipped gradient norm). Then it times MuonClip's whole step:
Newton-Schulz, the AdamW part, QK-clip and the router's bias. Each round has new tokens; the compared parts run in the
same round.

Tokens: see optimizer_race.py. Each half can run alone; the result file then keeps the other half's figures.

Keys of the answer (results/optimizer.json), in addition to those of optimizer_race.py:
    muonclip_share: the seconds of MuonClip's step, divided by those of the whole training step.
    qkclip_share: the same for QK-clip, including the search for the largest scores, which softmax needs too.
    cost: tokens per step, rows per micro-batch, the seconds of each part, and the environment.
"""

import json
import sys
from pathlib import Path
from unittest import mock

import psutil
import torch
from torch import Tensor

from common import ROOT, environment, options, timed_rounds, write
from moonwhale.costs import model_size
from moonwhale.model import MoonwhaleConfig, MoonwhaleForCausalLM, attention
from moonwhale.native.training import use_kernels
from moonwhale.optim.muonclip import MuonClip, param_groups
from moonwhale.optim.step_hooks import attach_hooks
from moonwhale.precision import choose, tune_allocator
from moonwhale.presets import PRESETS
from optimizer_race import race

TOKENS, CONTEXT, TAU = 8192, 1024, 100.0
BYTES_PER_PARAMETER, BYTES_PER_TOKEN = 24, 1e6  # approximate memory: weights, gradients, optimizer state; activations


def autocast():
    choice = choose("cpu")
    return torch.autocast("cpu", choice.dtype, enabled=choice.autocast)


def score_tiles(model: MoonwhaleForCausalLM, tokens: Tensor) -> list[Tensor]:
    """Returns one tensor per tile of scores in a forward pass of tokens (rows, T); tiles of equal shape share one."""
    tiles, of_shape, products_of = [], {}, attention._products

    def recorded(*args) -> Tensor:
        scores = products_of(*args)
        tiles.append(of_shape.setdefault(scores.shape, scores))
        return scores

    with mock.patch.object(attention, "_products", recorded), torch.no_grad(), autocast():
        model(tokens, labels=tokens)
    return tiles


def measure_logits(tiles: list[Tensor]) -> None:
    """Finds the largest score of each row. This is an upper bound of QK-clip's cost in attention.

    Softmax needs these maxima too, and the maximum over rows is little work.
    """
    for tile in tiles:
        tile.amax(-1).float()


def cost(rounds: int, rows: int) -> dict:
    """Measures the shares of a step. Returns an empty dict if memory does not suffice."""
    tuned, config = tune_allocator(), MoonwhaleConfig(**PRESETS["seed_190m"].model)
    needed = BYTES_PER_PARAMETER * model_size(config).parameters + BYTES_PER_TOKEN * rows * CONTEXT
    if psutil.virtual_memory().available < needed:
        print(f"cost: left out, a step needs about {needed / 1e9:.1f} GB of free memory", file=sys.stderr)
        return {}

    use_kernels(torch.device("cpu"))
    torch.manual_seed(0)
    model = MoonwhaleForCausalLM(config).train()
    optimizer = MuonClip(param_groups(model))
    hooks = attach_hooks(optimizer, model, TAU)

    def draw() -> Tensor:
        return torch.randint(config.vocab_size, (TOKENS // (rows * CONTEXT), rows, CONTEXT))

    tiles = score_tiles(model, draw()[0])

    def forward_backward(micro_batches: Tensor) -> None:
        optimizer.zero_grad()  # before the step, so that the optimizer still finds the gradients
        for tokens in micro_batches:
            with autocast():
                loss = model(tokens, labels=tokens).loss
            (loss / len(micro_batches)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)

    def qk_clip(micro_batches: Tensor) -> None:
        for _ in micro_batches:
            measure_logits(tiles)
        for module in hooks.attentions:
            module.clip_qk_(TAU)

    contenders = {
        "forward and backward": forward_backward,
        "optimizer": lambda _: optimizer.step(),
        "qk-clip": qk_clip,
    }
    timing = timed_rounds(contenders, draw, rounds)
    seconds = timing["seconds"]
    step = seconds["forward and backward"] + seconds["optimizer"]
    return {
        "muonclip_share": round(seconds["optimizer"] / step, 4),
        "qkclip_share": round(seconds["qk-clip"] / step, 4),
        "cost": {
            "tokens": TOKENS,
            "rows": rows,
            **timing,
            "environment": environment(str(choose("cpu").dtype).removeprefix("torch."), tuned),
        },
    }


def main(argv: list[str] | None = None) -> None:
    parser = options(__doc__.splitlines()[0])
    parser.add_argument("text", nargs="?", default="chitchat", help="the race's data, as in moonwhale train (chitchat)")
    half = parser.add_mutually_exclusive_group()
    half.add_argument("--cost-only", action="store_true", help="measure only the shares of a step")
    half.add_argument("--race-only", action="store_true", help="measure only the tokens")
    parser.add_argument("--rounds", type=int, default=3, help="valid rounds of the cost (3)")
    parser.add_argument("--rows", type=int, default=4, choices=(1, 2, 4, 8), help="rows per micro-batch (4)")
    parser.add_argument("--steps", type=int, default=250, help="steps of AdamW's runs, of 2,048 tokens (250)")
    parser.add_argument("--processes", type=int, default=2, help="runs at a time, with one thread each (2)")
    parser.add_argument("--picture", type=Path, default=ROOT / "docs" / "optimizer.svg", help="file of the picture")
    arguments = parser.parse_args(argv)

    before = arguments.results / "optimizer.json"
    result = json.loads(before.read_text(encoding="utf-8")) if before.exists() else {}
    if not arguments.race_only:
        result |= cost(arguments.rounds, arguments.rows)
    if not arguments.cost_only:
        result |= race(arguments.text, arguments.steps, arguments.processes, arguments.picture)
    curves = {"runs": result.pop("runs")} if "runs" in result else {}
    write(arguments.results, "optimizer", result, **curves)


if __name__ == "__main__":
    main()
