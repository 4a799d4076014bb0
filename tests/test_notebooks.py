"""The notebooks run from the first cell to the last, and hold small outputs."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.mark.slow
@pytest.mark.cpu_only
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs(path, tmp_path):
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_holds_small_outputs(path):
    """A reader sees what comes out without running it, and git keeps little."""
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    assert path.stat().st_size < 150_000
    assert sum(bool(cell.outputs) for cell in cells) > len(cells) / 2
    assert not [output for cell in cells for output in cell.outputs if output.output_type == "error"]


@pytest.mark.parametrize("page", ["README.md", "docs/course.md", "notebooks/README.md"])
def test_a_page_says_how_to_open_them(page):
    """Jupyter comes with the kernel `python3`, which they name; their folder is where the command looks."""
    text = (ROOT / page).read_text(encoding="utf-8")
    folders = re.findall(r"pip install jupyterlab\b.*?\bjupyter lab ([\w./-]+)", text, re.DOTALL)
    assert folders == ["notebooks"] and (ROOT / folders[0]).is_dir()
    assert {nbformat.read(path, as_version=4).metadata.kernelspec.name for path in NOTEBOOKS} == {"python3"}
