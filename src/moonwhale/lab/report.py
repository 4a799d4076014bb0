"""The result of a comparison: figures of each variant, and the table that the terminal shows."""

import json
from pathlib import Path
from statistics import mean

from moonwhale import __version__
from moonwhale.files import write_whole
from moonwhale.lab.config import Comparison
from moonwhale.lab.differences import paired_differences
from moonwhale.lab.runs import Run
from moonwhale.lab.variants import value_of
from moonwhale.units import in_bytes, si

MEANS = ("bits_per_byte", "tokens", "seconds", "tokens_per_second")


def report(asked: Comparison, runs: list[list[Run]], out: Path) -> dict:
    """Sums up all runs, writes `comparison.json` and `comparison.html`, and returns the former's content.

    runs: for each seed, one run of each variant, the base first.
    """
    from moonwhale.lab.page import page

    variants = [
        {"name": variant.name, "changes": changes(asked, i)} | summary([of_seed[i].result for of_seed in runs])
        for i, variant in enumerate(asked.variants)
    ]
    add_differences(variants)
    config, text = runs[0][0].config, runs[0][0].rows.data.train
    most = max(run.get("tokens", 0) for variant in variants for run in variant["runs"])
    result = {
        "moonwhale": __version__,
        "budget": {"unit": asked.budget.unit, "amount": asked.budget.amount},
        "seeds": [of_seed[0].config.seed for of_seed in runs],
        "data": config.data,
        "passes": most / (len(text) * config.context),
        "tuned": asked.options.tune,
        "variants": variants,
    }
    write_whole(out / "comparison.json", json.dumps(result, indent=1) + "\n")
    write_whole(out / "comparison.html", page(result))
    return result


def changes(asked: Comparison, index: int) -> dict:
    """Returns the options of a variant that differ from the base's: name -> [the base's value, its own]."""
    base, own = asked.config(asked.variants[0]), asked.config(asked.variants[index])
    names = [name for name in vars(own) if name != "model"]
    names += [f"model.{key}" for key in base.model | own.model]
    pairs = {name: [value_of(base, name), value_of(own, name)] for name in names}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def summary(runs: list[dict]) -> dict:
    """Returns the means of a variant over its runs, one a seed, and the runs. If one diverged, there are no means."""
    diverged = [run["diverged"] for run in runs if "diverged" in run]
    figures = {name: runs[0][name] for name in ("parameters", "active_parameters", "cache_bytes_per_token")}
    figures |= {"runs": runs, "diverged": len(diverged)}
    if diverged:
        return figures
    figures |= {name: mean(run[name] for run in runs) for name in MEANS}
    peaks = [run["peak_memory_bytes"] for run in runs if run["peak_memory_bytes"]]
    figures["peak_memory_bytes"] = min(peaks, default=None)  # what libraries allocate once comes on top of one run's
    return figures


def add_differences(variants: list[dict]) -> None:
    """Adds to each variant its difference to the first, the base. Where a run diverged there is none."""
    base, *others = variants
    others = [variant for variant in others if not variant["diverged"]]
    if base["diverged"] or not others:
        return
    bits = [[run["bits_per_byte"] for run in variant["runs"]] for variant in (base, *others)]
    for variant, difference in zip(others, paired_differences(*bits), strict=True):
        variant["difference"] = {
            "mean": difference.mean,
            "half_width": difference.half_width,
            "verdict": verdict(difference.mean, difference.seen),
        }


def verdict(difference: float, seen: bool | None) -> str:
    """Returns a difference in bits per byte in words."""
    if seen is None:
        return "one seed: no interval"
    if not seen:
        return "no difference seen"
    return "better" if difference < 0 else "worse"


HEADINGS = (
    "variant",
    "bits per byte",
    "difference to the base",
    "",
    "tokens/s",
    "active",
    "cache/token",
    "peak memory",
)


def cells(variant: dict) -> list[str]:
    """Returns a variant's row of the table, one cell for each of HEADINGS."""
    sizes = [si(variant["active_parameters"]), f"{variant['cache_bytes_per_token']:,} B"]
    if variant["diverged"]:
        count = f"{variant['diverged']} of {len(variant['runs'])} diverged"
        return [variant["name"], count, "", "", "", *sizes, ""]
    difference = variant.get("difference")
    text = words = ""
    if difference:
        text, words = f"{difference['mean']:+.4f}", difference["verdict"]
        if difference["half_width"] is not None:
            text += f" ± {difference['half_width']:.4f}"
    peak = variant["peak_memory_bytes"]
    speed = f"{variant['tokens_per_second']:,.0f}"
    bits = f"{variant['bits_per_byte']:.4f}"
    return [variant["name"], bits, text, words, speed, *sizes, in_bytes(peak) if peak else ""]


def heading(result: dict) -> str:
    """Returns a line that says what was compared."""
    budget, n = result["budget"], len(result["seeds"])
    amount = f"{budget['amount']:,.10g} {'s of training' if budget['unit'] == 'seconds' else budget['unit']}"
    rates = "; the learning rate of each variant is tuned" if result["tuned"] else ""
    seeds = f"{n} seeds, 95 % intervals of paired differences" if n > 1 else "1 seed: no interval"
    return f"{amount} each; {result['data']}, read up to {result['passes']:.2g} times; {seeds}{rates}"


def table(result: dict) -> str:
    """Returns the table for the terminal."""
    rows = [list(HEADINGS), *(cells(variant) for variant in result["variants"])]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        first, *others = (
            cell.ljust(w) if i in (0, 3) else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        lines.append("  ".join([first, *others]).rstrip())
    return "\n".join([heading(result), *lines])
