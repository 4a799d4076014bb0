"""No verb says a word to another machine unasked."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from moonwhale.cli import VERBS


@pytest.mark.slow
def test_no_verb_talks_to_another_machine(tmp_path):
    here = Path(__file__).parent
    asked_for = {"HF_HUB_OFFLINE", "HF_HUB_DISABLE_TELEMETRY", "DISABLE_TELEMETRY", "DO_NOT_TRACK"}
    environment = {name: value for name, value in os.environ.items() if name not in asked_for}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    script = [sys.executable, str(here / "every_verb.py"), str(tmp_path)]
    done = subprocess.run(script, env=environment, capture_output=True, text=True, timeout=600)
    seen = json.loads(done.stdout.splitlines()[-1])
    assert seen["wanted"] == ["socket.getaddrinfo 192.0.2.1"]  # the script's own
    assert seen["served"] == [200, 200, 200]
    # The toy has no right answer to keep; Ctrl-C ends the server
    expected = {
        verb: {"sample": 2, "serve": 130}.get(verb, 0) for verb in VERBS if verb not in ("train", "sft", "grpo")
    }
    del expected["export"]
    assert seen["status"] == expected | {f"export {name}": 0 for name in ("deepseek", "code", "gguf")}
