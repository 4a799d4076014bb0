"""lm-eval's class for transformers' models, with what a moonwhale needs. It imports lm-eval, an optional package."""

import logging

from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs

log = logging.getLogger(__name__)


class HarnessModel(HFLM):
    """An HFLM whose documents begin with one bos, and that keeps to the context in `max_length`.

    Where HFLM would raise an AssertionError, answers are shortened with a warning, and choices are refused in one line.
    """

    def generate_until(self, requests: list, disable_tqdm: bool = False) -> list[str]:
        """Ends answers after half of the context if a task lets them fill it."""
        context, shorter, longest = self.max_length, self.max_length // 2, 0
        for request in requests:
            prompt, settings, *rest = request.args
            length = normalize_gen_kwargs(settings, self.max_gen_toks)["max_gen_toks"]
            if length >= context:
                longest = max(longest, length)
                request.arguments = (prompt, settings | {"max_gen_toks": shorter}, *rest)
        if longest:
            log.warning(
                "`lm_eval`: answers of up to %d tokens do not fit a context of %d: they end after %d",
                longest,
                context,
                shorter,
            )
        return super().generate_until(requests, disable_tqdm)

    def loglikelihood_rolling(self, requests: list, disable_tqdm: bool = False) -> list[float]:
        """Lets a text begin with lm-eval's own bos, without the tokenizer's after it.

        Else bos would be predicted after bos, which no text in training has.
        """
        self.add_bos_token = False
        try:
            return super().loglikelihood_rolling(requests, disable_tqdm)
        finally:
            self.add_bos_token = None  # as the tokenizer does

    def _loglikelihood_tokens(self, requests: list, *args, **options) -> list[tuple[float, bool]]:
        """Scores choices, each a tuple (texts, ids of the prompt, ids of the choice).

        Raises:
            ValueError: a choice fills more than the context.
        """
        longest = max((len(choice) for *_, choice in requests), default=0)
        if longest > self.max_length:
            raise ValueError(
                f"a choice of {longest:,} tokens exceeds the context of {self.max_length:,}: leave its task out"
            )
        return super()._loglikelihood_tokens(requests, *args, **options)
