"""Writes the tables of docs/ablations.md: `python docs/update_ablations.py`.

They hold the results of benchmarks/ablations.py. With `--check`, the script only reports whether the page is up to
date.
"""

import importlib
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import generated_blocks

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "ablations.md"
RESULT = ROOT / "benchmarks" / "results" / "ablations.json"
BUDGETS = {"240": "4 minutes", "1200": "20 minutes", "3600": "60 minutes"}


def variants() -> tuple:
    """Returns mechanism, name and changes of each variant of the benchmark."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        return importlib.import_module("ablations").VARIANTS
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))


def difference(figures: dict | None) -> str:
    """Returns a variant's difference to the base at one budget, for a cell of the table."""
    if figures is None:
        return ""
    if figures["diverged"]:
        return f"{figures['diverged']} diverged"
    if "difference" not in figures:
        return "no difference: the base diverged"
    mean, half_width = figures["difference"]["mean"], figures["difference"]["half_width"]
    if half_width is None:
        return f"{mean:+.3f} (1 seed)"
    return f"{mean:+.3f} ± {half_width:.3f}, {figures['difference']['verdict']}"


def differences(result: dict, rows: tuple) -> str:
    """Returns the table of differences: one row a variant, one column a budget, and what was not measured yet."""
    budgets = {budget: title for budget, title in BUDGETS.items() if budget in result["budgets"]}
    head = ["mechanism", "variant", *budgets.values()]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for mechanism, name, _ in rows:
        cells = [difference(_figures(result, budget, name)) for budget in budgets]
        if any(cells):
            lines.append(f"| {mechanism} | {name} | {' | '.join(cells)} |")
    return "\n".join([*lines, *not_measured(result, [name for _, name, _ in rows])])


def not_measured(result: dict, names: list[str]) -> list[str]:
    """Returns a paragraph that names the variants that lack a figure at some budget, or nothing if there are none."""
    missing = {
        title: [name for name in names if not _figures(result, budget, name)] for budget, title in BUDGETS.items()
    }
    parts = [
        f"after {title}: {'all' if absent == names else ', '.join(absent)}"
        for title, absent in missing.items()
        if absent
    ]
    return ["", f"Not measured yet {'; '.join(parts)}."] if parts else []


def costs(result: dict, rows: tuple) -> str:
    """Returns the table of what each variant costs, at the longest budget that is measured for it."""
    lines = [
        "| variant | seeds | learning rate | tokens/s | compared with its base | active parameters | cache per token |",
        "|---" * 7 + "|",
    ]
    for name in ["base", *(name for _, name, _ in rows)]:
        found = [
            figures for budget in BUDGETS if (figures := _figures(result, budget, name)) and not figures["diverged"]
        ]
        if found:
            lines.append(f"| {name} | {' | '.join(_costs(found[-1]))} |")
    return "\n".join(lines)


def _costs(figures: dict) -> list[str]:
    own, base = figures["tokens_per_second"], figures.get("base_tokens_per_second")
    return [
        str(figures["seeds"]),
        f"{figures['lr']:.2g}{', tuned' if figures['tuned'] else ''}",
        f"{own:,.0f}",
        f"{own / base:.2f} times" if base else "",
        f"{figures['active_parameters'] / 1e6:.2f} M",
        f"{figures['cache_bytes_per_token']:,} B",
    ]


def where(result: dict) -> str:
    """Returns how and on which machine the figures were measured."""
    if not result["budgets"]:
        return "Nothing is measured yet."
    machine = result["environment"]
    return (
        f"Text: {result['data']}. Measured on {machine['cpu']}, {machine['threads']} threads, "
        f"{machine['dtype']}, torch {machine['torch']}."
    )


def _figures(result: dict, budget: str, name: str) -> dict | None:
    return result["budgets"].get(budget, {}).get(name)


def updated(text: str, result: dict, rows: tuple) -> str:
    """Returns the text of the page with its generated blocks replaced."""
    regions = {"differences": differences(result, rows), "costs": costs(result, rows), "where": where(result)}
    return generated_blocks.replaced(text, regions, PAGE.name)


def read() -> dict:
    """Returns the committed result, or one without budgets."""
    return json.loads(RESULT.read_text(encoding="utf-8")) if RESULT.exists() else {"budgets": {}}


def main() -> None:
    after = updated(PAGE.read_text(encoding="utf-8"), read(), variants())
    generated_blocks.write_or_check(PAGE, after, "update_ablations.py")


if __name__ == "__main__":
    main()
