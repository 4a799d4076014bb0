"""The bodies of requests: OpenAI's fields that a small text model can serve. Other fields are refused, not ignored."""

from dataclasses import fields
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, field_validator

from moonwhale.errors import UserError
from moonwhale.infer.sampling_options import SamplingOptions

MAX_CHOICES = 8
TokenCount = Annotated[int, Field(ge=1, le=1_000_000)]
Stop = str | Annotated[list[str], Field(max_length=16)] | None
T = TypeVar("T")
PromptList = Annotated[list[T], Field(max_length=64)]


class StrictModel(BaseModel):
    """A model that refuses unknown fields, and values of another type, such as a number in quotes."""

    model_config = ConfigDict(extra="forbid", strict=True)


class StreamOptions(StrictModel):
    include_usage: bool = False


class Message(StrictModel):
    role: Literal["system", "user", "assistant"]
    content: str | list[dict[str, Any]]
    name: str | None = None

    @field_validator("content")
    @classmethod
    def _join_text_parts(cls, content: str | list[dict[str, Any]]) -> str:
        """Joins OpenAI's content parts. All of them must be text."""
        if isinstance(content, str):
            return content
        for part in content:
            if part.get("type") != "text" or not isinstance(part.get("text"), str):
                kind = part.get("type")
                raise ValueError(f"this model reads text only, no part of type {kind!r}: give text parts, or a string")
        return "".join(part["text"] for part in content)


class GenerationRequest(StrictModel):
    """The fields that both kinds of request share. top_k, min_p and repetition_penalty are extensions, as in vLLM."""

    model: str
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, le=1_000_000)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    stop: Stop = None
    seed: Annotated[int, Field(ge=0, lt=2**62)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: TokenCount | None = None
    # Accepted only with the value that has no effect.
    frequency_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    presence_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    user: str | None = None

    @field_validator("stop")
    @classmethod
    def _refuse_empty_stop(cls, stop: Stop) -> list[str]:
        stops = [stop] if isinstance(stop, str) else stop or []
        if not all(stops):
            raise ValueError("a stop string must not be empty")
        return stops

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
    max_completion_tokens: TokenCount | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @property
    def num_top_logprobs(self) -> int | None:
        """How many of the likeliest tokens to list for each token. None switches log-probabilities off."""
        if self.top_logprobs and not self.logprobs:
            raise UserError("`top_logprobs`: set logprobs to true with it")
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(GenerationRequest):
    """The body of POST /v1/completions."""

    prompt: str | list[int] | PromptList[str] | PromptList[list[int]]
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    echo: bool | None = None

    @property
    def num_top_logprobs(self) -> int | None:
        return self.logprobs

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """The prompts, also if the body gives only one."""
        prompt = self.prompt
        if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)):
            return [prompt]
        if not prompt:
            raise UserError("`prompt`: the list is empty: give at least one prompt")
        return prompt


class XrayRequest(StrictModel):
    """The body of POST /xray: a conversation whose last message is the answer to look into."""

    model: str
    messages: Annotated[list[Message], Field(min_length=2, max_length=4096)]
