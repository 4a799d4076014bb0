"""Writes the figures of README.md from what produced them: `python docs/update_readme.py`.

With `--check`, only says whether they differ.
"""

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def demo() -> str:
    """The end of `make demo`, as it was printed."""
    return f"```\n{(ROOT / 'docs' / 'demo.txt').read_text(encoding='utf-8').strip()}\n```"


def sizes() -> str:
    """The presets, counted."""
    from moonwhale.counts import count
    from moonwhale.model.configuration_moonwhale import MoonwhaleConfig
    from moonwhale.presets import PRESETS

    lines = ["| preset | parameters | active | a block | MTP modules | cache a token | for |", "|---" * 7 + "|"]
    for name, preset in PRESETS.items():
        config = MoonwhaleConfig(**preset.model)
        n = count(config)
        cells = [
            f"`{name}`",
            f"{n.parameters / 1e6:.1f} M",
            f"{n.active_parameters / 1e6:.1f} M",
            f"{n.parameters_per_block / 1e6:.2f} M",
            f"{' + '.join(map(str, config.mtp_blocks))} blocks",
            f"{n.kv_cache_bytes_per_token:,} B ({n.mha_cache_bytes_per_token:,} B)",
            preset.summary,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def step() -> str:
    """The demo model's training step beside transformers'."""
    result = json.loads((ROOT / "benchmarks" / "results" / "demo_step.json").read_text(encoding="utf-8"))
    return step_table(result)


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


REGIONS = {"demo": demo, "sizes": sizes, "step": step}


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
