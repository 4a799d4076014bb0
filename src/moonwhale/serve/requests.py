"""The bodies of requests: every field of OpenAI's API is supported, accepted if it asks for nothing, or refused."""

from dataclasses import fields
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from moonwhale.errors import UserError
from moonwhale.infer.sampling_options import SamplingOptions
from moonwhale.serve.fields import LogitBias, Message, Metadata, Prompts, Stop, StreamOptions, StrictModel, neutral

MAX_CHOICES = 8
COMPLETION_TOKENS = 16  # OpenAI's default for /v1/completions
TokenCount = Annotated[int, Field(ge=1, le=1_000_000)]


class GenerationRequest(StrictModel):
    """The fields that both kinds of request share. top_k, min_p and repetition_penalty are extensions, as in vLLM."""

    model: str
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, le=1_000_000)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    stop: Stop = Field(default=None, validate_default=True)
    seed: Annotated[int, Field(ge=0, lt=2**62)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    frequency_penalty: neutral(0, 0.0, reason="use repetition_penalty") = None
    presence_penalty: neutral(0, 0.0, reason="use repetition_penalty") = None
    logit_bias: LogitBias = None
    user: str | None = None  # names the client's user for OpenAI's monitoring; there is none here

    def sampling_options(self, max_new_tokens: int) -> SamplingOptions:
        """Returns the options given. By default, as in OpenAI's API, temperature is 1 and min_p is off."""
        names = {field.name for field in fields(SamplingOptions)}
        options = {"temperature": 1.0, "min_p": 0.0} | self.model_dump(include=names, exclude_none=True)
        return SamplingOptions(**options, max_new_tokens=max_new_tokens)

    @property
    def num_choices(self) -> int:
        return self.n or 1


class ChatRequest(GenerationRequest):
    """The body of POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=4096)]
    max_tokens: TokenCount | None = None
    max_completion_tokens: TokenCount | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    truncation: Literal["auto", "disabled"] | None = None  # an extension, as in OpenAI's Responses API

    # Accepted only if they ask for nothing.
    audio: neutral(reason="this model writes text only: leave it out") = None
    function_call: neutral("none", "auto", reason="this model calls no functions: leave it out") = None
    functions: list[Any] | None = None
    modalities: neutral(["text"], reason='this model writes text only: give ["text"]') = None
    moderation: neutral(reason="this server moderates nothing: leave it out") = None
    prediction: neutral(reason="this server uses no prediction: leave it out") = None
    prompt_cache_options: neutral(reason="this server keeps no prompts: leave it out") = None
    prompt_cache_retention: neutral("in_memory", reason="this server keeps no prompts: leave it out") = None
    reasoning_effort: neutral("none", reason='the effort cannot be set: give "none"') = None
    response_format: neutral({"type": "text"}, reason='the form cannot be set: give {"type": "text"}') = None
    service_tier: neutral("auto", "default", reason='there is one tier: give "auto"') = None
    store: neutral(False, reason="this server stores no answers: give false") = None
    tool_choice: neutral("none", "auto", reason='this model calls no tools: give "none"') = None
    tools: list[Any] | None = None
    verbosity: neutral("medium", reason='the length cannot be set in words: give "medium"') = None
    web_search_options: neutral(reason="this server searches nothing: leave it out") = None
    # Labels and hints, which change no answer of OpenAI's either.
    metadata: Metadata | None = None
    parallel_tool_calls: bool | None = None
    prompt_cache_key: str | None = None
    safety_identifier: str | None = None

    @model_validator(mode="after")
    def _refuse_tools(self) -> Self:
        """Tools are accepted only if the model may not call them."""
        for given, choice in (("tools", "tool_choice"), ("functions", "function_call")):
            if getattr(self, given) and getattr(self, choice) != "none":
                raise UserError(f'`{given}`: this model calls none: leave them out, or set {choice} to "none"')
        return self

    @property
    def max_new_tokens(self) -> int | None:
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise UserError("`max_tokens`: it differs from max_completion_tokens: give only one of them")
        return self.max_completion_tokens or self.max_tokens

    @property
    def num_top_logprobs(self) -> int | None:
        """How many of the likeliest tokens to list for each token. None switches log-probabilities off."""
        if self.top_logprobs and not self.logprobs:
            raise UserError("`top_logprobs`: set logprobs to true with it")
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(GenerationRequest):
    """The body of POST /v1/completions.

    `max_tokens: 0` generates nothing. With `echo` and `logprobs` it scores the prompt.
    """

    prompt: Prompts = Field(default=None, validate_default=True)
    max_tokens: Annotated[int, Field(ge=0, le=1_000_000)] | None = COMPLETION_TOKENS
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    echo: bool | None = None
    best_of: Annotated[int, Field(ge=1)] | None = None
    suffix: neutral("", reason="this model only continues a text: leave it out") = None

    @model_validator(mode="after")
    def _refuse_best_of(self) -> Self:
        if self.best_of not in (None, self.num_choices):
            raise UserError(f"`best_of`: {self.best_of} is not supported: give as many as n, {self.num_choices}")
        return self

    @property
    def max_new_tokens(self) -> int:
        return COMPLETION_TOKENS if self.max_tokens is None else self.max_tokens

    @property
    def num_top_logprobs(self) -> int | None:
        return self.logprobs

    @property
    def has_text_prompts(self) -> bool:
        return isinstance(self.prompt[0], str)


class XraySettings(StrictModel):
    """The body of POST /xray/ID: the settings to look at the same text with. Those left out are the trained ones.

    The bounds depend on the model: see inspect/settings.py.
    """

    num_experts_per_tok: TokenCount | None = None
    moba_topk: TokenCount | None = None
    moba_block_size: TokenCount | None = None


class XrayRequest(StrictModel):
    """The body of POST /xray: a conversation whose last message is the answer to look into."""

    model: str
    messages: Annotated[list[Message], Field(min_length=2, max_length=4096)]
