"""Drives the server with OpenAI's npm client. openai_npm.cjs makes the calls, and prints what came back."""

import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

from moonwhale.serve.app import create_app
from serving import HELLO, NAME, Running

pytestmark = pytest.mark.contract("OpenAI clients and endpoints", "openai (npm)")
PACKAGE = "openai@6.49.0"
SCRIPT = Path(__file__).with_name("openai_npm.cjs")


@pytest.fixture(scope="module")
def modules():
    """The folder node_modules: of MOONWHALE_NPM, or a folder for temporary files that npm fills once."""
    if shutil.which("node") is None:
        pytest.skip("node is not installed")
    folder = Path(os.environ.get("MOONWHALE_NPM") or Path(tempfile.gettempdir(), f"moonwhale-{PACKAGE}"))
    if not (folder / "node_modules" / "openai").is_dir():
        options = ["--prefix", str(folder), "--no-audit", "--no-fund", "--fetch-retries=0", "--fetch-timeout=20000"]
        installed = shutil.which("npm") and subprocess.run(["npm", "install", *options, PACKAGE], capture_output=True)
        if not installed or installed.returncode:
            pytest.skip("npm cannot install the package openai, and MOONWHALE_NPM names no folder that has it")
    return folder / "node_modules"


@pytest.fixture(scope="module")
def engine(small_engine):
    return small_engine()


@pytest.fixture(scope="module")
def found(engine, small_checkpoint, modules):
    """What openai_npm.cjs has printed."""
    with Running(create_app(engine, NAME, small_checkpoint)) as server:
        command = ["node", str(SCRIPT), server.url, NAME]
        done = subprocess.run(
            command, env=os.environ | {"NODE_PATH": str(modules)}, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stderr
        assert server.comes_to_rest(), "the abandoned stream holds a slot"
    return json.loads(done.stdout)


def test_models(found):
    assert found["models"] == [NAME] and found["model"] == NAME


def test_an_answer_and_its_stream(found, engine):
    (alone,) = engine.generate([HELLO], temperature=0, max_new_tokens=12)
    choice = found["whole"]["choices"][0]
    assert choice["message"] == {"role": "assistant", "content": alone.text, "refusal": None}
    *chunks, usage = found["chunks"]
    assert "".join(chunk["choices"][0]["delta"]["content"] for chunk in chunks) == alone.text
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": "", "refusal": None}
    assert chunks[-1]["choices"][0]["finish_reason"] == choice["finish_reason"]
    assert usage["choices"] == [] and usage["usage"] == found["whole"]["usage"]
    assert found["response"] == 200


def test_the_servers_message_is_sent_back(found):
    assert found["again"]["usage"]["prompt_tokens"] > found["whole"]["usage"]["prompt_tokens"]


def test_the_clients_own_collector(found):
    expected = found["whole"]["choices"][0]
    assert found["content"] == expected["message"]["content"]
    assert found["collected"]["choices"][0]["message"] == expected["message"] | {"parsed": None}
    whole, streamed = found["sampled"]["choices"], found["sampledStream"]["choices"]
    for one, other in zip(whole, streamed, strict=True):
        assert (other["message"]["content"] or "") == one["message"]["content"]  # the collector's empty text is null
        assert other["finish_reason"] == one["finish_reason"]
        assert len(other["logprobs"]["content"]) == len(one["logprobs"]["content"])
        for token, again in zip(one["logprobs"]["content"], other["logprobs"]["content"], strict=True):
            assert again["bytes"] == token["bytes"] and again["logprob"] == pytest.approx(token["logprob"], abs=1e-3)


def test_completions(found, engine):
    prompts = ["The whale", "and the moon"]
    expected = [
        p + a.text for p, a in zip(prompts, engine.generate(prompts, temperature=0, max_new_tokens=6), strict=True)
    ]
    assert [choice["text"] for choice in found["completion"]["choices"]] == expected
    streamed = ["", ""]
    for piece in found["pieces"]:
        streamed[piece["choices"][0]["index"]] += piece["choices"][0]["text"]
    assert streamed == expected


@pytest.mark.parametrize(
    ("what", "kind", "param", "message"),
    [
        ("model", "NotFoundError", "model", "there is no model 'gpt-4' here"),
        ("retrieve", "NotFoundError", "model", "there is no model 'gpt-4' here"),
        ("temperature", "BadRequestError", "temperature", "less than or equal to 2, not 3"),
        ("stream", "BadRequestError", "n", "less than or equal to 8, not 99"),
        ("tools", "BadRequestError", "tools", "this model calls none"),
        ("runTools", "BadRequestError", "tools", "this model calls none"),
        ("format", "BadRequestError", "response_format", "the form cannot be set"),
        ("image", "BadRequestError", "messages.0.content", "reads text only"),
        ("responses", "NotFoundError", None, "nothing at this path"),
        ("embeddings", "NotFoundError", None, "nothing at this path"),
        ("files", "NotFoundError", None, "nothing at this path"),
    ],
)
def test_refusals(found, what, kind, param, message):
    error = found["errors"][what]
    assert (error["kind"], error["param"]) == (kind, param) and message in error["message"]
