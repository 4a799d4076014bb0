"""A small part of the trials of benchmarks/faults.py."""

import importlib
from pathlib import Path

import pytest


@pytest.fixture
def faults_runs(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    return importlib.import_module("faults_runs")


def test_faults_of_a_run(faults_runs, tmp_path):
    train = faults_runs.prepare(tmp_path, only_train=True)
    assert faults_runs.count_lost(train, 1) == {"kills": 1, "kills_lost": 0}
    assert faults_runs.count_wrong_owners(train["train"], 1) == {"owners": 1, "owners_wrong": 0}
    assert faults_runs.count_undetected(train["train"], 100) == {"flips": 110, "flips_undetected": 0}
