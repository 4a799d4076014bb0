"""Tries a tokenizer from elsewhere in a process with limits of time and memory, before this one loads it.

The tokenizers library is written in Rust. What it does with a file cannot be interrupted, and where it panics it writes
several lines to standard error. Both stay in that process. It imports that library only, and starts in 0.2 s.
"""

from pathlib import Path

from moonwhale.data.worker_process import WorkerProcess
from moonwhale.errors import UserError, one_line

TIME_LIMIT = 10.0  # seconds; DeepSeek-V3's tokenizer takes less than two
RUN = 4096  # characters of one kind
# A normal form may make a few characters of one, and processors add a few ids.
GROWTH, ROOM = 4, 64
_worker = WorkerProcess("moonwhale.data.tokenizer_trial", TIME_LIMIT)


def try_tokenizer(path: Path) -> None:
    """Raises UserError if a tokenizer.json cannot be loaded, or can't encode some texts, within the limits."""
    error = _worker.ask(str(path.absolute()))
    if error is None:
        raise UserError(f"cannot read {path}: as a tokenizer it takes too much time or memory")
    if error:
        raise UserError(f"cannot read {path}: {one_line(error)[:200]}".replace("`", "'"))


def probes() -> list[str]:
    """Returns words of many kinds, and runs of one character or two, on which patterns would show their worst."""
    words = "The whale sang 1234 times!\n\n\tdef f():\r\n" * 20 + "Ünïcode: 你好 🐳 \u3000\ufffd\u0130\x00"
    return ["", words, *(unit * RUN + "\x07" for unit in (*"aA1 \n.", "aB", "a ", "1,", "\r\n"))]


def prepare() -> None:
    """Imports in the worker process what loading needs."""
    import tokenizers  # noqa: F401


def answer(path: str) -> str:
    """Loads and tries a tokenizer in the worker process. Returns what is wrong with it, or an empty text."""
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(path)
        if tokenizer.truncation:  # transformers does so too
            tokenizer.enable_truncation(**tokenizer.truncation)
        tokenizer.no_truncation()
        tokenizer.no_padding()
        for text in probes():
            both = [tokenizer.encode(text, add_special_tokens=added).ids for added in (False, True)]
            tokenizer.decode(both[0])
            if max(map(len, both)) > GROWTH * len(text.encode()) + ROOM:
                return f"it makes {max(map(len, both)):,} ids of {len(text):,} characters"
    except BaseException as error:  # a panic of the Rust library is no Exception
        return f"{type(error).__name__}: {one_line(error)}"
    return ""
