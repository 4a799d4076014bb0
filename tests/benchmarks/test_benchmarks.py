"""Every benchmark runs at toy size and writes the results that it prints. No test asserts a speed."""

import importlib
import importlib.util
import json
from pathlib import Path

import pytest

from moonwhale.errors import UserError
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


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (UserError("`data`: no such file"), 2, "error: --data: no such file\n"),
    ],
)
def test_a_benchmark_that_is_stopped_ends_in_one_line(error, status, line, capsys):
    def main():
        raise error

    with pytest.raises(SystemExit) as ended:
        importlib.import_module("common").run_main(main)
    assert (ended.value.code, capsys.readouterr().err) == (status, line)


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


def test_the_tables_have_each_figure_in_its_row():
    """Each cell holds one figure, in the row that says what it is."""
    machine = {"cpu": "a CPU", "threads": 3, "cores": 4, "torch": "2.99", "transformers": "9.9"}
    machine |= {"dtype": "bf16", "commit": None}
    train = {"vs_transformers_fp32": 2.01, "vs_transformers_autocast": 1.52, "vs_transformers_bf16": 1.33}
    train |= {"vs_transformers_fp32_same_dtype": 1.14, "vs_dense": 0.91}
    train |= {"ceiling_share": 0.617, "memory_vs_transformers": 0.48, "active_parameters": {"moonwhale": 95_544_576}}
    moba = {f"{what}_{case}": 1.1 * i for i, case in enumerate(("1k", "16k", "32k"), 1) for what in ("fwd", "fwdbwd")}
    shapes = {"heads": {"1k": 12, "16k": 2, "32k": 2}, "topk": 3}
    optimizer = {"muonclip_share": 0.071, "qkclip_share": 0.012, "tokens_vs_adamw": 0.58}
    optimizer |= {"tokens_vs_adamw_by_seed": {"1": 0.5, "2": 0.58, "3": 0.6}}
    quality = {"bits_per_byte": {"ours": 1.9, "dense": 2.2}, "seconds": {"ours": 240.3}, "text": "sotu.txt.xz"}
    quality |= {"parameters": {"ours": 6.7e6, "dense": 4.3e6}, "active_parameters": {"ours": 4.5e6, "dense": 4.3e6}}
    longer = {"bits_per_byte": {"ours": 1.51, "nanochat": 1.47}, "seconds": {"ours": 1200.2}, "text": "mix76.txt"}
    decode = {"bf16_128": 2.1, "bf16_1024": 4.2, "int8_128": 3.3, "int8_1024": 6.4, "moba_growth": 1.25}
    decode |= {"moba_32k": 3.5, "moba_contexts": [4096, 32768], "tokens_per_forward": 1.61, "acceptance": [0.61]}
    decode |= {"auto_vs_off": 1.02, "bits_per_byte": {"fp32": 1.8, "bf16": 1.801, "int8": 1.804}}
    decode["cache_bytes_per_token"] = {
        "seed_190m": {"latent_allocated": 3584.0, "drafting_allocated": 5376.0, "multi_head": 30720}
    }
    serve = {"clients": 64, "errors": 0, "throughput_vs_one": 7.7, "malformed_requests": 10000}
    serve |= {"server_errors": 0, "hangs": 0}
    grpo = {"seeds": 3, "before": {"pass1": 0.4}, "after": [{"pass1": 0.9}, {"pass1": 0.8}, {"pass1": 0.85}]}
    grpo |= {"after_format_alone": {"pass1": 0.41}}
    fp8 = {"steps": 600, "relative_held_out_error": -0.0012}
    parallel = {"bubble_vs_formula": 1.03, "bubble_vs_1f1b": 0.4, "max_gradient_error": 1.2e-7, "kills_survived": 19}
    parallel |= {"equality": {"layouts": {"a": {}, "b": {}}}, "kills": {"made": 20}}
    results = {
        "quality": quality,
        "quality_20min_amx": longer,
        "optimizer": optimizer,
        "train": train,
        "demo_step": {"vs_transformers_fp32": 1.2, "vs_transformers_bf16": 1.6},
        "moba": moba | shapes,
        "moba_amx": {name: ratio / 2 for name, ratio in moba.items()} | shapes,
        "decode": decode,
        "serve": serve,
        "grpo": grpo,
        "fp8": fp8,
        "parallel": parallel,
    }
    for name, result in results.items():
        result["environment"] = machine | ({"cpu": "another"} if name == "fp8" else {})
    optimizer |= {"race": {"environment": machine | {"dtype": "float32"}}, "cost": {"environment": machine}}
    del optimizer["environment"]
    parallel["equality"]["environment"] = machine
    parallel["kills"]["environment"] = machine | {"cpu": "another", "dtype": "fp32"}
    assert set(results) == set(update_readme().SOURCES)
    tables = update_readme().readme_figures.tables(results)
    for what, figures in {
        "speeches, after 240 s: moonwhale": ["1.900"],
        "240 s: a dense GPT": ["2.200"],
        "mixed text, after 1,200 s: moonwhale": ["1.510"],
        "mixed text, after 1,200 s: nanochat": ["1.470"],
        "median of 3 seeds": ["0.58×"],
        "before GRPO": ["40%"],
        "after GRPO, the lowest of 3": ["80%"],
        "format alone": ["41%"],
        "after 600 steps": ["-0.12%"],
        "same precision, `seed_190m` |": ["1.14×", "1.52×"],
        "`demo` |": ["1.20×", "1.60×"],
        "in fp32, `seed_190m`": ["2.01×"],
        "in pure bf16, `seed_190m`": ["1.33×"],
        "as many active parameters (95.5 M,": ["0.91×"],
        "peak memory": ["0.48×"],
        "share of the fastest": ["62%"],
        "share of MuonClip": ["7.1%"],
        "share of QK-clip": ["1.2%"],
        "| forward, AVX-512": ["1.1×", "2.2×", "3.3×"],
        "| forward, AMX": ["0.6×", "1.1×", "1.7×"],
        "| forward and backward, AVX-512": ["1.1×", "2.2×", "3.3×"],
        "bf16 relative to transformers": ["2.10×", "4.20×"],
        "int8 relative to transformers": ["3.30×", "6.40×"],
        "32 k tokens, relative": ["1.25×"],
        "relative to MoBA": ["3.5×"],
        "as allocated": ["3,584"],
        "from all MTP": ["5,376"],
        "multi-head attention's": ["30,720"],
        "per forward pass": ["1.61"],
        "accepted draft tokens": ["61%"],
        "--draft auto": ["1.02×"],
        "512), fp32": ["1.800"],
        "512), int8": ["1.804"],
        "errors with 64": ["0"],
        "throughput": ["7.7×"],
        "5xx": ["0"],
        "hangs": ["0"],
        "2 layouts": ["1e-07"],
        "kill -9": ["19 of 20"],
        "DualPipeV": ["1.03×"],
        "1F1B": ["0.40×"],
    }.items():
        (line,) = (line for line in tables.splitlines() if what in line)
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        assert [cell for cell in cells[1:] if cell not in ("", "a CPU") and not cell.startswith("[")] == figures
    assert "\n- a CPU, 3 of 4 cores: all that are not listed below\n" in tables
    assert "\n- another, 3 of 4 cores: `fp8.py`, `parallel.py` (recoveries)\n" in tables
    assert "\n- in fp32: `optimizer.py` (tokens), `parallel.py` (recoveries); the rest in bf16 unless" in tables
    assert "3 blocks per query, [moba.py](benchmarks/moba.py) | 1 k tokens, 12 heads | 16 k tokens, 2 heads |" in tables
    assert ": moonwhale 6.7 M (4.5 M active), a dense GPT with AdamW 4.3 M.\n" in tables
    assert "240 s: nanochat" not in tables and "llama.cpp" not in tables
    quality["bits_per_byte"]["nanochat"] = 1.95
    compared = update_readme().readme_figures.against_nanochat({"quality_amx": quality})
    assert "| a CPU with AMX | speeches | 4 minutes | 2.6% fewer (" in compared
    decode |= {f"{bits}_vs_llamacpp_{n}": 1.4 for bits in ("bf16", "int8") for n in (128, 1024)}
    decode |= {"prompt_vs_llamacpp": 2.0, "bandwidth_share_bf16": 0.76}
    module = update_readme().readme_figures
    results["train"]["environment"] = machine | {"commit": module.MEMORY_WITHOUT_KERNELS}
    tables = module.tables(results)
    assert "transformers, without the [kernels](docs/training.md#kernels-for-a-cpu) |" in tables
    assert "nanochat | 1.950 |" in tables and "Q8_0 | 1.40× | 1.40× |" in tables and "| 2.00× |" in tables
    assert "| 76% |" in tables


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


def test_topics(tmp_path, capsys, small_checkpoint, monkeypatch):
    topics = importlib.import_module("topics")
    monkeypatch.setitem(topics.SAMPLING, "max_new_tokens", 4)
    topics.main([str(small_checkpoint), "--results", str(tmp_path)])
    result = json.loads((tmp_path / "topics.json").read_text())
    answers = result.pop("answers")[small_checkpoint.name]
    assert result == printed(capsys) and result["questions"] == len(answers) == 20
    assert {len(given) for given in answers.values()} == {5}


def test_the_rule_of_topics(tmp_path):
    topics = importlib.import_module("topics")
    (tmp_path / "topics.txt").write_text("Any pets? | cat, cats, dog*\nAny music? | jazz, r&b\n")
    rule = topics.read_topics(tmp_path / "topics.txt")
    pets = ["My cats!", "A DOGGY.", "category", "a dog, jazz", ""]
    answers = {"Any pets?": pets, "Any music?": ["R&B.", "jazz", "jazzy", "no", "no cat"]}
    found = topics.judge(rule, answers)
    assert found == {"questions_on_topic": 1, "answers_on_topic": 0.5, "control": 0.2}
