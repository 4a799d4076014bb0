"""The ablations name real twins, add their budgets to the result, and the page shows what the result holds."""

import importlib
import importlib.util
import json
import sys
from pathlib import Path

import pytest

from moonwhale.lab.config import CompareOptions, comparison
from moonwhale.lab.variants import BASE, Variant
from moonwhale.train.config import build_model_config

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def ablations(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    yield importlib.import_module("ablations")
    sys.modules.pop("ablations")


@pytest.fixture
def page():
    spec = importlib.util.spec_from_file_location("update_ablations", ROOT / "docs" / "update_ablations.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_each_variant_is_a_model_of_its_own(ablations):
    variants = [Variant(BASE, {}), *(Variant(name, changes) for _, name, changes in ablations.VARIANTS)]
    asked = comparison(CompareOptions(seconds=1.0), {"preset": ablations.PRESET}, variants)
    models = {variant.name: build_model_config(asked.config(variant)) for variant in variants}
    assert (
        models["MHA"].num_key_value_heads == models["MHA"].num_attention_heads == 2 * models["GQA"].num_key_value_heads
    )
    assert not any(models["full attention"].is_moba_layer(layer) for layer in range(4))
    assert models["dense of equal FLOPs"].first_k_dense_replace == models["dense of equal FLOPs"].num_blocks
    assert asked.config(variants[7]).optimizer == "adamw"


def run(name: str, bits: float) -> dict:
    curve = [
        {"seconds": 1.0, "tokens": 64, "bits_per_byte": bits + 1},
        {"seconds": 2.0, "tokens": 128, "bits_per_byte": bits},
    ]
    return {"variant": name, "seed": 0, "curve": curve, "options": {"lr": 6e-3}}


def compared(asked, base_speed: float = 6000.0) -> dict:
    """A result of `compare` with invented figures."""
    variants = []
    for i, variant in enumerate(asked.variants):
        figures = {"bits_per_byte": 2.0 + 0.1 * i, "tokens_per_second": base_speed - i, "peak_memory_bytes": 5e7}
        figures |= {"active_parameters": 3_000_000, "cache_bytes_per_token": 640, "diverged": 0}
        if i:
            figures["difference"] = {"mean": 0.1 * i, "half_width": 0.05, "verdict": "worse"}
        runs = [run(variant.name, figures["bits_per_byte"])]
        variants.append({"name": variant.name, "changes": {}, "runs": runs, **figures})
    return {"seeds": list(range(asked.options.seeds)), "variants": variants}


def test_budgets_and_variants_are_added_to_the_result(ablations, tmp_path, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(ablations, "compare", lambda comparison: compared(asked.append(comparison) or comparison))
    common = ["--results", str(tmp_path), "--data", "chitchat", "--device", "cpu"]
    for argv in (["--seconds", "1200"], ["--only", "MHA"], ["--only", "GQA"]):
        ablations.main([*common, *argv])
    result = json.loads((tmp_path / "ablations.json").read_text())
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == result
    assert list(result["budgets"]) == ["240", "1200"]
    assert list(result["budgets"]["240"]) == ["base", "MHA", "GQA"]
    assert len(result["budgets"]["1200"]) == 1 + len(ablations.VARIANTS)
    assert result["budgets"]["240"]["GQA"]["curve"] == [[1.0, 64, 3.1], [2.0, 128, 2.1]]
    assert [(each.options.turns, each.options.out) for each in asked[:2]] == [
        (60, "runs/ablations-1200s"),
        (16, "runs/ablations-240s"),
    ]


def test_each_variant_keeps_the_speed_of_the_base_that_trained_in_turns_with_it(ablations, tmp_path, monkeypatch):
    speeds = iter((6000.0, 5000.0))
    monkeypatch.setattr(ablations, "compare", lambda comparison: compared(comparison, next(speeds)))
    for name in ("MHA", "GQA"):
        ablations.main(["--results", str(tmp_path), "--data", "chitchat", "--device", "cpu", "--only", name])
    figures = json.loads((tmp_path / "ablations.json").read_text())["budgets"]["240"]
    speeds = {name: (v["tokens_per_second"], v.get("base_tokens_per_second")) for name, v in figures.items()}
    assert speeds == {"base": (5000, None), "MHA": (5999, 6000), "GQA": (4999, 5000)}


def test_an_unknown_variant_is_refused(ablations, capsys):
    with pytest.raises(SystemExit):
        ablations.main(["--only", "MQA"])
    assert "no variant MQA (there are MHA, GQA, " in capsys.readouterr().err


def test_the_page_shows_the_result(page):
    assert page.updated(text := page.PAGE.read_text(encoding="utf-8"), page.read(), page.variants()) == text


def test_what_is_not_measured_is_said_to_be(page):
    text = page.updated(page.PAGE.read_text(encoding="utf-8"), {"budgets": {}}, page.variants())
    assert "\nNot measured yet after 4 minutes: all; after 20 minutes: all; after 60 minutes: all.\n" in text
    assert "| MHA |" not in text and "Nothing is measured yet." in text


def test_figures_appear_on_the_page_as_they_come(page):
    base = {"lr": 6e-3, "tokens_per_second": 6100.4, "active_parameters": 2_900_000, "cache_bytes_per_token": 640}
    base |= {"diverged": 0, "seeds": 3, "tuned": False}
    mha = base | {"difference": {"mean": -0.0124, "half_width": 0.02, "verdict": "no difference seen"}}
    mha |= {"base_tokens_per_second": 6000.0}
    gqa = base | {"difference": {"mean": 0.0124, "half_width": None, "verdict": "one seed: no interval"}}
    gqa |= {"base_tokens_per_second": 12200.0, "seeds": 1, "tuned": True}
    result = {
        "data": "chitchat",
        "environment": {"cpu": "A CPU", "threads": 2, "dtype": "fp32", "torch": "2.13"},
        "budgets": {
            "240": {"base": base, "MHA": mha, "full attention": {"diverged": 2}},
            "3600": {"base": base, "GQA": gqa},
        },
    }
    text = page.updated(page.PAGE.read_text(encoding="utf-8"), result, page.variants())
    assert "| mechanism | variant | 4 minutes | 60 minutes |\n" in text
    assert "| MLA | MHA | -0.012 ± 0.020, no difference seen |  |" in text
    assert "| MLA | GQA |  | +0.012 (1 seed) |" in text
    assert "| MoBA | full attention | 2 diverged |  |" in text and "| MuonClip | AdamW |" not in text
    assert "\nNot measured yet after 4 minutes: GQA, dense of equal FLOPs, no MTP module, " in text
    assert "; after 20 minutes: all; after 60 minutes: MHA, full attention, dense of equal FLOPs, " in text
    assert "| base | 3 | 0.006 | 6,100 |  | 2.90 M | 640 B |\n" in text
    assert "| MHA | 3 | 0.006 | 6,100 | 1.02 times | 2.90 M | 640 B |\n" in text
    assert "| GQA | 1 | 0.006, tuned | 6,100 | 0.50 times | 2.90 M | 640 B |\n" in text
    assert "Text: chitchat. Measured on A CPU, 2 threads" in text
