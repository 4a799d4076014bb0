"""Responses have exactly the fields of OpenAI's types, and a stream adds up to the whole response."""

import json

import httpx
import openai
import pytest
from openai.types import Completion, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.chat.chat_completion_chunk import ChoiceDelta
from openai.types.chat.chat_completion_message import ChatCompletionMessage
from openai.types.completion_usage import CompletionUsage
from pydantic import BaseModel

from moonwhale.serve.app import create_app
from serving import HELLO, NAME, Running

pytestmark = pytest.mark.contract("OpenAI clients and endpoints", "openai (Python): response types")

# Fields of OpenAI's types that say nothing about a model of text without tools.
NOT_HERE = {
    ChatCompletion: {"metadata", "moderation", "service_tier"},
    ChatCompletionChunk: {"moderation", "obfuscation", "service_tier"},
    ChatCompletionMessage: {"annotations", "audio", "function_call", "tool_calls"},
    ChoiceDelta: {"audio", "function_call", "tool_calls"},
    CompletionUsage: {"completion_tokens_details", "prompt_tokens_details"},
    Model: {"shutdown_date"},
}
EXTENSIONS = {Model: {"context"}}  # what a client needs to know before it sends a long prompt
CHAT = {"messages": HELLO}
TEXT = {"prompt": ["The whale", "and the moon"]}
SAMPLED = {"n": 2, "seed": 5, "temperature": 1.2, "max_tokens": 7}
CASES = {
    "chat": CHAT,
    "greedy chat": CHAT | {"temperature": 0, "max_completion_tokens": 5},
    "chat of one token": CHAT | {"max_tokens": 1},
    "chat, n, logprobs": CHAT | SAMPLED | {"logprobs": True},
    "chat, n, top_logprobs": CHAT | SAMPLED | {"logprobs": True, "top_logprobs": 3},
    "chat, logprobs, stop": CHAT | SAMPLED | {"logprobs": True, "stop": ["a", "e", "o", "u"]},
    "chat, both limits": CHAT | {"max_tokens": 4, "max_completion_tokens": 4},
    "text": TEXT,
    "text, no token": TEXT | {"max_tokens": 0},
    "text, echo": TEXT | SAMPLED | {"echo": True},
    "text, echo, no token": TEXT | {"echo": True, "max_tokens": 0, "n": 2},
    "text, logprobs": TEXT | SAMPLED | {"logprobs": 2},
    "text, echo, logprobs": TEXT | SAMPLED | {"echo": True, "logprobs": 2, "best_of": 2},
    "text, echo, logprobs, no token": TEXT | {"echo": True, "logprobs": 0, "max_tokens": 0},
    "text, echo, logprobs, stop": TEXT | SAMPLED | {"echo": True, "logprobs": 0, "stop": "a", "max_tokens": 30},
    "ids, echo, logprobs": {"prompt": [[40, 41], [42]], "echo": True, "logprobs": 1, "max_tokens": 3, "seed": 1},
    "no text, echo, logprobs": {"prompt": [""], "echo": True, "logprobs": 1, "max_tokens": 2, "seed": 1},
    "nothing": {"max_tokens": 4, "seed": 1},
}


@pytest.fixture(scope="module")
def url(small_engine, small_checkpoint):
    with Running(create_app(small_engine(), NAME, small_checkpoint)) as server:
        yield server.url + "/v1"


def assert_complete(value: BaseModel | list) -> None:
    """Asserts that a value of OpenAI's has every field, and no other one."""
    if isinstance(value, list):
        for one in value:
            assert_complete(one)
    elif isinstance(value, BaseModel):
        kind, known = type(value), set(type(value).model_fields)
        absent = NOT_HERE.get(kind, set())
        assert set(value.model_extra) == EXTENSIONS.get(kind, set())
        missing = known - value.model_fields_set - absent
        assert missing <= {"usage"} | ({"role", "refusal"} if kind is ChoiceDelta else set()), (kind, missing)
        for name in value.model_fields_set:
            assert_complete(getattr(value, name))


def typed(kind: type[BaseModel], body: dict) -> BaseModel:
    """Checks a body against OpenAI's type. Of completions, the type lacks the nulls that OpenAI's own server sends."""
    if kind is Completion:
        body = json.loads(json.dumps(body))
        for choice in body["choices"]:
            choice["finish_reason"] = choice["finish_reason"] or "stop"  # of a chunk before the last one
            if scores := choice["logprobs"]:  # of a first token, which nothing predicts
                scores["token_logprobs"] = [0.0 if value is None else value for value in scores["token_logprobs"]]
                scores["top_logprobs"] = [{} if value is None else value for value in scores["top_logprobs"]]
    return kind.model_validate(body, strict=True)


