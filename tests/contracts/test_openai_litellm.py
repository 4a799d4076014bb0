"""Drives the server with litellm, through which many tools speak. litellm_client.py makes the calls."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from moonwhale.serve.app import create_app
from serving import HELLO, NAME, Running

pytestmark = pytest.mark.contract("OpenAI clients and endpoints", "litellm")
SCRIPT = Path(__file__).with_name("litellm_client.py")
MISSING = "litellm (200 MB) is not installed, and MOONWHALE_LITELLM names no Python that has it"


@pytest.fixture(scope="module")
def engine(small_engine):
    return small_engine()


@pytest.fixture(scope="module")
def found(engine, small_checkpoint):
    """What litellm_client.py has printed."""
    python = os.environ.get("MOONWHALE_LITELLM") or (importlib.util.find_spec("litellm") and sys.executable)
    if not python:
        pytest.skip(MISSING)
    with Running(create_app(engine, NAME, small_checkpoint)) as server:
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        done = subprocess.run(
            [python, str(SCRIPT), server.url, NAME], env=environment, capture_output=True, text=True, timeout=90
        )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_an_answer_and_its_stream(found, engine):
    (alone,) = engine.generate([HELLO], temperature=0, max_new_tokens=12)
    assert found["whole"] == found["built"] == found["vllm"] == found["top_k"] == alone.text
    assert found["usage"] == found["built_usage"] == [alone.prompt_tokens, len(alone.token_ids)]
    assert found["reason"][0] == found["reason"][1] in ("stop", "length")


def test_its_message_is_sent_back(found):
    assert len(set(found["again"])) == 1 and found["again"][0] > found["usage"][0]


def test_completions(found, engine):
    (alone,) = engine.generate(["The whale"], temperature=0, max_new_tokens=6)
    assert found["text"] == found["pieces"] == alone.text
    text, tokens = found["scored"]
    assert text == "The whale" + alone.text and tokens[:2] == ["The", " whale"]


@pytest.mark.parametrize(
    ("what", "kind", "status", "message"),
    [
        ("model", "NotFoundError", 404, "there is no model 'gpt-4' here"),
        ("temperature", "BadRequestError", 400, "less than or equal to 2, not 3"),
        ("tools", "BadRequestError", 400, "this model calls none"),
        ("format", "BadRequestError", 400, "the form cannot be set"),
        ("length", "BadRequestError", 400, "the model's context of 96"),
    ],
)
def test_refusals(found, what, kind, status, message):
    assert found["errors"][what][:2] == [kind, status] and message in found["errors"][what][2]
