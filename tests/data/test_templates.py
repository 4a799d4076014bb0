"""A chat template from elsewhere is rendered as transformers renders it, or refused in one line in bounded time."""

import copy
import time

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from moonwhale.data.chat import encode_answers, encode_conversation, encode_documents
from moonwhale.data.templates import CHAT_TEMPLATE, render_within_limits
from moonwhale.errors import UserError

CHAT = [{"role": "user", "content": "Who sang?"}, {"role": "assistant", "content": "The whale, in <|eos|>."}]


@pytest.fixture
def tokenizer(small_tokenizer):
    return copy.deepcopy(small_tokenizer)


@pytest.mark.parametrize("chat", [CHAT, [{**CHAT[0]}, {**CHAT[1], "content": " The whale. "}]])
def test_another_template_gives_what_it_gives_in_process(tokenizer, chat):
    def encode():
        documents = encode_documents(tokenizer, [chat])
        return encode_conversation(tokenizer, chat), encode_answers(tokenizer, [chat]), documents

    expected = encode()
    tokenizer.chat_template = CHAT_TEMPLATE + "{# another #}"
    got = encode()
    assert got[0] == expected[0]
    for new, old in zip([*got[1][0], got[2][0]], [*expected[1][0], expected[2][0]], strict=True):
        assert new.tolist() == old.tolist()


def test_spans_of_answers_are_handed_over():
    options = {"chat_template": CHAT_TEMPLATE + " ", "return_assistant_tokens_mask": True, "bos_token": "<|bos|>"}
    options |= {"eos_token": "<|eos|>"}
    rendered, spans = render_within_limits([CHAT], **options)
    expected = render_jinja_template([CHAT], **options)
    assert (rendered, [[list(span) for span in of_chat] for of_chat in expected[1]]) == (expected[0], spans)


ERRORS = {
    "not Jinja": "{% for %}",
    "unclosed": "{{ messages",
    "an unknown filter": "{{ messages | nothing }}",
    "a division by zero": "{{ 1 / 0 }}",
    "a wrong type": "{{ messages + 1 }}",
    "a missing attribute": "{{ messages.nothing.more }}",
    "its own exception": "{{ raise_exception('no\nsuch\x1b[2J') }}",
    "a method of Python": "{{ messages.__class__.__mro__[1].__subclasses__() }}",
    "an import": "{% import 'os' as os %}",
    "a file": "{% include '/etc/passwd' %}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "a long range": "{% for i in range(10**9) %}{% endfor %}",
    "a long text": "{{ 'a' * 10**10 }}",
    "a long number": "{{ 10 ** (10 ** 5) }}",
    "a wide format": "{{ '%9999999999d' % 1 }}",
    "a wide center": "{{ 'a' | center(10**10) }}",
    "much output": "{% for i in range(99999) %}{{ 'a' * 99 }}{% endfor %}",
    "too long a template": "a" * 200_000,
    "too deep": "{{ " + "(" * 5000 + ")" * 5000 + " }}",
}
ENDLESS = {
    "nested loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "a huge power": "{{ 10 ** (10 ** 10) }}",
}


def refused(tokenizer, template):
    tokenizer.chat_template = template
    with pytest.raises(UserError, match="the tokenizer's chat template refuses a conversation: ") as caught:
        encode_conversation(tokenizer, CHAT)
    assert len(str(caught.value).splitlines()) == 1 and len(str(caught.value)) < 400 and "\x1b" not in str(caught.value)


@pytest.mark.parametrize("template", ERRORS.values(), ids=ERRORS)
def test_a_template_that_fails_is_one_line(tokenizer, template):
    refused(tokenizer, template)


@pytest.mark.parametrize("template", ENDLESS.values(), ids=ENDLESS)
def test_a_template_without_an_end_is_ended_once(tokenizer, template, monkeypatch):
    from moonwhale.data import templates
    from moonwhale.data.worker_process import WorkerProcess

    monkeypatch.setattr(templates, "_worker", WorkerProcess("moonwhale.data.templates", 0.5))
    refused(tokenizer, template)
    start = time.monotonic()
    refused(tokenizer, template)
    assert time.monotonic() - start < 0.2
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    assert encode_conversation(tokenizer, CHAT)
