"""The diffs of docs/extending.md apply to the sources, and the tests that they bring pass."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_diffs_apply_and_their_tests_pass(tmp_path):
    for name in ("src", "tests"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    diffs = re.findall(r"```diff\n(.*?)```", (ROOT / "docs" / "extending.md").read_text(encoding="utf-8"), re.DOTALL)
    assert len(diffs) == 4
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "src"), "GIT_CEILING_DIRECTORIES": str(tmp_path.parent)}
    options = {"cwd": tmp_path, "env": environment, "capture_output": True, "text": True}
    for diff in diffs:
        done = subprocess.run(["git", "apply", "-p0", "-"], input=diff, **options)
        assert done.returncode == 0, done.stderr
    tests = [name for diff in diffs for name in re.findall(r"^\+\+\+ (tests/\S+)", diff, re.MULTILINE)]
    assert len(tests) == 4
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests], **options)
    assert done.returncode == 0, done.stdout
