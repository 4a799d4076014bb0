"""Twenty hostile clients of a server. Each one is a function that yields what a connection of it sends.

    python benchmarks/hostile_clients.py NAME HOST PORT MODEL SECONDS

The script runs one of them in a process of its own, so that it takes no time from the one that measures.
"""

import itertools
import json
import os
import random
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

MODEL = "model"  # main replaces it
PAGE_FILE = "/main.js"  # of the chat page


def head(method: str = "POST", path: str = "/v1/completions", **headers) -> bytes:
    lines = {"host": "127.0.0.1", "content-type": "application/json"} | headers
    named = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in lines.items())
    return f"{method} {path} HTTP/1.1\r\n{named}\r\n".encode()


def post(path: str = "/v1/completions", **body) -> bytes:
    data = json.dumps({"model": MODEL} | body).encode()
    return head(path=path, content_length=len(data)) + data


def chat(text: str = "Hello there", **body) -> bytes:
    return post("/v1/chat/completions", messages=[{"role": "user", "content": text}], **body)


# Heads and bodies that do not end


def one_header_without_end() -> Iterator[bytes]:
    yield b"GET /health HTTP/1.1\r\nx: "
    yield from itertools.repeat(b"x" * 65_536)


def headers_without_end() -> Iterator[bytes]:
    yield b"GET /health HTTP/1.1\r\n"
    yield from itertools.repeat(b"x: y\r\n" * 1000)


def a_path_without_end() -> Iterator[bytes]:
    yield b"GET /"
    yield from itertools.repeat(b"x" * 65_536)


def a_dripping_head() -> Iterator[bytes]:
    yield b"POST /v1/completions HTTP/1.1\r\nx: "
    yield from itertools.repeat(b"x")


def a_dripping_body() -> Iterator[bytes]:
    yield head(content_length=900_000)
    yield from itertools.repeat(b" ")


def a_body_without_end() -> Iterator[bytes]:
    yield head(content_length=10**15)
    yield from itertools.repeat(b" " * 65_536)


def chunks_without_end() -> Iterator[bytes]:
    yield head(transfer_encoding="chunked")
    yield from itertools.repeat(b"1\r\n[\r\n" * 2000)


def a_chunk_extension_without_end() -> Iterator[bytes]:
    yield head(transfer_encoding="chunked") + b"1;"
    yield from itertools.repeat(b"x" * 65_536)


def noise() -> Iterator[bytes]:
    draw = random.Random(time.time())
    yield draw.choice([b"\x16\x03\x01\x02\x00", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"GET ", b""]) + draw.randbytes(
        500
    )


def pipelined_requests() -> Iterator[bytes]:
    yield head("GET", "/v1/models") * 3000


def idle_connections() -> Iterator[bytes]:
    yield b""


# Much work in one request


def a_long_text_of_numbers() -> Iterator[bytes]:
    yield post(prompt=" ".join(map(str, range(140_000))))


def many_token_ids() -> Iterator[bytes]:
    yield post(prompt=[[1] * 5000] * 60)


def many_prompts_and_choices() -> Iterator[bytes]:
    yield post(prompt=["The whale"] * 32, n=8, max_tokens=100, logprobs=5)


def long_stop_strings() -> Iterator[bytes]:
    yield chat(stop=["e" * 50_000] * 16)
    yield chat(stop=[character * 1000 for character in "etaoinshrdlucmfw"], stream=True, temperature=1.5)


def a_body_of_mistakes() -> Iterator[bytes]:
    yield post("/v1/chat/completions", messages=[{"role": "x" * 50, "content": [{"x": [1]}] * 3}] * 4000)
    yield head(content_length=900_000) + b"[" * 900_000


def large_xrays() -> Iterator[bytes]:
    turns = [{"role": "user", "content": "word " * 60}, {"role": "assistant", "content": "moon " * 60}]
    yield post("/xray", messages=turns)
    yield post("/xray", messages=[*turns, {"role": "assistant", "content": "9" * 900_000}])


# Answers that are not read, or not waited for


def long_answers_unread() -> Iterator[bytes]:
    yield chat(stream=True, n=8, logprobs=True, top_logprobs=20, temperature=1)
    yield head("GET", PAGE_FILE) * 16


def requests_cancelled() -> Iterator[bytes]:
    yield chat(stream=random.random() < 0.5, max_tokens=400, temperature=1)


def a_flood_of_requests() -> Iterator[bytes]:
    yield chat(max_tokens=5, temperature=1e-38)


@dataclass
class Client:
    """How a hostile client uses what its function yields.

    connections: open at a time.
    pause: seconds after each piece.
    reads: whether it reads what the server sends. A client that does not keeps its connection open.
    leaves: whether it disconnects after the last piece.
    """

    pieces: Callable[[], Iterator[bytes]]
    connections: int = 4
    pause: float = 0
    reads: bool = True
    leaves: bool = False


CLIENTS = [
    Client(one_header_without_end),
    Client(headers_without_end),
    Client(a_path_without_end),
    Client(a_dripping_head, connections=100, pause=0.2),
    Client(a_dripping_body, connections=100, pause=0.2),
    Client(a_body_without_end),
    Client(chunks_without_end),
    Client(a_chunk_extension_without_end),
    Client(noise),
    Client(pipelined_requests),
    Client(idle_connections, connections=700),
    Client(a_long_text_of_numbers),
    Client(many_token_ids),
    Client(many_prompts_and_choices),
    Client(long_stop_strings),
    Client(a_body_of_mistakes),
    Client(large_xrays),
    Client(long_answers_unread, connections=20, reads=False),
    Client(requests_cancelled, connections=8, pause=0.01, leaves=True),
    Client(a_flood_of_requests, connections=300),
]


def use_connection(address: tuple[str, int], client: Client, until: float) -> None:
    """Opens one connection and sends until the server ends it, or the time is over."""
    with socket.create_connection(address, 2) as connection:
        connection.settimeout(1)
        for piece in client.pieces():
            connection.sendall(piece)
            time.sleep(client.pause)
            if time.time() > until:
                return
        while not client.leaves and time.time() < until:
            if not client.reads:
                time.sleep(0.1)
                continue
            try:
                if not connection.recv(1 << 16):
                    return
            except TimeoutError:
                pass


def attack(address: tuple[str, int], client: Client, seconds: float) -> None:
    """Runs all connections of a client, and opens each one again when the server has ended it."""
    until = time.time() + seconds

    def repeat() -> None:
        while time.time() < until:
            try:
                use_connection(address, client, until)
            except OSError:  # the server ended the connection, or takes no more
                time.sleep(0.02)

    threads = [threading.Thread(target=repeat) for _ in range(client.connections)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


if __name__ == "__main__":
    os.nice(10)  # hostile clients are on other machines: what is measured is the server's time, not theirs
    name, host, port, MODEL, seconds = sys.argv[1:]
    attack((host, int(port)), next(c for c in CLIENTS if c.pieces.__name__ == name), float(seconds))
