"""Writes the generated blocks of README.md: `python docs/update_readme.py`.

The blocks are the end of the demo, the size of the core and of the presets, and the results of the benchmarks. With
`--check`, the script only reports whether README.md is up to date, by its exit status.
"""

import ast
import io
import json
import re
import sys
import tokenize
from pathlib import Path

ROOT = Path(__file__).parent.parent
# The benchmarks whose results `figures` shows.
SOURCES = "train", "moba", "optimizer", "quality", "decode", "serve", "grpo", "fp8", "parallel"


def demo() -> str:
    """Returns the last lines that `make demo` printed."""
    return f"```\n{(ROOT / 'docs' / 'demo.txt').read_text(encoding='utf-8').strip()}\n```"


def core() -> str:
    """Returns the size of the rooms `model` and `optim`, in lines of code rounded to hundreds."""
    sources = [path for room in ("model", "optim") for path in sorted((ROOT / "src" / "moonwhale" / room).glob("*.py"))]
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

    lines = ["| preset | parameters | active | per block | MTP modules | cache per token | for |", "|---" * 7 + "|"]
    for name, preset in PRESETS.items():
        config = MoonwhaleConfig(**preset.model)
        n = model_size(config)
        cells = [
            f"`{name}`",
            f"{n.parameters / 1e6:.1f} M",
            f"{n.active_parameters / 1e6:.1f} M",
            f"{n.parameters_per_block / 1e6:.2f} M",
            f"{' + '.join(map(str, config.mtp_blocks))} block{'s' * (sum(config.mtp_blocks) > 1)}",
            f"{n.kv_cache_bytes_per_token:,} B ({n.mha_cache_bytes_per_token:,} B)",
            preset.summary,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def read(benchmark: str) -> dict:
    """Reads a benchmark's committed result."""
    return json.loads((ROOT / "benchmarks" / "results" / f"{benchmark}.json").read_text(encoding="utf-8"))


def step() -> str:
    """Returns the table that compares a training step of the demo model with transformers."""
    return step_table(read("demo_step"))


def figures() -> str:
    """Returns the table of benchmark results, one row per question."""
    return figures_table(*map(read, SOURCES))


def figures_table(
    train: dict,
    moba: dict,
    optimizer: dict,
    quality: dict,
    decode: dict,
    serve: dict,
    grpo: dict,
    fp8: dict,
    parallel: dict,
) -> str:
    lines = training_lines(train, moba, optimizer) | quality_lines(quality)
    lines |= inference_lines(decode, serve) | later_lines(grpo, fp8, parallel)
    rows = [f"| {what} | {figure} | [{name}.py](benchmarks/{name}.py) |" for what, (figure, name) in lines.items()]
    machine = train["environment"]
    where = (
        f"Measured on {machine['cpu']}, {machine['threads']} threads on {machine['cores']} cores, bf16 unless stated "
        f"otherwise, torch {machine['torch']}, transformers {machine['transformers']}; both sides use the same "
        "allocator, rounds are interleaved, figures are medians. Nothing has been measured on a GPU."
    )
    return "\n".join(["| question | figure | script |", "|---|---|---|", *rows, "", where])


def training_lines(train: dict, moba: dict, optimizer: dict) -> dict[str, tuple[str, str]]:
    """Returns the figures of training steps: for each row's text, the figure and the benchmark's name."""
    ratios = [f"{train[f'vs_transformers_{mode}']:.2f}×" for mode in ("fp32", "autocast", "bf16")]
    sparse = [f"{moba[f'fwd_{case}']:.1f}× and {moba[f'fwdbwd_{case}']:.1f}×" for case in ("1k", "16k", "32k")]
    seeds = len(optimizer["tokens_vs_adamw_by_seed"])
    return {
        "tokens/s in training, compared with transformers' `DeepseekV3ForCausalLM` in fp32 (its default), bf16 "
        "autocast and pure bf16; shapes of `seed_190m`, MTP off": (", ".join(ratios), "train"),
        "tokens/s in training, compared with a dense GPT with as many active parameters": (
            f"{train['vs_dense']:.2f}×",
            "train",
        ),
        "FLOP/s in training with MTP, as a share of the fastest bf16 matrix product": (
            f"{train['ceiling_share']:.0%}",
            "train",
        ),
        "peak memory of a training step with MTP off, compared with transformers under autocast": (
            f"{train['memory_vs_transformers']:.2f}×",
            "train",
        ),
        "speed of MoBA compared with full (flash) attention, forward, and forward and backward; "
        "at 1 k, 16 k and 32 k tokens": ("; ".join(sparse), "moba"),
        "share of MuonClip in a `seed_190m` step of 8,192 tokens; share of QK-clip": (
            f"{optimizer['muonclip_share']:.1%}; {optimizer['qkclip_share']:.1%}",
            "optimizer",
        ),
        f"tokens that MuonClip needs to reach AdamW's final loss, compared with AdamW, median of {seeds} seeds": (
            f"{optimizer['tokens_vs_adamw']:.2f}×",
            "optimizer",
        ),
    }


def quality_lines(quality: dict) -> dict[str, tuple[str, str]]:
    """Returns the bits per byte that each model reaches in equal time."""
    names = {"ours": "moonwhale", "dense": "a dense GPT with AdamW", "nanochat": "nanochat"}
    seconds, bits = round(quality["seconds"]["ours"]), quality["bits_per_byte"]
    return {
        f"held-out bits per byte after {seconds} s of training: {name}": (f"{bits[key]:.3f}", "quality")
        for key, name in names.items()
        if key in bits
    }


def inference_lines(decode: dict, serve: dict) -> dict[str, tuple[str, str]]:
    """Returns the figures of decoding and of the server."""
    ratios = [f"{decode[f'{bits}_{n}']:.1f}×" for bits in ("bf16", "int8") for n in (128, 1024)]
    cache = decode["cache_bytes_per_token"]["seed_190m"]
    bits = decode["bits_per_byte"]
    accepted = ", ".join(f"{share:.0%}" for share in decode["acceptance"])
    short, long = (f"{n // 1024} k" for n in decode["moba_contexts"])
    return {
        "tokens/s in decoding, compared with transformers' `generate` in bf16: in bf16 at 128 and 1,024 tokens of "
        "context; in int8; shapes of `seed_190m`, batch size 1": (
            f"{', '.join(ratios[:2])}; {', '.join(ratios[2:])}",
            "decode",
        ),
        **llamacpp_line(decode),
        f"decoding time per token with MoBA at {long} tokens of context, compared with {short}; "
        f"with full attention, compared with MoBA at {long}": (
            f"{decode['moba_growth']:.2f}×; {decode['moba_32k']:.1f}×",
            "decode",
        ),
        "cache bytes per token of `seed_190m`, as allocated: without drafts; with drafts from all MTP modules; with "
        "multi-head attention, without drafts": (
            f"{cache['latent_allocated']:,.0f}; {cache['drafting_allocated']:,.0f}; {cache['multi_head']:,}",
            "decode",
        ),
        "MTP drafts of the demo model: tokens per forward pass, accepted guesses, speed with `--draft auto` compared "
        "with no drafts": (f"{decode['tokens_per_forward']:.2f}; {accepted}; {decode['auto_vs_off']:.2f}×", "decode"),
        "held-out bits per byte of the demo model in fp32, bf16, int8": (
            ", ".join(f"{bits[name]:.3f}" for name in ("fp32", "bf16", "int8")),
            "decode",
        ),
        f"server with {serve['clients']} streaming clients: errors; throughput compared with one client": (
            f"{serve['errors']}; {serve['throughput_vs_one']:.1f}×",
            "serve",
        ),
        f"server under {serve['malformed_requests']:,} malformed requests: 5xx responses, hangs, leaks": (
            f"{serve['server_errors']}, {serve['hangs']}, {serve['leaks']}",
            "serve",
        ),
    }


def llamacpp_line(decode: dict) -> dict[str, tuple[str, str]]:
    """Returns the figures of decoding compared with llama.cpp, if it was measured."""
    if "prompt_vs_llamacpp" not in decode:
        return {}
    ratios = [f"{decode[f'{bits}_vs_llamacpp_{n}']:.2f}×" for bits in ("bf16", "int8") for n in (128, 1024)]
    return {
        "tokens/s in decoding, compared with llama.cpp on the same weights with full attention: bf16 with bf16 at 128 "
        "and 1,024 tokens of context; int8 with Q8_0; reading a prompt of 512 tokens in bf16": (
            f"{', '.join(ratios[:2])}; {', '.join(ratios[2:])}; {decode['prompt_vs_llamacpp']:.2f}×",
            "decode",
        ),
        "bytes per second that bf16 decoding reads at 128 tokens of context, as a share of the memory's": (
            f"{decode['bandwidth_share_bf16']:.0%}",
            "decode",
        ),
    }


def later_lines(grpo: dict, fp8: dict, parallel: dict) -> dict[str, tuple[str, str]]:
    """Returns the figures of post-training, FP8 and parallel training."""
    before, after = grpo["before"]["pass1"], min(each["pass1"] for each in grpo["after"])
    control = grpo["after_format_alone"]["pass1"]
    return {
        f"GRPO on sums: held-out pass@1 before and after (lowest of {grpo['seeds']} seeds); after rewards for the "
        "format alone; acceptance of MTP drafts compared with before": (
            f"{before:.0%} → {after:.0%}; {control:.0%}; {grpo['mtp_acceptance_kept']:.2f}×",
            "grpo",
        ),
        f"difference of the final loss from bf16's after {fp8['steps']} steps in emulated DeepSeek FP8": (
            f"{fp8['relative_loss_error']:.2%}",
            "fp8",
        ),
        f"largest relative difference of gradients between {len(parallel['equality']['layouts'])} layouts on 2 and 4 "
        "processes and one process; recoveries from `kill -9` of a rank": (
            f"{parallel['max_gradient_error']:.0e}; {parallel['kills_survived']} of {parallel['kills']['made']}",
            "parallel",
        ),
        "idle share of a DualPipeV step, compared with the formula; compared with 1F1B": (
            f"{parallel['bubble_vs_formula']:.2f}×; {parallel['bubble_vs_1f1b']:.2f}×",
            "parallel",
        ),
    }


def step_table(result: dict) -> str:
    """Returns the tokens/s of each contender in fp32 and bf16, the ratios, and the machine."""
    machine = result["environment"]
    lines = ["| training step of the demo model, MTP off | fp32, tokens/s | bf16, tokens/s |", "|---|---|---|"]
    for name in result["fp32"]["tokens_per_second"]:
        speeds = [f"{result[dtype]['tokens_per_second'][name]:,}" for dtype in ("fp32", "bf16")]
        lines.append(f"| {name} | {speeds[0]} | {speeds[1]} |")
    ratios = [f"**{result[f'vs_transformers_{dtype}']:.2f}×**" for dtype in ("fp32", "bf16")]
    lines.append(f"| **moonwhale compared with the fastest of transformers** | {ratios[0]} | {ratios[1]} |")
    where = (
        f"Forward and backward pass of {result['rows']} rows of {result['context']} tokens, compared with "
        "transformers' `DeepseekV3ForCausalLM` of the same shapes. "
        f"Measured on {machine['cpu']}, {machine['threads']} threads on {machine['cores']} cores, bf16 under autocast, "
        f"torch {machine['torch']}, transformers {machine['transformers']}, by [demo_step.py](benchmarks/demo_step.py)."
    )
    return "\n".join([*lines, "", where])


REGIONS = {"demo": demo, "core": core, "sizes": sizes, "figures": figures, "step": step}


def updated(text: str) -> str:
    """Returns the text of README.md with its generated blocks replaced."""
    for name, produce in REGIONS.items():
        pattern = re.compile(rf"(<!-- begin:{name} -->\n).*?(<!-- end:{name} -->)", re.DOTALL)
        text, n = pattern.subn(lambda match, produce=produce: f"{match[1]}\n{produce()}\n\n{match[2]}", text)
        assert n == 1, f"README.md has {n} blocks named {name}, not one"
    return text


def main() -> None:
    path = ROOT / "README.md"
    before = path.read_text(encoding="utf-8")
    after = updated(before)
    if "--check" in sys.argv:
        sys.exit(0 if before == after else "README.md is not up to date: run python docs/update_readme.py")
    path.write_text(after, encoding="utf-8")


if __name__ == "__main__":
    main()
