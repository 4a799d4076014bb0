"""`Drafting`: how many tokens the MTP modules should draft in each cycle.

1. A trial runs every depth twice, in turn, and keeps the shorter time of each: other work on the machine can only
   lengthen a cycle, and only times from the same moment can be compared.
2. Between trials each cycle takes the depth with the most expected tokens per second, by these times and by the share
   of recent drafts that were accepted.
3. The next trial comes after 16 cycles, after 64 if the same depth has won twice, and after 256 if it has won more
   often. If even drafts that were all accepted would not pay then, there are no more trials.
"""

import math
from collections import defaultdict
from dataclasses import dataclass, field

TRIAL_CYCLES = 2  # cycles of each depth in a trial
INTERVALS = 16, 64, 256  # cycles until the next trial, by the number of trials that the same depth has won in a row
RECENT_DRAFTS = 64  # drafts over which the share of accepted ones is averaged
MIN_GAIN = 1.05  # drafting must promise this much more than none, because prefill takes longer with modules


@dataclass
class _Trials:
    """The trials with one number of sequences."""

    seconds: dict[int, list[float]] = field(default_factory=dict)  # cycle times of each depth in the latest trial
    running: bool = True
    winner: int | None = None  # the depth that won the latest trial
    wins: int = 0  # trials that it has won in a row
    cycles_left: float = 0  # until the next trial


class Drafting:
    """Chooses a depth from 0 (no drafts) to the number of modules, for the most tokens per second.

    A cycle at depth d drafts d tokens and verifies them in one forward. Its time is measured separately for different
    numbers of sequences (in powers of 2). With `fixed`, the depth is always that one.
    """

    def __init__(self, modules: int, fixed: int | None = None):
        self.depths = range(modules + 1) if fixed is None else range(min(fixed, modules), min(fixed, modules) + 1)
        self._trials: defaultdict[int, _Trials] = defaultdict(lambda: _Trials({depth: [] for depth in self.depths}))
        self._accepted, self._verified = [0.5] * modules, [0] * modules  # share of drafts accepted, drafts averaged

    def depth(self, sequences: int) -> int:
        """Return the depth of the next cycle."""
        if len(self.depths) == 1:
            return self.depths[0]
        trials = self._trials[sequences.bit_length()]
        if not trials.running and trials.cycles_left == 0:
            trials.running = True
            trials.seconds = {depth: [] for depth in self.depths}
        if trials.running:
            # The deepest first, so that the modules see the prompt, which is prefilled as deep as the cycle drafts
            depth = min(reversed(self.depths), key=lambda depth: len(trials.seconds[depth]))
            if len(trials.seconds[depth]) < TRIAL_CYCLES:
                return depth
            self._end_trial(trials)
        trials.cycles_left -= 1
        return self._best_depth(trials)

    def record(self, depth: int, seconds: float, verdicts: list[list[bool]]) -> None:
        """Record a cycle: its time, and for each sequence which of its verified drafts were accepted."""
        trials = self._trials[len(verdicts).bit_length()]
        if trials.running and len(self.depths) > 1:  # with one depth no trial ever ends
            trials.seconds[depth].append(seconds)
        for of_sequence in verdicts:
            for k, accepted in enumerate(of_sequence):
                self._verified[k] = min(self._verified[k] + 1, RECENT_DRAFTS)
                self._accepted[k] += (accepted - self._accepted[k]) / self._verified[k]

    def _end_trial(self, trials: _Trials) -> None:
        """Decide when the next trial comes."""
        winner = self._best_depth(trials)
        trials.wins = trials.wins + 1 if winner == trials.winner else 1
        trials.running, trials.winner = False, winner
        trials.cycles_left = INTERVALS[min(trials.wins, len(INTERVALS)) - 1]
        plain = 1 / min(trials.seconds[0])
        can_pay = any((depth + 1) / min(trials.seconds[depth]) > plain for depth in self.depths if depth)
        if trials.wins >= len(INTERVALS) and not can_pay:
            trials.cycles_left = math.inf

    def _best_depth(self, trials: _Trials) -> int:
        def promise(depth: int) -> float:
            """Expected tokens per second of one sequence."""
            return self._expected_tokens(depth) / min(trials.seconds[depth]) / (MIN_GAIN if depth else 1)

        return max(self.depths, key=promise)

    def _expected_tokens(self, depth: int) -> float:
        """Tokens that a cycle is expected to add to a sequence."""
        expected = reached = 1.0
        for share in self._accepted[:depth]:
            reached *= share
            expected += reached
        return expected
