"""Tests what hostile clients cost: large and slow requests, unread answers, idle connections; and failing models."""

import asyncio
import gc
import json
import logging
import socket
import sys
import threading
import time

import httpx
import pytest

from moonwhale.errors import UserError
from moonwhale.serve import commands
from moonwhale.serve.app import create_app
from moonwhale.serve.body import parse
from moonwhale.serve.endpoints import EventStream
from moonwhale.serve.errors import APIError
from moonwhale.serve.limits import Limits
from moonwhale.serve.requests import ChatRequest
from moonwhale.serve.server import LineFormatter, run_server
from serving import HELLO, NAME, Running

LIMITS = Limits(connections=6, head=4000, body=20_000, receive=0.7, queue=6, answer=20.0)


@pytest.fixture(scope="module")
def engine(small_engine):
    return small_engine()


@pytest.fixture(scope="module")
def server(engine, small_checkpoint):
    with Running(create_app(engine, NAME, small_checkpoint, LIMITS), LIMITS) as running:
        yield running


@pytest.fixture
def connect(server):
    """`connect(first_bytes)` returns a connection to the server. Reading it takes at most ten seconds."""
    opened = []

    def connect(data=b""):
        opened.append(socket.create_connection(server.listener.getsockname(), 10))
        opened[-1].sendall(data)
        return opened[-1]

    yield connect
    for connection in opened:
        connection.close()


def rest(connection) -> bytes:
    """Returns what the server sends until it ends the connection."""
    received = b""
    try:
        while piece := connection.recv(1 << 16):
            received += piece
    except ConnectionResetError:
        pass
    return received


def request(body: dict, path="/v1/chat/completions", **headers) -> bytes:
    data = json.dumps({"model": NAME} | body).encode()
    head = {"host": "x", "content-type": "application/json", "content-length": len(data)} | headers
    lines = "".join(f"{name}: {value}\r\n" for name, value in head.items())
    return f"POST {path} HTTP/1.1\r\n{lines}\r\n".encode() + data


# Heads and bodies


@pytest.mark.parametrize(
    "head",
    [
        b"GET /health HTTP/1.1\r\nhost: " + b"x" * 400_000,
        b"GET /" + b"x" * 400_000,
        b"GET /health HTTP/1.1\r\n" + b"x: y\r\n" * 101 + b"\r\n",
        b"\r\n" * 200_000,
        b"x" * 400_000,
    ],
    ids=["a header", "a path", "many headers", "line ends", "no http"],
)
def test_a_large_head_ends_the_connection(server, connect, head):
    connection = connect()
    try:
        connection.sendall(head)
    except (ConnectionResetError, BrokenPipeError):
        return
    assert rest(connection)[:12] in (b"HTTP/1.1 400", b"")
    assert server.health()["status"] == "ok"


def test_trailers_and_chunk_extensions_are_bounded(connect):
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n1"
    for endless in (b";" + b"x" * 300_000, b"\r\n{\r\n0\r\nx: " + b"y" * 300_000):
        connection = connect(head)
        try:
            connection.sendall(endless)
        except (ConnectionResetError, BrokenPipeError):
            continue
        assert rest(connection)[:12] in (b"HTTP/1.1 400", b"")


@pytest.mark.parametrize(
    "first", [b"", b"GET /health HT", b"GET /health HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\n\r\n"]
)
def test_a_client_that_sends_no_more_is_let_go(connect, first):
    start = time.perf_counter()
    connection = connect(first)
    rest(connection)
    assert time.perf_counter() - start < 5


