"""Which model predicts held-out text best after equal time: moonwhale, a dense model with AdamW, or nanochat?

    python benchmarks/quality.py TEXT [--nanochat FOLDER] [--tune]
    python benchmarks/quality.py TEXT --nanochat FOLDER --only ours nanochat --seconds 1200 --wide \
        --rates benchmarks/results/quality.json --name quality_20min

The contenders (contenders.py) train on the same rows of the same text, with the same tokenizer, threads, precision and
allocator. They take turns, each for a twelfth of its time, so that a machine whose speed drifts slows all alike. Only
training steps are timed; building, compiling and scoring are not. Schedules follow the share of the time that has
passed, so that each contender completes its own.

The last 5 % of the text are held out. The 5 % before them choose the learning rates. With `--tune`, four rates are
tried for a quarter of the time, the best two are run for the whole time, and the better one counts. No contender trains
on either part. The script also draws docs/quality.svg.

Keys of the answer (results/quality.json), most with one value per contender ("ours", "dense", "nanochat"):
    vs_dense, vs_nanochat: our bits per byte divided by the other's; below 1 is better. After another time than 240
        seconds the keys say so: vs_nanochat_20min.
    why_no_nanochat: the reason if nanochat is missing.
    bits_per_byte, tuning_bits_per_byte: on the held-out text, and on the text that chooses learning rates.
    tokens, tokens_per_second, seconds, parameters, active_parameters: of the training run.
    others, busiest: cores that other processes used, on average and in the busiest twelfth of the run.
    rates, finals: tuning_bits_per_byte of each learning rate, in the trials and after the whole time.
    recipes, models, text, context, vocabulary, train_tokens, held_out_tokens: the settings and the data.
    curves: (seconds, tokens, bits per byte of the held-out text) at 12 points of each run. The last is bits_per_byte.
"""

import argparse
import copy
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor
from tqdm import tqdm

import contenders
from common import ROOT, environment, options, picture, watch_others, write
from contenders import Contender, Data, bits_per_byte
from moonwhale.errors import UserError
from moonwhale.model.compiling import compile_unsupported_reason
from moonwhale.native.training import use_kernels
from moonwhale.precision import choose, tune_allocator

COLOURS = {"ours": "#2563eb", "dense": "#d97706", "nanochat": "#15803d"}
WARM_UP = (0.0, 0.5, 1.0)  # progress of the untimed steps: a schedule may change what is computed
NAMES = {"ours": "moonwhale", "dense": "dense GPT, AdamW", "nanochat": "nanochat"}
SECONDS = 240  # of training that quality.json is about
TURNS = 12  # turns of each run
REPORTED = ("bits_per_byte", "tuning_bits_per_byte", "tokens", "tokens_per_second", "seconds", "parameters")
REPORTED += ("active_parameters", "others", "busiest")


class Run:
    """A contender's training for `seconds`, turn by turn. It ends early if its loss is not finite."""

    def __init__(self, contender: Contender, data: Data, seconds: float, seed: int = 0) -> None:
        self.contender, self.data, self.seconds = contender, data, seconds
        self.draw = torch.Generator()
        self.spent, self.steps, self.loss = 0.0, 0, 0.0
        self.curve, self.disturbances = [], []
        self._warm_up()
        self.draw.manual_seed(seed)

    def _warm_up(self) -> None:
        """Does untimed steps, which compile kernels and allocate memory, and undoes their effect on the model."""
        model, optimizer = self.contender.model, self.contender.optimizer
        weights = copy.deepcopy(model.state_dict())
        model.train()
        for progress in WARM_UP:
            self.contender.step(0, progress, self._tokens())
        model.load_state_dict(weights)
        optimizer.state.clear()

    def _tokens(self) -> Tensor:
        """Draws random rows (rows, CONTEXT) of the training stream."""
        stream, context = self.data.train, self.data.held_out.shape[1]
        starts = torch.randint(len(stream) - context + 1, (self.contender.rows, 1), generator=self.draw)
        return stream[starts + torch.arange(context)]

    def advance(self, share: float) -> None:
        """Trains until this share of the time is spent."""
        others = watch_others()
        while self.spent < self.seconds * share and math.isfinite(self.loss):
            start = time.perf_counter()
            self.loss = self.contender.step(self.steps, self.spent / self.seconds, self._tokens()).item()
            self.spent, self.steps = self.spent + time.perf_counter() - start, self.steps + 1
        self.disturbances.append(others())

    def score(self) -> None:
        """Adds a point to the curve: the bits per byte of the held-out text. This costs no time of the run."""
        self.curve.append((round(self.spent, 2), self._tokens_seen(), self._score(self.data.held_out)))

    def _tokens_seen(self) -> int:
        return self.steps * self.contender.rows * self.data.held_out.shape[1]

    def _score(self, rows: Tensor) -> float:
        self.contender.model.eval()
        bits = bits_per_byte(self.contender.mean_loss, rows, self.data.lengths)
        self.contender.model.train()
        return bits

    def result(self) -> dict:
        """Scores the tuning rows and returns the keys of REPORTED and the curve, whose last point is the result."""
        tokens = self._tokens_seen()
        return {
            "bits_per_byte": self.curve[-1][2],
            "tuning_bits_per_byte": self._score(self.data.tuning),
            "tokens": tokens,
            "tokens_per_second": round(tokens / self.spent),
            "seconds": round(self.spent, 2),
            "parameters": sum(p.numel() for p in self.contender.model.parameters()),
            "active_parameters": self.contender.active_parameters,
            "others": round(fmean(self.disturbances), 3),
            "busiest": round(max(self.disturbances), 3),
            "curve": self.curve,
        }


