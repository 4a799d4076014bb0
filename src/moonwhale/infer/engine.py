"""Inference: continue texts, ids or conversations, a batch at a time, on the latent cache."""

import secrets
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache, PreTrainedTokenizerFast
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from moonwhale import precision as precisions
from moonwhale.data.chat import encode_prompt
from moonwhale.errors import UserError
from moonwhale.infer.checkpoint import open_checkpoint
from moonwhale.infer.sampling import SamplingOptions
from moonwhale.infer.text import TextStream, TokenBytes
from moonwhale.model import MoonwhaleForCausalLM

Prompt = str | list[int] | list[dict]  # a text to continue, ids as they are, or chat messages to answer


@dataclass(frozen=True)
class Completion:
    """What the model wrote.

    text: without control tokens and without the stop string that ended it.
    token_ids: every token it chose, the one that ended it included.
    finish_reason: "eos", "stop" (a stop string) or "length" (max_new_tokens or a full context); None while running.
    seconds: from the call to the last token, the reading of the prompt included.
    """

    text: str
    token_ids: list[int]
    finish_reason: str | None
    prompt_tokens: int
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        return len(self.token_ids) / self.seconds if self.seconds else 0.0


class Engine:
    """A model, in evaluation mode, and its tokenizer.

    Options of `generate` and `stream` are the fields of `SamplingOptions`.
    """

    def __init__(self, model: MoonwhaleForCausalLM, tokenizer: PreTrainedTokenizerFast):
        self.model, self.tokenizer = model, tokenizer
        self.context = model.config.max_position_embeddings
        known = model.generation_config.eos_token_id
        self.eos = {tokenizer.eos_token_id, *(known if isinstance(known, list) else [known])} - {None}
        self._token_bytes = TokenBytes(tokenizer)

    @classmethod
    def load(cls, folder: str | Path, device: str = "auto", precision: str = "auto") -> "Engine":
        """Opens a checkpoint folder on a device, with weights in fp32 or bf16 (`auto`: the faster one there).

        Raises UserError as `open_checkpoint` and `precision.choose`.
        """
        choice = precisions.choose(device, precision)
        # A token a step is too little work for a CPU's bf16 units: fp32 was measured up to twice as fast.
        dtype = torch.float32 if choice.device.type == "cpu" and precision == "auto" else choice.dtype
        model, tokenizer = open_checkpoint(folder, dtype)
        return cls(model.to(choice.device), tokenizer)

    def encode(self, prompt: Prompt) -> list[int]:
        """Ids of a prompt: a text after bos, ids unchanged, messages through the chat template, ready for the answer.

        Raises:
            UserError: the prompt is empty or malformed, or leaves no room in the context for a single token.
        """
        if isinstance(prompt, str):
            ids = encode_prompt(self.tokenizer, _utf8(prompt))
        elif prompt and isinstance(prompt[0], dict):
            ids = self._encode_messages(prompt)
        else:
            ids = list(prompt)
        if not ids:
            raise UserError("the prompt is empty: give at least one token")
        vocabulary = self.model.config.vocab_size
        if not all(0 <= id < vocabulary for id in ids):
            raise UserError(f"the prompt has ids outside of the model's vocabulary, 0 to {vocabulary - 1}")
        if len(ids) + 1 > self.context:
            raise UserError(
                f"the prompt has {len(ids):,} tokens, and with at least one more it exceeds the model's context of "
                f"{self.context:,}: shorten it"
            )
        return ids

    def generate(self, prompts: Sequence[Prompt], **options) -> list[Completion]:
        """Continues all prompts as one batch. A row comes out as it would alone (with seed + its index as the seed).

        Raises UserError for impossible options and as `encode`.
        """
        if isinstance(prompts, str):
            raise TypeError("generate takes a list of prompts")
        settings = SamplingOptions(**options)
        rows = self._rows(prompts, settings)
        for _ in self._steps(rows, settings):
            pass
        return [row.completion() for row in rows]

    def stream(self, prompt: Prompt, **options) -> "Stream":
        """Continues one prompt; iterate over the result for its text in pieces. Raises UserError as `generate`."""
        settings = SamplingOptions(**options)
        rows = self._rows([prompt], settings)
        return Stream(rows[0], self._steps(rows, settings))

    def _encode_messages(self, messages: list[dict]) -> list[int]:
        if not all(isinstance(message.get("content"), str) for message in messages):
            raise UserError('a chat message needs "role" and "content", both text')
        clean = [message | {"content": _utf8(message["content"])} for message in messages]
        try:
            # Sanitized, so that what a user types can't pass for a control token.
            return self.tokenizer.apply_chat_template(clean, add_generation_prompt=True, sanitize_control_tokens=True)[
                "input_ids"
            ]
        except jinja2.TemplateError as error:
            raise UserError(f"the tokenizer's chat template refuses the conversation: {error}") from error

    def _rows(self, prompts: Sequence[Prompt], options: SamplingOptions) -> list["_Row"]:
        assert not self.model.training, "sampling would count in the statistics of training"
        seed = secrets.randbits(62) if options.seed is None else options.seed
        return [_Row(self, self.encode(prompt), options, seed + i) for i, prompt in enumerate(prompts)]

    @torch.inference_mode()
    def _steps(self, rows: list["_Row"], options: SamplingOptions) -> Iterator[None]:
        """Gives every unfinished row one token a step, until none is left. Finished rows leave the batch."""
        device, process = self.model.device, _processors(options)
        longest = max((len(row.prompt) for row in rows), default=0)
        padding = [longest - len(row.prompt) for row in rows]
        # Masked, so any id would do; one of the row's own leaves the repetition penalty as it is without padding.
        padded = [row.prompt[:1] * n + row.prompt for row, n in zip(rows, padding, strict=True)]
        ids = torch.tensor(padded, device=device)
        mask = torch.tensor([[0] * n + [1] * (longest - n) for n in padding], device=device)
        cache, new = DynamicCache(config=self.model.config), ids
        while rows:
            logits = self.model(new, attention_mask=mask, past_key_values=cache, logits_to_keep=1).logits[:, -1]
            new = _choose(process(ids, logits.float()), rows, greedy=options.temperature == 0)
            for row, token in zip(rows, new.flatten().tolist(), strict=True):
                row.push(token)
            yield
            alive = [i for i, row in enumerate(rows) if row.finish_reason is None]
            if len(alive) < len(rows):
                rows, keep = [rows[i] for i in alive], torch.tensor(alive, dtype=torch.long, device=device)
                ids, mask, new = ids[keep], mask[keep], new[keep]
                cache.batch_select_indices(keep)
            ids, mask = torch.cat([ids, new], dim=1), F.pad(mask, (0, 1), value=1)


