"""Drives the server with OpenAI's Python client, over every field that the client's types name, and with raw HTTP."""

import itertools
import json
import math

import httpx
import openai
import pytest
from openai.types import completion_create_params as completion_params
from openai.types.chat import completion_create_params as chat_params

from moonwhale.serve.app import create_app
from moonwhale.serve.limits import Limits
from serving import HELLO, NAME, Running

pytestmark = pytest.mark.contract("OpenAI clients and endpoints", "openai (Python)")
TOOL = {"type": "function", "function": {"name": "sing", "parameters": {}}}

# For each field, values that are accepted and values that are refused.
SHARED = {
    "model": ([NAME], ["gpt-4", None]),
    "frequency_penalty": ([0, 0.0, None], [0.5, False]),
    "presence_penalty": ([0, None], [-1]),
    "logit_bias": ([{}, {"5": 0}, None], [{"5": 10}, [1]]),
    "max_tokens": ([3, None], [-1, 1.5, "3", 10**30]),
    "n": ([1, 2, None], [0, 9, True]),
    "seed": ([5, None], [-1, 2**70]),
    "stop": (["x", ["x", "y"], [], None], [[1], 5, "", ["a"] * 17, False, 0, {}]),
    "stream": ([False, None], ["yes"]),
    "stream_options": ([None], [{"include_usage": True}]),  # only with a stream
    "temperature": ([0, 1, None], [3, "hot"]),
    "top_p": ([1, 0.5, None], [2]),
    "user": (["me"], [5]),
}
CHAT = SHARED | {
    "messages": ([HELLO], [[], "hi", None]),
    "audio": ([None], [{"voice": "alloy", "format": "wav"}]),
    "function_call": (["none", "auto", None], [{"name": "f"}]),
    "functions": ([[], None], [[{"name": "f"}]]),
    "logprobs": ([True, False, None], [1]),
    "max_completion_tokens": ([3, None], [0]),
    "metadata": ([{"a": "b"}, {}, None], [{"a": 1}]),
    "modalities": ([["text"], None], [["text", "audio"]]),
    "moderation": ([None], [{"model": "x"}]),
    "parallel_tool_calls": ([True, False], ["x"]),
    "prediction": ([None], [{"type": "content", "content": "x"}]),
    "prompt_cache_key": (["k", None], [1]),
    "prompt_cache_options": ([None], [{"mode": "explicit"}]),
    "prompt_cache_retention": (["in_memory", None], ["24h"]),
    "reasoning_effort": (["none", None], ["high"]),
    "response_format": ([{"type": "text"}, None], [{"type": "json_object"}]),
    "safety_identifier": (["s", None], [1]),
    "service_tier": (["auto", "default", None], ["priority"]),
    "store": ([False, None], [True]),
    "tool_choice": (["none", "auto", None], ["required", {"type": "function", "function": {"name": "f"}}]),
    "tools": ([[], None], [[TOOL]]),
    "top_logprobs": ([0, None], [2, 21]),  # more than 0 only with logprobs
    "verbosity": (["medium", None], ["low"]),
    "web_search_options": ([None], [{}]),
}
COMPLETIONS = SHARED | {
    "prompt": (
        ["The", "", None, ["The", "whale"], [5, 6], [[5], [6, 7]]],
        [[], [[]], 5, ["a", 1], [1, "a"], [[1], "a"]],
    ),
    "max_tokens": ([0, 3, None], [-1, "3"]),
    "best_of": ([1, None], [2]),
    "echo": ([True, False, None], ["x"]),
    "logprobs": ([0, 2, None], [6, True]),
    "suffix": (["", None], ["end"]),
}
ENDPOINTS = {"chat/completions": ({"messages": HELLO}, CHAT), "completions": ({"prompt": "The"}, COMPLETIONS)}
CASES = [
    pytest.param(path, key, value, status, id=f"{path}-{key}-{value!r:.30}")
    for path, (_, table) in ENDPOINTS.items()
    for key, values in table.items()
    for status, group in zip((200, 400), values, strict=True)
    for value in group
]


@pytest.fixture(scope="module")
def engine(small_engine):
    return small_engine()


@pytest.fixture(scope="module")
def server(engine, small_checkpoint):
    with Running(create_app(engine, NAME, small_checkpoint, Limits(queue=20))) as running:
        yield running


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)


@pytest.mark.parametrize(("params", "table"), [(chat_params, CHAT), (completion_params, COMPLETIONS)])
def test_every_field_of_the_clients_types_is_decided(params, table):
    kinds = (params.CompletionCreateParamsNonStreaming, params.CompletionCreateParamsStreaming)
    assert set(table) == set().union(*(kind.__annotations__ for kind in kinds))


@pytest.mark.parametrize(("path", "key", "value", "status"), CASES)
def test_a_field(server, path, key, value, status):
    body = {"model": NAME, "max_tokens": 2} | ENDPOINTS[path][0] | {key: value}
    if key == "max_completion_tokens":
        del body["max_tokens"]
    answer = httpx.post(f"{server.url}/v1/{path}", json=body)
    assert answer.status_code == (404 if value == "gpt-4" else status), answer.text
    if status == 400 and value != [[]]:
        error = answer.json()["error"]
        assert error["param"].startswith(key) and "\n" not in error["message"]


