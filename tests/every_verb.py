"""A script: every verb in one process, at toy size, while no address but this machine's can be reached.

`python every_verb.py FOLDER` prints one JSON object: the exit status of each verb, and the addresses that were wanted.
"""

import contextlib
import io
import json
import os
import signal
import socket
import sys
import threading
import time
import urllib.request
from pathlib import Path

wanted = []


def refuse_others(event: str, arguments: tuple) -> None:
    """An audit hook: Python calls it before a socket connects, or a name is looked up."""
    if event == "socket.getaddrinfo" or event.startswith("socket.gethostby"):
        host = arguments[0]
    elif event in ("socket.connect", "socket.sendto", "socket.sendmsg"):
        address = arguments[1]
        host = address[0] if isinstance(address, tuple) else None  # else a Unix socket
    else:
        return
    host = host.decode() if isinstance(host, bytes) else host
    if host not in (None, "", "localhost", "127.0.0.1", "::1", socket.gethostname()):
        wanted.append(f"{event} {host}")
        raise OSError("this test has no network")


sys.addaudithook(refuse_others)

from moonwhale import cli  # noqa: E402
from toy import TOY  # noqa: E402


def ask_and_stop(port: int, status: list) -> None:
    """Asks a server for an answer and for its page, then presses Ctrl-C."""
    base = f"http://127.0.0.1:{port}"
    body = json.dumps({"model": "base", "prompt": "the moon", "max_tokens": 2}).encode()
    request = urllib.request.Request(f"{base}/v1/completions", body, {"Content-Type": "application/json"})
    try:
        for _ in range(600):
            try:
                status.append(urllib.request.urlopen(f"{base}/health").status)
                break
            except OSError:
                time.sleep(0.1)
        status += [urllib.request.urlopen(what).status for what in (request, base)]
    finally:
        os.kill(os.getpid(), signal.SIGINT)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def main() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell lets its background jobs ignore
    folder = Path(sys.argv[1])
    os.chdir(folder)
    os.environ["MOONWHALE_CACHE"] = str(folder / "cache")
    Path("text").mkdir()
    for i in range(40):
        words = [f"{7**i:x} {11**i:o} whales sang to {13**i} moons." for i in range(i, i + 9)]
        Path(f"text/{i}.txt").write_text(" ".join(words))
    rows = [{"question": f"{i}+{i}", "answer": str(2 * i)} for i in range(40)]
    Path("task.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = {
        "device": "cpu",
        "precision": "fp32",
        "eval_every": 0,
        "save_every": 0,
        "batch_size": 2,
        "steps": 1,
        "warmup_steps": 0,
    }
    train = common | {
        "data": "text",
        "context": 32,
        "tokens_per_step": 64,
        "eval_rows": 2,
        "model": TOY | {"embedding_conv": 0, "latent_embedding_every": 0},  # every format can hold it
    }
    sft = common | {"data": "task:task.jsonl", "context": 32}
    grpo = common | {"task": "task.jsonl", "questions": 4, "group_size": 2, "questions_per_step": 1}
    grpo |= {"max_new_tokens": 4, "eval_questions": 1, "show_answers": 0}
    stages = [{"train": train | {"out": "base"}}, {"sft": sft | {"checkpoint": "base", "out": "talks"}}]
    Path("recipe.yaml").write_text(json.dumps([*stages, {"grpo": grpo | {"checkpoint": "talks", "out": "counts"}}]))
    port = free_port()
    small = ["--device", "cpu", "--precision", "fp32"]
    status, served = {}, []
    sys.stdin = io.StringIO("")
    for argv in (
        ["recipe", "recipe.yaml"],
        ["sample", "base", "--task", "task.jsonl", "--questions", "2", "--max-new-tokens", "2", "--out", "a.jsonl",
         *small],
        ["generate", "base", "the moon", "--max-new-tokens", "2", *small],
        ["chat", "talks", *small],
        ["eval", "base", "--data", "text", "--task", "task.jsonl", "--problems", "1", "--samples", "1",
         "--max-new-tokens", "2", "--out", "eval.json", *small],
        ["compare", "--config", "base/run.yaml", "--vary", "lr=1e-3", "--seeds", "1", "--turns", "1", "--out", "lab"],
        ["xray", "base", "--prompt", "the moon"],
        ["data", "--data", "text", "--context", "32"],
        ["tokenizer", "train", "--data", "text", "--vocab-size", "300", "--out", "tokenizer"],
        ["tokenizer", "show", "base", "the moon"],
        *(["export", "base", "--to", to, "--out", f"as_{to}"] for to in ("deepseek", "code", "gguf")),
        ["info", "base"],
        ["plan", "--gpus", "8"],
        ["doctor"],
        ["serve", "base", "--port", str(port), *small],
    ):  # fmt: skip
        if argv[0] == "serve":
            threading.Thread(target=ask_and_stop, args=(port, served)).start()
        try:
            code = cli.main(argv)
        except SystemExit as ended:
            code = ended.code
        status[" ".join([argv[0], *argv[3:4]] if argv[0] == "export" else argv[:1])] = code
    with contextlib.suppress(OSError):
        socket.create_connection(("192.0.2.1", 80), timeout=1)  # an address that belongs to nobody: it must be noticed
    print(json.dumps({"status": status, "served": served, "wanted": wanted}))


if __name__ == "__main__":
    main()
