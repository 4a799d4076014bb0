"""The page that a comparison writes: one HTML file without scripts, which loads nothing."""

from html import escape
from importlib.resources import files
from statistics import mean
from string import Template

from moonwhale.lab.curves import COLOURS, chart
from moonwhale.lab.report import HEADINGS, cells, heading

LEFT = (0, 3)  # columns of the table that hold words
INTERVALS = (
    "A difference is the variant's bits per byte minus the base's, paired by seed, ± half the width of the 95 % "
    "interval (Student's t). All variants share one estimate of how much seeds scatter. Fewer bits per byte are "
    "better. “No difference seen” means that the interval holds zero; a difference that is smaller than the interval "
    "may still exist. Of twenty variants that differ by nothing, one is expected to seem better or worse."
)
ONE_SEED = "With one seed there is no interval: the difference may be the seed's. Fewer bits per byte are better."


def page(result: dict) -> str:
    """Returns the page of a result (`report.report`)."""
    variants = result["variants"]
    template = Template((files("moonwhale.lab") / "page.html").read_text(encoding="utf-8"))
    return template.substitute(
        data=escape(result["data"]),
        count=len(variants),
        heading=escape(heading(result)),
        explanation=INTERVALS if len(result["seeds"]) > 1 else ONE_SEED,
        headings="".join(_cell(name, i in LEFT, tag="th") for i, name in enumerate(HEADINGS)),
        rows="".join(map(_row, variants)),
        changes="".join(map(_changes, variants)),
        legend="".join(
            f'<li><i style="color:{colour(i)}"></i>{escape(variant["name"])}</li>' for i, variant in enumerate(variants)
        ),
        by_seconds=chart(lines(variants, "seconds")),
        by_tokens=chart(lines(variants, "tokens")),
        runs="".join(_run(run) for variant in variants for run in variant["runs"]),
        version=escape(result["moonwhale"]),
    )


def lines(variants: list[dict], axis: str) -> list[tuple[str, str, list[list[tuple[float, float]]]]]:
    """Returns name, colour and curves of each variant against "seconds" or "tokens": the mean's, then each seed's."""
    found = []
    for i, variant in enumerate(variants):
        curves = [
            [(point[axis], point["bits_per_byte"]) for point in run["curve"]]
            for run in variant["runs"]
            if "curve" in run
        ]
        if not curves:
            continue
        points = zip(*curves, strict=False)  # turns that all seeds have
        average = [(mean(x for x, _ in at), mean(y for _, y in at)) for at in points]
        found.append((variant["name"], colour(i), [average, *(curves if len(curves) > 1 else [])]))
    return found


def colour(index: int) -> str:
    return f"var(--c{index % COLOURS})"


def _cell(text: object, left: bool = False, kind: str = "", tag: str = "td") -> str:
    classes = f"{'left' if left else ''} {kind}".strip()
    return f'<{tag} class="{classes}">{escape(str(text))}</{tag}>'


def _row(variant: dict) -> str:
    word = variant.get("difference", {}).get("verdict", "")
    kind = word if word in ("better", "worse") else ""
    return (
        f"<tr>{''.join(_cell(text, i in LEFT, kind if i == 3 else '') for i, text in enumerate(cells(variant)))}</tr>"
    )


def _changes(variant: dict) -> str:
    if not variant["changes"]:
        return f"<tr>{_cell(variant['name'], True)}{_cell('nothing', True)}{_cell('')}{_cell('')}</tr>"
    return "".join(
        f"<tr>{_cell(variant['name'], True)}{_cell(name, True)}{_cell(base, True)}{_cell(own, True)}</tr>"
        for name, (base, own) in variant["changes"].items()
    )


def _run(run: dict) -> str:
    head = _cell(run["variant"], True) + _cell(run["seed"])
    rate, folder = _cell(f"{run['options']['lr']:.3g}"), f"<td class='left'><code>{escape(run['folder'])}</code></td>"
    if "diverged" in run:
        return f"<tr>{head}{_cell('diverged at ' + run['diverged'])}{rate}{_cell('')}{_cell('')}{folder}</tr>"
    bits = _cell(f"{run['bits_per_byte']:.4f}")
    spent = _cell(f"{run['tokens']:,}") + _cell(f"{run['seconds']:,.1f}")
    return f"<tr>{head}{bits}{rate}{spent}{folder}</tr>"