def test_the_servers_own_message_can_be_sent_back(client):
    ask = client.chat.completions.create
    message = ask(model=NAME, messages=HELLO, max_tokens=5).choices[0].message
    follow_up = {"role": "user", "content": [{"type": "text", "text": "And"}, {"type": "text", "text": " then?"}]}
    full = message.model_dump() | {"annotations": [], "audio": None, "function_call": None, "tool_calls": None}
    for own in (message, message.model_dump(), full):
        assert ask(model=NAME, messages=[*HELLO, own, follow_up], max_tokens=2).choices
    with pytest.raises(openai.BadRequestError, match="calls no tools"):
        ask(model=NAME, messages=[*HELLO, full | {"tool_calls": [TOOL]}, follow_up])


def test_a_developer_is_the_system(client):
    def ask(role):
        messages = [{"role": role, "content": "Sing."}, *HELLO]
        return client.chat.completions.create(model=NAME, messages=messages, temperature=0, max_tokens=8).choices[0]

    assert ask("developer").message == ask("system").message


def test_tools_that_may_not_be_called_change_nothing(client):
    options = {"model": NAME, "messages": HELLO, "temperature": 0, "max_tokens": 4}
    with_tools = client.chat.completions.create(**options, tools=[TOOL], tool_choice="none")
    assert with_tools.choices == client.chat.completions.create(**options).choices


@pytest.mark.parametrize("as_ids", [False, True])
@pytest.mark.parametrize("stream", [False, True])
def test_an_echo_with_logprobs_scores_the_prompt(client, engine, as_ids, stream):
    text = "The whale sang to the moon, Ünï"
    ids = engine.encode(text)
    options = {"model": NAME, "prompt": ids if as_ids else text, "echo": True, "logprobs": 2, "temperature": 0}
    said = client.completions.create(**options, max_tokens=0, stream=stream)
    choice = (list(said)[-1] if stream else said).choices[0]
    found = choice.logprobs
    assert (choice.text, choice.finish_reason) == (text, "length")
    assert found.token_logprobs[0] is None if as_ids else found.token_logprobs[0] < 0  # bos is before a text
    assert len(found.tokens) == len(ids) - (not as_ids)
    assert found.text_offset[-1] < len(text)
    for logprob, top in list(zip(found.token_logprobs, found.top_logprobs, strict=True))[as_ids:]:
        assert logprob in top.values() and 2 <= len(top) <= 3
    more = client.completions.create(**options, max_tokens=3).choices[0].logprobs
    assert more.tokens[: len(found.tokens)] == found.tokens and len(more.tokens) == len(found.tokens) + 3
    assert more.token_logprobs[as_ids : len(found.tokens)] == pytest.approx(found.token_logprobs[as_ids:], abs=1e-4)


def test_a_prompts_scores_are_the_models(client, engine, small_model):
    import torch

    ids = engine.encode("The whale sang. " * 3)
    said = client.completions.create(model=NAME, prompt=ids, echo=True, logprobs=0, max_tokens=0)
    with torch.no_grad():
        logprobs = small_model(input_ids=torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
    expected = logprobs.gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()
    assert said.choices[0].logprobs.token_logprobs[1:] == pytest.approx(expected, abs=1e-3)


def test_top_logprobs_lose_no_entry(client):
    options = {"model": NAME, "prompt": "The", "logprobs": 5, "max_tokens": 60, "temperature": 2, "seed": 4}
    found = client.completions.create(**options).choices[0].logprobs
    for token, logprob, top in zip(found.tokens, found.token_logprobs, found.top_logprobs, strict=True):
        assert len(top) in (5, 6) and top[token] == logprob
    echoed = client.completions.create(model=NAME, prompt="語", echo=True, logprobs=1, max_tokens=0).choices[0].logprobs
    assert echoed.tokens == ["bytes:\\xe8", "bytes:\\xaa", "bytes:\\x9e"] and echoed.text_offset == [0, 0, 0]


def test_choices_of_a_stream_have_their_indexes_and_usage(client):
    options = {"model": NAME, "prompt": ["The", "A"], "n": 2, "max_tokens": 3, "seed": 1}
    chunks = list(client.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    assert {choice.index for chunk in chunks for choice in chunk.choices} == {0, 1, 2, 3}
    assert chunks[-1].usage.completion_tokens == client.completions.create(**options).usage.completion_tokens
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_a_name_with_a_slash(engine, small_checkpoint):
    with Running(create_app(engine, "team/tiny", small_checkpoint)) as server:
        client = openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)
        assert client.models.retrieve("team/tiny").id == "team/tiny"
        assert httpx.get(server.url + "/v1/models/team/tiny").json()["id"] == "team/tiny"
        with pytest.raises(openai.NotFoundError, match="no model 'team/other' here"):
            client.models.retrieve("team/other")


def test_a_request_that_can_never_fit_is_a_400(server):
    answer = server.post("/v1/completions", prompt=["a"] * 5, n=8, messages=None)
    assert answer.status_code == 400
    answer = httpx.post(server.url + "/v1/completions", json={"model": NAME, "prompt": ["a"] * 5, "n": 8})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "n")


