"""Every benchmark runs at toy size and writes the results that it prints. No test asserts a speed."""

import importlib
import importlib.util
import json
from pathlib import Path

import pytest

from moonwhale.presets import PRESETS

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def benchmarks_on_path(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")


def printed(capsys) -> dict:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def update_readme():
    spec = importlib.util.spec_from_file_location("update_readme", ROOT / "docs" / "update_readme.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_demo_step(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(importlib.import_module("common"), "QUIET", float("inf"))
    monkeypatch.setitem(PRESETS["demo"].train, "context", 64)
    importlib.import_module("demo_step").main(["--rounds", "1", "--rows", "1", "--results", str(tmp_path)])
    result = json.loads((tmp_path / "demo_step.json").read_text())
    assert result == printed(capsys)
    for dtype in ("fp32", "bf16"):
        speeds = result[dtype]["tokens_per_second"]
        fastest = max(speed for name, speed in speeds.items() if name.startswith("transformers"))
        assert result[f"vs_transformers_{dtype}"] == pytest.approx(speeds["moonwhale, MoBA"] / fastest, abs=1e-3)
    assert not list(tmp_path.glob(".*"))

    table = update_readme().step_table(result)
    assert f"{result['fp32']['tokens_per_second']['moonwhale, MoBA']:,}" in table
    assert f"{result['vs_transformers_bf16']:.2f}" in table


def test_the_table_has_each_figure_in_its_row():
    """Each figure is in the row of the script that measures it."""
    machine = {"cpu": "a CPU", "threads": 3, "cores": 4, "torch": "2.99", "transformers": "9.9"}
    train = {"vs_transformers_fp32": 2.01, "vs_transformers_autocast": 1.52, "vs_transformers_bf16": 1.33}
    train |= {"vs_dense": 0.91, "ceiling_share": 0.617, "memory_vs_transformers": 0.48, "environment": machine}
    moba = {f"{what}_{case}": 1.1 * i for i, case in enumerate(("1k", "16k", "32k"), 1) for what in ("fwd", "fwdbwd")}
    optimizer = {"muonclip_share": 0.071, "qkclip_share": 0.012, "tokens_vs_adamw": 0.58}
    optimizer |= {"tokens_vs_adamw_by_seed": {"1": 0.5, "2": 0.58, "3": 0.6}}
    quality = {"bits_per_byte": {"ours": 1.9, "dense": 2.2}, "seconds": {"ours": 240.3}}
    decode = {"bf16_128": 2.1, "bf16_1024": 4.2, "int8_128": 3.3, "int8_1024": 6.4, "moba_growth": 1.25}
    decode |= {"moba_32k": 3.5, "moba_contexts": [4096, 32768], "tokens_per_forward": 1.61, "acceptance": [0.61]}
    decode |= {"auto_vs_off": 1.02, "bits_per_byte": {"fp32": 1.8, "bf16": 1.801, "int8": 1.804}}
    decode["cache_bytes_per_token"] = {
        "seed_190m": {"latent_allocated": 3584.0, "drafting_allocated": 5376.0, "multi_head": 30720}
    }
    serve = {"clients": 64, "errors": 0, "throughput_vs_one": 7.7, "malformed_requests": 10000}
    serve |= {"server_errors": 0, "hangs": 0, "leaks": 0}
    grpo = {"seeds": 3, "before": {"pass1": 0.4}, "after": [{"pass1": 0.9}, {"pass1": 0.8}, {"pass1": 0.85}]}
    grpo |= {"after_format_alone": {"pass1": 0.41}, "mtp_acceptance_kept": 0.99}
    fp8 = {"steps": 600, "relative_loss_error": 0.0012}
    parallel = {"bubble_vs_formula": 1.03, "bubble_vs_1f1b": 0.4, "max_gradient_error": 1.2e-7, "kills_survived": 19}
    parallel |= {"equality": {"layouts": {"a": {}, "b": {}}}, "kills": {"made": 20}}
    results = train, moba, optimizer, quality, decode, serve, grpo, fp8, parallel
    table = update_readme().figures_table(*results)
    for name, figures in {
        "train": ["2.01×, 1.52×, 1.33×", "0.91×", "62%", "0.48×"],
        "moba": ["1.1× and 1.1×; 2.2× and 2.2×; 3.3× and 3.3×"],
        "optimizer": ["7.1%; 1.2%", "0.58×"],
        "quality": ["1.900", "2.200"],
        "decode": [
            "2.1×, 4.2×; 3.3×, 6.4×",
            "1.25×; 3.5×",
            "3,584; 5,376; 30,720",
            "1.61; 61%; 1.02×",
            "1.800, 1.801, 1.804",
        ],
        "serve": ["0; 7.7×", "0, 0, 0"],
        "grpo": ["40% → 80%; 41%; 0.99×"],
        "fp8": ["0.12%"],
        "parallel": ["1e-07; 19 of 20", "1.03×; 0.40×"],
    }.items():
        lines = [line for line in table.splitlines() if f"benchmarks/{name}.py" in line]
        assert len(lines) == len(figures) and all(f in line for f, line in zip(figures, lines, strict=True))
    assert "3 seeds" in table and "240 s" in table and "a CPU, 3 threads on 4 cores" in table
    assert "nanochat" not in table
    quality["bits_per_byte"]["nanochat"] = 1.95
    assert "nanochat | 1.950 |" in update_readme().figures_table(*results)


def test_demo_step_refuses_models_that_differ():
    import torch

    demo_step = importlib.import_module("demo_step")
    contenders = demo_step.models()
    tokens = torch.arange(64).view(1, 64)
    demo_step.check_same(contenders, tokens)
    with torch.no_grad():
        contenders["transformers, eager experts"].lm_head.weight.mul_(1.01)
    with pytest.raises(AssertionError):
        demo_step.check_same(contenders, tokens)


def test_muonclip_at_work(tmp_path, capsys, monkeypatch, text_folder):
    muonclip_at_work = importlib.import_module("muonclip_at_work")
    monkeypatch.setenv("MOONWHALE_CACHE", str(tmp_path / "cache"))
    load_source = muonclip_at_work.load_source
    monkeypatch.setattr(muonclip_at_work, "load_source", lambda _: load_source(str(text_folder)))
    monkeypatch.setitem(muonclip_at_work.MODEL, "vocab_size", 320)
    monkeypatch.setattr(muonclip_at_work, "TAU", 0.05)

    monkeypatch.setattr(muonclip_at_work, "SMOOTHED", 3)
    picture = tmp_path / "muonclip.svg"
    muonclip_at_work.main(["--steps", "12", "--results", str(tmp_path), "--picture", str(picture)])
    result = json.loads((tmp_path / "muonclip_at_work.json").read_text())
    assert result["largest_logit_with"] < result["largest_logit_without"]
    assert len(result["with"]["logits"]) == 12
    assert {len(head) for head in result["with"]["logits"]} == {12}
    assert printed(capsys).items() <= result.items()

    again = tmp_path / "again.svg"
    muonclip_at_work.draw({which: result[which] for which in ("without", "with")}, again)
    assert again.read_bytes() == picture.read_bytes()


def test_a_round_disturbed_by_other_processes_is_repeated(monkeypatch):
    """Of four rounds, only the two in which other processes use little CPU are kept."""
    common = importlib.import_module("common")
    others, played = [0.5, 0.02, 0.9, 0.05], []
    clock = iter([now for share in others for now in ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0 + share))])
    monkeypatch.setattr(common, "_cpu_seconds", lambda: next(clock))
    result = common.timed_rounds({"a": played.append, "b": played.append}, lambda: len(played), rounds=2)
    assert (result["rounds"], result["discarded"], result["busiest"]) == (2, 2, 0.05)
    assert set(result["seconds"]) == {"a", "b"}
    assert played == [0, 0, 2, 2, 4, 4, 6, 6, 8, 8], "both contenders of a round get the same, each round its own"


