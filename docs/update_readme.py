"""Writes the figures of README.md from what produced them: `python docs/update_readme.py`.

With `--check`, only says whether they differ.
"""

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
SOURCES = "train", "moba", "optimizer", "quality", "decode", "serve", "grpo", "fp8", "parallel"  # of the figures


def demo() -> str:
    """The end of `make demo`, as it was printed."""
    return f"```\n{(ROOT / 'docs' / 'demo.txt').read_text(encoding='utf-8').strip()}\n```"


def sizes() -> str:
    """The presets, counted."""
    from moonwhale.costs import model_size
    from moonwhale.model.configuration_moonwhale import MoonwhaleConfig
    from moonwhale.presets import PRESETS

    lines = ["| preset | parameters | active | a block | MTP modules | cache a token | for |", "|---" * 7 + "|"]
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
    return json.loads((ROOT / "benchmarks" / "results" / f"{benchmark}.json").read_text(encoding="utf-8"))


def step() -> str:
    """The demo model's training step beside transformers'."""
    return step_table(read("demo_step"))


def figures() -> str:
    """What the benchmarks say, a line for each question."""
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
    over = [f"{train[f'vs_transformers_{mode}']:.2f}×" for mode in ("fp32", "autocast", "bf16")]
    bits, seeds = quality["bits_per_byte"], optimizer["tokens_vs_adamw_by_seed"]
    sparse = [f"{moba[f'fwd_{case}']:.1f}× and {moba[f'fwdbwd_{case}']:.1f}×" for case in ("1k", "16k", "32k")]
    seconds = round(quality["seconds"]["ours"])
    lines = {
        "tokens/s in training, `seed_190m`'s shapes, MTP off, beside transformers' `DeepseekV3ForCausalLM` in fp32 "
        "(its default), bf16 autocast, pure bf16": (", ".join(over), "train"),
        "the same beside a dense GPT of as many active parameters": (f"{train['vs_dense']:.2f}×", "train"),
        "the whole model with MTP: share of the fastest bf16 matrix product": (
            f"{train['ceiling_share']:.0%}",
            "train",
        ),
        "peak memory of that step, beside transformers under autocast": (
            f"{train['memory_vs_transformers']:.2f}×",
            "train",
        ),
        "MoBA beside full attention (flash), forward and with backward, at 1 k, 16 k and 32 k tokens": (
            "; ".join(sparse),
            "moba",
        ),
        "MuonClip's part of a `seed_190m` step of 8,192 tokens; QK-clip's": (
            f"{optimizer['muonclip_share']:.1%}; {optimizer['qkclip_share']:.1%}",
            "optimizer",
        ),
        f"tokens MuonClip needs for AdamW's final loss, beside AdamW's own, median of {len(seeds)} seeds": (
            f"{optimizer['tokens_vs_adamw']:.2f}×",
            "optimizer",
        ),
        f"held-out bits per byte after {seconds} s of training: ours whole": (f"{bits['ours']:.3f}", "quality"),
        "a dense GPT with AdamW": (f"{bits['dense']:.3f}", "quality"),
    }
    if "nanochat" in bits:
        lines["nanochat"] = (f"{bits['nanochat']:.3f}", "quality")
    lines |= inference_lines(decode, serve) | later_lines(grpo, fp8, parallel)
    rows = [f"| {what} | {figure} | [{name}.py](benchmarks/{name}.py) |" for what, (figure, name) in lines.items()]
    machine = train["environment"]
    where = (
        f"{machine['cpu']}, {machine['threads']} threads on {machine['cores']} cores, bf16 where not named otherwise, "
        f"torch {machine['torch']}, transformers {machine['transformers']}; one allocator for both sides, rounds "
        "interleaved, medians. No GPU was at hand: not measured there."
    )
    return "\n".join(["| what | figure | script |", "|---|---|---|", *rows, "", where])


