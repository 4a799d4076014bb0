"""`Engine` generates text: it continues prompts and answers conversations, many at a time, on the latent cache."""

import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast

from moonwhale import precision as precisions
from moonwhale.checkpoint import open_checkpoint
from moonwhale.data.chat import encode_conversation, encode_prompt
from moonwhale.errors import UserError
from moonwhale.infer.decoder import Decoder
from moonwhale.infer.detokenizer import TextStream, TokenBytes
from moonwhale.infer.drafting import Drafting
from moonwhale.infer.request import Request
from moonwhale.infer.sampling import Noise
from moonwhale.infer.sampling_options import SamplingOptions
from moonwhale.infer.scheduler import Scheduler
from moonwhale.memory import available_bytes
from moonwhale.model import MoonwhaleForCausalLM

# Bytes of weights that stay in a CPU's cache. Narrower weights gain nothing there, and converting them costs time.
CPU_CACHE_BYTES = 32_000_000
Prompt = str | list[int] | list[dict]  # a text to continue, token ids, or the messages of a conversation to answer


@dataclass(frozen=True)
class Completion:
    """The model's answer to one prompt.

    text: the answer without control tokens and without the stop string that ended it.
    token_ids: every generated token, including the one that ended the answer.
    finish_reason: "eos", "stop" (a stop string), "length" (`max_new_tokens` or the context is reached) or "cancelled".
        It is None while the request is running.
    prompt_tokens: the number of tokens of the prompt.
    seconds: time from the call to the last token, including prefill.
    forwards: number of forward passes of the main model.
    drafted, accepted: for each depth of the MTP chain, the drafts that were verified and those that were accepted.
    """

    text: str
    token_ids: list[int]
    finish_reason: str | None
    prompt_tokens: int
    seconds: float
    forwards: int
    drafted: list[int]
    accepted: list[int]

    @classmethod
    def of(cls, request: Request) -> "Completion":
        """Return what a request has generated so far."""
        return cls(
            text=request.text.text,
            token_ids=request.token_ids,
            finish_reason=request.finish_reason,
            prompt_tokens=len(request.prompt),
            seconds=request.seconds,
            forwards=request.forwards,
            drafted=request.drafted,
            accepted=request.accepted,
        )

    @property
    def tokens_per_second(self) -> float:
        return len(self.token_ids) / self.seconds if self.seconds else 0.0

    @property
    def tokens_per_forward(self) -> float:
        """Tokens for each forward of the main model: 1 without drafts, more with MTP drafts that are accepted."""
        return len(self.token_ids) / max(self.forwards, 1)

    @property
    def acceptance(self) -> list[float]:
        """The share of accepted drafts, for each depth of the MTP chain that was verified."""
        return [accepted / drafted for accepted, drafted in zip(self.accepted, self.drafted, strict=True) if drafted]


