"""Differences between two variants over the same seeds, with an interval that says how sure they are."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, stdev

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


def paired_difference(base: Sequence[float], other: Sequence[float]) -> Difference:
    """Compares values that belong together, one pair a seed: other - base.

        d̄ ± t(0.975, n - 1) s_d / √n

    Pairs share their data order, so what a seed does to both cancels out. The interval assumes that the differences
    are normally distributed.
    """
    differences = [b - a for a, b in zip(base, other, strict=True)]
    n = len(differences)
    if n == 1:
        return Difference(differences[0], None)
    return Difference(mean(differences), t_quantile((1 + CONFIDENCE) / 2, n - 1) * stdev(differences) / math.sqrt(n))


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
