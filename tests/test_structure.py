"""The rooms: who may import whom, and how large the core may grow."""

import ast
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "moonwhale"
FILES = sorted(path.relative_to(SOURCE) for path in SOURCE.rglob("*.py"))
CORE = ("model", "optim", "train")
UP_TO_TRAIN = {
    "errors",
    "report",
    "options",
    "precision",
    "fp8",
    "memory",
    "presets",
    "counts",
    "model",
    "optim",
    "data",
    "pipeline",
    "train",
}
# What of moonwhale a room, or a file beside the rooms, may import. Who is not listed may import anything but cli.
MAY_IMPORT = {
    "errors": set(),
    "report": set(),
    "counts": set(),
    "model": set(),
    "presets": {"errors"},
    "options": {"errors"},
    "cli": {"errors"},
    "precision": {"errors"},
    "fp8": {"errors", "model"},
    "memory": {"errors", "counts"},
    "optim": {"optim", "errors"},
    "data": {"data", "errors", "options"},
    "pipeline": UP_TO_TRAIN,
    "train": UP_TO_TRAIN,
    "posttrain": UP_TO_TRAIN | {"posttrain", "infer"},  # which opens checkpoints, and writes what GRPO rewards
    "infer": {"infer", "model", "data", "errors", "options", "precision", "xray"},
    "evaluate": {"evaluate", "infer", "model", "data", "errors", "options", "precision", "counts"},
    "xray": {"model", "errors", "counts"},
}
LIGHT = {"__main__", "cli", "errors", "presets", "counts"}  # the standard library only


def imports(source: str) -> set[str]:
    """Modules that a file imports anywhere, relative ones with their dots."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            found |= {f"moonwhale.{alias.name}" for alias in node.names} if base == "moonwhale" else {base}
    return found - {"moonwhale.__version__"}


def allowed(room: str, name: str) -> bool:
    """Whether a file of `room` may import the module `name`."""
    if name.startswith("."):
        return room == "model" and not name.startswith("..")
    top, _, rest = name.partition(".")
    if top == "moonwhale":
        ours = rest.partition(".")[0]
        return ours in MAY_IMPORT[room] if room in MAY_IMPORT else ours != "cli" or room == "__main__"
    if room == "model":
        return top in ("torch", "transformers") or top in sys.stdlib_module_names
    return room not in LIGHT or top in sys.stdlib_module_names


def forbidden(path: Path, source: str) -> list[str]:
    return sorted(name for name in imports(source) if not allowed(path.parts[0].removesuffix(".py"), name))


@pytest.mark.parametrize("path", FILES, ids=str)
def test_imports_keep_to_the_rooms(path):
    assert not forbidden(path, (SOURCE / path).read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("model/mla.py", "import numpy"),
        ("model/mla.py", "from moonwhale.errors import UserError"),
        ("model/mla.py", "from ..optim import muonclip"),
        ("optim/muonclip.py", "from moonwhale.model.mla import MultiheadLatentAttention"),
        ("data/sources.py", "def f():\n    from moonwhale.train import arguments"),
        ("precision.py", "from moonwhale import model"),
        ("fp8.py", "from moonwhale.train.trainer import MTPTrainer"),
        ("presets.py", "import torch"),
        ("presets.py", "from moonwhale.train.arguments import parse"),
        ("infer/engine.py", "from moonwhale.train.trainer import MTPTrainer"),
        ("train/trainer.py", "from moonwhale.evaluate.text import score_text"),
        ("evaluate/text.py", "from moonwhale.train.trainer import MTPTrainer"),
        ("train/trainer.py", "from .checkpoints import save"),
        ("doctor.py", "from moonwhale import cli"),
    ],
)
def test_a_broken_rule_is_seen(path, source):
    assert forbidden(Path(path), source)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("model/mla.py", "import math, torch.nn\nfrom transformers import PreTrainedModel\nfrom .rope import rotate"),
        ("model/__init__.py", "from . import rope"),
        ("data/sources.py", "from moonwhale.errors import UserError\nfrom moonwhale.data.chat import encode"),
        ("train/trainer.py", "from moonwhale.model import modeling_moonwhale\nfrom moonwhale.data import packing"),
        ("__main__.py", "from moonwhale.cli import main"),
    ],
)
def test_an_allowed_import_passes(path, source):
    assert not forbidden(Path(path), source)


def test_the_core_is_small():
    """Without the twin of MoBA for GPUs and graphs, which nobody has to read to understand the model."""
    core = [path for path in FILES if path.parts[0] in CORE and path != Path("model/flex.py")]
    lines = {path: len((SOURCE / path).read_text().splitlines()) for path in core}
    assert sum(lines.values()) <= 3000, lines
