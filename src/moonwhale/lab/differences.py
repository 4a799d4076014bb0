"""Differences of variants to the base over the same seeds, with an interval that says how sure they are."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Difference:
    """The mean of paired differences, and half the width of its 95 % interval; None with a single pair."""

    mean: float
    half_width: float | None

    @property
    def seen(self) -> bool | None:
        """Whether the interval leaves zero out; None without an interval."""
        return None if self.half_width is None else abs(self.mean) > self.half_width


def paired_differences(base: Sequence[float], *others: Sequence[float]) -> list[Difference]:
    """Compares each of `others` with the base. All have one value per seed, in the same order.

    This is an analysis of variance in two ways, of the values y of V variants (the base is one) and n seeds:

        r = y - ȳ(variant) - ȳ(seed) + ȳ,    s² = Σ r² / f,    f = (V - 1)(n - 1)
        d̄ ± t(0.975, f) s √(2/n)

    What a seed does to all variants cancels out in r. All variants share one estimate s of the spread: three seeds say
    little about it, but three seeds of many variants do. With a single other this is the paired t-test. The interval
    assumes that r is normally distributed, with the same spread in each variant.
    """
    rows, n = [base, *others], len(base)
    by_variant = [mean(row) for row in rows]
    by_seed = [mean(column) for column in zip(*rows, strict=True)]
    if n == 1:
        return [Difference(own - by_variant[0], None) for own in by_variant[1:]]
    centre = mean(by_variant)
    squares = ((rows[v][s] - by_variant[v] - by_seed[s] + centre) ** 2 for v in range(len(rows)) for s in range(n))
    freedom = (len(rows) - 1) * (n - 1)
    half_width = t_quantile((1 + CONFIDENCE) / 2, freedom) * math.sqrt(sum(squares) / freedom * 2 / n)
    return [Difference(own - by_variant[0], half_width) for own in by_variant[1:]]


def t_quantile(probability: float, freedom: int) -> float:
    """Returns the value below which Student's t with `freedom` degrees lies with a probability in [0.5, 1)."""
    low, high = 0.0, math.pi / 2  # of θ = atan(t / √freedom)
    for _ in range(60):
        middle = (low + high) / 2
        if _probability(middle, freedom) < probability:
            low = middle
        else:
            high = middle
    return math.sqrt(freedom) * math.tan(low)


def _probability(theta: float, freedom: int) -> float:
    """Returns P(T < √freedom tan θ), by the finite sums of Abramowitz and Stegun, 26.7.3 and 26.7.4."""
    sine, cosine = math.sin(theta), math.cos(theta)
    odd = freedom % 2
    term = total = (cosine if freedom > 1 else 0.0) if odd else 1.0
    for k in range(2 + odd, freedom, 2):
        term *= cosine**2 * (k - 1) / k
        total += term
    inside = 2 / math.pi * (theta + sine * total) if odd else sine * total
    return (1 + inside) / 2
