"""What MTP drafts gain: how often each module's guess holds, and tokens for each run of the main model."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest

import numpy as np
from tqdm import tqdm

from moonwhale.data.packing import PackedDataset
from moonwhale.infer.engine import Completion, Engine

DOCUMENTS, PROMPT, ANSWER = 32, 64, 64  # how many are gone on from, after how many tokens, for how many


@dataclass(frozen=True)
class DraftScore:
    """Of greedy answers with as many drafts a cycle as there are modules.

    acceptance: for each module, the share of its guesses that held, of those whose predecessors did.
    tokens_per_forward: 1 is plain decoding, 1 + modules the most there can be.
    """

    tokens: int
    tokens_per_forward: float
    acceptance: list[float]

    @classmethod
    def of(cls, completions: Sequence[Completion]) -> "DraftScore":
        tokens = sum(len(c.token_ids) for c in completions)
        depths = zip_longest(*(zip(c.accepted, c.drafted, strict=True) for c in completions), fillvalue=(0, 0))
        sums = [[sum(column) for column in zip(*depth, strict=True)] for depth in depths]
        return cls(
            tokens, tokens / sum(c.forwards for c in completions), [held / max(tested, 1) for held, tested in sums]
        )


def continue_text(engine: Engine, text: PackedDataset) -> list[Completion]:
    """Greedy continuations of the beginnings of 32 documents, or as many as there are, spread over the text."""
    n = min(DOCUMENTS, text.n_documents)
    chosen = np.linspace(0, text.n_documents - 1, n).astype(int)
    prompts = [text.beginning(document, min(PROMPT, engine.context // 2)).tolist() for document in chosen]
    answers = engine.as_completed(prompts, temperature=0.0, max_new_tokens=ANSWER)
    done = dict(tqdm(answers, desc="drafts", total=n, unit=" texts", leave=False, disable=None))
    return [done[i] for i in range(n)]
