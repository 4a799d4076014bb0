"""Inference: continue texts, ids or conversations, many at a time, on the latent cache."""

import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
import psutil
import torch
from transformers import PreTrainedTokenizerFast

from moonwhale import precision as precisions
from moonwhale.checkpoint import open_checkpoint
from moonwhale.data.chat import encode_prompt
from moonwhale.errors import UserError
from moonwhale.infer.decoder import Decoder
from moonwhale.infer.detokenizer import TextStream, TokenBytes
from moonwhale.infer.drafting import Drafting
from moonwhale.infer.sampling import Noise
from moonwhale.infer.sampling_options import SamplingOptions
from moonwhale.infer.scheduler import Request, Scheduler
from moonwhale.model import MoonwhaleForCausalLM

CACHE = 32_000_000  # bytes of weights that stay in a CPU's cache, where fewer bits gain nothing and conversions cost
Prompt = str | list[int] | list[dict]  # a text to continue, ids as they are, or chat messages to answer


@dataclass(frozen=True)
class Completion:
    """What the model wrote.

    text: without control tokens and without the stop string that ended it.
    token_ids: every token it chose, the one that ended it included.
    finish_reason: "eos", "stop" (a stop string), "length" (max_new_tokens or a full context) or "cancelled"; None while
        running.
    seconds: from the call to the last token, the reading of the prompt included.
    forwards: how often the main model ran for it.
    drafted, accepted: for each depth of the MTP chain, guesses that were put to the test and those that held.
    """

    text: str
    token_ids: list[int]
    finish_reason: str | None
    prompt_tokens: int
    seconds: float
    forwards: int
    drafted: list[int]
    accepted: list[int]

    @property
    def tokens_per_second(self) -> float:
        return len(self.token_ids) / self.seconds if self.seconds else 0.0

    @property
    def tokens_per_forward(self) -> float:
        """What MTP drafts gained: tokens for each run of the main model, 1 without drafts."""
        return len(self.token_ids) / max(self.forwards, 1)

    @property
    def acceptance(self) -> list[float]:
        """For each depth of the MTP chain that was tested, the share of guesses that held."""
        return [held / tested for held, tested in zip(self.accepted, self.drafted, strict=True) if tested]


