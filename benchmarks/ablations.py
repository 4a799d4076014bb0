"""What is each mechanism worth: how much worse is the same model without it, at equal time?

    python benchmarks/ablations.py --seconds 240 [--seeds 3] [--tune] [--only MHA,GQA]

`moonwhale compare` trains the demo preset and one variant of it for each mechanism: its plain twin. Each call trains
the base anew in turns with its variants, since a machine's speed changes by the hour, and adds them to the result or
replaces them. A call that is killed goes on when it is repeated. docs/update_ablations.py writes the page.

The text is a mixture of what comes with the packages that moonwhale needs: chitchat's conversations, and the sources of
Python, torch, transformers and matplotlib. Weights are numbers of documents, so all parts end together.

Keys of the answer (results/ablations.json):
    budgets: for each budget in seconds, the figures of the last call's base and of each variant, by name: seeds, tuned,
        changes (option -> [base, own]), lr, bits_per_byte, difference (mean, half_width of the 95 % interval, verdict),
        tokens_per_second, active_parameters, cache_bytes_per_token, peak_memory_bytes, and the mean curve.
        `base_tokens_per_second` is the speed of the base that trained in turns with the variant.
    data, environment: the text, and the machine of the last call.
"""

import json
import sysconfig
from pathlib import Path

from common import environment, options, run_main, write
from moonwhale.costs import dense_twin
from moonwhale.data.builtin_sets import chitchat_file, read_chitchat, standard_library_files
from moonwhale.lab.compare import compare
from moonwhale.lab.config import CompareOptions, comparison
from moonwhale.lab.page import lines
from moonwhale.lab.variants import BASE, Variant
from moonwhale.model import MoonwhaleConfig
from moonwhale.precision import choose, tune_allocator
from moonwhale.presets import PRESETS

PRESET = "demo"
PACKAGES = ("torch", "transformers", "matplotlib")
DENSE = dense_twin(MoonwhaleConfig(**PRESETS[PRESET].model))
# Mechanism, name of the variant, and what it changes
VARIANTS = (
    ("MLA", "MHA", {"model": {"attention": "gqa"}}),
    ("MLA", "GQA", {"model": {"attention": "gqa", "num_key_value_heads": 2}}),
    ("MoBA", "full attention", {"model": {"moba_topk": 0}}),
    ("DeepSeekMoE", "dense of equal FLOPs", {"model": DENSE}),
    ("MTP", "no MTP module", {"model": {"num_nextn_predict_layers": 0}}),
    ("MTP", "2 MTP modules", {"model": {"num_nextn_predict_layers": 2}}),
    # AdamW at the best of its rates in optimizer.json
    ("MuonClip", "AdamW", {"optimizer": "adamw", "qk_clip_tau": 0.0, "lr": 0.004}),
    ("MuonClip", "Muon without clip", {"qk_clip_tau": 0.0}),
    # α of DeepSeekMoE's expert-level loss; V3's small sequence loss is no balancer of its own
    (
        "balancing",
        "loss alone",
        {"model": {"bias_update_speed": 0.0, "balance_loss": "expert", "aux_loss_alpha": 0.01}},
    ),
    ("balancing", "bias alone", {"model": {"balance_loss": "none"}}),
    ("initialisation", "normal everywhere", {"model": {"zero_init_residual": False}}),
    ("recipe", "no embedding convolution", {"model": {"embedding_conv": 0}}),
    ("recipe", "no embeddings on latents", {"model": {"latent_embedding_every": 0}}),
    ("recipe", "one embedding rate", {"embedding_lr": 1.0, "model": {"embedding_initializer_range": None}}),
    ("recipe", "MTP from the first step", {"mtp_start": 0.0}),
)
FIGURES = ("bits_per_byte", "difference", "diverged", "tokens_per_second", "active_parameters")
FIGURES += ("cache_bytes_per_token", "peak_memory_bytes")


