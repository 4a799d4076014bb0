"""Tests that long work on a text tells how far it has come: in lines where no terminal can show a bar."""

import io
from types import SimpleNamespace

import pytest

from moonwhale.data import progress
from moonwhale.data.progress import EVERY, Progress
from moonwhale.data.shards import build_shards
from moonwhale.data.source import Source
from moonwhale.data.tokenizer import train_tokenizer

TEXTS = ["The whale sang to the moon.", "The moon sang back."]


@pytest.fixture
def clock(monkeypatch):
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


def test_a_log_gets_a_line_now_and_then(clock, capsys):
    def lines() -> list[str]:
        return capsys.readouterr().err.splitlines()

    with Progress("tokenizing songs", "documents", 5000) as work:
        clock.now += EVERY - 1
        work.add(1000, "0.1 M tokens")
        work.say("nothing is long yet")
        assert lines() == []
        clock.now += 1
        work.add(1000, "0.2 M tokens")
        work.add(1000, "0.3 M tokens")
        assert lines() == ["tokenizing songs: 2,000 of 5,000 documents, 0.2 M tokens"]
        clock.now += EVERY
        work.add(500)
        work.say("now the rest")
        assert lines() == [
            "tokenizing songs: 3,500 of 5,000 documents",
            "tokenizing songs: 3,500 of 5,000 documents, now the rest",
        ]
    assert lines() == []


def test_a_terminal_gets_a_bar_and_no_lines(clock, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    with Progress("tokenizing songs", "documents", 5000) as work:
        clock.now += EVERY
        work.add(2000)
        work.say("now the rest")
    shown = terminal.getvalue()
    assert "tokenizing songs:  " in shown and "now the rest" in shown and "2,000 of 5,000" not in shown


def test_a_tokenizer_tells_how_far_it_is(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(progress, "EVERY", 0.0)  # a line at each step
    tokenizer = train_tokenizer(TEXTS, 300)
    first, both = len(TEXTS[0]), len("".join(TEXTS))
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("training")]
    assert told == [
        f"training the tokenizer: {first} characters",
        f"training the tokenizer: {both} characters",
        f"training the tokenizer: {both} characters, all read; computing the merges",
    ]
    build_shards(Source("songs", "print", lambda: iter(TEXTS)), tokenizer, tmp_path)
    assert "tokenizing songs: 2 documents, 0.0 M tokens\n" in capsys.readouterr().err
