"""Which model predicts held-out text best after equal time: moonwhale, a dense model with AdamW, or nanochat?

    python benchmarks/quality.py TEXT [--nanochat FOLDER] [--tune]

The contenders train one after another on the same rows of the same text, with the same tokenizer, threads, precision
and allocator. Only training steps are timed; building, compiling and scoring are not. Schedules follow the share of the
time that has passed, so that each contender completes its own.

The last 5 % of the text are held out. The 5 % before them choose the learning rates. With `--tune`, four rates are
tried for a quarter of the time, the best two are run for the whole time, and the better one counts. No contender trains
on either part. The script also draws docs/quality.svg.

Keys of the answer (results/quality.json), most with one value per contender ("ours", "dense", "nanochat"):
    vs_dense, vs_nanochat: our bits per byte divided by the other's; below 1 is better.
    why_no_nanochat: the reason if nanochat is missing.
    bits_per_byte, tuning_bits_per_byte: on the held-out text, and on the text that chooses learning rates.
    tokens, tokens_per_second, seconds, parameters, active_parameters: of the training run.
    others, busiest: cores that other processes used, on average and in the busiest twelfth of the run.
    rates, finals: tuning_bits_per_byte of each learning rate, in the trials and after the whole time.
    recipes, models, text, context, vocabulary, train_tokens, held_out_tokens: the settings and the data.
    curves: (seconds, tokens, bits per byte of some held-out rows) at 12 points of each run.
"""

import argparse
import copy
import json
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from common import ROOT, _cpu_seconds, environment, options, picture, write
from dense import DenseLM, adamw_groups, cosine_decay
from moonwhale.costs import model_size
from moonwhale.data.chat import encode_documents
from moonwhale.data.loading import load_source
from moonwhale.data.source import texts_of
from moonwhale.data.tokenizer import byte_lengths, train_tokenizer
from moonwhale.errors import UserError
from moonwhale.model import MoonwhaleConfig, MoonwhaleForCausalLM
from moonwhale.native.training import use_kernels
from moonwhale.optim.muonclip import MuonClip, param_groups
from moonwhale.optim.step_hooks import attach_hooks
from moonwhale.precision import choose, compile_unsupported_reason, tune_allocator
from moonwhale.presets import FAST, TINY

VOCABULARY, CONTEXT = 4096, 256
MODEL = {
    "vocab_size": VOCABULARY,
    "max_position_embeddings": CONTEXT,
    **TINY,
    **FAST.model,
}
RECIPE = {  # warmup, decay, momentum_warmup and mtp_start are shares of the time
    "rows": 16,
    "lr": 1.2e-2,
    "warmup": 0.03,
    "decay": 0.95,
    "floor": 0.0,
    "momentum": (0.95, 0.95),
    "momentum_warmup": 0.1,
    "weight_decay": 0.1,
    "grad_clip": 1.0,
    "qk_clip_tau": 100.0,
    **FAST.train,
}
OUR_RATES = (3e-3, 6e-3, 1.2e-2, 2.4e-2)
DENSE = {"vocab_size": VOCABULARY, "layers": 4, "width": 256, "heads": 4, "inner": 1024, "context": CONTEXT}
DENSE_RECIPE = {"rows": 16, "lr": 2e-3, "warmup": 0.02, "floor": 0.1, "weight_decay": 0.1, "grad_clip": 1.0}
DENSE_RATES = (5e-4, 1e-3, 2e-3, 4e-3)
# Full attention, heads of 64 and the linear warm-up are from nanochat's runs/runcpu.sh, the rest from its
# scripts/base_train.py.
NANOCHAT = {"vocab_size": VOCABULARY, "sequence_len": CONTEXT, "n_layer": 4, "n_embd": 256, "window_pattern": "L"}
NANOCHAT |= {"n_head": 4, "n_kv_head": 4}
NANOCHAT_LR = {"embedding_lr": 0.3, "unembedding_lr": 0.008, "matrix_lr": 0.02, "scalar_lr": 0.5}
NANOCHAT_RECIPE = {"rows": 16, "lr": 1.0, "weight_decay": 0.28}  # lr multiplies all learning rates of nanochat
NANOCHAT_RATES = (4.0, 8.0, 16.0, 32.0)
COLOURS = {"ours": "#2563eb", "dense": "#d97706", "nanochat": "#15803d"}
WARM_UP = (0.0, 0.5, 1.0)  # progress of the untimed steps: a schedule may change what is computed
POINTS, POINT_ROWS = 12, 96  # points of a held-out curve, and the rows that are scored at each
REPORTED = ("bits_per_byte", "tuning_bits_per_byte", "tokens", "tokens_per_second", "seconds", "parameters")
REPORTED += ("active_parameters", "others", "busiest")


