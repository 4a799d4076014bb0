"""`Request`: one prompt, its options, and the answer so far."""

import time
from dataclasses import dataclass, field

from torch import Tensor

from moonwhale.infer.detokenizer import TextStream
from moonwhale.infer.sampling import Noise
from moonwhale.infer.sampling_options import SamplingOptions


@dataclass(eq=False)
class Request:
    """One prompt and the tokens that have been generated for it.

    `Completion` explains the fields that it takes over. `forwards` counts prefill as one.

    logprobs: for each token, its log-probability and those of the most likely tokens as {id: log-probability}. Recorded
        if `top_logprobs`, the number of these tokens, is not None.
    prompt_logprobs: the same for each token of the prompt but the first. Recorded if `scores_prompt`.
    limit: the largest number of tokens to add. 0 ends the request after its prefill.
    """

    prompt: list[int]
    options: SamplingOptions
    eos: set[int]
    text: TextStream
    noise: Noise
    limit: int
    top_logprobs: int | None = None
    scores_prompt: bool = False

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[tuple[float, dict[int, float]]] = field(default_factory=list)
    prompt_logprobs: list[tuple[float, dict[int, float]]] = field(default_factory=list)
    finish_reason: str | None = None
    forwards: int = 0
    drafted: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)
    start: float = field(default_factory=time.perf_counter)
    seconds: float = 0.0

    # The scheduler's state between two steps
    cached: int = 0  # tokens of prompt and answer whose entries are in the cache
    drafts: list[int] = field(default_factory=list)  # tokens to verify in the next step
    verdicts: list[bool] = field(default_factory=list)  # whether each draft that was verified last was accepted
    hidden: Tensor | None = None  # (Q, hidden) states of the last cached tokens, which `Scheduler._draft` needs

    @property
    def n_accepted(self) -> int:
        """The number of drafts that the last step accepted."""
        return sum(self.verdicts)

    @property
    def ids(self) -> list[int]:
        """The ids of prompt and answer."""
        return self.prompt + self.token_ids

    def push(self, token: int) -> None:
        """Add a generated token, and finish the request if it is the last one."""
        self.token_ids.append(token)
        if token in self.eos:
            self.finish_reason = "eos"
        elif self.text.push(token):
            self.finish_reason = "stop"
        elif len(self.token_ids) == self.limit:
            self.finish_reason = "length"
        if self.finish_reason in ("eos", "length"):
            self.text.flush()
        self.noise.forget(len(self.token_ids))
        self.seconds = time.perf_counter() - self.start

    def count_drafts(self) -> None:
        """Add the last step's drafts to the statistics. Those after a rejected one, or after the answer's end, were not
        verified.
        """
        depth = len(self.drafts)
        self.drafted += [0] * (depth - len(self.drafted))
        self.accepted += [0] * (depth - len(self.accepted))
        for k, accepted in enumerate(self.verdicts):
            self.drafted[k] += 1
            self.accepted[k] += accepted
