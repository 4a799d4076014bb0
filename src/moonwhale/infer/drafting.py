"""How many tokens the MTP modules shall draft: as many as pay, by what a cycle takes and how often guesses hold."""

from collections import defaultdict, deque

TRIED = 3  # cycles after which a depth's time counts as known
LASTS = 16  # cycles that a choice lasts
AGAIN = 16  # choices after which every depth is tried anew; at first sooner, after 1, 2, 4, 8 and so on
LATEST = 1024  # cycles of a depth that are remembered: a machine's hiccup must not be all that is known of one
SURE = 8  # choices after which a depth that can't pay is not tried any more
HELD = 64  # guesses over which the share of those that held is averaged
MARGIN = 1.05  # a depth has to promise this much more than none: reading prompts takes longer with modules, too


class Drafting:
    """Chooses the depth, from 0 (off) to the number of modules, that gives the most tokens a second.

    A cycle at depth d makes d guesses and verifies them in one forward, whose time is measured for each number of
    sequences (in powers of 2). `fixed` takes the decision out of its hands.
    """

    def __init__(self, modules: int, fixed: int | None = None):
        self.depths = range(modules + 1) if fixed is None else range(min(fixed, modules), min(fixed, modules) + 1)
        self._seconds = defaultdict(lambda: deque(maxlen=LATEST))
        self._held, self._tested = [0.5] * modules, [0] * modules
        self._chosen = defaultdict(lambda: (0, 0))  # for each number of sequences, a depth and how long it still lasts
        self._choices = 0

    def depth(self, sequences: int) -> int:
        """The depth of the next cycle."""
        if len(self.depths) == 1:
            return self.depths[0]
        size = sequences.bit_length()
        depth, lasts = self._chosen[size]
        if not lasts:
            known = {d: self._seconds[size, d] for d in self.depths}
            self._choices += 1
            if self._choices % min(AGAIN, 1 << (self._choices.bit_length() - 1)) == 0:
                # A depth at which even guesses that all hold would not pay is left alone, and then depth 0 is, too:
                # only times measured over the same while can be compared.
                plain = 1 / min(known[0]) if known[0] and self._choices > SURE else 0.0
                others = [d for d in self.depths if d and not (known[d] and (d + 1) / min(known[d]) < plain)]
                for d in [0, *others] if others else []:
                    while len(known[d]) >= TRIED:
                        known[d].popleft()
            untried = [d for d, seconds in known.items() if len(seconds) < TRIED]
            if untried:
                return untried[0]
            # The least time of several: whatever else the machine did can only have added to it.
            depth = max(known, key=lambda d: self._gain(d) / min(known[d]) / (MARGIN if d else 1))
            lasts = LASTS
        self._chosen[size] = depth, lasts - 1
        return depth

    def record(self, sequences: int, depth: int, seconds: float, held: list[int]) -> None:
        """A cycle: how long it took, and how many guesses held in each sequence that made `depth` of them."""
        self._seconds[sequences.bit_length(), depth].append(seconds)
        for n in held:
            for k in range(min(n + 1, depth)):  # a guess behind a wrong one was never put to the test
                self._tested[k] = min(self._tested[k] + 1, HELD)
                self._held[k] += ((k < n) - self._held[k]) / self._tested[k]

    def _gain(self, depth: int) -> float:
        """Tokens a sequence is expected to gain in a cycle."""
        gain = reach = 1.0
        for share in self._held[:depth]:
            reach *= share
            gain += reach
        return gain