def inference_lines(decode: dict, serve: dict) -> dict[str, tuple[str, str]]:
    """The figures of decoding and of the server, and whose they are."""
    beside = [f"{decode[f'{bits}_{n}']:.1f}×" for bits in ("bf16", "int8") for n in (128, 1024)]
    cache = decode["cache_bytes_per_token"]["seed_190m"]
    bits = decode["bits_per_byte"]
    held = ", ".join(f"{share:.0%}" for share in decode["acceptance"])
    short, long = (f"{n // 1024} k" for n in decode["moba_contexts"])
    return {
        "tokens/s in decoding, `seed_190m`'s shapes, batch 1, beside transformers' `generate` in bf16: bf16 at 128 and "
        "1,024 tokens of context; int8": (f"{', '.join(beside[:2])}; {', '.join(beside[2:])}", "decode"),
        f"MoBA: time a token at {long} of context beside {short}; full attention's at {long} beside MoBA's": (
            f"{decode['moba_growth']:.2f}×; {decode['moba_32k']:.1f}×",
            "decode",
        ),
        "bytes a token leaves in the cache of `seed_190m`, and in multi-head attention's": (
            f"{cache['latent_allocated']:,.0f}; {cache['multi_head']:,}",
            "decode",
        ),
        "MTP drafts of the demo model: tokens a forward, guesses that held, speed of `auto` beside none": (
            f"{decode['tokens_per_forward']:.2f}; {held}; {decode['auto_vs_off']:.2f}×",
            "decode",
        ),
        "held-out bits per byte of the demo model in fp32, bf16, int8": (
            ", ".join(f"{bits[name]:.3f}" for name in ("fp32", "bf16", "int8")),
            "decode",
        ),
        f"server: {serve['clients']} streaming clients, errors, throughput beside one client's": (
            f"{serve['errors']}; {serve['throughput_vs_one']:.1f}×",
            "serve",
        ),
        f"{serve['malformed_requests']:,} malformed requests: 5xx, hangs, leaks": (
            f"{serve['server_errors']}, {serve['hangs']}, {serve['leaks']}",
            "serve",
        ),
    }


def later_lines(grpo: dict, fp8: dict, parallel: dict) -> dict[str, tuple[str, str]]:
    """The figures of post-training, of FP8 and of pipelines."""
    before, after = grpo["before"]["pass1"], min(each["pass1"] for each in grpo["after"])
    control = grpo["after_format_alone"]["pass1"]
    return {
        f"GRPO on sums: held-out pass@1 before and after, the least of {grpo['seeds']} seeds; after rewards for the "
        "format alone; MTP's acceptance beside before": (
            f"{before:.0%} → {after:.0%}; {control:.0%}; {grpo['mtp_acceptance_kept']:.2f}×",
            "grpo",
        ),
        f"{fp8['steps']} steps in DeepSeek's FP8, emulated: final loss off bf16's": (
            f"{fp8['relative_loss_error']:.2%}",
            "fp8",
        ),
        f"gradients of runs over 2 and 4 processes in {len(parallel['equality']['layouts'])} layouts beside one "
        "process's: largest relative error; `kill -9` of a rank outlived": (
            f"{parallel['max_gradient_error']:.0e}; {parallel['kills_survived']} of {parallel['kills']['made']}",
            "parallel",
        ),
        "DualPipeV's idle share of a step, beside the formula; beside 1F1B's": (
            f"{parallel['bubble_vs_formula']:.2f}×; {parallel['bubble_vs_1f1b']:.2f}×",
            "parallel",
        ),
    }


def step_table(result: dict) -> str:
    """Tokens/s of each contender in fp32 and bf16, the ratios, and where that was measured."""
    machine = result["environment"]
    lines = ["| a training step of the demo model, MTP off | fp32, tokens/s | bf16, tokens/s |", "|---|---|---|"]
    for name in result["fp32"]["tokens_per_second"]:
        speeds = [f"{result[dtype]['tokens_per_second'][name]:,}" for dtype in ("fp32", "bf16")]
        lines.append(f"| {name} | {speeds[0]} | {speeds[1]} |")
    ratios = [f"**{result[f'vs_transformers_{dtype}']:.2f}×**" for dtype in ("fp32", "bf16")]
    lines.append(f"| **moonwhale beside the fastest of transformers** | {ratios[0]} | {ratios[1]} |")
    where = (
        f"Forward and backward of {result['rows']} rows of {result['context']} tokens, beside transformers' "
        f"`DeepseekV3ForCausalLM` of the same shapes. {machine['cpu']}, {machine['threads']} threads on "
        f"{machine['cores']} cores, bf16 under autocast, torch {machine['torch']}, transformers "
        f"{machine['transformers']}: [demo_step.py](benchmarks/demo_step.py)."
    )
    return "\n".join([*lines, "", where])


REGIONS = {"demo": demo, "sizes": sizes, "figures": figures, "step": step}


def updated(text: str) -> str:
    """README.md with its regions filled in."""
    for name, produce in REGIONS.items():
        pattern = re.compile(rf"(<!-- begin:{name} -->\n).*?(<!-- end:{name} -->)", re.DOTALL)
        text, n = pattern.subn(lambda match, produce=produce: f"{match[1]}\n{produce()}\n\n{match[2]}", text)
        assert n == 1, f"README.md has {n} regions named {name}"
    return text


def main() -> None:
    path = ROOT / "README.md"
    before = path.read_text(encoding="utf-8")
    after = updated(before)
    if "--check" in sys.argv:
        sys.exit(0 if before == after else "README.md differs from its sources: python docs/update_readme.py")
    path.write_text(after, encoding="utf-8")


if __name__ == "__main__":
    main()
