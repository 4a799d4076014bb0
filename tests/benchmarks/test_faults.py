"""A small part of the trials of benchmarks/faults.py."""

import importlib
import types
from pathlib import Path

import pytest

from moonwhale.serve import page


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


@pytest.mark.parametrize(
    ("status", "said", "right"),
    [
        (2, "moonwhale: error: --out: no space left on the disk of runs: free some", True),
        (2, "a warning\nmoonwhale: error: [Errno 28] No space left on device: 'x': free some", True),
        (1, "Traceback (most recent call last):\n  File x\nOSError: [Errno 28] No space left on device", False),
        (2, "Traceback (most recent call last):\n  File x\nmoonwhale: error: no space left on device", False),
        (1, "moonwhale: error: no space left", False),
        (2, "moonwhale: error: the disk is gone", False),
    ],
)
def test_a_full_disk_is_told_of_in_one_line(faults_runs, tmp_path, status, said, right):
    err = tmp_path / "said.err"
    err.write_text(said + "\n")
    ended = types.SimpleNamespace(exitcode=status, join=lambda seconds: None)
    full = faults_runs.wait_for([types.SimpleNamespace(process=ended, err=err, kill=lambda: None)])
    assert bool(faults_runs.OUT_OF_SPACE.fullmatch(full)) == right


def test_hostile_clients_ask_for_what_exists():
    files = {*page.FILES, "/"}
    assert importlib.import_module("hostile_clients").PAGE_FILE in files
    assert {path for path in importlib.import_module("serve").PATHS if path.endswith((".js", ".css"))} <= files


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
