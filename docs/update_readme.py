"""Writes the generated blocks of README.md: `python docs/update_readme.py`.

The blocks are the ends of two runs, the comparison with nanochat, the size of the core and of the presets, and the
results of the benchmarks. With `--check`, the script only reports whether README.md is up to date, by its exit status.
"""

import ast
import io
import json
import sys
import tokenize
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import generated_blocks
import readme_figures
import update_ablations

ROOT = Path(__file__).parent.parent
# The benchmarks whose results `figures` shows.
SOURCES = (
    "quality",
    "quality_20min_amx",
    "optimizer",
    "train",
    "demo_step",
    "moba",
    "moba_amx",
    "decode",
    "serve",
    "grpo",
    "fp8",
    "parallel",
)


def transcript(name: str) -> str:
    """Returns the summary and the conversation of what was printed and kept in docs/NAME.txt, as a block of code."""
    lines = (ROOT / "docs" / f"{name}.txt").read_text(encoding="utf-8").strip().splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("you: "))
    summary = [line for line in lines[:first] if line.startswith("done ")]
    return "\n".join(["```", *summary, *lines[first:], "```"])


def demo() -> str:
    """Returns the end of `make demo`."""
    return transcript("demo")


def evening() -> str:
    """Returns the end of the run of models/evening, a conversation with it, and the figures."""
    topics = read("topics")
    count, of = topics["questions_on_topic"], topics["questions"]
    return (
        f"{transcript('evening')}\n\n"
        f"It stays on the topic of {count['evening']} of [{of} questions](benchmarks/topics.txt), the demo of "
        f"{count['demo']}. The rule of [topics.py](benchmarks/topics.py) was\n"
        "written before the models were trained. It is lenient: an answer with one of the words listed for its "
        "question counts,\n"
        "even if it makes no sense. [topics.json](benchmarks/results/topics.json) has every answer."
    )


def grpo() -> str:
    """Returns what GRPO teaches: the right answers before and after, of the worst seed, and its picture."""
    result = read("grpo")
    steps, threads, n_seeds = result["sizes"]["grpo_steps"], result["environment"]["threads"], result["seeds"]
    before, after = result["before"]["pass1"], min(each["pass1"] for each in result["after"])
    cores = "one CPU core" if threads == 1 else f"{threads} CPU cores"
    return (
        f"After a warm start, {steps} steps of GRPO ({result['minutes']:.0f} minutes on {cores}) raise the share of "
        f"right answers to sums from {before:.0%}\n"
        f"to {after:.0%} in the worst of {n_seeds} seeds, while answers grow longer:\n\n"
        f"![Right answers and their length over {steps} steps of GRPO, {n_seeds} seeds](docs/grpo.svg)"
    )


def nanochat() -> str:
    """Returns the comparisons with nanochat and with a dense network."""
    races = {name: read(name) for name in ("quality", "quality_amx", "quality_20min_amx")}
    ablations = read("ablations")
    dense = ablations["budgets"]["240"]["dense of equal FLOPs"]
    faster = dense["tokens_per_second"] / dense["base_tokens_per_second"]
    return (
        f"{readme_figures.against_nanochat(races)}\n\n"
        f"With a dense network of equal FLOPs in place of its experts, the demo model trains {faster:.2f} times "
        f"as fast on an {readme_figures.cpu(ablations['environment'])}.\n"
        "The difference in bits per byte after four minutes, dense minus experts, is "
        f"{update_ablations.difference(dense)}\n"
        "([ablations](docs/ablations.md))."
    )


def core() -> str:
    """Returns the size of the packages `model` and `optim`, in lines of code rounded to hundreds."""
    packages = [ROOT / "src" / "moonwhale" / name for name in ("model", "optim")]
    sources = [path for package in packages for path in sorted(package.glob("*.py"))]
    lines = round(sum(map(lines_of_code, sources)), -2)
    return (
        f"All of this is about {lines:,} lines of code in {len(sources)} files, without comments and docstrings "
        "([model](src/moonwhale/model) and [optim](src/moonwhale/optim))."
    )


def lines_of_code(path: Path) -> int:
    """Counts the lines of a Python file that hold neither a comment nor a docstring alone."""
    source = path.read_text(encoding="utf-8")
    docstrings: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            docstrings |= set(range(node.lineno, node.end_lineno + 1))
    comments = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    code = {line for t in tokens if t.type not in comments for line in range(t.start[0], t.end[0] + 1)}
    return len(code - docstrings)


def sizes() -> str:
    """Returns the table of presets and their sizes."""
    from moonwhale.costs import model_size
    from moonwhale.model.configuration_moonwhale import MoonwhaleConfig
    from moonwhale.presets import PRESETS

    head = "preset", "parameters", "active", "per block", "MTP modules", "cache per token", "with MHA", "for"
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for name, preset in PRESETS.items():
        config = MoonwhaleConfig(**preset.model)
        n = model_size(config)
        cells = [
            f"`{name}`",
            f"{n.parameters / 1e6:.1f} M",
            f"{n.active_parameters / 1e6:.1f} M",
            f"{n.parameters_per_block / 1e6:.2f} M",
            f"{' + '.join(map(str, config.mtp_blocks))} block{'s' * (sum(config.mtp_blocks) > 1)}",
            f"{n.kv_cache_bytes_per_token:,} B",
            f"{n.mha_cache_bytes_per_token:,} B",
            preset.summary,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def read(benchmark: str) -> dict:
    """Reads a benchmark's committed result."""
    return json.loads((ROOT / "benchmarks" / "results" / f"{benchmark}.json").read_text(encoding="utf-8"))


def figures() -> str:
    """Returns the tables of benchmark results."""
    return readme_figures.tables({name: read(name) for name in SOURCES})


REGIONS = {
    "demo": demo,
    "evening": evening,
    "grpo": grpo,
    "nanochat": nanochat,
    "core": core,
    "sizes": sizes,
    "figures": figures,
}


def updated(text: str) -> str:
    """Returns the text of README.md with its generated blocks replaced."""
    return generated_blocks.replaced(text, {name: produce() for name, produce in REGIONS.items()}, "README.md")


def main() -> None:
    page = ROOT / "README.md"
    generated_blocks.write_or_check(page, updated(page.read_text(encoding="utf-8")), "update_readme.py")


if __name__ == "__main__":
    main()