def stream(url: str, path: str, body: dict) -> list[dict]:
    """Returns the events of a stream, as the bytes on the wire have them."""
    answer = httpx.post(f"{url}/{path}", json=body | {"stream": True})
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    *events, done, empty = answer.text.split("\n\n")
    assert (done, empty) == ("data: [DONE]", "")
    return [json.loads(event.removeprefix("data: ")) for event in events]


def joined(parts: list) -> object:
    """Joins what the chunks of a stream say about one thing: texts, lists, and dictionaries of them."""
    parts = [part for part in parts if part is not None]
    if not parts or isinstance(parts[0], str):
        return "".join(parts) if parts else None
    if isinstance(parts[0], list):
        return [one for part in parts for one in part]
    return {key: joined([part[key] for part in parts]) for key in parts[0]}


@pytest.mark.parametrize("case", CASES)
def test_a_stream_adds_up_to_the_whole_response(url, case):
    body = {"model": NAME, "seed": 3} | CASES[case]
    is_chat = "messages" in body
    path = "chat/completions" if is_chat else "completions"
    kind, chunk_kind = (ChatCompletion, ChatCompletionChunk) if is_chat else (Completion, Completion)
    whole = httpx.post(f"{url}/{path}", json=body).json()
    assert_complete(typed(kind, whole))
    *chunks, last = stream(url, path, body | {"stream_options": {"include_usage": True}})
    for chunk in [*chunks, last]:
        assert_complete(typed(chunk_kind, chunk))
    assert last["usage"] == whole["usage"] and last["choices"] == []
    assert all(chunk["usage"] is None and len(chunk["choices"]) == 1 for chunk in chunks)
    bare = stream(url, path, body)
    assert not any("usage" in chunk for chunk in bare)

    assert len(whole["choices"]) == len(body.get("prompt", [""])) * body.get("n", 1)
    for choice in whole["choices"]:
        parts = [part for chunk in chunks for part in chunk["choices"] if part["index"] == choice["index"]]
        said = [part["delta"]["content"] if is_chat else part["text"] for part in parts]
        assert "".join(said) == (choice["message"]["content"] if is_chat else choice["text"])
        assert [part["finish_reason"] for part in parts[:-1]] == [None] * (len(parts) - 1)
        assert parts[-1]["finish_reason"] == choice["finish_reason"] in ("stop", "length")
        assert not is_chat or parts[0]["delta"]["role"] == "assistant"
        scores = joined([part["logprobs"] for part in parts])
        assert _rounded(scores) == _rounded(choice["logprobs"])


def _rounded(value: object) -> object:
    """Rounds the log-probabilities: a prompt's depend in the last digits on what else is computed with it."""
    match value:
        case float():
            return round(value, 3) + 0.0
        case list():
            return [_rounded(one) for one in value]
        case dict():
            return {key: _rounded(one) for key, one in value.items()}
    return value


def test_models(url):
    listed = httpx.get(f"{url}/models").json()
    assert set(listed) == {"object", "data"} and listed["object"] == "list"
    assert_complete(Model.model_validate(listed["data"][0], strict=True))
    assert httpx.get(f"{url}/models/{NAME}").json() == listed["data"][0]


@pytest.mark.parametrize("logprobs", [False, True])
def test_the_clients_own_collector(url, logprobs):
    """The Python client's helper puts a stream together by itself."""
    client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
    options = {"model": NAME, "messages": HELLO, "max_tokens": 9, "n": 2, "seed": 4, "logprobs": logprobs}
    whole = client.chat.completions.create(**options)
    with client.chat.completions.stream(**options) as events:
        kinds = {event.type for event in events}
        collected = events.current_completion_snapshot
    assert {"chunk", "content.delta", "content.done"} <= kinds
    for one, other in zip(whole.choices, collected.choices, strict=True):
        assert (one.message.content, one.finish_reason) == (other.message.content, other.finish_reason)
        if logprobs:
            assert [entry.bytes for entry in one.logprobs.content] == [e.bytes for e in other.logprobs.content]
