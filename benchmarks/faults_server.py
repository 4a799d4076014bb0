"""Does the server withstand hostile clients? One stream is watched while each of twenty attacks; faults.py runs it.

Then a thousand requests are cancelled, ten thousand malformed ones are sent to all endpoints, and 64 clients stream.
"""

import asyncio
import itertools
import json
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import psutil

from hostile_clients import CLIENTS
from serve import load, malformed, serving

STALL = 1.0  # seconds


def run(
    checkpoint: Path,
    seconds: float = 5,
    cancelled: int = 1000,
    broken: int = 10_000,
    clients: int = 64,
    minutes: float = 2,
) -> dict:
    """Runs all trials against `moonwhale serve` and returns their counts.

    seconds: how long each hostile client attacks.
    cancelled, broken: numbers of requests.
    clients, minutes: how many clients stream at the end, and how long.
    """
    with tempfile.TemporaryFile("w+") as log, serving(checkpoint, log) as (url, process):
        asyncio.run(load(url, process, 8, 2, 32))  # warm-up
        result = watch_streams(url, seconds) | cancel(url, process, cancelled)
        found = malformed(url, broken)
        result |= {"malformed_requests": sum(found["statuses"].values())}
        result |= {f"malformed_{name}": found[name] for name in ("server_errors", "hangs", "leaks", "statuses")}
        many = asyncio.run(load(url, process, clients, 60 * minutes, 64))
        growth = many["megabytes_last_quarter"] / many["megabytes_second_quarter"] - 1
        result |= {"load_errors": many["errors"], "load_memory_growth": round(growth, 4)}
        result["stuck_slots"] += not comes_to_rest(url)
        log.seek(0)
        lines = log.read()
    result |= {"server_tracebacks": lines.count("Traceback"), "server_log_bytes": len(lines)}
    if lines:
        print(f"the server's log: {lines[:2000]}", file=sys.stderr)
    return result


def watch_streams(url: str, seconds: float) -> dict:
    """Watches another client's streams while each hostile client attacks."""
    gaps = {client.pieces.__name__: watch_one(url, client.pieces.__name__, seconds) for client in CLIENTS}
    starved = [name for name, found in gaps.items() if not found]
    stalls = {name: sum(gap > STALL for gap in found) for name, found in gaps.items()}
    for name in starved:
        print(f"{name}: no stream began", file=sys.stderr)
    for name in filter(stalls.get, stalls):
        print(f"{name}: a stream stood still for {max(gaps[name]):.1f} s", file=sys.stderr)
    longest = {name: round(max(found, default=0), 2) for name, found in gaps.items()}
    return {
        "hostile_clients": len(gaps),
        "stalls_over_1s": sum(stalls.values()),
        "starved": len(starved),
        "longest_gap": max(longest.values()),
        "longest_gaps": longest,
    }


def watch_one(url: str, name: str, seconds: float) -> list[float]:
    """Returns the times between the events of streams that run while one hostile client attacks."""
    gaps: list[float] = []
    over = threading.Event()
    watching = threading.Thread(target=watch, args=(url, over, gaps))
    watching.start()
    address, script = urlsplit(url), Path(__file__).with_name("hostile_clients.py")
    time.sleep(0.2)
    subprocess.run([sys.executable, script, name, address.hostname, str(address.port), "model", str(seconds)])
    over.set()
    watching.join()
    return gaps


def watch(url: str, over: threading.Event, gaps: list[float]) -> None:
    """Streams one answer after another, and adds the times between its events to `gaps`."""
    body = {"model": "model", "messages": [{"role": "user", "content": "Hi"}], "stream": True, "temperature": 1.2}
    with httpx.Client(timeout=60) as client:
        for seed in itertools.count():
            try:
                with client.stream("POST", url + "/v1/chat/completions", json=body | {"seed": seed}) as answer:
                    last = None
                    for _ in answer.iter_raw() if answer.status_code == 200 else ():
                        now = time.perf_counter()
                        gaps += [now - last] if last else []
                        last = now
            except httpx.HTTPError:
                last = None
            if over.is_set():
                return
            if last is None:  # refused, as others may be in a flood
                time.sleep(0.05)


def cancel(url: str, process: psutil.Process, count: int) -> dict:
    """Sends requests and disconnects: at once, after the first event, and after some time."""
    address = urlsplit(url)

    def send(number: int) -> None:
        body = {"model": "model", "messages": [{"role": "user", "content": "Hi"}], "stream": number % 2 == 0}
        data = json.dumps(body | {"temperature": 1, "seed": number}).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-length: {len(data)}\r\n"
        with socket.create_connection((address.hostname, address.port), 5) as connection:
            connection.sendall(head.encode() + b"content-type: application/json\r\n\r\n" + data)
            if number % 4 == 0:
                connection.recv(100)
            elif number % 4 == 1:
                time.sleep(0.02)

    def megabytes() -> float:
        return process.memory_info().rss / 1e6

    for number in range(min(100, count)):  # memory grows once, to what the largest batch needs
        send(number)
    is_free, before = comes_to_rest(url), megabytes()
    for number in range(count):
        send(number)
    is_free = comes_to_rest(url) and is_free
    return {
        "cancelled": count,
        "stuck_slots": int(not is_free),
        "cancelled_memory_growth": round(megabytes() / before - 1, 4),
    }


def comes_to_rest(url: str) -> bool:
    """Returns whether no request runs or waits within ten seconds."""
    for _ in range(100):
        health = httpx.get(url + "/health", timeout=20).json()
        if health["running"] == health["waiting"] == 0:
            return True
        time.sleep(0.1)
    return False


if __name__ == "__main__":
    print(json.dumps(run(Path(sys.argv[1]))))
