"""Does the server withstand 64 streaming clients for two minutes, and ten thousand malformed requests?

    python benchmarks/serve.py CHECKPOINT

The script starts `moonwhale serve` in its own process. First one client, then many send a request as soon as they have
the previous answer. They count tokens and errors, and the script samples the server's memory. Then come malformed
requests: schemathesis makes some from the server's OpenAPI description; the others are valid requests with a broken
part. None of them may get a 5xx, hang, or see a traceback or a path of this machine.
"""

import asyncio
import contextlib
import itertools
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO
from urllib.parse import urlsplit

import httpx
import psutil

from common import environment, options, write

QUESTIONS = ["Hi! How are you?", "What do you like?", "Tell me about your day.", "Do you have a pet?", "Hello there"]
LEAK = re.compile(r"Traceback|\.py\b|File \"|/(work|home|root|usr|tmp)/")
SLOW = 20.0  # seconds after which a request counts as hanging


@contextlib.contextmanager
def serving(checkpoint: Path, log: IO | None = None) -> Iterator[tuple[str, psutil.Process]]:
    """Yields the server's URL and its process, which writes its errors to `log`."""
    command = [sys.executable, "-m", "moonwhale", "serve", str(checkpoint), "--port", "0", "--name", "model"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True) as process:
        try:
            line = process.stdout.readline()
            yield re.search(r"http://[\d.:]+", line)[0], psutil.Process(process.pid)
        finally:
            process.terminate()
            if process.wait(20) not in (0, -signal.SIGTERM):
                print(f"the server ended with {process.returncode}", file=sys.stderr)


async def ask(url: str, number: int, tokens: int) -> int:
    """Streams one answer and returns its number of tokens. Raises an error if the answer is not complete."""
    address = urlsplit(url)
    body = {"model": "model", "messages": [{"role": "user", "content": QUESTIONS[number % len(QUESTIONS)]}]}
    body |= {"max_tokens": tokens, "stream": True, "stream_options": {"include_usage": True}, "seed": number}
    data = json.dumps(body).encode()
    reader, writer = await asyncio.open_connection(address.hostname, address.port)
    head = "POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1\r\nconnection: close\r\n"
    writer.write(f"{head}content-type: application/json\r\ncontent-length: {len(data)}\r\n\r\n".encode() + data)
    try:
        answer = await asyncio.wait_for(reader.read(-1), 120)
    finally:
        writer.close()
    if not answer.startswith(b"HTTP/1.1 200") or b"data: [DONE]" not in answer or b'"error"' in answer:
        raise RuntimeError(answer[:300].decode("utf-8", "replace"))
    return int(re.search(rb'"completion_tokens": ?(\d+)', answer)[1])