def race(runs: list[Run], name: str, curves: bool) -> list[dict]:
    """Trains all runs in turns, in alternating order, and returns their results.

    The held-out text is scored after each turn if `curves`, otherwise only after the last.
    """
    for turn in tqdm(range(TURNS), desc=name, unit="turn"):
        for run in runs if turn % 2 else runs[::-1]:
            run.advance((turn + 1) / TURNS)
            if curves or turn == TURNS - 1:
                run.score()
    return [run.result() for run in runs]


def draw(result: dict, path: Path) -> None:
    """Draws the bits per byte of the held-out text against the time. Labels have the name and the last figure."""
    curves, last = result["curves"], -math.inf
    top = max(bits for curve in curves.values() for _, _, bits in curve[len(curve) // 10 :])
    bottom = min(bits for curve in curves.values() for _, _, bits in curve)
    with picture(path, figsize=(8, 4.2)) as (_, ax):
        for name, curve in sorted(curves.items(), key=lambda item: item[1][-1][2]):
            ax.plot([at for at, _, _ in curve], [bits for _, _, bits in curve], color=COLOURS[name], linewidth=1.6)
            last = max(curve[-1][2], last + 0.06 * (top - bottom))  # keeps labels apart
            label, style = f"{NAMES[name]}: {curve[-1][2]:.3f}", {"va": "center", "color": COLOURS[name]}
            ax.annotate(label, (curve[-1][0], last), (6, 0), textcoords="offset points", **style)
        ax.set(xlabel="seconds of training", ylabel="bits per byte of the held-out text", ylim=(bottom - 0.05, top))
        ax.grid(alpha=0.25)


def best_first(runs: dict[float, dict]) -> dict[float, dict]:
    """Sorts the results of learning rates by their bits per byte on the tuning rows. A rate that diverged is last."""

    def order(rate: float) -> tuple[bool, float]:
        bits = runs[rate]["tuning_bits_per_byte"]
        return math.isnan(bits), bits

    return {rate: runs[rate] for rate in sorted(runs, key=order)}


def compete(names: list[str], data: Data, arguments: argparse.Namespace) -> tuple[dict, dict, dict, dict]:
    """Trains the named contenders, with tuned learning rates if `arguments.tune`.

    Returns, by contender: the best run, its recipe, and the tuning bits per byte of the rates in the trials and at the
    end.
    """
    ours, changes = (contenders.WIDE_RECIPE, contenders.WIDE) if arguments.wide else (contenders.RECIPE, {})
    theirs = contenders.NANOCHAT_RECIPE | ({"rows": arguments.nanochat_batch} if arguments.nanochat_batch else {})
    known: dict[str, tuple[dict, tuple, Callable[[dict], Contender]]] = {
        "ours": (ours, contenders.OUR_RATES, lambda recipe: contenders.ours(recipe, **changes)),
        "dense": (contenders.DENSE_RECIPE, contenders.DENSE_RATES, contenders.dense),
        "nanochat": (theirs, contenders.NANOCHAT_RATES, lambda recipe: contenders.nanochat(arguments.nanochat, recipe)),
    }

    def tried(rates: dict[str, list[float]], seconds: float, title: str, curves: bool) -> dict[str, dict[float, dict]]:
        """Races each contender with each of its rates. Returns the results by contender and rate, the best first."""
        pairs = [(name, rate) for name in names for rate in rates[name]]
        runs = [Run(known[name][2](known[name][0] | {"lr": rate}), data, seconds) for name, rate in pairs]
        found = {name: {} for name in names}
        for (name, rate), result in zip(pairs, race(runs, title, curves), strict=True):
            found[name][rate] = result
        return {name: best_first(results) for name, results in found.items()}

    def tuning_bits(found: dict) -> dict:
        return {name: {r: run["tuning_bits_per_byte"] for r, run in runs.items()} for name, runs in found.items()}

    rates, candidates = {}, {name: [arguments.rates.get(name, known[name][0]["lr"])] for name in names}
    if arguments.tune:
        trials = tried({name: known[name][1] for name in names}, arguments.tune_seconds, "learning rates", False)
        rates, candidates = tuning_bits(trials), {name: [*found][:2] for name, found in trials.items()}
        print(f"bits per byte by learning rate: {rates}", file=sys.stderr)
    finals = tried(candidates, arguments.seconds, "race", True)
    winners = {name: next(iter(found.items())) for name, found in finals.items()}
    for name, (_, run) in winners.items():
        print(f"{name}: {json.dumps({key: run[key] for key in REPORTED})}", file=sys.stderr)
    recipes = {name: known[name][0] | {"lr": rate} for name, (rate, _) in winners.items()}
    return {name: run for name, (_, run) in winners.items()}, recipes, rates, tuning_bits(finals)


def rates_of(file: str) -> dict[str, float]:
    """Returns the learning rate of each contender in a result file of this script."""
    try:
        recipes = json.loads(Path(file).read_text(encoding="utf-8"))["recipes"]
        return {name: float(recipe["lr"]) for name, recipe in recipes.items()}
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{file} can't be read: {error.strerror}") from error
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise argparse.ArgumentTypeError(f"{file} is no result of this script: it has no recipes with lr") from error


def main(argv: list[str] | None = None) -> None:
    parser = options(__doc__.splitlines()[0])
    parser.add_argument("text", metavar="TEXT", help="training text, .txt or .txt.xz; its paragraphs are documents")
    parser.add_argument("--nanochat", type=Path, metavar="FOLDER", help="checkout of nanochat, the third contender")
    parser.add_argument("--nanochat-batch", type=int, metavar="ROWS", help="rows per step of nanochat (16)")
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"seconds each contender trains ({SECONDS})")
    parser.add_argument("--wide", action="store_true", help="moonwhale's shape and recipe for longer runs")
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument("--tune", action="store_true", help="try several learning rates, and race with the best")
    choice.add_argument("--rates", type=rates_of, default={}, metavar="FILE", help="take learning rates of this result")
    parser.add_argument("--tune-seconds", type=float, default=60, help="seconds of training of each trial (60)")
    parser.add_argument(
        "--only", nargs="+", choices=COLOURS, help="train these contenders; without --name, write nothing"
    )
    parser.add_argument("--name", help="name of the result and of the picture in docs/ (quality)")
    parser.add_argument("--picture", type=Path, help="file of the picture (docs/NAME.svg)")
    arguments = parser.parse_args(argv)
    folder, why = arguments.nanochat, compile_unsupported_reason(choose().device)
    if folder is None:
        why = "no checkout of nanochat was given (--nanochat FOLDER)"
    elif not (folder / "nanochat" / "gpt.py").is_file():
        parser.error(f"--nanochat: no nanochat/gpt.py in {folder} (give a checkout of nanochat)")
    if "nanochat" in (arguments.only or ()) and why:
        parser.error(f"--only nanochat: {why}")

    allocator_tuned = tune_allocator()
    use_kernels(choose().device)
    try:
        data = contenders.load(arguments.text)
    except UserError as error:
        parser.error(str(error))
    names = arguments.only or [n for n in COLOURS if n != "nanochat" or not why]
    runs, recipes, rates, finals = compete(names, data, arguments)
    if arguments.only and not arguments.name:
        print(json.dumps({name: {key: run[key] for key in REPORTED} for name, run in runs.items()}))
        return

    after = "" if arguments.seconds == SECONDS else f"_{arguments.seconds / 60:g}min"
    result = {f"vs_{other}{after}": _ratio(runs, other) for other in ("dense", "nanochat")}
    if why:
        result["why_no_nanochat"] = why
    result |= {key: {name: run[key] for name, run in runs.items()} for key in REPORTED}
    result |= {"rates": rates, "finals": finals, "recipes": recipes}
    model = contenders.MODEL | (contenders.WIDE if arguments.wide else {})
    result["models"] = {"ours": model, "dense": contenders.DENSE, "nanochat": contenders.NANOCHAT}
    result |= {"text": Path(arguments.text).name, "context": contenders.CONTEXT, "vocabulary": contenders.VOCABULARY}
    result |= {"train_tokens": len(data.train), "held_out_tokens": data.held_out.numel()}
    result["environment"] = environment("bf16 autocast" if choose().autocast else "fp32", allocator_tuned)
    curves = {name: run["curve"] for name, run in runs.items()}
    name = arguments.name or "quality"
    write(arguments.results, name, result, curves=curves)
    draw(result | {"curves": curves}, arguments.picture or ROOT / "docs" / f"{name}.svg")


def _ratio(runs: dict[str, dict], other: str) -> float | None:
    if not {"ours", other} <= runs.keys():
        return None
    return round(runs["ours"]["bits_per_byte"] / runs[other]["bits_per_byte"], 4)


if __name__ == "__main__":
    main()
