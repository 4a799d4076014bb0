"""Paths in options: `~`, and folders that a run finds again from another working directory."""

import dataclasses
import os

import pytest

from moonwhale.errors import UserError
from moonwhale.evaluate.config import EvalConfig
from moonwhale.inspect.commands import main_xray
from moonwhale.lab.config import parse as parse_comparison
from moonwhale.posttrain.sft import SFTOptions
from moonwhale.train.config import TrainConfig, parse
from moonwhale.train.run_options import parse_run
from moonwhale.yaml_files import write_yaml


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    return tmp_path / "home"


@pytest.mark.skipif(os.name == "nt", reason="a home is not named by HOME there")
def test_a_tilde_is_the_home_folder(home):
    """No shell expands it within --out=~/runs or a YAML file."""
    assert parse(["--out=~/runs"]).out == f"{home}/runs"
    assert SFTOptions(checkpoint="~/base").checkpoint == f"{home}/base"
    write_yaml(home / "mine.yaml", {"out": "~/elsewhere"}, "")
    assert parse(["--config", "~/mine.yaml"]).out == f"{home}/elsewhere"
    (home / "runs").mkdir()
    write_yaml(home / "runs" / "run.yaml", dataclasses.asdict(TrainConfig(seed=5, out="~/runs")), "")
    assert parse(["--out=~/runs", "--resume"]).seed == 5
    assert EvalConfig(data="texts", out="~/result.json").out == f"{home}/result.json"
    compared = parse_comparison(["--config=~/mine.yaml", "--vary=lr=1e-3,2e-3", "--out=~/rates"])
    assert (compared.options.out, compared.config_file) == (f"{home}/rates", f"{home}/mine.yaml")
    with pytest.raises(UserError, match="no place for a file"):  # it is a folder
        main_xray(["--out=~"])


def test_a_run_finds_its_model_from_another_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = parse_run(SFTOptions, ["base", "--out", str(tmp_path / "run")])
    (tmp_path / "run").mkdir()
    write_yaml(tmp_path / "run" / "run.yaml", dataclasses.asdict(config), "")
    (tmp_path / "deeper").mkdir()
    monkeypatch.chdir(tmp_path / "deeper")
    again = parse_run(SFTOptions, ["--out", str(tmp_path / "run"), "--resume"])
    assert again.checkpoint == config.checkpoint == str(tmp_path / "base")
