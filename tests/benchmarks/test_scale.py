"""The scale benchmark at toy size: its fits, its picture, and a page that agrees with the result."""

import importlib
import json
import re
from itertools import count
from pathlib import Path

import pytest

import toy
from moonwhale.costs import model_size
from moonwhale.model import MoonwhaleConfig
from moonwhale.presets import PRESETS

ROOT = Path(__file__).parents[2]
TOY = toy.TOY | {"vocab_size": 97, "n_routed_experts": 6}


@pytest.fixture
def scale(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("scale")


@pytest.fixture
def toy(scale, monkeypatch):
    """Returns the benchmark with the toy model's shapes. It starts no processes, and peak memory is invented."""
    monkeypatch.setattr(importlib.import_module("common"), "QUIET", float("inf"))
    preset = PRESETS["small"].model
    for name in list(preset):
        monkeypatch.delitem(preset, name)
    for name, number in TOY.items():
        monkeypatch.setitem(preset, name, number)
    sizes = {"CONTEXTS": (8, 16, 32, 64), "ROWS": (1, 2), "EXPERTS": (4, 8), "CONTEXT": 16, "EXPERT_ROWS": 1}
    for name, size in sizes.items():
        monkeypatch.setattr(scale, name, size)

    def fresh(name, function, *arguments):
        return None if name == "full attention, context 64" else function(*arguments)

    monkeypatch.setattr(scale, "fresh", fresh)
    peaks = count(10**11, 10**9)
    monkeypatch.setattr(scale, "peak_of_process", lambda: next(peaks))
    return scale


def test_scale(toy, tmp_path, capsys):
    scale = toy
    scale.main(["--steps", "1", "--docs", str(tmp_path), "--results", str(tmp_path)])
    result = json.loads((tmp_path / "scale.json").read_text())
    assert json.loads(capsys.readouterr().out.splitlines()[-1]).items() <= result.items()

    longest = result["context"]["MoBA"][-1]
    assert longest["tokens_per_second"] == pytest.approx(64 / longest["seconds"], abs=1)
    assert result["context"]["full attention"][-1]["seconds"] is None
    assert longest["teraflop"] < result["context"]["full attention"][-1]["teraflop"]
    few, many = result["experts"]
    eight_experts = model_size(MoonwhaleConfig(**TOY | {"n_routed_experts": 8}))
    assert many["parameters"] == eight_experts.parameters > few["parameters"]
    assert [len(points) for points in (result["batch"], result["experts"])] == [2, 2]

    page = (tmp_path / "scale.md").read_text()
    assert page == scale.page(result), "from the file as from what was measured"
    assert f"| 64 | {longest['tokens_per_second']:,} | {longest['seconds']:.2f} |" in page
    assert "| not enough memory |" in page and "At 32 tokens it takes" in page
    assert not re.search(r"[{}]|None|nan", page)

    picture = (tmp_path / "scale.svg").read_bytes()
    scale.draw(result, tmp_path / "scale.svg")
    assert (tmp_path / "scale.svg").read_bytes() == picture


def test_a_fit_recovers_known_coefficients(scale):
    lengths = [512, 1024, 2048, 4096]
    for true in ([0.5, 0.25, 0.125], [0.0, 0.25, 0.0], [0.5, 0.0, 0.125]):
        amounts = [scale.value(true, length) for length in lengths]
        assert scale.fit(lengths, amounts) == pytest.approx(true, abs=1e-9)
    assert scale.quadratic_share([1.0, 1.0, 0.5], 2048) == pytest.approx(0.4)


def test_a_fit_has_no_negative_costs(scale):
    lengths = [512, 1024, 2048, 4096]
    found = scale.fit(lengths, [(length / 1024) ** 0.8 for length in lengths])
    assert min(found) >= 0 and found[2] == 0, "concave"
    relative = [scale.value(found, length) / (length / 1024) ** 0.8 - 1 for length in lengths]
    assert max(map(abs, relative)) < 0.1


def test_the_page_is_the_committed_result(scale):
    path = ROOT / "benchmarks" / "results" / "scale.json"
    if not path.exists():
        pytest.skip("nothing is measured yet")
    assert (ROOT / "docs" / "scale.md").read_text(encoding="utf-8") == scale.page(json.loads(path.read_text()))
