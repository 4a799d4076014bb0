"""The next token of each sequence: its options shape the logits, and its seed and position alone decide the draw.

A token is drawn as `argmax(probability / noise)` with exponential noise, which has exactly these probabilities (the
Gumbel-max trick). The noise of the n-th token depends only on the request's seed and n. An MTP module that drafts this
token uses the same noise with its own probabilities, so it often drafts what the main model will draw. The main model
draws what it would have drawn without the draft (coupling without communication, arXiv 2408.07978).
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

GREEDY = 1e-6  # a lower temperature tells apart logits that fp32 does not, and dividing by it could overflow
LARGEST = 1e30  # logits after an extreme penalty, which a temperature can still divide without overflow


class Noise:
    """Exponential noise (vocabulary,) fp32 for each token of one answer, drawn in order."""

    def __init__(self, seed: int, vocabulary: int, device: torch.device):
        if device.type == "cpu":  # NumPy takes a third of torch's time, which is a tenth of a step
            numpy_generator = np.random.Generator(np.random.Philox(key=seed))
            # In fp64: fp32's numbers near 0 lie 1e-7 apart and include 0, at which an excluded token would be drawn.
            self._draw = lambda: torch.from_numpy(numpy_generator.standard_exponential(vocabulary)).float()
        else:
            generator = torch.Generator(device).manual_seed(seed)
            self._draw = lambda: torch.empty(vocabulary, device=device).exponential_(generator=generator)
        self._first, self._drawn = 0, []

    def of(self, n: int) -> Tensor:
        """Return the noise of the n-th token. It must not be forgotten yet."""
        while n >= self._first + len(self._drawn):
            self._drawn.append(self._draw())
        return self._drawn[n - self._first]

    def forget(self, n: int) -> None:
        """Free the noise of the tokens before the n-th."""
        while self._drawn and self._first < n:
            self._first += 1
            del self._drawn[0]


def choose(logits: Tensor, requests: list, ahead: int = 0) -> list[int]:
    """Choose the next token of each request from its row of logits (N, V), or the token `ahead` positions later.

    If V is smaller than the vocabulary, the logits are those of its first tokens.
    """
    chosen: list[int] = [0] * len(requests)
    numbered = sorted(enumerate(requests), key=lambda pair: _key(pair[1].options))
    for _, group in groupby(numbered, key=lambda pair: _key(pair[1].options)):
        rows, members = zip(*group, strict=True)
        group_logits = logits if len(rows) == len(requests) else logits[list(rows)]
        tokens = _choose_with_same_options(group_logits.float(), members, ahead)
        for row, token in zip(rows, tokens, strict=True):
            chosen[row] = token
    return chosen


def logprobs_of(logits: Tensor, tokens: list[int], num_top: int) -> list[tuple[float, dict[int, float]]]:
    """Return each token's log-probability under its row of logits (N, V), and those of the `num_top` likeliest ids."""
    logprobs = logits.float().log_softmax(-1)
    top = logprobs.topk(min(num_top, logits.shape[1]))
    alternatives = zip(top.indices.tolist(), top.values.tolist(), strict=True)
    return [
        (row[token].item(), dict(zip(ids, values, strict=True)))
        for row, token, (ids, values) in zip(logprobs, tokens, alternatives, strict=True)
    ]


def _choose_with_same_options(scores: Tensor, requests: tuple, ahead: int) -> list[int]:
    options: SamplingOptions = requests[0].options
    if options.repetition_penalty != 1:
        penalty = RepetitionPenaltyLogitsProcessor(float(options.repetition_penalty))
        scores = scores.clone()  # the log-probabilities that are reported are those of the model's own logits
        for i, request in enumerate(requests):
            seen = [token for token in request.ids if token < scores.shape[1]]
            scores[i] = penalty(torch.tensor([seen], device=scores.device), scores[i : i + 1].clone())[0]
        scores.clamp_(-LARGEST, LARGEST)
    if options.temperature < GREEDY:
        return scores.argmax(-1).tolist()
    for warper in _warpers(*_key(options)[:-1]):  # transformers' own list inspects signatures first: 0.1 ms a token
        scores = warper(None, scores)
    probabilities = scores.softmax(-1)
    noise = torch.stack([r.noise.of(len(r.token_ids) + ahead)[: scores.shape[1]] for r in requests])
    return (probabilities / noise).argmax(-1).tolist()


def _key(options: SamplingOptions) -> tuple[float, int, float, float, float]:
    """The options that decide how logits are shaped. Requests with the same key are sampled together."""
    return options.temperature, options.top_k, options.top_p, options.min_p, options.repetition_penalty


@lru_cache(maxsize=64)
def _warpers(temperature: float, top_k: int, top_p: float, min_p: float) -> list:
    """The logits warpers, in the order of transformers' `generate`."""
    warpers = [TemperatureLogitsWarper(float(temperature))]
    if top_k > 0:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        warpers.append(TopPLogitsWarper(float(top_p)))
    if min_p > 0:
        warpers.append(MinPLogitsWarper(float(min_p)))
    return warpers