class Stream:
    """An answer on its way: an iterator over pieces of text that never cut a character or a stop string.

    Pieces joined are `completion().text`. Leaving it half way costs nothing.
    """

    def __init__(self, row: "_Row", steps: Iterator[None]):
        self._row, self._steps = row, steps

    def __iter__(self) -> Iterator[str]:
        for _ in self._steps:
            if piece := self._row.text.take():
                yield piece

    def completion(self) -> Completion:
        """What there is so far; all of it once the pieces have ended."""
        return self._row.completion()


class _Row:
    """One prompt of a batch and what has been added to it."""

    def __init__(self, engine: Engine, prompt: list[int], options: SamplingOptions, seed: int):
        self.prompt, self.eos = prompt, engine.eos
        self.limit = min(options.max_new_tokens, engine.context - len(prompt))
        self.generator = torch.Generator(engine.model.device).manual_seed(seed)
        self.text = TextStream(engine._token_bytes, options.stop)
        self.token_ids: list[int] = []
        self.finish_reason: str | None = None
        self.start, self.seconds = time.perf_counter(), 0.0

    def push(self, token: int) -> None:
        self.token_ids.append(token)
        if token in self.eos:
            self.finish_reason = "eos"
        elif self.text.push(token):
            self.finish_reason = "stop"
        elif len(self.token_ids) == self.limit:
            self.finish_reason = "length"
        if self.finish_reason in ("eos", "length"):
            self.text.flush()
        self.seconds = time.perf_counter() - self.start

    def completion(self) -> Completion:
        return Completion(self.text.text, self.token_ids, self.finish_reason, len(self.prompt), self.seconds)


def _processors(options: SamplingOptions) -> LogitsProcessorList:
    """What is done to the logits, in the order in which `generate` of transformers does it."""
    processors = LogitsProcessorList()
    if options.repetition_penalty != 1:
        processors.append(RepetitionPenaltyLogitsProcessor(float(options.repetition_penalty)))
    if options.temperature > 0:
        processors.append(TemperatureLogitsWarper(float(options.temperature)))
        if options.top_k > 0:
            processors.append(TopKLogitsWarper(options.top_k))
        if options.top_p < 1:
            processors.append(TopPLogitsWarper(float(options.top_p)))
        if options.min_p > 0:
            processors.append(MinPLogitsWarper(options.min_p))
    return processors


def _choose(scores: Tensor, rows: list[_Row], greedy: bool) -> Tensor:
    """The next token of each row, (B, 1), from (B, V) scores; each row draws from its own generator."""
    if greedy:
        return scores.argmax(-1, keepdim=True)
    draws = zip(scores.softmax(-1), rows, strict=True)
    return torch.stack([torch.multinomial(probabilities, 1, generator=row.generator) for probabilities, row in draws])


def _utf8(text: str) -> str:
    """The text, or a UserError if it holds halves of surrogate pairs, which stand for bytes that were no UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"the prompt is not valid UTF-8 text (at character {error.start})") from error
    return text
