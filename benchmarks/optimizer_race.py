"""How many tokens does MuonClip need to reach AdamW's held-out loss, compared with AdamW? (Part of optimizer.py.)

Both optimizers train the same model, with all its mechanisms, from the same weights on the same batches. They share the
schedule (warm-up, constant, linear decay to zero, as shares of a run's length), the clipping of the gradient norm, the
weight decay and its parameters, and the update of the router's bias. The learning rate of each is tuned with one seed
on runs of equal length.

Three other seeds give the result. For each, AdamW has one run, and MuonClip has runs of several shorter lengths, each
with a complete schedule, since the loss in the middle of a schedule is not the final loss of a shorter run. The tokens
needed are the length at which MuonClip's final loss crosses AdamW's.

Keys that `race` adds to results/optimizer.json:
    tokens_vs_adamw: MuonClip's tokens divided by AdamW's, median over seeds; tokens_vs_adamw_by_seed has each seed's.
    race: the text, AdamW's tokens, the tuned rates, and the final loss of each rate tried (`tuning`).
    runs: each run's optimizer, rate, seed, steps, and `held_out`: pairs of tokens and loss in nats per token.
"""

import math
import multiprocessing
import sys
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
from tqdm import tqdm

from common import environment, picture
from moonwhale.data.loading import load_source
from moonwhale.data.packing import PackedDataset, TrainingData, build_data
from moonwhale.model import MoonwhaleConfig, MoonwhaleForCausalLM
from moonwhale.native.training import use_kernels
from moonwhale.optim.muonclip import MuonClip, param_groups
from moonwhale.optim.step_hooks import attach_hooks
from moonwhale.precision import tune_allocator

MODEL = {
    "vocab_size": 2048,
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "q_lora_rank": 64,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 24,
    "qk_rope_head_dim": 8,
    "v_head_dim": 24,
    "moba_block_size": 32,
    "moba_topk": 3,
    "moba_full_attention_layers": [3],
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "bias_update_speed": 0.01,
    "num_nextn_predict_layers": 1,
}
CONTEXT, ROWS, HELD_OUT_ROWS = 256, 8, 64
WARMUP, DECAY, NORM = 0.05, 0.4, 1.0  # shares of a run; largest gradient norm
RATES = {"adamw": (1e-3, 2e-3, 4e-3, 8e-3), "muonclip": (2e-3, 4e-3, 8e-3, 1.6e-2)}
MOST_RATES = 8
FRACTIONS = (0.3, 0.4, 0.5, 0.6, 0.8, 1.0)  # of AdamW's tokens
TUNING_SEED, SEEDS, EVALUATIONS = 0, (1, 2, 3), 8
COLOURS = {"adamw": "#d97706", "muonclip": "#2563eb"}
NAMES = {"adamw": "AdamW", "muonclip": "MuonClip"}


class Run(NamedTuple):
    optimizer: str
    rate: float
    seed: int
    steps: int


@cache
def data(text: str) -> TrainingData:
    return build_data(load_source(text), vocab_size=MODEL["vocab_size"], context=CONTEXT)


def batch(rows: PackedDataset, indices: list[int]) -> dict[str, torch.Tensor]:
    items = [rows[i] for i in indices]
    return {name: torch.stack([item[name] for item in items]) for name in items[0]}


def make_optimizer(run: Run, model: MoonwhaleForCausalLM) -> torch.optim.Optimizer:
    groups = param_groups(model, lr=run.rate)
    if run.optimizer == "muonclip":
        optimizer = MuonClip(groups)
    else:
        groups = [{name: group[name] for name in ("params", "lr", "weight_decay")} for group in groups]
        optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)
    attach_hooks(optimizer, model, qk_clip_tau=100.0 if run.optimizer == "muonclip" else None)
    return optimizer


def train(text: str, run: Run) -> tuple[Run, list[list[float]]]:
    """Trains a run. Returns it with its held-out losses, [tokens, nats per token]; the last is that of the end."""
    rows, held_out = data(text).train, data(text).held_out
    torch.manual_seed(run.seed)
    model = MoonwhaleForCausalLM(MoonwhaleConfig(**MODEL))
    optimizer = make_optimizer(run, model)

    def factor(step: int) -> float:
        return min(1.0, (step + 1) / (WARMUP * run.steps), (run.steps - step) / (DECAY * run.steps))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(run.seed)).tolist()
    evaluated = {round(run.steps * i / EVALUATIONS) for i in range(1, EVALUATIONS + 1)}
    curve = []
    for step in range(1, run.steps + 1):
        at = range((step - 1) * ROWS, step * ROWS)
        model.train()(**batch(rows, [order[i % len(order)] for i in at])).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), NORM)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step in evaluated:
            curve.append([step * ROWS * CONTEXT, held_out_loss(model, held_out)])
    return run, curve


@torch.no_grad()
def held_out_loss(model: MoonwhaleForCausalLM, rows: PackedDataset) -> float:
    """Returns the main head's loss in nats per token on up to `HELD_OUT_ROWS` rows, spread over the held-out text."""
    model.eval()
    some = torch.linspace(0, len(rows) - 1, min(HELD_OUT_ROWS, len(rows))).long().tolist()
    total = count = 0.0
    for start in range(0, len(some), ROWS):
        given = batch(rows, some[start : start + ROWS])
        out = model(**given, logits_to_keep=1)
        total += (out.losses[0] * out.targets[0]).item()
        count += out.targets[0].item()
    mean = total / count
    return round(mean, 4) if math.isfinite(mean) else math.inf  # a diverged run ranks last


