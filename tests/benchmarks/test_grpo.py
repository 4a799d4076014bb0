"""benchmarks/grpo.py at toy size writes its results, and its demonstrations are correct."""

import importlib.util
import json
import sys
from itertools import islice
from pathlib import Path

import pytest

from moonwhale.data import loading
from moonwhale.data.tasks import is_well_formed, load_task

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def grpo(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    spec = importlib.util.spec_from_file_location("grpo_benchmark", FOLDER / "grpo.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "grpo_benchmark", module)
    spec.loader.exec_module(module)
    return module


def test_demonstrations_are_right_and_half_of_them_add_up(grpo, tmp_path):
    task = load_task(grpo.TASK)
    grpo.write_demonstrations(task, tmp_path / "d.jsonl", 10)
    shown = [json.loads(line)["messages"][1]["content"] for line in (tmp_path / "d.jsonl").read_text().splitlines()]
    assert [text.count(" = ") for text in shown] == [7 if i % 2 == 0 else 0 for i in range(10)]
    for problem, text in zip(task.problems(10), shown, strict=True):
        assert is_well_formed(text) and task.accuracy(problem, text) == 1


@pytest.mark.slow
def test_a_run_at_toy_size(grpo, small_checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MOONWHALE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(grpo, "MAX_ANSWER_TOKENS", 8)
    talks = dict(islice(json.loads(loading.chitchat_file().read_bytes()).items(), 300))
    (tmp_path / "talks.json").write_text(json.dumps(talks))
    monkeypatch.setattr(loading, "chitchat_file", lambda: tmp_path / "talks.json")
    sizes = {
        "seeds": 1, "demonstrations": 60, "sft_steps": 2, "grpo_steps": 2, "control_steps": 1, "chat_steps": 1,
        "questions": 16, "problems": 4, "samples": 2, "batch": 64,
    }  # fmt: skip
    flags = [part for name, value in sizes.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    grpo.main([str(small_checkpoint), "--results", str(tmp_path), "--picture", str(tmp_path / "grpo.svg"), *flags])
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {"pass1_gain", "seeds", "mtp_acceptance_kept"} <= printed.keys() and printed["seeds"] == 1
    assert printed["pass1_gain"] == round(printed["after"][0]["pass1"] - printed["before"]["pass1"], 4)
    written = json.loads((tmp_path / "grpo.json").read_text())
    assert len(written["curves"][0]) == 2 and (tmp_path / "grpo.svg").stat().st_size > 5_000
