"""Requests as other clients send them, with all the fields that they send unasked: each is answered or refused."""

import asyncio
import json
import urllib.request

import httpx
import pytest
import requests

from moonwhale.serve.app import create_app
from serving import HELLO, NAME, Running

CHAT, TEXT = "chat/completions", "completions"
SYSTEM = {"role": "system", "content": "Sing."}
PARTS = {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}
SAID = {"role": "assistant", "content": "The whale sang."}
CALL = {"id": "1", "type": "function", "function": {"name": "sing", "arguments": "{}"}}
TOOL = {"type": "function", "function": {"name": "sing", "description": "", "parameters": {"type": "object"}}}
SCHEMA = {"type": "json_schema", "json_schema": {"name": "A", "schema": {"type": "object"}}}
STREAM = {"stream": True, "stream_options": {"include_usage": True}}
ZEROS = {"frequency_penalty": 0, "presence_penalty": 0}

# (client, endpoint, body, None or a part of the refusal)
REQUESTS = [
    ("langchain-openai", CHAT, {"messages": HELLO, "max_completion_tokens": 8, "stream": False}, None),
    ("langchain-openai", CHAT, {"messages": [SYSTEM, PARTS, SAID, *HELLO], "stream": True}, None),
    ("langchain-openai", CHAT, {"messages": HELLO, "tools": [TOOL], "parallel_tool_calls": False}, "calls none"),
    ("langchain-openai", CHAT, {"messages": HELLO, "response_format": SCHEMA, "stream": False}, "the form cannot"),
    (
        "langchain-openai",
        CHAT,
        {
            "messages": [
                *HELLO,
                {"role": "assistant", "content": None, "tool_calls": [CALL]},
                {"role": "tool", "content": "x", "tool_call_id": "1"},
            ]
        },
        "messages.1.tool_calls: [{'id': '1'",
    ),
    ("langchain-openai", CHAT, {"messages": [HELLO[0] | {"name": "bob"}]}, "the chat template has no names"),
    (
        "langchain-openai",
        TEXT,
        {"prompt": ["The"], "logprobs": None, "n": 2, "best_of": 2, "seed": None, "top_p": 1} | ZEROS,
        None,
    ),
    ("Vercel AI SDK", CHAT, {"messages": [SYSTEM, *HELLO], "max_tokens": 8, "temperature": 0} | STREAM, None),
    ("Vercel AI SDK", CHAT, {"messages": [PARTS], "top_p": 0.9, "stop": ["x"], "seed": 1} | ZEROS, None),
    ("Vercel AI SDK", CHAT, {"messages": HELLO, "tools": [TOOL], "tool_choice": "auto"}, "calls none"),
    ("Vercel AI SDK", TEXT, {"prompt": "user:\nHi\n\nassistant:\n", "stop": ["\nuser:"]} | STREAM, None),
    ("open-webui", CHAT, {"messages": [SYSTEM, *HELLO], "stream": True}, None),
    ("open-webui", CHAT, {"messages": HELLO, "stream": False, "max_completion_tokens": 1000}, None),
    ("open-webui", CHAT, {"messages": HELLO, "top_k": 40, "min_p": 0.05, "seed": 1, "stop": ["x"]} | STREAM, None),
    ("open-webui", CHAT, {"messages": HELLO, "frequency_penalty": 1.1}, "use repetition_penalty"),
    ("Continue", CHAT, {"messages": [SYSTEM, PARTS], "max_tokens": 4096, "temperature": 0.2, "stream": True}, None),
    ("Continue", TEXT, {"prompt": "def f(", "max_tokens": 1024, "stop": ["\n\n", "\n"], "stream": True}, None),
    ("Continue", TEXT, {"prompt": "def f(", "suffix": "return 1"}, "this model only continues a text"),
    (
        "Continue",
        CHAT,
        {"messages": HELLO, "prediction": {"type": "content", "content": "x"}},
        "this server uses no prediction",
    ),
    ("aider", CHAT, {"messages": [SYSTEM, *HELLO, SAID, *HELLO], "temperature": 0, "stream": True}, None),
    (
        "aider",
        CHAT,
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a", "cache_control": {}}]}]},
        "part 0: this server does not know 'cache_control'",
    ),
    ("instructor", CHAT, {"messages": [SYSTEM, *HELLO], "max_tokens": 5}, None),
    (
        "instructor",
        CHAT,
        {"messages": HELLO, "tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "sing"}}},
        "this model calls no tools",
    ),
    ("instructor", CHAT, {"messages": HELLO, "response_format": {"type": "json_object"}}, "the form cannot be set"),
    ("llm", CHAT, {"messages": [SYSTEM, *HELLO]} | STREAM, None),
    ("llm", TEXT, {"prompt": "The", "max_tokens": 8, "stream": True}, None),
    ("OpenAI Agents", CHAT, {"messages": HELLO, "tools": [], "store": False, "metadata": {"a": "b"}} | STREAM, None),
    ("OpenAI Agents", CHAT, {"messages": HELLO, "reasoning_effort": "low"}, "the effort cannot be set"),
    ("promptfoo", CHAT, {"messages": HELLO, "max_tokens": 1024, "temperature": 0, "top_p": 1} | ZEROS, None),
    ("LibreChat", CHAT, {"messages": HELLO, "user": "65f1", "stream": True, "top_p": 1} | ZEROS, None),
    ("vLLM's benchmark", TEXT, {"prompt": "The", "logprobs": None, "repetition_penalty": 1.0} | STREAM, None),
    ("vLLM's benchmark", TEXT, {"prompt": "The", "ignore_eos": True}, "ignore_eos: this server does not know"),
    (
        "GuideLLM",
        TEXT,
        {"prompt": "The", "stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}},
        "stream_options.continuous_usage_stats: this server does not know",
    ),
    ("SillyTavern", CHAT, {"messages": HELLO, "seed": -1}, "seed: "),
    ("llama.cpp's clients", TEXT, {"prompt": "The", "n_predict": 9}, "n_predict: this server does not know this field"),
    ("DeepSeek's clients", CHAT, {"messages": [*HELLO, SAID | {"reasoning_content": "x"}, *HELLO]}, "does not know"),
    ("an older client", CHAT, {"messages": [*HELLO, {"role": "function", "name": "f", "content": "x"}]}, "not 'funct"),
    ("an older client", CHAT, {"messages": HELLO, "functions": [{"name": "f"}]}, "functions: this model calls none"),
    (
        "OpenAI's reference",
        CHAT,
        {"messages": [*HELLO, {"role": "assistant", "content": None, "refusal": "No."}, *HELLO]},
        "messages.1.refusal: 'No.' is not supported",
    ),
    ("OpenAI's reference", CHAT, {"messages": [*HELLO, {"role": "assistant"}]}, "messages.1.content: field required"),
    (
        "OpenAI's reference",
        CHAT,
        {"messages": [{"role": "developer", "content": [{"type": "text", "text": "Sing."}]}, *HELLO]},
        None,
    ),
    (
        "OpenAI's reference",
        CHAT,
        {"messages": [*HELLO, {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]}]},
        "no part of type 'refusal'",
    ),
    ("OpenAI's reference", CHAT, {"messages": HELLO, "logit_bias": {"50256": -100}}, "shifts no token's logit"),
    ("OpenAI's reference", CHAT, {"messages": HELLO, "max_tokens": 3, "max_completion_tokens": 4}, "only one of them"),
    ("OpenAI's reference", TEXT, {"prompt": "The", "n": 2, "best_of": 4}, "best_of: 4 is not supported"),
]


@pytest.fixture(scope="module")
def url(small_engine, small_checkpoint):
    with Running(create_app(small_engine(), NAME, small_checkpoint)) as server:
        yield server.url + "/v1"


@pytest.mark.contract("OpenAI clients and endpoints", "bodies that a dozen other clients send")
@pytest.mark.parametrize(
    ("path", "body", "refusal"),
    [pytest.param(*request, id=f"{i}-{client}") for i, (client, *request) in enumerate(REQUESTS)],
)
def test_a_request(url, path, body, refusal):
    body = {"model": NAME} | body
    answer = httpx.post(f"{url}/{path}", json=body, timeout=20)
    if refusal is None:
        assert answer.status_code == 200, answer.text
        assert '"error"' not in answer.text
    else:
        assert answer.status_code == 400
        message = answer.json()["error"]["message"]
        assert refusal in message and "\n" not in message
    if body.get("stream"):  # a refused stream is an ordinary error, not an event
        assert answer.text.startswith("data: ") == (refusal is None)


BODY = {"model": NAME, "messages": HELLO, "max_tokens": 3, "temperature": 0}
RAW = pytest.mark.contract("OpenAI clients and endpoints", "HTTP libraries: httpx, requests, aiohttp, urllib")


@RAW
def test_every_http_library_gets_the_same(url):
    url, data = f"{url}/{CHAT}", json.dumps(BODY).encode()
    json_type = {"Content-Type": "application/json"}

    def pieces():
        yield data[:10]
        yield data[10:]

    bodies = [
        httpx.post(url, json=BODY).json(),
        httpx.post(url, content=pieces(), headers=json_type).json(),  # in chunks, without a length
        requests.post(url, json=BODY, timeout=20).json(),
        requests.post(url, data=pieces(), headers=json_type, timeout=20).json(),
        json.load(urllib.request.urlopen(urllib.request.Request(url, data, json_type), timeout=20)),
        httpx.post(url, content=b"\n " + json.dumps(BODY, indent=2).encode(), headers=json_type).json(),
    ]
    assert all(body["choices"] == bodies[0]["choices"] for body in bodies)
    lines = requests.post(url, json=BODY | {"stream": True}, stream=True, timeout=20).iter_lines()
    events = [line.removeprefix(b"data: ") for line in lines if line]
    text = "".join(json.loads(event)["choices"][0]["delta"]["content"] for event in events[:-1])
    assert events[-1] == b"[DONE]" and text == bodies[0]["choices"][0]["message"]["content"]


@RAW
def test_aiohttp(url):
    aiohttp = pytest.importorskip("aiohttp")

    async def ask():
        async with aiohttp.ClientSession() as session, session.post(f"{url}/{CHAT}", json=BODY) as answer:
            return answer.status, await answer.json()

    status, body = asyncio.run(ask())
    assert status == 200 and body["choices"] == httpx.post(f"{url}/{CHAT}", json=BODY).json()["choices"]


@RAW
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": BODY}, "application/x-www-form-urlencoded"),
        ({"files": {"file": b"x"}}, "multipart/form-data"),
        ({"content": json.dumps(BODY)}, "there is no content-type"),
        ({"json": [BODY]}, "the body: "),
        ({"json": json.dumps(BODY)}, "the body: "),
    ],
)
def test_a_body_in_another_form(url, options, message):
    answer = httpx.post(f"{url}/{CHAT}", **options)
    assert answer.status_code == 400 and message in answer.json()["error"]["message"]