def test_the_result_shows_that_the_machine_was_never_quiet(monkeypatch):
    common = importlib.import_module("common")
    clock = iter([now for share in (0.5, 0.3, 0.4) for now in ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0 + share))])
    monkeypatch.setattr(common, "_cpu_seconds", lambda: next(clock))
    result = common.timed_rounds({"a": lambda given: None}, lambda: None, rounds=1, limit=3)
    assert (result["rounds"], result["discarded"], result["busiest"]) == (1, 2, 0.3)


def test_the_environment_is_reported():
    found = importlib.import_module("common").environment("fp32", True)
    assert found["cpu"] and found["cores"] >= 1 and found["threads"] >= 1 and found["dtype"] == "fp32"


def test_moba(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(importlib.import_module("common"), "QUIET", float("inf"))
    importlib.import_module("moba").main(["--rounds", "1", "--shrink", "64", "--results", str(tmp_path)])
    result = json.loads((tmp_path / "moba.json").read_text())
    assert result == printed(capsys)
    seconds = result["timings"]["bf16 16k"]["seconds"]
    assert result["fwd_16k"] == pytest.approx(seconds["full fwd"] / seconds["moba fwd"], abs=1e-3)
    assert {"fwdbwd_16k", "fwd_32k", "fwdbwd_32k", "fwd_1k", "fwd_16k_fp32"} <= result.keys()