class Engine:
    """A model prepared for inference, with its tokenizer.

    The options of `generate`, `stream` and `as_completed` are the fields of `SamplingOptions`. An answer does not
    depend on the other requests in the batch, nor on how many tokens the MTP modules draft.
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
        """Lay out a model's weights for inference.

        Args:
            int8: store the weights in 8 bits.
            draft: tokens that the MTP modules draft ahead. None drafts as many as make decoding faster.
            memory: bytes that the cache may use. None allows half of the free memory.
            sequences: the largest number of requests in a batch.
        """
        self.config, self.tokenizer = model.config, tokenizer
        self.context = model.config.max_position_embeddings
        known = model.generation_config.eos_token_id
        self.eos = {tokenizer.eos_token_id, *(known if isinstance(known, list) else [known])} - {None}
        self.token_bytes = TokenBytes(tokenizer)
        self._longest_token = max(map(len, tokenizer.get_vocab()))  # a byte is at least a character of its name
        self.fits_cache = sum(parameter.nbytes for parameter in model.parameters()) < CPU_CACHE_BYTES
        with torch.inference_mode():
            self.decoder = Decoder(model, int8)
        drafting = Drafting(len(self.decoder.modules), draft)
        memory = memory or _free_memory(self.decoder.device) // 2
        self.scheduler = Scheduler(self.decoder, memory, sequences, drafting)

    @classmethod
    def load(cls, folder: str | Path, device: str = "auto", precision: str = "auto", **options) -> "Engine":
        """Open a checkpoint folder on a device, with weights in fp32, bf16 or int8.

        `auto` takes the precision of training on that device, but fp32 for a model that fits a CPU's cache. `options`
        are those of the constructor.

        Raises:
            UserError: as `open_checkpoint` and `precision.choose`, and for int8 on any device but the CPU.
        """
        if precision not in ("auto", "fp32", "bf16", "int8"):
            raise UserError(f"`precision`: unknown precision {precision!r} (give auto, fp32, bf16 or int8)")
        int8 = precision == "int8"
        choice = precisions.choose(device, "bf16" if int8 else precision)
        if int8 and choice.device.type != "cpu":
            raise UserError(f"`precision`: int8 is for CPUs, not for {choice.device} (give bf16, or `device` cpu)")
        if precision == "auto" and choice.device.type == "cpu":
            n_bytes = sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))
            choice = precisions.choose(device, "fp32") if n_bytes < CPU_CACHE_BYTES else choice
        model, tokenizer = open_checkpoint(folder, choice.dtype)
        return cls(model.to(choice.device), tokenizer, int8=int8, **options)

    def encode(self, prompt: Prompt) -> list[int]:
        """Return the ids of a prompt: of a text after bos, or of messages in the chat template. Ids are only checked.

        Raises:
            UserError: the prompt is empty or malformed, or leaves no room in the context for a new token.
        """
        if isinstance(prompt, str):
            self._check_characters(len(prompt))
            ids = encode_prompt(self.tokenizer, prompt)
        elif prompt and isinstance(prompt[0], dict):
            contents = (message.get("content") for message in prompt)
            self._check_characters(sum(len(content) for content in contents if isinstance(content, str)))
            ids = encode_conversation(self.tokenizer, prompt)
        else:
            self._check_length(len(prompt))
            ids = list(prompt)
        if not ids:
            raise UserError("the prompt is empty: give at least one token")
        vocabulary = self.config.vocab_size
        if not all(0 <= id < vocabulary for id in ids):
            raise UserError(
                f"the prompt has ids outside of the model's vocabulary, 0 to {vocabulary - 1}: encode it with this "
                "checkpoint's tokenizer"
            )
        self._check_length(len(ids))
        return ids

    def encode_text(self, text: str) -> list[int]:
        """Return the ids of a text within a conversation. Raises UserError if it cannot fit into the context."""
        self._check_characters(len(text))
        ids = encode_prompt(self.tokenizer, text)
        return ids[self.tokenizer.bos_token_id is not None :]

    def _check_characters(self, count: int) -> None:
        """Raise UserError for a text that is too long whatever its tokens are: reading it could take seconds."""
        most = self.context * self._longest_token
        if count > most:
            raise UserError(
                f"the prompt has {count:,} characters, and the model's context of {self.context:,} tokens holds at "
                f"most {most:,}: shorten it"
            )

    def _check_length(self, tokens: int) -> None:
        if tokens + 1 > self.context:
            raise UserError(
                f"the prompt has {tokens:,} tokens, and with at least one more it exceeds the model's context of "
                f"{self.context:,}: shorten it"
            )

    def generate(self, prompts: Sequence[Prompt], **options) -> list[Completion]:
        """Continue all prompts. Prompt i gives what it would give alone with the seed `seed + i`.

        Raises:
            UserError: an option is impossible, or as `encode`.
        """
        if isinstance(prompts, str):
            raise TypeError("generate takes a list of prompts, not one text: give [prompt]")
        ids = [self.encode(prompt) for prompt in prompts]
        done = dict(self.as_completed(ids, **options))
        return [done[i] for i in range(len(ids))]

    def as_completed(self, prompts: Sequence[list[int]], **options) -> Iterator[tuple[int, Completion]]:
        """Continue prompts that are encoded already, and yield each index and completion as soon as it has ended.

        Raises:
            UserError: an option is impossible.
        """
        settings = SamplingOptions(**options)
        requests = {i: self.request(ids, settings, i) for i, ids in enumerate(prompts)}
        try:
            for request in requests.values():
                self.scheduler.submit(request)
            while requests:
                self.scheduler.step()
                for i in [i for i, request in requests.items() if request.finish_reason is not None]:
                    yield i, Completion.of(requests.pop(i))
        finally:
            for request in requests.values():
                self.scheduler.cancel(request)

    def stream(self, prompt: Prompt, **options) -> "Stream":
        """Continue one prompt. Iterate over the result for pieces of text. Raises UserError as `generate`."""
        request = self.request(self.encode(prompt), SamplingOptions(**options))
        self.scheduler.check_memory(request)
        return Stream(self.scheduler, request)

    def request(
        self, ids: list[int], options: SamplingOptions, index: int = 0, top_logprobs: int | None = None
    ) -> Request:
        """Make a request for the scheduler from a prompt's ids, as `encode` returns them.

        `index` is the request's in its batch. `top_logprobs` is the number of alternatives that are recorded for each
        token; None records no log-probabilities.
        """
        seed = secrets.randbits(62) if options.seed is None else options.seed + index
        return Request(
            prompt=ids,
            options=options,
            eos=self.eos,
            text=TextStream(self.token_bytes, options.stop),
            noise=Noise(seed, self.config.vocab_size, self.decoder.device),
            limit=min(options.max_new_tokens, self.context - len(ids)),
            top_logprobs=top_logprobs,
        )


class Stream:
    """A running answer: an iterator over pieces of text, which never end inside a character or a stop string.

    The joined pieces are `completion().text`. Leaving the iteration early cancels the request.
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
        """Return the answer so far, or the whole answer after the last piece."""
        return Completion.of(self._request)


def _free_memory(device: torch.device) -> int:
    """Return the free bytes of a device's memory."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # by torch's allocator
        return torch.cuda.mem_get_info(device)[0] + cached
    return available_bytes()
