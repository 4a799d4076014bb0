"""Types of request fields: those accepted only with values that ask for nothing, and conversations of plain text."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

MAX_STOP = 1000  # characters
MAX_SHOWN = 60  # characters of a bad value that an error message repeats


def shown(value: Any) -> str:
    """Returns a value as an error message repeats it."""
    text = repr(value)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}…"


def neutral(*values: Any, reason: str) -> Any:
    """Returns the type of a field of OpenAI's that this server accepts only as null or as one of `values`.

    These values ask for what the server does anyway. Any other one is refused with the reason.
    """

    def check(value: Any) -> Any:
        if value is not None and not any(type(value) is type(known) and value == known for known in values):
            raise ValueError(f"{shown(value)} is not supported: {reason}")
        return value

    return Annotated[Any, AfterValidator(check)]


def _check_bias(bias: Any) -> Any:
    """Accepts OpenAI's logit_bias if it changes no token."""
    if bias is not None and (
        not isinstance(bias, dict) or any(type(v) not in (int, float) or v for v in bias.values())
    ):
        raise ValueError(f"{shown(bias)} is not supported: this server shifts no token's logit: leave it out")
    return bias


def _join_text_parts(content: Any) -> str:
    """Joins OpenAI's content parts. All of them must be text."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ValueError(f"give a text or a list of text parts, not {shown(content)}")
    for i, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text" or not isinstance(part.get("text"), str):
            given = shown(part) if kind in (None, "text") else f"type {kind!r}"
            raise ValueError(f"this model reads text only, no part of {given}: give text parts, or a string")
        for key in part.keys() - {"type", "text"}:
            if part[key] is not None:
                raise ValueError(f"part {i}: this server does not know {shown(key)}: leave it out")
    return "".join(part["text"] for part in content)


def _list_stops(stop: Any) -> list[str]:
    stops = [] if stop is None else [stop] if isinstance(stop, str) else stop
    if not isinstance(stops, list) or not all(isinstance(text, str) for text in stops):
        raise ValueError(f"give a string or a list of strings, not {shown(stop)}")
    if not all(stops):
        raise ValueError("a stop string must not be empty: leave it out")
    if len(stops) > 16:
        raise ValueError(f"give at most 16 stop strings, not {len(stops)}")
    if (longest := max(map(len, stops), default=0)) > MAX_STOP:
        raise ValueError(f"a stop string has at most {MAX_STOP:,} characters, not {longest:,}: shorten it")
    return stops


def _list_prompts(prompt: Any) -> list[str] | list[list[int]]:
    """Returns a list of prompts, also if only one is given. Null is the empty text, which begins a new document."""
    if prompt is None or isinstance(prompt, str):
        return [prompt or ""]
    if not isinstance(prompt, list):
        raise ValueError(f"give a text, token ids, or a list of either, not {shown(prompt)}")
    if not prompt:
        raise ValueError("the list is empty: give at least one prompt")
    if type(prompt[0]) is int:
        return [_token_ids(prompt, "")]
    if len(prompt) > 64:
        raise ValueError(f"give at most 64 prompts, not {len(prompt)}")
    if isinstance(prompt[0], list):
        return [_token_ids(ids, f"prompt {i}: ") for i, ids in enumerate(prompt)]
    for i, text in enumerate(prompt):
        if not isinstance(text, str):
            raise ValueError(f"item {i}: a list holds only texts, or only token ids, not {shown(text)}")
    return prompt


def _token_ids(ids: Any, where: str) -> list[int]:
    if not isinstance(ids, list):
        raise ValueError(f"{where}one prompt is a list of token ids, so all must be, not {shown(ids)}")
    for i, token in enumerate(ids):
        if type(token) is not int:
            raise ValueError(f"{where}item {i}: a token id is a whole number, not {shown(token)}")
    return ids


LogitBias = Annotated[Any, AfterValidator(_check_bias)]
Stop = Annotated[list[str], BeforeValidator(_list_stops)]
Prompts = Annotated[list[str] | list[list[int]], BeforeValidator(_list_prompts)]
Text = Annotated[str, BeforeValidator(_join_text_parts)]


class StrictModel(BaseModel):
    """A model that refuses unknown fields, and values of another type, such as a number in quotes."""

    model_config = ConfigDict(extra="forbid", strict=True)


class StreamOptions(StrictModel):
    include_usage: bool | None = None
    include_obfuscation: neutral(False, reason="events are not padded: leave it out") = None


class Message(StrictModel):
    """A message of plain text. The empty fields of an answer are accepted, so that clients can send it back."""

    role: Literal["system", "developer", "user", "assistant"]
    name: neutral(reason="the chat template has no names: leave it out") = None
    refusal: neutral(reason="this model does not refuse: leave it out") = None
    annotations: neutral([], reason="this model cites nothing: leave it out") = None
    audio: neutral(reason="this model reads text only: leave it out") = None
    function_call: neutral(reason="this model calls no functions: leave it out") = None
    tool_calls: neutral([], reason="this model calls no tools: leave it out") = None
    content: Text  # last, because the first error is reported: a call without content is refused for the call

    def for_template(self) -> dict[str, str]:
        """Returns the message for the chat template, which calls a developer the system."""
        return {"role": "system" if self.role == "developer" else self.role, "content": self.content}


Metadata = Annotated[dict[str, str], Field(max_length=16)]
