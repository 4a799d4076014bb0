"""`make site` builds the documentation as a web site: every link works, and every page is in the navigation."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]


def test_every_page_is_in_the_navigation():
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    pages = {path.name for path in ROOT.glob("docs/*.md")} | {"index.md"}
    assert set(re.findall(r"\b[\w-]+\.md\b", str(yaml.safe_load(text)["nav"]))) == pages


@pytest.mark.slow
@pytest.mark.cpu_only
def test_the_site_is_built_without_a_warning(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    first = (tmp_path / "site" / "index.html").read_text(encoding="utf-8")
    assert "Multi-head Latent Attention" in first and '<script src="http' not in first
    mechanism = (tmp_path / "site" / "files-src-moonwhale-model-mla.py" / "index.html").read_text(encoding="utf-8")
    assert "MultiheadLatentAttention" in mechanism