def mixture() -> str:
    """Returns the mixture of all texts, for the option `data`."""
    parts = {"chitchat": sum(1 for _ in read_chitchat(chitchat_file())), "python": len(standard_library_files())}
    for package in PACKAGES:
        folder = Path(sysconfig.get_path("purelib")) / package
        parts[f"{folder}/**/*.py"] = sum(1 for _ in folder.rglob("*.py"))
    return ",".join(f"{part}={count}" for part, count in parts.items())


def figures(variant: dict, base: dict, tuned: bool) -> dict:
    """Returns what the result keeps of a variant of `moonwhale compare` whose base is `base`."""
    kept = {name: variant[name] for name in FIGURES if name in variant}
    curve = [
        [(name, colour, curves[0]) for name, colour, curves in lines([variant], axis)] for axis in ("seconds", "tokens")
    ]
    if all(curve):
        (_, _, by_seconds), (_, _, by_tokens) = curve[0][0], curve[1][0]
        kept["curve"] = [
            [round(seconds, 1), round(tokens), round(bits, 4)]  # a list, as in the file that main reads
            for (seconds, bits), (tokens, _) in zip(by_seconds, by_tokens, strict=True)
        ]
    if variant is not base and "tokens_per_second" in base:
        kept["base_tokens_per_second"] = base["tokens_per_second"]
    how = {"seeds": len(variant["runs"]), "tuned": tuned, "lr": variant["runs"][0]["options"]["lr"]}
    return how | {"changes": variant["changes"]} | kept


def measure(arguments) -> dict:
    """Runs the comparison of one budget, and returns the figures of the base and of each variant by name."""
    chosen = [v for v in VARIANTS if not arguments.only or v[1] in arguments.only.split(",")]
    variants = [Variant(BASE, {}), *(Variant(name, changes) for _, name, changes in chosen)]
    own = CompareOptions(
        out=f"{arguments.out}-{arguments.seconds:g}s",
        seeds=arguments.seeds,
        seconds=arguments.seconds,
        turns=max(16, round(arguments.seconds / 20)),
        tune="lr" if arguments.tune else None,
    )
    given = {"preset": PRESET, "data": arguments.data or mixture(), "device": arguments.device}
    result = compare(comparison(own, given, variants))
    base = result["variants"][0]
    return {variant["name"]: figures(variant, base, arguments.tune) for variant in result["variants"]}


def main(argv: list[str] | None = None) -> None:
    parser = options(__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=240, help="seconds of training of each run (240)")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each variant (3)")
    parser.add_argument("--tune", action="store_true", help="find each variant's learning rate, which trebles the time")
    parser.add_argument("--only", metavar="NAME,NAME", help="train only these variants, with the base")
    parser.add_argument("--data", help="another text (a mixture of what the packages bring)")
    parser.add_argument("--device", default="auto", help="cpu, cuda or mps (auto)")
    parser.add_argument("--out", default="runs/ablations", help="the runs' folder, to which the budget is added")
    arguments = parser.parse_args(argv)
    names = [name for _, name, _ in VARIANTS]
    if unknown := [name for name in (arguments.only or "").split(",") if name and name not in names]:
        parser.error(f"--only: no variant {', '.join(unknown)} (there are {', '.join(names)})")

    allocator_tuned = tune_allocator()
    measured = measure(arguments)
    file = arguments.results / "ablations.json"
    before = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"budgets": {}}
    key, budgets = f"{arguments.seconds:g}", before["budgets"]
    budgets[key] = budgets.get(key, {}) | measured
    result = {"budgets": dict(sorted(budgets.items(), key=lambda item: float(item[0])))}
    result["data"] = arguments.data or f"chitchat, python, and the sources of {', '.join(PACKAGES)}"
    choice = choose(arguments.device)
    result["environment"] = environment("bf16 autocast" if choice.autocast else "fp32", allocator_tuned)
    write(arguments.results, "ablations", result)


if __name__ == "__main__":
    run_main(main)