class Engine:
    """A model, laid out for inference, and its tokenizer.

    Options of `generate` and `stream` are the fields of `SamplingOptions`. An answer is the same whatever runs beside
    it and however much the MTP modules draft.
    """

    def __init__(
        self,
        model: MoonwhaleForCausalLM,
        tokenizer: PreTrainedTokenizerFast,
        *,
        int8: bool = False,
        draft: int | None = None,
        memory: int | None = None,
        sequences: int = 64,
    ):
        """`int8` stores weights in 8 bits. `draft`: tokens the MTP modules guess ahead, as many as pay when None.
        `memory`: bytes the cache may take, half of what is free when None. `sequences`: most requests at a time.
        """
        assert not model.training, "sampling would count in the statistics of training"
        self.config, self.tokenizer = model.config, tokenizer
        self.context = model.config.max_position_embeddings
        known = model.generation_config.eos_token_id
        self.eos = {tokenizer.eos_token_id, *(known if isinstance(known, list) else [known])} - {None}
        self.token_bytes = TokenBytes(tokenizer)
        self.fits_cache = sum(parameter.nbytes for parameter in model.parameters()) < CACHE
        with torch.inference_mode():
            self.decoder = Decoder(model, int8)
        drafting = Drafting(len(self.decoder.modules), draft)
        self.scheduler = Scheduler(self.decoder, memory or _free(self.decoder.device) // 2, sequences, drafting)

    @classmethod
    def load(cls, folder: str | Path, device: str = "auto", precision: str = "auto", **options) -> "Engine":
        """Opens a checkpoint folder on a device, with weights in fp32, bf16 or int8; `auto` is the training's precision
        there, but fp32 for what a CPU's cache can hold. Options are those of the constructor.

        Raises UserError as `open_checkpoint` and `precision.choose`, and for int8 off the CPU.
        """
        if precision not in ("auto", "fp32", "bf16", "int8"):
            raise UserError(f"`precision`: unknown precision {precision!r} (give auto, fp32, bf16 or int8)")
        int8 = precision == "int8"
        choice = precisions.choose(device, "bf16" if int8 else precision)
        if int8 and choice.device.type != "cpu":
            raise UserError(f"`precision`: int8 is for CPUs, not for {choice.device} (give bf16, or `device` cpu)")
        if precision == "auto" and choice.device.type == "cpu":
            weights = sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))
            choice = precisions.choose(device, "fp32") if weights < CACHE else choice
        model, tokenizer = open_checkpoint(folder, choice.dtype)
        return cls(model.to(choice.device), tokenizer, int8=int8, **options)

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
        vocabulary = self.config.vocab_size
        if not all(0 <= id < vocabulary for id in ids):
            raise UserError(f"the prompt has ids outside of the model's vocabulary, 0 to {vocabulary - 1}")
        if len(ids) + 1 > self.context:
            raise UserError(
                f"the prompt has {len(ids):,} tokens, and with at least one more it exceeds the model's context of "
                f"{self.context:,}: shorten it"
            )
        return ids

    def generate(self, prompts: Sequence[Prompt], **options) -> list[Completion]:
        """Continues all prompts. Each comes out as it would alone (with seed + its index as the seed).

        Raises UserError for impossible options and as `encode`.
        """
        if isinstance(prompts, str):
            raise TypeError("generate takes a list of prompts")
        done = dict(self.as_completed(prompts, **options))
        return [done[i] for i in range(len(prompts))]

    def as_completed(self, prompts: Sequence[Prompt], **options) -> Iterator[tuple[int, Completion]]:
        """What `generate` gives, each completion as soon as it has ended, with its prompt's index."""
        settings = SamplingOptions(**options)
        seed = secrets.randbits(62) if settings.seed is None else settings.seed
        requests = {i: self.request(prompt, settings, seed + i) for i, prompt in enumerate(prompts)}
        try:
            for request in requests.values():
                self.scheduler.submit(request)
            while requests:
                self.scheduler.step()
                for i in [i for i, request in requests.items() if request.finish_reason is not None]:
                    yield i, completion(requests.pop(i))
        finally:
            for request in requests.values():
                self.scheduler.cancel(request)

    def stream(self, prompt: Prompt, **options) -> "Stream":
        """Continues one prompt; iterate over the result for its text in pieces. Raises UserError as `generate`."""
        return Stream(self.scheduler, self.request(prompt, SamplingOptions(**options)))

    def request(
        self, prompt: Prompt, options: SamplingOptions, seed: int | None = None, top_logprobs: int | None = None
    ) -> Request:
        """What the scheduler takes. A UserError as `encode`."""
        ids = self.encode(prompt)
        seed = options.seed if seed is None else seed
        seed = secrets.randbits(62) if seed is None else seed
        return Request(
            prompt=ids,
            options=options,
            eos=self.eos,
            text=TextStream(self.token_bytes, options.stop),
            noise=Noise(seed, self.config.vocab_size, self.decoder.device),
            limit=min(options.max_new_tokens, self.context - len(ids)),
            top_logprobs=top_logprobs,
        )

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


class Stream:
    """An answer on its way: an iterator over pieces of text that never cut a character or a stop string.

    Pieces joined are `completion().text`. Leaving it half way costs nothing.
    """

    def __init__(self, scheduler: Scheduler, request: Request):
        self._scheduler, self._request = scheduler, request

    def __iter__(self) -> Iterator[str]:
        self._scheduler.submit(self._request)
        try:
            while self._request.finish_reason is None:
                self._scheduler.step()
                if piece := self._request.text.take():
                    yield piece
        finally:
            self._scheduler.cancel(self._request)

    def completion(self) -> Completion:
        """What there is so far; all of it once the pieces have ended."""
        return completion(self._request)


def completion(request: Request) -> Completion:
    """What a request has come to."""
    return Completion(
        request.text.text,
        request.token_ids,
        request.finish_reason,
        len(request.prompt),
        request.seconds,
        request.forwards,
        request.drafted,
        request.accepted,
    )


def _free(device: torch.device) -> int:
    """Bytes of memory that are free on a device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def _utf8(text: str) -> str:
    """The text, or a UserError if it holds halves of surrogate pairs, which stand for bytes that were no UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"the prompt is not valid UTF-8 text (at character {error.start})") from error
    return text
