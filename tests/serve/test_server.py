"""Tests the server through its clients: OpenAI's Python client, raw HTTP, and a browser's requests."""

import asyncio
import json
import re
import socket
import time
from types import SimpleNamespace

import httpx
import openai
import pytest

from moonwhale.errors import UserError
from moonwhale.infer.sampling_options import SamplingOptions
from moonwhale.serve import commands
from moonwhale.serve.app import create_app
from moonwhale.serve.limits import Limits
from moonwhale.serve.worker import Worker
from serving import HELLO, NAME, Running

LIMITS = Limits(body=20_000, receive=1.0, queue=6, answer=20.0)


@pytest.fixture(scope="module")
def engine(small_engine):
    return small_engine()


@pytest.fixture(scope="module")
def server(engine, small_checkpoint):
    with Running(create_app(engine, NAME, small_checkpoint, LIMITS)) as running:
        yield running


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)


# OpenAI's client


def test_models(client):
    assert [model.id for model in client.models.list()] == [NAME]
    assert client.models.retrieve(NAME).owned_by == "moonwhale"
    with pytest.raises(openai.NotFoundError, match="there is no model 'gpt-4' here: ask for 'tiny'"):
        client.models.retrieve("gpt-4")


def test_a_chat_equals_the_engines_answer(client, engine):
    said = client.chat.completions.create(model=NAME, messages=HELLO, temperature=0, max_tokens=12)
    (alone,) = engine.generate([HELLO], temperature=0, max_new_tokens=12)
    assert said.choices[0].message.content == alone.text
    assert said.choices[0].message.role == "assistant"
    assert said.choices[0].finish_reason == {"eos": "stop", "length": "length"}[alone.finish_reason]
    assert said.usage.prompt_tokens == alone.prompt_tokens
    assert said.usage.completion_tokens == len(alone.token_ids)
    assert said.usage.total_tokens == said.usage.prompt_tokens + said.usage.completion_tokens


def test_a_stream_equals_the_whole_answer(client):
    options = {"model": NAME, "messages": HELLO, "temperature": 1.0, "seed": 5, "max_completion_tokens": 20}
    whole = client.chat.completions.create(**options)
    chunks = list(client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].delta.content or "" for c in chunks[:-1]) == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks[:-1]][-1] == whole.choices[0].finish_reason
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage
    assert len({c.id for c in chunks}) == 1


def test_completions(client, engine):
    prompts = ["The whale", "and the moon"]
    said = client.completions.create(model=NAME, prompt=prompts, max_tokens=9, temperature=0, echo=True)
    alone = engine.generate(prompts, temperature=0, max_new_tokens=9)
    assert [c.text for c in said.choices] == [p + a.text for p, a in zip(prompts, alone, strict=True)]
    ids = engine.encode("The whale")
    again = client.completions.create(model=NAME, prompt=ids, max_tokens=9, temperature=0)
    assert again.choices[0].text == alone[0].text
    pieces = client.completions.create(model=NAME, prompt=ids, max_tokens=9, temperature=0, stream=True)
    assert "".join(piece.choices[0].text for piece in pieces) == alone[0].text


