"""The FP8 benchmark trains all runs from the same weights and writes the results that it prints.

No test asserts how close the losses are.
"""

import importlib
import json
from pathlib import Path

import pytest
import torch

from moonwhale.fp8 import emulated_product


@pytest.fixture
def benchmark(monkeypatch):
    """Returns the benchmark module at toy size."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    contenders, module = (importlib.import_module(name) for name in ("contenders", "fp8"))
    for patched in (contenders, module):
        monkeypatch.setattr(patched, "VOCABULARY", 320)
        monkeypatch.setattr(patched, "CONTEXT", 16)
    monkeypatch.setattr(module, "tune_allocator", lambda: False)  # this setting would outlast the test
    small = {"vocab_size": 320, "hidden_size": 64, "num_hidden_layers": 2, "q_lora_rank": 16, "kv_lora_rank": 16}
    small |= {"moba_block_size": 4, "moe_intermediate_size": 16, "n_routed_experts": 2}
    for name, value in small.items():
        monkeypatch.setitem(module.MODEL, name, value)
    for name, value in {"ROWS": 2, "SMOOTHED": 2, "RATE": 2e-2}.items():
        monkeypatch.setattr(module, name, value)
    return module


def test_fp8(benchmark, text_folder, tmp_path, capsys):
    picture = tmp_path / "fp8.svg"
    options = ["--steps", "6", "--outlier-steps", "4", "--results", str(tmp_path), "--picture", str(picture)]
    benchmark.main([str(text_folder), *options])
    result = json.loads((tmp_path / "fp8.json").read_text())
    assert json.loads(capsys.readouterr().out.splitlines()[-1]).items() <= result.items()
    assert result["steps"] == 6 and result["outlier_steps"] == 4

    losses = result["curves"]
    assert [len(curve) for curve in losses.values()] == [6, 6, 4, 4]
    # FP8 does not change the first forward, because a new block adds zero. After it, all four runs differ.
    assert len({curve[0] for curve in losses.values()}) == 1
    assert len({tuple(curve[:4]) for curve in losses.values()}) == 4
    apart = abs(result["held_out_loss"]["tiles"] / result["held_out_loss"]["bf16"] - 1)
    assert result["relative_loss_error"] >= apart - 1e-5

    again = tmp_path / "again.svg"
    benchmark.draw(result, again)
    assert again.read_bytes() == picture.read_bytes()
    assert f"{result['relative_loss_error']:.2%}" in picture.read_text()


def test_the_reported_error_is_the_larger_of_two(benchmark):
    runs = {
        "bf16": {"losses": [4.0] * 10, "held_out": 5.0},
        "tiles": {"losses": [9.0] * 8 + [4.04] * 2, "held_out": 4.9},
    }
    runs |= {name: {"losses": [6.0, 7.0], "held_out": 7.0} for name in ("outlier, tiles", "outlier, tensor")}
    result = benchmark.summary({name: run | {"seconds": 1.0} for name, run in runs.items()})
    assert (result["relative_training_error"], result["relative_held_out_error"]) == (0.01, -0.02)
    assert result["relative_loss_error"] == 0.02
    assert result["outlier_loss"] == {"bf16": 4.0, "tiles": 7.0, "tensor": 7.0}


def test_an_outlier_leaves_bf16_unchanged_and_spoils_a_scale_per_tensor(benchmark):
    torch.manual_seed(0)
    x, weight, d_out = torch.randn(256, 512).bfloat16(), torch.randn(128, 512) / 23, torch.randn(256, 128).bfloat16()

    def results(product):
        leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
        out = product(*leaves)
        return [out, *torch.autograd.grad(out, leaves, d_out)]

    def plain(x, weight, ends=None):
        return x @ weight.to(x.dtype).T

    exact = results(plain)
    for ours, theirs in zip(results(benchmark.with_outlier(plain)), exact, strict=True):
        assert torch.equal(ours, theirs)

    def errors(product):
        return [
            ((a.float() - b.float()).norm() / b.float().norm()).item()
            for a, b in zip(results(product), exact, strict=True)
        ]

    tiles = errors(benchmark.with_outlier(emulated_product))
    with benchmark.one_scale():
        tensor = errors(benchmark.with_outlier(emulated_product))
        harmless = errors(emulated_product)
    assert max(harmless) < 0.06, "without an outlier one scale will do"
    assert tensor[0] > 1.5 * tiles[0] and tensor[2] > 4 * tiles[2], (tiles, tensor)


def test_impossible_inputs_are_refused(benchmark, tmp_path, capsys):
    text = tmp_path / "short.txt"
    text.write_text("One.\n\nTwo.\n\nThree.")
    for options, said in ([], "less than a row of 16 tokens"), (["--outlier-steps", "900"], "--outlier-steps: give"):
        with pytest.raises(SystemExit, match="2"):
            benchmark.main([str(text), *options])
        assert said in capsys.readouterr().err
