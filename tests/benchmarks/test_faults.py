"""A small part of the trials of benchmarks/faults.py."""

import importlib
from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def benchmarks_on_path(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")


@pytest.fixture
def faults_runs():
    return importlib.import_module("faults_runs")


def test_faults_of_a_run(faults_runs, tmp_path):
    train = faults_runs.prepare(tmp_path, only_train=True)
    assert faults_runs.count_lost(train, 1) == {"kills": 1, "kills_lost": 0}
    assert faults_runs.count_wrong_owners(train["train"], 1) == {"owners": 1, "owners_wrong": 0}
    assert faults_runs.count_undetected(train["train"], 100) == {"flips": 110, "flips_undetected": 0}


def test_hostile_clients_of_a_server(small_checkpoint, monkeypatch):
    faults_server = importlib.import_module("faults_server")
    few = [client for client in faults_server.CLIENTS if client.connections <= 20][::5]
    monkeypatch.setattr(faults_server, "CLIENTS", few)
    found = faults_server.run(small_checkpoint, seconds=0.3, cancelled=20, broken=150, clients=4, minutes=0.01)
    assert found["hostile_clients"] == len(few) and found["starved"] == 0
    counts = ["stuck_slots", "load_errors", "server_tracebacks", "server_log_bytes"]
    counts += ["malformed_server_errors", "malformed_hangs", "malformed_leaks"]
    assert {name: found[name] for name in counts} == dict.fromkeys(counts, 0)


def test_hostile_folders_and_files(tmp_path):
    faults_files = importlib.import_module("faults_files")
    found = faults_files.run(trials=6, runs=0, bombs=0, seed=1, scratch=tmp_path)
    kinds = ("tracebacks", "hangs", "memory", "executed")
    assert found == {"hostile_folders": 6} | dict.fromkeys((f"hostile_{kind}" for kind in kinds), 0)
