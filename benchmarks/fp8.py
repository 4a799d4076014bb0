"""Does training in DeepSeek-V3's FP8, emulated, reach bf16's loss? How much does an outlier cost with other scales?

    python benchmarks/fp8.py TEXT

The same model learns the same rows of TEXT from the same weights, in bf16 and with its linear layers and experts in FP8
with tiles. The paper claims a loss within 0.25 % of bf16's (§3.3). The last 5 % of the text are held out.

Then the first steps of the run are repeated with an outlier: one input feature of each product is 2^16 times as large,
and its weights are smaller by the same factor. This changes nothing in exact arithmetic, and no bit in bf16. With
tiles, the outlier costs only its neighbours their precision. With one scale per tensor, as in the mutant, it costs all
others. The script also draws docs/fp8.svg.

Keys of the answer (results/fp8.json), losses in nats per token:
    relative_loss_error: the larger absolute value of relative_training_error and relative_held_out_error, which are the
        differences of FP8's training and held-out loss from bf16's, divided by bf16's.
    final_loss, held_out_loss: of "bf16" and "tiles"; the final loss is the mean training loss of the last fifth.
    outlier, outlier_steps, outlier_loss: the factor, the steps, and the final loss in bf16 (without an outlier), with
        tiles and with one scale per tensor.
    steps, seconds, seed, text, model: optimizer steps, duration of each run, seed, name of the text, shapes.
    curves: the training loss of each step of each run.
"""

import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor

from common import ROOT, environment, options, picture, write
from contenders import CONTEXT, VOCABULARY, Data, linear_decay, load
from moonwhale import fp8
from moonwhale.errors import UserError
from moonwhale.model import MoonwhaleConfig, MoonwhaleForCausalLM
from moonwhale.optim.muonclip import MuonClip, param_groups
from moonwhale.optim.step_hooks import attach_hooks
from moonwhale.precision import tune_allocator

MODEL = {
    "vocab_size": VOCABULARY,
    "max_position_embeddings": CONTEXT,
    "hidden_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "q_lora_rank": 128,
    "kv_lora_rank": 128,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "moba_block_size": 64,
    "moba_topk": 2,
    "moba_full_attention_layers": [1],
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 128,
    "bias_update_speed": 0.01,
    "num_nextn_predict_layers": 0,
}
RATE, WARMUP, DECAY, NORM, ROWS = 6e-3, 0.03, 0.5, 1.0, 4
OUTLIER = 2**16
LAST = 0.2  # share of a run whose mean training loss is its final loss
HELD_OUT_ROWS = 128
SMOOTHED = 10  # steps per point of the picture
STYLES = {  # colour, and label in the picture
    "bf16": ("#d97706", "bf16"),
    "tiles": ("#2563eb", "FP8 by tiles, as DeepSeek-V3"),
    "outlier, tiles": ("#2563eb", "FP8 by tiles"),
    "outlier, tensor": ("#b91c1c", "FP8 with one scale for a tensor"),
}
Product = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def with_outlier(product: Product) -> Product:
    """Wraps a product so that the first feature of `x` is an outlier; the exact result stays the same."""

    def spoiled(x: Tensor, weight: Tensor, ends: Tensor | None = None) -> Tensor:
        factor = x.new_ones(x.shape[-1])
        factor[0] = OUTLIER
        return product(x * factor, weight / factor, ends)

    return spoiled


def build(which: str, seed: int) -> MoonwhaleForCausalLM:
    """Builds the model of a run. All runs with the same seed start from the same weights."""
    torch.manual_seed(seed)
    model = MoonwhaleForCausalLM(MoonwhaleConfig(**MODEL))
    if which != "bf16":
        fp8.convert(model, "blockwise", emulate=True)
    if which.startswith("outlier"):
        for module in model.modules():
            if getattr(module, "product", None):
                module.product = with_outlier(module.product)
    return model


def one_scale() -> patch:
    """Patches in the mutant: every tile is the whole matrix."""
    quantise = fp8.quantise
    return patch.object(fp8, "quantise", lambda x, rows, columns: quantise(x, *x.shape[-2:]))


def train(data: Data, which: str, steps: int, stop: int, seed: int = 0) -> dict:
    """Runs the first `stop` steps of a schedule of `steps`; returns their losses, the held-out loss and the seconds."""
    model = build(which, seed).train()
    optimizer = MuonClip(param_groups(model, lr=RATE))
    attach_hooks(optimizer, model)
    draw, losses, start = torch.Generator().manual_seed(seed), [], time.perf_counter()
    with one_scale() if which.endswith("tensor") else nullcontext():
        for step in range(stop):
            for group in optimizer.param_groups:
                group["lr"] = RATE * linear_decay((step + 1) / (steps + 1), WARMUP, DECAY, 0.0)
            starts = torch.randint(len(data.train) - CONTEXT + 1, (ROWS, 1), generator=draw)
            tokens = data.train[starts + torch.arange(CONTEXT)]
            with torch.autocast("cpu", torch.bfloat16):
                out = model(tokens, labels=tokens)
            out.loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), NORM)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(round(out.losses[0].item(), 4))
        seconds = time.perf_counter() - start
        held_out = score(model.eval(), data.held_out[:HELD_OUT_ROWS])
    print(f"{which}: {stop} steps in {seconds:.0f} s, held out {held_out:.4f}", file=sys.stderr)
    return {"losses": losses, "held_out": round(held_out, 4), "seconds": round(seconds, 1)}


