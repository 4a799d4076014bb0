"""Line charts as inline SVG, coloured by the page's style sheet."""

import math
from html import escape

from moonwhale.units import si

WIDTH, HEIGHT = 560, 320
LEFT, RIGHT, TOP, BOTTOM = 48, 12, 10, 24  # margins
COLOURS = 8
DASHES = ("", "7 4", "2 3")  # for the variants after each COLOURS

Points = list[tuple[float, float]]


def chart(lines: list[tuple[str, str, list[Points]]]) -> str:
    """Draws lines, each with a name, a colour, and its curves: the first thick, the others thin.

    The vertical axis shows what happens after the first quarter of the horizontal one; earlier points may lie above it.
    """
    points = [point for _, _, curves in lines for curve in curves for point in curve]
    if not points:
        return "<p>No run has ended without diverging.</p>"
    right = max(x for x, _ in points)
    late = [y for x, y in points if x >= right / 4]
    low, high = min(late), max(late)
    margin = 0.05 * (high - low) or 0.01
    low, high = low - margin, high + margin

    def at(x: float, y: float) -> str:
        across = LEFT + (WIDTH - LEFT - RIGHT) * x / right
        return f"{across:.1f},{TOP + (HEIGHT - TOP - BOTTOM) * (high - y) / (high - low):.1f}"

    parts = [_grid(right, low, high, at)]
    for i, (name, colour, curves) in enumerate(lines):
        for kind, curve in [("mean", curves[0]), *(("seed", curve) for curve in curves[1:])]:
            dashes = f' stroke-dasharray="{DASHES[i // COLOURS % len(DASHES)]}"' if i >= COLOURS else ""
            path = " ".join(at(x, y) for x, y in curve)
            style = f'class="{kind}" style="stroke:{colour}"{dashes}'
            parts.append(f'<polyline {style} points="{path}"><title>{escape(name)}</title></polyline>')
    frame = f'x="{LEFT}" y="{TOP}" width="{WIDTH - LEFT - RIGHT}" height="{HEIGHT - TOP - BOTTOM}"'
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img"><clipPath id="frame"><rect {frame}/></clipPath>'
        f'{parts[0]}<g clip-path="url(#frame)">{"".join(parts[1:])}</g></svg>'
    )


def _grid(right: float, low: float, high: float, at) -> str:
    """Draws horizontal lines with their values, and the values of the horizontal axis."""
    parts = []
    for y in ticks(low, high):
        x1, height = at(0, y).split(",")
        x2 = at(right, y).split(",")[0]
        parts.append(f'<line class="grid" x1="{x1}" x2="{x2}" y1="{height}" y2="{height}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{height}" dy="4" text-anchor="end">{y:.{decimals(low, high)}f}</text>')
    for x in ticks(0, right):
        across = at(x, low).split(",")[0]
        label = f"{x:g}" if x < 10_000 else si(x)
        parts.append(f'<text x="{across}" y="{HEIGHT - 6}" text-anchor="middle">{label}</text>')
    return "".join(parts)


def ticks(low: float, high: float) -> list[float]:
    """Returns four to nine round numbers in a range."""
    step = _step(low, high)
    return [step * k for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def decimals(low: float, high: float) -> int:
    """Returns how many decimals tell the ticks of a range apart."""
    return max(0, -math.floor(math.log10(_step(low, high)) + 1e-9))


def _step(low: float, high: float) -> float:
    power = 10.0 ** math.floor(math.log10(high - low))
    return next(power * factor for factor in (0.1, 0.2, 0.5, 1, 2) if (high - low) / (power * factor) < 9)