def test_a_client_that_drips_a_second_head_is_let_go(connect):
    connection = connect(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
    assert b" 200 " in connection.recv(1 << 16)
    start = time.perf_counter()
    with pytest.raises((ConnectionResetError, BrokenPipeError)):
        while time.perf_counter() - start < 5:
            connection.sendall(b"G" if time.perf_counter() - start < 0.1 else b"E")
            time.sleep(0.05)


def test_the_bodies_of_all_requests_are_bounded(engine, small_checkpoint):
    with Running(create_app(engine, NAME, small_checkpoint, Limits(bodies=1000)), LIMITS) as server:
        refused = server.post(messages=[{"role": "user", "content": "x" * 2000}])
        assert refused.status_code == 429 and refused.headers["retry-after"]
        assert server.post(max_tokens=2).status_code == 200


def test_many_requests_at_once_are_refused(server, connect):
    connection = connect(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n" * 100)
    assert rest(connection).count(b"HTTP/1.1 ") < 50
    assert rest(connect(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n" * 9)).count(b"HTTP/1.1 200") == 9


def test_a_new_connection_replaces_an_idle_one(server, connect):
    idle = [connect() for _ in range(20)]
    assert server.health()["status"] == "ok"
    idle[0].settimeout(2)
    assert rest(idle[0]) == b""


# Work


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": " ".join(map(str, range(3000)))},
        {"prompt": list(range(4000))},
        {"prompt": [[1] * 4000, [2]]},
        {"messages": [{"role": "user", "content": "1" * 15_000}]},
        {"messages": [{"role": "user", "content": ""}] * 400},
    ],
)
def test_a_prompt_that_cannot_fit_is_not_read(server, engine, body, monkeypatch):
    is_chat = "messages" in body
    small = is_chat and not body["messages"][0]["content"]
    if not small:
        monkeypatch.setattr(engine, "tokenizer", None)
    path = "/v1/chat/completions" if is_chat else "/v1/completions"
    data = json.dumps({"model": NAME} | body, separators=(",", ":"))  # older versions of httpx add spaces
    answer = httpx.post(server.url + path, content=data, headers={"content-type": "application/json"})
    assert answer.status_code == 400 and "shorten it" in answer.json()["error"]["message"]


def test_ranges_of_the_pages_files_are_not_read(server):
    ranges = ",".join(f"{2 * i}-{2 * i}" for i in range(5000))
    answer = httpx.get(server.url + "/main.js", headers={"range": f"bytes={ranges}"})
    assert answer.status_code == 200 and answer.text == httpx.get(server.url + "/main.js").text


@pytest.mark.parametrize(
    "content", ["\ud800", "x" * 15_000, "", "<|eos|>" * 9, "\x00\x1b[2J", "sang " * 900, ["x"], None, {"a": 1}]
)
def test_an_odd_xray_is_refused_or_drawn(server, content):
    messages = [*HELLO, {"role": "assistant", "content": content}]
    answer = server.post("/xray", messages=messages)
    assert answer.status_code in (200, 400), answer.text


def test_a_body_that_nests_too_deep_is_a_400():
    for depth in (500, 900, 990, 5000, 100_000):
        for field in ("tools", "messages", "stop", "logit_bias", "x"):
            data = f'{{"{field}": {"[" * depth}{"]" * depth}}}'.encode()
            with pytest.raises(APIError):
                parse(data, {"content-type": "application/json"}, ChatRequest)


def test_an_answer_of_one_token_frees_its_slot(server):
    assert server.post(max_tokens=1).status_code == 200
    assert server.comes_to_rest()


def test_a_long_stop_string_is_refused(server):
    answer = server.post(stop=["x" * 5000])
    assert answer.status_code == 400 and "at most 1,000 characters, not 5,000" in answer.json()["error"]["message"]


def test_a_long_name_is_not_repeated(server):
    assert len(server.post(model="x" * 9000).content) < 500
    assert len(server.post(**{"x" * 9000: 1}).content) < 1000


@pytest.mark.parametrize("options", [{"temperature": 1e-38}, {"temperature": 5e-324}, {"repetition_penalty": 1e-38}])
def test_extreme_options_are_sampled(server, options):
    answer = server.post(max_tokens=5, logprobs=True, **options)
    assert answer.status_code == 200 and "NaN" not in answer.text


def test_the_event_loop_goes_on_while_a_request_is_read(server, engine, monkeypatch):
    encode, go_on = engine.encode, threading.Event()
    monkeypatch.setattr(engine, "encode", lambda prompt: go_on.wait(10) and encode(prompt))
    asking = threading.Thread(target=server.post, kwargs={"max_tokens": 1})
    asking.start()
    for _ in range(5):
        assert server.health()["running"] == 0
    assert asking.is_alive()
    go_on.set()
    asking.join()


# Slow readers


def test_a_client_that_does_not_read_is_let_go(server):
    server.listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # else the kernel holds the answers
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect(server.listener.getsockname())
    with connection:
        connection.sendall(b"GET /main.js HTTP/1.1\r\nhost: x\r\n\r\n" * 16)
        time.sleep(1.5)
        assert server.health()["status"] == "ok"
        assert len(rest(connection)) < 150_000, "the rest is dropped"
    assert server.comes_to_rest()


def test_a_stream_whose_client_leaves_before_it_begins_is_ended():
    ended = []

    async def events():
        yield "data: begun\n\n"

    async def receive():
        return {"type": "http.disconnect"}

    async def send(_):
        await asyncio.sleep(60)

    stream = EventStream(events(), lambda: ended.append(True))
    asyncio.run(stream({"type": "http", "asgi": {"spec_version": "2.3"}}, receive, send))
    assert ended == [True]


# A model that fails


def failing(*_):
    raise SystemExit("the GPU is gone")


@pytest.mark.parametrize("stream", [True, False])
def test_the_end_of_the_models_thread_is_seen(small_engine, small_checkpoint, monkeypatch, stream):
    engine, ended = small_engine(), threading.Event()
    with Running(create_app(engine, NAME, small_checkpoint, on_end=ended.set)) as server:
        step, steps = engine.scheduler.step, iter(range(3))
        monkeypatch.setattr(engine.scheduler, "step", lambda: step() if next(steps, None) is not None else failing())
        answer = server.post(max_tokens=80, stream=stream, temperature=1, seed=2)
        assert "the model had to stop: SystemExit: the GPU is gone" in answer.text
        assert answer.status_code == (200 if stream else 503)
        health = httpx.get(server.url + "/health")
        assert health.status_code == 503 and "the GPU is gone" in health.json()["reason"]
        assert server.post().status_code == 503, "no request may wait for a thread that has ended"
        assert ended.wait(1)


def test_a_server_whose_model_has_failed_ends_with_an_error(small_engine, small_checkpoint, monkeypatch):
    engine, listener = small_engine(), socket.create_server(("127.0.0.1", 0))
    monkeypatch.setattr(engine.scheduler, "step", failing)
    monkeypatch.setattr(gc, "freeze", lambda: None)
    monkeypatch.setattr(sys, "setswitchinterval", lambda seconds: None)
    answers = []

    def ask():
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1/completions"
        answers.append(httpx.post(url, json={"model": NAME, "prompt": "x"}, timeout=20))

    asking = threading.Thread(target=ask)
    asking.start()  # the socket listens already
    with listener, pytest.raises(UserError, match="the model had to stop: SystemExit: the GPU is gone"):
        run_server(engine, NAME, small_checkpoint, listener, Limits(), None, None, [], restarts=False)
    asking.join()
    assert answers[0].status_code == 503


def test_control_characters_are_escaped_in_the_log():
    record = logging.LogRecord("x", logging.ERROR, "", 0, "a\x1b[2J\x07\x9b\r\nb\tünï %s", ("\x00",), None)
    assert LineFormatter("%(message)s").format(record) == "a\\x1b[2J\\x07\\x9b\\r\nb\tünï \\x00"


def test_the_models_thread_can_be_restarted(small_engine, small_checkpoint, monkeypatch):
    engine = small_engine()
    with Running(create_app(engine, NAME, small_checkpoint, restarts=True)) as server:
        with monkeypatch.context() as patch:
            patch.setattr(engine.scheduler, "step", failing)
            assert server.post(max_tokens=5).status_code == 503
        assert server.post(max_tokens=5).status_code == 200
        assert server.health()["status"] == "ok"


def test_steps_that_always_fail_end_the_models_thread(small_engine, small_checkpoint, monkeypatch):
    engine = small_engine()
    with Running(create_app(engine, NAME, small_checkpoint)) as server:
        monkeypatch.setattr(engine.scheduler, "step", lambda: 1 / 0)
        assert {server.post(max_tokens=5).status_code for _ in range(7)} == {503}
        assert httpx.get(server.url + "/health").status_code == 503


# The command line


def test_an_unsafe_address_is_a_warning(small_checkpoint, capsys):
    with pytest.raises(UserError, match="cannot listen"):
        commands.main([str(small_checkpoint), "--host", "203.0.113.7"])
    assert "give it an --api-key" in capsys.readouterr().err


@pytest.mark.parametrize("key", ["", "a b", "kéy"])
def test_a_key_that_protects_nothing_is_refused(small_checkpoint, key):
    with pytest.raises(UserError, match="`api_key`"):
        commands.main([str(small_checkpoint), "--api-key", key])
