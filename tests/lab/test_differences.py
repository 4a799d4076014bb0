"""Student's t, and differences that are paired by seed, against scipy and numbers by hand."""

import math

import pytest
import torch

from moonwhale.lab.differences import paired_differences, t_quantile

# From the table of Abramowitz and Stegun, 26.10
TABLE = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 9: 2.262, 10: 2.228, 30: 2.042, 120: 1.980}


@pytest.mark.parametrize(("freedom", "quantile"), TABLE.items())
def test_quantiles_are_those_of_the_table(freedom, quantile):
    assert t_quantile(0.975, freedom) == pytest.approx(quantile, abs=6e-4)


@pytest.mark.parametrize("probability", [0.5, 0.6, 0.9, 0.995])
@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 7, 8, 49, 200])
def test_quantiles_are_scipys(probability, freedom):
    stats = pytest.importorskip("scipy.stats", reason="scipy is not installed")
    assert t_quantile(probability, freedom) == pytest.approx(stats.t.ppf(probability, freedom), rel=1e-9, abs=1e-9)


def test_a_difference_by_hand():
    """Differences 0.1, 0.2, 0.3: mean 0.2, standard deviation 0.1, so 4.3027 × 0.1 / √3 on both sides."""
    [difference] = paired_differences([1.0, 2.0, 3.0], [1.1, 2.2, 3.3])
    assert difference.mean == pytest.approx(0.2)
    assert difference.half_width == pytest.approx(4.30265 * 0.1 / math.sqrt(3), rel=1e-5)
    assert difference.seen is False


def test_the_interval_of_one_other_is_scipys():
    stats = pytest.importorskip("scipy.stats", reason="scipy is not installed")
    base, other = [1.91, 1.95, 1.93, 1.99], [1.88, 1.93, 1.92, 1.95]
    interval = stats.ttest_rel(other, base).confidence_interval(0.95)
    [difference] = paired_differences(base, other)
    assert difference.mean - difference.half_width == pytest.approx(interval.low)
    assert difference.mean + difference.half_width == pytest.approx(interval.high)
    assert difference.seen and interval.high < 0


def test_variants_share_the_estimate_of_the_spread():
    """By least squares: the standard error of a variant's coefficient, with an indicator of each variant and seed."""
    base, others = [1.91, 1.95, 1.93, 1.99], [[1.88, 1.93, 1.92, 1.95], [2.01, 2.08, 1.99, 2.05]]
    y = torch.tensor([base, *others], dtype=torch.float64).flatten()
    variant, seed = (torch.eye(n, dtype=torch.float64)[:, 1:] for n in (3, 4))
    x = torch.cat([torch.ones(12, 1), variant.repeat_interleave(4, 0), seed.repeat(3, 1)], 1)
    inverse = torch.linalg.inv(x.T @ x)
    coefficients = inverse @ x.T @ y
    error = ((y - x @ coefficients).square().sum() / (12 - 6) * inverse.diagonal()).sqrt()
    found = paired_differences(base, *others)
    assert [d.mean for d in found] == pytest.approx(coefficients[1:3].tolist())
    assert [d.half_width for d in found] == pytest.approx((2.446912 * error[1:3]).tolist())  # t(0.975, 6)


def test_pairs_cancel_what_a_seed_does_to_both():
    """Unpaired, 0.01 would drown in the seeds' spread of 0.5."""
    assert paired_differences([1.0, 1.5, 2.0], [1.0099, 1.5101, 2.01])[0].seen is True


def test_one_pair_has_no_interval():
    difference, _ = paired_differences([2.0], [1.5], [3.0])
    assert (difference.mean, difference.half_width, difference.seen) == (-0.5, None, None)


def test_equal_runs_differ_by_nothing():
    assert paired_differences([1.0, 2.0], [1.0, 2.0])[0].seen is False
