"""OpenAI's requests, as far as a small text model can serve them; what it can't is refused, not ignored."""

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, field_validator

from moonwhale.errors import UserError

MOST_CHOICES = 8
Tokens = Annotated[int, Field(strict=True, ge=1, le=1_000_000)]
Seed = Annotated[int, Field(strict=True, ge=0, lt=2**62)]
Stop = str | Annotated[list[str], Field(max_length=16)] | None
Number = Annotated[float, Field(strict=True)]
T = TypeVar("T")
Many = Annotated[list[T], Field(max_length=64)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class StreamOptions(_Strict):
    include_usage: StrictBool = False


class Message(_Strict):
    role: Literal["system", "user", "assistant"]
    content: str | list[dict[str, Any]]
    name: str | None = None

    @field_validator("content")
    @classmethod
    def _only_text(cls, content):
        """Joins OpenAI's content parts, which have to be text."""
        if isinstance(content, str):
            return content
        for part in content:
            if part.get("type") != "text" or not isinstance(part.get("text"), str):
                kind = part.get("type")
                raise ValueError(f"this model reads text only, no part of type {kind!r}: give text parts, or a string")
        return "".join(part["text"] for part in content)


class _Sampling(_Strict):
    """What both kinds of request share. top_k, min_p and repetition_penalty are extensions, named as in vLLM."""

    model: str
    temperature: Annotated[Number, Field(ge=0, le=2)] | None = None
    top_p: Annotated[Number, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(strict=True, ge=0, le=1_000_000)] | None = None
    min_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[Number, Field(gt=0, le=10)] | None = None
    n: Annotated[int, Field(strict=True, ge=1, le=MOST_CHOICES)] | None = None
    stop: Stop = None
    seed: Seed | None = None
    stream: StrictBool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Tokens | None = None
    # Taken only at the value that changes nothing.
    frequency_penalty: Annotated[Number, Field(ge=0, le=0)] | None = None
    presence_penalty: Annotated[Number, Field(ge=0, le=0)] | None = None
    user: str | None = None

    @field_validator("stop")
    @classmethod
    def _not_empty(cls, stop):
        stops = [stop] if isinstance(stop, str) else stop or []
        if not all(stops):
            raise ValueError("a stop string must not be empty")
        return stops

    def sampling(self, default_tokens: int) -> dict:
        """The fields of SamplingOptions; temperature 1 and no min_p, as OpenAI's, where none is given."""
        names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed")
        given = {name: value for name in names if (value := getattr(self, name)) is not None}
        plain = {"temperature": 1.0, "min_p": 0.0, "max_new_tokens": self.most_tokens or default_tokens}
        return plain | {"stop": self.stop or ()} | given

    @property
    def most_tokens(self) -> int | None:
        return self.max_tokens

    @property
    def wants_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)


class ChatRequest(_Sampling):
    """POST /v1/chat/completions"""

    messages: Annotated[list[Message], Field(min_length=1, max_length=4096)]
    max_completion_tokens: Tokens | None = None
    logprobs: StrictBool | None = None
    top_logprobs: Annotated[int, Field(strict=True, ge=0, le=20)] | None = None

    @property
    def most_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def alternatives(self) -> int | None:
        """How many of the likeliest tokens to tell, None for no log-probabilities at all."""
        if self.top_logprobs and not self.logprobs:
            raise UserError("top_logprobs: set logprobs to true with it")
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(_Sampling):
    """POST /v1/completions"""

    prompt: str | list[StrictInt] | Many[str] | Many[list[StrictInt]]
    logprobs: Annotated[int, Field(strict=True, ge=0, le=5)] | None = None
    echo: StrictBool | None = None

    @property
    def alternatives(self) -> int | None:
        return self.logprobs

    @property
    def prompts(self) -> list[str | list[int]]:
        prompt = self.prompt
        if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)):
            return [prompt]
        if not prompt:
            raise UserError("prompt: the list is empty: give at least one prompt")
        return prompt


class XrayRequest(_Strict):
    """POST /xray: a conversation whose last message is the answer to look into."""

    model: str
    messages: Annotated[list[Message], Field(min_length=2, max_length=4096)]
