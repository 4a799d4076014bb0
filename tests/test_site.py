"""`make site` builds the documentation as a web site: every link works, and every page is in the navigation."""

import json
import re
import shutil
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


def build(root: Path, site: Path) -> subprocess.CompletedProcess:
    """Builds the site of a repository as `make site` does: without `--quiet`, which hides warnings from `--strict`."""
    (recipe,) = re.findall(r"^\t\$\(BIN\)/(mkdocs build .*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    command = [sys.executable, "-m", *recipe.split(), "--site-dir", str(site)]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
@pytest.mark.cpu_only
def test_the_site_is_built_without_a_warning(tmp_path):
    done = build(ROOT, tmp_path / "site")
    assert done.returncode == 0, done.stderr
    first = (tmp_path / "site" / "index.html").read_text(encoding="utf-8")
    assert "Multi-head Latent Attention" in first and '<script src="http' not in first
    mechanism = (tmp_path / "site" / "files-src-moonwhale-model-mla.py" / "index.html").read_text(encoding="utf-8")
    assert "MultiheadLatentAttention" in mechanism


@pytest.mark.parametrize(("target", "status"), [("2_b.ipynb", 0), ("2_missing.ipynb", 1)])
def test_a_broken_link_in_a_notebook_is_detected(target, status, tmp_path):
    """In a small repository with this one's settings and hooks."""
    (tmp_path / "docs").mkdir()
    shutil.copy(ROOT / "docs" / "site_hooks.py", tmp_path / "docs")
    settings = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    (tmp_path / "mkdocs.yml").write_text(re.sub(r"\nnav:\n.*?(?=\n\w)", "\nnav: [index.md]", settings, flags=re.DOTALL))
    (tmp_path / "README.md").write_text("# A page\n\n[one](notebooks/1_a.ipynb), [two](notebooks/2_b.ipynb)")
    (tmp_path / "notebooks").mkdir()
    for name, text in {"1_a": f"# One\n\n[next]({target})", "2_b": "# Two"}.items():
        cells = [{"cell_type": "markdown", "source": [text]}]
        (tmp_path / "notebooks" / f"{name}.ipynb").write_text(json.dumps({"cells": cells}))
    done = build(tmp_path, tmp_path / "site")
    assert (done.returncode, f"contains a link '{target}'" in done.stderr) == (status, status == 1), done.stderr