def test_choices_get_consecutive_seeds(client):
    options = {"model": NAME, "messages": HELLO, "max_tokens": 8}
    three = client.chat.completions.create(**options, n=3, seed=11)
    one = client.chat.completions.create(**options)
    assert three.usage.prompt_tokens == one.usage.prompt_tokens, "a prompt counts once"
    texts = [choice.message.content for choice in three.choices]
    alone = [client.chat.completions.create(**options, seed=11 + i).choices[0].message.content for i in range(3)]
    assert texts == alone and len(set(texts)) > 1
    streamed = ["", "", ""]
    for chunk in client.chat.completions.create(**options, n=3, seed=11, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content
    assert streamed == texts


def test_stop_strings_end_an_answer(client):
    options = {"model": NAME, "messages": HELLO, "temperature": 0, "max_tokens": 30}
    text = client.chat.completions.create(**options).choices[0].message.content
    said = client.chat.completions.create(**options, stop=text[4:6]).choices[0]
    assert (said.message.content, said.finish_reason) == (text[: text.index(text[4:6])], "stop")


def test_logprobs(client):
    options = {"model": NAME, "temperature": 0, "max_tokens": 5}
    said = client.chat.completions.create(**options, messages=HELLO, logprobs=True, top_logprobs=3)
    content = said.choices[0].logprobs.content
    assert len(content) == said.usage.completion_tokens
    for entry in content:
        assert entry.logprob == entry.top_logprobs[0].logprob >= entry.top_logprobs[2].logprob
        assert entry.logprob <= 0 and bytes(entry.bytes).decode("utf-8", "replace") == entry.token
    streamed = client.chat.completions.create(**options, messages=HELLO, logprobs=True, stream=True)
    parts = [chunk.choices[0].logprobs for chunk in streamed]
    assert parts[0] is None and [e.token for part in parts[1:] for e in part.content] == [e.token for e in content]
    old = client.completions.create(**options, prompt="The", logprobs=2).choices[0].logprobs
    assert len(old.tokens) == len(old.token_logprobs) == len(old.top_logprobs) == len(old.text_offset)
    assert old.text_offset[0] == 0 and old.text_offset[1] == len(old.tokens[0])


def test_text_parts_are_joined(client):
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    options = {"model": NAME, "temperature": 0, "max_tokens": 8}
    one, other = (
        client.chat.completions.create(messages=[{"role": "user", "content": content}], **options)
        for content in (parts, "Hello")
    )
    assert one.choices[0].message.content == other.choices[0].message.content


def test_a_chat_may_drop_its_oldest_turns(client, engine):
    turns = [{"role": "user", "content": "moon"}, {"role": "assistant", "content": "sang"}] * 60
    messages = [{"role": "developer", "content": "Sing."}, *turns, *HELLO]
    options = {"model": NAME, "messages": messages, "temperature": 0, "max_tokens": 8}
    for refused in ({}, {"truncation": "disabled"}, {"truncation": None}):
        with pytest.raises(openai.BadRequestError, match="shorten it"):
            client.chat.completions.create(**options, extra_body=refused)
    raw = client.chat.completions.with_raw_response.create(**options, extra_body={"truncation": "auto"})
    n = int(raw.headers["moonwhale-dropped-messages"])
    assert 0 < n < len(turns) and n % 2 == 0
    kept = [{"role": "system", "content": "Sing."}, *messages[n + 1 :]]
    (alone,) = engine.generate([kept], temperature=0, max_new_tokens=8)
    said = raw.parse()
    assert said.choices[0].message.content == alone.text and said.usage.prompt_tokens == alone.prompt_tokens
    streaming = client.chat.completions.with_streaming_response
    with streaming.create(**options, stream=True, extra_body={"truncation": "auto"}) as response:
        assert response.headers["moonwhale-dropped-messages"] == str(n)
        assert "".join(chunk.choices[0].delta.content for chunk in response.parse()) == alone.text
    whole = options | {"messages": HELLO}
    raw = client.chat.completions.with_raw_response.create(**whole, extra_body={"truncation": "auto"})
    assert raw.headers["moonwhale-dropped-messages"] == "0"
    with pytest.raises(openai.BadRequestError, match="shorten it"):
        whole["messages"] = [{"role": "user", "content": "sang " * 500}]
        client.chat.completions.create(**whole, extra_body={"truncation": "auto"})
    with pytest.raises(openai.BadRequestError, match="truncation"):
        client.chat.completions.create(**options, extra_body={"truncation": "middle"})


# Requests that the server refuses


BAD = {
    "unknown model": ({"model": "x"}, 404, "no model 'x' here", "model"),
    "no model": ({"model": None}, 400, "model: ", "model"),
    "no messages": ({"messages": []}, 400, "messages: ", "messages"),
    "an unknown role": ({"messages": [{"role": "robot", "content": "x"}]}, 400, "messages.0.role", "messages.0.role"),
    "messages of the wrong type": ({"messages": "hello"}, 400, "messages: ", "messages"),
    "a picture": (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:"}}]}]},
        400,
        "reads text only, no part of type 'image_url'",
        "messages.0.content",
    ),
    "a negative limit": ({"max_tokens": -1}, 400, "max_tokens: ", "max_tokens"),
    "half a token": ({"max_tokens": 1.5}, 400, "max_tokens: ", "max_tokens"),
    "a high temperature": ({"temperature": 3}, 400, "temperature: ", "temperature"),
    "a temperature in words": ({"temperature": "hot"}, 400, "temperature: ", "temperature"),
    "an empty stop string": ({"stop": ""}, 400, "a stop string must not be empty", "stop"),
    "stops of the wrong type": ({"stop": [1]}, 400, "stop", "stop"),
    "an unknown field": ({"tool": []}, 400, "tool: this server does not know this field", "tool"),
    "a penalty it does not have": ({"presence_penalty": 1}, 400, "presence_penalty: ", "presence_penalty"),
    "top_logprobs without logprobs": ({"top_logprobs": 2}, 400, "set logprobs to true", None),
    "stream options without a stream": ({"stream_options": {}}, 400, "set stream to true", "stream_options"),
    "half a surrogate pair": ({"messages": [{"role": "user", "content": "\ud800"}]}, 400, "not valid UTF-8", None),
    "a prompt over the context": ({"messages": [{"role": "user", "content": "sang " * 500}]}, 400, "shorten it", None),
    "too many choices": ({"n": 1000}, 400, "n: ", "n"),
    "a negative seed": ({"seed": -1}, 400, "seed: ", "seed"),
}


def assert_error(answer, status, message, param=None):
    error = answer.json()["error"]
    assert answer.status_code == status, error
    assert message in error["message"] and set(error) == {"message", "type", "param", "code"}
    assert param is None or error["param"].startswith(param)
    assert "Traceback" not in answer.text and "/" not in error["message"].replace("/v1/models and /health", "")


@pytest.mark.parametrize("what", BAD)
def test_bad_requests_are_openais_errors(server, what):
    body, status, message, param = BAD[what]
    assert_error(server.post(**body), status, message, param)


@pytest.mark.parametrize(
    ("body", "message"),
    [(b"{", "not JSON"), (b'"hello"', "the body: "), (b"\xff\xfe{}", ""), (b"", "the body"), (b"[" * 9000, "")],
)
def test_a_body_that_is_not_a_request(server, body, message):
    headers = {"content-type": "application/json"}
    assert_error(httpx.post(server.url + "/v1/chat/completions", content=body, headers=headers), 400, message)


@pytest.mark.parametrize("prompt", [[], [[]], [99999], [-1], [True], {"a": 1}, [["x"]], "x " * 3000])
def test_a_bad_prompt(server, prompt):
    answer = server.post("/v1/completions", prompt=prompt, messages=None)
    assert answer.status_code == 400
    body = {"model": NAME, "prompt": prompt}
    answer = httpx.post(server.url + "/v1/completions", json=body)
    assert answer.status_code == 400 and answer.json()["error"]["message"]


def test_paths_and_methods(server):
    assert_error(httpx.get(server.url + "/v1/embeddings"), 404, "nothing at this path")
    assert_error(httpx.get(server.url + "/v1/chat/completions"), 405, "does not take this method")


def test_a_large_body_is_refused_unread(server):
    assert_error(server.post(messages=[{"role": "user", "content": "x" * 30_000}]), 413, "larger than 20,000 bytes")

    def endless():
        for _ in range(100):
            yield b" " * 1000

    answer = httpx.post(server.url + "/v1/chat/completions", content=endless())
    assert_error(answer, 413, "larger than 20,000 bytes")


def test_a_body_that_never_ends_is_a_408(server):
    with socket.create_connection(server.listener.getsockname()) as slow:
        slow.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{")
        slow.settimeout(10)
        assert b" 408 " in slow.recv(4096).partition(b"\r\n")[0]


# Load, and clients that disconnect


async def _many(url, n, **options):
    async with openai.AsyncOpenAI(base_url=url + "/v1", api_key="none", max_retries=0) as client:
        ask = client.chat.completions.create
        return await asyncio.gather(
            *(ask(model=NAME, messages=HELLO, seed=i, **options) for i in range(n)), return_exceptions=True
        )


def test_concurrent_clients_get_the_same_answers_as_alone(server, client):
    together = asyncio.run(_many(server.url, 6, max_tokens=25))
    for i, said in enumerate(together):
        alone = client.chat.completions.create(model=NAME, messages=HELLO, seed=i, max_tokens=25)
        assert said.choices[0].message.content == alone.choices[0].message.content


def test_a_full_queue_is_a_429(server, engine, monkeypatch):
    step = engine.scheduler.step
    monkeypatch.setattr(engine.scheduler, "step", lambda: (time.sleep(0.02), step()))
    monkeypatch.setattr(engine.scheduler, "slots", 1)
    answers = asyncio.run(_many(server.url, 30, max_tokens=5))
    refused = [answer for answer in answers if isinstance(answer, openai.RateLimitError)]
    assert refused and len(refused) + sum(hasattr(answer, "choices") for answer in answers) == 30
    assert refused[0].response.headers["retry-after"]
    assert server.comes_to_rest()


def test_each_submitted_answer_waits(engine):
    async def waiting() -> int:
        worker = Worker(engine.scheduler)  # its thread has not started yet
        worker.submit([engine.request([1, 2], SamplingOptions(), i) for i in range(3)])
        worker.cancel(worker.submit([engine.request([3], SamplingOptions())]))
        return worker.num_waiting

    assert asyncio.run(waiting()) == 4


def test_a_prompt_that_is_read_while_requests_are_counted():
    """The model's thread ends it between two looks of the event loop's."""

    class Scheduler:
        running, looks = (), iter([SimpleNamespace(finish_reason=None), None])
        prefilling = property(lambda self: next(self.looks))

    assert Worker(Scheduler()).num_running == 1


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_disconnects_frees_its_slot(server, engine, monkeypatch, stream):
    step = engine.scheduler.step
    monkeypatch.setattr(engine.scheduler, "step", lambda: (time.sleep(0.05), step()))
    body = json.dumps({"model": NAME, "messages": HELLO, "max_tokens": 80, "stream": stream, "seed": 1}).encode()
    with socket.create_connection(server.listener.getsockname()) as gone:
        gone.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
            b"content-length: %d\r\n\r\n%s" % (len(body), body)
        )
        assert any(server.health()["running"] or time.sleep(0.02) for _ in range(100))
    monkeypatch.setattr(engine.scheduler, "step", lambda: (time.sleep(0.3), step()))  # 80 of these would take 24 s
    start = time.time()
    assert server.comes_to_rest() and time.time() - start < 6


def test_an_answer_that_takes_too_long_ends(engine, small_checkpoint, monkeypatch):
    step = engine.scheduler.step
    # One step takes longer than the limit, so that even a short answer is too slow.
    monkeypatch.setattr(engine.scheduler, "step", lambda: (time.sleep(0.8), step()))
    with Running(create_app(engine, NAME, small_checkpoint, Limits(answer=0.5))) as server:
        assert_error(server.post(max_tokens=80), 408, "took more than 0.5 seconds")
        streamed = server.post(max_tokens=80, stream=True).text
        assert "took more than 0.5 seconds" in streamed and streamed.endswith("data: [DONE]\n\n")
        assert server.comes_to_rest()


def test_a_model_failure_is_a_503_and_the_next_request_succeeds(server, engine, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(engine.scheduler, "_verify", lambda: 1 / 0)
        assert_error(server.post(max_tokens=5), 503, "the model had to stop")
    assert server.post(max_tokens=5).status_code == 200


def test_metrics_count_requests_and_tokens(server):
    before = {name: server.metric(name) for name in ("moonwhale_generated_tokens_total", "moonwhale_requests_total")}
    answer = server.post(max_tokens=7, temperature=0).json()
    grown = server.metric("moonwhale_generated_tokens_total") - before["moonwhale_generated_tokens_total"]
    assert grown == answer["usage"]["completion_tokens"]
    assert server.metric("moonwhale_requests_total") > before["moonwhale_requests_total"]
    assert server.metric("moonwhale_drafts_tested_total") >= server.metric("moonwhale_drafts_accepted_total")
    assert server.metric("moonwhale_time_to_first_token_seconds_count") > 0


# The page and the X-ray


def test_pages_load_only_from_this_server(server):
    page = httpx.get(server.url)
    assert page.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    for name in ("main.js", "page.css"):
        assert name in page.text and httpx.get(f"{server.url}/{name}").status_code == 200


def test_an_xray_of_a_conversation(server):
    messages = [*HELLO, {"role": "assistant", "content": "The whale sang."}]
    url = httpx.post(server.url + "/xray", json={"model": NAME, "messages": messages}).json()["url"]
    page = httpx.get(server.url + url)
    assert '"live":true' in page.text and "default-src 'none'" in page.headers["content-security-policy"]
    assert "unsafe" not in page.headers["content-security-policy"]
    assert_error(httpx.get(server.url + "/xray/unknown"), 404, "make it again")
    for bad, message in ((HELLO * 2, "the last one has to be the assistant's"), ([*HELLO] * 1, "messages: ")):
        assert_error(httpx.post(server.url + "/xray", json={"model": NAME, "messages": bad}), 400, message)


def test_an_xray_is_computed_with_other_settings(server):
    messages = [*HELLO, {"role": "assistant", "content": "The whale sang to the moon."}]
    url = server.url + server.post("/xray", messages=messages).json()["url"]
    (data,) = re.findall(r'id="recorded">(.*?)</script>', httpx.get(url).text, re.DOTALL)
    page = json.loads(data)
    assert httpx.post(url, json={}).json() == page["recordings"][0]
    other = httpx.post(url, json={"num_experts_per_tok": 1, "moba_block_size": 8}).json()
    assert other["settings"] == {"num_experts_per_tok": 1, "moba_topk": 2, "moba_block_size": 8}
    assert {len(chosen) for layer in other["layers"] for chosen in layer["experts"]} == {1}
    assert httpx.post(url, json={}).json() == page["recordings"][0], "the model is as it was"
    for bad, message in (
        ({"num_experts_per_tok": 5}, "num_experts_per_tok: 5 is out of bounds: give from 1 to 4"),
        ({"moba_block_size": 1}, "moba_block_size: 1 is out of bounds: give from 4 to 512"),
        ({"moba_topk": 10**30}, "moba_topk"),
        ({"moba_topk": 0}, "moba_topk"),
        ({"moba_topk": "2"}, "moba_topk"),
        ({"moba_topk": 2.5}, "moba_topk"),
        ({"prompt": "x"}, "does not know this field"),
        ([], "the body: "),
    ):
        answer = httpx.post(url, json=bad)
        assert_error(answer, 400, message)
        assert "\n" not in answer.json()["error"]["message"] and len(answer.content) < 500
    assert_error(httpx.post(server.url + "/xray/unknown", json={}), 404, "make it again")


# Access


def test_requests_need_the_api_key(engine, small_checkpoint):
    with Running(create_app(engine, NAME, small_checkpoint, api_key="sesame")) as server:
        assert_error(server.post(), 401, "no valid API key")
        wrong, right = (openai.OpenAI(base_url=server.url + "/v1", api_key=key) for key in ("x", "sesame"))
        with pytest.raises(openai.AuthenticationError):
            wrong.models.list()
        assert right.models.list().data
        assert httpx.get(server.url + "/health").status_code == httpx.get(server.url).status_code == 200
        assert httpx.get(server.url + "/metrics").status_code == 401
        # The browser sends no key for the page's files.
        assert httpx.get(server.url + "/main.js").status_code == httpx.get(server.url + "/page.css").status_code == 200
        body = {"model": NAME, "messages": [*HELLO, {"role": "assistant", "content": "The whale sang."}]}
        assert httpx.post(server.url + "/xray", json=body).status_code == 401


def test_other_host_names_are_refused(engine, small_checkpoint):
    with Running(create_app(engine, NAME, small_checkpoint, hosts={"127.0.0.1"})) as server:
        assert server.health()["status"] == "ok"
        assert_error(httpx.get(server.url + "/health", headers={"host": "evil.example"}), 403, "localhost only")


# The command line


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--port", "70000"], "`port`: 70000 is impossible"),
        (["--max-queue", "0"], "`max_queue`: 0 is impossible"),
        (["--host", "203.0.113.7"], "cannot listen at 203.0.113.7:8000"),
        (["--precision", "int4"], "`precision`: unknown precision"),
        (["--draft", "-1"], "`draft`: "),
    ],
)
def test_bad_options_are_one_line(options, message, small_checkpoint):
    with pytest.raises(UserError, match=message) as caught:
        commands.main([str(small_checkpoint), *options])
    assert "\n" not in str(caught.value)


def test_a_taken_port_is_one_line(small_checkpoint):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"cannot listen at 127.0.0.1:{port}, Address already in use"):
            commands.main([str(small_checkpoint), "--port", str(port)])
