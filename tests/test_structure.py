"""The rooms: which room may import which."""

import ast
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "moonwhale"
FILES = sorted(path.relative_to(SOURCE) for path in SOURCE.rglob("*.py"))
# What each room, or file beside the rooms, may import of moonwhale. `cli` starts every verb by its name, so nothing
# imports it but `__main__`. The rooms' graph has no cycle: see `test_no_room_imports_a_room_that_imports_it`.
BASE = {"errors", "files", "options", "presets", "processes", "units", "costs", "precision", "fp8", "checkpoint"}
TRAINING = BASE | {"model", "optim", "data", "parallel", "train"}
INFERENCE = BASE | {"model", "data", "native", "infer"}
MAY_IMPORT = {
    "errors": set(),
    "units": set(),
    "costs": set(),
    "presets": {"errors"},
    "options": {"errors"},
    "files": {"errors"},
    "processes": {"errors"},
    "precision": {"errors"},
    "model": set(),
    "fp8": {"errors", "model"},
    "optim": {"optim", "errors"},
    "data": {"data", "errors", "files", "options"},
    "checkpoint": {"errors", "files", "options", "model", "data"},
    "parallel": {"parallel", "errors", "options", "costs", "model", "processes"},
    "train": TRAINING,
    "native": {"native", "errors", "files"},
    "infer": INFERENCE,
    "posttrain": TRAINING | INFERENCE | {"posttrain"},  # GRPO samples its answers from the engine
    "evaluate": INFERENCE | {"evaluate"},
    "export": BASE | {"export", "model", "data"},
    "inspect": TRAINING | INFERENCE | {"inspect"},
    "planning": TRAINING | {"planning"},
    "serve": INFERENCE | {"serve", "inspect"},  # the page shows X-rays
    "completion": {"options"},
    "cli": {"errors", "completion"},
    "__init__": set(),
    "__main__": {"cli"},
}
LIGHT = {"__main__", "cli", "errors", "presets", "costs", "units"}  # these import only the standard library


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
        return rest.partition(".")[0] in MAY_IMPORT[room]
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
        ("data/loading.py", "def f():\n    from moonwhale.train import config"),
        ("precision.py", "from moonwhale import model"),
        ("fp8.py", "from moonwhale.train.mtp_trainer import MTPTrainer"),
        ("presets.py", "import torch"),
        ("presets.py", "from moonwhale.train.config import parse"),
        ("infer/engine.py", "from moonwhale.train.mtp_trainer import MTPTrainer"),
        ("train/mtp_trainer.py", "from moonwhale.evaluate.text import score_text"),
        ("evaluate/text.py", "from moonwhale.train.mtp_trainer import MTPTrainer"),
        ("train/mtp_trainer.py", "from .checkpoints import save"),
        ("inspect/doctor.py", "from moonwhale import cli"),
        ("parallel/pipeline.py", "from moonwhale.train.mtp_trainer import MTPTrainer"),
        ("native/block.py", "from moonwhale.infer.cache import LatentCache"),
        ("infer/engine.py", "from moonwhale.serve.app import create_app"),
        ("checkpoint.py", "from moonwhale.train import run_folder"),
        ("train/mtp_trainer.py", "from moonwhale.inspect.info import gather_figures"),
    ],
)
def test_a_broken_rule_is_seen(path, source):
    assert forbidden(Path(path), source)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("model/mla.py", "import math, torch.nn\nfrom transformers import PreTrainedModel\nfrom .rope import rotate"),
        ("model/__init__.py", "from . import rope"),
        ("data/loading.py", "from moonwhale.errors import UserError\nfrom moonwhale.data.chat import encode"),
        ("train/mtp_trainer.py", "from moonwhale.model import modeling_moonwhale\nfrom moonwhale.data import packing"),
        ("__main__.py", "from moonwhale.cli import main"),
    ],
)
def test_an_allowed_import_passes(path, source):
    assert not forbidden(Path(path), source)


def test_no_room_imports_a_room_that_imports_it():
    """The table itself allows no cycle, so no import can close one."""
    done, left = set(), {room: allowed - {room} for room, allowed in MAY_IMPORT.items()}
    while left:
        free = {room for room, allowed in left.items() if allowed <= done}
        assert free, f"these rooms import each other: {', '.join(sorted(left))}"
        done |= free
        left = {room: allowed for room, allowed in left.items() if room not in free}
