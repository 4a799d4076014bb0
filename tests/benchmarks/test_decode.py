"""The inference benchmarks run at toy size and write the results that they print."""

import asyncio
import importlib
import json
from pathlib import Path

import pytest
import torch

import toy
from moonwhale.presets import PRESETS
from serving import NAME, Running

ROOT = Path(__file__).parents[2]
TOY = toy.TOY | {"vocab_size": 310}


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    monkeypatch.setattr(importlib.import_module("common"), "QUIET", float("inf"))


@pytest.mark.slow
def test_decode(tmp_path, capsys, monkeypatch, small_checkpoint):
    decode = importlib.import_module("decode")
    for preset in ("seed_190m", "demo"):
        monkeypatch.setitem(PRESETS[preset].model, "vocab_size", 310)
        for name, value in TOY.items():
            monkeypatch.setitem(PRESETS[preset].model, name, value)
    monkeypatch.setattr(decode, "CONTEXTS", (16,))
    monkeypatch.setattr(decode, "ROW", 64)
    monkeypatch.setenv("MOONWHALE_CACHE", str(tmp_path / "cache"))
    arguments = ["--rounds", "1", "--prompts", "3", "--long", "256", "--results", str(tmp_path)]
    decode.main([str(small_checkpoint), *arguments])
    result = json.loads((tmp_path / "decode.json").read_text())
    assert result == json.loads(capsys.readouterr().out.splitlines()[-1])
    milliseconds = result["milliseconds_per_token"]["16"]
    best = min(value for name, value in milliseconds.items() if name.startswith("transformers"))
    assert result["bf16_16"] == pytest.approx(best / milliseconds["moonwhale, bf16"], rel=0.05)
    assert (
        result["cache_bytes_per_token"]["demo"]["latent"] == result["cache_bytes_per_token"]["demo"]["latent_allocated"]
    )
    assert 1 <= result["tokens_per_forward"] <= 2
    assert result["bits_per_byte"]["bf16"] == pytest.approx(result["bits_per_byte"]["fp32"], rel=0.1)


def test_both_caches_continue_the_same_prompt(monkeypatch):
    """Both contenders do the same work: they decode one token after a prompt that is already in the cache."""
    decode = importlib.import_module("decode")
    for name, value in (TOY | {"moba_topk": 0}).items():
        monkeypatch.setitem(PRESETS["seed_190m"].model, name, value)
    with torch.inference_mode():
        ours = decode.seed_model(64)
        prompt = torch.randint(310, (1, 20), generator=torch.Generator().manual_seed(0))
        theirs = decode.Theirs(decode.transformers_model(ours, "eager"), prompt)
        first, second = theirs(), theirs()
        assert torch.equal(first, second) and first.shape[1] == 20 + decode.TOKENS
        float_model = ours.float()
        decoder = decode.Decoder(float_model)
        token = decode.Ours(decoder, prompt)
        token()
        logits = float_model(prompt).logits[0, -1]
        placement = decoder.place(token.cache, 0, [19], 1)
        got = decoder.head(decoder.run(prompt[:, -1:], token.cache, placement))[0, 0]
        torch.testing.assert_close(got, logits, atol=1e-4, rtol=1e-3)


def test_serve(small_engine, small_checkpoint):
    """Both parts of the benchmark run against a server in this process."""
    from moonwhale.serve.app import create_app

    serve = importlib.import_module("serve")
    import psutil

    with Running(create_app(small_engine(), "model", small_checkpoint)) as server:
        load = asyncio.run(serve.load(server.url, psutil.Process(), clients=3, seconds=0.5, tokens=4))
        assert load["errors"] == 0 and load["answers"] >= 3 and load["tokens"] >= load["answers"]
        broken = serve.malformed(server.url, 300)
        assert broken["server_errors"] == broken["hangs"] == broken["leaks"] == 0
        assert sum(broken["statuses"].values()) > 250
        assert sum(n for status, n in broken["statuses"].items() if status.startswith("4")) > 150
        schema = serve.from_schema(server.url, 60)
        assert schema["server_errors"] == schema["hangs"] == schema["leaks"] == 0
        assert sum(schema["statuses"].values()) >= 30
    with Running(create_app(small_engine(), NAME, small_checkpoint)) as server:  # the benchmark requests "model"
        load = asyncio.run(serve.load(server.url, psutil.Process(), clients=2, seconds=0.1, tokens=4))
        assert load["errors"] >= 2 and load["answers"] == 0
