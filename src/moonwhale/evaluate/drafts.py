"""Measures what MTP's drafts gain: how often each module's draft is accepted, and the tokens per forward."""

from collections.abc import Sequence
from itertools import zip_longest

import numpy as np
from tqdm import tqdm

from moonwhale.data.packing import PackedDataset
from moonwhale.infer.engine import Completion, Engine

NUM_DOCUMENTS = 32
PROMPT_TOKENS = 64
ANSWER_TOKENS = 64


def score_drafts(completions: Sequence[Completion]) -> dict:
    """Returns how many drafts of greedy answers were accepted. Each cycle drafts one token per MTP module.

    Returns:
        tokens: tokens generated.
        tokens_per_forward: tokens per forward of the main model. 1 is plain decoding; 1 + modules is the most possible.
        acceptance: for each module, the share of its drafts that were accepted, among those whose predecessors were.
    """
    tokens = sum(len(c.token_ids) for c in completions)
    forwards = sum(c.forwards for c in completions)
    # Answers differ in how many depths they have tested.
    tested = map(sum, zip_longest(*(c.drafted for c in completions), fillvalue=0))
    accepted = map(sum, zip_longest(*(c.accepted for c in completions), fillvalue=0))
    acceptance = [n / max(of, 1) for n, of in zip(accepted, tested, strict=True)]
    return {"tokens": tokens, "tokens_per_forward": tokens / forwards, "acceptance": acceptance}


def continue_text(engine: Engine, text: PackedDataset) -> list[Completion]:
    """Continues the beginnings of up to 32 documents greedily. The documents are spread over the text."""
    n = min(NUM_DOCUMENTS, text.n_documents)
    chosen = np.linspace(0, text.n_documents - 1, n).astype(int)
    prompt_tokens = min(PROMPT_TOKENS, engine.context // 2)
    prompts = [text.beginning(document, prompt_tokens).tolist() for document in chosen]
    answers = engine.as_completed(prompts, temperature=0.0, max_new_tokens=ANSWER_TOKENS)
    completions = dict(tqdm(answers, desc="drafts", total=n, unit=" texts", leave=False, disable=None))
    return [completions[i] for i in range(n)]
