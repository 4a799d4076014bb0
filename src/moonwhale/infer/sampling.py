"""The next token of each sequence: logits shaped by its options, and a draw that only its seed and its position decide.

A token is drawn as `argmax(probability / noise)` with exponential noise, which has just these probabilities (the
Gumbel-max trick). The noise of the n-th token comes from the request's seed and n alone. So whoever guesses that token
ahead with the same noise, an MTP module from its own probabilities, often guesses what the main model will draw, and
the main model draws what it would have drawn without the guess (coupling without communication, arXiv 2408.07978).
"""

from functools import lru_cache
from itertools import groupby

import numpy as np
import torch
from torch import Tensor
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from moonwhale.infer.sampling_options import SamplingOptions


class Noise:
    """Exponential noise for the tokens of one answer, drawn in order, each (vocabulary,) fp32."""

    def __init__(self, seed: int, vocabulary: int, device: torch.device):
        if device.type == "cpu":  # NumPy takes a third of torch's time, which is a tenth of a step
            of = np.random.Generator(np.random.Philox(key=seed))
            self._draw = lambda: torch.from_numpy(of.standard_exponential(vocabulary, dtype=np.float32))
        else:
            by = torch.Generator(device).manual_seed(seed)
            self._draw = lambda: torch.empty(vocabulary, device=device).exponential_(generator=by)
        self._first, self._drawn = 0, []

    def of(self, n: int) -> Tensor:
        """That of the n-th token, where n never goes back behind an earlier call's by more than drafts reach."""
        while n >= self._first + len(self._drawn):
            self._drawn.append(self._draw())
        return self._drawn[n - self._first]

    def forget(self, n: int) -> None:
        """Everything before the n-th token."""
        while self._drawn and self._first < n:
            self._first += 1
            del self._drawn[0]


def choose(logits: Tensor, requests: list, ahead: int = 0) -> list[int]:
    """The next token of each request from its row of (N, V) logits, or, `ahead` > 0, so many tokens later.

    Logits of fewer words than the vocabulary are of its first ones.
    """
    chosen: list[int] = [0] * len(requests)
    numbered = sorted(enumerate(requests), key=lambda pair: _key(pair[1].options))
    for _, group in groupby(numbered, key=lambda pair: _key(pair[1].options)):
        rows, members = zip(*group, strict=True)
        alike = logits if len(rows) == len(requests) else logits[list(rows)]
        tokens = _choose_alike(alike.float(), members, ahead)
        for row, token in zip(rows, tokens, strict=True):
            chosen[row] = token
    return chosen


def _choose_alike(scores: Tensor, requests: tuple, ahead: int) -> list[int]:
    """`choose` for requests of the same options, which must keep their order within the batch."""
    options: SamplingOptions = requests[0].options
    if options.repetition_penalty != 1:
        penalty = RepetitionPenaltyLogitsProcessor(float(options.repetition_penalty))
        for i, request in enumerate(requests):
            seen = [token for token in request.ids if token < scores.shape[1]]
            scores[i] = penalty(torch.tensor([seen], device=scores.device), scores[i : i + 1].clone())[0]
    if options.temperature == 0:
        return scores.argmax(-1).tolist()
    for warper in _warpers(*_key(options)):  # transformers' list of them looks at signatures first: 0.1 ms a token
        scores = warper(None, scores)
    probabilities = scores.softmax(-1)
    noise = torch.stack([r.noise.of(len(r.token_ids) + ahead)[: scores.shape[1]] for r in requests])
    return (probabilities / noise).argmax(-1).tolist()


def _key(options: SamplingOptions) -> tuple[float, int, float, float, float]:
    return options.temperature, options.top_k, options.top_p, options.min_p, options.repetition_penalty


@lru_cache(maxsize=64)
def _warpers(temperature: float, top_k: int, top_p: float, min_p: float, _: float) -> list:
    """What is done to the logits, in the order in which `generate` of transformers does it."""
    warpers = [TemperatureLogitsWarper(float(temperature))]
    if top_k > 0:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        warpers.append(TopPLogitsWarper(float(top_p)))
    if min_p > 0:
        warpers.append(MinPLogitsWarper(float(min_p)))
    return warpers
