"""Each room of the package imports only the rooms that it may import."""

import ast
import re
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "moonwhale"
FILES = sorted(path.relative_to(SOURCE) for path in SOURCE.rglob("*.py"))
# The moonwhale modules that each room (a subpackage) or top-level file may import. `cli` loads each command by name,
# so only `__main__` imports `cli`. The graph has no cycle: see `test_the_import_rules_have_no_cycle`.
BASE = {
    "errors",
    "files",
    "options",
    "presets",
    "processes",
    "units",
    "costs",
    "memory",
    "precision",
    "fp8",
    "checkpoint",
    "weights",
    "yaml_files",
    "outputs",
    "packaged",
    "reports",
}
TRAINING = BASE | {"model", "optim", "data", "parallel", "native", "train"}
INFERENCE = BASE | {"model", "data", "native", "infer"}
MAY_IMPORT = {
    "errors": set(),
    "units": set(),
    "costs": set(),
    "presets": {"errors"},
    "memory": set(),
    "files": {"errors"},
    "yaml_files": {"errors", "files"},
    "options": {"errors", "yaml_files"},
    "packaged": {"errors"},
    "manifest": {"files"},
    "outputs": {"errors", "files"},
    "processes": {"errors"},
    "reports": {"processes"},
    "precision": {"errors"},
    "model": set(),
    "fp8": {"errors", "model"},
    "optim": {"optim", "errors"},
    "data": {"data", "errors", "files", "outputs", "options", "yaml_files", "reports"},
    "weights": {"errors", "files", "model"},
    "checkpoint": {"errors", "files", "manifest", "outputs", "options", "weights", "model", "data"},
    "parallel": {"parallel", "errors", "options", "costs", "model", "processes"},
    "train": TRAINING,
    "native": {"native", "errors", "files", "model", "optim"},
    "infer": INFERENCE,
    "posttrain": TRAINING | INFERENCE | {"posttrain"},  # GRPO samples its answers from the engine
    "evaluate": INFERENCE | {"evaluate"},
    "export": BASE | {"export", "model", "data"},
    "inspect": TRAINING | INFERENCE | {"inspect"},
    "planning": TRAINING | {"planning"},
    "lab": TRAINING | INFERENCE | {"evaluate", "lab"},
    "serve": INFERENCE | {"serve", "inspect"},  # the web page shows X-rays
    "completion": {"options"},
    "cli": {"errors", "completion"},
    "__init__": set(),
    "__main__": {"cli"},
}
LIGHT = {"__main__", "cli", "errors", "presets", "costs", "units", "packaged"}  # these import only the standard library


def imports(source: str) -> set[str]:
    """Return all modules that a file imports, also inside functions. Relative imports keep their dots."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            found |= {f"moonwhale.{alias.name}" for alias in node.names} if base == "moonwhale" else {base}
    return found - {"moonwhale.__version__"}


def allowed(room: str, name: str) -> bool:
    """Return whether a file of `room` may import the module `name`."""
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
def test_each_file_imports_only_what_its_room_may_import(path):
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
        ("evaluate/text.py", "from moonwhale.lab.compare import compare"),
    ],
)
def test_a_forbidden_import_is_detected(path, source):
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


def test_the_import_rules_have_no_cycle():
    """MAY_IMPORT has no cycle, so imports that follow it cannot form one."""
    done, left = set(), {room: allowed - {room} for room, allowed in MAY_IMPORT.items()}
    while left:
        free = {room for room, allowed in left.items() if allowed <= done}
        assert free, f"these rooms import each other: {', '.join(sorted(left))}"
        done |= free
        left = {room: allowed for room, allowed in left.items() if room not in free}


@pytest.mark.parametrize("folder", ["src", "benchmarks", "docs"])
def test_no_plot_goes_through_pyplot(folder):
    """Pyplot and `matplotlib.use` are the process's: a notebook would lose its backend."""
    found = [
        path.name
        for path in (SOURCE.parents[1] / folder).rglob("*.py")
        if re.search(r"\bpyplot\b(?!,)|matplotlib\.use\(", path.read_text(encoding="utf-8"))
    ]
    assert not found


# `files.read_text` and `files.read_json` read what may come from anyone: they bound it, and refuse pipes and devices.
BARE_READ = re.compile(
    r"""\.read_(text|bytes)\(|\bjson\.loads?\(|\byaml\.(\w*load|SafeLoader)\b|\bopen\(\w*\)|\.open\((encoding|"rb?"[,)])"""
)
READ_OTHERWISE = {  # files, and folders with all that is in them
    "files.py": "the bounded readers themselves",
    "yaml_files.py": "parses what files.read_text returned, after it has counted the values",
    "data/": "reads data row by row, within bounds of its own",
    "export/gguf.py": "parses what the tokenizers library wrote",
    "inspect/xray.py": "the package's own page",
    "lab/page.py": "the package's own page",
    "lab/peak_memory.py": "the system's /proc",
    "memory.py": "the system's /proc and /sys",
    "native/": "the package's own sources, and a folder of the cache that no other user can write",
    "serve/body.py": "a request's body, which is bounded as it arrives",
    "serve/page.py": "the package's own page",
}


def places_of_bare_reads(path: Path, source: str) -> set[str]:
    return {path.as_posix(), f"{path.parts[0]}/"} if BARE_READ.search(source) else set()


def test_files_from_elsewhere_are_read_within_bounds():
    found = [places_of_bare_reads(path, (SOURCE / path).read_text(encoding="utf-8")) for path in FILES]
    assert not [places for places in found if places and places.isdisjoint(READ_OTHERWISE)]
    assert READ_OTHERWISE.keys() <= set().union(*found), "an exception is no longer needed"


@pytest.mark.parametrize(
    "source",
    [
        "path.read_text()",
        "(folder / name).read_bytes()",
        "json.load(file)",
        "json.loads(text)",
        "yaml.safe_load(text)",
        "open(path)",
        'path.open("rb")',
    ],
)
def test_a_read_without_bounds_is_detected(source):
    assert places_of_bare_reads(Path("lab/runs.py"), source)


@pytest.mark.parametrize("source", ["read_text(path, 5)", "read_json(path)", 'path.open("wb")', "os.open(path, flags)"])
def test_a_read_within_bounds_passes(source):
    assert not places_of_bare_reads(Path("lab/runs.py"), source)