async def load(url: str, process: psutil.Process, clients: int, seconds: float, tokens: int) -> dict:
    """Runs a number of clients for some seconds. Each client sends one request after another."""
    start, numbers, memory = time.perf_counter(), itertools.count(), []
    done = {"tokens": 0, "answers": 0, "errors": 0}

    async def client() -> None:
        while time.perf_counter() - start < seconds:
            try:
                received = await ask(url, next(numbers), tokens)  # `+=` here would miss what others add meanwhile
                done["tokens"] += received
                done["answers"] += 1
            except Exception as error:  # any failure counts
                done["errors"] += 1
                print(f"error: {error!r}"[:400], file=sys.stderr)

    async def watch() -> None:
        while True:
            memory.append(process.memory_info().rss / 1e6)
            await asyncio.sleep(1)

    watching = asyncio.create_task(watch())
    await asyncio.gather(*(client() for _ in range(clients)))
    watching.cancel()
    took = time.perf_counter() - start
    quarter = max(1, len(memory) // 4)
    return done | {
        "tokens_per_second": round(done["tokens"] / took, 1),
        "megabytes_second_quarter": round(statistics.median(memory[quarter : 2 * quarter] or memory), 1),
        "megabytes_last_quarter": round(statistics.median(memory[-quarter:]), 1),
    }


WRONG = [
    None,
    True,
    -1,
    0,
    1e308,
    10**30,
    0.5,
    "",
    "x",
    "\u0000",
    "\ud800",
    [],
    {},
    [None],
    [[]],
    {"a": {}},
    ["x"] * 50,
]
FIELDS = ["model", "messages", "prompt", "max_tokens", "temperature", "top_p", "top_k", "min_p", "n", "stop", "seed"]
FIELDS += ["stream", "stream_options", "logprobs", "top_logprobs", "repetition_penalty", "echo", "user", "tools", "🐳"]

SETTINGS = ["num_experts_per_tok", "moba_topk", "moba_block_size"]

HELLO = [{"role": "user", "content": "hi"}]
PATHS = ["/v1/" + "x" * 300, "/v1/models/%00", "/../../etc/passwd", "/xray/..%2f", "/v1", "/v1/models", "/health"]
PATHS += ["/metrics", "/", "/main.js", "/page.css", "/openapi.json", "/xray/%1b[2J", "/v1/models/model", "/%ff"]


def broken(draw: random.Random, page: str) -> tuple[str, str, bytes, dict]:
    """Returns the method, path, body and headers of a broken request. `page` is the path of an X-ray that exists."""
    path = draw.choice(["/v1/chat/completions"] * 5 + ["/v1/completions"] * 3 + ["/xray"] * 2 + [page] * 2)
    body: dict = {"model": "model"} | ({} if path == "/xray" else {"max_tokens": 1})
    has_messages = path in ("/v1/chat/completions", "/xray")
    body |= {"messages": [{"role": "user", "content": "hi"}]} if has_messages else {"prompt": "hi"}
    body = {name: 1 for name in SETTINGS if draw.random() < 0.5} if path == page else body
    for field in draw.sample(SETTINGS * 3 + FIELDS if path == page else FIELDS, draw.randint(1, 3)):
        body[field] = draw.choice(WRONG)
    if path == "/xray" and draw.random() < 0.5:
        body["messages"] = [*HELLO, {"role": "assistant", "content": draw.choice(WRONG)}]
    elif has_messages and draw.random() < 0.3:
        message = {"role": draw.choice(["user", "robot", None, 3]), "content": draw.choice(WRONG)}
        body["messages"] = [message, *([] if draw.random() < 0.5 else [draw.choice(WRONG)])]
    data = json.dumps(body).encode()
    if draw.random() < 0.25:  # truncated, or with a random byte
        at = draw.randrange(len(data))
        data = data[:at] + (b"" if draw.random() < 0.5 else bytes([draw.randrange(256)]) + data[at + 1 :])
    headers = {"content-type": draw.choice(["application/json"] * 6 + ["text/plain", "application/xml", "x"])}
    if draw.random() < 0.1:
        path = draw.choice(PATHS)
    method = draw.choice(["POST"] * 12 + ["GET", "PUT", "DELETE", "PATCH", "OPTIONS", "HEAD"])
    return method, path, data, headers


def new_page(client: httpx.Client) -> str:
    """Makes an X-ray, and returns the path of its page."""
    messages = [*HELLO, {"role": "assistant", "content": "hello"}]
    answer = client.post("/xray", json={"model": "model", "messages": messages})
    return answer.raise_for_status().json()["url"]


def malformed(url: str, count: int, seed: int = 0) -> dict:
    """Sends `count` broken requests, and counts statuses, server errors, hangs and leaks."""
    draw, found = random.Random(seed), {"server_errors": 0, "hangs": 0, "leaks": 0, "statuses": {}}
    with httpx.Client(base_url=url, timeout=SLOW) as client:
        for i in range(count):
            if i % 100 == 0:  # the server keeps the newest pages only, and some of the requests may make one
                page = new_page(client)
            method, path, data, headers = broken(draw, page)
            note(found, lambda: client.request(method, path, content=data, headers=headers))  # noqa: B023 (called at once)
    return found


def from_schema(url: str, count: int) -> dict:
    """Does the same with valid and invalid requests that schemathesis makes from the OpenAPI description."""
    import schemathesis
    from hypothesis import HealthCheck, given, settings
    from hypothesis.errors import Unsatisfiable

    found = {"server_errors": 0, "hangs": 0, "leaks": 0, "statuses": {}}
    operations = [result.ok() for result in schemathesis.openapi.from_url(url + "/openapi.json").get_all_operations()]
    modes = (schemathesis.GenerationMode.NEGATIVE, schemathesis.GenerationMode.POSITIVE)
    each = count // (len(operations) * len(modes)) + 1
    quiet = settings(max_examples=each, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    for operation, mode in itertools.product(operations, modes):
        with contextlib.suppress(Unsatisfiable):  # an operation without parameters has no negative cases

            @quiet
            @given(case=operation.as_strategy(generation_mode=mode))
            def check(case) -> None:
                note(found, lambda: case.call(base_url=url, timeout=SLOW))

            check()
    return found


def note(found: dict, send) -> None:
    """Sends a request and adds its result to `found`."""
    try:
        answer = send()
    except Exception as error:
        # A request that the client refuses to send (a header or a path) says nothing about the server. A timeout does.
        if "timeout" in type(error).__name__.lower() or "timed out" in str(error):
            found["hangs"] += 1
        return
    status = str(answer.status_code)
    found["statuses"][status] = found["statuses"].get(status, 0) + 1
    found["server_errors"] += answer.status_code >= 500
    if answer.status_code >= 400 and LEAK.search(answer.text):
        found["leaks"] += 1
        print(f"leak: {answer.text[:300]}", file=sys.stderr)


def main(argv: list[str] | None = None) -> None:
    parser = options(__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path, help="what a run wrote with --out")
    parser.add_argument("--clients", type=int, default=64, help="clients that stream at a time (64)")
    parser.add_argument("--seconds", type=float, default=120, help="how long they run (120)")
    parser.add_argument("--tokens", type=int, default=64, help="longest answer, in tokens (64)")
    parser.add_argument("--malformed", type=int, default=10_000, help="malformed requests (10000)")
    arguments = parser.parse_args(argv)
    with serving(arguments.checkpoint) as (url, process):
        asyncio.run(load(url, process, arguments.clients, 3, arguments.tokens))  # warm-up
        one = asyncio.run(load(url, process, 1, arguments.seconds / 6, arguments.tokens))
        many = asyncio.run(load(url, process, arguments.clients, arguments.seconds, arguments.tokens))
        time.sleep(1)
        rest = httpx.get(url + "/health").json()
        schema = from_schema(url, arguments.malformed // 5)
        sent = sum(schema["statuses"].values())
        handmade = malformed(url, arguments.malformed - sent)
        after = asyncio.run(load(url, process, 1, 2, arguments.tokens))
    answered = sent + sum(handmade["statuses"].values())
    result = {
        "clients": arguments.clients,
        "seconds": arguments.seconds,
        "errors": many["errors"] + one["errors"] + after["errors"],
        "stuck_slots": rest["running"] + rest["waiting"],
        "throughput_vs_one": round(many["tokens_per_second"] / one["tokens_per_second"], 2),
        "memory_growth": round(many["megabytes_last_quarter"] / many["megabytes_second_quarter"] - 1, 4),
        "malformed_requests": answered,
        "server_errors": schema["server_errors"] + handmade["server_errors"],
        "hangs": schema["hangs"] + handmade["hangs"],
        "leaks": schema["leaks"] + handmade["leaks"],
        "one": one,
        "many": many,
        "statuses": {"schemathesis": schema["statuses"], "by hand": handmade["statuses"]},
        "environment": environment("as served", False),
    }
    write(arguments.results, "serve", result)


if __name__ == "__main__":
    os.environ.setdefault("HYPOTHESIS_STORAGE_DIRECTORY", "/dev/null")
    main()
