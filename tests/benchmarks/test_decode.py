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


def test_against_llamacpp(monkeypatch):
    """llama.cpp runs the same model, in bf16 and in Q8_0, and each key of the result is there."""
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    decode, llamacpp = importlib.import_module("decode"), importlib.import_module("llamacpp")
    widths = {"q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 32, "qk_rope_head_dim": 32, "v_head_dim": 32}
    shapes = TOY | widths | {"hidden_size": 64, "vocab_size": 50_304, "moe_intermediate_size": 32, "moba_topk": 0}
    for name, value in shapes.items():
        monkeypatch.setitem(PRESETS["seed_190m"].model, name, value)
    monkeypatch.setattr(llamacpp, "READ", 1 << 20)
    with torch.inference_mode():
        model = decode.seed_model(640)
        result = llamacpp.against_llamacpp(model, (16,), decode.Ours, tokens=2, rounds=1)
        keys = {"bf16_vs_llamacpp_16", "int8_vs_llamacpp_16", "prompt_vs_llamacpp", "bandwidth_share_bf16"}
        assert keys < result.keys() and all(result[key] > 0 for key in keys)
        decoder, prompt = decode.Decoder(decode.seed_model(640)), torch.arange(1, 9)[None]
        model.lm_head.weight.mul_(-1)
        with pytest.raises(RuntimeError, match="not the same model"):
            llamacpp.check_same_model(FakeLlama(decode.Decoder(model), prompt), decoder, prompt, 0.1)


class FakeLlama:
    """Has llama.cpp's interface, and the logits of a decoder."""

    def __init__(self, decoder, prompt):
        import llamacpp

        self.logits = llamacpp.reading(decoder, prompt).numpy()
        self._ctx = self

    def reset(self): ...

    def eval(self, tokens): ...

    def n_vocab(self) -> int:
        return len(self.logits)

    def get_logits_ith(self, index: int):
        import ctypes

        return self.logits.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
