"""`--tune lr`: the learning rate of each variant that is best on the same budget."""

import dataclasses

from moonwhale.lab.config import Comparison
from moonwhale.lab.runs import Rows, Run
from moonwhale.lab.training import Training
from moonwhale.lab.variants import Variant
from moonwhale.options import merge
from moonwhale.processes import print_on_rank_0

FACTORS = (0.5, 1.0, 2.0)  # of the variant's own rate
MOST_EXTENSIONS = 4  # beyond one end of the grid


def tune(asked: Comparison, rows: Rows, training: Training) -> Comparison:
    """Gives each variant the learning rate with the fewest bits per byte on the tuning rows, for the first seed.

    The grid of each variant is extended while its best rate lies at an end. The best runs are reused as the runs of
    the first seed.
    """
    grids = {
        variant.name: {factor: _run(asked, variant, factor, rows) for factor in FACTORS} for variant in asked.variants
    }
    training.finish([run for grid in grids.values() for run in grid.values()])
    for _ in range(MOST_EXTENSIONS):
        new = []
        for variant in asked.variants:
            grid = grids[variant.name]
            if factor := next_factor(scores(grid)):
                grid[factor] = _run(asked, variant, factor, rows)
                new.append(grid[factor])
        if not new:
            break
        training.finish(new)
    tuned = []
    for variant in asked.variants:
        found = scores(grids[variant.name])
        factor = best_factor(found)
        rate = asked.config(variant).lr * factor
        edge = ", at the grid's end" if factor in (min(found), max(found)) else ""
        shown = ", ".join(f"{asked.config(variant).lr * f:.3g}: {found[f]:.4f}" for f in sorted(found))
        print_on_rank_0(f"rate       {variant.name}: {rate:.3g}{edge} (bits per byte by rate {shown})")
        tuned.append(dataclasses.replace(variant, changes=merge(variant.changes, {"lr": rate})))
    return dataclasses.replace(asked, variants=tuple(tuned))


def scores(grid: dict[float, Run]) -> dict[float, float]:
    """Returns the bits per byte on the tuning rows, by factor."""
    return {factor: run.tuning_score for factor, run in grid.items()}


def best_factor(found: dict[float, float]) -> float:
    """Returns the factor with the fewest bits per byte. If all runs diverged, that is the smallest factor."""
    return min(sorted(found), key=found.get)


def next_factor(found: dict[float, float]) -> float | None:
    """Returns the factor beyond the end at which the best one lies, or None if it lies inside the grid."""
    best = best_factor(found)
    if best == min(found):
        return best / 2
    return best * 2 if best == max(found) else None


def _run(asked: Comparison, variant: Variant, factor: float, rows: Rows) -> Run:
    changes = merge(variant.changes, {"lr": asked.config(variant).lr * factor})
    return Run(asked, dataclasses.replace(variant, changes=changes), 0, rows)