@dataclass(frozen=True)
class Data:
    """Token ids (int64): the training stream `train` (n,), and the rows `tuning` and `held_out` (rows, CONTEXT).

    `lengths` (V,) holds the bytes of each token.
    """

    train: Tensor
    tuning: Tensor
    held_out: Tensor
    lengths: Tensor


def load(text: str) -> Data:
    """Loads and splits the documents of a source (see `load_source`). 90 % of the bytes are for training.

    The documents of a text are its paragraphs.
    """
    documents = []
    for document in load_source(text):
        documents += re.split(r"\n\s*\n", document) if isinstance(document, str) else [document]
    sizes = np.cumsum([sum(len(t.encode()) for t in texts_of(document)) for document in documents])
    parts = [[], [], []]
    for document, part in zip(documents, np.searchsorted([0.9, 0.95], sizes / sizes[-1]), strict=True):
        parts[part].append(document)
    tokenizer = train_tokenizer((t for document in parts[0] for t in texts_of(document)), VOCABULARY)
    ids = [np.concatenate([[], *encode_documents(tokenizer, part)]).astype(np.int64) for part in parts]
    if min(map(len, ids)) < CONTEXT:
        raise UserError(f"{text}: 5 % of it are less than a row of {CONTEXT} tokens (give a longer text)")
    device = choose().device
    train, tuning, held_out, lengths = (torch.from_numpy(a).to(device) for a in (*ids, byte_lengths(tokenizer)))
    return Data(train, _rows(tuning), _rows(held_out), lengths)


