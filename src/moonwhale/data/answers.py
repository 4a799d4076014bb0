"""Compares answers: as text after normalisation, then as mathematics (math-verify) within a time limit.

An answer such as 9^{9^{9}} would take math-verify longer than a lifetime. So a worker process compares, and an alarm of
the operating system ends it: see worker_process.py.
"""

import re
import unicodedata

from moonwhale.data.worker_process import WorkerProcess

TIME_LIMIT = 3.0  # seconds for one comparison
MAX_LENGTH = 2000  # characters of an answer that are compared as mathematics
QUOTES = ('""', "''", "``", "“”", "‘’", "«»", "„“", "$$")
WRAPPED = re.compile(r"\\(?:boxed|text|textbf|mathrm)\s*\{((?:[^{}]|\{[^{}]*\})*)\}")
KEPT_BY_NFKC = ("<super>", "<sub>", "<fraction>")  # x² is not x2


def normalize(answer: str) -> str:
    r"""Returns an answer without differences of case, spaces, Unicode form, quotes, \boxed, \text and a final period.

    LaTeX keeps its case: \Gamma is not \gamma.
    """
    text = "".join(
        c if unicodedata.decomposition(c).startswith(KEPT_BY_NFKC) else unicodedata.normalize("NFKC", c)
        for c in unicodedata.normalize("NFC", answer)
    )
    text, before = " ".join(text.split()), None
    while text != before:
        before = text
        if wrapped := WRAPPED.fullmatch(text):
            text = wrapped[1].strip()
        if len(text) > 2 and text[0] + text[-1] in QUOTES:
            text = text[1:-1].strip()
        text = text.removesuffix(".").rstrip() or text
    return text if "\\" in text else text.casefold()


def same_answer(right: str, given: str) -> bool | None:
    """Whether two answers are equal as text after `normalize`, or as mathematics.

    Returns None if the comparison exceeded the limits of time or memory.
    """
    if normalize(right) == normalize(given):
        return True
    if not given.strip() or len(given) > MAX_LENGTH:
        return False
    return _worker.ask([right, given])


_worker = WorkerProcess("moonwhale.data.answers", TIME_LIMIT)


def prepare() -> None:
    """Imports in the worker process what would take most of the first comparison's time.

    math-verify itself passes only digits and operators to the parser that evaluates them.
    """
    import math_verify  # noqa: F401

    from moonwhale.data.expressions import replace_parser

    replace_parser()


def answer(request: list[str]) -> bool:
    """Compares two answers in the worker process."""
    import math_verify

    try:
        right, given = (math_verify.parse(text, parsing_timeout=None) for text in request)
        return bool(math_verify.verify(right, given, timeout_seconds=None))
    except Exception:  # sympy fails on some expressions in its own ways, and MemoryError is one of them
        return False