@pytest.mark.parametrize(
    ("headers", "message"),
    [
        ({}, "there is no content-type"),
        ({"content-type": "text/plain"}, "the content-type is 'text/plain'"),
        ({"content-type": "application/json", "content-encoding": "gzip"}, "send it uncompressed"),
        ({"content-type": "application/json; charset=utf-8"}, None),
    ],
)
def test_the_content_type(server, headers, message):
    body = json.dumps({"model": NAME, "messages": HELLO, "max_tokens": 1}).encode()
    if "content-encoding" in headers:
        body = b"\x1f\x8b" + body
    answer = httpx.post(server.url + "/v1/chat/completions", content=body, headers=headers)
    assert answer.status_code == (400 if message else 200)
    assert not message or message in answer.json()["error"]["message"]


def test_odd_bodies_are_openais_errors(server):
    url, headers = server.url + "/v1/chat/completions", {"content-type": "application/json"}
    bodies = [b'{"\\ud800": 1}', b'{"model": "\\ud800"}', b'{"seed": ' + b"9" * 5000 + b"}", b"\xff", b'{"n": NaN}']
    for body in bodies:
        answer = httpx.post(url, content=body, headers=headers)
        assert answer.status_code == 400 and answer.json()["error"]["message"], body


def test_methods_and_slashes(server):
    for path in ("/", "/health", "/v1/models", f"/v1/models/{NAME}"):
        answer = httpx.head(server.url + path)
        assert answer.status_code == 200 and not answer.content
    assert httpx.get(server.url + "/v1/models/").json()["data"]
    refused = httpx.options(server.url + "/v1/chat/completions")
    assert refused.status_code == 405 and refused.headers["allow"] == "POST" and refused.json()["error"]
    assert httpx.post(server.url + "/v1/completions/", json={}, follow_redirects=True).status_code == 400


def test_events_hold_no_other_line_end(server):
    text = "a\u2028b\u2029c\u0085d"
    body = {"model": NAME, "prompt": text, "echo": True, "stream": True, "max_tokens": 1}
    raw = httpx.post(server.url + "/v1/completions", json=body).content.decode()
    lines = [line for line in raw.splitlines() if line]
    assert all(line.startswith("data: ") for line in lines)
    assert json.loads(lines[0][6:])["choices"][0]["text"].startswith(text)


def test_hosts_keys_and_origins(engine, small_checkpoint):
    hosts = {"localhost", "127.0.0.1", "[::1]", "ai.example"}
    origin = "https://app.example"
    app = create_app(engine, NAME, small_checkpoint, api_key="sesame", hosts=hosts, origins=[origin])
    with Running(app) as server:

        def status(**headers):
            return httpx.get(server.url + "/v1/models", headers=headers).status_code

        for host in ("LOCALHOST", "localhost:9", "[::1]", "[::1]:80", "127.0.0.1", "AI.example"):
            assert status(host=host, authorization="bearer sesame") == 200
        assert status(host="evil.example", authorization="Bearer sesame") == 403
        assert status(authorization="BEARER  sesame") == 200
        assert status(authorization="Basic sesame") == status(authorization="sesame") == 401

        ask = {"origin": origin, "access-control-request-method": "POST"}
        asked = ask | {"access-control-request-headers": "authorization,content-type"}
        preflight = httpx.options(server.url + "/v1/chat/completions", headers=asked)
        assert preflight.status_code == 200 and preflight.headers["access-control-allow-origin"] == origin
        refused = httpx.get(server.url + "/v1/models", headers={"origin": origin})
        assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (401, origin)
        other = httpx.get(server.url + "/v1/models", headers={"origin": "https://evil.example"})
        assert "access-control-allow-origin" not in other.headers

        # The X-ray's frame cannot send the key.
        messages = [*HELLO, {"role": "assistant", "content": "The whale sang."}]
        key, body = {"authorization": "Bearer sesame"}, {"model": NAME, "messages": messages}
        url = httpx.post(server.url + "/xray", json=body, headers=key, timeout=30).json()["url"]
        assert httpx.get(server.url + url).status_code == 200
        assert httpx.post(server.url + "/xray", json=body).status_code == 401


def test_ids_and_times(client):
    said = [client.chat.completions.create(model=NAME, messages=HELLO, max_tokens=1) for _ in range(2)]
    assert said[0].id != said[1].id and said[0].id.startswith("chatcmpl-")
    assert said[0].system_fingerprint == said[1].system_fingerprint and math.isfinite(said[0].created)
    assert all(a.created <= b.created for a, b in itertools.pairwise(said))