@torch.no_grad()
def score(model: MoonwhaleForCausalLM, rows: Tensor) -> float:
    """Returns the mean loss of rows (n, CONTEXT) in nats per token."""
    with torch.autocast("cpu", torch.bfloat16):
        parts = [model(part, labels=part, logits_to_keep=1).losses[0].item() * len(part) for part in rows.split(16)]
    return sum(parts) / len(rows)


def final(losses: list[float]) -> float:
    """Returns the mean of the last training losses."""
    last = losses[-max(1, round(LAST * len(losses))) :]
    return round(sum(last) / len(last), 4)


def summary(runs: dict[str, dict]) -> dict:
    """Returns the answer's figures. Losses are in nats per token, errors relative to bf16's loss."""
    plain, tiles = runs["bf16"], runs["tiles"]
    stop = len(runs["outlier, tiles"]["losses"])
    training = final(tiles["losses"]) / final(plain["losses"]) - 1
    held_out = tiles["held_out"] / plain["held_out"] - 1
    return {
        "relative_loss_error": round(max(abs(training), abs(held_out)), 5),
        "steps": len(plain["losses"]),
        "relative_training_error": round(training, 5),
        "relative_held_out_error": round(held_out, 5),
        "final_loss": {name: final(runs[name]["losses"]) for name in ("bf16", "tiles")},
        "held_out_loss": {name: runs[name]["held_out"] for name in ("bf16", "tiles")},
        "outlier": OUTLIER,
        "outlier_steps": stop,
        "outlier_loss": {"bf16": final(plain["losses"][:stop])}
        | {name.split()[-1]: final(runs[name]["losses"]) for name in ("outlier, tiles", "outlier, tensor")},
        "seconds": {name: run["seconds"] for name, run in runs.items()},
    }


def draw(result: dict, path: Path) -> None:
    """Draws by how much the losses of FP8 differ from bf16's, over the whole run and with an outlier."""
    with picture(path, 1, 2, figsize=(10, 4), width_ratios=(3, 2)) as (_, axes):
        plain, stop = torch.tensor(result["curves"]["bf16"]), result["outlier_steps"]
        for name, (colour, label) in STYLES.items():
            losses = torch.tensor(result["curves"][name])
            if name != "bf16":
                ax = axes[0] if len(losses) > stop else axes[1]
                steps, difference = _smoothed((losses / plain[: len(losses)] - 1) * 100)
                ax.plot(steps, difference, color=colour, label=label, linewidth=1.6)
        error = result["relative_training_error"]
        side = "above" if error > 0 else "below"
        axes[0].set_title(f"the whole run: {abs(error):.2%} {side} bf16's in its last fifth", loc="left")
        axes[1].set_title(f"with one feature 2^{OUTLIER.bit_length() - 1} times as large", loc="left")
        for ax in axes:
            ax.axhline(0, color="black", linewidth=0.8)
            ax.set(xlabel="optimizer step", ylabel="training loss, % above bf16's")
            ax.grid(alpha=0.25)
            ax.legend(frameon=False, fontsize=8)


def _smoothed(losses: Tensor) -> tuple[Tensor, Tensor]:
    """Returns steps, and the mean loss of the SMOOTHED steps up to each."""
    means = losses.unfold(0, SMOOTHED, SMOOTHED).mean(-1)
    return SMOOTHED * torch.arange(1, len(means) + 1), means


def main(argv: list[str] | None = None) -> None:
    parser = options(__doc__.splitlines()[0])
    parser.add_argument("text", metavar="TEXT", help="training text, .txt or .txt.xz; its paragraphs are documents")
    parser.add_argument("--steps", type=int, default=500, help="optimizer steps in bf16 and in FP8 (500)")
    parser.add_argument("--outlier-steps", type=int, default=100, help="steps with an outlier (100)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights and the rows (0)")
    parser.add_argument("--picture", type=Path, default=ROOT / "docs" / "fp8.svg", help="file of the picture")
    arguments = parser.parse_args(argv)
    if not SMOOTHED <= arguments.outlier_steps <= arguments.steps:
        parser.error(f"--outlier-steps: give {SMOOTHED} to {arguments.steps}, at most as many as --steps")

    allocator_tuned = tune_allocator()
    try:
        data = load(arguments.text)
    except UserError as error:
        parser.error(str(error))
    runs = {}
    for name in STYLES:
        stop = arguments.outlier_steps if "outlier" in name else arguments.steps
        runs[name] = train(data, name, arguments.steps, stop, arguments.seed)
    result = summary(runs) | {"seed": arguments.seed, "text": Path(arguments.text).name, "model": MODEL}
    result["environment"] = environment("bf16 autocast, emulated FP8", allocator_tuned)
    curves = {name: run["losses"] for name, run in runs.items()}
    write(arguments.results, "fp8", result, curves=curves)
    draw(result | {"curves": curves}, arguments.picture)


if __name__ == "__main__":
    main()
