"""Trains runs by turns, and tells how long that will take."""

import sys
import time

from tqdm.auto import tqdm

from moonwhale.lab.config import Comparison
from moonwhale.lab.runs import Run
from moonwhale.processes import print_on_rank_0
from moonwhale.train.callbacks import StopAtStepEnd
from moonwhale.units import duration


class Training:
    """Trains runs by turns, so that a machine that is busy for a while slows all variants alike.

    Use it as a context manager: inside it, Ctrl-C ends the step at hand and saves a checkpoint.
    """

    def __init__(self, asked: Comparison):
        self.unit = "s" if asked.budget.unit == "seconds" else "steps"
        self.stop = StopAtStepEnd()
        self._left = 0.0  # of the budgets of all runs, until it is told how long that takes

    def __enter__(self):
        self.stop.__enter__()
        return self

    def __exit__(self, *error):
        self.stop.__exit__(*error)

    def finish(self, runs: list[Run]) -> None:
        """Trains runs to their ends, seed by seed. The run that is furthest behind its seed's others comes next.

        Raises:
            KeyboardInterrupt: the user asked to stop.
        """
        todo = [run for run in runs if run.result is None]
        self._announce(len(runs), todo)
        with tqdm(
            total=sum(run.budget.amount for run in todo),
            initial=sum(run.position for run in todo),
            dynamic_ncols=True,
            leave=False,
            disable=None,
            bar_format="{desc}: {percentage:.0f}%|{bar}| {n:.0f}/{total:.0f} " + self.unit + " [{elapsed}<{remaining}]",
        ) as bar:
            for seed in dict.fromkeys(run.config.seed for run in todo):
                of_seed = [run for run in todo if run.config.seed == seed]
                while left := [run for run in of_seed if run.result is None]:
                    self._take_turn(min(left, key=lambda run: run.share), bar)

    def _announce(self, n_runs: int, todo: list[Run]) -> None:
        """Says how much there is to train. The first turn tells how long all of it takes."""
        there = n_runs - len(todo)
        if not todo:
            print_on_rank_0(f"runs       all {there} are there already")
            return
        self._left = sum(run.budget.amount - run.position for run in todo)
        amount = f"{duration(self._left)} of training" if self.unit == "s" else f"{self._left:,.0f} steps"
        known = f", {there} are there already" if there else ""
        print_on_rank_0(f"runs       {len(todo)} to train{known}: {amount}; evaluations and checkpoints come on top")

    def _take_turn(self, run: Run, bar: tqdm) -> None:
        """Trains a run for one turn, and prints its result if it was the last.

        Raises:
            KeyboardInterrupt: the user asked to stop.
            RuntimeError: the turn trained no step.
        """
        bar.set_description_str(run.name)
        before, start, position = bar.n, time.perf_counter(), run.position

        def on_step(position_now: float) -> None:
            bar.update(before + position_now - position - bar.n)

        run.take_turn(on_step, [self.stop])
        if self.stop.stop_requested:
            print_on_rank_0("stopped    all runs are saved; go on with the same command")
            raise KeyboardInterrupt
        if run.result is not None:
            bar.update(before + run.budget.amount - position - bar.n)
            tqdm.write(f"{run.name}: {_outcome(run.result)}", file=sys.stdout)
        elif run.position <= position:  # the run would come next for ever
            raise RuntimeError(f"{run.name}: a turn trained no step")
        elif self._left:
            seconds = (time.perf_counter() - start) / (run.position - position) * self._left
            tqdm.write(
                f"time       about {duration(seconds)} in all, if it goes on like the first turn", file=sys.stdout
            )
            self._left = 0
        sys.stdout.flush()


def _outcome(result: dict) -> str:
    if "diverged" in result:
        return f"diverged at {result['diverged']}"
    return f"{result['bits_per_byte']:.4f} bits per byte, {result['tokens_per_second']:,.0f} tokens/s"