def start_process() -> None:
    """Limits a process to one thread. Tokens are compared, not time, so runs may share the machine."""
    torch.set_num_threads(1)
    tune_allocator()
    use_kernels(torch.device("cpu"))


def play(text: str, runs: list[Run], processes: int, what: str) -> dict[Run, list[list[float]]]:
    """Trains all runs, the longest first, `processes` at a time. Losses do not depend on each other or on time."""
    data(text)  # tokenize once, before several processes need it
    runs = sorted(runs, key=lambda run: -run.steps)
    if processes == 1:
        start_process()
        return dict(tqdm(map(partial(train, text), runs), what, len(runs), unit="run"))
    context = multiprocessing.get_context("spawn")
    with context.Pool(processes, start_process) as pool:
        return dict(tqdm(pool.imap_unordered(partial(train, text), runs), what, len(runs), unit="run"))


def tune(text: str, steps: int, processes: int) -> dict[str, dict[float, float]]:
    """Returns the final loss for each learning rate tried, by optimizer.

    If the best rate is at the edge of the range, the range is extended.
    """
    losses = {name: {} for name in RATES}
    todo = [Run(name, rate, TUNING_SEED, steps) for name, rates in RATES.items() for rate in rates]
    while todo:
        for run, curve in play(text, todo, processes, "tuning").items():
            losses[run.optimizer][run.rate] = curve[-1][1]
        todo = []
        for name, tried in losses.items():
            best = min(tried, key=tried.get)
            if min(tried) < best < max(tried):
                continue
            if len(tried) == MOST_RATES:
                sys.exit(f"{NAMES[name]}: the best rate, {best:g}, is at the edge of all rates tried: {tried}")
            further = best / 2 if best == min(tried) else best * 2
            print(f"{NAMES[name]}: the best rate, {best:g}, is at the edge; trying {further:g}", file=sys.stderr)
            todo.append(Run(name, further, TUNING_SEED, steps))
    return {name: dict(sorted(tried.items())) for name, tried in losses.items()}


def crossing(losses: dict[float, float], target: float) -> float:
    """Returns the fraction of tokens at which the final losses first reach the target, interpolated linearly.

    If the smallest fraction already reaches the target, it is returned as an upper bound. If none does, the result is
    infinite.
    """
    points = sorted(losses.items())
    if points[0][1] <= target:
        return points[0][0]
    for (x, above), (next_x, below) in pairwise(points):
        if below <= target:
            return next_x - (next_x - x) * (target - below) / (above - below)
    return math.inf


def race(text: str, steps: int, processes: int, path: Path) -> dict:
    """Tunes both optimizers, trains all runs, draws them to `path`, and returns the answer's keys."""
    tried = tune(text, steps, processes)
    best = {name: min(losses, key=losses.get) for name, losses in tried.items()}
    lengths = {round(fraction * steps): fraction for fraction in FRACTIONS}
    todo = [Run("adamw", best["adamw"], seed, steps) for seed in SEEDS]
    todo += [Run("muonclip", best["muonclip"], seed, length) for seed in SEEDS for length in lengths]
    curves = play(text, todo, processes, "racing")

    needed = {}
    for seed in SEEDS:
        target = curves[Run("adamw", best["adamw"], seed, steps)][-1][1]
        ends = {part: curves[Run("muonclip", best["muonclip"], seed, n)][-1][1] for n, part in lengths.items()}
        needed[str(seed)] = crossing(ends, target)
    runs = [{**run._asdict(), "held_out": curves[run]} for run in todo]
    draw(runs, path)
    return {
        "tokens_vs_adamw": _figure(median(needed.values())),
        "tokens_vs_adamw_by_seed": {seed: _figure(fraction) for seed, fraction in needed.items()},
        "race": {
            "text": Path(text).name,
            "adamw_tokens": steps * ROWS * CONTEXT,
            "rates": best,
            "tuning": {name: {f"{r:g}": _figure(loss) for r, loss in losses.items()} for name, losses in tried.items()},
            "environment": environment("float32", tune_allocator()) | {"threads": 1, "processes": processes},
        },
        "runs": runs,
    }


def _figure(value: float) -> float | None:
    """Rounds a figure for JSON, which has no infinity."""
    return round(value, 4) if math.isfinite(value) else None


def draw(runs: list[dict], path: Path) -> None:
    """Draws AdamW's runs as lines, and the ends of MuonClip's runs of different lengths, joined by seed."""
    with picture(path, figsize=(7, 4.2)) as (figure, ax):
        for seed in SEEDS:
            label = dict.fromkeys(NAMES) if seed != SEEDS[0] else NAMES
            (adamw,) = (run["held_out"] for run in runs if run["optimizer"] == "adamw" and run["seed"] == seed)
            ax.plot(*zip(*adamw, strict=True), color=COLOURS["adamw"], linewidth=1.3, label=label["adamw"])
            ax.axhline(adamw[-1][1], color=COLOURS["adamw"], linestyle="--", linewidth=0.7)
            ends = sorted(r["held_out"][-1] for r in runs if r["optimizer"] == "muonclip" and r["seed"] == seed)
            ax.plot(*zip(*ends, strict=True), "o-", color=COLOURS["muonclip"], linewidth=1.3, markersize=4,
                    label=label["muonclip"])  # fmt: skip
        ax.set(xlabel="tokens", ylabel="held-out loss, nats per token")
        ax.legend(frameon=False)
        ax.grid(alpha=0.25)
        figure.suptitle(
            "the same model, data and schedule, each at its best learning rate, three seeds: AdamW's loss as it\n"
            "trains (dashed: where it ends), and where MuonClip's runs end, each with a whole schedule of its own",
            fontsize=9,
            color="#4b5563",
        )
