"""The parts of the GPU benchmark run at toy size on a CPU. Without a GPU, the script measures nothing."""

import importlib
import json
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend

import toy
from moonwhale.presets import PRESETS


@pytest.fixture
def gpu(monkeypatch):
    """Returns the benchmark module with the toy model's shapes."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    for name in ("seed_190m", "large"):
        shapes = toy.TOY | {"vocab_size": 97, "num_nextn_predict_layers": 1}
        for field in list(PRESETS[name].model):
            monkeypatch.delitem(PRESETS[name].model, field)
        for field, value in shapes.items():
            monkeypatch.setitem(PRESETS[name].model, field, value)
    module = importlib.import_module("gpu")
    monkeypatch.setattr(module, "LENGTHS", {"8k": 64})
    monkeypatch.setattr(module, "SETTINGS", {"16_top2": (16, 2), "8_top3": (8, 3)})
    monkeypatch.setattr(module, "peak_flops", lambda device, dtype: 1e12)
    return module


def test_all_parts_run(gpu, tmp_path, capsys):
    bench = gpu.Bench(torch.device("cpu"), rows=2, context=32, rounds=1)
    parts = [name for name in gpu.PARTS if name != "seed"]  # the rehearsal of gpu_all.py trains
    gpu.run(bench, "a toy", parts, None, tmp_path)
    result = json.loads((tmp_path / "gpu.json").read_text())
    assert result == json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["failed"] == {} and result["gpu"] == "a toy"
    assert 0 < result["mfu"] < 1 and result["moba_8k"] > 0 and result["moba_error"] < 0.02
    speeds = result["tokens_per_second"]
    fastest = max(speed for name, speed in speeds.items() if name.startswith("transformers"))
    assert result["vs_transformers"] == pytest.approx(speeds["moonwhale"] / fastest, abs=1e-3)
    assert result["vs_nanochat"] is None, "no checkout was given"
    assert result["fp8_vs_bf16"] > 0 and "max_logit_share" in result
    assert result["thresholds"]["MAX_TOKENS_FOR_ALL_EXPERTS"] >= 0
    assert result["decode_1"] > 0 and result["decode_64"] > 0


def test_parts_run_later_are_added_and_failures_are_named(gpu, tmp_path, monkeypatch):
    bench = gpu.Bench(torch.device("cpu"))
    monkeypatch.setitem(gpu.PARTS, "mfu", lambda *_: {"mfu": 0.5})
    monkeypatch.setitem(gpu.PARTS, "moba", lambda *_: 1 / 0)
    gpu.run(bench, "a toy", ["mfu"], None, tmp_path)
    gpu.run(bench, "a toy", ["moba"], None, tmp_path)
    result = json.loads((tmp_path / "gpu.json").read_text())
    assert result["mfu"] == 0.5 and result["failed"] == {"moba": "ZeroDivisionError: division by zero"}
    gpu.run(bench, "another", [], None, tmp_path)
    gpu.run(bench, "another", ["moba"], None, tmp_path)
    assert "mfu" not in json.loads((tmp_path / "gpu.json").read_text()), "another GPU's figures are not mixed in"


def test_an_attention_with_wrong_outputs_is_not_timed(gpu, monkeypatch):
    right = gpu.attention
    monkeypatch.setattr(gpu, "attention", lambda *args: 1.1 * right(*args))
    with pytest.raises(ValueError, match="differs from its dense twin"):
        gpu.moba(gpu.Bench(torch.device("cpu"), rounds=1), None)


def test_flash_is_full_attention(gpu, monkeypatch):
    monkeypatch.setattr(gpu, "sdpa_kernel", lambda backends: torch.nn.attention.sdpa_kernel(SDPBackend.MATH))
    q, k, v = (torch.randn(1, 2, 10, width) for width in (gpu.KEY_WIDTH, gpu.KEY_WIDTH, gpu.VALUE_WIDTH))
    logits = (q @ k.mT * 0.1).masked_fill(torch.ones(10, 10).triu(1).bool(), -torch.inf)
    torch.testing.assert_close(gpu.flash(q, k, v, 0.1), logits.softmax(-1) @ v)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_script_says_so_and_writes_nothing(gpu, tmp_path, capsys):
    assert gpu.main(["--results", str(tmp_path)]) == 2
    assert "needs an NVIDIA GPU" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    with pytest.raises(SystemExit) as stopped:
        gpu.main(["--only", "speed"])
    assert stopped.value.code == 2