def _rows(stream: Tensor) -> Tensor:
    return stream[: len(stream) // CONTEXT * CONTEXT].view(-1, CONTEXT)


def race(step: Callable[[int, float], Tensor], seconds: float, score: Callable[[], float]) -> dict:
    """Calls `step(number, share of the time that has passed)` for `seconds`, or until its loss is not finite.

    Returns:
        seconds, steps: the time and the number of the calls.
        curve: (seconds, steps, `score()`) at each of POINTS points in time. Scoring does not count as time.
        others, busiest: cores that other processes used, on average, and at most between two of these points.
    """
    spent, steps, loss, curve, disturbances, first = 0.0, 0, 0.0, [], [], _cpu_seconds()
    last = first
    while spent < seconds and math.isfinite(loss):
        start = time.perf_counter()
        loss = step(steps, spent / seconds).item()
        spent, steps = spent + time.perf_counter() - start, steps + 1
        if spent >= seconds * (len(curve) + 1) / POINTS:
            disturbances.append(_others(last, _cpu_seconds()))
            curve.append((spent, steps, score()))
            last = _cpu_seconds()
    return {
        "seconds": round(spent, 2),
        "steps": steps,
        "curve": curve,
        "others": round(_others(first, _cpu_seconds()), 3),
        "busiest": round(max(disturbances, default=0.0), 3),
    }


def _others(before: tuple[float, float, float], now: tuple[float, float, float]) -> float:
    """Returns the cores that other processes used between two results of `_cpu_seconds`."""
    wall, own, total = (b - a for a, b in zip(before, now, strict=True))
    return max(0.0, total - own) / wall


@torch.no_grad()
def bits_per_byte(mean_loss: Callable[[Tensor, Tensor], Tensor], rows: Tensor, lengths: Tensor) -> float:
    """Returns the bits per byte of rows (n, T). Control tokens and the first token of each row are not scored.

    `mean_loss(tokens, labels)` returns the mean in nats over those labels[:, 1:] that are not -100.
    """
    nats = n_bytes = 0
    for tokens in rows.split(16):
        labels = tokens.masked_fill(lengths[tokens] == 0, -100)
        scored = labels[:, 1:][labels[:, 1:] != -100]
        nats += mean_loss(tokens, labels).item() * len(scored)
        n_bytes += lengths[scored].sum().item()
    return round(nats / math.log(2) / n_bytes, 5)


def _autocast() -> torch.autocast:
    choice = choose()
    return torch.autocast(choice.device.type, choice.dtype, enabled=choice.autocast)


def _train(data: Data, seconds: float, rows: int, seed: int, model, optimizer, step, mean_loss) -> dict:
    """Trains with `step(number, progress, tokens (rows, CONTEXT)) -> loss`, then scores the model."""
    draw = torch.Generator().manual_seed(seed)

    def tokens() -> Tensor:
        starts = torch.randint(len(data.train) - CONTEXT + 1, (rows, 1), generator=draw)
        return data.train[starts + torch.arange(CONTEXT)]

    # Untimed steps compile kernels and allocate memory; their effect on the model is undone.
    weights = copy.deepcopy(model.state_dict())
    model.train()
    for progress in WARM_UP:
        step(0, progress, tokens())
    model.load_state_dict(weights)
    optimizer.state.clear()
    draw.manual_seed(seed)

    some_rows = data.held_out[:: max(1, len(data.held_out) // POINT_ROWS)]  # from all parts of the text

    def score() -> float:
        model.eval()
        bits = bits_per_byte(mean_loss, some_rows, data.lengths)
        model.train()
        return bits

    run = race(lambda number, progress: step(number, progress, tokens()), seconds, score)
    model.eval()
    run["bits_per_byte"] = bits_per_byte(mean_loss, data.held_out, data.lengths)
    run["tuning_bits_per_byte"] = bits_per_byte(mean_loss, data.tuning, data.lengths)
    run["tokens"] = run["steps"] * rows * CONTEXT
    run["tokens_per_second"] = round(run["tokens"] / run["seconds"])
    run["parameters"] = run["active_parameters"] = sum(p.numel() for p in model.parameters())
    run["curve"] = [(round(at, 2), steps * rows * CONTEXT, bits) for at, steps, bits in run["curve"]]
    return run


def _descend(model, optimizer, loss: Tensor, grad_clip: float) -> None:
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip)
    optimizer.step()
    optimizer.zero_grad()


def train_ours(data: Data, seconds: float, model: dict = MODEL, recipe: dict = RECIPE, seed: int = 0) -> dict:
    """Trains our model with all its mechanisms. Returns the result of `race`, the bits per byte and the sizes."""
    torch.manual_seed(seed)
    net = MoonwhaleForCausalLM(MoonwhaleConfig(**model)).to(choose().device)
    optimizer = MuonClip(param_groups(net, **{name: recipe[name] for name in ("lr", "weight_decay", "embedding_lr")}))
    attach_hooks(optimizer, net, qk_clip_tau=recipe["qk_clip_tau"])
    peaks = [group["lr"] for group in optimizer.param_groups]
    low, high = recipe["momentum"]

    def step(number: int, progress: float, tokens: Tensor) -> Tensor:
        factor = linear_decay(progress, recipe["warmup"], recipe["decay"], recipe["floor"])
        momentum = low + (high - low) * min(1.0, progress / recipe["momentum_warmup"])
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group |= {"lr": peak * factor, "momentum": momentum}
        # With a weight of 0 the modules are not run.
        net.mtp_loss_weight = net.config.mtp_loss_weight if progress >= recipe["mtp_start"] else 0.0
        with _autocast():
            out = net(tokens, labels=tokens)
        _descend(net, optimizer, out.loss, recipe["grad_clip"])
        return out.losses[0]

    def mean_loss(tokens: Tensor, labels: Tensor) -> Tensor:
        with _autocast():
            return net(tokens, labels=labels, logits_to_keep=1).losses[0]

    run = _train(data, seconds, recipe["rows"], seed, net, optimizer, step, mean_loss)
    return run | {"active_parameters": model_size(net.config).active_parameters}


def linear_decay(progress: float, warmup: float, decay: float, floor: float) -> float:
    """Returns the share of the peak learning rate: linear warm-up, constant, then linear decay to `floor`."""
    if progress < warmup:
        return progress / warmup
    return min(1.0, floor + (1 - floor) * (1 - progress) / decay)


def train_dense(data: Data, seconds: float, recipe: dict = DENSE_RECIPE, seed: int = 0) -> dict:
    """Does the same with `DenseLM` and AdamW, as nanoGPT trains its models."""
    torch.manual_seed(seed)
    model = DenseLM(**DENSE).to(choose().device)
    optimizer = torch.optim.AdamW(adamw_groups(model, recipe["weight_decay"]), betas=(0.9, 0.95), fused=True)

    def mean_loss(tokens: Tensor, labels: Tensor) -> Tensor:
        with _autocast():
            return model(tokens, labels)

    def step(number: int, progress: float, tokens: Tensor) -> Tensor:
        for group in optimizer.param_groups:
            group["lr"] = recipe["lr"] * cosine_decay(progress, recipe["warmup"], recipe["floor"])
        loss = mean_loss(tokens, tokens)
        _descend(model, optimizer, loss, recipe["grad_clip"])
        return loss

    return _train(data, seconds, recipe["rows"], seed, model, optimizer, step, mean_loss)


def train_nanochat(data: Data, seconds: float, folder: Path, recipe: dict = NANOCHAT_RECIPE, seed: int = 0) -> dict:
    """Does the same with nanochat's model and optimizer in the checkout `folder`, as its scripts/base_train.py does."""
    choice = choose()
    os.environ.setdefault("NANOCHAT_DTYPE", "bfloat16" if choice.autocast else "float32")
    sys.path.insert(0, str(folder))
    with redirect_stdout(sys.stderr):
        from nanochat.gpt import GPT, GPTConfig

        torch.manual_seed(seed)
        with torch.device("meta"):
            model = GPT(GPTConfig(**NANOCHAT))
            reference = GPT(GPTConfig(**NANOCHAT | {"n_layer": 12, "n_embd": 768}))  # its rates are for this size
        model.to_empty(device=choice.device)
        model.init_weights()
        # Learning rates grow with the square root of the batch. A smaller model, trained on fewer tokens, gets more
        # weight decay.
        batch = math.sqrt(recipe["rows"] * CONTEXT / 2**19)
        sizes = [m.num_scaling_params() for m in (reference, model)]
        horizon, own_horizon = (size["transformer_matrices"] + size["lm_head"] for size in sizes)
        weight_decay = recipe["weight_decay"] * batch * horizon / own_horizon
        rates = {name: rate * batch * recipe["lr"] for name, rate in NANOCHAT_LR.items()}
        optimizer = model.setup_optimizer(**rates, weight_decay=weight_decay)
    compiled = torch.compile(model, dynamic=False)

    def targets(labels: Tensor) -> Tensor:
        following = labels.roll(-1, 1).masked_fill(labels.roll(-1, 1) == -100, -1)
        following[:, -1] = -1
        return following

    def step(number: int, progress: float, tokens: Tensor) -> Tensor:
        loss = compiled(tokens, targets(tokens))
        loss.backward()
        factor, momentum, decay = nanochat_schedule(number, progress)
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
            if group["kind"] == "muon":
                group |= {"momentum": momentum, "weight_decay": weight_decay * decay}
        optimizer.step()
        model.zero_grad(set_to_none=True)
        return loss.detach()

    def mean_loss(tokens: Tensor, labels: Tensor) -> Tensor:
        return model(tokens, targets(labels))

    return _train(data, seconds, recipe["rows"], seed, model, optimizer, step, mean_loss)


def nanochat_schedule(number: int, progress: float, warmdown: float = 0.65) -> tuple[float, float, float]:
    """Returns the share of the peak learning rate, Muon's momentum, and the share of the weight decay."""
    left = min(1.0, (1 - progress) / warmdown)
    factor = (number + 1) / 40 if number < 40 else 0.05 + 0.95 * left
    momentum = 0.85 + 0.12 * number / 400 if number < 400 else 0.90 + 0.07 * left
    return factor, momentum, (1 + math.cos(math.pi * progress)) / 2


def draw(result: dict, path: Path) -> None:
    """Draws the bits per byte of held-out text against the time, each curve labelled with the model's last figure."""
    curves, last = result["curves"], -math.inf
    top = max(bits for curve in curves.values() for _, _, bits in curve[len(curve) // 10 :])
    bottom = min(bits for curve in curves.values() for _, _, bits in curve)
    with picture(path, figsize=(8, 4.2)) as (_, ax):
        for name, curve in sorted(curves.items(), key=lambda item: item[1][-1][2]):
            ax.plot([at for at, _, _ in curve], [bits for _, _, bits in curve], color=COLOURS[name], linewidth=1.6)
            last = max(curve[-1][2], last + 0.06 * (top - bottom))  # keeps labels apart
            label = f"{name}: {result['bits_per_byte'][name]:.3f} on all rows"
            ax.annotate(
                label, (curve[-1][0], last), (6, 0), textcoords="offset points", va="center", color=COLOURS[name]
            )
        ax.set(xlabel="seconds of training", ylabel="bits per byte of some held-out rows", ylim=(bottom - 0.05, top))
        ax.grid(alpha=0.25)


def tried(train: Callable[[float, dict], dict], recipe: dict, rates: Iterable[float], seconds: float) -> dict:
    """Runs `train` with each learning rate and returns the results, the best one on the tuning rows first."""
    runs = {rate: train(seconds, recipe | {"lr": rate}) for rate in rates}

    def order(rate: float) -> tuple[bool, float]:
        bits = runs[rate]["tuning_bits_per_byte"]
        return math.isnan(bits), bits

    return {rate: runs[rate] for rate in sorted(runs, key=order)}


def compete(names: list[str], data: Data, arguments: argparse.Namespace) -> tuple[dict, dict, dict, dict]:
    """Trains the named contenders, with tuned learning rates if `arguments.tune`.

    Returns, by contender: the best run, its recipe, and the tuning bits per byte of the rates in the trials and at the
    end.
    """
    theirs = NANOCHAT_RECIPE | ({"rows": arguments.nanochat_batch} if arguments.nanochat_batch else {})
    folder = arguments.nanochat
    contenders = {
        "ours": (RECIPE, OUR_RATES, lambda seconds, recipe: train_ours(data, seconds, recipe=recipe)),
        "dense": (DENSE_RECIPE, DENSE_RATES, lambda seconds, recipe: train_dense(data, seconds, recipe)),
        "nanochat": (theirs, NANOCHAT_RATES, lambda seconds, recipe: train_nanochat(data, seconds, folder, recipe)),
    }
    runs, recipes, rates, finals = {}, {}, {}, {}
    for name in names:
        recipe, candidates, train = contenders[name]
        best = [recipe["lr"]]
        if arguments.tune:
            found = tried(train, recipe, candidates, arguments.tune_seconds)
            rates[name], best = {rate: run["tuning_bits_per_byte"] for rate, run in found.items()}, [*found][:2]
            print(f"{name}: bits per byte by learning rate {rates[name]}", file=sys.stderr)
        found = tried(train, recipe, best, arguments.seconds)
        finals[name] = {rate: run["tuning_bits_per_byte"] for rate, run in found.items()}
        rate, runs[name] = next(iter(found.items()))
        recipes[name] = recipe | {"lr": rate}
        print(f"{name}: {json.dumps({key: runs[name][key] for key in REPORTED})}", file=sys.stderr)
    return runs, recipes, rates, finals


def main(argv: list[str] | None = None) -> None:
    parser = options(__doc__.splitlines()[0])
    parser.add_argument("text", metavar="TEXT", help="training text, .txt or .txt.xz; its paragraphs are documents")
    parser.add_argument("--nanochat", type=Path, metavar="FOLDER", help="checkout of nanochat, the third contender")
    parser.add_argument("--nanochat-batch", type=int, metavar="ROWS", help="rows per step of nanochat (those of ours)")
    parser.add_argument("--seconds", type=float, default=240, help="seconds of training of each contender (240)")
    parser.add_argument("--tune", action="store_true", help="try several learning rates, and race with the best")
    parser.add_argument("--tune-seconds", type=float, default=60, help="seconds of training of each trial (60)")
    parser.add_argument("--only", choices=COLOURS, help="train one contender, print its result, write nothing")
    parser.add_argument("--picture", type=Path, default=ROOT / "docs" / "quality.svg", help="file of the picture")
    arguments = parser.parse_args(argv)
    folder, why = arguments.nanochat, compile_unsupported_reason(choose().device)
    if folder is None:
        why = "no checkout of nanochat was given (--nanochat FOLDER)"
    elif not (folder / "nanochat" / "gpt.py").is_file():
        parser.error(f"--nanochat: no nanochat/gpt.py in {folder} (give a checkout of nanochat)")
    if arguments.only == "nanochat" and why:
        parser.error(f"--only nanochat: {why}")

    allocator_tuned = tune_allocator()
    use_kernels(choose().device)
    try:
        data = load(arguments.text)
    except UserError as error:
        parser.error(str(error))
    names = [arguments.only] if arguments.only else [n for n in COLOURS if n != "nanochat" or not why]
    runs, recipes, rates, finals = compete(names, data, arguments)
    if arguments.only:
        print(json.dumps({key: value for key, value in runs[arguments.only].items() if key != "curve"}))
        return

    result = {"vs_dense": _ratio(runs, "dense"), "vs_nanochat": None if why else _ratio(runs, "nanochat")}
    if why:
        result["why_no_nanochat"] = why
    result |= {key: {name: run[key] for name, run in runs.items()} for key in REPORTED}
    result |= {"rates": rates, "finals": finals, "recipes": recipes}
    result["models"] = {"ours": MODEL, "dense": DENSE, "nanochat": NANOCHAT}
    result |= {"text": Path(arguments.text).name, "context": CONTEXT, "vocabulary": VOCABULARY}
    result |= {"train_tokens": len(data.train), "held_out_tokens": data.held_out.numel()}
    result["environment"] = environment("bf16 autocast" if choose().autocast else "fp32", allocator_tuned)
    curves = {name: run["curve"] for name, run in runs.items()}
    write(arguments.results, "quality", result, curves=curves)
    draw(result | {"curves": curves}, arguments.picture)


def _ratio(runs: dict[str, dict], other: str) -> float:
    return round(runs["ours"]["bits_per_byte"] / runs[other]["bits_per_byte"], 4)


if __name__ == "__main__":
    main()
